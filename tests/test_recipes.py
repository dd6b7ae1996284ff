"""Recipes of settings: what each sets, which flag wins, and that each trains, goes on, and fits an Ascend 910."""
import dataclasses
import json

import numpy as np
import pytest
from command import BLOCKS, encoder_of, pretrain

import datasets
import embed
import models
import neighbours
import npu_config
import pretraining
import recipes
import schedules
from augmentation import Views
from commands import UserError
from devices import graph_check

FEW = (640, 300)  # images for training and for testing
EVERYTHING = dict(crop="area", min_area=0.2, flip_probability=0.5, brightness=0.3, contrast=0.3, saturation=0.2, hue=0.05,
                  brightness_multiplies=True, grey_probability=0.1, solarize_probability=0.2, blur_probability=0.9,
                  blur_probability_second=0.2, color_order="random", num_views=3,
                  kernel_initializer="torch", target_start="online", normalise="cifar10", head_hidden=64, head_features=32,
                  optimizer="lars", learning_rate=0.1, lr_schedule="constant", warmup_epochs=1, momentum=0.8, weight_decay=1e-5,
                  trust_coefficient=0.02, target_momentum=0.97, target_momentum_schedule="cosine")


def test_every_recipe_sets_everything():
    names = {field.name for field in dataclasses.fields(recipes.Recipe)} - {"recipe"}
    assert all(set(settings) == names for settings in recipes.RECIPES.values()) and set(EVERYTHING) == names
    for field in dataclasses.fields(recipes.Recipe):
        assert field.default is None or field.name == "recipe"
    assert not [name for name, value in EVERYTHING.items() if value == recipes.MODELZOO[name]]


def test_the_default_is_as_it_was():
    config = pretraining.Config()
    assert config.views() == Views() and config.recipe == "modelzoo"
    assert (config.learning_rate, config.lr_schedule, config.weight_decay, config.momentum, config.target_momentum) == (
        1e-3, "cosine", 1e-4, 0.9, 0.99)


def test_what_is_given_wins():
    config = pretraining.Config(recipe="reference", weight_decay=0.5)
    assert (config.lr_schedule, config.weight_decay, config.learning_rate) == ("constant", 0.5, 1e-3)
    assert dataclasses.replace(config, batch_size=4).weight_decay == 0.5
    assert pretraining.Config(recipe="reference", lr_schedule="cosine").lr_schedule == "cosine"
    with pytest.raises(UserError, match="--recipe is 'imagenet'; give one of cifar, cifar-adam, modelzoo, paper, reference"):
        pretraining.Config(recipe="imagenet")


def test_flags_and_config_json(tmp_path):
    status, out, error = pretrain(tmp_path, "--recipe=reference", "--momentum=0.5", "--max_steps=1", forked=True, blocks=BLOCKS,
                                  images=FEW)
    assert status == 0, error
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["recipe"], config["lr_schedule"], config["weight_decay"], config["momentum"]) == ("reference", "constant", 0, 0.5)


def test_all_settings_at_once_train_and_go_on(tmp_path):
    """The same losses in one run and in two, with every setting other than by default."""
    flags = ["--%s=%s" % item for item in EVERYTHING.items()] + ["--num_epochs=2", "--image_size=16", "--view_size=12"]
    for folder, steps in (("one", (4,)), ("two", (1, 4))):
        for step in steps:
            status, out, error = pretrain(tmp_path / folder, *flags, "--max_steps=%d" % step, forked=True, blocks=BLOCKS,
                                          images=FEW)
            assert status == 0, error
    assert "Shape of z: (256, 32)" in out and "Resuming from step 1" in out
    one, two = ((tmp_path / folder / "losses.txt").read_text() for folder in ("one", "two"))
    assert one == two and one.count("\n") == 4 and all(0 < float(loss) < 4 for loss in one.split())


def test_sgd_says_so(tmp_path):
    status, out, error = pretrain(tmp_path, "--optimizer=sgd", "--learning_rate=0.08", "--max_steps=1", forked=True,
                                  blocks=BLOCKS, images=FEW)
    assert status == 0 and "Using SGD optimizer with learning rate 0.01." in out, error


