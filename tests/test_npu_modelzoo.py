"""The commands as ModelZoo's README and scripts give them, letter by letter, on the CPU, with a narrow encoder and few images."""
import glob
import os
import re
import signal
import subprocess
import sys

import pytest
from command import begin_tiny, completed
from conftest import ROOT
from test_cifar import write_cifar10

# Stands for python: the same commands with an encoder of one narrow block.
PYTHON = """#!%s -B
import runpy, sys
sys.path.insert(0, %r)
import commands, models
models.ENCODERS["resnet18"] = lambda width, name="resnet18", **more: models.ResNet(
    (0, 1, 0, 0), width / 16, name, **dict(more, stem="imagenet"))  # which leaves a sixteenth of the pixels: steps are quick
sys.argv = [argument for argument in sys.argv[1:] if argument != "-u"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Clone:
    """A folder with the commands in it, and CIFAR-10 of a few images where Keras keeps it."""

    def __init__(self, folder, images):
        self.folder = folder
        for path in glob.glob(os.path.join(ROOT, "*.py")) + [os.path.join(ROOT, name) for name in ("devices", "sources", "scripts")]:
            os.symlink(path, str(folder / os.path.basename(path)))
        for name in ("python", "python3"):
            (folder / "bin").mkdir(exist_ok=True)
            (folder / "bin" / name).write_text(PYTHON % (sys.executable, ROOT))
            (folder / "bin" / name).chmod(0o755)
        self.give(images)

    def give(self, images):
        """Replace the training images by so many others."""
        write_cifar10(self.folder / "keras" / "datasets", images)

    def start(self, line):
        environment = dict(os.environ, PATH=str(self.folder / "bin") + os.pathsep + os.environ["PATH"], PYTHONWARNINGS="ignore",
                           KERAS_HOME=str(self.folder / "keras"))
        environment.pop("PYTHON", None)  # make PYTHON=... test hands it on, and the scripts would take it for theirs
        line = line if "\n" in line else "exec " + line
        return subprocess.Popen(line, shell=True, cwd=str(self.folder), env=environment, stdout=subprocess.PIPE,
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


@pytest.mark.parametrize("epochs, line", [(200, "python pretraining.py --encoder resnet18 --num_epochs 200 --batch_size 512"),
                                          (100, "python3 -u pretraining.py --encoder resnet18 --num_epochs 100 --batch_size 512")])
def test_many_epochs_begin_and_can_be_stopped(tmp_path, epochs, line):
    process = Clone(tmp_path, 5120).start(line)
    for line in process.stdout:
        if re.match(LINE % epochs, line):
            process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == "" and process.returncode == 128 + signal.SIGINT


# How their scripts read a log: whole seconds of the last line with Time, for 10 batches; the word after Loss=; the accuracy.
READ = """
grep 'Time' train.log | awk -F'Time=' 'END { split($2, parts, "."); print parts[1] }'
grep 'Loss' train.log | awk -F'Loss=' '{ split($2, words, " "); last = words[1] } END { print last }'
grep 'Test Accuracy' train.log | awk -F'Test Accuracy: ' '{ print $2 }'
"""


def test_one_log_of_both_is_read_as_their_scripts_read_it(tmp_path):
    """pretraining and linear evaluation write into one log, one after the other."""
    clone = Clone(tmp_path, 5120)
    clone.run("python3 -u pretraining.py --encoder resnet18 --num_epochs 1 --batch_size 512 > train.log 2>&1")
    line, = re.findall(LINE % 1 + ".*", (tmp_path / "train.log").read_text(), re.M)
    os.rename(str(tmp_path / "f_online_1.h5"), str(tmp_path / "f_online_100.h5"))
    clone.give(515)
    clone.run("python3 -u linearevaluation.py --encoder resnet18 --encoder_weights f_online_100.h5 >> train.log 2>&1")
    log = (tmp_path / "train.log").read_text()
    assert re.search(r"^\[Epoch 50/50 Batch 1/1\] loss ", log, re.M)
    seconds, loss, accuracy = clone.run(READ).splitlines()
    assert seconds == re.search(r"Time=(\d+)\.", line).group(1)
    assert loss == re.search(r"Loss=(\S+)", line).group(1)  # with the full stop of the known line, as theirs
    assert log.splitlines()[-1] == "Test Accuracy: " + accuracy


@pytest.mark.parametrize("line, case", [
    ("bash scripts/train_performance_1p.sh --data_path=data --batch_size=512 --num_epochs=1", "1p_perf"),
    ("bash scripts/train_full_1p.sh --data_path=data --ckpt_path=kept --batch_size=512 --num_epochs=1 --precision_mode= "
     "--over_dump=False --data_dump_flag=False --data_dump_step=10 --profiling=False --eval_epochs=5", "1p_acc")])
def test_the_scripts_with_their_flags(tmp_path, line, case):
    clone = Clone(tmp_path, 5120)
    os.rename(str(tmp_path / "keras" / "datasets"), str(tmp_path / "data"))
    out = clone.run(line)
    folder = tmp_path / "output" / "0"
    result = dict(each.split(" = ") for each in (folder / ("BYOL_for_TensorFlow2_bs512_%s.log" % case)).read_text().splitlines())
    seconds, loss, *tested = clone.run(READ.replace("train.log", str(folder / "train_0.log"))).splitlines()
    line, = re.findall(LINE % 1 + ".*", out, re.M)
    assert seconds == re.search(r"Time=(\d+)\.", line).group(1)
    assert loss == result["ActualLoss"] and "%.5f" % float(loss) == re.search(r"Loss=(\d\.\d{5})", line).group(1)
    assert re.match(r"0\.\d{4}$", result["TrainAccuracy"]) and tested == [result["TrainAccuracy"]] * (case == "1p_acc")
    assert float(result["ActualFPS"]) == pytest.approx(float(re.search(r"([\d.]+) images/s", line).group(1)), abs=0.1)
    final = ["Final Performance images/sec : " + result["ActualFPS"], "Final Train Accuracy : " + result["TrainAccuracy"]]
    assert "\n".join(final) in out and (tmp_path / "data" / "cifar-10-batches-py").exists()


@pytest.mark.parametrize("flags, steps", [(["--perf", "0"], 20), (["--perf", "0", "--max_steps=3"], 3), (["--perf=1"], 24)])
def test_perf_0_ends_after_20_batches(tiny_images, tmp_path, flags, steps):
    completed(begin_tiny(tiny_images, tmp_path, "--autotune=False", "--log_every=4", *flags))
    assert len((tmp_path / "losses.txt").read_text().splitlines()) == steps
