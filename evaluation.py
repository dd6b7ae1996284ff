"""What an encoder is worth: features of a data set, nearest neighbours, and a linear head trained on it.

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
import health
import models
import npu_config
import weights
from commands import UserError, flag
from devices.base import Device
from models import keras

# k is that of InstDisc (Wu et al., 2018, arXiv:1805.01978), T that of Lightly's benchmarks (InstDisc: 0.07).
NEIGHBOURS = 200
TEMPERATURE = 0.1
SIMILARITIES = 1 << 25  # similarities in memory at a time: 128 MiB


@dataclasses.dataclass(frozen=True)
class Config(npu_config.Options):
    """The settings of every command that works with a saved encoder: all are flags, saved with the result."""
    encoder: str = flag("resnet18", "The encoder f.", choices=sorted(models.ENCODERS))
    width_multiplier: float = flag(1.0, "The width that the encoder was made with.", low=1 / 64, high=8)
    stem: Optional[str] = flag(None, "Its first layers: cifar or imagenet. Default: what the weights file has; for random weights "
                               "cifar below 96 pixels, else imagenet.", choices=sorted(models.STEMS))
    encoder_weights: Optional[str] = flag(None, "A file of pretraining.py's, as f_online_200.h5; none: random ones, to compare with.")
    dataset: str = flag("cifar10", "The images. shapes is made by the program and needs no files; folder is "
                        "a folder of images.", choices=datasets.NAMES)
    data_dir: Optional[str] = flag(None, "Where the data set lies: CIFAR's batches folder or .tar.gz, or a "
                                   "folder of images.", alias="data_path")
    image_size: int = flag(32, "Height and width of the images (reference: 32).", low=8, high=1024)
    test_fraction: float = flag(0.1, "Of a folder without train/ and test/: the part kept for testing.", low=0, high=0.9)
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
        raise UserError("--encoder_weights is missing: give a file that pretraining.py wrote, such as "
                        "f_online_200.h5, or none for random weights.")
    device = npu_config.open_device(config, alone=True)
    device.set_seed(config.seed)
    if device.is_chief:
        commands.make_folder(config.output_dir)

    def say(text: str) -> None:
        if device.is_chief and not config.quiet:
            print(text, flush=True)

    if device.advice:
        say(device.advice)
    stem = config.stem or weights.stem_of(config.encoder_weights) or models.default_stem(config.image_size)
    with device.scope():
        encoder = models.ENCODERS[config.encoder](config.width_multiplier, norm=device.batch_norm, conv=device.convolution, stem=stem)
    if config.encoder_weights != "none":
        weights.load_weights(encoder, config.encoder_weights)
    return device, encoder, say


def load_data(config: Config, labelled: bool = True) -> Any:
    """The data set that the flags name, a datasets.Data. UserError if it is not to be had.

    labelled: UserError also if it has not the labels, classes and test images that a classifier needs.
    """
    data = datasets.load(config.dataset, config.data_dir, image_size=config.image_size,
                         test_fraction=config.test_fraction, cache_dir=config.output_dir)
    where = "The data set %s%s" % (config.dataset, " in %s" % config.data_dir if config.data_dir else "")
    if labelled and data.train_labels is None:
        raise UserError("%s has no labels; put its images into one folder for each class, as in DIR/cat/1.jpg." % where)
    if labelled and len(data.class_names) < 2:
        raise UserError("%s has %d class; a classifier needs two or more." % (where, len(data.class_names)))
    if labelled and not len(data.test_images):
        raise UserError("%s has no test images; give a --test_fraction above 0, or folders train/ and test/." % where)
    return data


def write_result(name: str, config: Config, device: Device, data: datasets.Data, started: float,
                 figures: Dict[str, Any]) -> Dict[str, Any]:
    """Write result_<name>.json into output_dir: the figures, on which data, by which flags, in which time. Gives the figures."""
    if device.is_chief:
        about = {"seconds": time.time() - started, "device": device.describe(),
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


def features(encoder: Any, images: Any, batch_size: int = 500, check: Callable[[], None] = lambda: None) -> np.ndarray:
    """What the encoder makes of images in inference mode: float32 (n, d), on the host.

    images: (n, s, s, 3), uint8 or float in [0, 1], an array or what datasets.Data holds. check: called between batches, to raise what
    ends it early. The last batch is filled up with black images, so that one graph serves all. UserError if a feature is not finite.
    """
    batch_size = max(1, min(batch_size, len(images)))
    batches = []
    for first in range(0, len(images), batch_size):
        check()
        batch = np.asarray(images[first:first + batch_size])
        filled = np.pad(batch, [(0, batch_size - len(batch))] + [(0, 0)] * 3, "constant")
        batches.append(inference(encoder, tf.constant(filled)))
    result = np.concatenate([batch.numpy() for batch in batches])[:len(images)]
    if not np.isfinite(result).all():
        raise UserError("The encoder gives features that are not finite numbers: its weights are of a run that failed, or too large "
                        "for the precision; try --precision_mode must_keep_origin_dtype.")
    return result


def knn_accuracy(train_features: np.ndarray, train_labels: np.ndarray, test_features: np.ndarray, test_labels: np.ndarray,
                 num_classes: int, k: int = NEIGHBOURS, temperature: float = TEMPERATURE) -> float:
    """The part of the test images whose class their k nearest training images tell.

    The weighted vote of InstDisc (arXiv:1805.01978, section 3.4): each neighbour votes for its class with exp(cosine / temperature).
    Of classes with equal votes the first wins. Features are float (n, d), labels integers (n,) in 0..num_classes-1. k is at most the
    number of training images. Works through the test images in blocks that bound the memory.
    """
    train, test = _normalised(train_features), _normalised(test_features)
    k = min(k, len(train))
    block = max(1, SIMILARITIES // len(train))
    correct = 0
    for first in range(0, len(test), block):
        similarities = test[first:first + block] @ train.T
        with tf.device("CPU:0"):  # several times faster than np.argpartition
            values, indices = tf.math.top_k(similarities, k, sorted=False)
        cosine, nearest = values.numpy().astype(np.float64), indices.numpy()
        weights = np.exp((cosine - cosine.max(axis=1, keepdims=True)) / temperature)
        rows = np.arange(len(nearest))[:, None]
        votes = np.bincount((rows * num_classes + train_labels[nearest]).ravel(), weights.ravel(), len(nearest) * num_classes)
        predicted = votes.reshape(-1, num_classes).argmax(axis=1)
        correct += int((predicted == test_labels[first:first + block]).sum())
    return correct / len(test)


def _normalised(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1, float32; a row of zeros stays one."""
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def knn_of_encoder(encoder: Any, data: Any, check: Callable[[], None] = lambda: None) -> float:
    """k-NN accuracy of an encoder on a labelled datasets.Data: test images by training images. check: as for `features`."""
    train, test = (features(encoder, images, check=check) for images in (data.train_images, data.test_images))
    return knn_accuracy(train, data.train_labels, test, data.test_labels, len(data.class_names))


