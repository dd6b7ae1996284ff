"""Data sets that TensorFlow Datasets has prepared: made here by its own machinery, without network, and by its mock_data."""
import os
import shutil
import sys
import time

import numpy as np
import pytest
import tensorflow as tf
from command import BLOCKS, fork

import datasets
import evaluation
import linearevaluation
from commands import UserError
from sources import image_files, store, tfds

package = pytest.importorskip("tensorflow_datasets", reason="tensorflow-datasets is not installed")
features = package.features
CLASSES = ["ant", "bee", "cow"]


def picture(number, channels=3):
    """10 + number % 4 rows of 12 pixels; which number it is can be seen."""
    rows = np.full((10 + number % 4, 12, channels), 2 * number, np.uint8)
    rows[:, :, :2] += np.arange(12, dtype=np.uint8)[:, None]
    return rows


def examples(numbers, labels=True, channels=3):
    return [dict({"image": picture(i, channels)}, **({"label": i % 3 if labels is True else labels} if labels is not False else {}))
            for i in numbers]


def prepare(data_dir, name, parts, channels=3, **others):
    """Have TensorFlow Datasets write such a data set, and give its folder. parts: the examples of each."""
    kinds = dict({"image": features.Image(shape=(None, None, channels))}, **others)
    if any("label" in example for part in parts.values() for example in part):
        kinds.setdefault("label", features.ClassLabel(names=CLASSES))
    kinds = {key: kind for key, kind in kinds.items() if kind is not None}

    def _info(self):
        return package.core.DatasetInfo(builder=self, features=features.FeaturesDict(kinds))

    with package.core.registered.skip_registration():
        builder = type(name, (package.core.GeneratorBasedBuilder,), {
            "VERSION": package.core.Version("1.0.0"), "_info": _info, "__module__": __name__, "_generate_examples": lambda self: None,
            "_split_generators": lambda self, manager: {part: iter(list(enumerate(found))) for part, found in parts.items()}})
    made = builder(data_dir=str(data_dir))
    made.download_and_prepare()
    time.sleep(0.03)  # or the files would be too new to be sure of
    return data_dir / made.name / "1.0.0"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(package.core.utils.gcs_utils, "_is_gcs_disabled", True, raising=False)


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    """48 images for training and 12 for testing, of three classes."""
    folder = tmp_path_factory.mktemp("tfds")
    prepare(folder, "Pets", {"train": examples(range(48)), "test": examples(range(48, 60))})
    return folder


@pytest.fixture
def decoded(monkeypatch):
    """How many images are decoded."""
    calls, decode = [], image_files.decode

    def counting(data, size):
        calls.append(size)
        return decode(data, size)

    monkeypatch.setattr(image_files, "decode", counting)
    return calls


def load(folder, cache, name="pets", size=8, **more):
    return datasets.load("tfds:" + name, str(folder), image_size=size, cache_dir=str(cache), **more)


