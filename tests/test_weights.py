"""Weight files: as Keras writes them, between programs and TensorFlows, damaged, and made to do harm."""
import io
import os
import random
import resource
import subprocess
import sys
import time
import zipfile

import h5py
import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT

import evaluation
import models
import weights
from commands import UserError
from models import keras

IMAGES = np.random.RandomState(0).rand(2, 16, 16, 3).astype(np.float32)


def features(encoder):
    return encoder(IMAGES, training=False).numpy()


def trained_encoder(width=1 / 16, make=models.ResNet18):
    """An encoder whose statistics and biases are not those of a new one."""
    encoder = make(width)
    random = np.random.RandomState(1)
    encoder.set_weights([array * (1 + 0.1 * random.rand(*array.shape)) + 0.1 * (array.ndim == 1) for array in encoder.get_weights()])
    return encoder


def test_the_file_is_what_keras_would_write(tmp_path):
    encoder = trained_encoder()
    ours, theirs = str(tmp_path / "ours.h5"), str(tmp_path / "theirs.h5")
    weights.save_weights(encoder, ours)
    encoder.save_weights(theirs, save_format="h5")
    with h5py.File(ours, "r") as mine, h5py.File(theirs, "r") as other:
        assert list(mine.attrs["layer_names"]) == list(other.attrs["layer_names"])
        assert mine.attrs["backend"] == other.attrs["backend"] and mine.attrs["keras_version"] == other.attrs["keras_version"]
        for layer in mine.attrs["layer_names"]:
            names = list(mine[layer].attrs["weight_names"])
            assert names == list(other[layer].attrs["weight_names"])
            for name in names:
                np.testing.assert_array_equal(mine[layer][name], other[layer][name])
                assert mine[layer][name].dtype == other[layer][name].dtype
    for path in (ours, theirs):
        loaded, by_keras = models.ResNet18(1 / 16), models.ResNet18(1 / 16)
        weights.load_weights(loaded, path)
        by_keras.load_weights(path)
        np.testing.assert_array_equal(features(loaded), features(encoder))
        np.testing.assert_array_equal(features(by_keras), features(encoder))


class Block(keras.layers.Layer):
    """A basic block as other programs write it: its shortcut is a nested Sequential, made first or last."""

    def __init__(self, filters, stride, shortcut_first):
        super().__init__()
        if shortcut_first:
            self.shortcut = self.make_shortcut(filters, stride)
        self.c1 = keras.layers.Conv2D(filters, 3, stride, "same")
        self.b1 = keras.layers.BatchNormalization()
        self.c2 = keras.layers.Conv2D(filters, 3, 1, "same")
        self.b2 = keras.layers.BatchNormalization()
        if not shortcut_first:
            self.shortcut = self.make_shortcut(filters, stride)

    def make_shortcut(self, filters, stride):
        return keras.Sequential([] if stride == 1 else [keras.layers.Conv2D(filters, 1, stride), keras.layers.BatchNormalization()])

    def call(self, x, training=None):
        y = self.b2(self.c2(tf.nn.relu(self.b1(self.c1(x), training=training))), training=training)
        return tf.nn.relu(y + self.shortcut(x, training=training))


class Subclassed(keras.Model):
    def __init__(self, nested, shortcut_first):
        super().__init__()
        self.c = keras.layers.Conv2D(4, 3, 1, "same")
        self.b = keras.layers.BatchNormalization()
        stages = [[Block(width, 2 if stage and not i else 1, shortcut_first) for i in range(2)]
                  for stage, width in enumerate((4, 8, 16, 32))]
        self.stages = [keras.Sequential(stage) for stage in stages] if nested else sum(stages, [])

    def call(self, x, training=None):
        x = tf.nn.relu(self.b(self.c(x), training=training))
        for stage in self.stages:
            x = stage(x, training=training)
        return tf.reduce_mean(x, [1, 2])


