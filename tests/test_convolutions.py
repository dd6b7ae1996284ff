"""The convolution whose kernel gradient is made of matrix products: the same numbers as TensorFlow's own."""
import numpy as np
import pytest
import tensorflow as tf

import models
import npu_config
from devices import convolutions, host
from models import keras


def gradients(convolve, x, kernel, dy):
    with tf.GradientTape() as tape:
        tape.watch([x, kernel])
        y = convolve(x, kernel)
    return [y] + tape.gradient(y, [x, kernel], output_gradients=dy)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("height, width", [(8, 8), (7, 4), (5, 6), (1, 1), (2, 9)])
def test_result_and_gradients_are_those_of_the_convolution(height, width, size, stride):
    x = tf.random.stateless_normal((3, height, width, 4), [1, 2])
    kernel = tf.random.stateless_normal((size, size, 4, 6), [3, 4])
    dy = tf.random.stateless_normal((3, -(-height // stride), -(-width // stride), 6), [5, 6])
    mine = gradients(lambda x, kernel: convolutions.convolve(x, kernel, stride), x, kernel, dy)
    own = gradients(lambda x, kernel: tf.nn.conv2d(x, kernel, stride, "SAME"), x, kernel, dy)
    for got, wanted in zip(mine, own):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=2e-5)


@pytest.fixture
def bfloat16():
    if not host.BFLOAT16_ON_CPU:
        pytest.skip("this TensorFlow has no bfloat16 on the CPU")
    yield npu_config.open_device(npu_config.Options(device="cpu", precision_mode="allow_mix_precision"))
    npu_config.open_device(npu_config.Options(device="cpu"))


# Stage 4 has 4 of the 19 convolutions of 3 x 3: with 256 filters on 36 pixels, 128 filters on 16, and 128 on 36.
@pytest.mark.parametrize("width, side, replaced", [(0.5, 48, 4), (0.25, 32, 4), (0.25, 48, 0)])
def test_the_encoder_s_gradient_in_bfloat16_is_the_same_but_for_rounding(bfloat16, width, side, replaced):
    x = tf.random.stateless_uniform((8, side, side, 3), [1, 2])
    found, operators = [], []
    for conv in (bfloat16.convolution, keras.layers.Conv2D):
        bfloat16.set_seed(0)
        encoder = models.ResNet18(width, conv=conv)

        @tf.function
        def kernels_gradients(encoder=encoder):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.cast(encoder(x, training=True), tf.float32) ** 2)
            return tape.gradient(loss, [weight for weight in encoder.trainable_weights if weight.shape.rank == 4])

        found.append([gradient.numpy() for gradient in kernels_gradients()])
        graph = kernels_gradients.get_concrete_function().graph
        operators.append([op.type for op in graph.get_operations()].count("Conv2DBackpropFilter"))
    assert operators == [20 - replaced, 20]
    for mine, own in zip(*found):
        # 2.5 % on a processor without bfloat16 instructions, where both are emulated
        assert np.linalg.norm(mine - own) <= 0.04 * np.linalg.norm(own)


@pytest.mark.parametrize("instructions", [True, False])
def test_on_a_cpu_without_bfloat16_mixed_precision_is_float32_and_that_is_said(monkeypatch, instructions):
    monkeypatch.setattr(host, "processor_has_bfloat16", lambda: instructions)
    device = npu_config.open_device(npu_config.Options(device="cpu", precision_mode="allow_mix_precision"))
    name = device.describe()
    npu_config.open_device(npu_config.Options(device="cpu"))
    if instructions and host.BFLOAT16_ON_CPU:
        assert (device.half, name, device.advice) == ("bfloat16", "CPU in mixed_bfloat16", None)
    else:
        why = "this processor has no bfloat16 instructions." if host.BFLOAT16_ON_CPU else "TensorFlow %s" % tf.__version__
        assert (device.half, name) == (None, "CPU in float32") and device.advice.startswith("Computing in float32: " + why)
        assert device.convolution is keras.layers.Conv2D
