"""The pipelines: what a batch holds is a function of seed and step, whoever makes it, from wherever."""
import subprocess
import sys
import zlib

import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT

import augmentation
import datasets
import linearevaluation
from commands import UserError

N, BATCH = 23, 5  # four batches an epoch, and three images left over
STEPS = N // BATCH


@pytest.fixture
def numbered(monkeypatch):
    """Images that are their own numbers, and views that leave them alone."""
    def leave(images, *settings):
        return tf.cast(images, tf.float32)

    monkeypatch.setattr(augmentation, "augment_images_pretraining", leave)
    monkeypatch.setattr(augmentation, "augment_images_finetuning", leave)
    return np.tile(np.arange(N, dtype=np.uint8)[:, None, None, None], (1, 4, 4, 3))


@pytest.fixture(scope="module")
def shapes():
    return datasets.load("shapes", train_size=N, test_size=3)


def numbers(batches):
    return [x.numpy()[:, 0, 0, 0].astype(int).tolist() for x, _ in batches]


def test_an_epoch_is_a_fresh_permutation_without_the_remainder(numbered):
    epochs = np.reshape(numbers(datasets.pretraining_batches(numbered, BATCH, 1, 0, 50 * STEPS)), (50, -1))
    for epoch in epochs:
        assert len(set(epoch)) == STEPS * BATCH and set(epoch) <= set(range(N))
    assert len({tuple(epoch) for epoch in epochs}) == 50
    dropped = [set(range(N)) - set(epoch) for epoch in epochs]
    assert set.union(*dropped) == set(range(N))  # other images each time
    # 50 draws of a place uniform over 20 values have a mean of 9.5 and a standard deviation of 0.82.
    places = [np.mean([list(epoch).index(i) for epoch in epochs if i in epoch]) for i in range(N)]
    assert 6 < min(places) and max(places) < 13


def test_the_order_depends_on_the_seed(numbered):
    orders = {str(numbers(datasets.pretraining_batches(numbered, BATCH, seed, 0, STEPS)))
              for seed in (0, 1, -1, 2 ** 40, 2 ** 63 - 1)}
    assert len(orders) == 5


def test_the_order_is_the_same_on_every_tensorflow():
    assert datasets._order(7, tf.constant(3, tf.int64), 10).numpy().tolist() == ORDER_OF_SEED_7_EPOCH_3


def test_the_order_of_an_epoch_is_drawn_once(numbered, monkeypatch):
    drawn, order = [], datasets._order

    def counting(seed, epoch, n):
        with tf.control_dependencies([tf.py_function(lambda e: drawn.append(int(e)), [epoch], [])]):
            return order(seed, epoch, n)

    monkeypatch.setattr(datasets, "_order", counting)
    assert len(list(datasets.pretraining_batches(numbered, BATCH, 1, 2, 3 * STEPS))) == 3 * STEPS - 2
    assert drawn == [0, 1, 2]


