"""Images that are kept larger than what the networks see: views are cut from all of them, evaluation takes their middle.

And views of a size of their own, which evaluation does not know.
"""
import json
import os

import numpy as np
import pytest
import tensorflow as tf
from command import BLOCKS
from test_augmentation import distort_as_drawn

import augmentation
import datasets
import embed
import evaluation
import finetuning
import linearevaluation
import models
import npu_config
import pretraining
import progress
import report
import weights
from commands import UserError
from sources import image_files


def some_images(number, size):
    return np.random.RandomState(0).randint(0, 256, (number, size, size, 3)).astype(np.uint8)


def crops_of(images, seed, size):
    """The drawn crops, each cut out, flipped and resized by tf.image."""
    views = []
    for image, top, left, height, width, flip in zip(images, *augmentation.sample_crops(len(images), seed, images.shape[1])):
        crop = tf.image.convert_image_dtype(tf.image.crop_to_bounding_box(image, top, left, height, width), tf.float32)
        views.append(tf.image.resize(crop[:, ::-1] if flip else crop, (size, size)))
    return np.stack(views)


@pytest.mark.parametrize("size", [17, 32])
def test_batches_are_views_of_whole_larger_images(size):
    images, labels = some_images(8, 40), np.arange(8)
    order = datasets._order(5, tf.constant(0, tf.int64), 8).numpy()
    seeds = datasets._seeds(5, tf.constant(0, tf.int64))
    settings = pretraining.Config(image_size=size, store_size=40).views()
    views, = datasets.pretraining_batches(images, 8, 5, 0, 1, views=settings)
    for view, seed in zip(views, seeds):
        expected = distort_as_drawn(crops_of(images[order], seed, size), augmentation.sample_colors(8, seed))
        np.testing.assert_allclose(view, expected, atol=1e-4)
    (view, found), = datasets.finetuning_batches(images, labels, 8, 5, 0, 1, size=size)
    np.testing.assert_array_equal(found, order)
    np.testing.assert_allclose(view, crops_of(images[order], seeds[0], size), atol=1e-5)


@pytest.mark.parametrize("size, kept", [(24, None), (40, None), (24, 48)])
def test_views_have_a_size_of_their_own(size, kept):
    images = some_images(4, kept or 32)
    config = pretraining.consistent(pretraining.Config(view_size=size, store_size=kept, num_views=3))
    views, = datasets.pretraining_batches(images, 4, 5, 0, 1, views=config.views(), number_of_views=config.num_views)
    seeds, order = datasets._seeds(5, tf.constant(0, tf.int64), 3), datasets._order(5, tf.constant(0, tf.int64), 4).numpy()
    assert len(views) == 3
    for view, seed in zip(views, seeds):
        expected = distort_as_drawn(crops_of(images[order], seed, size), augmentation.sample_colors(4, seed))
        np.testing.assert_allclose(view, expected, atol=1e-4)


def test_the_same_size_changes_nothing():
    for same in ({"store_size": 32}, {"view_size": 32}):
        assert pretraining.consistent(pretraining.Config(**same)) == pretraining.consistent(pretraining.Config())
    assert pretraining.consistent(pretraining.Config(store_size=33)).store_size == 33
    images = some_images(16, 32)
    one, other = (augmentation.augment_images_finetuning(images, (1, 2), size=size).numpy() for size in (None, 32))
    assert one.tobytes() == other.tobytes()
    assert evaluation.middle(images, 32) is images and evaluation.middle(images, None) is images


@pytest.mark.parametrize("side", [33, 34, 47])
def test_features_of_larger_images_are_those_of_their_middle(side):
    npu_config.open_device(npu_config.Options(device="cpu")).set_seed(1)
    encoder, images, first = models.ResNet(BLOCKS, 1 / 16), some_images(7, side), (side - 32) // 2
    cut = images[:, first:first + 32, first:first + 32]
    assert cut.shape == (7, 32, 32, 3)
    expected = evaluation.features(encoder, cut, 3)
    np.testing.assert_array_equal(evaluation.features(encoder, images, 3, size=32), expected)
    assert np.abs(evaluation.features(encoder, images, 3) - expected).max() > 1e-4
    with evaluation.statistics_of(encoder, cut, batches=2, batch_size=7):
        expected = encoder.stem_norm.moving_mean.numpy()
    with evaluation.statistics_of(encoder, images, batches=2, batch_size=7, size=32):
        np.testing.assert_array_equal(encoder.stem_norm.moving_mean.numpy(), expected)
    with pytest.raises(ValueError, match="size is 48, but the images have %d" % side):
        evaluation.features(encoder, images, size=48)


