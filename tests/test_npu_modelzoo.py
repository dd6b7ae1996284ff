"""The commands as ModelZoo's README and scripts give them, letter by letter, on the CPU, with a narrow encoder and few images."""
import glob
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from command import begin_tiny, completed
from conftest import ROOT
from test_cifar import NAMES, batch, py2_dict, py2_list, py2_str

# Stands for python: the same commands with an encoder of one narrow block.
PYTHON = """#!%s -B
import runpy, sys
sys.path.insert(0, %r)
import commands, models
models.ENCODERS["resnet18"] = lambda width, name="resnet18", **more: models.ResNet((0, 1, 0, 0), width / 16, name, **more)
sys.argv = [argument for argument in sys.argv[1:] if argument != "-u"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Clone:
    """A folder with the commands in it, and CIFAR-10 of a few images where Keras keeps it."""

    def __init__(self, folder, images):
        self.folder = folder
        for path in glob.glob(os.path.join(ROOT, "*.py")) + [os.path.join(ROOT, name) for name in ("devices", "sources")]:
            os.symlink(path, str(folder / os.path.basename(path)))
        for name in ("python", "python3"):
            (folder / "bin").mkdir(exist_ok=True)
            (folder / "bin" / name).write_text(PYTHON % (sys.executable, ROOT))
            (folder / "bin" / name).chmod(0o755)
        data = folder / "keras" / "datasets" / "cifar-10-batches-py"
        data.mkdir(parents=True)
        random = np.random.RandomState(0)
        for i, name in enumerate(["data_batch_%d" % i for i in range(1, 6)] + ["test_batch"]):
            count = images // 5 if i < 5 else 50
            pictures = random.randint(0, 256, (count, 32, 32, 3)).astype(np.uint8)
            (data / name).write_bytes(batch(pictures, random.randint(0, 10, count).tolist()))
        (data / "batches.meta").write_bytes(py2_dict(label_names=py2_list(py2_str(name.encode()) for name in NAMES)))

    def start(self, line):
        environment = dict(os.environ, PATH=str(self.folder / "bin") + os.pathsep + os.environ["PATH"], PYTHONWARNINGS="ignore",
                           KERAS_HOME=str(self.folder / "keras"))
        return subprocess.Popen("exec " + line, shell=True, cwd=str(self.folder), env=environment, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, universal_newlines=True)

    def run(self, line):
        process = self.start(line)
        out, error = process.communicate(timeout=400)
        assert process.returncode == 0, error
        return out


LINE = r"^\[Epoch 1/%d Batch 10/10\] Loss=\d\.\d{5}\. Time="


@pytest.mark.parametrize("line", ["python pretraining.py --encoder resnet18 --num_epochs 1 --batch_size 512",
                                  "python3 -u pretraining.py --perf 0 --encoder resnet18 --num_epochs 1 --batch_size 512"])
def test_one_epoch(tmp_path, line):
    out = Clone(tmp_path, 5120).run(line)
    assert re.search(LINE % 1, out, re.M) and "Weights of f saved." in out
    assert (tmp_path / "f_online_1.h5").exists()


def test_200_epochs_begin_and_can_be_stopped(tmp_path):
    process = Clone(tmp_path, 5120).start("python pretraining.py --encoder resnet18 --num_epochs 200 --batch_size 512")
    for line in process.stdout:
        if re.match(LINE % 200, line):
            process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == "" and process.returncode == 128 + signal.SIGINT


def test_linear_evaluation(tmp_path):
    clone = Clone(tmp_path, 515)
    clone.run("python3 -u pretraining.py --encoder resnet18 --num_epochs 1 --batch_size 512")
    shutil.move(str(tmp_path / "f_online_1.h5"), str(tmp_path / "f_online_100.h5"))
    out = clone.run("python3 -u linearevaluation.py --encoder resnet18 --encoder_weights f_online_100.h5")
    assert re.match(r"Test Accuracy: 0\.\d{4}$", out.splitlines()[-1])


@pytest.mark.parametrize("flags, steps", [(["--perf", "0"], 20), (["--perf", "0", "--max_steps=3"], 3), (["--perf=1"], 24)])
def test_perf_0_ends_after_20_batches(tiny_images, tmp_path, flags, steps):
    completed(begin_tiny(tiny_images, tmp_path, "--autotune=False", "--log_every=4", *flags))
    assert len((tmp_path / "losses.txt").read_text().splitlines()) == steps
