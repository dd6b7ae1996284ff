"""The encoders that come with the program: each loads by its name, gives the features that it gave when stored, and has a card."""
import json
import os
import zlib

import numpy as np
import pytest
from conftest import ROOT

import datasets
import embed
import evaluation
import models
import weights

FEATURES = json.load(open(os.path.join(ROOT, "tests", "shipped_features.json")))


def image():
    """One that is drawn, the same on every machine."""
    pixels = datasets.load("shapes", train_size=1, test_size=1).train_images
    assert zlib.crc32(pixels.tobytes()) == FEATURES["image_crc"]
    return pixels


def test_all_have_stored_features():
    assert set(FEATURES) - {"image_crc"} == set(weights.SHIPPED)


@pytest.mark.parametrize("name", sorted(weights.SHIPPED))
def test_the_features_are_those_that_were_stored(tmp_path, name, monkeypatch):
    monkeypatch.chdir(str(tmp_path))  # the name works from any folder
    _, encoder, _ = evaluation.start(evaluation.Config(encoder_weights=name, device="cpu", quiet=True))
    features = evaluation.features(encoder, image())[0]
    assert features.shape == (encoder.features,)
    np.testing.assert_allclose(features[:8], FEATURES[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", sorted(weights.SHIPPED))
def test_the_file_is_small_and_has_a_card_with_its_accuracies(name):
    path = os.path.join(ROOT, "weights", name)
    assert os.path.getsize(path + ".h5") < (3 if "narrow" in name else 25) * 1000000
    with open(path + ".md") as file:
        card = file.read()
    for told in ("## Data", "## Made by", "--seed", "## Accuracy", "## Licence", "## Good for", "python linearevaluation.py"):
        assert told in card, told


def test_a_command_takes_the_name(tmp_path):
    config = embed.Config(encoder_weights="cifar10-narrow", dataset="shapes", device="cpu", output_dir=str(tmp_path), split="test",
                          quiet=True)
    assert embed.embed(config)["features"].shape == (1000, 128)
    assert json.loads((tmp_path / "result_embed.json").read_text())["config"]["encoder_weights"] == "cifar10-narrow"


def test_a_file_of_ones_own_goes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(str(tmp_path))
    assert weights.shipped("cifar10-narrow")["encoder_weights"].endswith("cifar10-narrow.h5")
    (tmp_path / "cifar10-narrow").write_bytes(b"")
    assert weights.shipped("cifar10-narrow") == {} == weights.shipped("f_online_200.h5")


@pytest.mark.parametrize("name", sorted(weights.SHIPPED))
def test_it_is_a_part_of_a_keras_model_of_ones_own(name, tmp_path, monkeypatch):
    monkeypatch.chdir(str(tmp_path))
    encoder = weights.load_encoder(name)
    model = models.keras.Sequential([encoder, models.keras.layers.Dense(3)])
    x = np.float32(image()) / 255
    before = encoder(x, training=False).numpy()
    np.testing.assert_allclose(before[0, :8], FEATURES[name], rtol=1e-3, atol=1e-4)
    encoder.trainable = False
    model.compile("adam", models.keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(np.repeat(x, 8, axis=0), np.zeros(8, np.int32), epochs=1, verbose=0)
    np.testing.assert_array_equal(encoder(x, training=False), before)
