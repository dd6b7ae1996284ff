"""A convolution whose kernel gradient is made of matrix products: faster than oneDNN's own in bfloat16 on the CPU.

It is used for that precision there alone. What it brings is told in docs/performance.md.
"""
from typing import Any, Callable, Tuple

import tensorflow as tf

from models import keras

# Measured on AVX-512 with bfloat16 instructions, batches of 32 to 512: from so many filters on, or up to so many pixels, matrix
# products took 0.19 to 1.01 of oneDNN's time. With fewer filters on more pixels they can be slower.
FILTERS = 256
PIXELS = 16


class Conv2D(keras.layers.Conv2D):
    """Keras's Conv2D with padding 'same', no dilation and one group, with `kernel_gradient` where that pays."""

    def convolution_op(self, inputs: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        size, stride = self.kernel_size[0], self.strides[0]
        sides = inputs.shape[1:3]
        if size == 1 or not sides.is_fully_defined():
            return super().convolution_op(inputs, kernel)
        pixels = -(-sides[0] // stride) * -(-sides[1] // stride)  # of the result
        if self.filters < FILTERS and pixels > PIXELS:
            return super().convolution_op(inputs, kernel)
        return convolve(inputs, tf.convert_to_tensor(kernel), stride)


def convolve(x: tf.Tensor, kernel: tf.Tensor, stride: int) -> tf.Tensor:
    """tf.nn.conv2d with padding 'SAME' and `kernel_gradient` as its gradient with respect to the kernel.

    (b, h, w, c) and (k, k, c, filters), of one float dtype -> (b, h / stride, w / stride, filters), rounded up. h and w must be known.
    """
    @tf.custom_gradient
    def convolution(x: tf.Tensor, kernel: tf.Tensor) -> Tuple[tf.Tensor, Callable[..., Any]]:
        def gradients(dy: tf.Tensor) -> Tuple[tf.Tensor, tf.Tensor]:
            dx = tf.raw_ops.Conv2DBackpropInput(input_sizes=tf.shape(x), filter=kernel, out_backprop=dy,
                                                strides=[1, stride, stride, 1], padding="SAME")
            return dx, kernel_gradient(x, dy, kernel.shape[0], stride)

        return tf.nn.conv2d(x, kernel, stride, "SAME"), gradients

    return convolution(x, kernel)


def kernel_gradient(x: tf.Tensor, dy: tf.Tensor, size: int, stride: int) -> tf.Tensor:
    """The gradient with respect to the kernel of a convolution of x with padding 'SAME', given that of its result.

    x: (b, h, w, c); dy: (b, h / stride, w / stride, filters), rounded up. Gives (size, size, c, filters). Each of the kernel's
    size * size pixels has met one pixel of x for each pixel of the result: their products are one matrix product.
    """
    channels, filters = x.shape[3], dy.shape[3]
    height, width = dy.shape[1:3]
    reach = (size - 1) // stride
    padding = []
    for inputs, results in ((x.shape[1], height), (x.shape[2], width)):
        before = max(0, (results - 1) * stride + size - inputs) // 2  # as 'SAME' has it
        padding.append([before, stride * (results + reach) - inputs - before])
    x = tf.pad(x, [[0, 0]] + padding + [[0, 0]])
    if stride > 1:  # pixels that are `stride` apart become neighbours, and what is between them channels
        x = tf.nn.space_to_depth(x, stride)
    dy = tf.reshape(dy, [-1, filters])
    products = []
    for row in range(size):
        for column in range(size):
            top, left = row // stride, column // stride
            first = (row % stride * stride + column % stride) * channels
            met = x[:, top:top + height, left:left + width, first:first + channels]
            products.append(tf.matmul(tf.reshape(met, [-1, channels]), dy, transpose_a=True))
    return tf.reshape(tf.stack(products), [size, size, channels, filters])
