"""A strict stand-in for Huawei's adapter npu_device on a CPU, for tests. It knows what this project uses, and no more.

It computes with TensorFlow's own kernels in the precision that is written, whatever the precision mode. What the real adapter
was seen to refuse, to lose or to hang on is an error here, as soon as it can be told:

- options of unknown name, type or value; options set after open() has read them;
- variables made before open(), which gives TensorFlow a new context; tf.config.threading after it;
- after as_default(): tf.device does nothing, jit_compile is dropped, nested tf.functions are inlined;
- a loop that would not become an npu-loop, and a loop size that is not the length of its range;
- an iterator made on the host, and a function with variables called there.

FAKE_NPU_LOG names a file for what happened, a JSON object a line; FAKE_NPU_VERSION=2022 gives the older adapter's options;
FAKE_NPU_OVERFLOW lists steps whose gradients overflow;
FAKE_HCCL names a folder through which several processes exchange what they reduce and broadcast.
"""
import collections
import contextlib
import gc
import io
import itertools
import json
import os
import threading
import time
import types

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import attr_value_pb2
from tensorflow.python.data.ops import iterator_ops
from tensorflow.python.eager import context
from tensorflow.python.framework import ops

try:
    from tensorflow.python.eager.polymorphic_function import polymorphic_function as def_function
except ImportError:
    from tensorflow.python.eager import def_function
try:
    from tf_keras.src.mixed_precision.loss_scale_optimizer import LossScaleOptimizer
except ImportError:
    try:  # Keras 2.13; the public name is of a class that cannot be built upon
        from keras.src.mixed_precision.loss_scale_optimizer import LossScaleOptimizer
    except ImportError:
        from tensorflow.keras.mixed_precision import LossScaleOptimizer

NPU = "/job:localhost/replica:0/task:0/device:NPU:"
HCCL_TYPES = ("int8", "int32", "float16", "float32")
_state = types.SimpleNamespace(handle=None, options=None, loop_size=1, default=False)
_thread = threading.local()


def _record(event, **details):
    if "FAKE_NPU_LOG" in os.environ:
        with io.open(os.environ["FAKE_NPU_LOG"], "a") as file:
            file.write(json.dumps(dict(details, event=event, rank=os.environ.get("RANK_ID"))) + "\n")


# Options: name -> (default, allowed values or None)

_DUMP = {"enable_dump": (False, [True, False]), "dump_path": (None, None), "dump_step": (None, None),
         "dump_mode": ("output", ["input", "output", "all"]), "enable_dump_debug": (False, [True, False]),
         "dump_debug_mode": ("all", ["aicore_overflow", "atomic_overflow", "all"])}
_PROFILING = {"enable_profiling": (False, [True, False]), "profiling_options": ("{}", None)}
_OPTIONS = {"graph_run_mode": (1, [0, 1]),
            "precision_mode": (None, ["force_fp32", "allow_fp32_to_fp16", "force_fp16", "must_keep_origin_dtype",
                                      "allow_mix_precision", "cube_fp16in_fp32out", "allow_mix_precision_fp16",
                                      "allow_mix_precision_bf16", "allow_fp32_to_bf16"]),
            "modify_mixlist": (None, None), "fusion_switch_file": (None, None), "hcom_parallel": (True, [True, False]),
            "jit_compile": ("auto", ["true", "false", "auto"]), "deterministic": (0, [0, 1]),
            "precision_mode_v2": (None, ["fp16", "origin", "cube_fp16in_fp32out", "mixed_float16"])}
_NOT_IN_2022 = ("jit_compile", "precision_mode_v2", "deterministic")