def functional():
    """Flat layers, whose order in the file is that of the graph."""
    layers = keras.layers
    x = inputs = keras.Input((16, 16, 3))
    x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(4, 3, padding="same")(x)))
    for stage, width in enumerate((4, 8, 16, 32)):
        for i in range(2):
            stride = 2 if stage and not i else 1
            y = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(width, 3, stride, "same")(x)))
            y = layers.BatchNormalization()(layers.Conv2D(width, 3, 1, "same")(y))
            if stride == 2:
                x = layers.BatchNormalization()(layers.Conv2D(width, 1, stride)(x))
            x = layers.ReLU()(layers.Add()([y, x]))
    return keras.Model(inputs, layers.GlobalAveragePooling2D()(x))


@pytest.mark.parametrize("make", [lambda: Subclassed(False, False), lambda: Subclassed(False, True), lambda: Subclassed(True, False),
                                  lambda: Subclassed(True, True), functional],
                         ids=["last", "first", "stages-last", "stages-first", "functional"])
def test_files_of_other_programs_load(tmp_path, make):
    other = make()
    other(IMAGES)
    random = np.random.RandomState(2)
    other.set_weights([array * (1 + 0.1 * random.rand(*array.shape)) + 0.1 * (array.ndim == 1) for array in other.get_weights()])
    path = str(tmp_path / "f_online_200.h5")
    other.save_weights(path)
    encoder = models.ResNet18(1 / 16)
    weights.load_weights(encoder, path)
    np.testing.assert_allclose(features(encoder), features(other), rtol=1e-5, atol=1e-5)


def test_a_file_keeps_how_its_encoder_normalises(tmp_path):
    plain, normalising, read = (models.ResNet18(1 / 64, normalisation=name) for name in ("none", "cifar10", "imagenet"))
    for weight, other in zip(normalising.weights, plain.weights):
        weight.assign(other)
    images = np.random.RandomState(0).rand(2, 32, 32, 3).astype(np.float32)
    expected = plain((images - np.float32([0.4914, 0.4822, 0.4465])) / np.float32([0.2470, 0.2435, 0.2616])).numpy()
    np.testing.assert_allclose(normalising(images), expected, rtol=1e-5, atol=1e-6)
    path = str(tmp_path / "f.h5")
    weights.save_weights(normalising, path)
    weights.load_weights(read, path)
    assert read.normalisation == "cifar10"
    np.testing.assert_allclose(evaluation.inference(read, images), expected, rtol=1e-5, atol=1e-6)
    weights.save_weights(plain, path)
    weights.load_weights(read, path)
    assert read.normalisation == "none" and weights.NORMALISATION not in h5py.File(path, "r").attrs


@pytest.mark.parametrize("name, told", [([b"mnist"], "not known here: mnist"), (b"cifar10", "no list of names"),
                                        (7, "no list of names"), ([b"none", b"none"], "not a whole"),
                                        ([b"x" * 2000000], "x{100,300}.; copy")])
def test_a_way_to_normalise_that_is_not_known_is_refused(tmp_path, name, told):
    encoder, path = models.ResNet18(1 / 64), str(tmp_path / "f.h5")
    weights.save_weights(encoder, path)
    with h5py.File(path, "r") as file, h5py.File(str(tmp_path / "g.h5"), "w", libver="latest", track_order=True) as other:
        for group in file:
            file.copy(group, other)
        other.attrs.update(dict(file.attrs))
        other.attrs[weights.NORMALISATION] = name
    with pytest.raises(UserError, match=told):
        weights.load_weights(encoder, str(tmp_path / "g.h5"))
    assert encoder.normalisation == "none"


