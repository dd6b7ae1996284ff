"""graph_check against what the real adapter was seen to do with each structure, and on the loop that pretraining runs."""
import os
import subprocess
import sys

import pytest
import tensorflow as tf

import classifiers
import models
import pretraining
from devices import graph_check

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OPERATORS = os.path.join(ROOT, "..", "shared", "data", "npu_ops_2021.txt")


class Learner(tf.Module):
    def __init__(self):
        super().__init__()
        self.loss = tf.Variable(0.0)
        self.weight = tf.Variable(tf.ones([3]))

    def step(self, x):
        self.weight.assign_sub(0.1 * tf.reduce_mean(x, axis=0))
        self.loss.assign(tf.reduce_sum(self.weight))

    def plain(self, iterator, n):
        for _ in tf.range(n):
            self.step(next(iterator))

    def returning(self, iterator, n):
        for _ in tf.range(n):
            self.step(next(iterator))
        return self.loss.read_value()

    def afterwards(self, iterator, n):
        for _ in tf.range(n):
            self.step(next(iterator))
        self.loss.assign_add(1.0)

    def beside(self, iterator, n):
        for _ in tf.range(n):
            self.step(next(iterator))
        for _ in tf.range(n):
            self.loss.assign_add(1.0)

    def once(self, iterator, n):
        self.step(next(iterator))

    def unrolled(self, iterator, n):
        for _ in range(2):
            self.step(next(iterator))

    def twice_a_step(self, iterator, n):
        for _ in tf.range(n):
            self.step(next(iterator) + next(iterator))

    def index(self, iterator, n):
        for i in tf.range(n):
            self.step(next(iterator) * tf.cast(i, tf.float32))

    def carrying(self, iterator, n):
        total = tf.zeros([])
        for _ in tf.range(n):
            total += tf.reduce_sum(next(iterator))
            self.loss.assign(total)

    def branching(self, iterator, n):
        for _ in tf.range(n):
            x = next(iterator)
            if tf.reduce_sum(x) > 0:
                self.step(x)

    def breaking(self, iterator, n):
        for _ in tf.range(n):
            self.step(next(iterator))
            if self.loss < 1:
                break

    def breaking_before(self, iterator, n):
        for _ in tf.range(n):
            x = next(iterator)
            if tf.reduce_sum(x) < 1:
                break
            self.step(x)

    def until_a_variable(self, iterator, n):
        while self.loss < 1:
            self.step(next(iterator))

    def until_a_tensor(self, iterator, n):
        total = tf.zeros([])
        while total < 1:
            x = next(iterator)
            total += tf.reduce_sum(x)
            self.step(x)

    def continuing(self, iterator, n):
        for _ in tf.range(n):
            x = next(iterator)
            if tf.reduce_sum(x) < 1:
                continue
            self.step(x)

    def counting(self, iterator, n):
        i = 0
        while i < n:
            self.step(next(iterator))
            i += 1

    def printing(self, iterator, n):
        for _ in tf.range(n):
            self.step(next(iterator))
            tf.print(self.loss)

    def doubles(self, iterator, n):
        for _ in tf.range(n):
            self.step(tf.cast(tf.cast(next(iterator), tf.float64) * 2, tf.float32))

    def strings(self, iterator, n):
        for _ in tf.range(n):
            self.step(next(iterator) + tf.strings.to_number(tf.strings.as_string(self.loss)))

    def random(self, iterator, n):
        for _ in tf.range(n):
            self.step(next(iterator) + tf.random.stateless_normal([2, 3], [1, 2]))


def examine(name, drop_remainder=True, **settings):
    learner = Learner()
    data = tf.data.Dataset.from_tensor_slices(tf.ones([6, 3])).batch(2, drop_remainder=drop_remainder)
    function = tf.function(getattr(learner, name)).get_concrete_function(iter(data), tf.constant(2))
    return graph_check.examine(function, **settings)