class _Options:
    def __init__(self, name, known):
        object.__setattr__(self, "_name", name)
        object.__setattr__(self, "_known", known)
        object.__setattr__(self, "_set", {})

    def __setattr__(self, name, value):
        if _state.options is not None:
            raise RuntimeError("open() has read the options; %s comes too late" % name)
        if name not in self._known:
            raise ValueError("%s has no option %s, all options %s" % (self._name, name, list(self._known)))
        default, allowed = self._known[name]
        if allowed is not None and not any(value is one or type(value) is type(one) and value == one for one in allowed):
            if default is not None and not isinstance(value, type(default)):
                raise TypeError("Expected %s, got %s" % (type(default).__name__, type(value).__name__))
            raise ValueError("'%s' not in optional list %s" % (value, allowed))
        self._set[name] = value


def _new_options():
    known = {name: value for name, value in _OPTIONS.items()
             if os.environ.get("FAKE_NPU_VERSION") != "2022" or name not in _NOT_IN_2022}
    options = _Options("NpuConfig", known)
    object.__setattr__(options, "dump_config", _Options("NpuDumpConfig", _DUMP))
    object.__setattr__(options, "profiling_config", _Options("NpuProfilingConfig", _PROFILING))
    return options


_global_options = _new_options()


def global_options():
    return _global_options


def _read_options():
    options = dict(_global_options._set, **_global_options.dump_config._set)
    options.update(_global_options.profiling_config._set)
    if options.get("enable_dump") and options.get("enable_dump_debug"):
        raise RuntimeError("enable_dump and enable_dump_debug exclude each other")
    folders = [options.get("dump_path"), json.loads(options.get("profiling_options", "{}")).get("output")]
    for folder in folders:
        if folder and not os.path.isdir(folder):
            raise RuntimeError("the folder %s does not exist" % folder)
    return options


# The device

def open(device_id=None):
    device_id = int(os.environ.get("ASCEND_DEVICE_ID", "0")) if device_id is None else device_id
    if os.environ.get("FAKE_NPU_BROKEN"):
        raise RuntimeError("Failed open npu device %d : %s" % (device_id, os.environ["FAKE_NPU_BROKEN"]))
    if _state.handle is not None:
        if _state.handle.device_id != device_id:
            raise RuntimeError("Failed create npu instance on device %d as existed instance on [%d]"
                               % (device_id, _state.handle.device_id))
        return _state.handle
    early = [found for found in gc.get_objects() if isinstance(found, tf.Variable)]
    if early:
        raise RuntimeError("made before open(), so unusable: %s" % early[:3])
    if "CM_WORKER_SIZE" in os.environ and "RANK_SIZE" in os.environ:
        raise ValueError("RANK_SIZE and CM_WORK_SIZE cannot be configured at the same time")
    workers = int(os.environ.get("RANK_SIZE", os.environ.get("CM_WORKER_SIZE", "1")))
    if workers > 1 and "RANK_TABLE_FILE" not in os.environ and "CM_CHIEF_IP" not in os.environ:
        raise RuntimeError("CM_CHIEF_IP and RANK_TABLE_FILE are all not be configured.")
    _state.options = _read_options()
    new = context.Context()
    new.ensure_initialized()
    context._set_context(new)  # as the real one does: what lived in the old context, seeds too, is lost
    _state.handle = NpuDeviceHandle(device_id, workers, int(os.environ["RANK_ID"]) if workers > 1 else 0)
    _record("open", options=_state.options, workers=workers, job=os.environ.get("JOB_ID"))
    return _state.handle


class NpuDeviceHandle:
    def __init__(self, device_id, workers_num, worker_id):
        self.device_id, self.workers_num, self.worker_id = device_id, workers_num, worker_id

    def name(self):
        return NPU + str(self.device_id)

    def scope(self):
        return context.device(None)  # no device named stands for the NPU, the default

    def is_cluster_worker(self):
        return self.workers_num > 1 and self.workers_num > self.worker_id >= 0

    def as_default(self):
        if not _state.default:
            _state.default = True
            def_function.Function.__call__ = _call
            def_function.function = tf.function = _function
            ops.device = _same_device
            iterator_ops.OwnedIterator._create_iterator = _create_iterator
        return self


def _on_host():
    return "CPU" in (context.context().device_name or "")


@contextlib.contextmanager
def _same_device(*_, **__):
    with context.device(context.context().device_name or None):
        yield


