"""Runs the project's commands as a user does, in a process of their own.

`start` starts a new Python. `fork` starts the same command in the copy of a process that has imported TensorFlow
already (and not yet used it), which saves the seconds that an import takes.
"""
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time

from conftest import ROOT

# One step of this takes a fraction of a second: 1/16 of the width, and images of the data set that needs no files.
SMALL = ["--dataset=shapes", "--device=cpu", "--width_multiplier=0.0625", "--batch_size=64"]
# For the images of the fixture `tiny_images`: 24 steps, 4 an epoch, of an encoder of one block.
BLOCKS = (0, 1, 0, 0)
TINY = ["--dataset=folder", "--image_size=8", "--device=cpu", "--width_multiplier=0.0625", "--batch_size=16", "--num_epochs=6"]
FAKE_NPU = os.path.join(ROOT, "tests", "fake_npu")  # the folder of the stand-in for the NPU's adapter
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["command", "pretraining"])


def start(command, *arguments, **options):
    """Start `python command.py arguments` and give its process, with stdout and stderr as text pipes."""
    environment = dict(os.environ, PYTHONWARNINGS="ignore", **options.pop("env", {}))
    return subprocess.Popen([sys.executable, "-B", os.path.join(ROOT, command)] + [str(a) for a in arguments],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
                            env=environment, **options)


class Fork:
    """A forked run of a command, with what the tests use of subprocess.Popen."""

    def __init__(self, command, arguments, blocks=None, env=None, images=None):
        self._out, self._error = tempfile.NamedTemporaryFile(), tempfile.NamedTemporaryFile()
        path = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, os.path.join(ROOT, "tests")] + ([path] if path else []))
        try:  # the first fork starts the server, which finds what it is to import by this path
            self._process = FORKS.Process(target=_forked, args=(command, arguments, self._out.name, self._error.name, blocks,
                                                                env or {}, images))
            self._process.start()
        finally:
            os.environ.pop("PYTHONPATH")
            if path:
                os.environ["PYTHONPATH"] = path
        self.pid = self._process.pid

    def poll(self):
        return self._process.exitcode

    @property
    def returncode(self):
        return self._process.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def communicate(self, timeout=None):
        """Wait for the end: (stdout, stderr)."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.send_signal(signal.SIGKILL)
            raise subprocess.TimeoutExpired("a forked run", timeout)
        return self.output(), open(self._error.name).read()

    def output(self):
        """What it has printed so far."""
        return open(self._out.name).read()


def encoder_of(blocks):
    """What to put for an entry of models.ENCODERS: an encoder of so many blocks in its four parts."""
    import models  # not before a fork

    return lambda width, name="resnet18", **more: models.ResNet(blocks, width, name, **more)


def _forked(command, arguments, out, error, blocks, env, images):
    """blocks: of the encoder. images: how many shapes there are, for training and for testing.

    In env, PYTHONPATH works as at a start, and STEEP gives a loss that is as it should be but has an infinite gradient.
    """
    os.environ.update(env)
    sys.path[:0] = env["PYTHONPATH"].split(os.pathsep) if "PYTHONPATH" in env else []
    for name, number in ((out, 1), (error, 2)):
        handle = os.open(name, os.O_WRONLY | os.O_APPEND)
        os.dup2(handle, number)
    sys.stdin = open(os.devnull)
    if blocks:  # an encoder of few blocks, whose graph is made in a fraction of the time
        import models

        models.ENCODERS["resnet18"] = encoder_of(blocks)
    if images:
        import datasets

        datasets.SHAPES_TRAIN, datasets.SHAPES_TEST = images
    if "STEEP" in env:
        import tensorflow as tf

        import losses

        byol_loss = losses.byol_loss
        losses.byol_loss = lambda p, z: byol_loss(p, z) + (byol_loss(p, z) - tf.stop_gradient(byol_loss(p, z))) * 1e38 * 1e38
    sys.argv = [os.path.join(ROOT, command)] + [str(a) for a in arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def fork(command, *arguments, **options):
    return Fork(command, list(arguments), **options)


def run(command, *arguments, **options):
    """Run it to its end: (exit status, stdout, stderr). forked=True: in a copy of a process that has its imports."""
    begin = fork if options.pop("forked", False) else start
    process = begin(command, *arguments, **options)
    out, error = process.communicate(timeout=300)
    return process.returncode, out, error


def pretrain(output_dir, *arguments, **options):
    return run("pretraining.py", *SMALL + ["--output_dir=%s" % output_dir] + list(arguments), **options)


def begin_tiny(images, output_dir, *arguments, **options):
    """Fork a run on such images."""
    return fork("pretraining.py", *TINY + ["--data_dir=%s" % images, "--output_dir=%s" % output_dir] + list(arguments),
                blocks=BLOCKS, **options)


def completed(process):
    """What a run printed, once it has ended well."""
    out, error = process.communicate(timeout=400)
    assert process.returncode == 0, error
    return out


def steps_done(folder):
    """The step of the newest finished checkpoint of a run, 0 if there is none."""
    return max([0] + [int(path.name.split("-")[1].split(".")[0]) for path in (folder / "checkpoints").glob("ckpt-*.json")])


def wait_for(condition, process, seconds=240):
    """Poll until `condition()` holds (True) or the process has ended (False)."""
    end = time.time() + seconds
    while time.time() < end:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    raise AssertionError("it did not come about in %d s" % seconds)