@pytest.mark.parametrize("name, loop, problem", [
    ("plain", "npu-loop", None),
    ("branching", "npu-loop", None),
    ("returning", "builtin-loop", "returned"),
    ("afterwards", "builtin-loop", "does not wait for"),
    ("beside", "builtin-loop", "2 While nodes, of which 1"),
    ("once", "no-loop", "0 While nodes"),
    ("unrolled", "no-loop", "0 While nodes"),
    ("twice_a_step", "npu-loop", "takes 2 elements"),
    ("index", "npu-loop", "never change"),
    ("carrying", "npu-loop", "never change"),
    ("breaking", "npu-loop", "as by break"),
    ("breaking_before", "npu-loop", "as by break"),
    ("until_a_variable", "npu-loop", "decides when the loop ends"),
    ("until_a_tensor", "npu-loop", "decides when the loop ends"),
    ("continuing", "npu-loop", None),
    ("counting", "npu-loop", None),
])
def test_structures(name, loop, problem):
    report = examine(name)
    assert report.loop == loop
    assert (not report.problems) if problem is None else any(problem in line for line in report.problems), report.problems


@pytest.mark.parametrize("name, warned", [
    ("doubles", "Cast of float64"), ("strings", "AsString of string"), ("printing", "PrintV2 of string")])
def test_types_inside_the_loop_are_warned_of(name, warned):
    report = examine(name)  # the adapter looks at operators' names; of types only at those of the function's own inputs and results
    assert (report.loop, report.problems) == ("npu-loop", []) and warned in report.warnings[0]
    told = graph_check.verdict(report, None).splitlines()
    assert told[-2].startswith("  warning: types that the device may refuse: ") and told[-1].startswith("Yes: by the adapter's rules")
    assert examine(name, supported=set(report.operators)).loop == "npu-loop"
    assert examine(name, supported=set(report.operators) - {warned.split()[0]}).loop == "mix mode"


def test_a_loop_that_ends_early_is_no_loop_for_the_device():
    assert graph_check.verdict(examine("breaking"), None).splitlines()[-1] == (
        "No: an Ascend 910 would take it whole, as one npu-loop, but compute something else.")


@pytest.mark.parametrize("function, what", [
    (lambda: tf.function(lambda x: tf.cast(x, tf.float32)).get_concrete_function(tf.constant(1.0, tf.float64)), "float64"),
    (lambda: tf.function(lambda x: tf.strings.as_string(x)).get_concrete_function(tf.constant(1.0)), "string")])
def test_types_of_the_functions_own_inputs_and_results_are_not_taken(function, what):
    report = graph_check.examine(function())
    assert report.loop == "mix mode" and any(line.endswith("own inputs and results: " + what) for line in report.problems)


def test_shapes_that_are_not_known_make_a_host_loop():
    report = examine("plain", drop_remainder=False)
    assert report.loop == "host-loop" and any("IteratorGetNext" in line for line in report.problems)


def test_operators_outside_of_the_list_are_found_in_the_loop_body():
    known = set(examine("plain").operators)
    assert examine("plain", supported=known).loop == "npu-loop"
    assert examine("plain", supported=known - {"IteratorGetNext"}).loop == "npu-loop"  # the adapter's own
    report = examine("random", supported=known)
    assert report.loop == "mix mode" and any("StatelessRandom" in line for line in report.problems)
    report = examine("plain", supported=known - {"Mean"})
    assert report.problems == ["operators that the device lacks: Mean"]


@pytest.mark.parametrize("mode, listed, problem", [
    (None, [], True),
    (None, ["NpuGetFloatStatus", "NpuClearFloatStatus"], False),
    (None, ["NpuGetFloatStatusV2", "NpuClearFloatStatusV2"], False),
    (None, ["NpuGetFloatStatus", "NpuClearFloatStatusV2"], True),
    ("must_keep_origin_dtype", [], False)])
