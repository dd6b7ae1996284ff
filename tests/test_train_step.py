"""One train step against a plain eager recomputation, in which Adam, the decay and the moving average are NumPy.

The encoder is a whole ResNet-18 in that one test. In the others it has one block, whose graph is made in a fraction of the time.
"""
import numpy as np
import pytest
import tensorflow as tf
from command import BLOCKS, encoder_of

import models
import npu_config
import pretraining
from devices.host import BFLOAT16_ON_CPU


@pytest.fixture(autouse=True)
def small_encoder(monkeypatch):
    monkeypatch.setitem(models.ENCODERS, "resnet18", encoder_of(BLOCKS))


def make_learner(**settings):
    config = pretraining.Config(device="cpu", width_multiplier=1 / 16, batch_size=8, weight_decay=0.1, **settings)
    device = npu_config.open_device(config)
    device.set_seed(1)
    return pretraining.Byol(config, device, total_steps=10, loop_size=4)


def views(count, batch=8):
    x = tf.random.stateless_uniform((count, 2, batch, 32, 32, 3), [1, 2])
    return tf.data.Dataset.from_tensor_slices((x[:, 0], x[:, 1])).prefetch(1), x.numpy()


def normalised(x):
    return x / tf.norm(x, axis=1, keepdims=True)


class Recomputation:
    """What the specification says a step does, on copies of a learner's networks, in eager mode."""

    def __init__(self, source, twin):
        self.networks = {name: getattr(twin, name) for name in ("f_online", "g_online", "q_online", "f_target", "g_target")}
        for name, network in self.networks.items():
            network.set_weights(getattr(source, name).get_weights())
        self.online = [w for name in ("f_online", "g_online", "q_online") for w in self.networks[name].trainable_weights]
        self.moments = [[np.zeros(w.shape), np.zeros(w.shape)] for w in self.online]

    def step(self, t, x1, x2, rate, decay):
        f, g, q, f_, g_ = (self.networks[name] for name in ("f_online", "g_online", "q_online", "f_target", "g_target"))
        z1, z2 = g_(f_(x1, training=True), training=True), g_(f_(x2, training=True), training=True)
        with tf.GradientTape() as tape:
            p1 = q(g(f(x1, training=True), training=True), training=True)
            p2 = q(g(f(x2, training=True), training=True), training=True)
            similarity = tf.reduce_sum(normalised(p1) * normalised(z2), 1), tf.reduce_sum(normalised(p2) * normalised(z1), 1)
            loss = 2 - tf.reduce_mean(similarity[0]) - tf.reduce_mean(similarity[1])
        for weight, gradient, moment in zip(self.online, tape.gradient(loss, self.online), self.moments):
            g64 = gradient.numpy().astype(np.float64)
            moment[0] = 0.9 * moment[0] + 0.1 * g64
            moment[1] = 0.999 * moment[1] + 0.001 * g64 ** 2
            corrected = np.sqrt(1 - 0.999 ** t) / (1 - 0.9 ** t)
            new = weight.numpy() - rate * corrected * moment[0] / (np.sqrt(moment[1]) + 1e-7)
            weight.assign(new - (rate * decay * weight.numpy() if weight.shape.rank > 1 else 0))
        for online, target in ((f, f_), (g, g_)):
            for source, goal in zip(online.weights, target.weights):
                goal.assign(0.99 * goal.numpy() + 0.01 * source.numpy())
        return float(loss)


def test_steps_equal_their_recomputation(monkeypatch):
    monkeypatch.setitem(models.ENCODERS, "resnet18", models.ResNet18)
    learner, twin = make_learner(), make_learner()
    recomputation = Recomputation(learner, twin)
    dataset, x = views(3)
    iterator = iter(dataset)
    for t in (1, 2, 3):
        rate = 0.5 * (1e-3 * 8 / 512) * (1 + np.cos(np.pi * (t - 1) / 10))
        expected = recomputation.step(t, x[t - 1, 0], x[t - 1, 1], rate, 0.1)
        learner.train_loop(iterator, tf.constant(1))
        assert learner.recent.numpy()[0, -1] == pytest.approx(expected, abs=2e-5)
    for name, network in recomputation.networks.items():
        for mine, other in zip(getattr(learner, name).weights, network.weights):
            # Where a gradient is 0 but for rounding, as that of each bias before BatchNorm, Adam's step is the rate times noise;
            # a few weights of a kernel can have such a one by chance.
            np.testing.assert_allclose(mine, other, rtol=1e-4, atol=4e-5, err_msg=mine.name)
            differ = ~np.isclose(mine, other, rtol=1e-4, atol=2e-6)
            assert "bias" in mine.name or differ.mean() < 1e-3, mine.name


