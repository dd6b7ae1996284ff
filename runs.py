"""What surrounds a training: the folder it is kept in, its log lines, evaluations, checkpoints, and the end.

pretraining.py calls it between two calls of the training loop. Nothing here is part of what the device computes.
"""
import collections
import contextlib
import dataclasses
import functools
import json
import os
import signal
import time
import zlib
from typing import Any, ContextManager, Iterator, Optional, Tuple

import commands  # before TensorFlow, whose start it quiets

# isort: split

import numpy as np
from absl import logging

import checkpoints
import datasets
import evaluation
import health
import models
import progress
import runfiles
import weights
from commands import UserError
from devices.base import Device

# Settings that a run may change when it is resumed: they do not change what is computed.
FREE = {"data_dir", "cache_dir", "output_dir", "device", "num_devices", "perf", "save_every", "log_every", "iterations_per_loop",
        "max_steps", "views_at_once", "save_checkpoints_steps", "keep_checkpoint_max", "knn_every", "resume", "overwrite", "quiet",
        "verbose", "jit_compile", "hcom_parallel", "over_dump", "over_dump_path", "data_dump_flag", "data_dump_step",
        "data_dump_path", "profiling", "profiling_dump_path", "auto_tune", "fusion_off_flag", "fusion_off_file", "check_npu",
        "npu_ops", "recipe"}
# Settings in which the workers of one run may differ.
LOCAL = {"data_dir", "cache_dir", "output_dir", "keep_checkpoint_max", "resume", "overwrite", "quiet", "verbose"}
MANY = 20000  # steps after which the files of all losses and figures are no longer written at each checkpoint


@dataclasses.dataclass(frozen=True)
class Result:
    """What a training has left.

    step: that it stands at. weights: the newest file of the encoder's weights, or None. history: losses of all batches, figures of the
    log lines, k-NN accuracies.
    """
    output_dir: str
    step: int
    weights: Optional[str]
    history: checkpoints.History

    @property
    def knn(self) -> Optional[float]:
        """The last k-NN accuracy, None if there was no evaluation."""
        return self.history.knn[-1]["accuracy"] if self.history.knn else None


@contextlib.contextmanager
def folder(path: str, device: Device) -> Iterator[None]:
    """Make the folder of a run and hold it for this process. Workers other than the chief neither write nor need it."""
    if not device.is_chief:
        yield
        return
    commands.make_folder(path)
    with checkpoints.only_run_in(path):
        yield


