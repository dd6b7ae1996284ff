"""Transfer learning: train a classifier on labelled images, from a pretrained encoder or from scratch.

    python finetuning.py --encoder_weights f_online_200.h5 --label_fraction 0.1 --data_dir DIR
    python finetuning.py --encoder_weights none --label_fraction 0.1 --data_dir DIR

The difference between the two is what pretraining brings. The last line is the accuracy over all test images, `Test Accuracy: 0.8692`;
--output_dir gets result_finetuning.json, confusion_matrix.png, c_finetuned.h5 (the classification head's weights) and, without
--freeze, f_finetuned.h5 (the encoder's, for embed.py or to go on from).
"""
import dataclasses
import functools
import importlib.util
import os
import time
from typing import Any, Dict, List, Optional, Sequence

import commands

# isort: split

import numpy as np
from absl import logging

import charts
import classifiers
import datasets
import evaluation
import models
import schedules
import weights
from commands import UserError, flag

EPOCHS = 50
FEWEST_STEPS = 1000  # unless told otherwise: BatchNorm's moving statistics, momentum 0.99, need some hundreds


@dataclasses.dataclass(frozen=True)
class Config(evaluation.Config):
    """The settings of a fine-tuning: each is a flag, saved with the result."""
    freeze: bool = flag(False, "Train the classification head only; the encoder stays as it is, BatchNorm's "
                        "statistics included.")
    label_fraction: float = flag(1.0, "The part of the training images to use, drawn by --seed evenly over "
                                 "the classes, at least one a class; what 0.01 draws is in what 0.1 draws.",
                                 low=0, high=1)
    num_epochs: Optional[int] = flag(None, "Epochs of the images in use. Default: 50, or as many as make "
                                     "1,000 steps.", low=1)
    batch_size: int = flag(128, "Images a step, over all devices.", low=1)
    learning_rate: float = flag(1e-3, "Of Adam at the start; it falls to 0 by half a cosine.", low=0)
    label_smoothing: float = flag(0.0, "Of the training labels.", low=0, high=1)
    max_steps: Optional[int] = flag(None, "End in good order after so many steps; the schedule stays that of "
                                    "num_epochs.", low=1)


