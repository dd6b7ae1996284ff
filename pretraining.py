"""Pretrain an image encoder by BYOL (arXiv:2006.07733).

    python pretraining.py --encoder resnet18 --num_epochs 200 --batch_size 512 --data_dir DIR

trains on CIFAR-10 and writes into --output_dir: f_online_<epoch>.h5 (the encoder's weights), losses.txt (every batch's
loss), config.json (these settings), metrics.json and result.json (figures), checkpoints/ (to go on from: start the same
command again), logs/ (curves for TensorBoard) and views.png (what the networks are shown). `python report.py DIR` makes
a page of it all. Without data: --dataset shapes.
"""
import contextlib
import dataclasses
import functools
import json
import math
import os
import signal
import sys
import time
import zlib
from typing import Any, Dict, Iterator, List, Optional, Tuple

import commands  # before TensorFlow, whose start it quiets

# isort: split

import numpy as np
import tensorflow as tf
from absl import logging

import checkpoints
import datasets
import evaluation
import losses
import models
import npu_config
import progress
import schedules
from commands import UserError, flag
from devices import graph_check
from devices.base import Device
from models import keras

# Warn below this fraction of the spread that evenly spread projections have; slow healthy runs were seen at 0.4 and above.
COLLAPSED = 0.05


@dataclasses.dataclass(frozen=True)
class Config(npu_config.Options):
    """The settings of a run: each is a flag, and all are saved as config.json."""
    encoder: str = flag("resnet18", "The encoder f (reference and ModelZoo).", choices=sorted(models.ENCODERS))
    width_multiplier: float = flag(1.0, "Scales the encoder's filters; 0.25 makes it sixteen times cheaper.", low=1 / 64)
    dataset: str = flag("cifar10", "What to train on. shapes is made by the program and needs no files; folder is a folder of "
                        "images.", choices=datasets.NAMES)
    data_dir: Optional[str] = flag(None, "Where the data set lies: CIFAR's batches folder or .tar.gz, or a folder of images.",
                                   alias="data_path")
    image_size: int = flag(32, "Height and width of the images (reference: 32).", low=8)
    test_fraction: float = flag(0.1, "Of a folder without train/ and test/: the part kept for testing.", low=0, high=0.9)
    output_dir: str = flag(".", "Where results go.", alias="model_dir")
    num_epochs: int = flag(200, "Epochs to train (ModelZoo README: 200).", low=1)
    batch_size: int = flag(512, "Images a step, over all devices (reference: 512).", low=2)
    learning_rate: float = flag(1e-3, "For a batch of 512; scaled by batch_size / 512 (reference: 0.001).", low=0)
    lr_schedule: str = flag("cosine", "cosine to 0 over the run (ModelZoo README), or constant (reference).",
                            choices=sorted(schedules.LEARNING_RATES))
    momentum: float = flag(0.9, "Adam's beta_1 (ModelZoo README: 0.9).", low=0, high=0.9999)
    weight_decay: float = flag(1e-4, "Decoupled, on kernels only, times the learning rate (ModelZoo README: 1e-4; reference: 0).",
                               low=0)
    target_momentum: float = flag(0.99, "The target keeps this much of itself at each step (reference: 0.99).", low=0, high=1)
    save_every: int = flag(100, "Epochs between weight files (reference: 100); one is written at the end as well.", low=1)
    log_every: int = flag(10, "Batches between log lines (reference: 10).", low=1, alias="log_step_count_steps")
    iterations_per_loop: Optional[int] = flag(
        None, "Steps that the device takes between returns to the host, NPU: exactly, others: at most. Default: log_every, "
        "which must be a multiple of it, and so must save_checkpoints_steps.", low=1)
    save_checkpoints_steps: int = flag(5000, "Steps between checkpoints (ModelZoo README: 5000); each epoch's end has one too.",
                                       low=1)
    keep_checkpoint_max: int = flag(5, "Checkpoints kept (ModelZoo README: 5).", low=1)
    knn_every: Optional[int] = flag(None, "Epochs between k-NN evaluations of the online encoder, the first before training; 0: "
                                    "only at the end. Default: 0 on CPU, else 10.", low=0)
    seed: int = flag(0, "Of initial weights, order and views: the same seed gives the same run.", low=0, high=2 ** 31 - 1)
    max_steps: Optional[int] = flag(None, "End in good order after so many steps of the run; schedules stay those of num_epochs.",
                                    low=1)
    resume: bool = flag(True, "Go on from the newest checkpoint in output_dir, if there is one. --noresume starts anew.")
    overwrite: bool = flag(False, "With --noresume: overwrite the results of an earlier run.")
    quiet: bool = flag(False, "Print warnings and errors only.")
    verbose: bool = flag(False, "Print what TensorFlow and the device say, too.")
    check_npu: bool = flag(False, "Train nothing: tell from its graph whether an Ascend 910 can take the training loop whole.")
    npu_ops: Optional[str] = flag(None, "For --check_npu: a file with the TensorFlow operators that the device has, one name a line, "
                                  "# for comments. Without it names are not checked.")


