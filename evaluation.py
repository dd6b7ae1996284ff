"""What an encoder is worth: features of a data set, and its nearest neighbours.

Networks run inside tf.function, where an NPU computes; what follows from features and logits runs on the host in NumPy, in float32 on
any device. Also what the commands share that work with a saved encoder: their flags, and how they start and end.
"""
import contextlib
import dataclasses
import os
import time
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

import numpy as np
import tensorflow as tf
from absl import logging

import commands
import datasets
import models
import neighbours
import npu_config
import weights
from commands import UserError, flag
from devices.base import Device


@dataclasses.dataclass(frozen=True)
class Config(npu_config.Options):
    """The settings of every command that works with a saved encoder: all are flags, saved with the result."""
    encoder: str = flag("resnet18", "The encoder f.", choices=sorted(models.ENCODERS))
    width_multiplier: float = flag(1.0, "The width that the encoder was made with.", low=1 / 64, high=8)
    stem: Optional[str] = flag(None, "Its first layers: cifar or imagenet. Default: what the weights file has; for random weights "
                               "cifar below 96 pixels, else imagenet.", choices=sorted(models.STEMS))
    encoder_weights: Optional[str] = flag(None, "A file of pretraining.py's, as f_online_200.h5; cifar10, cifar10-narrow: those that "
                                          "come with the program; none: random weights, to compare with.")
    dataset: str = flag("cifar10", "The images. shapes is made by the program and needs no files; folder is a folder of images; "
                        "tfds:NAME is what TensorFlow Datasets has prepared.", choices=datasets.NAMES)
    data_dir: Optional[str] = flag(None, "Where the data set lies: CIFAR's batches folder or .tar.gz, a folder of images, or the "
                                   "data_dir of TensorFlow Datasets.", alias="data_path")
    image_size: int = flag(32, "Height and width of the images (reference: 32).", low=8, high=1024)
    store_size: Optional[int] = flag(None, "Height and width at which images are kept; their middle is used, or "
                                     "crops. Default: --image_size.", low=8, high=1024)
    test_fraction: float = flag(0.1, "Of what has no images for testing of its own: the part kept for that.", low=0, high=0.9)
    cache_dir: Optional[str] = flag(None, "Where images are kept decoded, for every later start (default: ~/.cache/byol).")
    output_dir: str = flag(".", "Where results go.", alias="model_dir")
    seed: int = flag(0, "Of random weights, order and crops: the same seed gives the same result.", low=0, high=2 ** 31 - 1)
    quiet: bool = flag(False, "Print the result, warnings and errors only.")
    verbose: bool = flag(False, "Print what TensorFlow and the device say, too.")


Say = Callable[[str], None]


def start(config: Config) -> Tuple[Device, Any, Say]:
    """Open the device and load the encoder: (device, encoder, say), where say prints a line of progress.

    Only the chief prints, and not under --quiet. UserError for settings, weights, a device or a folder that cannot be used.
    """
    commands.check(config)
    logging.set_verbosity(logging.INFO if config.verbose else logging.WARNING)
    if not config.encoder_weights:
        raise UserError("--encoder_weights is missing: give a file that pretraining.py wrote, such as f_online_200.h5, the name of an "
                        "encoder that comes with the program (%s), or none for random weights." % ", ".join(sorted(weights.SHIPPED)))
    device = npu_config.open_device(config, alone=True)
    device.set_seed(config.seed)
    if device.is_chief:
        commands.make_folder(config.output_dir)

    def say(text: str) -> None:
        if device.is_chief and not config.quiet:
            print(text, flush=True)

    if device.advice:
        say(device.advice)
    layers = {"norm": device.batch_norm, "conv": device.convolution}
    with device.scope():
        if config.encoder_weights == "none":
            stem = config.stem or models.default_stem(config.image_size)
            encoder = models.ENCODERS[config.encoder](config.width_multiplier, stem=stem, **layers)
        else:
            encoder = weights.load_encoder(config.encoder_weights, config.encoder, config.width_multiplier, config.stem, **layers)
    return device, encoder, say


def load_data(config: Config, device: Optional[Device] = None, say: Optional[Say] = None, labelled: bool = True) -> Any:
    """The data set that the flags name, a datasets.Data. UserError if it is not to be had.

    device, say: as from `start`, to tell about images that are decoded; without, that is silent. labelled: UserError also if it has
    not the labels, classes and test images that a classifier needs.
    """
    say = say if device and device.is_chief and not config.quiet else None
    data = datasets.load(config.dataset, config.data_dir, image_size=config.image_size,
                         test_fraction=config.test_fraction, cache_dir=config.cache_dir, say=say, store_size=config.store_size)
    where = "The data set %s%s" % (config.dataset, " in %s" % config.data_dir if config.data_dir else "")
    if labelled and data.train_labels is None:
        raise UserError("%s has no labels; %s." % (where, "put its images into one folder for each class, as in DIR/cat/1.jpg"
                                                   if config.dataset == "folder" else "choose one that has"))
    if labelled and len(data.class_names) < 2:
        raise UserError("%s has %d class; a classifier needs two or more." % (where, len(data.class_names)))
    if labelled and not len(data.test_images):
        raise UserError("%s has no test images; give a --test_fraction above 0%s." % (
            where, ", or folders train/ and test/" if config.dataset == "folder" else ""))
    return data


