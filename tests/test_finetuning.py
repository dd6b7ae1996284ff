"""Fine-tuning: which labels it uses, what it trains, what it reports, how it answers bad input."""
import json
import re
import signal

import numpy as np
import pytest
from command import run, start

import datasets
import finetuning
import models
import npu_config
import weights as weight_files
from commands import UserError


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    npu_config.open_device(npu_config.Options(device="cpu")).set_seed(1)
    path = str(tmp_path_factory.mktemp("weights") / "f_online_1.h5")
    weight_files.save_weights(models.ResNet18(1 / 16), path)
    return path


def two_colours(n, seed):
    """Images that a mean colour classifies: red or blue, with noise."""
    random = np.random.RandomState(seed)
    labels = random.randint(0, 2, n).astype(np.int64)
    images = random.randint(0, 100, (n, 32, 32, 3))
    images[np.arange(n), :, :, 2 * labels] += 120
    return images.astype(np.uint8), labels


@pytest.fixture
def main(monkeypatch, tmp_path, weights):
    """Runs the command in this process on red and blue images. Gives the content of its result file."""
    colours = datasets.Data(*two_colours(200, 0), *two_colours(60, 1), ("red", "blue"))

    def call(data=colours, **settings):
        defaults = dict(device="cpu", width_multiplier=1 / 16, dataset="shapes", encoder_weights=weights,
                        output_dir=str(tmp_path), num_epochs=1, batch_size=50)
        config = finetuning.Config(**dict(defaults, **settings))
        monkeypatch.setattr(datasets, "load", lambda *names, **sizes: data)
        finetuning.finetune(config)
        return json.loads((tmp_path / "result_finetuning.json").read_text())

    return call


def test_as_a_user_runs_it(weights, tmp_path):
    status, out, error = run("finetuning.py", "--dataset=shapes", "--device=cpu", "--width_multiplier=0.0625",
                             "--encoder_weights", weights, "--output_dir", tmp_path, "--max_steps=2",
                             "--label_fraction=0.01")
    assert status == 0, error
    assert "Training on 50 of 5000 labelled images of 10 classes." in out
    assert re.search(r"^\[Epoch 2/1000 Batch 1/1\] loss \d+\.\d{5}, \d+\.\d\d s$", out, re.MULTILINE)
    assert re.search(r"^circle +100 +\d\.\d{4} +(-|\d\.\d{4})$", out, re.MULTILINE)
    assert re.match(r"Test Accuracy Top-5: \d\.\d{4}$", out.splitlines()[-2])
    assert re.match(r"Test Accuracy: \d\.\d{4}$", out.splitlines()[-1])
    result = json.loads((tmp_path / "result_finetuning.json").read_text())
    assert result["labels"] == 50 and result["steps"] == 2 and len(result["per_class"]) == 10
    assert np.sum(result["confusion"]) == 1000
    assert np.trace(result["confusion"]) / 1000 == pytest.approx(result["test_accuracy"])
    assert result["test_accuracy"] <= result["test_accuracy_top5"] <= 1


def test_the_whole_network_learns_and_is_saved(main, tmp_path, weights, capsys):
    result = main(num_epochs=5, label_fraction=0.5, batch_size=24)
    assert result["steps"] == 20 and result["labels"] in (99, 100, 101)
    assert result["loss"] < 0.2  # ln 2 is chance
    before, after = models.ResNet18(1 / 16), models.ResNet18(1 / 16)
    weight_files.load_weights(before, weights)
    weight_files.load_weights(after, str(tmp_path / "f_finetuned.h5"))
    for weight, other, variable in zip(before.get_weights(), after.get_weights(), after.weights):
        assert np.abs(weight - other).max() > 0, variable.name  # moving statistics included
    assert (tmp_path / "c_finetuned.h5").stat().st_size > 0
    assert "Top-5" not in capsys.readouterr().out and "test_accuracy_top5" not in result


def test_freezing_trains_the_head_alone_and_it_learns(main, tmp_path):
    result = main(freeze=True, num_epochs=40, learning_rate=0.05)
    assert result["test_accuracy"] > 0.95
    assert not (tmp_path / "f_finetuned.h5").exists() and (tmp_path / "c_finetuned.h5").exists()
    assert [row["class"] for row in result["per_class"]] == ["red", "blue"]
    assert all(row["accuracy"] > 0.9 and row["precision"] > 0.9 for row in result["per_class"])


