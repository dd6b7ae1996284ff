"""Features, nearest neighbours and the classifier's training, against plain recomputations."""

import numpy as np
import pytest
import tensorflow as tf

import classifiers
import evaluation
import models
import neighbours
import npu_config
from commands import UserError
from devices import graph_check


@pytest.fixture(scope="module")
def device():
    return npu_config.open_device(npu_config.Options(device="cpu"))


@pytest.fixture(scope="module")
def encoder(device):
    """A narrow encoder whose BatchNorm is not the identity."""
    device.set_seed(3)
    network = models.ResNet18(1 / 16)
    random = np.random.RandomState(0)
    for weight in network.weights:
        if weight.shape.rank == 1:
            weight.assign_add(0.3 * np.abs(random.randn(*weight.shape)))
    return network


def some_images(n, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (n, 32, 32, 3)).astype(np.uint8)


def test_features_are_the_encoders_output_in_inference_mode(encoder):
    images = some_images(23)
    expected = encoder(tf.constant(images / 255.0, tf.float32), training=False).numpy()
    for batch_size in (5, 23, 500):  # the last batch: not full, exactly full, larger than the data
        found = evaluation.features(encoder, images, batch_size)
        assert found.dtype == np.float32 and found.shape == (23, 32)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    found = evaluation.features(encoder, images.astype(np.float32) / 255)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_features_are_traced_once_an_encoder(encoder):
    evaluation.features(encoder, some_images(12), 5)
    before = evaluation.inference.experimental_get_tracing_count()
    evaluation.features(encoder, some_images(17), 5)
    assert evaluation.inference.experimental_get_tracing_count() == before
    other = models.ResNet18(1 / 16)
    found = evaluation.features(other, some_images(12), 5)
    assert evaluation.inference.experimental_get_tracing_count() == before + 1
    assert np.abs(found - evaluation.features(encoder, some_images(12), 5)).max() > 1e-3


def test_features_do_not_change_the_encoder(encoder):
    before = encoder.get_weights()
    evaluation.features(encoder, some_images(6), 3)
    for weight, same in zip(encoder.get_weights(), before):
        np.testing.assert_array_equal(weight, same)


def test_features_that_are_not_finite_are_an_error():
    broken = models.ResNet18(1 / 16)
    broken.blocks[-1].norm2.beta.assign(np.full(32, np.inf, np.float32))
    with pytest.raises(UserError, match="not finite"):
        evaluation.features(broken, some_images(3))


# k-NN

def plain_knn(train, train_labels, test, test_labels, classes, k, temperature):
    """One test image at a time, as the definition reads."""
    correct = 0
    for x, label in zip(test, test_labels):
        cosines = [np.dot(x, y) / np.linalg.norm(x) / np.linalg.norm(y) for y in train]
        votes = np.zeros(classes)
        for i in np.argsort(cosines)[::-1][:k]:
            votes[train_labels[i]] += np.exp(cosines[i] / temperature)
        correct += votes.argmax() == label
    return correct / len(test)


def clusters(n, classes, dimensions, seed, spread=2.0):
    """Features about one centre a class, so far apart that some are told wrongly."""
    centres = np.random.RandomState(0).randn(classes, dimensions)
    random = np.random.RandomState(seed)
    labels = random.randint(0, classes, n)
    features = centres[labels] + spread * random.randn(n, dimensions)
    return features.astype(np.float32), labels.astype(np.int64)