def test_another_architecture_is_named_with_this_one(tmp_path):
    path = str(tmp_path / "f.h5")
    for make, width, words in ((models.ResNet34, 1 / 16, "resnet34 with width_multiplier 0.0625"),
                               (models.ResNet18, 1 / 8, "resnet18 with width_multiplier 0.125")):
        weights.save_weights(make(width), path)
        encoder = models.ResNet18(1 / 16)
        before = encoder.get_weights()
        with pytest.raises(UserError) as caught:
            weights.load_weights(encoder, path)
        assert words in str(caught.value) and "resnet18 with width_multiplier 0.0625" in str(caught.value)
        assert path in str(caught.value) and "\n" not in str(caught.value)
        assert all(np.array_equal(a, b) for a, b in zip(before, encoder.get_weights()))


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "truncated", "cut in half", "foreign", "dense", "a folder"])
def test_what_is_no_weights_file_is_one_clear_line(tmp_path, kind):
    path = tmp_path / "f.h5"
    weights.save_weights(models.ResNet18(1 / 16), str(path))
    content = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(content[:-1000])
    elif kind == "cut in half":
        path.write_bytes(content[:len(content) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not weights\n" * 1000)
    elif kind == "foreign":
        with h5py.File(str(path), "w") as file:
            file["images"] = np.zeros(10)
    elif kind == "dense":
        model = keras.Sequential([keras.layers.Dense(3, input_shape=(2,))])
        model.save_weights(str(path), save_format="h5")
    else:
        path.unlink()
        if kind == "a folder":
            path.mkdir()
    with pytest.raises(UserError) as caught:
        weights.load_weights(models.ResNet18(1 / 16), str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


PYTHONS = [os.environ.get("OTHER_PYTHON"), os.path.join(ROOT, ".venv-tf26/bin/python"), os.path.join(ROOT, ".venv/bin/python")]
CODE = """
import sys; sys.path.insert(0, %r)
import numpy as np, commands, models, weights
encoder, images = models.ResNet18(1 / 16), np.load(sys.argv[1])
weights.load_weights(encoder, sys.argv[2])
np.save(sys.argv[3], encoder(images, training=False).numpy())
weights.save_weights(encoder, sys.argv[4])
""" % ROOT


def test_files_travel_between_the_tensorflows(tmp_path):
    """This one's file gives the same features in the other, and what the other then writes gives them here."""
    other = next((path for path in PYTHONS if path and os.path.exists(path)
                  and os.path.realpath(os.path.dirname(path)) != os.path.realpath(os.path.dirname(sys.executable))), None)
    if other is None:
        pytest.skip("there is no Python with another TensorFlow: OTHER_PYTHON names none, and there is no .venv beside .venv-tf26")
    encoder = trained_encoder()
    names = [str(tmp_path / name) for name in ("images.npy", "here.h5", "features.npy", "there.h5")]
    np.save(names[0], IMAGES)
    weights.save_weights(encoder, names[1])
    done = subprocess.run([other, "-B", "-c", CODE] + names, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if b"ModuleNotFoundError" in done.stdout:
        pytest.skip("%s has not all that the project needs" % other)
    assert done.returncode == 0, done.stdout.decode()
    np.testing.assert_allclose(np.load(names[2]), features(encoder), rtol=0, atol=1e-5)
    back = models.ResNet18(1 / 16)
    weights.load_weights(back, names[3])
    np.testing.assert_array_equal(features(back), features(encoder))



# Damaged files, and files made to do harm

@pytest.fixture(scope="module")
def content():
    """A weight file's bytes."""
    encoder, memory = trained_encoder(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights.commands, "write_atomically", lambda path, content: memory.append(content))
        weights.save_weights(encoder, "")
    return memory[0]


@pytest.fixture(scope="module")
def encoder():
    """The network to load into, which a refused file must leave as it is."""
    return models.ResNet18(1 / 16)


def refused(encoder, path):
    """The message with which the file is refused."""
    before = encoder.get_weights()
    with pytest.raises(UserError) as caught:
        weights.load_weights(encoder, str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert all(np.array_equal(a, b) for a, b in zip(before, encoder.get_weights()))
    return str(caught.value)


def edited(content, edit):
    """The file after `edit(h5py.File)`, after which HDF5 leaves no checksum."""
    memory = io.BytesIO(content)
    with h5py.File(memory, "r+") as file:
        edit(file)
    return memory.getvalue()


def places(file):
    """(group, name of the weight) of each weight."""
    groups = [file[layer] for layer in weights._names(file, "layer_names")]
    return [(group, name) for group in groups for name in weights._names(group, "weight_names")]


def replaced(file, group, name, **settings):
    """Put another dataset in place of a weight; without `data`, one of the same shape that holds nothing."""
    if "data" not in settings:
        settings = dict(dict(shape=group[name].shape, dtype="f4"), **settings)
    del group[name]
    return group.create_dataset(name, **settings)


def test_a_changed_byte_is_noticed_wherever_it_is(tmp_path, encoder, content):
    path = tmp_path / "f.h5"
    seal = len(content) - weights.SEAL_BYTES
    for place in list(range(0, seal, seal // 150)) + list(range(seal, len(content), 7)) + [8, 24, 40, len(content) - 1]:
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1:])
        assert "has changed since it was written" in refused(encoder, path)
    path.write_bytes(content[:seal])  # as other programs write it
    weights.load_weights(encoder, str(path))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_and_named(tmp_path, encoder, content, value):
    def edit(file):
        group, name = places(file)[50]
        group[name][(0,) * group[name].ndim] = value
        edit.name = name

    (tmp_path / "f.h5").write_bytes(edited(content, edit))
    assert "its weight %s is not finite" % edit.name in refused(encoder, tmp_path / "f.h5")


@pytest.mark.parametrize("kind", ["kernel", "bias", "gamma", "beta", "moving_mean", "moving_variance"])
@pytest.mark.parametrize("listed", [True, False])
def test_a_weight_that_is_missing_is_named(tmp_path, encoder, content, kind, listed):
    def edit(file):
        group, name = [place for place in places(file) if place[1].endswith("/%s:0" % kind)][7]
        del group[name]
        if not listed:
            group.attrs["weight_names"] = [other for other in weights._names(group, "weight_names") if other != name]
        edit.name = name

    (tmp_path / "f.h5").write_bytes(edited(content, edit))
    assert edit.name.split(":")[0] in refused(encoder, tmp_path / "f.h5")


@pytest.mark.parametrize("dtype", ["f2", ">f4", "f8"])
def test_other_floats_are_taken(tmp_path, encoder, content, dtype):
    expected = []

    def edit(file):
        for group, name in places(file):
            expected.append(group[name][()].astype(dtype).astype("f4"))
            replaced(file, group, name, data=expected[-1], dtype=dtype)

    (tmp_path / "f.h5").write_bytes(edited(content, edit))
    weights.load_weights(encoder, str(tmp_path / "f.h5"))
    by_keras = models.ResNet18(1 / 16)
    by_keras.load_weights(str(tmp_path / "f.h5"))
    for found, keras_found in zip(encoder.get_weights(), by_keras.get_weights()):
        np.testing.assert_array_equal(found, keras_found)
    assert sorted(array.sum() for array in expected) == sorted(array.sum() for array in encoder.get_weights())


def test_kernels_are_stored_in_half_the_bytes(tmp_path):
    encoder, loaded = trained_encoder(), models.ResNet18(1 / 16)
    encoder.normalisation = "cifar10"
    whole, half = str(tmp_path / "whole.h5"), str(tmp_path / "half.h5")
    weights.save_weights(encoder, whole)
    weights.save_weights(encoder, half, kernels="float16")
    kernels = sum(array.size for array in encoder.get_weights() if array.ndim > 1)
    assert os.path.getsize(whole) - os.path.getsize(half) >= 2 * kernels
    weights.load_weights(loaded, half)
    assert loaded.normalisation == "cifar10"
    for found, array in zip(loaded.get_weights(), encoder.get_weights()):
        np.testing.assert_array_equal(found, array.astype(np.float16) if array.ndim > 1 else array)
    np.testing.assert_allclose(features(loaded), features(encoder), rtol=0.02, atol=0.02)


def test_kernels_that_are_too_large_for_it_are_refused(tmp_path):
    encoder = trained_encoder()
    kernel = encoder.trainable_weights[0]
    kernel.assign(kernel * 0 + 70000)
    with pytest.raises(UserError, match="too large for float16"):
        weights.save_weights(encoder, str(tmp_path / "half.h5"), kernels="float16")
    assert os.listdir(str(tmp_path)) == []


HARM = {
    "external storage": lambda file, group, name, path: replaced(file, group, name, external=[(path, 0, h5py.h5f.UNLIMITED)]),
    "virtual": lambda file, group, name, path: virtual(group, name, path),
    "soft link": lambda file, group, name, path: linked(group, name, h5py.SoftLink(places(file)[1][0].name)),
    "external link": lambda file, group, name, path: linked(group, name, h5py.ExternalLink(path, "a")),
    "external group": lambda file, group, name, path: linked(file, group.name, h5py.ExternalLink(path, "a")),
    "external root": lambda file, group, name, path: linked(file, "model_weights", h5py.ExternalLink(path, "/")),
    "large chunk": lambda file, group, name, path: replaced(
        file, group, name, chunks=(1 << 28,) + (1,) * (group[name].ndim - 1), maxshape=(None,) * group[name].ndim),
    "large": lambda file, group, name, path: replaced(file, group, name, shape=(60000, 60000), chunks=(1000, 1000)),
    "integers": lambda file, group, name, path: replaced(file, group, name, dtype="i4"),
    "complex": lambda file, group, name, path: replaced(file, group, name, dtype="c8"),
    "compound": lambda file, group, name, path: replaced(file, group, name, dtype=[("a", "f4"), ("b", "i2")]),
    "strings": lambda file, group, name, path: replaced(file, group, name, dtype=h5py.string_dtype()),
    "lists": lambda file, group, name, path: replaced(file, group, name, dtype=h5py.vlen_dtype(np.float32)),
    "references": lambda file, group, name, path: replaced(file, group, name, dtype=h5py.ref_dtype),
    "opaque": lambda file, group, name, path: replaced(file, group, name, dtype="V4"),
    "truth values": lambda file, group, name, path: replaced(file, group, name, dtype="?"),
    "one number": lambda file, group, name, path: replaced(file, group, name, data=np.float32(1)),
    "nothing": lambda file, group, name, path: replaced(file, group, name, data=h5py.Empty("f4")),
    "a group": lambda file, group, name, path: linked(group, name, file.create_group("other")),
    "a type": lambda file, group, name, path: linked(group, name, np.dtype("f4")),
    "no group": lambda file, group, name, path: linked(file, group.name, np.zeros(3, np.float32)),
    "another shape": lambda file, group, name, path: replaced(file, group, name, data=group[name][()][..., None]),
    "fewer axes": lambda file, group, name, path: replaced(file, group, name, data=group[name][()].ravel()[1:]),
    "no names": lambda file, group, name, path: group.attrs.pop("weight_names"),
    "no layers": lambda file, group, name, path: file.attrs.pop("layer_names"),
    "names that are numbers": lambda file, group, name, path: group.attrs.update(weight_names=[1, 2, 3]),
    "names that are a string": lambda file, group, name, path: group.attrs.update(weight_names="kernel:0"),
    "names that are none": lambda file, group, name, path: group.attrs.update(weight_names=h5py.Empty("S8")),
    "names in a table": lambda file, group, name, path: group.attrs.update(weight_names=[[b"a", b"b"], [b"c", b"d"]]),
    "names that are references": lambda file, group, name, path: file.attrs.create("layer_names", [group.ref], dtype=h5py.ref_dtype),
    "names that lead astray": lambda file, group, name, path: file.attrs.update(layer_names=[b".", b"..", b"/", b"a\nb", b"\xff"]),
    "names that are empty": lambda file, group, name, path: group.attrs.update(weight_names=[b"", b"/"]),
    "layers that are none": lambda file, group, name, path: file.attrs.update(layer_names=np.zeros(0)),
    "long names": lambda file, group, name, path: large_names(file, 4, 1 << 20),
    "many names": lambda file, group, name, path: large_names(file, 1 << 20, 4),
}


def linked(group, name, target):
    del group[name]
    group[name] = target


def virtual(group, name, path):
    layout = h5py.VirtualLayout(group[name].shape, "f4")
    layout[...] = h5py.VirtualSource(path, "a", group[name].shape)
    del group[name]
    group.create_virtual_dataset(name, layout)


def large_names(file, number, width):
    """An attribute of 4 MB, which only a group in HDF5's newer layout takes."""
    root = file.create_group("model_weights")
    root.attrs["layer_names"] = np.full(number, b"x" * width)


def harmed(content, harm, place, path):
    memory = io.BytesIO(content)
    newer = {"libver": "latest"} if harm in ("long names", "many names") else {}
    with h5py.File(memory, "r+", **newer) as file:
        if harm == "external root":
            file.create_group("model_weights")
        HARM[harm](file, *places(file)[place], path=path)
    return memory.getvalue()


@pytest.fixture
def within_bounds():
    """What is refused takes little time and memory."""
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - began < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300e3  # kB


@pytest.mark.parametrize("harm", sorted(HARM))
def test_what_could_do_harm_is_refused_in_one_line(tmp_path, encoder, content, harm, within_bounds):
    elsewhere = str(tmp_path / "elsewhere.h5")
    with h5py.File(elsewhere, "w") as file:
        file["a"] = np.zeros(10000, np.float32)
    (tmp_path / "f.h5").write_bytes(harmed(content, harm, 2, elsewhere))
    print(refused(encoder, tmp_path / "f.h5"))


def flipped(chance, content, number):
    changed = bytearray(content)
    for _ in range(number):
        changed[chance.randrange(len(changed))] ^= chance.randrange(1, 256)
    return bytes(changed)


def zipped(content):
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("f.h5", content)
    return memory.getvalue()


def moved(content):
    """All of it within a group, as a file of a whole model has it."""
    def edit(file):
        file.create_group("model_weights").attrs["layer_names"] = file.attrs["layer_names"]
        for name in weights._names(file, "layer_names"):
            file.move(name, "model_weights/" + name)

    return edited(content, edit)


def damaged(change):
    """On one weight drawn by chance."""
    def by_chance(chance, content):
        place = chance.randrange(120)
        return edited(content, lambda file: change(chance, file, *places(file)[place]))

    return by_chance


def spoil(chance, file, group, name):
    array = group[name][()]
    array.flat[chance.randrange(array.size)] = chance.choice([np.nan, np.inf, -np.inf])
    group[name][...] = array


def zeroed(content, first):
    return content[:first] + bytes(4096) + content[first + 4096:]


# Each (chance, content) -> the changed file's bytes.
MUTATIONS = {
    "bytes": lambda chance, content: flipped(chance, content, chance.choice([1, 1, 1, 2, 10, 100])),
    "bytes at the head": lambda chance, content: flipped(chance, content[:2048], 1) + content[2048:],
    "cut": lambda chance, content: content[:chance.randrange(len(content))],
    "cut and filled": lambda chance, content: content[:chance.randrange(len(content) - 4096)].ljust(len(content), b"\0"),
    "zeroed": lambda chance, content: zeroed(content, chance.randrange(len(content) - 4096)),
    "longer": lambda chance, content: content + bytes(chance.randrange(1, 5000)),
    "empty": lambda chance, content: b"",
    "zip": lambda chance, content: zipped(content),
    "text": lambda chance, content: content.hex().encode(),
    "in a group": lambda chance, content: moved(content),
    "float64": damaged(lambda chance, file, group, name: replaced(file, group, name, data=group[name][()], dtype="f8")),
    "compressed": damaged(lambda chance, file, group, name: replaced(file, group, name, data=group[name][()], compression="gzip")),
    "renamed": damaged(lambda chance, file, group, name: group.move(name, name + "_")),
    "missing": damaged(lambda chance, file, group, name: group.pop(name)),
    "group missing": damaged(lambda chance, file, group, name: file.pop(group.name)),
    "not finite": damaged(spoil),
    "transposed": damaged(lambda chance, file, group, name: replaced(file, group, name, data=group[name][()].T[None])),
    "longer by one": damaged(lambda chance, file, group, name: replaced(
        file, group, name, data=np.concatenate([group[name][()], group[name][()][:1]]))),
}


def test_whatever_is_done_to_a_file_it_is_refused_or_gives_the_same_numbers(tmp_path, encoder, content):
    """MUTATED is how many files are changed in this one test (1000: by hand), SEED for others."""
    chance, number = random.Random(int(os.environ.get("SEED", "0"))), int(os.environ.get("MUTATED", "100"))
    weights_before, counts = encoder.get_weights(), {}
    path, elsewhere = tmp_path / "f.h5", str(tmp_path / "elsewhere.h5")
    with h5py.File(elsewhere, "w") as file:
        file["a"] = np.zeros(10000, np.float32)
    path.write_bytes(content)
    weights.load_weights(encoder, str(path))
    true = encoder.get_weights()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kinds = sorted(MUTATIONS) + sorted(HARM)
    for i in range(number):
        kind = kinds[i % len(kinds)]
        path.write_bytes(MUTATIONS[kind](chance, content) if kind in MUTATIONS
                         else harmed(content, kind, chance.randrange(120), elsewhere))
        encoder.set_weights(weights_before)
        began = time.process_time()
        try:
            weights.load_weights(encoder, str(path))
            result, expected = "loaded", true
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 600
            result, expected = "refused", weights_before
        assert all(np.array_equal(a, b) for a, b in zip(encoder.get_weights(), expected)), kind
        assert time.process_time() - began < 30, kind
        counts.setdefault(kind, {"loaded": 0, "refused": 0})[result] += 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300e3  # kB
    print(counts)
    assert sum(count["refused"] for count in counts.values()) > number / 2
    for kind in ("longer", "in a group", "float64", "compressed"):
        assert counts[kind]["loaded"] and not counts[kind]["refused"], kind


@pytest.mark.parametrize("make, stem", [(models.ResNet50, "imagenet"), (models.ResNet50, "cifar"), (models.ResNet18, "imagenet")])
def test_files_of_encoders_for_real_images(tmp_path, make, stem):
    encoder, other = make(1 / 32, stem=stem), make(1 / 32, stem=stem)
    path = str(tmp_path / "f.h5")
    weights.save_weights(encoder, path)
    weights.load_weights(other, path)
    for mine, its in zip(encoder.weights, other.weights):
        np.testing.assert_array_equal(mine, its)
    assert weights.settings_of(path) == {"encoder": encoder.name, "width_multiplier": 1 / 32, "stem": stem, "normalise": "none"}
    wrong = make(1 / 32, stem={"imagenet": "cifar", "cifar": "imagenet"}[stem])
    with pytest.raises(UserError, match="of %s with width_multiplier 0.03125 and the stem %s.*--stem" % (encoder.name, stem)):
        weights.load_weights(wrong, path)


def test_what_is_known_of_a_file(tmp_path):
    head, path = models.ProjectionHead(8, 4), str(tmp_path / "head.h5")
    head.build((None, 8))
    weights.save_weights(head, path)
    assert weights.settings_of(path) == {"stem": "cifar", "normalise": "none"}
    assert weights.settings_of("cifar10-narrow") == {"encoder": "resnet18", "width_multiplier": 0.25, "stem": "cifar",
                                                     "normalise": "cifar10"}
    with open(path, "r+b") as file:
        file.truncate(3000)
    for name, words in ((path, "not a whole Keras weights file"), (str(tmp_path / "none.h5"), "There is no weights file")):
        with pytest.raises(UserError, match=words):
            weights.settings_of(name)


@pytest.mark.parametrize("make, initializer", [(models.ResNet18, "torch"), (models.ResNet34, "glorot"), (models.ResNet50, "torch")])
def test_a_start_has_the_features_of_its_file_and_kernels_as_large_as_drawn(tmp_path, make, initializer):
    conv = models.drawn(keras.layers.Conv2D, initializer)
    encoder, drawn, started = trained_encoder(make=make), make(1 / 16, conv=conv), make(1 / 16, conv=conv)
    for i, variable in enumerate(encoder.trainable_weights):
        if "kernel" in variable.name:
            variable.assign(variable * (5.0 if i % 2 else 0.1))
        elif "bias" in variable.name:
            variable.assign(variable * 0.01)
    norms = [layer for layer in encoder.submodules if isinstance(layer, keras.layers.BatchNormalization)]
    statistics = [statistic for layer in norms for statistic in (layer.moving_mean, layer.moving_variance)]
    for change in (lambda statistic: 0 * statistic, lambda statistic: statistic / (1 - norms[0].momentum)):
        for statistic in statistics:  # those of one batch
            statistic.assign(change(statistic))
        encoder(IMAGES, training=True)
    assert np.min(norms[0].moving_variance) < norms[0].epsilon
    path = str(tmp_path / "f.h5")
    weights.save_weights(encoder, path)
    sizes = [np.std(variable) for variable in started.trainable_weights if "kernel" in variable.name]
    weights.start_from(started, path)
    np.testing.assert_allclose(features(started), features(encoder), rtol=1e-3, atol=1e-4 * np.abs(features(encoder)).max())
    kernels = [(mine, its) for mine, its in zip(started.trainable_weights, encoder.trainable_weights) if "kernel" in mine.name]
    np.testing.assert_allclose([np.std(mine) for mine, _ in kernels], sizes, rtol=1e-5)
    for mine, its in kernels:
        np.testing.assert_allclose(mine / np.std(mine), its / np.std(its), rtol=1e-4, atol=1e-5)
    assert np.isfinite(features(encoder)).all()
    assert np.abs(features(drawn) - features(encoder)).max() > 0.1 * np.abs(features(encoder)).max()


def test_a_start_with_a_kernel_of_zeros_stays_finite(tmp_path):
    encoder, path = trained_encoder(), str(tmp_path / "f.h5")
    encoder.trainable_weights[0].assign(0 * encoder.trainable_weights[0])
    weights.save_weights(encoder, path)
    started = models.ResNet18(1 / 16)
    weights.start_from(started, path)
    np.testing.assert_allclose(features(started), features(encoder), rtol=1e-3, atol=1e-5)


def test_a_file_of_resnet50_with_shortcuts_first_is_refused(tmp_path):
    """In stage 1 the shortcut has the shape of the third convolution, so that order alone would swap them unseen."""
    encoder, path = models.ResNet50(1 / 32), str(tmp_path / "f.h5")
    for block in encoder.blocks:
        if block.project:
            order = ["shortcut_conv", "shortcut_norm"] + ["%s%d" % kind for n in (1, 2, 3) for kind in (("conv", n), ("norm", n))]
            block._self_tracked_trackables = [getattr(block, name) for name in order]
    weights.save_weights(encoder, path)
    with pytest.raises(UserError, match="lists a shortcut before"):
        weights.load_weights(models.ResNet50(1 / 32), path)