# Settings that a run may change when it is resumed: they do not change what is computed.
FREE = {"data_dir", "output_dir", "device", "num_devices", "save_every", "log_every", "iterations_per_loop", "max_steps",
        "save_checkpoints_steps", "keep_checkpoint_max", "knn_every", "resume", "overwrite", "quiet", "verbose", "jit_compile",
        "hcom_parallel", "over_dump", "over_dump_path", "data_dump_flag", "data_dump_step", "data_dump_path", "profiling",
        "profiling_dump_path", "auto_tune", "fusion_off_flag", "fusion_off_file", "check_npu", "npu_ops"}
# Settings in which the workers of one run may differ.
LOCAL = {"data_dir", "output_dir", "keep_checkpoint_max", "resume", "overwrite", "quiet", "verbose"}


class AdamW(getattr(keras.optimizers, "legacy", keras.optimizers).Adam):  # type: ignore[misc]
    """Adam with decoupled weight decay (arXiv:1711.05101) on weights of rank 2 and more, which are the kernels:

        w <- w - learning_rate * weight_decay * w, then Adam's own step, whose gradient knows nothing of it.
    """

    def __init__(self, weight_decay: float, **settings: Any) -> None:
        super().__init__(name="Adam", **settings)
        self._weight_decay = weight_decay

    def _prepare_local(self, var_device: str, var_dtype: Any, apply_state: Any) -> None:
        super()._prepare_local(var_device, var_dtype, apply_state)
        state = apply_state[(var_device, var_dtype)]
        state["decay"] = state["lr_t"] * self._weight_decay

    def _resource_apply_dense(self, grad: tf.Tensor, var: tf.Variable, apply_state: Any = None) -> Any:
        if self._weight_decay and var.shape.rank > 1:
            decay = apply_state[(var.device, var.dtype.base_dtype)]["decay"]
            with tf.control_dependencies([var.assign_sub(decay * var)]):
                return super()._resource_apply_dense(grad, var, apply_state)
        return super()._resource_apply_dense(grad, var, apply_state)