_original_function = def_function.function
_original_call = def_function.Function.__call__
_original_create_iterator = iterator_ops.OwnedIterator._create_iterator


def _function(func=None, *args, **kwargs):
    if kwargs.get("jit_compile"):
        _record("jit_compile dropped")
        kwargs["jit_compile"] = False
    decorate = _original_function(None, *args, **kwargs)
    return decorate if func is None else decorate(func)


def _create_iterator(self, dataset):
    _original_create_iterator(self, dataset)
    self._made_on_host = _on_host()


def _call(self, *args, **kwargs):
    if getattr(_thread, "inside", False):
        return self._python_function(*args, **kwargs)  # inlined into the outermost one
    _thread.inside = True
    try:
        if context.executing_eagerly() and not tf.config.functions_run_eagerly():
            _check_call(self, args, kwargs)
        return _original_call(self, *args, **kwargs)
    finally:
        _thread.inside = False


def _check_call(self, args, kwargs):
    if _on_host():
        if self.get_concrete_function(*args, **kwargs).variables:
            raise RuntimeError("a function with variables was called on the host, but they are on the NPU")
        return
    iterators = [arg for arg in args if isinstance(arg, tf.data.Iterator)]
    if not iterators:
        return
    if any(iterator._made_on_host for iterator in iterators):
        raise RuntimeError("the iterator was made on the host, so nothing feeds the NPU from it")
    function = self.get_concrete_function(*args, **kwargs)
    loop = _loop_type(function)
    if loop == "npu-loop":
        ranges = [int(arg) for arg in args if tf.is_tensor(arg)]
        if ranges != [_state.loop_size]:
            raise RuntimeError("the range is %s but the loop size is %d: wrong number of steps" % (ranges, _state.loop_size))
    elif loop != "no-loop":
        raise RuntimeError("%s became a %s" % (self._python_function.__name__, loop))
    _record("run", function=self._python_function.__name__, loop=loop, steps=_state.loop_size,
            traces=self.experimental_get_tracing_count())


_loop_types = {}


def _loop_type(function):
    if function.name not in _loop_types:
        from devices import graph_check  # its rules are tested against what the real adapter was seen to do

        report = graph_check.examine(function, trusted=frozenset(["PyFunc"]))
        if report.problems:
            raise RuntimeError("; ".join(report.problems))
        kept = [node.name for body in function.graph.as_graph_def().library.function for node in body.node_def
                if node.attr["_keep_dtype"].i]
        print("Concrete graph for %s loop type %s" % (tf.compat.as_str(function.name), report.loop), flush=True)
        _record("graph", loop=report.loop, kept=kept)
        _loop_types[function.name] = report.loop
    return _loop_types[function.name]


def set_npu_loop_size(loop_size):
    if type(loop_size) is not int or loop_size < 1:
        raise TypeError("the loop size is an int above 0, not %r" % (loop_size,))
    _state.loop_size = loop_size
    _record("loop size", steps=loop_size)


@contextlib.contextmanager
def keep_dtype_scope():
    with ops.get_default_graph()._attr_scope({"_keep_dtype": attr_value_pb2.AttrValue(i=1)}):
        yield


# HCCL: the processes exchange files, one for each call and rank

_calls = collections.defaultdict(itertools.count)
_names = itertools.count()


def _gather(name, *arrays):
    """The arrays of all ranks, a list for each."""
    folder, call = os.environ["FAKE_HCCL"], "%s-%d" % (name, next(_calls[name]))
    own = os.path.join(folder, "%s-%d" % (call, _state.handle.worker_id))
    np.savez(own + ".tmp.npz", *arrays)
    os.rename(own + ".tmp.npz", own + ".npz")
    everyone = []
    for rank in range(_state.handle.workers_num):
        path = os.path.join(folder, "%s-%d.npz" % (call, rank))
        for _ in range(12000):
            if os.path.exists(path):
                break
            time.sleep(0.01)
        with np.load(path) as found:
            everyone.append([found["arr_%d" % i] for i in range(len(arrays))])
    return everyone