@contextlib.contextmanager
def statistics_of(encoder: Any, images: Any, batches: int = 20, batch_size: int = 256) -> Iterator[None]:
    """Inside, BatchNorm's moving statistics of the encoder are those of some of these images, uint8 (n, s, s, 3), as for features.

    For an encoder that was never trained, whose statistics are still 0 and 1: its BatchNorm does nothing in inference mode.
    """
    before = [(weight, weight.numpy()) for weight in encoder.non_trainable_weights]
    forward = tf.function(lambda images: tf.reduce_sum(encoder(tf.cast(images, tf.float32) / 255.0, training=True)))
    for batch in range(batches):
        chosen = (batch + batches * np.arange(batch_size)) * len(images) // (batches * batch_size)  # a folder is sorted by class
        forward(tf.constant(np.asarray(images[chosen])))
    try:
        with models.settled(encoder, batches):
            yield
    finally:
        for weight, value in before:
            weight.assign(value)


class Classifier(tf.Module):
    """A linear head c on an encoder f, and the compiled loop that trains the head, or both, on labelled data.

    encoder: None where the loop is given features instead of images; width: the number of features. learning_rate: a function of the
    step, a scalar int64 tensor, for Adam. The loss is softmax cross-entropy. frozen: the encoder is used in inference mode and nothing
    of it changes, BatchNorm's moving statistics included.
    """

    def __init__(self, device: Device, encoder: Any, width: int, num_classes: int, learning_rate: Callable[[tf.Tensor], tf.Tensor],
                 label_smoothing: float, frozen: bool = True) -> None:
        super().__init__()
        self._device = device
        self._num_classes = num_classes
        self._label_smoothing = label_smoothing
        self.encoder = encoder
        self.frozen = frozen
        only_first = tf.VariableAggregation.ONLY_FIRST_REPLICA
        with device.scope():
            self.head = models.ClassificationHead(num_classes)
            self.head.build((None, width))
            self.step = tf.Variable(0, trainable=False, dtype=tf.int64, name="step", aggregation=only_first)
            # Of the latest step: loss, loss scale (0: none), how many steps were skipped up to it, and how many of these in a row.
            self.recent = tf.Variable(tf.zeros([4]), trainable=False, name="recent", aggregation=only_first)
            optimizers = getattr(keras.optimizers, "legacy", keras.optimizers)
            adam = optimizers.Adam(lambda: learning_rate(self.step))
            adam._create_all_weights(self.trained_weights)
            self.optimizer = device.loss_scaled(adam)
        device.broadcast(list(self.variables) + adam.variables())
        self._step = device.compile_step(self.train_step)
        self.train_loop = device.compile(self._train_loop)

    @property
    def trained_weights(self) -> Any:
        """What the optimiser changes."""
        return self.head.trainable_weights + ([] if self.frozen else self.encoder.trainable_weights)

    def _train_loop(self, iterator: Iterator[Any], n: tf.Tensor) -> None:
        """Take n steps (scalar int32) on the next n elements of the iterator: (images or features, labels).

        Returns nothing and uses no loop index: in this form the NPU takes the loop whole.
        """
        for _ in tf.range(n):
            x, labels = next(iterator)
            self._step(x, labels)

    @tf.autograph.experimental.do_not_convert
    def train_step(self, x: tf.Tensor, labels: tf.Tensor) -> None:
        """A step on images (b, s, s, 3) in [0, 1], or features (b, d), float32, with integer labels (b,)."""
        scale = self._device.loss_scale(self.optimizer)
        loss, = self._device.run(self._update, (x, labels))
        self.step.assign_add(1)
        with self._device.keep_float32():
            now, skipped = self._device.loss_scale(self.optimizer), self._device.skipped(self.optimizer, scale)
            self.recent.assign([loss, now, self.recent[2] + skipped, (self.recent[3] + 1) * skipped])

    def _update(self, x: tf.Tensor, labels: tf.Tensor) -> Tuple[tf.Tensor]:
        """One optimiser step. Gives the loss, a float32 scalar."""
        weights = self.trained_weights
        if self.frozen and self.encoder is not None:
            x = self.encoder(x, training=False)  # outside of the tape: it needs no gradient
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(weights)
            logits = self.head(x if self.frozen else self.encoder(x, training=True))
            with self._device.keep_float32():
                targets = tf.one_hot(tf.cast(labels, tf.int32), self._num_classes)
                targets = targets * (1 - self._label_smoothing) + self._label_smoothing / self._num_classes
                loss = tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(targets, logits))
                scaled = self._device.scale_loss(self.optimizer, loss)
        self._device.apply_gradients(self.optimizer, scaled, tape, weights)
        return loss,

    def train(self, batches: tf.data.Dataset, last_step: int, total_steps: int, steps_per_epoch: int, say: Say) -> None:
        """Take the steps 0..last_step - 1, of total_steps that a full run has, on the elements of `batches`.

        Tells how long it will take, and the loss at an epoch's end, at most once a second. UserError if that is not finite, or loss
        scaling has skipped a whole epoch.
        """
        step, calls, seconds_a_step, since = 0, 0, None, time.time()  # type: int, int, Optional[float], float
        say("Training for %d steps, %d an epoch..." % (last_step, steps_per_epoch))
        iterator = self._device.iterate(batches)
        while step < last_step:
            n = min(steps_per_epoch - step % steps_per_epoch, last_step - step)
            n = self._device.steps_a_call(n, seconds_a_step)
            self._device.set_loop_size(n)
            began = time.time()
            self.train_loop(iterator, tf.constant(n))
            loss, scale, skipped, in_a_row = self.recent.numpy().tolist()
            seconds_a_step = (time.time() - began) / n
            step, calls = step + n, calls + 1
            left = (last_step - step) * seconds_a_step
            if calls == 2 and left > 60:  # the first has compiled the loop as well
                say("About %d minutes are left." % round(left / 60))
            problem = health.bad_loss([loss], step) or health.without_effect(range(step - int(in_a_row) + 1, step + 1), step,
                                                                             steps_per_epoch, scale)
            if problem:
                raise UserError("%s; try a lower --learning_rate, or --precision_mode must_keep_origin_dtype." % problem)
            if step == last_step or step % steps_per_epoch == 0 and time.time() - since > 1:
                epoch, batch = (step - 1) // steps_per_epoch + 1, (step - 1) % steps_per_epoch + 1
                # Not in pretraining's words, Loss= and Time=, which ModelZoo's scripts look for in one log of both.
                say("[Epoch %d/%d Batch %d/%d] loss %.5f, %.2f s%s" % (epoch, total_steps // steps_per_epoch, batch, steps_per_epoch,
                                                                       loss, time.time() - since, health.told(scale, int(skipped))))
                since = time.time()

    def figures(self) -> Dict[str, float]:
        """Of the latest step: loss, and where it is scaled, loss_scale and how many steps were skipped."""
        loss, scale, skipped, _ = self.recent.numpy().tolist()
        return {"loss": loss, "loss_scale": scale, "skipped": skipped} if scale else {"loss": loss}

    def logits(self, features: np.ndarray) -> np.ndarray:
        """The head's answer to features (n, d): float32 (n, num_classes), computed on the host."""
        kernel, bias = (weight.numpy() for weight in self.head.trainable_weights)
        return features @ kernel + bias


def top_k_accuracy(logits: np.ndarray, labels: np.ndarray, k: int) -> float:
    """The part of the rows of logits (n, classes) whose label is among the k largest."""
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    return float(((logits > own).sum(axis=1) < k).mean())


def batch_size_for(batch_size: int, number: int, device: Device, say: Say) -> int:
    """The batch size, or where there are fewer images, the largest that they and the replicas allow."""
    if batch_size <= number:
        return batch_size
    smaller = max(1, number // device.replicas) * device.replicas
    say("There are %d images to train on, so a batch has %d instead of %d." % (number, smaller, batch_size))
    return smaller
