"""The networks of BYOL: the encoders f, the heads g and q, and the linear classifier c.

Keras 2 throughout: the NPU adapter is bound to TensorFlow 2.6.5, whose Keras is Keras 2, and on current TensorFlow the
package tf-keras is the same API. This module decides which one is imported; every other says `from models import keras`.
"""
import contextlib
import functools
from typing import Any, Callable, Iterator, Sequence, Tuple

import numpy as np
import tensorflow as tf

# Mean and deviation of the red, green and blue of a data set's images in [0, 1], as they are commonly given.
NORMALISATIONS = {"none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
                  "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}
STEMS = {"cifar": (3, 1), "imagenet": (7, 2)}  # size and stride of the first convolution
# From here on ImageNet's stem is the default: it leaves 3 x 3 pixels or more to the last stage, and costs a sixteenth of CIFAR's.
IMAGENET_PIXELS = 96
# How kernels are drawn at first, for Keras's kernel_initializer: Keras's default, uniform within sqrt(6 / (fan in + fan out)); and
# PyTorch's, uniform within 1 / sqrt(fan in). By name and settings: an initialiser object would give equal shapes equal kernels.
INITIALIZERS = {"glorot": "glorot_uniform",
                "torch": {"class_name": "VarianceScaling", "config": {"scale": 1 / 3, "mode": "fan_in", "distribution": "uniform"}}}
NEGLIGIBLE = 2.0 ** -64  # a start's share in moving statistics that changes no digit of them, in float32


def _keras2() -> Any:
    """Keras 2 as it belongs to the TensorFlow that is installed; ImportError with the remedy if it is not there."""
    major, minor = (int(part) for part in tf.__version__.split(".")[:2])
    if (major, minor) < (2, 16):  # the first TensorFlow whose tf.keras is Keras 3
        return tf.keras
    wanted = "pip install 'tf-keras~=%d.%d.0'" % (major, minor)
    try:
        import tf_keras
    except ImportError as error:
        raise ImportError("TensorFlow %s needs the package tf-keras (Keras 2): %s" % (tf.__version__, wanted)) from error
    if tf_keras.__version__.split(".")[:2] != [str(major), str(minor)]:
        raise ImportError("tf-keras %s does not belong to TensorFlow %s: %s"
                          % (tf_keras.__version__, tf.__version__, wanted))
    return tf_keras


keras = _keras2()


class Block(keras.layers.Layer):
    """Convolutions, each with BatchNorm, ReLU between them; plus the shortcut; then ReLU (He et al., arXiv:1512.03385, figure 5).

    convolutions: filters, size and stride of each. The shortcut is the identity, or where the block changes the shape a 1x1
    convolution and BatchNorm. (b, h, w, channels) -> (b, h / stride, w / stride, filters).
    """

    def __init__(self, channels: int, convolutions: Sequence[Tuple[int, int, int]], name: str, norm: Any, conv: Any) -> None:
        super().__init__(name=name)
        layers, inputs, stride = [], channels, 1
        for number, (filters, size, step) in enumerate(convolutions, 1):
            layers += [("conv%d" % number, conv(filters, size, strides=step, padding="same", name="conv%d" % number), inputs),
                       ("norm%d" % number, norm(name="norm%d" % number), filters)]
            inputs, stride = filters, stride * step
        self.convolutions = len(convolutions)
        self.project = stride != 1 or channels != filters
        # On the CPU, TensorFlow 2.20 and 2.21 crash in the gradient of a strided 1x1 convolution of fewer than 16 channels.
        # To take every second pixel first and then convolve is the same.
        self.subsampling = stride if channels < 16 else 1
        if self.project:
            shortcut = conv(filters, 1, strides=stride // self.subsampling, padding="same", name="shortcut_conv")
            layers += [("shortcut_conv", shortcut, channels), ("shortcut_norm", norm(name="shortcut_norm"), filters)]
        with tf.name_scope(name):
            for attribute, layer, inputs in layers:
                setattr(self, attribute, layer)
                _build(layer, (None, None, None, inputs))
        self.built = True

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        x = inputs
        for number in range(1, self.convolutions + 1):
            x = tf.nn.relu(x) if number > 1 else x
            x = getattr(self, "norm%d" % number)(getattr(self, "conv%d" % number)(x), training=training)
        if self.project:
            if self.subsampling > 1:
                inputs = inputs[:, ::self.subsampling, ::self.subsampling]
            inputs = self.shortcut_norm(self.shortcut_conv(inputs), training=training)
        return tf.nn.relu(x + inputs)


def basic(filters: int, stride: int) -> Sequence[Tuple[int, int, int]]:
    """The convolutions of a block of ResNet-18 and 34: filters, size and stride of each."""
    return (filters, 3, stride), (filters, 3, 1)


def bottleneck(filters: int, stride: int) -> Sequence[Tuple[int, int, int]]:
    """Those of ResNet-50. The 3x3 convolution has the stride (v1.5), as in DeepMind's code and torchvision; He et al.: the first."""
    return (filters, 1, 1), (filters, 3, stride), (4 * filters, 1, 1)


class ResNet(keras.Model):
    """An encoder f. (b, h, w, 3) float in [0, 1] -> (b, features) in the layers' compute dtype, after global average pooling.

    features: 512 * width_multiplier, four times that with bottlenecks. All weights exist as soon as the object does, without tracing
    the network once for nothing. norm, conv: the classes of its BatchNorm and convolution layers; convolve: what they are in a block.
    stem: one of STEMS; 'cifar' is a 3x3 convolution of stride 1, BatchNorm, ReLU and no max-pool, 'imagenet' one of 7x7 pixels and
    stride 2, and a max-pool of 3x3 and stride 2. normalisation: of NORMALISATIONS, of the images before all else;
    weight files keep its name. ValueError if the width leaves a stage without filters.
    """

    def __init__(self, blocks: Tuple[int, int, int, int], width_multiplier: float = 1.0, name: str = "encoder",
                 norm: Any = keras.layers.BatchNormalization, conv: Any = keras.layers.Conv2D, normalisation: str = "none",
                 stem: str = "cifar", convolve: Callable[[int, int], Sequence[Tuple[int, int, int]]] = basic) -> None:
        super().__init__(name=name)
        self.normalisation = normalisation
        widths = [int(filters * width_multiplier) for filters in (64, 128, 256, 512)]
        if widths[0] < 1:
            raise ValueError("width_multiplier is %g, which leaves no filters: give at least 1/64" % width_multiplier)
        self.features = channels = widths[0]
        self.stem = stem
        size, stride = STEMS[stem]
        self.stem_conv = conv(channels, size, strides=stride, padding="same", name="stem_conv")
        self.stem_norm = norm(name="stem_norm")
        with tf.name_scope(name):
            _build(self.stem_conv, (None, None, None, 3))
            _build(self.stem_norm, (None, None, None, channels))
            self.blocks = []
            for stage, (count, filters) in enumerate(zip(blocks, widths)):
                for index in range(count):
                    convolutions = convolve(filters, 2 if stage > 0 and index == 0 else 1)
                    self.blocks.append(Block(channels, convolutions, "stage%d_block%d" % (stage + 1, index + 1), norm, conv))
                    channels = convolutions[-1][0]
        self.features = channels
        self.built = True

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        if self.normalisation != "none":
            mean, deviation = NORMALISATIONS[self.normalisation]
            inputs = (inputs - mean) / deviation
        x = tf.nn.relu(self.stem_norm(self.stem_conv(inputs), training=training))
        if self.stem == "imagenet":
            x = tf.nn.max_pool2d(x, 3, 2, "SAME")
        for block in self.blocks:
            x = block(x, training=training)
        return tf.reduce_mean(x, axis=[1, 2])


def _build(layer: Any, input_shape: Tuple[Any, ...]) -> None:
    """Make a layer's weights under its own name, as its first call would, but without tracing it."""
    with tf.name_scope(layer.name):
        layer.build(tf.TensorShape(input_shape))


def ResNet18(width_multiplier: float = 1.0, name: str = "resnet18", **layers: Any) -> ResNet:
    """ResNet-18 (2-2-2-2 basic blocks): 11,173,632 trainable parameters at width 1, h of (b, 512)."""
    return ResNet((2, 2, 2, 2), width_multiplier, name, **layers)


def ResNet34(width_multiplier: float = 1.0, name: str = "resnet34", **layers: Any) -> ResNet:
    """ResNet-34 (3-4-6-3 basic blocks): 21,285,504 trainable parameters at width 1, h of (b, 512)."""
    return ResNet((3, 4, 6, 3), width_multiplier, name, **layers)


def ResNet50(width_multiplier: float = 1.0, name: str = "resnet50", conv: Any = keras.layers.Conv2D, **layers: Any) -> ResNet:
    """ResNet-50 (3-4-6-3 bottlenecks): 23,508,032 trainable parameters at width 1 with ImageNet's stem, h of (b, 2048).

    As in the BYOL paper its convolutions have no biases, which the BatchNorm after each would take away again.
    """
    return ResNet((3, 4, 6, 3), width_multiplier, name, conv=functools.partial(conv, use_bias=False), convolve=bottleneck, **layers)


ENCODERS = {"resnet18": ResNet18, "resnet34": ResNet34, "resnet50": ResNet50}


def drawn(layer: Any, initializer: str) -> Any:
    """A class of layers with kernels, Conv2D or Dense, whose kernels are drawn as a name in INITIALIZERS says."""
    return functools.partial(layer, kernel_initializer=INITIALIZERS[initializer])


def default_stem(image_size: int) -> str:
    """The stem for images of so many pixels a side: ImageNet's from IMAGENET_PIXELS on."""
    return "imagenet" if image_size >= IMAGENET_PIXELS else "cifar"


class ProjectionHead(keras.Model):
    """The projector g and the predictor q: Dense `hidden`, BatchNorm, ReLU, Dense `features`. (b, any) -> (b, features).

    norm, dense: the classes of its layers.
    """

    def __init__(self, hidden: int = 256, features: int = 128, name: str = "projection_head",
                 norm: Any = keras.layers.BatchNormalization, dense: Any = keras.layers.Dense) -> None:
        super().__init__(name=name)
        self.features = features
        self.hidden = dense(hidden, name="hidden")
        self.norm = norm(name="norm")
        self.output_layer = dense(features, name="output")

    def build(self, input_shape: Any) -> None:
        _build(self.hidden, (None, input_shape[-1]))
        _build(self.norm, (None, self.hidden.units))
        _build(self.output_layer, (None, self.hidden.units))
        self.built = True

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        return self.output_layer(tf.nn.relu(self.norm(self.hidden(inputs), training=training)))


class ClassificationHead(keras.Model):
    """The linear classifier c on features: (b, any) -> float32 logits (b, num_classes)."""

    def __init__(self, num_classes: int = 10, name: str = "classification_head") -> None:
        super().__init__(name=name)
        self.logits = keras.layers.Dense(num_classes, dtype="float32", name="logits")

    def build(self, input_shape: Any) -> None:
        _build(self.logits, (None, input_shape[-1]))
        self.built = True

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        return self.logits(inputs)


@contextlib.contextmanager
def settled(network: Any, updates: int) -> Iterator[None]:
    """Inside, BatchNorm's moving statistics of the network are without the share of the values 0 and 1 that they started from.

    updates: how often they were updated since, 0 for a network that was not trained. After n updates with momentum m the start's
    share is m^n: it would swamp the stem's variance, of about 0.01, for some 700 updates. What is left is divided by 1 - m^n, as
    Adam does with its averages (arXiv:1412.6980, section 3). Training goes on with the statistics as they were, to the bit; after
    some 10,000 updates there is nothing to take out. Weights of another origin than a start from 0 and 1 are not for this.
    """
    before = []
    for norm in [layer for layer in network.submodules if isinstance(layer, keras.layers.BatchNormalization)]:
        share = norm.momentum ** updates
        if NEGLIGIBLE < share < 1:
            for statistic, start in ((norm.moving_mean, 0.0), (norm.moving_variance, 1.0)):
                before.append((statistic, statistic.numpy()))
                without = (before[-1][1].astype(np.float64) - share * start) / (1 - share)
                statistic.assign(np.maximum(without, 0) if start else without)
    try:
        yield
    finally:
        for statistic, value in before:
            statistic.assign(value)


def count_parameters(network: Any) -> int:
    """How many trainable numbers a network has."""
    return sum(weight.shape.num_elements() for weight in network.trainable_weights)
