"""Each optimiser against NumPy over several steps of a changing rate, alone and as the devices use it.

What needs two devices runs in a process of its own: this file is then the command.
"""
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT

import npu_config
import optimizers
from models import keras

SHAPES = {"conv": (3, 3, 2, 4), "dense": (6, 4), "bias": (4,), "scalar": (), "zero": (5, 3), "flat": (5, 3)}
RATES = [0.3, 0.1, 0.25, 0.02, 0.2, 0.2]
STEPS = len(RATES)
SETTINGS = [("adam", 0.9, 0.0), ("adam", 0.8, 0.1), ("sgd", 0.9, 0.01), ("sgd", 0.0, 0.01), ("sgd", 0.9, 0.0),
            ("lars", 0.9, 0.05), ("lars", 0.9, 0.0), ("lars", 0.0, 0.05)]


def start():
    """Weights to start from, float32; one kernel is zero."""
    random = np.random.RandomState(0)
    return {name: np.float32(random.randn(*shape) * (name != "zero")) for name, shape in SHAPES.items()}


def gradients(step):
    """Float32; one kernel has no gradient."""
    random = np.random.RandomState(step + 1)
    return {name: np.float32(random.randn(*shape) * (name != "flat")) for name, shape in SHAPES.items()}


class Recomputation:
    """The three rules in NumPy, float64, on one weight."""

    def __init__(self, name, momentum, weight_decay, trust, w):
        self.name, self.momentum, self.decay, self.trust = name, momentum, weight_decay if w.ndim > 1 else 0, trust
        self.w, self.v, self.m2, self.t = w.astype(np.float64), np.zeros(w.shape), np.zeros(w.shape), 0

    def step(self, g, rate):
        g, self.t = g.astype(np.float64), self.t + 1
        if self.name == "adam":
            self.w = self.w - rate * self.decay * self.w
            self.v = self.momentum * self.v + (1 - self.momentum) * g
            self.m2 = 0.999 * self.m2 + 0.001 * g ** 2
            corrected = np.sqrt(1 - 0.999 ** self.t) / (1 - self.momentum ** self.t)
            self.w = self.w - rate * corrected * self.v / (np.sqrt(self.m2) + 1e-7)
            return
        g = g + self.decay * self.w
        if self.name == "lars" and self.w.ndim > 1 and self.w.any() and g.any():
            g = self.trust * np.linalg.norm(self.w) / np.linalg.norm(g) * g
        self.v = self.momentum * self.v + g
        self.w = self.w - rate * self.v


def recomputed(name, momentum, weight_decay, trust=0.1, steps=STEPS):
    """The weights after each of the steps."""
    rules = {key: Recomputation(name, momentum, weight_decay, trust, w) for key, w in start().items()}
    after = []
    for step in range(steps):
        for key, g in gradients(step).items():
            rules[key].step(g, RATES[step])
        after.append({key: rule.w for key, rule in rules.items()})
    return after


class Trained:
    """Weights, a step and an optimiser whose rate depends on the step, and one compiled function that takes a step."""

    def __init__(self, name, momentum, weight_decay, wrap=lambda optimizer: optimizer):
        self.weights = {key: tf.Variable(value, name=key) for key, value in start().items()}
        self.step = tf.Variable(0, dtype=tf.int64)
        optimizer = optimizers.make(name, lambda: tf.gather(tf.constant(RATES), self.step), momentum, weight_decay, trust=0.1)
        optimizer._create_all_weights(list(self.weights.values()))
        self.inner, self.optimizer = optimizer, wrap(optimizer)
        self.apply = tf.function(self._apply)

    def _apply(self, found):
        if hasattr(self.optimizer, "get_unscaled_gradients"):
            found = dict(zip(found, self.optimizer.get_unscaled_gradients(list(found.values()))))
        self.optimizer.apply_gradients([(found[key], weight) for key, weight in self.weights.items()])
        self.step.assign_add(1)

    def take(self, steps, scale=1.0):
        for step in steps:
            self.apply({key: tf.constant(value * np.float32(scale)) for key, value in gradients(step).items()})
        return {key: weight.numpy() for key, weight in self.weights.items()}


def assert_equal(found, expected):
    for key in SHAPES:
        assert found[key].dtype == np.float32
        np.testing.assert_allclose(found[key], expected[key], rtol=2e-6, atol=2e-6, err_msg=key)


@pytest.mark.parametrize("name, momentum, weight_decay", SETTINGS)
def test_steps_equal_numpy(name, momentum, weight_decay):
    trained = Trained(name, momentum, weight_decay)
    for step, expected in enumerate(recomputed(name, momentum, weight_decay)):
        assert_equal(trained.take([step]), expected)
    assert trained.apply.experimental_get_tracing_count() == 1 and int(trained.inner.iterations) == STEPS


def test_lars_by_hand():
    """|w| = 5 and |g| = 10 make the step 0.1 * 5 / 10 of the gradient; a bias steps by its gradient."""
    kernel, bias = tf.Variable([[3.0, 4.0]]), tf.Variable([3.0, 4.0])
    optimizer = optimizers.make("lars", 2.0, 0.9, trust=0.1)
    optimizer.apply_gradients([(tf.constant([[6.0, 8.0]]), kernel), (tf.constant([6.0, 8.0]), bias)])
    np.testing.assert_allclose(kernel, [[3 - 2 * 0.3, 4 - 2 * 0.4]], rtol=1e-6)
    np.testing.assert_allclose(bias, [3 - 2 * 6, 4 - 2 * 8], rtol=1e-6)


