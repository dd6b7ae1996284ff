"""Whether an Ascend 910 can take a training loop whole: told from the traced graph, on any machine.

The rules are those by which the adapter npu_device decides; nothing is run, and no NPU is needed. The command is
`python pretraining.py --check_npu --npu_ops FILE`, with the flags of the run that is meant.
"""
import collections
import contextlib
import dataclasses
import types
from typing import Any, Dict, FrozenSet, Iterable, Iterator, List, Optional, Set, Tuple

import tensorflow as tf
from tensorflow.core.framework import attr_value_pb2
from tensorflow.python.framework import op_def_registry

from commands import UserError
from devices import ascend
from models import keras

WHILE = ("While", "StatelessWhile")
NEXT = "IteratorGetNext"
# Operators that the adapter itself puts into the graph or replaces, whatever the list of the device's operators says.
ADAPTER_OPERATORS = frozenset(["IteratorV2", NEXT, "Placeholder"])
# What an older or a newer adapter puts into the graph to see overflows under loss scaling, and the mark that it leaves there.
FLOAT_STATUS = (("NpuGetFloatStatus", "NpuClearFloatStatus"), ("NpuGetFloatStatusV2", "NpuClearFloatStatusV2"))
SCALED = "_npu_loss_scale"
# Of the function's own inputs and results; inside of it the adapter looks at the operators' names only.
LACKING_TYPES = ("float64", "complex64", "complex128", "variant", "string")
# Outputs whose unknown shape the adapter ignores: operator and number of the output.
NEGLIGIBLE = {("FusedBatchNormV3", 5)}


@dataclasses.dataclass
class Report:
    """What the graph of a function is like, and what follows from it.

    loop: 'npu-loop' (the whole loop on the device), 'builtin-loop', 'host-loop', 'no-loop', as the adapter logs it, or
    'mix mode' where part of it would run on the CPU. problems: what stands in the way, one line each. warnings: what the adapter
    lets pass but the device may refuse.
    """
    loop: str
    problems: List[str]
    warnings: List[str]
    operators: Dict[str, int]
    whiles: int


class Body:
    """A graph or a function's body, without what nothing needs: names of nodes, and what each takes its input from.

    nodes: name -> (operator, names that it depends on, attributes). results: for each result of a function the name it
    comes from. roots: names that are there for their effect.
    """

    def __init__(self, nodes: Dict[str, Tuple[str, List[str], Any]], arguments: List[str], results: List[str],
                 roots: Iterable[str]) -> None:
        self.arguments = arguments
        self.results = results
        self.roots = list(roots)
        self._all = nodes
        live = self.ancestors(self.results + self.roots)
        self.nodes = {name: node for name, node in nodes.items() if name in live}

    @classmethod
    def of_function(cls, definition: Any) -> "Body":
        """From a FunctionDef."""
        nodes = {node.name: (node.op, [_producer(name) for name in node.input], node.attr) for node in definition.node_def}
        results = [_producer(definition.ret[result.name]) for result in definition.signature.output_arg]
        return cls(nodes, [argument.name for argument in definition.signature.input_arg], results, definition.control_ret.values())

    @classmethod
    def of_graph(cls, graph: Any, definition: Any) -> "Body":
        """From a FuncGraph and its GraphDef; what the adapter keeps are results, and operators with state."""
        nodes = {node.name: (node.op, [_producer(name) for name in node.input], node.attr) for node in definition.node}
        effects = {op.name for op in graph.control_outputs}
        roots = [op.name for op in graph.get_operations() if op.op_def.is_stateful or op.name in effects]
        return cls(nodes, [], [tensor.op.name for tensor in graph.outputs], roots)

    def ancestors(self, names: Iterable[str]) -> Set[str]:
        """The nodes and arguments that the given ones depend on, and themselves."""
        found, left = set(), list(names)  # type: Set[str], List[str]
        while left:
            name = left.pop()
            if name not in found:
                found.add(name)
                left += self._all[name][1] if name in self._all else []
        return found

    def unchanged(self, name: str) -> str:
        """The name that a value has before it is merely passed on."""
        while name in self._all and self._all[name][0] == "Identity":
            name = self._all[name][1][0]
        return name

    def carried(self) -> List[str]:
        """Arguments of a While's body that change from step to step and that anything but their own next value depends on.

        On the NPU these stay as they were at the first step. The loop's own counters change too, but nothing uses them.
        """
        found = []
        for argument, result in self.changing().items():
            others = [other for other in self.results if other != result] + self.roots
            if argument in self.ancestors(others):
                found.append(argument)
        return found

    def changing(self) -> Dict[str, str]:
        """Arguments of a While's body that change from step to step, and the result that is the next value of each."""
        return {argument: result for argument, result in zip(self.arguments, self.results) if self.unchanged(result) != argument}

    def decides(self, condition: "Body") -> List[str]:
        """Of a While with this body: what its condition takes from the steps, other than their number.

        On the NPU the loop ends after its number of steps all the same.
        """
        used = condition.ancestors(condition.results)
        found = [name for name, (operator, _, _) in condition.nodes.items() if _has_state(operator)]
        changing = self.changing()
        for argument, name in zip(self.arguments, condition.arguments):
            if name in used and argument in changing:
                operator, inputs, _ = self.nodes.get(self.unchanged(changing[argument]), ("", [], None))
                counts = operator in ("Add", "AddV2") and not any(
                    other in self.nodes and self.nodes[other][0] != "Const" or other in changing and other != argument
                    for other in inputs)
                if not counts:
                    found.append(argument)
        return found


