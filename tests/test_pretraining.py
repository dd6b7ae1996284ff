"""The main command as a user runs it: what it prints, what it leaves, and how it answers bad input."""
import json
import os
import re
import signal
import types

import numpy as np
import pytest
import tensorflow as tf
from command import TINY, completed, fork, pretrain, run, start, wait_for

import commands
import datasets
import evaluation
import health
import models
import npu_config
import pretraining
import progress
import runfiles
import runs
import weights

LINE = re.compile(r"^\[Epoch (\d+)/(\d+) Batch (\d+)/(\d+)\] Loss=(\d\.\d{5})\. Time=\d")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two epochs of 78 batches, ended at step 100."""
    folder = tmp_path_factory.mktemp("run")
    status, out, error = pretrain(folder, "--num_epochs=2", "--max_steps=100", "--save_every=1", "--log_every=20", "--image_size=16")
    assert status == 0, error
    return folder, out, error


def test_it_prints_what_scripts_parse(finished):
    _, out, _ = finished
    lines = out.splitlines()
    expected = ["Initializing online networks...", "Shape of h: (256, 32)", "Shape of z: (256, 128)", "Shape of p: (256, 128)",
                "Initializing target networks...", "Shape of h: (256, 32)", "Shape of z: (256, 128)"]
    start = lines.index(expected[0])
    assert lines[start:start + 7] == expected
    assert re.match(r"The encoders have \d+ trainable parameters each\.$", lines[start + 7])
    assert lines[start + 8] == "Using Adam optimizer with learning rate 0.000125."
    found = [LINE.match(line).groups()[:4] for line in lines if LINE.match(line)]
    assert found == [(str(e), "2", str(b), "78") for e, b in ((1, 20), (1, 40), (1, 60), (2, 20))]
    assert lines.count("Weights of f saved.") == 2


def test_it_leaves_losses_settings_weights_and_figures(finished):
    folder, out, _ = finished
    losses = [float(line) for line in (folder / "losses.txt").read_text().splitlines()]
    assert len(losses) == 100 and all(0 < loss < 4 for loss in losses)
    printed = [float(LINE.match(line).group(5)) for line in out.splitlines() if LINE.match(line)]
    assert printed == pytest.approx([losses[i] for i in (19, 39, 59, 97)], abs=1e-5)
    config = json.loads((folder / "config.json").read_text())
    assert config["batch_size"] == 64 and config["lr_schedule"] == "cosine" and config["weight_decay"] == 1e-4
    result = json.loads((folder / "result.json").read_text())
    assert result["steps"] == 100 and result["loss"] == pytest.approx(losses[-1]) and "tensorflow" in result["versions"]
    assert sorted(path.name for path in folder.glob("*.h5")) == ["f_online_1.h5", "f_online_step_100.h5"]
    assert not [name for name in folder.iterdir() if name.name.startswith(".tmp")]


def test_nothing_but_warnings_reaches_stderr(finished):
    _, _, error = finished
    assert "Traceback" not in error and "oneDNN" not in error and "cuda" not in error.lower()


@pytest.mark.parametrize("flags, words", [
    (["--encoder=vgg"], ["encoder", "vgg", "resnet18"]),
    (["--dataset=mnist"], ["dataset", "mnist", "cifar10"]),
    (["--batch_size=0"], ["batch_size", "0"]),
    (["--batch_size=-3"], ["batch_size", "-3"]),
    (["--batch_size=100000"], ["100000", "5000"]),
    (["--num_epochs=0"], ["num_epochs", "0"]),
    (["--learning_rate=nan"], ["learning_rate", "nan"]),
    (["--encodr=resnet18"], ["encodr", "encoder"]),
    (["resnet18"], ["resnet18", "--help"]),
    (["--log_every=10", "--iterations_per_loop=3"], ["log_every", "iterations_per_loop"]),
    (["--iterations_per_loop=10", "--save_checkpoints_steps=25"], ["save_checkpoints_steps", "25"]),
    (["--dataset=cifar10", "--data_dir=/nowhere"], ["/nowhere"]),
    (["--output_dir=/dev/null/x"], ["/dev/null"]),
    (["--width_multiplier=0.001"], ["width_multiplier"]),
    (["--encoder_weights=nowhere.h5"], ["nowhere.h5", "cifar10-narrow"]),
    (["--encoder_weights=cifar10-narrow"], ["width_multiplier 0.25", "width_multiplier 0.0625"]),  # which was given
    (["--width_multiplier=1000"], ["width_multiplier", "1000"]),
    (["--width_multiplier=1e30"], ["width_multiplier"]),
    (["--image_size=100000"], ["image_size", "100000"]),
    (["--num_epochs=99999999999999999999"], ["num_epochs", "99999999999999999999"]),
    (["--max_steps=9223372036854775808"], ["max_steps", "9223372036854775808"]),
    (["--precision_mode=force_fp16"], ["force_fp16"]),
    (["--device=npu"], ["npu_device", "2.6.5", "set_env.sh"]),
    (["--loss_scale=big"], ["loss_scale", "big"]),
])
def test_bad_input_is_one_clear_line(tmp_path, flags, words):
    status, out, error = pretrain(tmp_path / "out", *flags, forked=True)
    assert status not in (0, None)
    lines = [line for line in error.splitlines() if line.strip()]
    assert len(lines) == 1 and "Traceback" not in error, error
    assert all(word in lines[0] for word in words), lines[0]


def test_help_names_every_flag_with_its_origin():
    status, out, _ = run("pretraining.py", "--help")
    assert "python pretraining.py --encoder resnet18 --num_epochs 200 --batch_size 512" in out
    for name in ("encoder", "target_momentum", "max_steps", "data_path", "model_dir", "log_step_count_steps", "precision_mode"):
        assert re.search(r"--(\[no\])?%s\b" % name, out), name


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="tells by Linux's /proc when TensorFlow is being imported")
def test_ctrl_c_during_the_import_says_nothing():
    process = start("pretraining.py")

    def importing():
        with open("/proc/%d/maps" % process.pid) as file:
            return "libtensorflow_framework" in file.read()

    assert wait_for(importing, process)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "") and process.returncode == -signal.SIGINT


def test_a_signal_cuts_an_evaluation_short_and_the_resumed_run_makes_up_for_it(monkeypatch):
    images, labels = np.zeros((64, 32, 32, 3), np.uint8), np.zeros(64, np.int64)
    data = datasets.Data(images, labels, images, labels, ("none",))
    config = pretraining.Config(device="cpu", batch_size=32, num_epochs=2, knn_every=1)
    device = npu_config.open_device(config)
    device.worker_id = 1  # not the chief: nothing is written
    run = runs.Run(config, device, data, progress.Progress(shown=False))
    run.learner, run.step = types.SimpleNamespace(f_online=None), 2
    batches = []

    def signalled(encoder, images):
        batches.append(len(images))
        os.kill(os.getpid(), signal.SIGTERM)
        return tf.zeros([len(images), 4])

    with monkeypatch.context() as patch, commands.signals_noted() as run.signals:
        patch.setattr(evaluation, "inference", signalled)
        run.data = data._replace(train_images=np.zeros((3000, 32, 32, 3), np.uint8))
        run._evaluate_knn()
        assert batches == [500]  # the other five are left out
        run._evaluate_knn()  # nor is it begun after a signal
    assert batches == [500] and run.signals.number == signal.SIGTERM and not run.history.knn

    run.signals, run.data = commands.Signals(), data
    monkeypatch.setattr(evaluation, "knn_of_encoder", lambda *_: 0.5)
    for run.step in (2, 2, 3):  # an epoch's end, again, and in mid-epoch
        run._evaluate_knn()
    assert run.history.knn == [{"epoch": 1, "step": 2, "accuracy": 0.5}]


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The weights of an encoder that another run has left, and where they are."""
    encoder, path = models.ResNet18(1 / 16, normalisation="imagenet"), str(tmp_path_factory.mktemp("other") / "f_online_1.h5")
    encoder.set_weights([array + 0.1 * (array.ndim == 1) for array in encoder.get_weights()])
    weights.save_weights(encoder, path)
    return encoder, path