@pytest.mark.parametrize("k, temperature", [(1, 0.1), (5, 0.1), (200, 0.1), (200, 10.0), (1000, 0.1)])
def test_knn_agrees_with_the_definition(monkeypatch, k, temperature):
    train, train_labels = clusters(300, 7, 16, 1)
    test, test_labels = clusters(90, 7, 16, 2)
    monkeypatch.setattr(neighbours, "TEST_BLOCK", 40)  # 40, 40 and 10
    monkeypatch.setattr(neighbours, "TRAIN_BLOCK", 130)  # 130, 130 and 40
    found = neighbours.knn_accuracy(train, train_labels, test, test_labels, 7, k, temperature)
    expected = plain_knn(train.astype(np.float64), train_labels, test.astype(np.float64), test_labels, 7,
                         min(k, 300), temperature)
    assert 0.2 < expected < 0.9  # neither chance nor certainty: there is something to agree on
    assert found == pytest.approx(expected, abs=1e-12)


def test_the_nearest_are_those_of_a_full_sort(monkeypatch):
    features, queries = np.random.RandomState(0).randn(300, 16), np.random.RandomState(1).randn(9, 16)
    features[200] = features[10]  # as near: the first one comes first
    cosines = neighbours.normalised(queries) @ neighbours.normalised(features).T
    expected = np.argsort(-cosines, axis=1, kind="stable")[:, :140]
    for block in (64, 130, 1000):
        monkeypatch.setattr(neighbours, "TRAIN_BLOCK", block)
        values, indices = neighbours.nearest_to(queries, features, 140)
        np.testing.assert_array_equal(indices, expected)
        np.testing.assert_allclose(values, np.take_along_axis(cosines, expected, axis=1), atol=1e-6)


def test_knn_agrees_with_scikit_learn():
    neighbors = pytest.importorskip("sklearn.neighbors")
    train, train_labels = clusters(1000, 5, 24, 1)
    test, test_labels = clusters(400, 5, 24, 2)
    model = neighbors.KNeighborsClassifier(50, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.1))
    expected = model.fit(train, train_labels).score(test, test_labels)
    found = neighbours.knn_accuracy(train, train_labels, test, test_labels, 5, k=50)
    assert found == pytest.approx(expected, abs=0.003)


def test_knn_of_equal_votes_takes_the_first_class_and_bears_zeros():
    train = np.array([[1, 0], [1, 0]], np.float32)
    assert neighbours.knn_accuracy(train, np.array([1, 0]), train[:1], np.array([0]), 2) == 1.0
    assert neighbours.knn_accuracy(0 * train, np.array([1, 1]), 0 * train, np.array([1, 0]), 2) == 0.5


def test_top_k_accuracy():
    logits = np.array([[3., 2, 1], [1, 2, 3], [2, 3, 1]])
    labels = np.array([0, 1, 2])
    found = [classifiers.top_k_accuracy(logits, labels, k) for k in (1, 2, 3)]
    assert found == pytest.approx([1 / 3, 2 / 3, 1])


# The classifier

def make_classifier(device, encoder, rate=0.1, **settings):
    device.set_seed(5)
    return classifiers.Classifier(device, encoder, 32, 4, lambda t: rate / (1.0 + tf.cast(t, tf.float32)),
                                  label_smoothing=0.1, **settings)


def labelled_batches(steps, batch=8):
    x = tf.random.stateless_uniform((steps, batch, 32, 32, 3), [1, 2])
    labels = tf.random.stateless_uniform((steps, batch), [3, 4], 0, 4, tf.int64)
    return tf.data.Dataset.from_tensor_slices((x, labels)), x, labels


def check_loop(classifier, batches):
    """Nothing is traced for it: the loop has run on the like."""
    loop = classifier.train_loop.get_concrete_function(iter(batches), tf.constant(1))
    report = graph_check.examine(loop)
    assert report.loop == "npu-loop" and not report.problems
    assert classifier.train_loop.experimental_get_tracing_count() == 1


def test_a_frozen_encoder_does_not_change_by_a_bit_and_an_npu_takes_the_loop_whole(device, encoder):
    before = encoder.get_weights()
    classifier = make_classifier(device, encoder)
    head = classifier.head.get_weights()
    classifier.train(labelled_batches(4)[0], 4, 4, 2, print)
    for weight, same in zip(encoder.get_weights(), before):
        np.testing.assert_array_equal(weight, same)
    for weight, other in zip(classifier.head.get_weights(), head):
        assert np.abs(weight - other).min() > 0
    check_loop(classifier, labelled_batches(4)[0])


