"""What a person sees while a run goes on: lines, below them a bar on a terminal, curves in TensorBoard, a sheet of views.

    tensorboard --logdir OUTPUT_DIR/logs

All of it is done by the host between calls of the training loop, so nothing of it is in the device's graph.
"""
import contextlib
import os
import re
import socket
import sys
import time
from typing import Any, ContextManager, Dict, Optional, Sequence, Tuple

import numpy as np
import tensorflow as tf
from absl import logging
from tqdm import tqdm
from tqdm.contrib import DummyTqdmFile

import augmentation
import models
from sources import image_files

BAR = "{desc} |{bar}| step {n_fmt}/{total_fmt}{postfix}, {remaining} left"
WIDE = 100  # columns of a terminal where everything stands beside a bar
SHEET = 16  # images on a sheet of views
SHEET_COLUMNS = 8
TILE = 96  # pixels that an image on the sheet has at least, enlarged by a whole number


def networks(learner: Any, optimizer: str, learning_rate: float) -> str:
    """The known lines about the networks and the optimiser of a pretraining.Byol."""
    shapes = "Shape of h: (256, %d)\nShape of z: (256, %d)" % (learner.f_online.features, learner.g_online.features)
    return ("Initializing online networks...\n%s\nShape of p: (256, %d)\nInitializing target networks...\n%s\n"
            "The encoders have %d trainable parameters each.\nUsing %s optimizer with learning rate %s."
            % (shapes, learner.q_online.features, shapes, models.count_parameters(learner.f_online),
               {"adam": "Adam"}.get(optimizer, optimizer.upper()), learning_rate))


