"""Pretrain an image encoder by BYOL (arXiv:2006.07733).

    python pretraining.py --encoder resnet18 --num_epochs 200 --batch_size 512 --data_dir DIR

trains on CIFAR-10 and writes into --output_dir: f_online_<epoch>.h5 (the encoder's weights), losses.txt (every batch's
loss), config.json (these settings), metrics.json and result.json (figures), checkpoints/ (to go on from: start the same
command again), logs/ (curves for TensorBoard) and views.png (what the networks are shown). `python report.py DIR` makes
a page of it all. Without data: --dataset shapes.
"""
import dataclasses
import functools
import sys
import time
from typing import Any, Dict, Iterator, List, Optional, Tuple

import commands  # before TensorFlow, whose start it quiets

# isort: split

import numpy as np
import tensorflow as tf
from absl import logging

import augmentation
import datasets
import losses
import models
import npu_config
import optimizers
import progress
import recipes
import runs
import schedules
import weights
from commands import UserError, flag
from devices import graph_check
from devices.base import Device

PERFORMANCE_STEPS = 20  # ModelZoo's


@dataclasses.dataclass(frozen=True)
class Config(recipes.Recipe, npu_config.Options):
    """The settings of a run: each is a flag, and all are saved as config.json. Those of the method are in recipes.py."""
    encoder: str = flag("resnet18", "The encoder f (reference and ModelZoo).", choices=sorted(models.ENCODERS))
    width_multiplier: float = flag(1.0, "Scales the encoder's filters; 0.25 makes it sixteen times cheaper.", low=1 / 64, high=8)
    stem: Optional[str] = flag(None, "The encoder's first layers. cifar: 3x3 of stride 1 (reference); imagenet: 7x7 of stride 2, "
                               "max-pool. Default: imagenet from 96 pixels on.", choices=sorted(models.STEMS))
    encoder_weights: Optional[str] = flag(None, "Start both encoders from these weights instead of random ones: a file as "
                                          "f_online_200.h5, or cifar10, cifar10-narrow, which come with the program.")
    dataset: str = flag("cifar10", "What to train on. shapes is made by the program and needs no files; folder is a folder of images; "
                        "tfds:NAME is what TensorFlow Datasets has prepared.", choices=datasets.NAMES)
    data_dir: Optional[str] = flag(None, "Where the data set lies: CIFAR's batches folder or .tar.gz, a folder of images, or the "
                                   "data_dir of TensorFlow Datasets.", alias="data_path")
    image_size: int = flag(32, "Height and width of the images (reference: 32).", low=8, high=1024)
    store_size: Optional[int] = flag(None, "Height and width at which images are kept, for views to be cut from "
                                     "(paper: 256 for 224). Default: --image_size.", low=8, high=1024)
    view_size: Optional[int] = flag(None, "Height and width of views; smaller ones make a step cheaper. Evaluation sees --image_size "
                                    "pixels all the same. Default: --image_size.", low=8, high=1024)
    test_fraction: float = flag(0.1, "Of what has no images for testing of its own: the part kept for that.", low=0, high=0.9)
    cache_dir: Optional[str] = flag(None, "Where images are kept decoded, for every later start (default: ~/.cache/byol).")
    output_dir: str = flag(".", "Where results go.", alias="model_dir")
    num_epochs: int = flag(200, "Epochs to train (ModelZoo README: 200).", low=1)
    batch_size: int = flag(512, "Images a step, over all devices (reference: 512).", low=2)
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
    perf: Optional[int] = flag(None, "As ModelZoo's performance script gives it. 0: end after %d batches, unless --max_steps says "
                               "otherwise; other numbers change nothing." % PERFORMANCE_STEPS, low=0)
    views_at_once: Optional[int] = flag(None, "Views that pass the online networks together. 1: one after the other, the same figures "
                                        "in two thirds of the memory, 3 to 7 % slower. Default: all.", low=1)
    resume: bool = flag(True, "Go on from the newest checkpoint in output_dir, if there is one. --noresume starts anew.")
    overwrite: bool = flag(False, "With --noresume: overwrite the results of an earlier run.")
    quiet: bool = flag(False, "Print warnings and errors only.")
    verbose: bool = flag(False, "Print what TensorFlow and the device say, too.")
    check_npu: bool = flag(False, "Train nothing: tell from its graph whether an Ascend 910 can take the training loop whole.")
    npu_ops: Optional[str] = flag(None, "For --check_npu: a file with the TensorFlow operators that the device has, one name a line, "
                                  "# for comments. Without it names are not checked.")

    def views(self) -> augmentation.Views:
        """How views are made."""
        return dataclasses.replace(super().views(), size=self.view_size or (self.image_size if self.store_size else None))


