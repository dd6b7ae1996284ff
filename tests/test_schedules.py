"""Warm-up and target momentum against numbers worked out by hand; the schedules themselves are in test_losses.py."""
import functools
import math

import numpy as np
import pytest
import tensorflow as tf

import schedules


@pytest.mark.parametrize("step, expected", [(0, 0), (1, 0.0001), (5, 0.0005), (9, 0.0009), (10, 0.001), (35, 0.00085355339),
                                            (60, 0.0005), (110, 0), (140, 0)])
def test_warmup_then_cosine(step, expected):
    for value in (step, tf.constant(step, tf.int64), tf.constant(step)):
        rate = schedules.warmup(value, 0.001, 110, 10)
        assert rate.dtype == tf.float32 and rate.shape == () and float(rate) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("step, expected", [(0, 0), (15, 0.025), (30, 0.05), (31, 0.05), (500, 0.05)])
def test_warmup_then_constant(step, expected):
    assert float(schedules.warmup(step, 0.05, 100, 30, schedules.constant)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("step, expected", [(10, 2.5e-2), (20, 5e-2), (70, 5e-4 + 0.0495 * 0.25), (120, 5e-4), (150, 5e-4)])
def test_warmup_then_polynomial(step, expected):
    polynomial = functools.partial(schedules.polynomial, end=5e-4, power=2)
    assert float(schedules.warmup(step, 5e-2, 120, 20, polynomial)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", sorted(schedules.LEARNING_RATES))
def test_no_warmup_is_the_schedule_to_the_bit(name):
    schedule = schedules.LEARNING_RATES[name]
    for step in range(0, 1000, 37):
        value = tf.constant(step, tf.int64)
        assert schedules.warmup(value, 0.0013, 970, 0, schedule).numpy() == schedule(value, 0.0013, 970).numpy()


@pytest.mark.parametrize("total_steps", [5, 10])
def test_warmup_without_end_is_refused(total_steps):
    with pytest.raises(ValueError, match="10 warm-up steps leave none of %d" % total_steps):
        schedules.warmup(0, 0.1, total_steps, 10)


# 1 - 0.01 * (cos(pi / 4) + 1) / 2 = 1 - 0.01 * 0.853553 at a quarter of the way.
@pytest.mark.parametrize("base, step, expected", [(0.99, 0, 0.99), (0.99, 50, 0.99146447), (0.99, 100, 0.995), (0.99, 150, 0.99853553),
                                                  (0.99, 200, 1), (0.99, 300, 1), (0.97, 0, 0.97), (0.97, 100, 0.985), (0.97, 200, 1),
                                                  (0, 100, 0.5)])
def test_momentum_to_one(base, step, expected):
    for value in (step, tf.constant(step, tf.int64)):
        momentum = schedules.TARGET_MOMENTA["cosine"](value, base, 200)
        assert momentum.dtype == tf.float32 and momentum.shape == () and float(momentum) == pytest.approx(expected, abs=1e-7)


def test_momentum_and_the_rest_make_one_exactly():
    for step in range(0, 201, 7):
        momentum = schedules.momentum_to_one(step, 0.99, 200).numpy()
        assert 0.99 - 1e-7 <= momentum <= 1 and np.float32(momentum + np.float32(1 - momentum)) == 1


def test_constant_momentum():
    assert float(schedules.TARGET_MOMENTA["constant"](tf.constant(77), 0.996, 100)) == pytest.approx(0.996)


def test_in_a_graph_only_operators_that_an_npu_has():
    step = tf.Variable(0, dtype=tf.int64)

    @tf.function
    def both():
        return schedules.warmup(step, 0.1, 100, 10), schedules.momentum_to_one(step, 0.99, 100)

    graph = both.get_concrete_function().graph
    known = {"Placeholder", "ReadVariableOp", "Const", "Cast", "Sub", "Maximum", "RealDiv", "Minimum", "Mul", "Cos", "AddV2",
             "Identity", "NoOp"}
    assert {op.type for op in graph.get_operations()} <= known
    assert not any(tensor.dtype == tf.float64 for op in graph.get_operations() for tensor in op.outputs)
    for value in (0, 5, 10, 55, 100):
        step.assign(value)
        rate, momentum = both()
        expected = 0.1 * value / 10 if value < 10 else 0.05 * (1 + math.cos(math.pi * (value - 10) / 90))
        assert float(rate) == pytest.approx(expected, abs=1e-7)
        assert float(momentum) == pytest.approx(1 - 0.005 * (1 + math.cos(math.pi * value / 100)), abs=1e-6)