class Progress:
    """The lines of a run on stdout and, on a terminal, what is going on below them, on stderr.

    shown: False prints nothing at all, for --quiet and for processes other than the chief.
    terminal: whether stdout and stderr are one; by default they are asked.
    To be closed, so that the terminal is left with the lines alone: use it in a with statement.
    """

    def __init__(self, shown: bool = True, terminal: Optional[bool] = None) -> None:
        self._shown = shown
        self.broken = False
        self._bar = None  # type: Any
        self._begun = self._waiting = False
        if shown and (sys.stdout.isatty() and sys.stderr.isatty() if terminal is None else terminal):
            self._bar = tqdm(file=sys.stderr, bar_format="{desc}", dynamic_ncols=True, leave=False)
            self._bar._time = time.monotonic  # the time of day may be set back, and a bar by it would stand still until then
            self._bar.reset()
            self._handler = logging.get_absl_handler().python_handler
            self._stream = self._handler.stream
            self._handler.stream = DummyTqdmFile(self._stream)  # so that warnings come above the bar, not into it

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._handler.stream = self._stream
            self._bar.close()
            self._bar = None

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one. If nobody reads stdout any more, `broken` tells."""
        try:
            if self._bar is not None:
                self._bar.write(text, file=sys.stdout)
                sys.stdout.flush()
            elif self._shown:
                print(text, flush=True)
        except BrokenPipeError:
            self.broken = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # also what Python flushes at its end

    def wait(self, what: str) -> None:
        """Tell what begins now and may take long, such as 'Reading the data set'. Off a terminal only before the first step."""
        if self._bar is None:
            if not self._begun:
                self.say(what + "...")
            return
        self._waiting = True
        self._bar.bar_format = "{desc}"
        self._bar.set_description_str(what + "...")

    def step(self, step: int, total: int, epoch: str, loss: float, batch_size: int, knn: Optional[float] = None) -> None:
        """Show the bar as of `step` of `total`. epoch: such as '3/200'. knn: the last accuracy. Its clock starts at the first call."""
        bar, begun = self._bar, self._begun
        self._begun = True
        if bar is None:
            return
        if not begun:
            bar.reset(total)
            bar.initial = bar.n = bar.last_print_n = step
        elif self._waiting:
            bar.unpause()  # what was waited for is no part of the speed
        bar.bar_format = BAR
        rate = bar.format_dict["rate"]
        bar.set_description_str("Epoch " + epoch, refresh=False)
        told = ["loss %.4f" % loss]
        if knn is not None:
            told.append("k-NN %.1f %%" % (100 * knn))
        if rate and (knn is None or (bar.format_dict["ncols"] or 0) >= WIDE):
            told.append("%.0f images/s" % (rate * batch_size))
        bar.set_postfix_str(", ".join(told), refresh=False)
        bar.update(step - bar.n)
        if self._waiting:
            bar.refresh()
        self._waiting = False


class Curves:
    """TensorBoard's files in a folder, written without tf.summary: no operator runs, and tensorboard need not be installed.

    first_step: the step that the run stands at. TensorBoard drops what an earlier file, of a run that was cut
    off, holds of later steps. It tells earlier files by their names, so each gets a later time than those that are there.
    """

    def __init__(self, folder: str, first_step: int) -> None:
        os.makedirs(folder, exist_ok=True)
        before = re.findall(r"^events\.out\.tfevents\.(\d{10})\.", "\n".join(os.listdir(folder)), re.MULTILINE)
        second = max([int(time.time())] + [int(other) + 1 for other in before])
        name = "events.out.tfevents.%010d.%s.%d.byol" % (second, socket.gethostname(), os.getpid())
        self._file = tf.io.TFRecordWriter(os.path.join(folder, name))  # type: Any
        self._write(0, file_version="brain.Event:2")
        start = tf.compat.v1.SessionLog(status=tf.compat.v1.SessionLog.START)
        self._write(first_step + 1 if first_step else 0, session_log=start)

    def scalars(self, step: int, values: Dict[str, float]) -> None:
        """Add a point to the curve of each name."""
        self._write(step, summary=tf.compat.v1.Summary(value=[
            tf.compat.v1.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]))

    def image(self, step: int, name: str, png: bytes, height: int, width: int) -> None:
        """Add a picture, encoded as PNG with three channels."""
        image = tf.compat.v1.Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        self._write(step, summary=tf.compat.v1.Summary(value=[tf.compat.v1.Summary.Value(tag=name, image=image)]))

    def _write(self, step: int, **content: Any) -> None:
        if self._file is None:
            return
        try:
            self._file.write(tf.compat.v1.Event(wall_time=time.time(), step=step, **content).SerializeToString())
            self._file.flush()
        except tf.errors.OpError as error:  # a full disk; curves are not worth a run
            logging.warning("TensorBoard's curves end here: %s", error.message)
            self._file = None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def sheet_of_views(images: np.ndarray, seed: int, host: Optional[ContextManager[Any]] = None,
                   views: augmentation.Views = augmentation.Views()) -> np.ndarray:
    """Images with two views of each below them: a picture, uint8 (height, width, 3).

    images: uint8 (n, s, s, 3), n at most SHEET; see `sheet`. They are shown whole, at the size of the views.
    host: where to compute; default: where TensorFlow would.
    """
    with host or contextlib.nullcontext():
        eagerly = tf.config.functions_run_eagerly()
        tf.config.run_functions_eagerly(True)  # compiling for a few images would take seconds
        try:
            pair = [augmentation.augment_images_pretraining(images, (seed, view), views=views, view=view).numpy() for view in (0, 1)]
        finally:
            tf.config.run_functions_eagerly(eagerly)
        whole = np.stack([image_files.square(image, pair[0].shape[1]) for image in images])
    return sheet([whole] + [np.round(view * 255).astype(np.uint8) for view in pair])


def views_png(images: Any, seed: int, views: augmentation.Views, host: ContextManager[Any]) -> Tuple[bytes, int, int]:
    """SHEET of the images, evenly chosen, with two views of each, as a PNG file's content; and its height and width."""
    chosen = np.unique(np.arange(SHEET) * len(images) // SHEET)  # a folder is sorted by class
    picture = sheet_of_views(images[chosen], seed, host, views)
    return encode_png(picture, host), picture.shape[0], picture.shape[1]


def sheet(rows: Sequence[np.ndarray], frames: Optional[Sequence[np.ndarray]] = None) -> np.ndarray:
    """Images and what belongs to each below it, in one picture, uint8 (height, width, 3).

    rows: uint8 (n, s, s, 3) each: the images, then what goes below them. After SHEET_COLUMNS images a new block begins.
    frames: for each row the colours, uint8 (n, 3), of frames around its images.
    """
    number, size = rows[0].shape[:2]
    scale, gap, frame = max(1, TILE // size), 8, 3
    tile = size * scale
    columns = min(SHEET_COLUMNS, number)
    block = len(rows) * (tile + gap) + 2 * gap
    picture = np.full((-(-number // columns) * block - gap, columns * (tile + gap) + gap, 3), 255, np.uint8)
    for i in range(number):
        left = gap + i % columns * (tile + gap)
        for place, row in enumerate(rows):
            top = gap + i // columns * block + place * (tile + gap)
            if frames is not None:
                picture[top - frame:top + tile + frame, left - frame:left + tile + frame] = frames[place][i]
            picture[top:top + tile, left:left + tile] = row[i].repeat(scale, 0).repeat(scale, 1)
    return picture


def encode_png(picture: np.ndarray, host: Optional[ContextManager[Any]] = None) -> bytes:
    """A picture, uint8 (height, width, 3), as a PNG file's content."""
    with host or contextlib.nullcontext():
        return bytes(tf.io.encode_png(picture).numpy())
