"""Makes the modules at the root importable, and keeps TensorFlow quiet and off any accelerator's memory."""
import os
import shutil
import signal
import sys
import tempfile

import numpy as np
import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
sys.dont_write_bytecode = True
# A shell's job in the background ignores Ctrl-C, one under nohup SIGHUP, and so would every command that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# XLA takes a minute to make fast code of the networks, and a second to make some. What it computes is the same.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import commands  # noqa: E402, F401  (sets TensorFlow's log level before any test imports it)
from devices import host  # noqa: E402

host.processor_has_bfloat16 = lambda: True  # so that bfloat16 is tested on every processor, if only slowly


def pytest_configure(config):
    """Decoded images go into a folder of the tests' own, not into the user's."""
    config.byol_cache = tempfile.mkdtemp(prefix="byol-tests-")
    os.environ["XDG_CACHE_HOME"] = config.byol_cache


def pytest_collection_modifyitems(items):
    """The notebook, which takes minutes, begins first, so that no worker waits for it at the end."""
    items.sort(key=lambda item: "test_tour" not in item.nodeid)


def pytest_unconfigure(config):
    shutil.rmtree(config.byol_cache, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory):
    """A folder of 64 training and 4 test images, 8 x 8 pixels, in two classes."""
    import tensorflow as tf

    folder = tmp_path_factory.mktemp("images")
    for i, image in enumerate(np.random.RandomState(0).randint(0, 256, (68, 8, 8, 3))):
        path = folder / ("test" if i < 4 else "train") / str(i % 2) / ("%d.png" % i)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tf.io.encode_png(image.astype(np.uint8)).numpy())
    return folder
