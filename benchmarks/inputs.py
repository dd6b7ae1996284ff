"""What the benchmarks work on: CIFAR-10 where it is given, else images of its shape that are drawn."""
import os
from typing import Any, Optional

import numpy as np

import datasets
from commands import UserError
from sources import cifar, shapes

TRAIN, TEST = 50000, 10000
DRAWN = 5000  # different images; the rest are copies


def find(data_dir: Optional[str]) -> Optional[str]:
    """The folder or archive of CIFAR-10 in data_dir; None without one. UserError if it is not there."""
    if not data_dir:
        return None
    path = cifar.find(cifar.LAYOUTS["cifar10"], data_dir)
    if path is None:
        raise UserError("There is no CIFAR-10 in the folder %s; give --data_dir the folder that holds cifar-10-batches-py or "
                        "cifar-10-python.tar.gz, or leave it out to measure on drawn images." % data_dir)
    return os.path.abspath(path)


def data(data_dir: Optional[str]) -> datasets.Data:
    """CIFAR-10, or drawn shapes in its numbers: 50,000 images for training, 10,000 for testing."""
    if data_dir:
        return datasets.load("cifar10", data_dir)
    drawn, labels = shapes.make(DRAWN, (0, 0))
    train, test = np.arange(TRAIN) % DRAWN, np.arange(TEST) % DRAWN
    return datasets.Data(drawn[train], labels[train], drawn[test], labels[test], shapes.CLASS_NAMES)


def images(data_dir: Optional[str]) -> Any:
    """The training images of `data`, uint8 (50000, 32, 32, 3)."""
    return data(data_dir).train_images