def finetune(config: Config) -> Dict[str, Any]:
    """Train a classifier on labelled images: all that the command does. Gives the figures of result_finetuning.json: test_accuracy,
    test_accuracy_top5 (of more than 5 classes), labels, loss, steps, epochs, per_class, confusion. UserError for what the user can
    mend.
    """
    started = time.monotonic()
    device, encoder, say = evaluation.start(config)
    data = evaluation.load_data(config, device, say)
    images, labels = data.train_images, data.train_labels
    if config.label_fraction < 1:
        chosen = choose(labels, config.label_fraction, config.seed)
        images, labels = images.take(chosen, axis=0), labels[chosen]
    say("Training on %d of %d labelled images of %d classes." % (len(labels), len(data.train_labels), len(data.class_names)))

    batch_size = evaluation.batch_size_for(config.batch_size, len(labels), device, say)
    steps_per_epoch = len(labels) // batch_size
    num_epochs = config.num_epochs or max(EPOCHS, -(-FEWEST_STEPS // steps_per_epoch))
    total_steps = steps_per_epoch * num_epochs
    last_step = min(total_steps, config.max_steps or total_steps)
    first, rows = device.rows(batch_size)
    with device.host():
        batches = datasets.finetuning_batches(images, labels, batch_size, config.seed, 0, last_step, first, rows, config.image_size)
    rate = functools.partial(schedules.cosine, base=config.learning_rate, total_steps=total_steps)
    classifier = classifiers.Classifier(device, encoder, encoder.features, len(data.class_names), rate,
                                        config.label_smoothing, frozen=config.freeze)
    classifier.train(batches, last_step, total_steps, steps_per_epoch, say)
    say("Classifying %d test images..." % len(data.test_images))
    # From scratch, BatchNorm's statistics started from 0 and 1; those of a file are of its training.
    updates = last_step if config.encoder_weights == "none" and not config.freeze else 0
    with models.settled(encoder, updates):
        if device.is_chief:
            weights.save_weights(classifier.head, os.path.join(config.output_dir, "c_finetuned.h5"))
            if not config.freeze:
                weights.save_weights(encoder, os.path.join(config.output_dir, "f_finetuned.h5"))
        logits = classifier.logits(evaluation.features(encoder, data.test_images, size=config.image_size))
    counts = confusion(data.test_labels, logits.argmax(axis=1), len(data.class_names))
    figures = dict(classifier.figures(), test_accuracy=classifiers.top_k_accuracy(logits, data.test_labels, 1), labels=len(labels),
                   steps=last_step, epochs=num_epochs, per_class=per_class(counts, data.class_names), confusion=counts.tolist())
    if len(data.class_names) > 5:
        figures["test_accuracy_top5"] = classifiers.top_k_accuracy(logits, data.test_labels, 5)
    evaluation.write_result("finetuning", config, device, data, started, figures)
    if device.is_chief:
        say(table(figures["per_class"]))
        draw_confusion(counts, data.class_names, os.path.join(config.output_dir, "confusion_matrix.png"))
        if "test_accuracy_top5" in figures:
            print("Test Accuracy Top-5: %.4f" % figures["test_accuracy_top5"])
        print("Test Accuracy: %.4f" % figures["test_accuracy"], flush=True)
    return figures


def choose(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Indices of the given part of each class, at least one image a class: sorted int64.

    UserError for a fraction of 0.
    """
    if fraction <= 0:
        raise UserError("--label_fraction is %g; it must be above 0 and at most 1." % fraction)
    order = np.random.RandomState(seed).permutation(len(labels))
    chosen = []
    for label in np.unique(labels):
        mine = order[labels[order] == label]
        chosen.append(mine[:max(1, round(fraction * len(mine)))])
    return np.sort(np.concatenate(chosen))


def confusion(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """How many images of class i (row) were taken for class j (column): int64 (num_classes, num_classes)."""
    pairs = np.bincount(labels * num_classes + predicted, minlength=num_classes ** 2)
    return pairs.reshape(num_classes, num_classes)


def per_class(counts: np.ndarray, names: Sequence[str]) -> List[Dict[str, Any]]:
    """The figures of each class, from a confusion matrix.

    images: of the class; accuracy: the part of them that was recognised (also called recall); precision: the part of what was taken
    for the class that is of it. None where there is nothing to divide by.
    """
    return [{"class": name, "images": int(images),
             "accuracy": float(correct / images) if images else None,
             "precision": float(correct / taken) if taken else None}
            for name, correct, images, taken in zip(names, counts.diagonal(), counts.sum(axis=1),
                                                    counts.sum(axis=0))]


def table(rows: Sequence[Dict[str, Any]]) -> str:
    """The figures of each class as lines of text."""
    width = max(len(row["class"]) for row in rows)
    lines = ["%-*s  images  accuracy  precision" % (width, "")]
    for row in rows:
        accuracy, precision = ("-" if part is None else "%.4f" % part for part in (row["accuracy"], row["precision"]))
        lines.append("%-*s  %6d  %8s  %9s" % (width, row["class"], row["images"], accuracy, precision))
    return "\n".join(lines)


def draw_confusion(counts: np.ndarray, names: Sequence[str], path: str) -> None:
    """Draw the confusion matrix as a PNG, each row as parts of its class. Without matplotlib a warning."""
    if importlib.util.find_spec("matplotlib") is None:
        logging.warning("No picture of the confusion matrix, whose numbers are in result_finetuning.json; "
                        "for one: pip install matplotlib.")
        return
    from matplotlib.figure import Figure

    parts = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    n = len(names)
    side = 2.5 + min(0.45 * n, 15)
    figure = Figure(figsize=(side + 0.8, side), dpi=120)
    axes = figure.add_subplot()
    picture = axes.imshow(parts, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axes, fraction=0.046, pad=0.03, label="part of the class")
    size = 9 if n <= 20 else 5
    axes.set_xticks(range(n))
    axes.set_yticks(range(n))
    labels = [charts.plain(name) for name in names]
    axes.set_xticklabels(labels, rotation=90, fontsize=size)
    axes.set_yticklabels(labels, fontsize=size)
    axes.set_xlabel("taken for")
    axes.set_ylabel("class")
    if n <= 20:  # beyond, numbers could not be read
        for i in range(n):
            for j in range(n):
                axes.text(j, i, "%d" % counts[i, j], ha="center", va="center", fontsize=7,
                          color="white" if parts[i, j] > 0.5 else "black")
    with commands.atomic_path(path) as temporary:
        figure.savefig(temporary, bbox_inches="tight")


if __name__ == "__main__":
    commands.define_flags(Config)
    commands.run(lambda: finetune(commands.from_flags(Config)))