def _producer(reference: str) -> str:
    """`node:output:0`, `node:0` or `^node` -> `node`."""
    return reference.lstrip("^").split(":")[0]


def _has_state(operator: str) -> bool:
    definition = op_def_registry.get(operator)
    return definition is not None and definition.is_stateful


def _functions(attributes: Any) -> List[str]:
    """Names of the functions that a node calls."""
    return [function.name for value in attributes.values() for function in [value.func] + list(value.list.func) if function.name]


def examine(function: Any, supported: Optional[Set[str]] = None, trusted: FrozenSet[str] = frozenset()) -> Report:
    """Tell how the adapter would run a ConcreteFunction.

    supported: names of the operators that the device has, None if unknown. trusted: operators not to be looked at.
    """
    graph = function.graph
    definition = graph.as_graph_def(add_shapes=True)
    library = {entry.signature.name: Body.of_function(entry) for entry in definition.library.function}
    main = Body.of_graph(graph, definition)

    def reach(body: Body) -> Dict[int, Body]:
        """The body and all that its nodes call, at any depth."""
        found, left = {}, [body]  # type: Dict[int, Body], List[Body]
        while left:
            current = left.pop()
            if id(current) not in found:
                found[id(current)] = current
                left += [library[name] for _, _, attributes in current.nodes.values() for name in _functions(attributes)]
        return found

    operators = collections.Counter()  # type: Dict[str, int]
    lacking, unknown, dtypes, scaled = set(), [], set(), False  # type: Set[str], List[str], Set[str], bool
    for body in reach(main).values():
        for name, (operator, _, attributes) in body.nodes.items():
            operators[operator] += 1
            scaled = scaled or SCALED in attributes
            if operator in trusted:
                continue
            if supported is not None and operator not in supported | ADAPTER_OPERATORS:
                lacking.add(operator)
            dtypes |= {"%s of %s" % (operator, dtype) for dtype in _types(operator, attributes) if dtype in LACKING_TYPES}
            unknown += ["%s (%s)" % (name, operator) for number, shape in enumerate(attributes["_output_shapes"].list.shape)
                        if (shape.unknown_rank or any(dim.size < 0 for dim in shape.dim)) and (operator, number) not in NEGLIGIBLE]

    def takes(body: Body) -> int:
        """How many elements of an iterator a body takes, nested bodies included."""
        return sum(node[0] == NEXT for part in reach(body).values() for node in part.nodes.values())

    whiles = [name for name, node in main.nodes.items() if node[0] in WHILE]
    keys = [name for name in whiles if takes(library[main.nodes[name][2]["body"].func.name])]
    own = {tensor.dtype.base_dtype.name for tensor in graph.inputs + graph.outputs} & set(LACKING_TYPES)
    own -= {"variant"}  # an iterator of TensorFlow 2.6 comes with one that nothing uses
    blind = scaled and supported is not None and not any(supported.issuperset(pair) for pair in FLOAT_STATUS)
    problems = []
    if lacking:
        problems.append("operators that the device lacks: %s" % ", ".join(sorted(lacking)))
    if blind:
        problems.append("operators that the device lacks: those of loss scaling, %s" % " or ".join(map(" with ".join, FLOAT_STATUS)))
    if own:
        problems.append("types that the device lacks, among the function's own inputs and results: %s" % ", ".join(sorted(own)))
    warnings = ["types that the device may refuse: %s" % ", ".join(sorted(dtypes))] if dtypes else []
    if unknown:
        problems.append("shapes that are not known in advance: %s" % _some(unknown))
    if len(whiles) != 1 or not keys:
        problems.append("%d While nodes, of which %d take data; there must be one, and it must" % (len(whiles), len(keys)))
    outside = []  # type: List[str]
    if keys:
        body, condition = [library[main.nodes[keys[0]][2][part].func.name] for part in ("body", "cond")]
        before = main.ancestors(keys)
        outside = [name for name in main.nodes if name not in before]
        if graph.outputs:
            problems.append("%d results are returned; only Variables may carry them out" % len(graph.outputs))
        if outside:
            problems.append("nodes that the loop does not wait for: %s" % _some(["%s (%s)" % (n, main.nodes[n][0]) for n in outside]))
        if takes(body) != 1:
            problems.append("a step takes %d elements; the device gets one for each step" % takes(body))
        if body.carried():
            problems.append("the loop's index, or tensors carried from step to step, are used: %s; on the device they never change"
                            % ", ".join(body.carried()))
        if body.decides(condition):
            problems.append("what the steps compute decides when the loop ends, as by break: %s; on the device it takes all its steps"
                            % ", ".join(body.decides(condition)))
    if lacking or blind or own:
        loop = "mix mode"
    elif not keys:
        loop = "no-loop"
    elif len(whiles) > 1 or outside or graph.outputs:
        loop = "builtin-loop"
    else:
        loop = "host-loop" if unknown else "npu-loop"
    return Report(loop, problems, warnings, dict(operators), len(whiles))