class Run:
    """One training in one folder.

    config: a pretraining.Config. UserError if the data set is smaller than a batch, or the folder holds another run.
    """

    def __init__(self, config: Any, device: Device, data: datasets.Data, shown: progress.Progress) -> None:
        self.config, self.device, self.data, self.shown = config, device, data, shown
        self.say = shown.say
        self.started = self.since = time.monotonic()
        self.steps_per_epoch = len(data.train_images) // config.batch_size
        if self.steps_per_epoch == 0:
            raise UserError("--batch_size %d is larger than the data set, which has %d training images."
                            % (config.batch_size, len(data.train_images)))
        self.total_steps = self.steps_per_epoch * config.num_epochs
        self.last_step = min(self.total_steps, config.max_steps or self.total_steps)
        self.loop_size = config.iterations_per_loop or config.log_every
        self.knn_every = device.knn_every if config.knn_every is None else config.knn_every
        self.images_crc = zlib.crc32(np.asarray(data.train_images[::len(data.train_images) // 1000 + 1]).tobytes())  # of some
        self.history = checkpoints.History()
        self.signals = commands.Signals()
        self.step = self.saved = self.logged = self.listed = 0  # steps taken; as of the newest checkpoint, log line, losses.txt
        self.seconds_a_step = None  # type: Optional[float]
        self.paces = collections.deque(maxlen=9)  # type: Deque[float]  # seconds a step, of the last lines
        if device.advice:
            self.say(device.advice)
        if device.is_chief:
            free = FREE | ({"num_epochs"} if config.lr_schedule == config.target_momentum_schedule == "constant" else set())
            settings = dict(dataclasses.asdict(config), train_images=len(data.train_images), images_crc=self.images_crc)
            checkpoints.claim_folder(config.output_dir, settings, free, config.resume, config.overwrite,
                                     dict(dataclasses.asdict(type(config)()), stem="cifar"))

    def path(self, name: str) -> str:
        return os.path.join(self.config.output_dir, name)

    # Before the first step

    def agree(self) -> None:
        """UserError if the workers were not all started with the same settings and data, on which they would go apart."""
        settings = {name: value for name, value in dataclasses.asdict(self.config).items() if name not in LOCAL}
        text = json.dumps([settings, self.total_steps, self.images_crc], sort_keys=True)
        if len(set(self.device.gather(zlib.crc32(text.encode())))) > 1:
            raise UserError("The workers were not all started with the same flags and data; give each the same.")

    def resume(self, learner: Any) -> None:
        """Go on from the newest checkpoint if there is one, with the networks of `learner`, a pretraining.Byol."""
        self.learner = learner
        restored = None
        if self.device.restores:
            self.checkpoints = checkpoints.Checkpoints(self.path("checkpoints"), learner.state(), self.history,
                                                       self.config.keep_checkpoint_max)
            # With --noresume there is none once the chief has cleared the folder, for which the other workers do not wait.
            restored = self.checkpoints.restore() if self.config.resume else None
        learner.broadcast()
        self.step = self.saved = self.logged = int(learner.step.numpy())
        if restored:
            self.say("Resuming from step %d of %d (%s)." % (self.step, self.total_steps, restored))
        if self.device.is_chief:
            self.curves = progress.Curves(self.path("logs"), self.step)
            if self.step == 0:
                png, height, width = progress.views_png(self.data.train_images, self.config.seed, self.config.views(),
                                                        self.device.host())
                commands.write_atomically(self.path("views.png"), png)
                self.curves.image(0, "views", png, height, width)
        with self._settled():
            self._evaluate_knn()
        self.since = time.monotonic()

    # Between two calls of the loop

    def goes_on(self) -> bool:
        """Whether there is another step to take: the end is not reached, and no worker has had a signal."""
        return self.step < self.last_step and not self._stopped()

    def _stopped(self) -> bool:
        """Whether a worker has had a signal; all note it, so that they stop after the same step."""
        if self.shown.broken and not self.signals.number:  # nobody reads what is printed any more, as after `| head`
            self.signals.number = signal.SIGPIPE
        known = int(max(self.device.gather(self.signals.number or 0)))
        if known:  # else one that came meanwhile stays noted for the next time
            self.signals.number = known
        return known > 0

    def steps_to_take(self) -> int:
        """How many steps the next call of the loop takes: up to the next log line, checkpoint or end, whichever is first."""
        batch = self.step % self.steps_per_epoch
        n = min(self.loop_size, self.config.log_every - batch % self.config.log_every, self.steps_per_epoch - batch,
                self.config.save_checkpoints_steps - self.step % self.config.save_checkpoints_steps, self.last_step - self.step)
        return self.device.steps_a_call(n, self.seconds_a_step)

    def took(self, recent: np.ndarray, seconds: float) -> None:
        """Note the steps that a call of the loop took in so many seconds; print, evaluate and save what is due after them.

        recent: (4, n), of each of them loss, spread, loss scale (0: none), and whether it was skipped.
        """
        self.history.skipped += [self.step + 1 + int(i) for i in np.flatnonzero(recent[3])]
        self.step += recent.shape[1]
        self.seconds_a_step = seconds / recent.shape[1]
        self.history.losses += [float(loss) for loss in recent[0]]
        epoch, batch = self._epoch_and_batch()
        self.shown.step(self.step, self.last_step, "%d/%d" % (epoch, self.config.num_epochs), self.history.losses[-1],
                        self.config.batch_size, self.history.knn[-1]["accuracy"] if self.history.knn else None)
        if batch % self.config.log_every == 0:
            self._log(*[float(figure) for figure in recent[:3, -1]])
        if batch == self.steps_per_epoch:
            self._stop_for(health.without_effect(self.history.skipped, self.step, self.steps_per_epoch, float(recent[2, -1])))
        if batch == self.steps_per_epoch or self.step % self.config.save_checkpoints_steps == 0:
            self._check_finite()
            if batch == self.steps_per_epoch:
                with self._settled():
                    if epoch % self.config.save_every == 0 or self.step == self.last_step:
                        self._save_weights("f_online_%d.h5" % epoch)
                    self._evaluate_knn()
            self._save()
            self.since, self.logged = time.monotonic(), self.step

    def _settled(self) -> ContextManager[None]:
        """For what is evaluated or saved: each step has updated BatchNorm's statistics, if they began at 0 and 1, once a view."""
        return models.settled(self.learner.f_online, 0 if self.config.encoder_weights else self.config.num_views * self.step)

    def _epoch_and_batch(self) -> Tuple[int, int]:
        """Of the step that was taken last, both counted from 1."""
        return (self.step - 1) // self.steps_per_epoch + 1, (self.step - 1) % self.steps_per_epoch + 1

    def _log(self, loss: float, spread: float, scale: float = 0) -> None:
        """The known line, and after it what else is worth knowing."""
        self._check_finite(weights=False)  # reading them all is for when they are saved
        (epoch, batch), seconds = self._epoch_and_batch(), time.monotonic() - self.since
        self.paces.append(seconds / (self.step - self.logged))
        images_a_second = self.config.batch_size / self.paces[-1]
        left = int((self.last_step - self.step) * np.median(self.paces))  # of which a pause or a busy moment is no part
        skipped = len(self.history.skipped)
        self.say("[Epoch %d/%d Batch %d/%d] Loss=%.5f. Time=%.2f, %.1f images/s, spread %.4f, %d:%02d:%02d left"
                 % (epoch, self.config.num_epochs, batch, self.steps_per_epoch, loss, seconds, images_a_second, spread,
                    left // 3600, left // 60 % 60, left % 60)
                 + health.told(scale, skipped))
        figures = {"loss": loss, "spread": spread, "images_per_second": images_a_second,
                   "learning_rate": float(self.learner.schedule(self.step))}
        if scale:
            figures.update(loss_scale=scale, skipped=skipped)
        self.history.log.append(dict(figures, step=self.step, time=time.time()))
        if self.device.is_chief:
            self.curves.scalars(self.step, figures)
        for warning in (health.overflowing(self.history.skipped, self.step, scale),
                        health.collapsed(spread, self.learner.g_online.features, self.step)):
            if warning:
                logging.warning("%s", warning)
        self.since, self.logged = time.monotonic(), self.step

    def _check_finite(self, weights: bool = True) -> None:
        """UserError if a loss since the last look, or a weight now, is not a finite number; none of it has been saved then."""
        what = health.bad_loss(self.history.losses[-self.steps_per_epoch:], self.step)
        if not what and weights and not checkpoints.all_finite(self.learner.f_online):
            what = "The weights after step %d are not finite" % self.step
        self._stop_for(what)

    def _stop_for(self, what: Optional[str]) -> None:
        """UserError if there is something wrong."""
        if what:
            kept = "its last good checkpoint is kept in %s" % self.path("checkpoints") if self.saved else "there was no checkpoint yet"
            raise UserError("%s, so the run stops; %s. Try a lower --learning_rate, or --precision_mode must_keep_origin_dtype."
                            % (what, kept))

    def _save_weights(self, name: str) -> None:
        if self.device.is_chief:
            weights.save_weights(self.learner.f_online, self.path(name))
        self.say("Weights of f saved.")

    def _evaluate_knn(self) -> None:
        """At an epoch's end where it is due, classify the test images by the features of their nearest training images."""
        epoch, batch = divmod(self.step, self.steps_per_epoch)
        due = batch == 0 and (self.knn_every and epoch % self.knn_every == 0 or self.step == self.last_step)
        done = any(figures["step"] == self.step for figures in self.history.knn)
        if not due or done or self.data.train_labels is None or not len(self.data.test_images):
            return
        self.shown.wait("Evaluating the encoder by k-NN on %d test images" % len(self.data.test_images))
        size = self.config.image_size
        knn = functools.partial(evaluation.knn_of_encoder, self.learner.f_online, self.data, self.signals.check, size)
        try:
            accuracy = knn()
            besides = ""
            if self.step == 0 and not self.config.encoder_weights:
                with evaluation.statistics_of(self.learner.f_online, self.data.train_images, size=size):
                    besides = " (%.4f with BatchNorm's statistics of these images)" % knn()
        except commands.Stopped:  # the run that goes on from here makes up for it
            return
        self.history.knn.append({"epoch": epoch, "step": self.step, "accuracy": accuracy})
        if self.device.is_chief:
            self.curves.scalars(self.step, {"knn_accuracy": accuracy})
        self.say("[Epoch %d/%d] k-NN accuracy=%.4f%s" % (epoch, self.config.num_epochs, accuracy, besides))

    def _save(self) -> None:
        """Checkpoint, losses and figures, as of this step."""
        if self.device.is_chief:
            self.checkpoints.save(self.step)
            if self.step < MANY or self.step - self.listed > self.listed // 20:  # else it would be most of a very long run's work
                self._write_losses()
        self.saved = self.step

    def _write_losses(self) -> None:
        if self.device.is_chief and self.listed != self.step:
            self.listed = self.step
            with commands.atomic_path(self.path("losses.txt")) as temporary, open(temporary, "w") as file:
                file.writelines("%.9g\n" % loss for loss in self.history.losses)
            commands.write_json(self.path("metrics.json"), {"log": self.history.log, "knn": self.history.knn})

    # The end

    def finish(self) -> Result:
        """Save what is not saved yet, wait for the other workers, and sum up. Stopped if a signal has ended the run."""
        epoch, batch = divmod(self.step, self.steps_per_epoch)
        if self.saved != self.step:
            self._check_finite()
            self._save()
        self._write_losses()  # which a run that was killed after its last checkpoint has not done, nor a very long one
        if self.step and not self._stopped():  # the end, of all epochs or that --max_steps asked for
            name = "f_online_step_%d.h5" % self.step if batch else "f_online_%d.h5" % epoch
            if not os.path.exists(self.path(name)):
                with self._settled():
                    self._save_weights(name)
        self.device.wait_for_all()  # one that has left would be taken for dead
        if self.signals.number:
            self.say("Stopped by %s at step %d; the same command goes on from there."
                     % (signal.Signals(self.signals.number).name, self.step))
        else:
            self._compare()
        newest = runfiles.newest_weights(self.config.output_dir, self.steps_per_epoch) if self.device.is_chief else None
        result = Result(self.config.output_dir, self.step, newest, self.history)
        if self.device.is_chief:
            log, seconds = self.history.log, time.monotonic() - self.started
            commands.write_result(self.path("result.json"), {
                "steps": self.step, "loss": self.history.losses[-1] if self.history.losses else None,
                "spread": log[-1]["spread"] if log else None, "knn": result.knn,
                "seconds": seconds, "device": self.device.describe(), "config": dataclasses.asdict(self.config)})
        self.signals.check()
        return result

    def _compare(self) -> None:
        """Tell what training did to the k-NN accuracy, where it was evaluated before and after, and if nothing, that too."""
        knn = self.history.knn
        if len(knn) < 2 or knn[0]["step"] > 0:
            return
        before, after = knn[0]["accuracy"], knn[-1]["accuracy"]
        told = health.not_risen(before, after, random_start=not self.config.encoder_weights)
        self.say("k-NN accuracy was %.4f before training and is %.4f now.%s" % (before, after, " " + told if told else ""))
