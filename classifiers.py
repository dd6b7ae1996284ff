"""A linear head on an encoder, and the compiled loop that trains the head alone, or both, on labelled images."""
import time
from typing import Any, Callable, Dict, Iterator, Tuple

import numpy as np
import tensorflow as tf

import health
import models
from commands import UserError
from devices.base import Device
from evaluation import Say
from models import keras


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
        self._device.apply_gradients(self.optimizer, tape.gradient(scaled, weights), weights)
        return loss,

    def train(self, batches: tf.data.Dataset, last_step: int, total_steps: int, steps_per_epoch: int, say: Say) -> None:
        """Take the steps 0..last_step - 1, of total_steps that a full run has, on the elements of `batches`.

        Tells how long it will take, and the loss at an epoch's end, at most once a second. UserError if that is not finite, or loss
        scaling has skipped a whole epoch.
        """
        step, calls, seconds_a_step, since = 0, 0, None, time.monotonic()  # type: int, int, Optional[float], float
        say("Training for %d steps, %d an epoch..." % (last_step, steps_per_epoch))
        iterator = self._device.iterate(batches)
        while step < last_step:
            n = min(steps_per_epoch - step % steps_per_epoch, last_step - step)
            n = self._device.steps_a_call(n, seconds_a_step)
            self._device.set_loop_size(n)
            began = time.monotonic()
            self.train_loop(iterator, tf.constant(n))
            loss, scale, skipped, in_a_row = self.recent.numpy().tolist()
            seconds_a_step = (time.monotonic() - began) / n
            step, calls = step + n, calls + 1
            left = (last_step - step) * seconds_a_step
            if calls == 2 and left > 60:  # the first has compiled the loop as well
                say("About %d minutes are left." % round(left / 60))
            problem = health.bad_loss([loss], step) or health.without_effect(range(step - int(in_a_row) + 1, step + 1), step,
                                                                             steps_per_epoch, scale)
            if problem:
                raise UserError("%s; try a lower --learning_rate, or --precision_mode must_keep_origin_dtype." % problem)
            if step == last_step or step % steps_per_epoch == 0 and time.monotonic() - since > 1:
                epoch, batch = (step - 1) // steps_per_epoch + 1, (step - 1) % steps_per_epoch + 1
                # Not in pretraining's words, Loss= and Time=, which ModelZoo's scripts look for in one log of both.
                seconds, since = time.monotonic() - since, time.monotonic()
                say("[Epoch %d/%d Batch %d/%d] loss %.5f, %.2f s%s" % (epoch, total_steps // steps_per_epoch, batch, steps_per_epoch,
                                                                       loss, seconds, health.told(scale, int(skipped))))

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
