"""Every command of this project in the README and the guides is run, in small: few and small images, two steps, one block.

What a line says stays as it is, but for the sizes and devices that are appended to it; lines that differ in nothing but numbers
and names of files are run once. Left to other tests: make and .ci/run, the scripts (test_npu_scripts, test_npu_modelzoo) and the
benchmarks (test_benchmarks); what installs packages needs a network.
"""
import glob
import os
import re
import shlex

import pytest
from command import BLOCKS, completed, fork
from conftest import ROOT
from test_cifar import write_cifar10

import models
import weights

GUIDES = ["README.md", "README.zh-CN.md", "CONTRIBUTING.md"] + [
    os.path.relpath(path, ROOT) for folder in ("docs", "weights") for path in sorted(glob.glob(os.path.join(ROOT, folder, "*.md")))]
COMMANDS = ("pretraining.py", "linearevaluation.py", "finetuning.py", "embed.py", "report.py", "datasets.py")
# What stands for a user's own: folders that are made below, and choices that a line leaves open.
CHOICES = {"[--npu_ops FILE]": "", "--recipe NAME": "--recipe paper --image_size 32", " ...": "", "--num_devices 8": "--num_devices 2",
           "--num_devices 4": "--num_devices 2", "--encoder_weights start.h5": "--encoder_weights cifar10"}
SMALL = {"pretraining.py": "--device=cpu --batch_size=16 --max_steps=2 --knn_every=0 --image_size=%(size)d --store_size=%(size)d "
                           "--precision_mode=must_keep_origin_dtype --noresume --overwrite",
         "linearevaluation.py": "--device=cpu --batch_size=16 --num_epochs=1 --max_steps=2 --precision_mode=must_keep_origin_dtype",
         "finetuning.py": "--device=cpu --batch_size=4 --num_epochs=1 --max_steps=2", "embed.py": "--device=cpu"}
WEIGHTS = re.compile(r"\S+/f_online_\d+\.h5")


def lines_of(text):
    """The commands in a text of Markdown: what stands between backticks, or after spaces or a prompt at the start of a line."""
    text = re.sub(r" *\\\n\s*", " ", text)
    for line in re.findall(r"(?m)(?:^|`|(?<=   ))(?:\$ )?(?:CUDA_VISIBLE_DEVICES=\S* )?python3? ([^`\n]+)", text):
        line = line.split(" #")[0].split(" > ")[0].strip()
        if line.split()[0] in COMMANDS and len(line.split()) > 1:
            yield line


def kind(line):
    """What two lines share that differ in numbers and files only."""
    words = WEIGHTS.sub("WEIGHTS", line).split()
    return tuple(word for word in words if not re.match(r"[\d.]+$|runs/|out$|DIR$|PHOTOS$", word))


def collected():
    found = {}  # type: dict
    for guide in GUIDES:
        for line in lines_of(open(os.path.join(ROOT, guide), encoding="utf-8").read()):
            found.setdefault(kind(line), (guide, line))
    return sorted(found.values())


def test_lines_are_found():
    text = ("`python embed.py --x 1` and\n\n    python3 report.py a \\\n        b  # a page\n\n"
            "```\npython pretraining.py -a\n```\npython is")
    assert list(lines_of(text)) == ["embed.py --x 1", "report.py a b", "pretraining.py -a"]
    assert kind("report.py runs/a 3") == kind("report.py runs/b 12") != kind("report.py --c")
    assert len(collected()) > 25 and {line.split()[0] for _, line in collected()} == set(COMMANDS)


@pytest.fixture
def place(tmp_path, tiny_images, monkeypatch):
    """A folder with DIR and PHOTOS in it, and CIFAR-10 where Keras keeps it."""
    write_cifar10(tmp_path / "DIR", 40, 20)
    (tmp_path / "keras").mkdir()
    os.symlink(str(tmp_path / "DIR"), str(tmp_path / "keras" / "datasets"))
    os.symlink(str(tiny_images), str(tmp_path / "PHOTOS"))
    monkeypatch.chdir(str(tmp_path))
    return tmp_path


def prepare(place, line):
    """Make the weights that a line reads, and what a run has left that it reports on."""
    width = re.search(r"--width_multiplier ([\d.]+)", line)
    size = re.search(r"--image_size (\d+)", line)
    for name in WEIGHTS.findall(line):
        encoder = models.ResNet(BLOCKS, float(width.group(1)) if width else 1.0,
                                stem=models.default_stem(int(size.group(1)) if size else 32))
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        weights.save_weights(encoder, str(place / name))


@pytest.mark.parametrize("guide, line", collected())
def test_line(place, guide, line):
    for choice, taken in CHOICES.items():
        line = line.replace(choice, taken)
    command, *arguments = shlex.split(line)
    size = 8 if "PHOTOS" in line else 32
    small = [] if "--check_npu" in line or "--help" in line else shlex.split(SMALL.get(command, "") % {"size": size})
    environment = {"KERAS_HOME": str(place / "keras")}
    if command == "report.py":
        for run in [argument for argument in arguments if re.match(r"runs/\w+$", argument)]:
            completed(fork("pretraining.py", "--data_dir=DIR", "--output_dir=" + run,
                           *shlex.split(SMALL["pretraining.py"] % {"size": 32}), blocks=BLOCKS))
    elif command != "pretraining.py":
        prepare(place, line)
    out = completed(fork(command, *arguments + small, env=environment,
                         blocks=None if any(name in line for name in weights.SHIPPED) else BLOCKS))
    assert out.strip()
