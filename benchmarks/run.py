"""Measure how fast this is, against what it could be and against its peers, on this machine.

    python benchmarks/run.py --data_dir DIR

takes some twenty-five minutes on two cores, and needs them to itself. It prints a table and writes it as benchmark.md, with all
figures as benchmark.json, into --output_dir. --quick takes two minutes with narrow encoders and small batches: it shows that
all of it works; its verdicts say nothing. --only NAME,... takes some of the measurements. docs/performance.md explains the rows.
"""
import dataclasses
import os
import platform
import sys
import time
from typing import Any, Dict, List, Optional

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # this folder is a package in the one above

import commands  # before TensorFlow, whose start it quiets

# isort: split

import tensorflow as tf
from absl import logging

from benchmarks import (
    augmentation_speed,
    data_speed,
    growth,
    inputs,
    linear_speed,
    start_time,
    step_speed,
    table,
    training_speed,
    workers,
)
from benchmarks.scale import FULL, QUICK
from commands import UserError, flag

NAMES = ("augmentation", "step", "training", "start", "data", "linear", "growth")


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a measurement: each is a flag."""
    data_dir: Optional[str] = flag(None, "Where CIFAR-10 lies; without it, drawn images of its shape are used.", alias="data_path")
    output_dir: str = flag("output/benchmark", "Where benchmark.md and benchmark.json go.")
    quick: bool = flag(False, "Narrow encoders and small batches, to see that all of it works.")
    only: Optional[str] = flag(None, "Measure only these, separated by commas: %s." % ", ".join(NAMES))
    device: str = flag("auto", "auto: a GPU if there is one, else the CPU.", choices=("auto", "cpu", "gpu"))
    torch_python: Optional[str] = flag(None, "The Python that has PyTorch. Default: this one.")
    verbose: bool = flag(False, "Show what the child processes say.")


def main() -> None:
    config = commands.from_flags(Config)
    logging.set_verbosity(logging.INFO if config.verbose else logging.WARNING)
    began = time.time()
    names = _names(config.only)
    scale = QUICK if config.quick else FULL
    commands.make_folder(config.output_dir)
    torch_python = config.torch_python or sys.executable
    if config.torch_python and not os.access(config.torch_python, os.X_OK):
        raise UserError("--torch_python %s cannot be run; give the path of a Python that has PyTorch." % config.torch_python)
    gpus = [gpu.name for gpu in tf.config.list_physical_devices("GPU")] if config.device != "cpu" else []
    if config.device == "gpu" and not gpus:
        raise UserError("--device gpu, but TensorFlow %s sees no GPU here; use --device cpu." % tf.__version__)
    settings = {"data_dir": inputs.find(config.data_dir), "device": "gpu" if gpus else "cpu"}
    steps = {}  # type: Dict[str, Any]
    measurements = {  # each gives rows of the table
        "augmentation": lambda: augmentation_speed.measure(scale, settings, config.verbose),
        "step": lambda: step_speed.measure(scale, settings, config.verbose, torch_python, steps),
        "training": lambda: training_speed.measure(scale, settings, config.verbose),
        "start": lambda: start_time.measure(scale, settings, config.verbose),
        "data": lambda: data_speed.measure(scale, settings, config.verbose),
        "linear": lambda: linear_speed.measure(scale, settings, config.verbose),
        "growth": lambda: growth.measure(scale, settings, config.verbose, steps),
    }  # type: Dict[str, Any]
    rows, seconds, failed = [], {}, []  # type: Any
    for name in NAMES:
        if name not in names:
            continue
        print("Measuring: %s..." % name, file=sys.stderr, flush=True)
        since = time.time()
        try:
            rows += measurements[name]()
        except workers.Failed as error:
            failed.append("%s: %s" % (name, error))
            rows.append(table.Row(name, name, "not measured: %s" % error))
        seconds[name] = round(time.time() - since, 1)
    result = {"config": dataclasses.asdict(config), "seconds": dict(seconds, all=round(time.time() - began, 1)), "steps": steps,
              "machine": machine(), "versions": {"python": platform.python_version(), "tensorflow": tf.__version__},
              "date": time.strftime("%Y-%m-%d", time.gmtime())}
    print(table.write(os.path.join(config.output_dir, "benchmark"), rows, about(config, result, gpus), result), end="")
    if failed:
        raise UserError("Not measured: %s; --verbose shows more." % "; ".join(failed))


def _names(only: Optional[str]) -> List[str]:
    """The measurements that --only names. UserError for one that there is not."""
    names = [name.strip() for name in only.split(",")] if only is not None else list(NAMES)
    for name in names:
        if name not in NAMES:
            raise UserError("--only %s: there is no measurement %r; there are %s." % (only, name, ", ".join(NAMES)))
    return names


def machine() -> Dict[str, Any]:
    """What the figures were measured on."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), model)
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"processor": model, "cores": cores, "system": platform.platform(), "load": load}


def about(config: Config, result: Dict[str, Any], gpus: List[str]) -> List[str]:
    """The lines above the table."""
    found = result["machine"]
    lines = ["`python benchmarks/run.py%s` on %s, %d cores%s, TensorFlow %s, Python %s, %s, in %.0f s." % (
        " --quick" if config.quick else "", found["processor"], found["cores"], ", GPU" if gpus else "", tf.__version__,
        result["versions"]["python"], result["date"], result["seconds"]["all"])]
    if config.quick:
        lines.append("A quick look at narrow encoders and small batches: the verdicts say nothing.")
    if not config.data_dir:
        lines.append("Without --data_dir: on drawn images in the numbers and the layout of CIFAR-10.")
    return lines


if __name__ == "__main__":
    commands.define_flags(Config)
    commands.run(main)
