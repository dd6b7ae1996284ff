"""The networks' parameters, shapes and the layers that the specification names."""
import numpy as np
import pytest
import tensorflow as tf

import models
from models import keras


def parameters_by_hand(blocks, width=1.0):
    """Trainable parameters from the specification alone: convolutions have k*k*in*out + out, BatchNorm 2*out."""
    def unit(size, inputs, outputs):
        return size * size * inputs * outputs + outputs + 2 * outputs

    widths = [int(f * width) for f in (64, 128, 256, 512)]
    total, inputs = unit(3, 3, widths[0]), widths[0]
    for stage, (count, filters) in enumerate(zip(blocks, widths)):
        for index in range(count):
            total += unit(3, inputs, filters) + unit(3, filters, filters)
            if stage and not index:
                total += unit(1, inputs, filters)
            inputs = filters
    return total


@pytest.mark.parametrize("make, blocks, expected", [
    (models.ResNet18, (2, 2, 2, 2), 11173632), (models.ResNet34, (3, 4, 6, 3), 21285504)])
def test_parameter_counts(make, blocks, expected):
    assert models.count_parameters(make()) == expected == parameters_by_hand(blocks)


def test_width_multiplier_makes_the_encoder_about_sixteen_times_smaller():
    narrow = models.ResNet18(width_multiplier=0.25)
    assert models.count_parameters(narrow) == parameters_by_hand((2, 2, 2, 2), 0.25)
    assert narrow(tf.zeros((2, 32, 32, 3))).shape == (2, 128)


def test_a_width_without_filters_is_refused():
    with pytest.raises(ValueError, match="width_multiplier"):
        models.ResNet18(width_multiplier=0.01)


@pytest.mark.parametrize("size", [32, 48])
def test_feature_shapes(size):
    assert models.ResNet18(0.125)(tf.zeros((3, size, size, 3)), training=True).shape == (3, 64)


def test_heads():
    g = models.ProjectionHead()
    assert g(tf.zeros((4, 512))).shape == (4, 128)
    assert models.count_parameters(g) == 512 * 256 + 256 + 2 * 256 + 256 * 128 + 128
    wide = models.ProjectionHead(1024, 64)
    wide.build((None, 512))
    assert wide.features == 64 and wide(tf.zeros((4, 512)), training=True).shape == (4, 64)
    assert [tuple(w.shape) for w in wide.trainable_weights] == [(512, 1024), (1024,), (1024,), (1024,), (1024, 64), (64,)]
    c = models.ClassificationHead()
    assert c(tf.zeros((4, 512))).shape == (4, 10) and models.count_parameters(c) == 5130


def test_keras_defaults():
    encoder = models.ResNet18(0.25)
    convolutions = [layer for layer in encoder._flatten_layers() if isinstance(layer, keras.layers.Conv2D)]
    norms = [layer for layer in encoder._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]
    assert len(convolutions) == len(norms) == 20
    assert all(norm.momentum == 0.99 and norm.epsilon == 1e-3 for norm in norms)
    for layer in convolutions:
        fans = np.prod(layer.kernel.shape[:2]) * sum(layer.kernel.shape[2:])
        limit = np.float32(np.sqrt(6 / fans))  # Glorot uniform, drawn in float32
        largest = np.abs(layer.kernel.numpy()).max()
        assert 0.8 * limit < largest <= limit and not layer.bias.numpy().any() and layer.padding == "same"


def test_kernels_drawn_as_pytorch_does():
    """torch.nn.Conv2d and Linear: kaiming_uniform_ with a = sqrt(5), which is uniform within 1 / sqrt(fan in)."""
    encoders = [models.ResNet18(0.25, conv=models.drawn(keras.layers.Conv2D, "torch")) for _ in range(2)]
    head = models.ProjectionHead(dense=models.drawn(keras.layers.Dense, "torch"))
    head.build((None, 128))
    kernels = [w.numpy() for network in encoders + [head] for w in network.trainable_weights if len(w.shape) > 1]
    assert len(kernels) == 42
    for kernel in kernels:
        limit = np.float32(1 / np.sqrt(kernel[..., 0].size))
        assert 0.8 * limit < np.abs(kernel).max() <= limit and abs(kernel.std() * np.sqrt(3) / limit - 1) < 0.15
    assert len({kernel.tobytes() for kernel in kernels}) == 42  # each its own, those of one shape too