def _all_reduce(values, reduction="mean", fusion=1, fusion_id=-1, group="hccl_world_group"):
    if _state.handle is None or not _state.handle.is_cluster_worker():
        return values
    if not isinstance(values, (list, tuple)):
        return _all_reduce([values], reduction, fusion, fusion_id, group)[0]
    values = [tf.convert_to_tensor(value) for value in values]
    for value in values:
        if value.dtype.name not in HCCL_TYPES:
            raise TypeError("HCCL cannot reduce %s" % value.dtype.name)
    if reduction not in ("mean", "sum", "max", "min", "prod"):
        raise ValueError(reduction)
    name = "all_reduce_%d" % next(_names)
    _record("all_reduce", count=len(values), reduction=reduction)

    def reduce(*arrays):
        return [getattr(np, reduction)(ranks, axis=0).astype(ranks[0].dtype) for ranks in zip(*_gather(name, *arrays))]

    results = tf.numpy_function(reduce, values, [value.dtype for value in values])
    for result, value in zip(results, values):
        result.set_shape(value.shape)
    return results


def _broadcast(values, root_rank=0, fusion=2, fusion_id=0, group="hccl_world_group"):
    if _state.handle is None or not _state.handle.is_cluster_worker():
        return
    values = values if isinstance(values, (list, tuple)) else [values]
    for value in values:
        if value.dtype.name not in HCCL_TYPES:
            raise TypeError("HCCL cannot broadcast %s" % value.dtype.name)
    _record("broadcast", count=len(values))
    for value, new in zip(values, _gather("broadcast", *[value.numpy() for value in values])[root_rank]):
        value.assign(new)


class NpuLossScaleOptimizer(LossScaleOptimizer):
    """Skips a step by the device's overflow status, at a fixed scale too. On the 910 an overflow gives no Inf; here it does."""

    def __init__(self, inner_optimizer, dynamic=True, initial_scale=None, dynamic_growth_steps=None):
        super().__init__(inner_optimizer, dynamic, initial_scale, dynamic_growth_steps)
        self._finite = tf.Variable(False, trainable=False, name="npu_last_step_finite")

    def __getattribute__(self, name):
        if name == "last_step_finite":
            if os.environ.get("FAKE_NPU_VERSION") == "2022":
                raise AttributeError(name)
            name = "_finite"
        return super().__getattribute__(name)

    def apply_gradients(self, grads_and_vars, name=None, experimental_aggregate_gradients=True):
        pairs = tuple(grads_and_vars)
        finite = tf.logical_not(tf.cast(_overflow_status([gradient for gradient, _ in pairs], self.iterations), tf.bool))
        self._finite.assign(finite)
        if self.dynamic:
            self._loss_scale.update([tf.where(finite, 0.0, np.inf)])
        tf.cond(finite, lambda: tf.group(self._optimizer.apply_gradients(pairs, name, experimental_aggregate_gradients=False)),
                lambda: tf.group(self._optimizer.iterations.assign_add(1, read_value=False)))


def _overflow_status(gradients, iterations):
    """Not 0 if a gradient has overflowed, or FAKE_NPU_OVERFLOW says so: "always", or steps counted from 1, as in "2,3,9"."""
    overflown = tf.logical_not(tf.reduce_all([tf.reduce_all(tf.math.is_finite(gradient)) for gradient in gradients]))
    steps = os.environ.get("FAKE_NPU_OVERFLOW", "0")
    wanted = steps == "always" or tf.reduce_any(tf.equal(iterations + 1, [int(step) for step in steps.split(",")]))
    return _all_reduce(tf.cast(tf.logical_or(overflown, wanted), tf.int32), "sum", fusion=0)


distribute = types.SimpleNamespace(all_reduce=_all_reduce, broadcast=_broadcast)
train = types.SimpleNamespace(optimizer=types.SimpleNamespace(NpuLossScaleOptimizer=NpuLossScaleOptimizer))
