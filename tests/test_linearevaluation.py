"""The linear evaluation: its protocol, whole and cached, what it prints and leaves, what it answers to bad input."""
import functools
import json
import re

import numpy as np
import pytest
from command import run

import classifiers
import datasets
import evaluation
import linearevaluation
import models
import npu_config
import schedules
import weights as weight_files
from commands import UserError


@pytest.fixture(scope="module")
def device():
    return npu_config.open_device(npu_config.Options(device="cpu"))


@pytest.fixture(scope="module")
def weights(device, tmp_path_factory):
    device.set_seed(1)
    path = str(tmp_path_factory.mktemp("weights") / "f_online_1.h5")
    weight_files.save_weights(models.ResNet18(1 / 16), path)
    return path


@pytest.fixture
def main(monkeypatch, tmp_path, weights):
    """Runs the command in this process on a few shapes. Gives the content of its result file."""
    shapes = datasets.load("shapes", train_size=150, test_size=70)

    def call(data=shapes, **settings):
        defaults = dict(device="cpu", width_multiplier=1 / 16, dataset="shapes", encoder_weights=weights,
                        output_dir=str(tmp_path), num_epochs=2, batch_size=50)
        config = linearevaluation.Config(**dict(defaults, **settings))
        if data is not None:
            monkeypatch.setattr(datasets, "load", lambda *names, **sizes: data)
        linearevaluation.evaluate(config)
        return json.loads((tmp_path / "result_linearevaluation.json").read_text())

    return call


def test_as_a_user_runs_it(weights, tmp_path):
    status, out, error = run("linearevaluation.py", "--dataset=shapes", "--device=cpu",
                             "--width_multiplier=0.0625", "--encoder_weights", weights,
                             "--output_dir", tmp_path, "--max_steps=3", "--knn")
    assert status == 0, error
    assert re.search(r"^\[Epoch 1/50 Batch 3/9\] loss \d\.\d{5}, \d+\.\d\d s$", out, re.MULTILINE)
    assert re.match(r"k-NN Accuracy: 0\.\d{4}$", out.splitlines()[-2])
    assert re.match(r"Test Accuracy: 0\.\d{4}$", out.splitlines()[-1])
    result = json.loads((tmp_path / "result_linearevaluation.json").read_text())
    assert "Test Accuracy: %.4f" % result["test_accuracy"] == out.splitlines()[-1]
    assert result["steps"] == 3 and result["train_images"] == 5000 and result["test_images"] == 1000
    assert result["config"]["encoder_weights"] == weights and "tensorflow" in result["versions"]
    assert result["config"]["label_smoothing"] == 0.1 and result["config"]["num_epochs"] == 50


def test_the_protocol_trains_the_head_on_crops_and_leaves_the_encoder(main, monkeypatch, capsys):
    """Fifteen steps of the real loop, and the accuracy worked out anew from what it leaves."""
    made = []
    classifier = classifiers.Classifier
    monkeypatch.setattr(classifiers, "Classifier", lambda *a, **k: made.append(classifier(*a, **k)) or made[0])
    result = main(num_epochs=5)
    assert result["steps"] == 15
    encoder, head = made[0].encoder, made[0].head
    fresh = models.ResNet18(1 / 16)
    weight_files.load_weights(fresh, result["config"]["encoder_weights"])
    for weight, same in zip(encoder.get_weights(), fresh.get_weights()):
        np.testing.assert_array_equal(weight, same)
    data = datasets.load("shapes")
    predicted = head(fresh(data.test_images / np.float32(255), training=False)).numpy().argmax(axis=1)
    assert result["test_accuracy"] == pytest.approx((predicted == data.test_labels).mean(), abs=1.01 / 70)
    assert made[0].optimizer.iterations.numpy() == 15
    assert "k-NN" not in capsys.readouterr().out and "knn" not in result


def test_the_rate_is_the_references():
    config = linearevaluation.Config()
    assert (config.num_epochs, config.batch_size, config.learning_rate) == (50, 512, 0.05)
    assert (linearevaluation.POWER, config.learning_rate * linearevaluation.LAST_RATE) == (2.0, 5e-4)


def test_cached_features_of_as_many_copies_as_epochs_are_the_full_protocol(main):
    """One epoch: the very batches of the full protocol, in another order."""
    full = main(num_epochs=1, batch_size=150, learning_rate=0.01)
    cached = main(num_epochs=1, batch_size=150, learning_rate=0.01, cached_features=True, augmented_copies=1)
    assert cached["loss"] == pytest.approx(full["loss"], rel=1e-4)
    assert cached["test_accuracy"] == pytest.approx(full["test_accuracy"], abs=1.01 / 70)


