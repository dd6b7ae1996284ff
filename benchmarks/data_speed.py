"""How fast CIFAR-10 is read, as a folder and as an archive, and how reading, the pipeline and memory grow with the data."""
import io
import os
import pickle
import struct
import tarfile
import tempfile
from typing import Any, Callable, Dict, List

import numpy as np

from benchmarks import inputs, table, workers
from benchmarks.scale import Scale
from sources import cifar

MODULE = "benchmarks.data_speed"
LAYOUT = cifar.LAYOUTS["cifar10"]
SHARES = (8, 2, 1)  # the data set's 1/8, 1/2 and all
BATCH = 512
AT_MOST = 2  # seconds


def measure(scale: Scale, settings: Dict[str, Any], verbose: bool) -> List[table.Row]:
    """Reading by rounds in one process; then each share of the data in a process of its own, for its memory."""
    with tempfile.TemporaryDirectory() as folder:
        paths = _files(folder, settings["data_dir"], scale)
        with workers.Worker(MODULE, settings, verbose=verbose) as worker:
            takers = {name: lambda name=name: worker.ask("read", path=paths[name]) for name in ("folder", "archive")}
            for take in takers.values():
                take()
            got = workers.in_turns(scale.rounds, takers)
        note = "The files are in the memory of the operating system: what is measured is unpacking and checking, not the disk."
        rows = [table.Row("data", "reading CIFAR-10, " + what, "", "", table.figure(got[name]), " s", at_most=AT_MOST, note=note)
                for name, what in (("folder", "official files"), ("archive", ".tar.gz"))]
        grown = []
        for share in SHARES:
            with workers.Worker(MODULE, settings, verbose=verbose) as worker:
                grown.append(worker.ask("pipeline", path=paths[str(share)], seconds=scale.short_turn))
        first = grown[0]
        for share, part in zip(SHARES, grown):
            shown = "read in %.2f s, views of %s images/s, peak memory %.2f GB" % (
                part["read"], table.number(part["images_per_second"]), part["memory"] / 1e9)
            row = table.Row("data", "%d images, batch %d" % (part["images"], part["batch"]), shown)
            if share != SHARES[0]:
                row = row._replace(against="%d images" % first["images"], figure=table.figure(
                    [part["images_per_second"] / first["images_per_second"]]), unit=" of the speed")
            rows.append(row)
    return rows


def _files(folder: str, data_dir: Any, scale: Scale) -> Dict[str, str]:
    """CIFAR-10's layout with each share of the images, and all as an archive, written into the folder; their paths."""
    given = inputs.find(data_dir)
    data = inputs.data(data_dir)
    images = data.train_images[:scale.images]
    labels = data.train_labels[:scale.images]
    paths = {}
    for share in SHARES:
        parent = os.path.join(folder, str(share))
        _write(parent, images[:len(images) // share], labels, data.test_images[:len(data.test_images) // share], data.test_labels)
        paths[str(share)] = parent
    whole = os.path.join(paths["1"], LAYOUT.folder)
    if given and os.path.isdir(given) and scale.images is None:
        whole = given
    paths["folder"] = whole
    if given and os.path.isfile(given):
        paths["archive"] = given
    else:
        paths["archive"] = os.path.join(folder, LAYOUT.archive)
        with tarfile.open(paths["archive"], "w:gz", compresslevel=6) as archive:
            archive.add(whole, LAYOUT.folder)
    return paths


def _write(parent: str, train: Any, train_labels: Any, test: Any, test_labels: Any) -> None:
    """Images (n, 32, 32, 3) and labels as the official files of CIFAR-10, in parent/cifar-10-batches-py."""
    folder = os.path.join(parent, LAYOUT.folder)
    os.makedirs(folder)
    parts = len(LAYOUT.train_files)
    bounds = [len(train) * i // parts for i in range(parts + 1)]
    batches = [(name, train[a:b], train_labels[a:b]) for name, a, b in zip(LAYOUT.train_files, bounds, bounds[1:])]
    for name, images, labels in batches + [(LAYOUT.test_files[0], test, test_labels[:len(test)])]:
        planes = np.ascontiguousarray(images.transpose(0, 3, 1, 2).reshape(len(images), -1))
        content = {LAYOUT.label_key: [int(label) for label in labels], b"data": planes}
        _pickle(os.path.join(folder, name), content)
    _pickle(os.path.join(folder, LAYOUT.names_file), {LAYOUT.names_key: [b"class %d" % i for i in range(LAYOUT.classes)]})


class _Pickler(pickle._Pickler):  # type: ignore[name-defined,misc]
    """Writes text and bytes as Python 2 did, in which the official files were made and which the reader expects."""
    dispatch = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_string(self, value: Any) -> None:
        content = value if isinstance(value, bytes) else value.encode()
        self.write(b"T" + struct.pack("<I", len(content)) + content)

    dispatch[bytes] = dispatch[str] = save_string


def _pickle(path: str, content: Dict[bytes, Any]) -> None:
    memory = io.BytesIO()
    _Pickler(memory, 2).dump(content)
    with open(path, "wb") as file:  # NumPy 2 names its module by a new place
        file.write(memory.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))


def prepare(settings: Dict[str, Any]) -> Dict[str, Callable[..., Any]]:
    """The child's jobs."""
    import time

    import commands  # noqa: F401  before TensorFlow, whose start it quiets

    # isort: split

    import tensorflow as tf

    import datasets

    def read(path: str) -> float:
        began = time.perf_counter()
        datasets.load("cifar10", path)
        return time.perf_counter() - began

    def pipeline(path: str, seconds: float) -> Dict[str, float]:
        began = time.perf_counter()
        data = datasets.load("cifar10", path)
        took = time.perf_counter() - began
        with tf.device("CPU:0"):
            batch = min(BATCH, len(data.train_images))
            iterator = iter(datasets.pretraining_batches(data.train_images, batch, 0, 0, 10 ** 6))

        def take(n: int) -> None:
            for _ in range(n):
                next(iterator)

        take(8)
        speed = batch / workers.seconds_each(take, 3 * seconds, most=8)
        return {"read": took, "images": len(data.train_images), "batch": batch, "images_per_second": speed,
                "memory": workers.peak_memory()}

    return {"read": read, "pipeline": pipeline}


if __name__ == "__main__":
    workers.serve(prepare)