def reference_forward(encoder, x):
    """The encoder from the specification's sentences with tf.nn alone, reading weights in order; inference mode."""
    weights = iter({w.name.split("/", 1)[1]: w for w in encoder.weights}.items())
    named = dict(weights)

    def conv_bn(x, conv, norm, stride=1):
        x = tf.nn.conv2d(x, named[conv + "/kernel:0"], stride, "SAME") + named[conv + "/bias:0"]
        return tf.nn.batch_normalization(x, named[norm + "/moving_mean:0"], named[norm + "/moving_variance:0"],
                                         named[norm + "/beta:0"], named[norm + "/gamma:0"], 1e-3)

    x = tf.nn.relu(conv_bn(x, "stem_conv", "stem_norm"))
    for stage in range(1, 5):
        for block in (1, 2):
            scope = "stage%d_block%d/" % (stage, block)
            stride = 2 if stage > 1 and block == 1 else 1
            y = tf.nn.relu(conv_bn(x, scope + "conv1", scope + "norm1", stride))
            y = conv_bn(y, scope + "conv2", scope + "norm2")
            if stride == 2:
                x = conv_bn(x, scope + "shortcut_conv", scope + "shortcut_norm", 2)
            x = tf.nn.relu(x + y)
    return tf.reduce_mean(x, [1, 2])


@pytest.mark.parametrize("width", [0.25, 0.125])  # the narrower one has shortcuts that take every second pixel first
def test_the_encoder_computes_what_the_specification_says(width):
    encoder = models.ResNet18(width)
    for weight in encoder.weights:  # biases and statistics other than their initial 0 and 1
        weight.assign(weight + tf.random.stateless_uniform(weight.shape, [1, 2], 0, 0.1))
    x = tf.random.stateless_uniform((4, 32, 32, 3), [3, 4])
    np.testing.assert_allclose(encoder(x), reference_forward(encoder, x), rtol=1e-4, atol=1e-4)


def test_a_narrow_encoder_has_a_gradient_at_an_odd_batch_size():
    """oneDNN's gradient of a strided 1x1 convolution with few channels crashes the process for such shapes."""
    encoder = models.ResNet18(1 / 16)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(encoder(tf.random.stateless_uniform((25, 32, 32, 3), [1, 2]), training=True))
    assert all(gradient is not None for gradient in tape.gradient(loss, encoder.trainable_weights))


def statistics(network):
    return [value.numpy() for layer in network.submodules if isinstance(layer, keras.layers.BatchNormalization)
            for value in (layer.moving_mean, layer.moving_variance)]


@pytest.mark.parametrize("updates", [1, 3, 200])
def test_settled_statistics_are_those_of_the_batches_alone(updates):
    """An average over updates by one and the same batch is that batch's, whatever it started from."""
    network, wanted = models.ResNet18(1 / 16), models.ResNet18(1 / 16)
    wanted.set_weights(network.get_weights())
    x = tf.random.stateless_uniform([8, 8, 8, 3], (1, 2))
    for layer in wanted.submodules:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0  # its statistics are those of the last batch
    wanted(x, training=True)
    step = tf.function(lambda: network(x, training=True))
    for _ in range(updates):
        step()
    before = statistics(network)
    with models.settled(network, updates):
        for found, expected in zip(statistics(network), statistics(wanted)):
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-4)
    for found, expected in zip(statistics(network), before):
        np.testing.assert_array_equal(found, expected)
    assert not np.allclose(before[1], statistics(wanted)[1], rtol=0.1)


@pytest.mark.parametrize("updates", [0, 10000, 10 ** 9])
def test_statistics_without_a_start_to_take_out_stay_to_the_bit(updates):
    network = models.ResNet18(1 / 16)
    network(tf.random.stateless_uniform([8, 8, 8, 3], (1, 2)), training=True)
    before = statistics(network)
    with models.settled(network, updates):
        for found, expected in zip(statistics(network), before):
            np.testing.assert_array_equal(found, expected)


# Encoders for real images.