def test_few_labels_are_trained_on_for_enough_steps(main):
    result = main(freeze=True, label_fraction=0.05, num_epochs=None, max_steps=1)
    assert result["labels"] == 10 and result["epochs"] == 1000 and result["steps"] == 1
    result = main(freeze=True, encoder_weights="none", num_epochs=None, batch_size=2, max_steps=1)
    assert result["epochs"] == 50


def test_labels_are_chosen_evenly_nested_and_by_seed():
    labels = np.array([0] * 600 + [1] * 300 + [2] * 4)
    tenth = finetuning.choose(labels, 0.1, 0)
    assert np.bincount(labels[tenth]).tolist() == [60, 30, 1]  # at least one
    assert len(set(tenth)) == 91 and (np.diff(tenth) > 0).all()
    assert set(finetuning.choose(labels, 0.01, 0)) < set(tenth)
    assert set(finetuning.choose(labels, 0.1, 1)) != set(tenth)
    np.testing.assert_array_equal(finetuning.choose(labels, 0.1, 0), tenth)
    np.testing.assert_array_equal(finetuning.choose(labels, 1.0, 0), np.arange(904))
    with pytest.raises(UserError, match="label_fraction is 0"):
        finetuning.choose(labels, 0.0, 0)


def test_the_figures_of_each_class():
    labels, predicted = np.array([0, 0, 0, 1, 1]), np.array([0, 0, 1, 1, 0])
    counts = finetuning.confusion(labels, predicted, 4)
    np.testing.assert_array_equal(counts, [[2, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    rows = finetuning.per_class(counts, ("a", "long name", "c", "d"))
    assert rows[0] == {"class": "a", "images": 3, "accuracy": 2 / 3, "precision": 2 / 3}
    assert rows[1] == {"class": "long name", "images": 2, "accuracy": 0.5, "precision": 0.5}
    assert rows[2] == {"class": "c", "images": 0, "accuracy": None, "precision": None}
    lines = finetuning.table(rows).splitlines()
    assert lines[0].split() == ["images", "accuracy", "precision"]
    assert lines[2] == "long name       2    0.5000     0.5000"
    assert lines[3].split() == ["c", "0", "-", "-"] and len({len(line) for line in lines}) == 1


@pytest.mark.parametrize("classes", [3, 100])
def test_the_confusion_matrix_is_drawn(tmp_path, classes):
    pytest.importorskip("matplotlib")
    from matplotlib import image

    path = str(tmp_path / "confusion_matrix.png")
    finetuning.draw_confusion(np.eye(classes, dtype=int) * 7, ["class %d" % i for i in range(classes)], path)
    pixels = image.imread(path)
    assert pixels.shape[0] > 300 and pixels[..., :3].std() > 0.05
    assert len(list(tmp_path.iterdir())) == 1


def test_without_matplotlib_the_figures_are_kept(main, monkeypatch, caplog, tmp_path):
    find = finetuning.importlib.util.find_spec
    monkeypatch.setattr(finetuning.importlib.util, "find_spec",
                        lambda name, *rest: None if name == "matplotlib" else find(name, *rest))
    assert main(freeze=True, max_steps=1)["confusion"]
    assert not (tmp_path / "confusion_matrix.png").exists() and "pip install matplotlib" in caplog.text


@pytest.mark.parametrize("settings, words", [
    (dict(label_fraction=0.0), "label_fraction is 0"),
    (dict(encoder_weights=None), "encoder_weights is missing"),
    (dict(encoder_weights="nothing.h5"), "no weights file nothing.h5"),
    (dict(data=datasets.Data(two_colours(4, 0)[0], None, two_colours(4, 0)[0], None, ())), "no labels"),
])
def test_bad_input_is_one_clear_line(main, settings, words):
    with pytest.raises(UserError, match=words) as error:
        main(**settings)
    assert "\n" not in str(error.value)


def test_ctrl_c_ends_it_silently(tmp_path):
    process = start("finetuning.py", "--encoder_weights=none", "--dataset=shapes", "--device=cpu", "--width_multiplier=0.0625",
                    "--num_epochs=10000", "--output_dir=%s" % tmp_path)
    assert any(line.startswith("Training for ") for line in process.stdout)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=100)[1] == ""
    assert process.returncode == -signal.SIGINT and not list(tmp_path.iterdir())


def test_smoothed_labels_leave_at_least_their_entropy(main):
    """Of two classes, smoothed by a half: targets of 3/4 and 1/4."""
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    smoothed, plain = (main(num_epochs=40, freeze=True, learning_rate=0.1, label_smoothing=part)["loss"] for part in (0.5, 0))
    assert smoothed > entropy - 1e-6 and plain < entropy