def test_views_are_those_of_the_step_and_differ(shapes):
    batches = list(datasets.pretraining_batches(shapes.train_images, BATCH, 3, 0, 2 * STEPS))
    for step in (0, 1, STEPS + 2):
        epoch = tf.constant(step // STEPS, tf.int64)
        place = step % STEPS * BATCH
        images = shapes.train_images[datasets._order(3, epoch, N).numpy()[place:place + BATCH]]
        seeds = datasets._seeds(3, tf.constant(step, tf.int64))
        for view in range(2):
            expected = augmentation.augment_images_pretraining(images, seeds[view])
            np.testing.assert_allclose(batches[step][view], expected, atol=1e-5)
    x1, x2 = batches[0]
    assert np.abs(x1 - x2).mean() > 0.05
    assert 0 <= np.min(x1) and np.max(x1) <= 1


def test_more_views_leave_the_first_two_as_they_are(shapes):
    views = augmentation.Views(crop="area", solarise=(0.0, 1.0))
    two, = datasets.pretraining_batches(shapes.train_images, BATCH, 3, 2, 3, views=views)
    four, = datasets.pretraining_batches(shapes.train_images, BATCH, 3, 2, 3, views=views, number_of_views=4)
    assert len(two) == 2 and len(four) == 4
    images = shapes.train_images[datasets._order(3, tf.constant(0, tf.int64), N).numpy()[2 * BATCH:3 * BATCH]]
    seeds = datasets._seeds(3, tf.constant(2, tf.int64), 4)
    for view in range(4):
        if view < 2:
            np.testing.assert_array_equal(four[view], two[view])
        expected = augmentation.augment_images_pretraining(images, seeds[view], views=views, view=view)
        np.testing.assert_allclose(four[view], expected, atol=1e-4)
        for other in range(view):
            assert np.abs(four[view] - four[other]).mean() > 0.1


def test_no_two_views_share_a_seed():
    seeds = {tuple(pair) for seed in (0, 1) for step in range(500)
             for pair in datasets._seeds(seed, tf.constant(step, tf.int64)).numpy()}
    assert len(seeds) == 2 * 500 * 2
    pairs = np.concatenate([datasets._seeds(1, tf.constant(step, tf.int64), 4) for step in range(500)])
    assert len(set(map(tuple, pairs))) == 500 * 4


def test_seeds_of_views_have_not_changed():
    pairs = np.stack([datasets._seeds(5, tf.constant(step, tf.int64)) for step in range(50)])
    assert zlib.crc32(pairs.tobytes()) == SEEDS_OF_50_STEPS


def test_shapes_are_static(shapes):
    for batches in (datasets.pretraining_batches(shapes.train_images, BATCH, 0, 0, 1),
                    datasets.pretraining_batches(shapes.train_images, BATCH + 2, 0, 0, 1, 1, BATCH)):
        assert batches.element_spec == (tf.TensorSpec((BATCH, 32, 32, 3), tf.float32),) * 2
    batches = datasets.finetuning_batches(shapes.train_images, shapes.train_labels, BATCH, 0, 0, 1)
    view, label = batches.element_spec
    assert view.shape == (BATCH, 32, 32, 3) and label.shape == (BATCH,) and label.dtype == tf.int64


def test_a_run_begun_anywhere_has_the_same_bits(shapes):
    whole = list(datasets.pretraining_batches(shapes.train_images, BATCH, 5, 0, 3 * STEPS))
    for start in (1, STEPS - 1, STEPS, STEPS + 1, 3 * STEPS - 1, 3 * STEPS):
        rest = list(datasets.pretraining_batches(shapes.train_images, BATCH, 5, start, 3 * STEPS))
        assert len(rest) == len(whole) - start
        for expected, got in zip(whole[start:], rest):
            for a, b in zip(expected, got):
                np.testing.assert_array_equal(a, b)


def test_a_tensor_shares_the_images_memory(shapes):
    images = datasets._on_host(shapes.train_images)
    assert np.shares_memory(images.__array__(), shapes.train_images)
    assert "CPU:0" in images.device


@pytest.mark.parametrize("change", [lambda x: np.concatenate([x[:1], x])[1:],  # where TensorFlow cannot use it as it is
                                    lambda x: x.copy("F"),
                                    lambda x: np.frombuffer(x.tobytes(), np.uint8).reshape(x.shape),
                                    lambda x: np.repeat(x, 2, axis=0)[::2]])
def test_images_may_lie_anywhere_in_memory(shapes, change):
    elsewhere = change(shapes.train_images)
    np.testing.assert_array_equal(elsewhere, shapes.train_images)
    expected, = datasets.pretraining_batches(shapes.train_images, BATCH, 5, 0, 1)
    got, = datasets.pretraining_batches(elsewhere, BATCH, 5, 0, 1)
    np.testing.assert_array_equal(got, expected)


def test_images_are_in_memory_once():
    code = """if True:
        import resource
        import datasets
        from sources import image_files

        def peak_after_first_batch(images):
            images[:] = 7
            next(iter(datasets.pretraining_batches(images, 8, 0, 0, 2)))
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB

        few = peak_after_first_batch(image_files.empty(100, 32))
        print(peak_after_first_batch(image_files.empty(1 << 17, 32)) - few)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    assert int(done.stdout) < 1.3 * (384 << 10)


def test_workers_make_the_parts_of_one_batch(shapes):
    whole = list(datasets.pretraining_batches(shapes.train_images, 12, 5, 1, 3))
    parts = [list(datasets.pretraining_batches(shapes.train_images, 12, 5, 1, 3, first, 4))
             for first in (0, 4, 8)]
    for step in range(2):
        for view in range(2):
            joined = np.concatenate([part[step][view] for part in parts])
            np.testing.assert_allclose(joined, whole[step][view], atol=1e-5)


def test_labels_stay_with_their_images(numbered):
    labels = np.arange(N, dtype=np.int64) % 7
    seen = set()
    for view, label in datasets.finetuning_batches(numbered, labels, BATCH, 2, 1, 3 * STEPS):
        got = view.numpy()[:, 0, 0, 0].astype(int)
        np.testing.assert_array_equal(label, labels[got])
        seen |= set(got)
    assert seen == set(range(N))


def test_finetuning_crops_but_leaves_colours(shapes):
    grey = np.tile(np.full((1, 1, 1, 3), 51, np.uint8), (N, 32, 32, 1))
    for view, _ in datasets.finetuning_batches(grey, shapes.train_labels, BATCH, 2, 0, 2):
        np.testing.assert_allclose(view, 0.2, atol=1e-5)
    (view, _), = datasets.finetuning_batches(shapes.train_images, shapes.train_labels, N, 2, 0, 1)
    images = shapes.train_images[datasets._order(2, tf.constant(0, tf.int64), N).numpy()] / 255
    assert np.abs(view - images).mean() > 0.02


@pytest.mark.parametrize("batch_size", [1, 5, N, 100])
def test_evaluation_has_every_image_once_in_order(shapes, batch_size):
    batches = list(datasets.evaluation_batches(shapes.train_images, batch_size))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    expected = shapes.train_images.astype(np.float32) / np.float32(255)
    np.testing.assert_array_equal(np.concatenate(batches), expected)


@pytest.mark.skipif(not hasattr(tf.data.Options(), "autotune"), reason="TensorFlow 2.6's tuning does not delay an iterator's end")
def test_no_pipeline_has_a_thread_that_its_end_waits_for(shapes):
    images, labels = shapes.train_images, shapes.train_labels
    copies = [(np.zeros((8, 2), np.float32), np.zeros(8, np.int64))]
    for batches in (datasets.pretraining_batches(images, BATCH, 0, 0, 9), datasets.finetuning_batches(images, labels, BATCH, 0, 0, 9),
                    datasets.evaluation_batches(images, BATCH), linearevaluation.cached_batches(copies, 4, 0, 7, 0, 4)):
        assert batches.options().autotune.enabled is False


@pytest.mark.parametrize("batch_size", [0, -1, N + 1])
def test_a_batch_size_that_cannot_be_is_refused(shapes, batch_size):
    with pytest.raises(UserError, match=r"%d.*at most the number of training images, %d" % (batch_size, N)):
        datasets.pretraining_batches(shapes.train_images, batch_size, 0, 0, 1)
    with pytest.raises(UserError, match=str(batch_size)):
        datasets.finetuning_batches(shapes.train_images, shapes.train_labels, batch_size, 0, 0, 1)


def test_rows_outside_of_the_batch_are_refused(shapes):
    for first, rows in ((-1, 2), (4, 2), (5, 0), (0, 6)):
        with pytest.raises(ValueError, match="not within a batch of 5"):
            datasets.pretraining_batches(shapes.train_images, BATCH, 0, 0, 1, first, rows)


def test_finetuning_wants_labels_and_evaluation_a_batch(shapes):
    with pytest.raises(UserError, match="no labels"):
        datasets.finetuning_batches(shapes.train_images, None, BATCH, 0, 0, 1)
    with pytest.raises(UserError, match="batch size is 0"):
        datasets.evaluation_batches(shapes.train_images, 0)


def test_what_load_refuses(tmp_path):
    for message, arguments in (
            ("no data set 'imagenet'; choose one of cifar10, cifar100, shapes, folder", ("imagenet",)),
            ("--dataset folder needs --data_dir", ("folder",)),
            ("32 x 32 pixels, not --image_size 64", ("cifar10", str(tmp_path), 64)),
            ("0 images", ("shapes", None, 32, 0.1, 0, 0))):
        with pytest.raises(UserError, match=message):
            datasets.load(*arguments)


# Drawn once with TensorFlow 2.6.5: a run can change its TensorFlow in the middle and keep its data.
SEEDS_OF_50_STEPS = 0xbf9e6886
ORDER_OF_SEED_7_EPOCH_3 = [5, 3, 9, 2, 8, 4, 0, 1, 6, 7]