def _types(operator: str, attributes: Any) -> Iterator[str]:
    """Names of the element types that a node takes and gives: those among its attributes, and those that it always has."""
    signature = op_def_registry.get(operator)
    fixed = [argument.type for argument in list(signature.input_arg) + list(signature.output_arg)] if signature else []
    for number in fixed + [number for value in attributes.values() for number in [value.type] + list(value.list.type)]:
        if number:
            yield str(tf.dtypes.as_dtype(number).name)


def _some(names: List[str]) -> str:
    return ", ".join(names[:5]) + (", and %d more" % (len(names) - 5) if len(names) > 5 else "")


def device_on_paper(mode: Optional[str], loss_scale: str) -> ascend.NpuDevice:
    """An NPU to trace for, without one. Keras's loss scaling stands for the adapter's, and bears its mark.

    mode, loss_scale: as --precision_mode and --loss_scale.
    """
    tf.config.set_visible_devices([], "GPU")

    def loss_scaled(optimizer: Any, **settings: Any) -> Any:
        scaled = keras.mixed_precision.LossScaleOptimizer(optimizer, **settings)
        apply = scaled.apply_gradients

        def apply_marked(*args: Any, **settings: Any) -> Any:
            with tf.compat.v1.get_default_graph()._attr_scope({SCALED: attr_value_pb2.AttrValue(b=True)}):
                return apply(*args, **settings)

        scaled.apply_gradients = apply_marked
        return scaled

    optimizer = types.SimpleNamespace(NpuLossScaleOptimizer=loss_scaled)
    adapter = types.SimpleNamespace(keep_dtype_scope=contextlib.nullcontext, train=types.SimpleNamespace(optimizer=optimizer))
    handle = types.SimpleNamespace(workers_num=1, worker_id=0, scope=contextlib.nullcontext)
    return ascend.NpuDevice(adapter, handle, mode or ascend.DEFAULT_MODE, loss_scale)


def read_operators(path: str) -> Set[str]:
    """The names in a file of operators. UserError if there are none."""
    try:
        with open(path) as file:
            names = {line.split("#")[0].strip() for line in file} - {""}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("--npu_ops: cannot read %s (%s)." % (path, error))
    if "Conv2D" not in names:
        raise UserError("--npu_ops: %s is no list of TensorFlow's operators, one name a line; it has no Conv2D." % path)
    return names


def verdict(report: Report, checked_by: Optional[str]) -> str:
    """What is told of a report, in lines that end in Yes or No. checked_by: the file of operators, None if there was none."""
    lines = ["  %d nodes of %d operators, %d While; names %s" % (
        sum(report.operators.values()), len(report.operators), report.whiles,
        "checked by %s" % checked_by if checked_by else "not checked")]
    lines += ["  " + problem for problem in report.problems] + ["  warning: " + warning for warning in report.warnings]
    if report.problems and report.loop == "npu-loop":
        return "\n".join(lines + ["No: an Ascend 910 would take it whole, as one npu-loop, but compute something else."])
    if report.problems:
        return "\n".join(lines + ["No: an Ascend 910 would not take it whole, but as %s." % report.loop])
    return "\n".join(lines + ["Yes: by the adapter's rules it becomes one %s on an Ascend 910. Not tried on hardware." % report.loop])