@pytest.mark.parametrize("name", optimizers.NAMES)
def test_under_a_loss_scale(name):
    """A scaled gradient makes the same step, and one that overflows makes none."""
    trained = Trained(name, 0.9, 0.05, lambda inner: keras.mixed_precision.LossScaleOptimizer(inner, initial_scale=1024))
    expected = recomputed(name, 0.9, 0.05)
    assert_equal(trained.take([0, 1], scale=1024), expected[1])
    slots = trained.inner.variables()[1:]
    before = [slot.numpy() for slot in slots]
    assert len(slots) == len(SHAPES) * (2 if name == "adam" else 1)
    trained.apply({key: tf.fill(shape, np.float32("inf")) for key, shape in SHAPES.items()})
    for counter in (trained.step, trained.inner.iterations):  # which Keras counts even so
        counter.assign(2)
    assert_equal({key: weight.numpy() for key, weight in trained.weights.items()}, expected[1])
    for slot, value in zip(slots, before):
        np.testing.assert_array_equal(slot, value)
    assert float(trained.optimizer.loss_scale) == 512
    assert_equal(trained.take([2], scale=512), expected[2])


@pytest.mark.parametrize("name", optimizers.NAMES)
def test_a_checkpoint_holds_all_of_it(name, tmp_path):
    whole, begun, resumed = (Trained(name, 0.9, 0.05) for _ in range(3))
    expected = whole.take(range(STEPS))
    begun.take(range(3))
    slots = [variable for variable in begun.inner.variables() if variable.shape.rank]
    assert all(variable.dtype == tf.float32 for variable in slots) and any(np.any(variable) for variable in slots)

    def checkpoint(trained):
        return tf.train.Checkpoint(optimizer=trained.optimizer, step=trained.step, **trained.weights)

    path = checkpoint(begun).write(str(tmp_path / "ckpt"))
    checkpoint(resumed).read(path).assert_consumed()
    found = resumed.take(range(3, STEPS))
    for key in SHAPES:
        np.testing.assert_array_equal(found[key], expected[key])


@pytest.mark.parametrize("name", optimizers.NAMES)
def test_its_graph_is_one_that_an_npu_can_take(name):
    function = Trained(name, 0.9, 0.05).apply.get_concrete_function({key: tf.zeros(shape) for key, shape in SHAPES.items()})
    operations = function.graph.get_operations()
    known = {"Placeholder", "Const", "ReadVariableOp", "AssignAddVariableOp", "AssignSubVariableOp", "GatherV2", "Identity", "NoOp",
             "Cast", "Mul", "AddV2", "Sub", "Sqrt", "Square", "Sum", "Greater", "LogicalAnd", "SelectV2", "RealDiv", "Pow",
             "ResourceApplyMomentum", "ResourceApplyAdam", "IdentityN"}
    assert {op.type for op in operations} <= known
    for tensor in (tensor for op in operations for tensor in op.outputs):
        assert tensor.dtype != tf.float64 and (tensor.dtype == tf.resource or tensor.shape.is_fully_defined())


def test_another_name_is_refused():
    with pytest.raises(ValueError, match="no optimizer 'adagrad'; choose one of adam, sgd, lars"):
        optimizers.make("adagrad", 0.1)


def regression(device, name):
    """Weights after some steps of a regression on 8 rows, with the loss scaled, as one device or several would train it."""
    random = np.random.RandomState(5)
    data = tf.data.Dataset.from_tensors((np.float32(random.randn(8, 6)), np.float32(random.randn(8, 4)))).repeat(STEPS)
    with device.scope():
        kernel, bias = tf.Variable(start()["dense"]), tf.Variable(start()["bias"])
        step = tf.Variable(0, dtype=tf.int64, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA)
        optimizer = optimizers.make(name, lambda: tf.gather(tf.constant(RATES), step), 0.9, 0.05, trust=0.1)
        optimizer._create_all_weights([kernel, bias])
        optimizer = device.loss_scaled(optimizer)

    def on_replica(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(x @ kernel + bias - y))
            scaled = device.scale_loss(optimizer, loss)
        device.apply_gradients(optimizer, tape.gradient(scaled, [kernel, bias]), [kernel, bias])
        return (loss,)

    @device.compile
    def train(x, y):
        device.run(on_replica, (x, y))
        step.assign_add(1)

    for x, y in device.iterate(data):
        train(x, y)
        if step.numpy() == STEPS:
            return kernel.numpy(), bias.numpy()


@pytest.mark.parametrize("name", optimizers.NAMES)
def test_two_devices_take_the_steps_of_one(name, tmp_path):
    subprocess.run([sys.executable, __file__, name, str(tmp_path / "two.npz")], cwd=ROOT, check=True)
    two = np.load(str(tmp_path / "two.npz"))
    one = regression(npu_config.open_device(npu_config.Options(device="cpu", loss_scale="dynamic")), name)
    for found, expected, begun in zip((two["kernel"], two["bias"]), one, (start()["dense"], start()["bias"])):
        assert np.abs(expected - begun).max() > 0.1
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    two = npu_config.open_device(npu_config.Options(device="cpu", num_devices=2, loss_scale="dynamic"))
    assert two.replicas == 2
    np.savez(sys.argv[2], **dict(zip(("kernel", "bias"), regression(two, sys.argv[1]))))