def test_a_sheet_shows_whole_images_at_the_size_of_the_views():
    images = some_images(3, 40)
    sheet = progress.sheet_of_views(images, 0, views=augmentation.Views(size=32))
    assert sheet.shape == (320, 3 * 104 + 8, 3)
    np.testing.assert_array_equal(sheet[8:104:3, 8:104:3], image_files.square(images[0], 32))


def test_sizes_that_cannot_be_are_one_line():
    for load in (lambda: pretraining.train(pretraining.Config(dataset="shapes", store_size=16)),
                 lambda: evaluation.load_data(evaluation.Config(dataset="shapes", store_size=16)),
                 lambda: datasets.prepare(datasets.Config(data_dir="/nowhere", store_size=16))):
        with pytest.raises(UserError, match="^--store_size is 16; give at least --image_size, 32.$"):
            load()
    for name in ("cifar10", "cifar100"):
        with pytest.raises(UserError, match="^The images of %s have 32 x 32 pixels; --store_size 40 is for folders, shapes" % name):
            datasets.load(name, store_size=40)
    assert datasets.load("shapes", store_size=40, train_size=3, test_size=2).train_images.shape == (3, 40, 40, 3)


def test_all_commands_share_the_stored_images_and_show_the_networks_the_small_ones(tiny_images, tmp_path, monkeypatch):
    seen, learned = set(), set()

    class Encoder(models.ResNet):
        def call(self, x, training=False):
            (learned if training else seen).add(x.shape[1])
            return super().call(x, training)

    monkeypatch.setitem(models.ENCODERS, "resnet18", lambda width, **more: Encoder(BLOCKS, width, **more))
    monkeypatch.setattr(report, "_encoder", report._encoder.__wrapped__)  # which keeps those that it has made
    run, cache = str(tmp_path / "run"), str(tmp_path / "cache")
    data = dict(data_dir=str(tiny_images), image_size=8, store_size=12, cache_dir=cache, quiet=True)
    settings = dict(data, dataset="folder", width_multiplier=1 / 16, device="cpu")
    datasets.prepare(datasets.Config(**data))
    stores = os.listdir(cache)
    assert len(stores) == 1 and "-12-" in stores[0]
    config = pretraining.Config(batch_size=16, num_epochs=2, max_steps=4, knn_every=1, view_size=10, output_dir=run, **settings)
    result = pretraining.train(config)
    assert seen == {8} and learned == {10, 8} and len(result.history.knn) == 2  # 8: the statistics for random weights
    learned.clear()
    with open(os.path.join(run, "config.json")) as file:
        kept = json.load(file)
    assert (kept["store_size"], kept["view_size"]) == (12, 10)
    for name, then, other in (("store_size", 12, None), ("store_size", 12, 16), ("view_size", 10, None), ("view_size", 10, 12)):
        changed = dict(vars(config), **{"cache_dir": str(tmp_path / "other"), name: other})
        with pytest.raises(UserError, match="%s was %s, is %s" % (name, then, other)):
            pretraining.train(pretraining.Config(**changed))
    assert pretraining.train(pretraining.Config(**dict(vars(config), max_steps=5))).step == 5  # goes on
    assert learned == {10}
    learned.clear()
    assert report.neighbours(report.Run(run), 20).ndim == 3

    settings.update(encoder_weights=result.weights, output_dir=run)
    found = embed.embed(embed.Config(split="test", **settings))["features"]
    encoder = models.ResNet(BLOCKS, 1 / 16)
    weights.load_weights(encoder, result.weights)
    larger = datasets.load("folder", str(tiny_images), image_size=12, cache_dir=cache).test_images[:4]
    np.testing.assert_allclose(found, evaluation.features(encoder, larger[:, 2:10, 2:10]), atol=1e-5)
    for more in (dict(knn=True), dict(cached_features=True), dict(cached_features=True, augmented_copies=1)):
        linearevaluation.evaluate(linearevaluation.Config(batch_size=16, max_steps=2, **dict(settings, **more)))
    finetuning.finetune(finetuning.Config(batch_size=16, max_steps=1, **settings))
    assert seen == learned == {8} and os.listdir(cache) == stores