def test_both_encoders_start_from_a_file(other):
    encoder, path = other
    for recipe in ("modelzoo", "cifar"):
        config = pretraining.consistent(pretraining.Config(encoder_weights=path, recipe=recipe, device="cpu", image_size=96))
        assert (config.width_multiplier, config.stem, config.normalise) == (1 / 16, "cifar", "imagenet")
        device = npu_config.open_device(config)
        learner = pretraining.Byol(config, device, total_steps=10, loop_size=1)
        images = np.random.RandomState(0).rand(2, 16, 16, 3).astype(np.float32)
        for network in (learner.f_online, learner.f_target):
            np.testing.assert_allclose(network(images), encoder(images), rtol=1e-4, atol=1e-5)
    random = pretraining.consistent(pretraining.Config(encoder_weights="none"))
    assert random == pretraining.consistent(pretraining.Config())


def test_a_run_from_a_file_goes_on_exactly_and_calls_no_weights_random(tiny_images, other, tmp_path):
    path = other[1]
    flags = [flag for flag in TINY if "width" not in flag] + ["--data_dir=%s" % tiny_images, "--encoder_weights=%s" % path,
                                                              "--learning_rate=0.1", "--knn_every=1", "--log_every=1"]
    straight = completed(fork("pretraining.py", *flags + ["--max_steps=4", "--output_dir=%s" % (tmp_path / "straight")]))
    assert "with BatchNorm's statistics of these images" not in straight and "random ones" not in straight
    for steps in (1, 4):
        completed(fork("pretraining.py", *flags + ["--max_steps=%d" % steps, "--output_dir=%s" % (tmp_path / "stopped")]))
    assert (tmp_path / "stopped" / "losses.txt").read_text() == (tmp_path / "straight" / "losses.txt").read_text()
    assert json.loads((tmp_path / "straight" / "config.json").read_text())["width_multiplier"] == 1 / 16
    after, twin = (weights.load_encoder(str(tmp_path / name / "f_online_1.h5"), width_multiplier=1 / 16)
                   for name in ("straight", "stopped"))
    for mine, its in zip(after.get_weights(), twin.get_weights()):
        np.testing.assert_array_equal(mine, its)
    # Of a start from 0 and 1, BatchNorm's statistics would lose that share after four steps; these are the file's for the most part.
    norms = [layer for layer in after.submodules if isinstance(layer, models.keras.layers.BatchNormalization)]
    state = tf.train.load_checkpoint(str(tmp_path / "straight" / "checkpoints" / "ckpt-4"))
    names = [name for name in state.get_variable_to_shape_map() if name.startswith("f_online") and "moving_variance/.ATTR" in name]
    assert sorted(float(np.sum(layer.moving_variance)) for layer in norms) == pytest.approx(
        sorted(float(np.sum(state.get_tensor(name))) for name in names))
    assert runfiles.Run(str(tmp_path / "straight")).accuracies["k-NN"].keys() == {True}
    settings = [flag for flag in flags if "encoder_weights" not in flag] + ["--width_multiplier=0.0625"]
    status, _, error = run("pretraining.py", *settings + ["--output_dir=%s" % (tmp_path / "straight")], forked=True)
    assert status == 1 and "encoder_weights" in error and error.count("\n") == 1


def test_what_is_said_where_k_nn_has_not_risen():
    assert health.not_risen(0.3, 0.4, random_start=True) is None
    assert "random ones" in health.not_risen(0.4, 0.4, random_start=True)
    assert health.not_risen(0.4, 0.3, random_start=False) == "It has not risen."
