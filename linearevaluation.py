"""Linear evaluation of a pretrained encoder: how well does a linear classifier do on its features?

    python linearevaluation.py --encoder resnet18 --encoder_weights f_online_200.h5 --data_dir DIR

trains a linear head on the frozen encoder for 50 epochs of cropped and flipped images, as the reference does. The last line is the
accuracy over all test images, `Test Accuracy: 0.8692`; --output_dir gets result_linearevaluation.json. --cached_features computes the
features once and trains the head on them: minutes instead of hours on a CPU.
"""
import dataclasses
import functools
import time
from typing import Any, Dict, List, Optional, Tuple

import commands

# isort: split

import numpy as np
import tensorflow as tf

import classifiers
import datasets
import evaluation
import neighbours
import schedules
from commands import flag
from devices.base import Device

# Adam's rate falls from 5e-2 to 5e-4, by a polynomial of power 2 (reference).
POWER = 2.0
LAST_RATE = 0.01


@dataclasses.dataclass(frozen=True)
class Config(evaluation.Config):
    """The settings of a linear evaluation: each is a flag, saved with the result."""
    num_epochs: int = flag(50, "Epochs to train the head (reference: 50).", low=1, high=1000)
    batch_size: int = flag(512, "Images a step, over all devices (reference: 512).", low=1)
    learning_rate: float = flag(5e-2, "Of Adam at the start; it falls to a hundredth of it (reference: 5e-2 "
                                "to 5e-4, power 2).", low=0)
    label_smoothing: float = flag(0.1, "Of the training labels (ModelZoo README: 0.1; reference: 0).", low=0, high=1)
    cached_features: bool = flag(False, "Compute the features once and train the head on them.")
    augmented_copies: int = flag(
        0, "With --cached_features: train on the features of so many cropped and flipped copies of the "
        "images, in turn, one an epoch; 0: of the images as they are. With as many copies as epochs it is "
        "the full protocol. CIFAR-10 takes 100 MB a copy at width 1.", low=0)
    knn: bool = flag(False, "Tell the k-NN accuracy too (cosine, k = 200, temperature 0.1), in the line "
                     "before the last.")
    max_steps: Optional[int] = flag(None, "End in good order after so many steps; the schedule stays that of "
                                    "num_epochs.", low=1)


def evaluate(config: Config) -> Dict[str, Any]:
    """Train a linear head on a frozen encoder: all that the command does. Gives the figures of result_linearevaluation.json:
    test_accuracy, knn (with config.knn), loss, steps, seconds_of_training. UserError for what the user can mend.
    """
    started = time.monotonic()
    device, encoder, say = evaluation.start(config)
    data = evaluation.load_data(config, device, say)
    batch_size = evaluation.batch_size_for(config.batch_size, len(data.train_images), device, say)
    steps_per_epoch = len(data.train_images) // batch_size
    total_steps = steps_per_epoch * config.num_epochs
    last_step = min(total_steps, config.max_steps or total_steps)
    first, rows = device.rows(batch_size)

    plain = None  # type: Any
    if config.knn or config.cached_features and not config.augmented_copies:
        say("Computing the features of %d training images..." % len(data.train_images))
        plain = evaluation.features(encoder, data.train_images, size=config.image_size)
    if config.cached_features:
        copies = [(plain, data.train_labels)]  # type: Copies
        if config.augmented_copies:
            number = min(config.augmented_copies, config.num_epochs)
            copies = augmented_features(encoder, data, number, batch_size, config.seed, device, say, config.image_size)
        with device.host():
            batches = cached_batches(copies, batch_size, config.seed, last_step, first, rows)
    else:
        with device.host():
            batches = datasets.finetuning_batches(data.train_images, data.train_labels, batch_size,
                                                  config.seed, 0, last_step, first, rows, config.image_size)
    rate = functools.partial(schedules.polynomial, base=config.learning_rate, total_steps=total_steps,
                             end=LAST_RATE * config.learning_rate, power=POWER)
    classifier = classifiers.Classifier(device, None if config.cached_features else encoder, encoder.features,
                                        len(data.class_names), rate, config.label_smoothing)
    training = time.monotonic()
    classifier.train(batches, last_step, total_steps, steps_per_epoch, say)
    training = time.monotonic() - training

    say("Computing the features of %d test images..." % len(data.test_images))
    test = evaluation.features(encoder, data.test_images, size=config.image_size)
    figures = dict(classifier.figures(), test_accuracy=classifiers.top_k_accuracy(classifier.logits(test), data.test_labels, 1),
                   steps=last_step, seconds_of_training=training)
    if config.knn:
        figures["knn"] = neighbours.knn_accuracy(plain, data.train_labels, test, data.test_labels, len(data.class_names))
    if device.is_chief:
        if config.knn:
            print("k-NN Accuracy: %.4f" % figures["knn"])
        print("Test Accuracy: %.4f" % figures["test_accuracy"], flush=True)
    return evaluation.write_result("linearevaluation", config, device, data, started, figures)


Copies = List[Tuple[np.ndarray, np.ndarray]]


def augmented_features(encoder: Any, data: datasets.Data, number: int, batch_size: int, seed: int,
                       device: Device, say: evaluation.Say, size: Optional[int] = None) -> Copies:
    """Features and labels of what the first epochs of the full protocol would train on, a copy an epoch. size: of the views."""
    steps = len(data.train_images) // batch_size
    copies = []
    for epoch in range(number):
        say("Computing the features of augmented copy %d of %d..." % (epoch + 1, number))
        with device.host():
            iterator = iter(datasets.finetuning_batches(data.train_images, data.train_labels, batch_size,
                                                        seed, epoch * steps, (epoch + 1) * steps, size=size))
        batches = []
        for _ in range(steps):
            with device.host():
                images, labels = next(iterator)
            batches.append((evaluation.inference(encoder, images), labels))
        features, labels = (np.concatenate([part.numpy() for part in parts]) for parts in zip(*batches))
        copies.append((features, labels))
    return copies


def cached_batches(copies: Copies, batch_size: int, seed: int, last_step: int, first: int, rows: int) -> tf.data.Dataset:
    """The head's training as a pipeline: features (rows, d) float32 with labels (rows,), a batch a step.

    copies: features (n, d) and labels (n,) each. Epoch e goes through copy e modulo their number, in a fresh order, and drops what is
    left over. first, rows: which rows of each batch to give.
    """
    n = len(copies[0][0])
    steps_per_epoch = n // batch_size
    features, labels = (tf.constant(np.concatenate(part)) for part in zip(*copies))
    random = np.random.RandomState(seed)
    order = [epoch % len(copies) * n + random.permutation(n)[:steps_per_epoch * batch_size]
             for epoch in range(-(-last_step // steps_per_epoch))]
    indices = np.concatenate(order).reshape(-1, batch_size)[:last_step, first:first + rows].astype(np.int32)
    return datasets.map_elements(tf.data.Dataset.from_tensor_slices(indices),
                                 lambda chosen: (tf.gather(features, chosen), tf.gather(labels, chosen))).prefetch(4)


if __name__ == "__main__":
    commands.define_flags(Config)
    commands.run(lambda: evaluate(commands.from_flags(Config)))
