"""Embeddings, their picture, and the encoder as a SavedModel and a frozen graph without this code."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from command import run

import datasets
import embed
import evaluation
import models
import npu_config
import weights as weight_files
from commands import UserError

# What a frozen encoder is made of: no training operators, no variables, no functions.
OPERATORS = {"Placeholder", "Const", "Identity", "NoOp", "Cast", "RealDiv", "Conv2D", "BiasAdd", "StridedSlice",
             "FusedBatchNormV3", "Relu", "AddV2", "Mean"}
LOAD = """
import sys
import numpy as np
import tensorflow as tf
assert not set(sys.modules) & {"models", "evaluation", "tf_keras"}
images = np.load("images.npy")
loaded = tf.saved_model.load("exported/saved_model")
features = loaded.embed(tf.constant(images))["features"]
served = loaded.signatures["serving_default"](images=tf.constant(images))["features"]
assert features.dtype == tf.float32 and (features.numpy() == served.numpy()).all()
assert loaded.embed(tf.constant(images[:1]))["features"].shape == (1, 32)
np.save("features.npy", features.numpy())
"""


@pytest.fixture(scope="module")
def encoder():
    npu_config.open_device(npu_config.Options(device="cpu")).set_seed(1)
    return models.ResNet18(1 / 16)


@pytest.fixture(scope="module")
def weights(encoder, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("weights") / "f_online_1.h5")
    weight_files.save_weights(encoder, path)
    return path


@pytest.fixture
def main(monkeypatch, tmp_path, weights):
    """Runs the command in this process. Gives the content of embeddings.npz, if there is one."""
    def call(**settings):
        defaults = dict(device="cpu", width_multiplier=1 / 16, encoder_weights=weights, dataset="shapes",
                        output_dir=str(tmp_path))
        config = embed.Config(**dict(defaults, **settings))
        embed.embed(config)
        if (tmp_path / "embeddings.npz").exists():
            return dict(np.load(str(tmp_path / "embeddings.npz"), allow_pickle=False))

    return call


@pytest.fixture
def shapes(monkeypatch):
    data = datasets.load("shapes", train_size=30, test_size=20)
    monkeypatch.setattr(datasets, "load", lambda *names, **sizes: data)
    return data


def write_images(folder, names):
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.RandomState(number).randint(0, 256, (40, 33, 3)).astype(np.uint8)
        path.write_bytes(tf.io.encode_png(pixels).numpy())


def test_embeddings_are_the_features_of_both_parts(main, shapes, encoder, tmp_path, capsys):
    content = main()
    expected = evaluation.features(encoder, np.concatenate([shapes.train_images, shapes.test_images]))
    np.testing.assert_allclose(content["features"], expected, atol=1e-5)
    assert content["features"].dtype == np.float32
    labels = np.concatenate([shapes.train_labels, shapes.test_labels])
    np.testing.assert_array_equal(content["labels"], labels)
    assert content["split"].tolist() == ["train"] * 30 + ["test"] * 20
    assert content["files"].tolist() == [""] * 50 and tuple(content["class_names"]) == shapes.class_names
    result = json.loads((tmp_path / "result_embed.json").read_text())
    assert result["embeddings"] == 50 and result["dimensions"] == 32 and result["config"]["split"] == "all"
    assert "50 embeddings of 32 numbers" in capsys.readouterr().out
    assert main(split="test")["labels"].tolist() == shapes.test_labels.tolist()


def test_a_folder_with_and_without_labels(main, tmp_path, encoder):
    write_images(tmp_path / "a", ["cat/%d.png" % i for i in range(4)] + ["dog/%d.png" % i for i in range(3)])
    content = main(dataset="folder", data_dir=str(tmp_path / "a"), test_fraction=0.3)
    names = ["cat/%d.png" % i for i in range(4)] + ["dog/%d.png" % i for i in range(3)]
    assert sorted(content["files"].tolist()) == names
    for name, label, features in zip(content["files"], content["labels"], content["features"]):
        assert content["class_names"][label] == name.split("/")[0]
        image = datasets.folders.image_files.load(str(tmp_path / "a" / str(name)), 32)
        np.testing.assert_allclose(features, evaluation.features(encoder, image[None])[0], atol=1e-5)
    write_images(tmp_path / "b", ["%d.png" % i for i in range(3)])
    content = main(dataset="folder", data_dir=str(tmp_path / "b"))
    assert content["labels"].tolist() == [-1, -1, -1] and content["class_names"].shape == (0,)
    assert content["files"].tolist() == ["0.png", "1.png", "2.png"]


def test_the_exported_model_needs_none_of_this_code(weights, encoder, tmp_path):
    status, out, error = run("embed.py", "--export", tmp_path / "exported", "--encoder_weights", weights,
                             "--width_multiplier=0.0625", "--output_dir", tmp_path)
    assert status == 0, error
    assert str(tmp_path / "exported" / "saved_model") in out and "input images:0" in out
    images = np.random.RandomState(0).randint(0, 256, (5, 32, 32, 3)).astype(np.uint8)
    np.save(str(tmp_path / "images.npy"), images)
    environment = {name: value for name, value in os.environ.items() if name != "TF_USE_LEGACY_KERAS"}  # which commands set
    process = subprocess.run([sys.executable, "-c", LOAD], cwd=str(tmp_path), env=environment,
                             stderr=subprocess.PIPE, timeout=600)
    assert process.returncode == 0, process.stderr.decode()
    expected = evaluation.features(encoder, images)
    np.testing.assert_allclose(np.load(str(tmp_path / "features.npy")), expected, atol=1e-5)
    result = json.loads((tmp_path / "exported" / "result_export.json").read_text())
    assert result["dimensions"] == 32 and result["config"]["precision_mode"] == "must_keep_origin_dtype"

    graph = tf.compat.v1.GraphDef()
    graph.ParseFromString((tmp_path / "exported" / "frozen.pb").read_bytes())
    assert {node.op for node in graph.node} <= OPERATORS and not graph.library.function
    frozen = tf.compat.v1.wrap_function(
        lambda x: tf.compat.v1.import_graph_def(graph, {result["input"]: x}, [result["output"]])[0],
        [tf.TensorSpec((None, 32, 32, 3), tf.uint8)])
    np.testing.assert_allclose(frozen(tf.constant(images)).numpy(), expected, atol=1e-5)


def test_an_earlier_export_is_replaced_and_nothing_is_left_over(encoder, tmp_path):
    names = embed.export(encoder, 32, str(tmp_path))
    assert names["input"] == "images:0"
    (tmp_path / "saved_model" / "old").write_text("")
    other = models.ResNet18(1 / 16)
    embed.export(other, 48, str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["frozen.pb", "saved_model"]
    assert not (tmp_path / "saved_model" / "old").exists()
    loaded = tf.saved_model.load(str(tmp_path / "saved_model"))
    images = np.random.RandomState(0).randint(0, 256, (2, 48, 48, 3)).astype(np.uint8)
    found = loaded.embed(images)["features"]
    np.testing.assert_allclose(found, evaluation.features(other, images), atol=1e-5)


@pytest.mark.parametrize("first", [True, False])
def test_a_full_disk_is_one_line_and_an_earlier_export_stays(encoder, tmp_path, monkeypatch, first):
    if not first:
        embed.export(encoder, 32, str(tmp_path))
    before = sorted(str(path) for path in tmp_path.rglob("*"))

    def save(module, path, **_):
        with open(os.path.join(path, "half"), "w"):
            raise tf.errors.ResourceExhaustedError(None, None, "{{function_node}} %s/variables; No space left on device" % path)

    monkeypatch.setattr(tf.saved_model, "save", save)
    with pytest.raises(UserError, match="Could not write .*saved_model .ResourceExhaustedError.; make room"):
        embed.export(encoder, 32, str(tmp_path))
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_the_projection_is_drawn(main, shapes, tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    from matplotlib import image

    main(projection=True)
    pixels = image.imread(str(tmp_path / "projection.png"))
    assert pixels.shape[:2] == (660, 1430) and pixels[..., :3].std() > 0.05
    embed.draw({"PCA": np.zeros((3, 2))}, np.array([-1, -1, -1]), (), str(tmp_path / "unlabelled.png"))
    assert (tmp_path / "unlabelled.png").exists()


def test_projections_keep_clusters_apart():
    pytest.importorskip("sklearn")
    labels = np.arange(45) % 3
    features = np.eye(3)[labels] * 10 + np.random.RandomState(0).randn(45, 3)
    for name, points in embed.project(features.astype(np.float32), 0).items():
        assert points.shape == (45, 2)
        distances = np.linalg.norm(points[:, None] - points, axis=2) + 1e9 * np.eye(45)
        assert (labels[distances.argmin(axis=1)] == labels).mean() > 0.95, name


@pytest.mark.parametrize("missing", ["sklearn", "matplotlib"])
def test_a_projection_without_what_it_needs(main, shapes, monkeypatch, missing):
    monkeypatch.setattr(embed.importlib.util, "find_spec", lambda name: None if name == missing else name)
    with pytest.raises(UserError, match="pip install (scikit-learn|matplotlib)"):
        main(projection=True)


@pytest.mark.parametrize("settings, words", [
    (dict(encoder_weights=None), "encoder_weights is missing"),
    (dict(encoder="resnet34"), "resnet18.*resnet34"),
    (dict(encoder="resnet34", export="somewhere"), "resnet18.*resnet34"),
    (dict(dataset="folder", data_dir="nowhere"), "nowhere"),
])
def test_bad_input_is_one_clear_line(main, settings, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words) as error:
        main(**settings)
    assert "\n" not in str(error.value)


def test_no_images_of_a_split(main, tmp_path):
    write_images(tmp_path / "b", ["%d.png" % i for i in range(3)])
    with pytest.raises(UserError, match="0 images for --split test"):
        main(dataset="folder", data_dir=str(tmp_path / "b"), split="test")


@pytest.mark.parametrize("theirs", ["saved_model/saved_model.pb", "frozen.pb"])
def test_what_another_program_exported_is_left_alone(encoder, tmp_path, theirs):
    path = tmp_path / theirs
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"not ours")
    with pytest.raises(UserError, match="holds a %s that embed.py did not write" % theirs.split("/")[0]):
        embed.export(encoder, 32, str(tmp_path))
    assert path.read_bytes() == b"not ours" and [p for p in tmp_path.rglob("*") if p.is_file()] == [path]


def test_an_export_of_the_first_version_is_replaced(encoder, tmp_path):
    (tmp_path / "saved_model").mkdir()
    (tmp_path / "frozen.pb").write_text("old")
    (tmp_path / "result_export.json").write_text('{"config": {"encoder_weights": "f.h5"}}')
    embed.export(encoder, 32, str(tmp_path))
    assert (tmp_path / "saved_model" / "saved_model.pb").exists() and (tmp_path / "frozen.pb").read_bytes() != b"old"


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="there is no /proc, by which TensorFlow is given another name")
def test_a_folders_name_may_have_brackets_and_stars(encoder, tmp_path):
    folder = tmp_path / "exp[1] lr*?"
    embed.export(encoder, 32, str(folder))
    images = np.random.RandomState(0).randint(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    moved = tmp_path / "plain"
    folder.rename(moved)
    loaded = tf.saved_model.load(str(moved / "saved_model"))
    np.testing.assert_allclose(loaded.embed(images)["features"], evaluation.features(encoder, images), atol=1e-5)


def test_random_weights_are_those_of_the_seed(main, monkeypatch):
    monkeypatch.setattr(datasets, "SHAPES_TRAIN", 50)
    monkeypatch.setattr(datasets, "SHAPES_TEST", 20)
    first, again, other = (main(encoder_weights="none", seed=seed)["features"] for seed in (5, 5, 6))
    assert (first == again).all() and not np.allclose(first, other)