class Byol(tf.Module):
    """The networks, the optimiser and the compiled loop that trains them: the whole training state, in Variables.

    loop_size: the most steps that one call of `train_loop` will take.
    """

    def __init__(self, config: Config, device: Device, total_steps: int, loop_size: int) -> None:
        super().__init__()
        self._config = config
        self._device = device
        make_encoder = functools.partial(models.ENCODERS[config.encoder], config.width_multiplier, norm=device.batch_norm,
                                         conv=device.convolution)
        make_head = functools.partial(models.ProjectionHead, norm=device.batch_norm)
        base = schedules.scaled_learning_rate(config.learning_rate, config.batch_size)
        self.schedule = functools.partial(schedules.LEARNING_RATES[config.lr_schedule], base=base, total_steps=total_steps)
        with device.scope():
            self.f_online, self.g_online, self.q_online = make_encoder(), make_head(), make_head()
            self.f_target, self.g_target = make_encoder(), make_head()
            for head, width in ((self.g_online, self.f_online.features), (self.q_online, self.g_online.features),
                                (self.g_target, self.f_target.features)):
                head.build((None, width))
            self.step = tf.Variable(0, trainable=False, dtype=tf.int64, name="step",
                                    aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA)
            optimizer = AdamW(config.weight_decay, learning_rate=lambda: self.schedule(self.step), beta_1=config.momentum)
            optimizer._create_all_weights(self.online_weights)  # now, so that a checkpoint finds them all
            self.optimizer = device.loss_scaled(optimizer)
            # (2, loop_size): loss and spread of the latest steps, the newest last. The loop shifts them in, since the NPU
            # carries nothing but Variables from step to step, not even the loop's index.
            self.recent = tf.Variable(tf.zeros([2, loop_size]), trainable=False, name="recent",
                                      aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA)
        self.train_loop = device.compile(self._train_loop)  # type: Any

    @property
    def online_weights(self) -> List[tf.Variable]:
        """What the optimiser trains: the trainable weights of f, g and q."""
        return [weight for network in (self.f_online, self.g_online, self.q_online) for weight in network.trainable_weights]

    def state(self) -> Dict[str, Any]:
        """What a checkpoint must hold."""
        names = ("f_online", "g_online", "q_online", "f_target", "g_target", "optimizer", "step")
        return {name: getattr(self, name) for name in names}

    def broadcast(self) -> None:
        """Give every worker the chief's weights, statistics and optimiser slots."""
        scale = getattr(self.optimizer, "_loss_scale", None)  # type: Any
        scaling = [scale.current_loss_scale, scale.counter] if hasattr(scale, "counter") else []  # not if it is fixed
        self._device.broadcast(list(self.variables) + self.optimizer.variables() + scaling)

    def _train_loop(self, iterator: Iterator[Any], n: tf.Tensor) -> None:
        """Take n steps (scalar int32) on the next n elements of the iterator, each (x1, x2).

        Returns nothing and uses no loop index: in this form the NPU takes the loop whole. Results are in `recent`.
        """
        for _ in tf.range(n):
            x1, x2 = next(iterator)
            self.train_step_pretraining(x1, x2)

    @tf.autograph.experimental.do_not_convert  # plain Python: saves the conversion's time at every start
    def train_step_pretraining(self, x1: tf.Tensor, x2: tf.Tensor) -> None:
        """One step on two views, each (b, s, s, 3) float32 in [0, 1]: the online networks, then the target's average."""
        loss, spread = self._device.run(self._update_online, (x1, x2))
        self._update_target()
        self.step.assign_add(1)
        self.recent.assign(tf.concat([self.recent[:, 1:], [[loss], [spread]]], axis=1))

    def _update_online(self, x1: tf.Tensor, x2: tf.Tensor) -> Tuple[tf.Tensor, tf.Tensor]:
        """One optimiser step on f, g and q, and the moving statistics of all. Gives loss and spread, float32 scalars."""
        z1 = self.g_target(self.f_target(x1, training=True), training=True)
        z2 = self.g_target(self.f_target(x2, training=True), training=True)
        weights = self.online_weights
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(weights)
            p1 = self.q_online(self.g_online(self.f_online(x1, training=True), training=True), training=True)
            p2 = self.q_online(self.g_online(self.f_online(x2, training=True), training=True), training=True)
            with self._device.keep_float32():
                loss = losses.byol_loss(tf.concat([p1, p2], axis=0), tf.concat([z2, z1], axis=0))
                scaled = self._device.scale_loss(self.optimizer, loss)
        self._device.apply_gradients(self.optimizer, scaled, tape, weights)
        with self._device.keep_float32():
            return loss, losses.projection_spread(tf.concat([z1, z2], axis=0), self._device.mean)

    def _update_target(self) -> None:
        """target <- m * target + (1 - m) * online, for every weight of f and g, moving statistics included."""
        with self._device.keep_float32():  # float16 would round the small changes away
            m, rest = (tf.constant(part) for part in (self._config.target_momentum, 1 - self._config.target_momentum))
            for online, target in ((self.f_online, self.f_target), (self.g_online, self.g_target)):
                for source, goal in zip(online.weights, target.weights):
                    self._device.update(goal, lambda goal, source: goal.assign(m * goal + rest * source), source)