def write_result(name: str, config: Config, device: Device, data: datasets.Data, started: float,
                 figures: Dict[str, Any]) -> Dict[str, Any]:
    """Write result_<name>.json into output_dir: the figures, on which data, by which flags, in which time. Gives the figures."""
    if device.is_chief:
        about = {"seconds": time.monotonic() - started, "device": device.describe(),
                 "config": dataclasses.asdict(config), "train_images": len(data.train_images),
                 "test_images": len(data.test_images), "classes": len(data.class_names)}
        path = os.path.join(config.output_dir, "result_%s.json" % name)
        commands.write_result(path, dict(figures, **about))
    return figures


@tf.function
def inference(encoder: Any, images: tf.Tensor) -> tf.Tensor:
    """float32 features of a batch. tf.function keeps a graph for each encoder, as long as that lives."""
    if images.dtype == tf.uint8:
        images = tf.cast(images, tf.float32) / 255.0
    return tf.cast(encoder(images, training=False), tf.float32)


def middle(images: np.ndarray, size: Optional[int]) -> np.ndarray:
    """Centre crops: (n, s, s, 3) to (n, size, size, 3), from row and column (s - size) // 2 on; None: the images as they are.

    ValueError if size is above s.
    """
    side = images.shape[1]
    if size in (None, side):
        return images
    if size > side:
        raise ValueError("size is %d, but the images have %d pixels" % (size, side))
    first = (side - size) // 2
    return images[:, first:first + size, first:first + size]


def features(encoder: Any, images: Any, batch_size: int = 500, check: Callable[[], None] = lambda: None,
             size: Optional[int] = None) -> np.ndarray:
    """What the encoder makes of images in inference mode: float32 (n, d), on the host.

    images: (n, s, s, 3), uint8 or float in [0, 1], an array or what datasets.Data holds. check: called between batches, to raise what
    ends it early. size: of larger images, only the `middle` of this size. The last batch is filled up with black images, so that one
    graph serves all. UserError if a feature is not finite.
    """
    batch_size = max(1, min(batch_size, len(images)))
    batches = []
    for first in range(0, len(images), batch_size):
        check()
        batch = middle(np.asarray(images[first:first + batch_size]), size)
        filled = np.pad(batch, [(0, batch_size - len(batch))] + [(0, 0)] * 3, "constant")
        batches.append(inference(encoder, tf.constant(filled)))
    result = np.concatenate([batch.numpy() for batch in batches])[:len(images)]
    if not np.isfinite(result).all():
        raise UserError("The encoder gives features that are not finite numbers: its weights are of a run that failed, or too large "
                        "for the precision; try --precision_mode must_keep_origin_dtype.")
    return result


def knn_of_encoder(encoder: Any, data: Any, check: Callable[[], None] = lambda: None, size: Optional[int] = None) -> float:
    """k-NN accuracy of an encoder on a labelled datasets.Data: test images by training images. check, size: as for `features`."""
    train, test = (features(encoder, images, check=check, size=size) for images in (data.train_images, data.test_images))
    return neighbours.knn_accuracy(train, data.train_labels, test, data.test_labels, len(data.class_names))


@contextlib.contextmanager
def statistics_of(encoder: Any, images: Any, batches: int = 20, batch_size: int = 256, size: Optional[int] = None) -> Iterator[None]:
    """Inside, BatchNorm's moving statistics of the encoder are those of some of these images, uint8 (n, s, s, 3), as for features.

    size: of larger images, only the `middle` of this size.
    For an encoder that was never trained, whose statistics are still 0 and 1: its BatchNorm does nothing in inference mode.
    """
    before = [(weight, weight.numpy()) for weight in encoder.non_trainable_weights]
    forward = tf.function(lambda images: tf.reduce_sum(encoder(tf.cast(images, tf.float32) / 255.0, training=True)))
    for batch in range(batches):
        chosen = (batch + batches * np.arange(batch_size)) * len(images) // (batches * batch_size)  # a folder is sorted by class
        forward(tf.constant(middle(np.asarray(images[chosen]), size)))
    try:
        with models.settled(encoder, batches):
            yield
    finally:
        for weight, value in before:
            weight.assign(value)


def batch_size_for(batch_size: int, number: int, device: Device, say: Say) -> int:
    """The batch size, or where there are fewer images, the largest that they and the replicas allow."""
    if batch_size <= number:
        return batch_size
    smaller = max(1, number // device.replicas) * device.replicas
    say("There are %d images to train on, so a batch has %d instead of %d." % (number, smaller, batch_size))
    return smaller