class Byol(tf.Module):
    """The networks, the optimiser and the compiled loop that trains them: the whole training state, in Variables.

    loop_size: the most steps that one call of `train_loop` will take.
    """

    def __init__(self, config: Config, device: Device, total_steps: int, loop_size: int) -> None:
        super().__init__()
        self._config = config
        self._device = device
        make_encoder = functools.partial(models.ENCODERS[config.encoder], config.width_multiplier, norm=device.batch_norm,
                                         conv=models.drawn(device.convolution, config.kernel_initializer),
                                         normalisation=config.normalise, stem=config.stem or models.default_stem(config.image_size))
        make_head = functools.partial(models.ProjectionHead, config.head_hidden, config.head_features, norm=device.batch_norm,
                                      dense=models.drawn(models.keras.layers.Dense, config.kernel_initializer))
        base = schedules.scaled_learning_rate(config.learning_rate, config.batch_size)
        self.schedule = functools.partial(schedules.warmup, base=base, total_steps=total_steps,
                                          warmup_steps=total_steps // config.num_epochs * config.warmup_epochs,
                                          schedule=schedules.LEARNING_RATES[config.lr_schedule])
        self._total_steps = total_steps
        with device.scope():
            self.f_online, self.g_online, self.q_online = make_encoder(), make_head(), make_head()
            self.f_target, self.g_target = make_encoder(), make_head()
            for head, below in ((self.g_online, self.f_online), (self.q_online, self.g_online), (self.g_target, self.f_target)):
                head.build((None, below.features))
            if config.target_start == "online":
                for target, online in ((self.f_target, self.f_online), (self.g_target, self.g_online)):
                    target.set_weights(online.get_weights())
            if config.encoder_weights:
                weights.start_from(self.f_online, config.encoder_weights)
                self.f_target.set_weights(self.f_online.get_weights())
            self.step = tf.Variable(0, trainable=False, dtype=tf.int64, name="step",
                                    aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA)
            optimizer = optimizers.make(config.optimizer, lambda: self.schedule(self.step), config.momentum, config.weight_decay,
                                        config.trust_coefficient)
            optimizer._create_all_weights(self.online_weights)  # now, so that a checkpoint finds them all
            self.optimizer = device.loss_scaled(optimizer)
            # (4, loop_size): loss, spread, loss scale (0: none) and whether it was skipped, of the latest steps, the newest last.
            # The loop shifts them in, since the NPU carries nothing but Variables from step to step, not even the loop's index.
            self.recent = tf.Variable(tf.zeros([4, loop_size]), trainable=False, name="recent",
                                      aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA)
        self._step = device.compile_step(self.train_step_pretraining)
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
        """Take n steps (scalar int32) on the next n elements of the iterator, the views (x1, x2) each.

        Returns nothing and uses no loop index: in this form the NPU takes the loop whole. Results are in `recent`.
        """
        for _ in tf.range(n):
            self._step(*next(iterator))

    @tf.autograph.experimental.do_not_convert  # plain Python: saves the conversion's time at every start
    def train_step_pretraining(self, *views: tf.Tensor) -> None:
        """One step on views x1, x2 (or more), each (b, s, s, 3) float32 in [0, 1]: online networks, then the target's average."""
        scale = self._device.loss_scale(self.optimizer)
        loss, spread = self._device.run(self._update_online, views)
        self._update_target()
        self.step.assign_add(1)
        with self._device.keep_float32():
            figures = [loss, spread, self._device.loss_scale(self.optimizer), self._device.skipped(self.optimizer, scale)]
            self.recent.assign(tf.concat([self.recent[:, 1:], [[figure] for figure in figures]], axis=1))

    def _update_online(self, *views: tf.Tensor) -> Tuple[tf.Tensor, tf.Tensor]:
        """One optimiser step on f, g and q, and the moving statistics of all. Gives loss and spread, float32 scalars."""
        z = [self.g_target(self.f_target(x, training=True), training=True) for x in views]
        with self._device.keep_float32():
            targets = losses.targets_of_views(z)  # of two views: p1 is held against z2, and p2 against z1
        weights, predictions, gradients = self.online_weights, [], None  # type: List[tf.Variable], List[tf.Tensor], Any
        at_once = self._config.views_at_once or len(views)
        for first in range(0, len(views), at_once):
            with tf.control_dependencies(gradients):  # what the views before have left in memory is gone then
                part = [tf.identity(x) for x in views[first:first + at_once]]
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(weights)
                p = [self.q_online(self.g_online(self.f_online(x, training=True), training=True), training=True) for x in part]
                with self._device.keep_float32():
                    loss = losses.byol_loss(tf.concat(p, axis=0), tf.concat(targets[first:first + at_once], axis=0))
                    scaled = self._device.scale_loss(self.optimizer, loss * (len(part) / len(views)))
            more = tape.gradient(scaled, weights)
            gradients = [one + other for one, other in zip(gradients, more)] if gradients else more
            predictions += p
        self._device.apply_gradients(self.optimizer, gradients, weights)
        with self._device.keep_float32():
            loss = losses.byol_loss(tf.concat(predictions, axis=0), tf.concat(targets, axis=0))
            return loss, losses.projection_spread(tf.concat(z, axis=0), self._device.mean)

    def _update_target(self) -> None:
        """Move the target: every weight of f and g, moving statistics included."""
        with self._device.keep_float32():  # float16 would round the small changes away
            self._device.update(self.f_target.weights + self.g_target.weights, self._average,
                                self.f_online.weights + self.g_online.weights)

    def _average(self, target: List[tf.Variable], online: List[tf.Variable]) -> None:
        """target <- m * target + (1 - m) * online, one by one."""
        start = self._config.target_momentum
        m, rest = tf.constant(start), tf.constant(1 - start)
        if self._config.target_momentum_schedule == "cosine":
            m = schedules.momentum_to_one(self.step, start, self._total_steps)
            rest = 1 - m
        for goal, source in zip(target, online):
            goal.assign(m * goal + rest * source, read_value=False)


