"""The loss and the spread against NumPy, and the learning rates against numbers worked out by hand."""
import math

import numpy as np
import pytest
import tensorflow as tf

import losses
import schedules


def numpy_loss(p, z):
    p = p / np.linalg.norm(p, axis=1, keepdims=True)
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    return 2 - 2 * np.mean(np.sum(p * z, axis=1))


def test_byol_loss_equals_numpy():
    rng = np.random.RandomState(0)
    p, z = rng.randn(2, 64, 128)
    assert float(losses.byol_loss(tf.constant(p, tf.float32), tf.constant(z, tf.float32))) == pytest.approx(
        numpy_loss(p, z), abs=1e-6)


def test_byol_loss_at_its_ends():
    p = tf.constant(np.random.RandomState(1).randn(8, 16), tf.float32)
    assert float(losses.byol_loss(p, 3 * p)) == pytest.approx(0, abs=1e-6)
    assert float(losses.byol_loss(p, -p)) == pytest.approx(4, abs=1e-6)
    assert np.isfinite(float(losses.byol_loss(p * 0, p)))


def test_byol_loss_of_half_precision_is_computed_in_float32():
    p = tf.constant([[300.0, 300.0]], tf.float16)  # squares overflow float16
    loss = losses.byol_loss(p, p)
    assert loss.dtype == tf.float32 and float(loss) == pytest.approx(0, abs=1e-6)


def multi_view_loss(predictions, projections):
    return losses.byol_loss(tf.concat(predictions, axis=0), tf.concat(losses.targets_of_views(projections), axis=0))


@pytest.mark.parametrize("k", [2, 3, 4])
def test_loss_of_several_views_equals_numpy(k):
    p, z = np.random.RandomState(k).randn(2, k, 16, 32) * np.linspace(0.5, 3, 16)[:, None]
    expected = np.mean([numpy_loss(p[view], np.delete(z, view, axis=0).mean(axis=0)) for view in range(k)])
    found = multi_view_loss(list(tf.constant(p, tf.float32)), list(tf.constant(z, tf.float32)))
    assert found.dtype == tf.float32 and float(found) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("dtype", [tf.float32, tf.float16])
def test_each_of_two_views_is_held_against_the_other(dtype):
    z1, z2 = tf.cast(np.random.RandomState(3).randn(2, 16, 32), dtype)
    first, second = losses.targets_of_views([z1, z2])
    assert first.dtype == second.dtype == tf.float32
    np.testing.assert_array_equal(first, tf.cast(z2, tf.float32))
    np.testing.assert_array_equal(second, tf.cast(z1, tf.float32))


def test_loss_of_several_views_at_its_ends_and_in_half_precision():
    z = tf.constant([[3e4, 3e4]], tf.float16)  # a sum of two overflows float16
    assert float(multi_view_loss([z, z, z], [z, z, z])) == pytest.approx(0, abs=1e-6)
    assert float(multi_view_loss([z, z, z], [-z, -z, -z])) == pytest.approx(4, abs=1e-6)


@pytest.mark.parametrize("k", [0, 1])
def test_targets_need_two_views(k):
    with pytest.raises(ValueError, match="%d projections: there must be those of at least 2 views" % k):
        losses.targets_of_views([tf.zeros((2, 3))] * k)


def test_spread():
    rng = np.random.RandomState(2)
    z = rng.randn(4096, 128).astype(np.float32)
    assert float(losses.projection_spread(z)) == pytest.approx(1 / math.sqrt(128), rel=0.01)
    assert float(losses.projection_spread(np.ones((16, 128), np.float32))) == pytest.approx(0, abs=1e-6)


def test_scaled_learning_rate():
    assert schedules.scaled_learning_rate(1e-3, 512) == 1e-3
    assert schedules.scaled_learning_rate(1e-3, 128) == 0.00025


@pytest.mark.parametrize("step, expected", [(0, 0.001), (25, 0.00085355339), (50, 0.0005), (75, 0.00014644661), (100, 0), (130, 0)])
def test_cosine(step, expected):
    for value in (step, tf.constant(step, tf.int64)):
        assert float(schedules.cosine(value, 0.001, 100)) == pytest.approx(expected, abs=1e-9)


def test_constant():
    assert float(schedules.constant(tf.constant(77), 0.001, 100)) == pytest.approx(0.001)


@pytest.mark.parametrize("step, expected", [(0, 5e-2), (50, 5e-4 + 0.0495 * 0.25), (100, 5e-4), (120, 5e-4)])
def test_polynomial(step, expected):
    assert float(schedules.polynomial(step, 5e-2, 100, 5e-4, 2)) == pytest.approx(expected, rel=1e-5)
