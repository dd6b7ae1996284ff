"""Runs the project's commands as a user does, in a process of their own."""
import os
import subprocess
import sys

from conftest import ROOT

# One step of this takes a fraction of a second: 1/16 of the width, and images of the data set that needs no files.
SMALL = ["--dataset=shapes", "--device=cpu", "--width_multiplier=0.0625", "--batch_size=64"]


def start(command, *arguments, **options):
    """Start `python command.py arguments` and give its process, with stdout and stderr as text pipes."""
    environment = dict(os.environ, PYTHONWARNINGS="ignore", **options.pop("env", {}))
    return subprocess.Popen([sys.executable, "-B", os.path.join(ROOT, command)] + [str(a) for a in arguments],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
                            env=environment, **options)


def run(command, *arguments, **options):
    """Run it to its end: (exit status, stdout, stderr)."""
    process = start(command, *arguments, **options)
    out, error = process.communicate(timeout=300)
    return process.returncode, out, error


def pretrain(output_dir, *arguments, **options):
    return run("pretraining.py", *SMALL + ["--output_dir=%s" % output_dir] + list(arguments), **options)
