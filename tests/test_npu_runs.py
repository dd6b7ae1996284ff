"""Whole runs through the stand-in for the NPU's adapter give what the same runs give on the CPU.

The stand-in computes in float32 and loss scales are powers of two, so the losses agree to rounding. The runs are started once,
partly beside each other; each test looks at what they left.
"""
import concurrent.futures
import glob
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from command import FAKE_NPU

import datasets
import npu_config
import pretraining
from devices.base import Device

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# 80 images in batches of 16: 5 steps an epoch, so that calls of 2 steps leave a remainder.
EPOCHS = 2
BATCH = 16
FLAGS = ["--dataset=folder", "--width_multiplier=0.0625", "--batch_size=%d" % BATCH]


def make_images(folder):
    random = np.random.RandomState(0)
    for split, count in (("train", 40), ("test", 5)):
        for name in ("first", "second"):
            os.makedirs(os.path.join(folder, split, name))
            for i in range(count):
                png = tf.io.encode_png(random.randint(0, 256, (32, 32, 3)).astype(np.uint8)).numpy()
                with open(os.path.join(folder, split, name, "%d.png" % i), "wb") as file:
                    file.write(png)


class Runs:
    def __init__(self, folder):
        self.folder = str(folder)
        self.images = self.path("images")
        make_images(self.images)
        for name in ("hccl", "two"):
            os.makedirs(self.path(name))
        with open(self.path("table.json"), "w") as file:
            file.write("{}")

    def path(self, *names):
        return os.path.join(self.folder, *names)

    def run(self, name, command, **variables):
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("RANK_", "CM_", "ASCEND_", "JOB_"))}
        environment.update(variables, PYTHON=sys.executable, PYTHONPATH=FAKE_NPU,
                           FAKE_NPU_LOG=self.path(name + ".jsonl"), FAKE_HCCL=self.path("hccl"))
        with open(self.path(name + ".out"), "w") as file:
            status = subprocess.call(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
        assert status == 0, self.output(name)

    def pretrain(self, name, *flags, **variables):
        self.run(name, [sys.executable, "pretraining.py", *FLAGS, "--num_epochs=%d" % EPOCHS, "--log_every=2",
                        "--data_dir", self.images, *flags], **variables)

    def script(self, name, script, *flags, **variables):
        self.run(name, [os.path.join(ROOT, "scripts", script), *FLAGS, "--data_path", self.images,
                        "--train_epochs=%d" % EPOCHS, *flags], **variables)

    def output(self, name):
        with open(self.path(name + ".out")) as file:
            return file.read()

    def losses(self, *names):
        return np.loadtxt(self.path(*names, "losses.txt"))

    def events(self, name, kind, rank=None):
        with open(self.path(name + ".jsonl")) as file:
            return [event for event in map(json.loads, file) if event["event"] == kind and event["rank"] == rank]

    def on_cpu(self):
        self.script("cpu", "train_performance_1p.sh", "--device=cpu", "--output_path", self.path("cpu"), "--", "--log_every=2")

    def on_npu(self):
        self.pretrain("npu", "--device=npu", "--output_dir", self.path("npu"), "--max_steps=7", ASCEND_DEVICE_ID="3")

    def on_two_npus(self):
        """Go on from the fifth step of the run on one. Only rank 0 has the checkpoint; HCCL must bring it to the other."""
        os.makedirs(self.path("two", "run", "checkpoints"))
        shutil.copy(self.path("npu", "config.json"), self.path("two", "run"))
        for path in glob.glob(self.path("npu", "checkpoints", "ckpt-5.*")):
            shutil.copy(path, self.path("two", "run", "checkpoints"))
        self.script("two", "train_full_8p.sh", "--rank_size=2", "--rank_table_file", self.path("table.json"), "--eval_epochs=1",
                    "--output_path", self.path("two"), "--", "--log_every=2", STOP_SECONDS="5")


class TwoHalves(Device):
    """What two devices compute that share each batch and average their gradients, on one; BatchNorm sees half a batch."""

    def run(self, function, args):
        self.gradients = []
        losses, spreads = zip(*[function(*[x[first:first + BATCH // 2] for x in args]) for first in (0, BATCH // 2)])
        return sum(losses) / 2, sum(spreads) / 2

    def _apply(self, optimizer, gradients, weights):
        self.gradients.append(gradients)
        if len(self.gradients) == 2:
            super()._apply(optimizer, [(a + b) / 2 for a, b in zip(*self.gradients)], weights)


def losses_of_two_halves(folder, checkpoint):
    """From the fifth step to the tenth."""
    config = pretraining.Config(device="cpu", dataset="folder", data_dir=folder, width_multiplier=1 / 16, batch_size=BATCH,
                                loss_scale="dynamic")
    npu_config.open_device(config)
    learner = pretraining.Byol(config, TwoHalves("cpu", config.loss_scale), 10, 2)
    tf.train.Checkpoint(**learner.state()).read(checkpoint).assert_existing_objects_matched()
    step = tf.function(learner.train_step_pretraining)
    losses = []
    for x1, x2 in datasets.pretraining_batches(datasets.load("folder", folder).train_images, BATCH, config.seed, 5, 10):
        step(x1, x2)
        losses.append(float(learner.recent[0, -1]))
    return losses


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("runs"))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        cpu = pool.submit(runs.on_cpu)
        runs.on_npu()
        runs.on_two_npus()
        cpu.result()
    return runs


def test_one_npu_gives_the_losses_of_the_cpu(runs):
    expected = runs.losses("cpu", "run")
    assert len(expected) == 5 * EPOCHS
    np.testing.assert_allclose(runs.losses("npu"), expected[:7], rtol=1e-6)


def test_the_loop_runs_on_the_npu_whole_with_the_size_of_its_range(runs):
    assert [event["loop"] for event in runs.events("npu", "graph")] == ["npu-loop"]
    calls = runs.events("npu", "run")
    assert [call["steps"] for call in calls] == [2, 2, 1, 2]
    assert {call["traces"] for call in calls} == {1}
    assert "Concrete graph for __inference__train_loop" in runs.output("npu")


def test_on_an_npu_the_loss_scale_is_dynamic_and_the_delicate_parts_keep_their_type(runs):
    options, = runs.events("npu", "open")
    assert options["options"]["precision_mode"] == "allow_mix_precision" and options["job"]
    kept, = (event["kept"] for event in runs.events("npu", "graph"))
    for part in ("l2_normalize", "ResourceApplyAdam", "AssignVariableOp"):
        assert any(part in name for name in kept), part
    assert not any("Conv2D" in name for name in kept)
    scale = tf.train.load_checkpoint(runs.path("npu", "checkpoints", "ckpt-7"))
    name = next(name for name in scale.get_variable_to_shape_map() if "current_loss_scale" in name)
    assert scale.get_tensor(name) == 2 ** 15


def test_two_npus_give_the_losses_of_two_halves(runs):
    losses = runs.losses("two", "run")
    np.testing.assert_array_equal(losses[:5], runs.losses("npu")[:5])  # resumed
    expected = losses_of_two_halves(runs.images, runs.path("npu", "checkpoints", "ckpt-5"))
    np.testing.assert_allclose(losses[5:], expected, rtol=1e-5)
    assert not np.allclose(losses[5:], runs.losses("cpu", "run")[5:], rtol=1e-4)  # BatchNorm saw half of each batch


def test_variables_are_broadcast_once_and_gradients_averaged_at_each_step(runs):
    for rank in ("0", "1"):
        broadcast, = runs.events("two", "broadcast", rank)
        # f, g, q, f', g'; Adam's two slots for what is trained of f, g, q, and its counter; the loss scale and its counter;
        # the step and the latest losses
        assert broadcast["count"] == 2 * 120 + 3 * 8 + 2 * (80 + 6 + 6) + 1 + 2 + 2
        # What ranks tell each other between the calls of the loop; gradients, overflow status and results within.
        assert [event["reduction"] for event in runs.events("two", "all_reduce", rank)] == ["sum", "mean", "sum", "mean"]
        assert [event["steps"] for event in runs.events("two", "run", rank) if event["function"] == "_train_loop"] == [2, 2, 1]
    calls = [len(glob.glob(runs.path("hccl", "all_reduce_%d-*-1.npz" % number))) for number in range(4)]
    assert calls == [1 + 3 + 2, 5, 5, 5]  # once at the start, before each call of the loop, twice at the end; at each of 5 steps
    gradients = [np.load(runs.path("hccl", "all_reduce_1-0-%d.npz" % rank))["arr_0"] for rank in (0, 1)]
    assert not np.allclose(*gradients)  # each rank has its own images


def test_only_rank_0_writes_and_prints(runs):
    with open(runs.path("two", "train_1.log")) as file:
        assert [line for line in file if not line.startswith("Concrete graph")] == []
    with open(runs.path("two", "train_0.log")) as file:
        assert "Resuming from step 5" in file.read()
    assert os.path.exists(runs.path("two", "run", "f_online_2.h5"))


def result_log(path):
    with open(path) as file:
        return dict(line.rstrip("\n").split(" = ") for line in file)


def test_the_result_log_of_a_performance_run(runs):
    log = result_log(runs.path("cpu", "BYOL_for_TensorFlow2_bs16_1p_perf.log"))
    assert list(log) == ["Network", "RankSize", "BatchSize", "DeviceType", "CaseName", "ActualFPS", "TrainingTime",
                         "TrainAccuracy", "ActualLoss", "E2ETrainingTime"]
    assert log["RankSize"] == "1" and log["BatchSize"] == "16" and log["DeviceType"] == os.uname().machine
    assert float(log["ActualLoss"]) == runs.losses("cpu", "run")[-1]
    value, unit = log["TrainingTime"].split()
    assert unit == "ms/step" and float(value) == pytest.approx(16000 / float(log["ActualFPS"]), abs=1e-3)
    assert log["E2ETrainingTime"].endswith(" s") and float(log["E2ETrainingTime"][:-2]) > 1
    with open(runs.path("cpu", "run", "result.json")) as file:
        assert float(log["TrainAccuracy"]) == pytest.approx(json.load(file)["knn"], abs=1e-4)


def test_the_result_log_of_a_full_run(runs):
    log = result_log(runs.path("two", "BYOL_for_TensorFlow2_bs16_2p_acc.log"))
    assert log["RankSize"] == "2" and log["CaseName"] == "BYOL_for_TensorFlow2_bs16_2p_acc"
    assert "Test Accuracy: %s\n" % log["TrainAccuracy"] in runs.output("two")
    assert os.path.isdir(runs.images)  # the old scripts moved the data set away