def train(config: Config) -> runs.Result:
    """Pretrain an encoder: all that the command does, and what it leaves.

    Must come before other work with TensorFlow where an NPU is to be used. UserError for what the user can mend.
    commands.Stopped, a KeyboardInterrupt, if a signal ended the run; it is saved then, and the same call goes on.
    """
    config = consistent(config)
    device = npu_config.open_device(config)
    device.set_seed(config.seed)
    with runs.folder(config.output_dir, device), progress.Progress(device.is_chief and not config.quiet) as shown, device.together():
        shown.wait("Reading the data set")
        data = datasets.load(config.dataset, config.data_dir, image_size=config.image_size, test_fraction=config.test_fraction,
                             store_size=config.store_size, cache_dir=config.cache_dir,
                             say=shown.say if device.is_chief and not config.quiet else None)
        run = runs.Run(config, device, data, shown)
        run.agree()
        shown.wait("Making the networks")
        learner = Byol(config, device, run.total_steps, run.loop_size)
        run.say(progress.networks(learner, config.optimizer, schedules.scaled_learning_rate(config.learning_rate, config.batch_size)))
        run.resume(learner)
        with commands.signals_noted() as run.signals:
            take_steps(learner, run, device, data)
            return run.finish()


def take_steps(learner: Byol, run: runs.Run, device: Device, data: datasets.Data) -> None:
    """Train from where the run stands to its end or a signal; the run logs and saves between two calls of the compiled loop."""
    run.shown.wait("Compiling the views and the training %s and taking the first step" % device.compiled)
    first, rows = device.rows(run.config.batch_size)
    with device.host():
        batches = datasets.pretraining_batches(data.train_images, run.config.batch_size, run.config.seed, run.step, run.last_step,
                                               first, rows, run.config.views(), run.config.num_views)
        iterator = device.iterate(batches)
    while run.goes_on():
        n = run.steps_to_take()
        device.set_loop_size(n)
        began = time.monotonic()
        learner.train_loop(iterator, tf.constant(n))
        run.took(learner.recent.numpy()[:, -n:], time.monotonic() - began)