class Run:
    """One run in one folder: what is printed, evaluated and saved around the calls of the training loop."""

    def __init__(self, config: Config, device: Device, data: datasets.Data, shown: progress.Progress) -> None:
        self.config, self.device, self.data, self.shown = config, device, data, shown
        self.say = shown.say
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

    def path(self, name: str) -> str:
        return os.path.join(self.config.output_dir, name)

    def agree(self) -> None:
        """UserError if the workers were not all started with the same settings and data, on which they would go apart."""
        settings = {name: value for name, value in dataclasses.asdict(self.config).items() if name not in LOCAL}
        text = json.dumps([settings, self.total_steps, self.images_crc], sort_keys=True)
        if len(set(self.device.gather(zlib.crc32(text.encode())))) > 1:
            raise UserError("The workers were not all started with the same flags and data; give each the same.")

    def wait_for_all(self) -> None:
        """Return when all workers are here: one that has left would be taken for dead."""
        self.device.gather(0)

    def start(self) -> None:
        """Make the networks, tell their shapes, and go on from the newest checkpoint if there is one."""
        self.say("Initializing online networks...")
        self.shown.wait("Making the networks")
        self.learner = Byol(self.config, self.device, self.total_steps, self.loop_size)
        h, z = self.learner.f_online.features, self.learner.g_online.features
        self.say("Shape of h: (256, %d)\nShape of z: (256, %d)\nShape of p: (256, %d)" % (h, z, self.learner.q_online.features))
        self.say("Initializing target networks...\nShape of h: (256, %d)\nShape of z: (256, %d)" % (h, z))
        self.say("The encoders have %d trainable parameters each." % models.count_parameters(self.learner.f_online))
        self.say("Using Adam optimizer with learning rate %s."
                 % schedules.scaled_learning_rate(self.config.learning_rate, self.config.batch_size))
        restored = None
        if self.device.restores:
            state = dict(self.learner.state(), history=self.history)
            folder = self.path("checkpoints")
            os.makedirs(folder, exist_ok=True)
            self.checkpoints = checkpoints.Checkpoints(folder, state, self.config.keep_checkpoint_max)
            # With --noresume there is none once the chief has cleared the folder, for which the other workers do not wait.
            restored = self.checkpoints.restore() if self.config.resume else None
        self.learner.broadcast()
        if restored:
            self.say("Resuming from step %d of %d (%s)." % (self.step, self.total_steps, restored))
        if self.device.is_chief:
            self.curves = progress.Curves(self.path("logs"), self.step)
            if self.step == 0:
                self._draw_views()

    def _draw_views(self) -> None:
        """A sheet of some images with their two views, as views.png and for TensorBoard."""
        chosen = np.arange(progress.SHEET) * len(self.data.train_images) // progress.SHEET  # a folder is sorted by class
        sheet = progress.sheet_of_views(self.data.train_images[np.unique(chosen)], self.config.seed, self.device.host())
        png = progress.encode_png(sheet, self.device.host())
        commands.write_atomically(self.path("views.png"), png)
        self.curves.image(0, "views", png, *sheet.shape[:2])

    @property
    def step(self) -> int:
        return int(self.learner.step.numpy())

    def train(self) -> None:
        """All steps from where the run stands to its end, a signal, or a failure."""
        self._evaluate_knn(self.step)
        self.shown.wait("Compiling the views and the training loop and taking the first step")
        first, rows = self.device.rows(self.config.batch_size)
        with self.device.host():
            batches = datasets.pretraining_batches(self.data.train_images, self.config.batch_size, self.config.seed, self.step,
                                                   self.last_step, first, rows)
            iterator = self.device.iterate(batches)
        step = saved = self.step
        since, since_step, seconds_a_step = time.time(), step, None
        while step < self.last_step and not self._stopped():
            n = self._steps_to_take(step, seconds_a_step)
            self.device.set_loop_size(n)
            began = time.time()
            self.learner.train_loop(iterator, tf.constant(n))
            recent = self.learner.recent.numpy()[:, -n:]
            step += n
            seconds_a_step = (time.time() - began) / n
            self.history.losses += [float(loss) for loss in recent[0]]
            batch = (step - 1) % self.steps_per_epoch + 1
            self.shown.step(step, self.last_step, "%d/%d" % ((step - 1) // self.steps_per_epoch + 1, self.config.num_epochs),
                            self.history.losses[-1], self.config.batch_size)
            if batch % self.config.log_every == 0:
                self._log(step, recent, (time.time() - since) / (step - since_step), time.time() - since)
                since, since_step = time.time(), step
            if batch == self.steps_per_epoch or step % self.config.save_checkpoints_steps == 0:
                self._check_finite(step)
                if batch == self.steps_per_epoch:
                    self._end_epoch(step)
                self._save(step)
                saved = step
                since, since_step = time.time(), step
        if saved != step:
            self._check_finite(step)
            if not self.signals:  # the end that --max_steps asked for
                self._save_weights("f_online_step_%d.h5" % step)
            self._save(step)
        elif step:
            self._write_losses()  # which a run that was killed after its last checkpoint has not done

    def _stopped(self) -> bool:
        """Whether a worker has had a signal; all note it, so that they stop after the same step."""
        number = int(max(self.device.gather(self.signals[0] if self.signals else 0)))
        if number and not self.signals:
            self.signals.append(number)
        return bool(number)

    def _steps_to_take(self, step: int, seconds_a_step: Optional[float]) -> int:
        """How many steps the next call of the loop takes: up to the next log line, checkpoint or end, whichever is first."""
        batch = step % self.steps_per_epoch
        n = min(self.loop_size, self.config.log_every - batch % self.config.log_every, self.steps_per_epoch - batch,
                self.config.save_checkpoints_steps - step % self.config.save_checkpoints_steps, self.last_step - step)
        return self.device.steps_a_call(n, seconds_a_step)

    def _log(self, step: int, recent: Any, seconds_a_step: float, seconds: float) -> None:
        """The known line, and after it what else is worth knowing."""
        self._check_finite(step, weights=False)  # reading them all is for when they are saved
        loss, spread = float(recent[0, -1]), float(recent[1, -1])
        epoch, batch = (step - 1) // self.steps_per_epoch + 1, (step - 1) % self.steps_per_epoch + 1
        images_a_second = self.config.batch_size / seconds_a_step
        left = int((self.last_step - step) * seconds_a_step)
        self.say("[Epoch %d/%d Batch %d/%d] Loss=%.5f. Time=%.2f, %.1f images/s, spread %.4f, %d:%02d:%02d left"
                 % (epoch, self.config.num_epochs, batch, self.steps_per_epoch, loss, seconds, images_a_second, spread,
                    left // 3600, left // 60 % 60, left % 60))
        self.history.log.append({"step": step, "loss": loss, "spread": spread, "images_per_second": images_a_second,
                                 "learning_rate": float(self.learner.schedule(step)), "time": time.time()})
        if self.device.is_chief:
            figures = self.history.log[-1]
            self.curves.scalars(step, {name: figures[name] for name in ("loss", "spread", "images_per_second", "learning_rate")})
        even = self.learner.g_online.features ** -0.5
        if spread < COLLAPSED * even:
            logging.warning("The projections have all but collapsed: their spread is %.5f at step %d, where %.4f is even spread and 0 "
                            "is collapse. A lower --learning_rate or a higher --target_momentum may help.", spread, step, even)

    def _check_finite(self, step: int, weights: bool = True) -> None:
        """UserError if a loss since the last look, or a weight now, is not a finite number; none of it has been saved then."""
        recent = self.history.losses[-self.steps_per_epoch:]
        bad = next((i for i, loss in enumerate(recent) if not math.isfinite(loss)), None)
        if bad is not None:
            what = "The loss of step %d is %s" % (step - len(recent) + bad + 1, recent[bad])
        elif weights and not all(np.isfinite(weight.numpy()).all() for weight in self.learner.f_online.weights):
            what = "The weights after step %d are not finite" % step
        else:
            return
        raise UserError("%s, so the run stops; its last good checkpoint is kept in %s. Try a lower --learning_rate, or "
                        "--precision_mode must_keep_origin_dtype." % (what, self.path("checkpoints")))

    def _end_epoch(self, step: int) -> None:
        epoch = step // self.steps_per_epoch
        if epoch % self.config.save_every == 0 or step == self.last_step:
            self._save_weights("f_online_%d.h5" % epoch)
        self._evaluate_knn(step)

    def _save_weights(self, name: str) -> None:
        if self.device.is_chief:
            checkpoints.save_weights(self.learner.f_online, self.path(name))
        self.say("Weights of f saved.")

    def _evaluate_knn(self, step: int) -> None:
        """At an epoch's end where it is due, classify the test images by the features of their nearest training images."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        due = batch == 0 and (self.knn_every and epoch % self.knn_every == 0 or step == self.last_step)
        done = any(figures["step"] == step for figures in self.history.knn)
        if not due or done or self.data.train_labels is None or not len(self.data.test_images):
            return
        self.shown.wait("Evaluating the encoder by k-NN on %d test images" % len(self.data.test_images))
        try:
            with self.signals.interrupting():
                accuracy = evaluation.knn_of_encoder(self.learner.f_online, self.data)
        except commands.Interrupted:  # the run that goes on from here makes up for it
            return
        self.history.knn.append({"epoch": epoch, "step": step, "accuracy": accuracy})
        if self.device.is_chief:
            self.curves.scalars(step, {"knn_accuracy": accuracy})
        self.say("[Epoch %d/%d] k-NN accuracy=%.4f" % (epoch, self.config.num_epochs, accuracy))

    def sum_up(self) -> None:
        """Tell what training did to the k-NN accuracy, where it was evaluated before and after, and if nothing, that too."""
        knn = self.history.knn
        if self.signals or len(knn) < 2 or knn[0]["step"] > 0:
            return
        before, after = knn[0]["accuracy"], knn[-1]["accuracy"]
        told = "" if after > before else (" It has not risen: BYOL's features first get worse than random ones and need thousands of "
                                          "steps to get better; the README has the curve of a longer run.")
        self.say("k-NN accuracy was %.4f before training and is %.4f now.%s" % (before, after, told))

    def _save(self, step: int) -> None:
        """Checkpoint, losses and figures, as of this step."""
        if not self.device.is_chief:
            return
        self.checkpoints.save(step)
        self._write_losses()

    def _write_losses(self) -> None:
        if not self.device.is_chief:
            return
        commands.write_atomically(self.path("losses.txt"), "".join("%.9g\n" % loss for loss in self.history.losses))
        commands.write_json(self.path("metrics.json"), {"log": self.history.log, "knn": self.history.knn})


def main() -> None:
    config = commands.from_flags(Config)
    config = _consistent(config)
    logging.set_verbosity(logging.INFO if config.verbose else logging.WARNING)
    if config.check_npu:
        sys.exit(not check_npu(config))
    started = time.time()
    device = npu_config.open_device(config)
    device.set_seed(config.seed)
    with contextlib.ExitStack() as stack:
        if device.is_chief:  # the others neither write nor need the folder
            commands.make_folder(config.output_dir)
            stack.enter_context(commands.only_run_in(config.output_dir))
        shown = stack.enter_context(progress.Progress(device.is_chief and not config.quiet))
        shown.wait("Reading the data set")
        data = datasets.load(config.dataset, config.data_dir, image_size=config.image_size,
                             test_fraction=config.test_fraction, cache_dir=config.output_dir)
        run = Run(config, device, data, shown)
        if device.advice:
            run.say(device.advice)
        if device.is_chief:
            free = FREE | ({"num_epochs"} if config.lr_schedule == "constant" else set())
            settings = dict(dataclasses.asdict(config), train_images=len(data.train_images), images_crc=run.images_crc)
            checkpoints.claim_folder(config.output_dir, settings, free, config.resume, config.overwrite)
        with device.together():
            run.agree()
            run.start()
            with commands.signals() as run.signals:
                run.train()
            run.wait_for_all()
        run.sum_up()
        if device.is_chief:
            log = run.history.log
            commands.write_result(os.path.join(config.output_dir, "result.json"), {
                "steps": run.step, "loss": run.history.losses[-1] if run.history.losses else None,
                "spread": log[-1]["spread"] if log else None,
                "knn": run.history.knn[-1]["accuracy"] if run.history.knn else None,
                "seconds": time.time() - started, "device": device.describe(), "config": dataclasses.asdict(config)})
    if run.signals:
        run.say("Stopped by %s at step %d; the same command goes on from there."
                % (signal.Signals(run.signals[0]).name, run.step))
        sys.exit(128 + run.signals[0])


def trace(config: Config) -> Any:
    """The ConcreteFunction of the training loop as it would be on one NPU, over one batch of black images."""
    device = graph_check.device_on_paper(config.precision_mode, config.loss_scale)
    images = np.zeros((config.batch_size, config.image_size, config.image_size, 3), np.uint8)
    loop_size = config.iterations_per_loop or config.log_every
    learner = Byol(config, device, total_steps=config.num_epochs, loop_size=loop_size)
    batches = datasets.pretraining_batches(images, config.batch_size, config.seed, 0, 1)
    return learner.train_loop.get_concrete_function(device.iterate(batches), tf.constant(loop_size))


def check_npu(config: Config) -> bool:
    """Print whether an Ascend 910 could take the training loop whole, and give that."""
    supported = graph_check.read_operators(config.npu_ops) if config.npu_ops else None
    report = graph_check.examine(trace(config), supported)
    print("The training loop of %s, batch %d, for an NPU in %s, loss scale %s, traced by TensorFlow %s:\n%s"
          % (config.encoder, config.batch_size, config.precision_mode or "allow_mix_precision", config.loss_scale, tf.__version__,
             graph_check.verdict(report, config.npu_ops)))
    return not report.problems


def _consistent(config: Config) -> Config:
    """The settings with those filled in that follow from others; UserError if some contradict others."""
    loop_size = config.iterations_per_loop or config.log_every
    if config.log_every % loop_size:
        raise UserError("--log_every %d is not a multiple of --iterations_per_loop %d." % (config.log_every, loop_size))
    steps = config.save_checkpoints_steps
    if steps % loop_size:
        if config.iterations_per_loop or commands.was_set("save_checkpoints_steps"):
            raise UserError("--save_checkpoints_steps %d is not a multiple of %d, the steps of a loop (--iterations_per_loop, by "
                            "default --log_every)." % (steps, loop_size))
        config = dataclasses.replace(config, save_checkpoints_steps=steps + loop_size - steps % loop_size)
    if config.overwrite and config.resume:
        raise UserError("--overwrite goes with --noresume.")
    return config


if __name__ == "__main__":
    commands.define_flags(Config)
    commands.run(main)