def test_augmented_copies_are_features_of_the_protocols_epochs(device):
    device.set_seed(2)
    encoder, data = models.ResNet18(1 / 16), datasets.load("shapes", train_size=50, test_size=10)
    copies = linearevaluation.augmented_features(encoder, data, 2, 20, 7, device, print)
    batches = datasets.finetuning_batches(data.train_images, data.train_labels, 20, 7, 0, 4)
    expected = [(encoder(x, training=False).numpy(), labels.numpy()) for x, labels in batches]
    for copy, epoch in zip(copies, (expected[:2], expected[2:])):
        np.testing.assert_allclose(copy[0], np.concatenate([x for x, _ in epoch]), atol=1e-5)
        np.testing.assert_array_equal(copy[1], np.concatenate([labels for _, labels in epoch]))


def test_cached_batches_go_through_the_copies_in_turn():
    copies = [(np.arange(10.0).reshape(10, 1) + 100 * c, np.arange(10) + 100 * c) for c in range(2)]
    batches = [(x.numpy(), y.numpy()) for x, y in linearevaluation.cached_batches(copies, 4, 0, 7, 0, 4)]
    assert len(batches) == 7 and all(x.shape == (4, 1) and (x[:, 0] == y).all() for x, y in batches)
    epochs = [sorted(np.concatenate([y for _, y in batches[e:e + 2]])) for e in (0, 2, 4)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)  # no image twice
    assert [{y // 100 for y in epoch} for epoch in epochs] == [{0}, {1}, {0}]
    assert epochs[0] != epochs[2]
    part = [y.numpy() for _, y in linearevaluation.cached_batches(copies, 4, 0, 7, 1, 2)]
    assert all((rows == y[1:3]).all() for rows, (_, y) in zip(part, batches))


def test_the_head_is_as_good_as_logistic_regression(device):
    """On features that neither can tell apart wholly."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    random = np.random.RandomState(0)
    centres = random.randn(5, 20)
    labels = random.randint(0, 5, 4000)
    features = (centres[labels] + 2 * random.randn(4000, 20)).astype(np.float32)
    batches = linearevaluation.cached_batches([(features[:2000], labels[:2000])], 100, 0, 400, 0, 100)
    rate = functools.partial(schedules.polynomial, base=0.05, total_steps=400, end=5e-4, power=2.0)
    classifier = classifiers.Classifier(device, None, 20, 5, rate, label_smoothing=0.0)
    classifier.train(batches, 400, 400, 20, print)
    found = classifiers.top_k_accuracy(classifier.logits(features[2000:]), labels[2000:], 1)
    model = linear_model.LogisticRegression(max_iter=2000).fit(features[:2000], labels[:2000])
    expected = model.score(features[2000:], labels[2000:])
    assert 0.5 < expected < 0.95
    assert found == pytest.approx(expected, abs=0.02)  # the standard error of 2,000 images is 0.01


def test_batches_are_no_larger_than_the_data_and_quiet_says_no_more_than_the_result(main, capsys):
    main(num_epochs=1, batch_size=512, cached_features=True)
    assert "150 images to train on, so a batch has 150 instead of 512" in capsys.readouterr().out
    main(num_epochs=1, batch_size=512, cached_features=True, quiet=True)
    assert re.match(r"Test Accuracy: 0\.\d{4}\n$", capsys.readouterr().out)


def test_random_weights_are_a_baseline(main):
    assert main(encoder_weights="none", cached_features=True)["test_accuracy"] >= 0


def few(**changes):
    return datasets.load("shapes", train_size=20, test_size=10)._replace(**changes)


@pytest.mark.parametrize("settings, words", [
    (dict(encoder_weights=None), "encoder_weights.*none"),
    (dict(encoder_weights="nothing.h5"), "no weights file nothing.h5"),
    (dict(encoder_weights=__file__), "test_linearevaluation.py is not a whole Keras weights file"),
    (dict(encoder="resnet34"), "resnet18 with.* 0.0625.*resnet34 with width_multiplier 0.0625"),
    (dict(width_multiplier=0.125), "width_multiplier 0.0625.*width_multiplier 0.125"),
    (dict(data=few(train_labels=None, test_labels=None, class_names=()), dataset="folder"), "no labels.*folder for each class"),
    (dict(data=few(train_labels=None, test_labels=None, class_names=())), "shapes has no labels; choose one that has"),
    (dict(data=few(class_names=("cat",))), "1 class"),
    (dict(data=few(test_images=np.zeros((0, 32, 32, 3), np.uint8))), "no test images.*test_fraction"),
    (dict(data=None, dataset="folder", data_dir="nowhere"), "nowhere"),
    (dict(learning_rate=1e38, cached_features=True), "loss of step"),
])
def test_bad_input_is_one_clear_line(main, settings, words):
    with pytest.raises(UserError, match=words) as error:
        main(**settings)
    assert "\n" not in str(error.value)


def test_the_part_of_a_folder_that_is_kept_for_testing(tmp_path, tiny_images):
    config = linearevaluation.Config(dataset="folder", data_dir=str(tiny_images / "train"), image_size=8, test_fraction=0.25,
                                     output_dir=str(tmp_path))
    data = evaluation.load_data(config)
    assert (len(data.train_images), len(data.test_images)) == (48, 16)