@pytest.mark.parametrize("make, stem, expected", [
    (models.ResNet18, "imagenet", 11181312), (models.ResNet34, "imagenet", 21293184),
    (models.ResNet50, "imagenet", 23508032), (models.ResNet50, "cifar", 23500352)])
def test_parameter_counts_of_encoders_for_real_images(make, stem, expected):
    encoder = make(stem=stem)
    assert models.count_parameters(encoder) == expected
    biases = [weight.name for weight in encoder.trainable_weights if "/bias" in weight.name]
    assert len(biases) == {models.ResNet18: 20, models.ResNet34: 36, models.ResNet50: 0}[make]


@pytest.mark.parametrize("size, stem", [(8, "cifar"), (32, "cifar"), (64, "cifar"), (95, "cifar"), (96, "imagenet")])
def test_the_stem_by_the_size_of_the_images(size, stem):
    assert models.default_stem(size) == stem


@pytest.mark.parametrize("stem, sides", [("cifar", [96, 48, 24, 12]), ("imagenet", [24, 12, 6, 3])])
def test_the_stem_decides_the_sides_of_the_stages(stem, sides):
    encoder = models.ResNet18(1 / 32, stem=stem)
    x = tf.zeros((1, 96, 96, 3))
    shapes = []
    for block in encoder.blocks:
        block.call = lambda inputs, training, call=block.call: shapes.append(call(inputs, training)) or shapes[-1]
    assert encoder(x).shape == (1, 16)
    assert [shape.shape[1] for shape in shapes[::2]] == sides


def keras_resnet50(size):
    """Keras's own ResNet-50 with random weights and statistics, and these changes to its settings: the stride in the 3x3 convolution
    (v1.5), 'same' padding of the stem as everywhere else, and epsilon 1e-3."""
    original = keras.applications.ResNet50(weights=None, include_top=False, pooling="avg", input_shape=(size, size, 3))
    config = original.get_config()
    for layer in config["layers"]:
        name, settings = layer["config"]["name"], layer["config"]
        if layer["class_name"] == "BatchNormalization":
            settings["epsilon"] = 1e-3
        if name in ("conv1_pad", "pool1_pad"):
            settings["padding"] = {"conv1_pad": ((2, 3), (2, 3)), "pool1_pad": ((0, 1), (0, 1))}[name]
        if name in ["conv%d_block1_%d_conv" % (stage, number) for stage in (3, 4, 5) for number in (1, 2)]:
            settings["strides"] = (1, 1) if name.endswith("1_conv") else (2, 2)
    network = keras.Model.from_config(config)
    random = np.random.RandomState(0)
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights([random.uniform(low, high, layer.gamma.shape) for low, high in ((.5, 1), (-.2, .2), (-.2, .2), (.5, 2))])
        elif isinstance(layer, keras.layers.Conv2D):
            layer.bias.assign(random.uniform(-0.1, 0.1, layer.bias.shape))
    return network


def test_resnet50_gives_the_features_of_keras_own():
    """With its weights copied; a bias before BatchNorm becomes a part of the moving mean, which is the same in inference."""
    size = 64
    theirs, ours = keras_resnet50(size), models.ResNet50(stem="imagenet")

    def copy(name, conv, norm):
        conv.kernel.assign(theirs.get_layer(name + "_conv").kernel)
        gamma, beta, mean, variance = theirs.get_layer(name + "_bn").get_weights()
        norm.set_weights([gamma, beta, mean - theirs.get_layer(name + "_conv").bias.numpy(), variance])

    copy("conv1", ours.stem_conv, ours.stem_norm)
    names = ["conv%d_block%d" % (stage, block + 1) for stage, count in zip((2, 3, 4, 5), (3, 4, 6, 3)) for block in range(count)]
    for name, block in zip(names, ours.blocks):
        for number in (1, 2, 3):
            copy("%s_%d" % (name, number), getattr(block, "conv%d" % number), getattr(block, "norm%d" % number))
        if block.project:
            copy(name + "_0", block.shortcut_conv, block.shortcut_norm)
    x = tf.random.stateless_uniform((3, size, size, 3), [1, 2])
    expected, found = theirs(x, training=False).numpy(), ours(x, training=False).numpy()
    assert found.shape == (3, 2048) and expected.std() > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * max(1, np.abs(expected).max()))