def test_without_freezing_everything_changes_and_an_npu_takes_the_loop_whole(device, encoder):
    twin = models.ResNet18(1 / 16)
    twin.set_weights(encoder.get_weights())
    classifier = make_classifier(device, twin, frozen=False)
    classifier.train(labelled_batches(2)[0], 2, 2, 2, print)
    for weight, other, variable in zip(twin.get_weights(), encoder.get_weights(), twin.weights):
        assert np.abs(weight - other).max() > 0, variable.name  # moving statistics included
    check_loop(classifier, labelled_batches(2)[0])


def test_the_heads_training_is_adam_on_smoothed_cross_entropy(device, encoder):
    """Three steps against NumPy."""
    batches, x, labels = labelled_batches(3)
    classifier = make_classifier(device, encoder)
    weights = [w.astype(np.float64) for w in classifier.head.get_weights()]
    classifier.train(batches, 3, 3, 3, print)
    moments = [[np.zeros_like(w), np.zeros_like(w)] for w in weights]
    for t in range(3):
        h = encoder(x[t], training=False).numpy().astype(np.float64)
        logits = h @ weights[0] + weights[1]
        logarithm = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        targets = 0.9 * np.eye(4)[labels[t].numpy()] + 0.1 / 4
        loss = -(targets * logarithm).sum(axis=1).mean()
        difference = (np.exp(logarithm) - targets) / len(h)
        for w, moment, g in zip(weights, moments, (h.T @ difference, difference.sum(axis=0))):
            moment[0] = 0.9 * moment[0] + 0.1 * g
            moment[1] = 0.999 * moment[1] + 0.001 * g ** 2
            rate = 0.1 / (1 + t) * np.sqrt(1 - 0.999 ** (t + 1)) / (1 - 0.9 ** (t + 1))
            w -= rate * moment[0] / (np.sqrt(moment[1]) + 1e-7)
    assert classifier.figures()["loss"] == pytest.approx(loss, rel=1e-4)
    for found, expected in zip(classifier.head.get_weights(), weights):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    features = evaluation.features(encoder, x[0].numpy())
    np.testing.assert_allclose(classifier.logits(features), classifier.head(features).numpy(), atol=1e-4)


def test_a_loss_that_is_not_finite_stops_the_training(device, encoder):
    with pytest.raises(UserError, match="loss of step 2 is nan; try a lower"):
        make_classifier(device, encoder, rate=float("nan")).train(labelled_batches(2)[0], 2, 2, 2, print)


def test_statistics_of_images_are_there_inside_only(device):
    encoder = models.ResNet18(1 / 16)
    images = np.random.RandomState(0).randint(0, 256, (100, 16, 16, 3)).astype(np.uint8)
    stem = encoder.stem_conv(tf.constant(images / np.float32(255)))
    with evaluation.statistics_of(encoder, images, batches=3, batch_size=100):
        np.testing.assert_allclose(encoder.stem_norm.moving_mean, tf.reduce_mean(stem, (0, 1, 2)), rtol=0, atol=0.01)
        np.testing.assert_allclose(encoder.stem_norm.moving_variance, tf.math.reduce_variance(stem, (0, 1, 2)), rtol=0.05)
    assert (encoder.stem_norm.moving_mean.numpy() == 0).all() and (encoder.stem_norm.moving_variance.numpy() == 1).all()


def test_a_batch_is_no_larger_than_the_data(device):
    said = []
    assert evaluation.batch_size_for(8, 20, device, said.append) == 8 and not said
    assert evaluation.batch_size_for(32, 20, device, said.append) == 20
    assert "20 images" in said[0] and "instead of 32" in said[0]