def test_no_epoch_is_left():
    with pytest.raises(UserError, match="--warmup_epochs 3 leaves none of --num_epochs 3"):
        pretraining.consistent(pretraining.Config(warmup_epochs=3, num_epochs=3))


def test_the_targets_momentum_rises(monkeypatch):
    """Of one step: target = m * target + (1 - m) * online, with m as of the step."""
    config = pretraining.Config(device="cpu", width_multiplier=1 / 64, batch_size=4, target_momentum=0.5, learning_rate=0.0,
                                target_momentum_schedule="cosine")
    learner = pretraining.Byol(config, npu_config.open_device(config), total_steps=4, loop_size=1)
    kernel, target = learner.g_online.hidden.kernel, learner.g_target.hidden.kernel
    for step, momentum in ((0, 0.5), (2, 0.75), (4, 1.0)):
        learner.step.assign(step)
        before = target.numpy()
        learner._update_target()
        np.testing.assert_allclose(target.numpy(), momentum * before + (1 - momentum) * kernel.numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("settings", [{"recipe": name} for name in sorted(recipes.RECIPES)] + [dict(EVERYTHING, view_size=24)])
def test_an_ascend_takes_the_loop_whole(settings, monkeypatch):
    monkeypatch.setitem(models.ENCODERS, "resnet18", encoder_of(BLOCKS))
    config = pretraining.Config(width_multiplier=1 / 16, batch_size=8, **settings)
    report = graph_check.examine(pretraining.trace(config))
    assert report.loop == "npu-loop" and not report.problems


def test_the_encoder_that_was_trained_normalised_is_evaluated_so(tmp_path, monkeypatch):
    """The weights file tells it: features as of the encoder that the run had, and k-NN as the run told it."""
    status, out, error = pretrain(tmp_path, "--normalise=cifar10", "--num_views=3", "--num_epochs=1", "--knn_every=1", forked=True,
                                  blocks=BLOCKS, images=FEW)
    assert status == 0, error
    knn = json.loads((tmp_path / "metrics.json").read_text())["knn"][-1]["accuracy"]
    monkeypatch.setitem(models.ENCODERS, "resnet18", encoder_of(BLOCKS))
    monkeypatch.setattr(datasets, "SHAPES_TRAIN", FEW[0])
    monkeypatch.setattr(datasets, "SHAPES_TEST", FEW[1])
    config = embed.Config(encoder_weights=str(tmp_path / "f_online_1.h5"), width_multiplier=1 / 16, dataset="shapes", device="cpu",
                          output_dir=str(tmp_path), quiet=True)
    content = embed.embed(config)
    train, test = ({name: content[name][content["split"] == part] for name in ("features", "labels")} for part in ("train", "test"))
    accuracy = neighbours.knn_accuracy(train["features"], train["labels"], test["features"], test["labels"],
                                       len(content["class_names"]))
    assert accuracy == pytest.approx(knn, abs=0.002)


def test_the_papers_constants():
    """Of arXiv:2006.07733; the rate of 0.2 for a batch of 256 is 3.2 for the paper's 4,096."""
    config = pretraining.Config(recipe="paper", batch_size=4096)
    assert schedules.scaled_learning_rate(config.learning_rate, config.batch_size) == pytest.approx(0.2 * 4096 / 256)
    assert (config.optimizer, config.momentum, config.weight_decay, config.trust_coefficient) == ("lars", 0.9, 1.5e-6, 1e-3)
    assert (config.lr_schedule, config.warmup_epochs, config.target_momentum, config.target_momentum_schedule) == (
        "cosine", 10, 0.996, "cosine")
    assert (config.head_hidden, config.head_features, config.normalise, config.num_views) == (4096, 256, "imagenet", 2)
    assert config.views() == Views(crop="area", min_area=0.08, flip=0.5, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1,
                                   distort=0.8, grey=0.2, solarise=(0.0, 0.2), blur=(1.0, 0.1), colour_order="random")