def consistent(config: Config) -> Config:
    """The settings with those filled in that follow from others; UserError if some are wrong or contradict others."""
    commands.check(config)
    known = {} if config.encoder_weights in (None, "", "none") else weights.settings_of(config.encoder_weights)
    taken = {name: value for name, value in known.items() if name == "normalise" or getattr(config, name) == getattr(Config, name)}
    config = dataclasses.replace(config, encoder_weights=config.encoder_weights if known else None, **taken)
    commands.check(config)  # what the file says, too
    loop_size = config.iterations_per_loop or config.log_every
    if config.log_every % loop_size:
        raise UserError("--log_every %d is not a multiple of --iterations_per_loop %d." % (config.log_every, loop_size))
    steps = config.save_checkpoints_steps
    if steps % loop_size:
        if config.iterations_per_loop or steps != Config.save_checkpoints_steps:
            raise UserError("--save_checkpoints_steps %d is not a multiple of %d, the steps of a loop (--iterations_per_loop, by "
                            "default --log_every)." % (steps, loop_size))
        config = dataclasses.replace(config, save_checkpoints_steps=steps + loop_size - steps % loop_size)
    if config.warmup_epochs >= config.num_epochs:
        raise UserError("--warmup_epochs %d leaves none of --num_epochs %d; give fewer warm-up epochs or more epochs." % (
            config.warmup_epochs, config.num_epochs))
    if config.perf == 0 and config.max_steps is None:
        config = dataclasses.replace(config, max_steps=PERFORMANCE_STEPS)
    larger = datasets.stored_size(config.image_size, config.store_size) > config.image_size
    config = dataclasses.replace(config, stem=config.stem or models.default_stem(config.image_size),
                                 store_size=config.store_size if larger else None,
                                 view_size=config.view_size if config.view_size != config.image_size else None)
    if config.overwrite and config.resume:
        raise UserError("--overwrite goes with --noresume.")
    return config


def trace(config: Config) -> Any:
    """The ConcreteFunction of the training loop as it would be on one NPU, over one batch of black images."""
    device = graph_check.device_on_paper(config.precision_mode, config.loss_scale)
    images = np.zeros((config.batch_size, config.image_size, config.image_size, 3), np.uint8)
    loop_size = config.iterations_per_loop or config.log_every
    learner = Byol(config, device, total_steps=config.num_epochs, loop_size=loop_size)
    batches = datasets.pretraining_batches(images, config.batch_size, config.seed, 0, 1, views=config.views(),
                                           number_of_views=config.num_views)
    return learner.train_loop.get_concrete_function(device.iterate(batches), tf.constant(loop_size))


def check_npu(config: Config) -> bool:
    """Print whether an Ascend 910 could take the training loop whole, and give that."""
    supported = graph_check.read_operators(config.npu_ops) if config.npu_ops else None
    report = graph_check.examine(trace(config), supported)
    print("The training loop of %s, batch %d, for an NPU in %s, loss scale %s, traced by TensorFlow %s:\n%s"
          % (config.encoder, config.batch_size, config.precision_mode or "allow_mix_precision", config.loss_scale, tf.__version__,
             graph_check.verdict(report, config.npu_ops)))
    return not report.problems


def main() -> None:
    config = commands.from_flags(Config)
    logging.set_verbosity(logging.INFO if config.verbose else logging.WARNING)
    if config.check_npu:
        sys.exit(not check_npu(consistent(config)))
    try:
        train(config)
    except commands.Stopped as signal:
        sys.exit(128 + signal.args[0])


if __name__ == "__main__":
    commands.define_flags(Config)
    commands.run(main)