def test_under_loss_scaling_the_device_must_be_able_to_tell_overflows(mode, listed, problem):
    device = graph_check.device_on_paper(mode, "auto")
    classifier = classifiers.Classifier(device, None, 3, 2, lambda step: tf.constant(0.1), 0.1)
    data = tf.data.Dataset.from_tensors((tf.zeros([8, 3]), tf.zeros([8], tf.int64)))
    function = classifier.train_loop.get_concrete_function(device.iterate(data), tf.constant(2))
    report = graph_check.examine(function, set(graph_check.examine(function).operators) | set(listed))
    assert [line for line in report.problems] == [
        "operators that the device lacks: those of loss scaling, NpuGetFloatStatus with NpuClearFloatStatus or NpuGetFloatStatusV2 "
        "with NpuClearFloatStatusV2"] * problem
    assert report.loop == ("mix mode" if problem else "npu-loop")


def test_a_list_of_operators_may_have_comments(tmp_path):
    path = tmp_path / "ops.txt"
    path.write_text("# of 2021\nConv2D  # cube\n\nRelu\n")
    assert graph_check.read_operators(str(path)) == {"Conv2D", "Relu"}
    path.write_text("something else\n")
    with pytest.raises(graph_check.UserError, match="no Conv2D"):
        graph_check.read_operators(str(path))
    with pytest.raises(graph_check.UserError, match="cannot read"):
        graph_check.read_operators(str(tmp_path / "nowhere.txt"))


@pytest.fixture(scope="module")
def loop():
    return pretraining.trace(pretraining.Config(check_npu=True, width_multiplier=1 / 16, batch_size=8))


@pytest.mark.skipif(not os.path.exists(OPERATORS), reason="the list of an Ascend 910's operators is not here")
def test_the_training_loop_needs_no_operator_that_the_npu_lacked_in_2021(loop):
    assert graph_check.examine(loop, graph_check.read_operators(OPERATORS)).problems == []


@pytest.mark.parametrize("frozen", [True, False])
def test_the_loop_of_linear_evaluation_and_finetuning_is_taken_whole_too(frozen):
    device = graph_check.device_on_paper(None, "auto")
    encoder = models.ResNet18(1 / 16)
    classifier = classifiers.Classifier(device, encoder, encoder.features, 10, lambda step: tf.constant(0.1), 0.1, frozen)
    data = tf.data.Dataset.from_tensors((tf.zeros([8, 32, 32, 3]), tf.zeros([8], tf.int64)))
    function = classifier.train_loop.get_concrete_function(device.iterate(data), tf.constant(2))
    supported = graph_check.read_operators(OPERATORS) if os.path.exists(OPERATORS) else None
    assert graph_check.examine(function, supported).problems == []


def test_check_says_yes(loop, monkeypatch, capsys):
    monkeypatch.setattr(pretraining, "trace", lambda config: loop)
    assert pretraining.check_npu(pretraining.Config(check_npu=True))
    printed = capsys.readouterr().out
    assert "1 While; names not checked" in printed
    assert printed.splitlines()[-1].startswith("Yes: by the adapter's rules it becomes one npu-loop")


def test_the_command_says_no_by_its_exit_status(tmp_path):
    path = tmp_path / "ops.txt"
    path.write_text("Conv2D\nRelu\n")
    done = subprocess.run([sys.executable, "pretraining.py", "--check_npu", "--npu_ops", str(path), "--width_multiplier=0.0625"],
                          cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
    assert done.returncode == 1 and "FusedBatchNormV3" in done.stdout
    assert done.stdout.splitlines()[-1] == "No: an Ascend 910 would not take it whole, but as mix mode."


def test_the_old_command_tells_the_new_one():
    done = subprocess.run([sys.executable, "npu_config.py", "--check"], cwd=ROOT, stderr=subprocess.PIPE, universal_newlines=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "python pretraining.py --check_npu" in done.stderr