def numbers(images):
    """Which pictures these are."""
    return (images[:][:, 4, 4, 2] // 2).tolist()


def test_images_labels_classes_and_names(pets, tmp_path):
    data = load(pets, tmp_path)
    assert sorted(numbers(data.train_images)) == list(range(48)) and sorted(numbers(data.test_images)) == list(range(48, 60))
    for images, labels in ((data.train_images, data.train_labels), (data.test_images, data.test_labels)):
        assert labels.dtype == np.int64 and labels.tolist() == [i % 3 for i in numbers(images)]
        np.testing.assert_array_equal(images[:], [image_files.square(picture(i), 8) for i in numbers(images)])
    assert data.class_names == tuple(CLASSES)
    assert data.train_files == tuple("train/%d" % i for i in range(48)) and data.test_files[-1] == "test/11"
    opened = getattr(package, "builder_from_directory", None) or package.core.builder_from_directory
    own = opened(str(pets / "pets" / "1.0.0")).as_dataset(split="train[17:18]")  # what the name train/17 says
    assert [int(example["image"][4, 4, 2]) // 2 for example in own] == numbers(data.train_images)[17:18]


def test_the_second_start_decodes_nothing_and_has_the_same_bits(pets, tmp_path, decoded):
    said = []
    first = load(pets, tmp_path, say=said.append)
    assert len(decoded) == 60 and "Decoding 60 of 60 images of tfds:pets into %s/tfds-pets-8-" % tmp_path in said[0]
    again = load(pets, tmp_path, say=said.append)
    assert len(decoded) == 60 and "Using the 60 decoded images" in said[2]
    assert first.train_images[:].tobytes() == again.train_images[:].tobytes() and first.train_files == again.train_files


def test_after_an_interruption_it_goes_on(pets, tmp_path, monkeypatch, decoded):
    square = image_files.square

    def stop(image, size):
        if len(decoded) > 20:
            raise KeyboardInterrupt
        return square(image, size)

    monkeypatch.setattr(store, "SECONDS_A_COMMIT", 0)
    monkeypatch.setattr(image_files, "THREADS", 1)
    monkeypatch.setattr(image_files, "WAITING", 1)
    with monkeypatch.context() as while_it_lasts:
        while_it_lasts.setattr(image_files, "square", stop)
        with pytest.raises(KeyboardInterrupt):
            load(pets, tmp_path)
    del decoded[:]
    data = load(pets, tmp_path)
    assert 30 < len(decoded) < 60
    assert sorted(numbers(data.train_images)) == list(range(48)) and data.train_labels.tolist() == [
        i % 3 for i in numbers(data.train_images)]


def test_what_was_prepared_anew_is_decoded_anew(tmp_path, decoded):
    folder = prepare(tmp_path, "Birds", {"train": examples(range(6))})
    assert load(tmp_path, tmp_path / "cache", "birds", test_fraction=0).class_names == tuple(CLASSES)
    shutil.rmtree(str(folder))
    prepare(tmp_path, "Birds", {"train": examples(range(20, 25))})
    assert sorted(numbers(load(tmp_path, tmp_path / "cache", "birds", test_fraction=0).train_images)) == list(range(20, 25))
    assert len(decoded) == 11


def test_which_parts_are_for_testing(tmp_path):
    parts = {"one": (["train", "test", "validation"], range(6), range(6, 9)),
             "two": (["train", "validation"], range(6), range(9, 12)),
             "three": (["train", "unlabelled"], None, None),
             "four": (["whole"], None, None)}
    found = {"train": examples(range(6)), "test": examples(range(6, 9)), "validation": examples(range(9, 12)),
             "unlabelled": examples(range(3)), "whole": examples(range(6))}
    for name, (present, train, test) in parts.items():
        prepare(tmp_path, name, {part: found[part] for part in present})
        data = load(tmp_path, tmp_path / "cache", name, test_fraction=0.5)
        if train:
            assert (sorted(numbers(data.train_images)), sorted(numbers(data.test_images))) == (list(train), list(test))
        else:  # one of each class, always the same
            assert sorted(data.train_labels) == sorted(data.test_labels) == [0, 1, 2]
            assert sorted(numbers(data.train_images) + numbers(data.test_images)) == list(range(6))
            assert data.test_files == load(tmp_path, tmp_path / "cache", name, test_fraction=0.5).test_files
            assert not len(load(tmp_path, tmp_path / "cache", name, test_fraction=0).test_images)


def test_a_part_without_labels_is_not_for_testing(tmp_path):
    prepare(tmp_path, "Contest", {"train": examples(range(6)), "test": examples(range(6, 9), -1),
                                  "validation": examples(range(9, 12))})
    data = load(tmp_path, tmp_path / "cache", "contest")
    assert sorted(numbers(data.test_images)) == [9, 10, 11] and sorted(data.test_labels) == [0, 1, 2]


def test_training_images_without_labels_make_a_data_set_without(tmp_path, caplog):
    prepare(tmp_path, "Some", {"train": examples(range(5)) + examples([5], -1)})
    data = load(tmp_path, tmp_path / "cache", "some")
    assert data.train_labels is None and data.class_names == () and len(data.train_images) == 6
    prepare(tmp_path, "None_", {"train": examples(range(5), False)})
    data = load(tmp_path, tmp_path / "cache", "none_")
    assert data.train_labels is data.test_labels is None and (len(data.train_images), len(data.test_images)) == (5, 0)
    with pytest.raises(UserError, match="The data set tfds:none_ in .* has no labels; choose one that has"):
        evaluation.load_data(linearevaluation.Config(dataset="tfds:none_", data_dir=str(tmp_path), image_size=8,
                                                     cache_dir=str(tmp_path / "cache")))


def test_grey_and_transparent_images_and_jpegs(tmp_path):
    prepare(tmp_path, "Grey", {"train": examples(range(4), channels=1)}, channels=1)
    images = load(tmp_path, tmp_path / "cache", "grey", test_fraction=0).train_images
    assert sorted(images[:][:, 4, 4, 0] // 2) == [3, 4, 5, 6] and (images[:] == images[:][..., :1]).all()  # + 6, the column
    prepare(tmp_path, "Glass", {"train": [{"image": np.full((9, 9, 4), shade, np.uint8)} for shade in (0, 255)]}, channels=4)
    images = load(tmp_path, tmp_path / "cache", "glass").train_images[:]
    assert (images == 255).all()  # transparent black lies over white
    jpegs = features.Image(shape=(None, None, 3), encoding_format="jpeg")
    prepare(tmp_path, "Photos", {"train": examples(range(60, 64))}, image=jpegs)
    assert np.abs(np.array(sorted(numbers(load(tmp_path, tmp_path / "cache", "photos", test_fraction=0).train_images)))
                  - np.arange(60, 64)).max() <= 6


def test_of_several_images_and_classes_the_usual_names_count(tmp_path):
    both = [{"image": picture(i), "mask": picture(0), "label": i % 3, "group": i % 2, "text": "x"} for i in range(6)]
    prepare(tmp_path, "Both", {"train": both}, mask=features.Image(shape=(None, None, 3)), group=features.ClassLabel(num_classes=2),
            text=features.Text())
    data = load(tmp_path, tmp_path / "cache", "both", test_fraction=0)
    assert data.train_labels.tolist() == [i % 3 for i in numbers(data.train_images)]


def test_versions_and_configurations(pets, tmp_path):
    for path, version in (("pets/1.0.0", "1.0.0"), ("pets/10.0.0", "10.0.0"), ("pets/9.0.0", "9.0.0")):
        shutil.copytree(str(pets / "pets" / "1.0.0"), str(tmp_path / path))
    assert tfds._find("pets", str(tmp_path)) == str(tmp_path / "pets" / "10.0.0")
    assert tfds._find("pets:9.0.0", str(tmp_path)) == str(tmp_path / "pets" / "9.0.0")
    for config in ("large", "small"):
        shutil.copytree(str(pets / "pets" / "1.0.0"), str(tmp_path / "wild" / config / "1.0.0"))
    assert tfds._find("wild/small", str(tmp_path)) == tfds._find("wild/small:1.0.0", str(tmp_path)) == str(
        tmp_path / "wild" / "small" / "1.0.0")
    with pytest.raises(UserError, match="several configurations; choose one: tfds:wild/large, tfds:wild/small"):
        tfds._find("wild", str(tmp_path))
    shutil.rmtree(str(tmp_path / "wild" / "large"))
    assert tfds._find("wild", str(tmp_path)) == str(tmp_path / "wild" / "small" / "1.0.0")


def test_the_folder_of_tensorflow_datasets_is_the_default(pets, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(pets))
    assert len(datasets.load("tfds:pets", None, 8, cache_dir=str(tmp_path)).train_images) == 48
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match="tfds:pets is not prepared in %s/tensorflow_datasets, and nothing" % tmp_path):
        datasets.load("tfds:pets", None, 8)


def test_what_is_no_set_of_images_is_one_line(tmp_path):
    number = features.Tensor(shape=(), dtype=tf.int64)
    floats = features.Image(shape=(None, None, 1), dtype=tf.float32)
    for name, example, kinds, message in (
            ("Words", {"text": "x", "n": 1}, {"image": None, "text": features.Text(), "n": number}, r"\(n: \w+, text: Text\)"),
            ("Depth", {"image": np.ones((5, 5, 1), np.float32)}, {"image": floats}, "Image of float32"),
            ("Pair", {"left": picture(1), "right": picture(2)}, dict(
                {side: features.Image(shape=(None, None, 3)) for side in ("left", "right")}, image=None), "left: .*, right: ")):
        prepare(tmp_path, name, {"train": [example] * 3}, **kinds)
        with pytest.raises(UserError, match=r"^An example of tfds:%s is not one image of 8 or 16 bits .*%s" % (name.lower(), message)):
            load(tmp_path, tmp_path / "cache", name.lower())
    prepare(tmp_path, "Odd", {"one": examples(range(3)), "two": examples(range(3))})
    with pytest.raises(UserError, match="tfds:odd has the parts one, two, and none is called train"):
        load(tmp_path, tmp_path / "cache", "odd")
    prepare(tmp_path, "Single", {"train": examples(range(1))})
    with pytest.raises(UserError, match="tfds:single has 1 usable images for training; it needs 2"):
        load(tmp_path, tmp_path / "cache", "single")


def test_what_is_not_there_or_not_whole_is_one_line(pets, tmp_path, monkeypatch):
    for name, message in (("", "give tfds:NAME"), ("a b", "give tfds:NAME"), ("pets:1", "give tfds:NAME"),
                          ("../pets", "give tfds:NAME"),
                          ("cats", "tfds:cats is not prepared in .*builder.'cats', data_dir="), ("pets:2.0.0", "is not prepared")):
        with pytest.raises(UserError, match=message):
            load(pets, tmp_path, name)
    with pytest.raises(UserError, match="fraction of test images is 1"):
        load(pets, tmp_path, test_fraction=1.0)

    def damaged(change):
        copy = tmp_path / "copy"
        shutil.rmtree(str(copy), ignore_errors=True)
        shutil.copytree(str(pets), str(copy))
        change(copy / "pets" / "1.0.0")
        return copy

    shard = "pets-train.tfrecord-00000-of-00001"
    for message, change in (
            ("is not complete: %s is missing in .*; prepare it anew" % shard, lambda path: (path / shard).unlink()),
            ("cannot read .*DataLossError.*; prepare it anew", lambda path: os.truncate(str(path / shard), 3000)),
            ("cannot read .* contain 48 elements .*; prepare it anew", lambda path: os.truncate(str(path / shard), 0)),
            ("cannot read .*; prepare it anew", lambda path: (path / "dataset_info.json").write_text("{")),
            ("cannot read .*; prepare it anew", lambda path: (path / "features.json").write_text("{}"))):
        with pytest.raises(UserError, match=message) as caught:
            load(damaged(change), tmp_path / "cache")
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match="needs the package tensorflow-datasets .*pip install -r requirements-extra.txt"):
        load(pets, tmp_path)


def test_damaged_images_are_skipped_by_name(tmp_path, monkeypatch, caplog):
    prepare(tmp_path, "Worn", {"train": examples(range(6))})
    decode, warnings = image_files.decode, []

    def sometimes(data, size):
        pixels = decode(data, size)
        if pixels[4, 4, 2] == 2 * 3:
            raise image_files.Unusable("damaged")
        return pixels

    monkeypatch.setattr(image_files, "decode", sometimes)
    monkeypatch.setattr(tfds.folders.logging, "warning", lambda text, *values: warnings.append(text % values))
    data = load(tmp_path, tmp_path / "cache", "worn", test_fraction=0)
    assert sorted(numbers(data.train_images)) == [0, 1, 2, 4, 5] and data.train_labels.tolist() == [
        i % 3 for i in numbers(data.train_images)]
    assert len(warnings) == 1 and warnings[0].startswith("Skipped 1 of 6 files in tfds:worn: 'train/")


def test_with_mock_data(pets, tmp_path):
    """The examples that TensorFlow Datasets makes up itself, from what the prepared folder says of them."""
    folder = pets / "pets" / "1.0.0"
    for split in ("train", "test"):
        with package.testing.mock_data(num_examples=48, data_dir=str(folder)):
            data = load(pets, tmp_path / split)
    assert data.train_images.shape == (48, 8, 8, 3) and data.train_images[:].std() > 10
    assert set(data.train_labels) <= {0, 1, 2} and data.class_names == tuple(CLASSES)


FLAGS = ["--dataset=tfds:pets", "--image_size=8", "--device=cpu", "--width_multiplier=0.0625", "--quiet"]


def test_the_commands_take_it(pets, tmp_path):
    shared = FLAGS + ["--data_dir=%s" % pets, "--cache_dir=%s" % (tmp_path / "cache"), "--output_dir=%s" % tmp_path]
    datasets.prepare(datasets.Config(dataset="tfds:pets", data_dir=str(pets), image_size=8, cache_dir=str(tmp_path / "cache"),
                                     quiet=True))
    for command, more in (("pretraining.py", ["--batch_size=16", "--num_epochs=1"]),
                          ("embed.py", ["--encoder_weights=%s" % (tmp_path / "f_online_1.h5")])):
        process = fork(command, *shared + more, blocks=BLOCKS)
        assert process.communicate(timeout=300)[1] == "" and process.returncode == 0
    assert np.load(str(tmp_path / "embeddings.npz"))["files"].tolist()[-1] == "test/11"