def test_three_views_equal_their_recomputation():
    """Of each view, the prediction against the mean of the target's projections of the other two; statistics move once a view."""
    learner, twin = make_learner(num_views=3), make_learner(num_views=3)
    views = [tf.random.stateless_uniform((8, 32, 32, 3), [view, 2]) for view in range(3)]
    z = [twin.g_target(twin.f_target(x, training=True), training=True).numpy() for x in views]
    p = [twin.q_online(twin.g_online(twin.f_online(x, training=True), training=True), training=True).numpy() for x in views]
    cosines = [(normalised(p[view]) * normalised((z[view - 1] + z[view - 2]) / 2)).numpy().sum(axis=1).mean() for view in range(3)]
    learner.train_loop(iter(tf.data.Dataset.from_tensors(tuple(views))), tf.constant(1))
    assert learner.recent.numpy()[0, -1] == pytest.approx(2 - 2 * np.mean(cosines), abs=2e-5)
    np.testing.assert_allclose(learner.f_online.stem_norm.moving_mean, twin.f_online.stem_norm.moving_mean, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("number, at_once, precision", [
    (2, 1, "must_keep_origin_dtype"), (3, 2, "must_keep_origin_dtype"),
    pytest.param(2, 1, "allow_mix_precision", marks=pytest.mark.skipif(not BFLOAT16_ON_CPU, reason="no bfloat16 on this CPU"))])
def test_views_one_after_the_other_give_the_same(number, at_once, precision):
    """With two views to the bit; the gradients of more are summed in another order."""
    steps = [tuple(tf.random.stateless_uniform((8, 32, 32, 3), [view, step]) for view in range(number)) for step in range(3)]
    learners = [make_learner(num_views=number, views_at_once=n, precision_mode=precision) for n in (None, at_once)]
    for learner in learners:
        dataset = tf.data.Dataset.from_tensor_slices(tuple(tf.stack(views) for views in zip(*steps)))
        learner.train_loop(iter(dataset), tf.constant(3))
    equal = np.testing.assert_array_equal if number == 2 else lambda a, b, name: np.testing.assert_allclose(
        a, b, rtol=1e-4, atol=1e-4, err_msg=name)
    for mine, other in zip(*(learner.variables for learner in learners)):
        equal(mine, other, mine.name)


def test_views_one_after_the_other_wait_for_the_gradients_before():
    """In the graph, the second view's images are handed on only when every gradient of the first view's part is there."""
    graphs = []
    for at_once in (None, 1):
        learner = make_learner(views_at_once=at_once)
        dataset, _ = views(1)
        x1, x2 = next(iter(dataset))
        graphs.append(tf.function(learner.train_step_pretraining).get_concrete_function(x1, x2).graph)
    gradients = sum("gamma" not in weight.name for weight in learner.online_weights)  # gamma's and beta's are of one operation
    waiting = [[op for op in graph.get_operations() if op.type == "Identity" and op.inputs[0].op.type == "Placeholder"
                and len(op.control_inputs) >= gradients] for graph in graphs]
    assert [len(ops) for ops in waiting] == [0, 1]
    assert waiting[1][0].inputs[0].op.name.endswith("_1")  # args_1, views_1: the second one


def test_target_starts_on_its_own_and_moves_by_the_average_only():
    learner = make_learner(target_momentum=0.99)
    assert not np.allclose(learner.f_online.weights[0], learner.f_target.weights[0])
    kernel = learner.f_target.trainable_weights[0]
    before = kernel.numpy()
    dataset, _ = views(1)
    learner.train_loop(iter(dataset), tf.constant(1))
    np.testing.assert_allclose(kernel, 0.99 * before + 0.01 * learner.f_online.trainable_weights[0].numpy(), rtol=1e-6, atol=1e-7)


def test_targets_that_start_as_the_online_networks():
    """What is drawn for the online networks is the same with and without; then the targets move by the average."""
    own, learner = make_learner(), make_learner(target_start="online", target_momentum=0.99)
    for name in ("f_online", "g_online", "q_online"):
        for mine, other in zip(getattr(learner, name).weights, getattr(own, name).weights):
            np.testing.assert_array_equal(mine, other)
    for target, online in ((learner.f_target, learner.f_online), (learner.g_target, learner.g_online)):
        assert [w.shape for w in target.weights] == [w.shape for w in online.weights] and target.weights
        for mine, other in zip(target.weights, online.weights):
            assert mine is not other
            np.testing.assert_array_equal(mine, other)
    kernel = learner.f_target.trainable_weights[0]
    before = kernel.numpy()
    dataset, _ = views(1)
    learner.train_loop(iter(dataset), tf.constant(1))
    np.testing.assert_allclose(kernel, 0.99 * before + 0.01 * learner.f_online.trainable_weights[0].numpy(), rtol=1e-6, atol=1e-7)
    assert not np.allclose(kernel, learner.f_online.trainable_weights[0], rtol=0, atol=1e-5)


def test_one_call_of_the_loop_equals_several_and_traces_once():
    apart, together = make_learner(), make_learner()
    dataset, _ = views(4)
    iterator = iter(dataset)
    for n in (1, 2, 1):
        apart.train_loop(iterator, tf.constant(n))
    together.train_loop(iter(dataset), tf.constant(4))
    assert int(apart.step) == int(together.step) == 4 == int(apart.optimizer.iterations)
    np.testing.assert_array_equal(apart.recent, together.recent)
    for mine, other in zip(apart.variables, together.variables):
        np.testing.assert_array_equal(mine, other)
    counts = [f.experimental_get_tracing_count() for f in (apart.train_loop, together.train_loop)]
    assert counts == [1, 1]


def test_adam_counts_one_step_a_step_and_decays_kernels_only():
    learner = make_learner()
    for weight in learner.online_weights:
        weight.assign(tf.ones_like(weight))
    optimizer = learner.optimizer
    gradients = [tf.zeros_like(weight) for weight in learner.online_weights]
    optimizer.apply_gradients(zip(gradients, learner.online_weights))
    rate = 1e-3 * 8 / 512
    for weight in learner.online_weights:
        expected = 1 - rate * 0.1 if weight.shape.rank > 1 else 1
        np.testing.assert_allclose(weight, np.full(weight.shape, expected, np.float32), rtol=1e-7)
    assert int(optimizer.iterations) == 1


def test_the_loop_is_one_that_an_npu_takes_whole():
    learner = make_learner()
    dataset, _ = views(1)
    graph = learner.train_loop.get_concrete_function(iter(dataset), tf.constant(2)).graph
    whiles = [op for op in graph.get_operations() if op.type in ("While", "StatelessWhile")]
    assert len(whiles) == 1 and not graph.structured_outputs and not graph.outputs
