"""What a person sees of a run: lines, the bar below them, TensorBoard's files, the sheet of views."""
import glob
import io
import os
import sys

import numpy as np
import pytest
import tensorflow as tf
from absl import logging

import progress


def events(folder):
    """All events of TensorBoard's files in the folder, file by file."""
    return [tf.compat.v1.Event.FromString(record.numpy()) for path in sorted(glob.glob(os.path.join(str(folder), "*")))
            for record in tf.data.TFRecordDataset(path)]


def test_off_a_terminal_there_are_lines_alone(capsys):
    """What is waited for before the first step is one of them."""
    with progress.Progress() as shown:
        shown.wait("Reading the data set")
        shown.say("one")
        shown.step(1, 10, "1/2", 0.5, 64)
        shown.wait("Evaluating")
        shown.say("two")
    assert tuple(capsys.readouterr()) == ("Reading the data set...\none\ntwo\n", "")


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_the_bar_fits_the_terminal(capsys, monkeypatch, columns):
    now = [1000.0]
    with progress.Progress(terminal=True) as shown:
        monkeypatch.setattr(shown._bar, "_time", lambda: now[0])
        monkeypatch.setattr(shown._bar, "dynamic_ncols", lambda stream: (columns, 24))
        for step, knn in ((12000, None), (12005, None), (12010, None), (12020, 0.5678)):
            now[0] += 20
            shown.step(step, 19400, "124/200", 0.51234, 512, knn)
            shown._bar.refresh()
    lines = [part for part in capsys.readouterr().err.split("\r") if "Epoch" in part]
    assert max(map(len, lines)) <= columns
    assert ("images/s" in lines[-1]) == (columns >= 100)
    if columns >= 80:
        before = [line for line in lines if "step 12010/" in line][-1]
        assert "images/s" in before and "left" in before
        assert "step 12020/19400, loss 0.5123, k-NN 56.8 %" in lines[-1] and lines[-1].strip().endswith(" left")


def test_quiet_prints_nothing(capsys):
    with progress.Progress(shown=False, terminal=True) as shown:
        shown.wait("Reading the data set")
        shown.say("one")
        shown.step(1, 10, "1/2", 0.5, 64)
    assert tuple(capsys.readouterr()) == ("", "")


def test_on_a_terminal_the_bar_stands_below_the_lines(capsys, monkeypatch):
    handler = logging.get_absl_handler().python_handler
    monkeypatch.setattr(handler, "stream", io.StringIO())
    before = handler.stream
    with progress.Progress(terminal=True) as shown:
        shown.wait("Reading the data set")
        shown.say("one")
        shown.step(40, 100, "1/2", 0.51234, 64)
        shown._bar.refresh()
        shown.say("two")
        handler.stream.write("look out\n")  # as absl does, once it runs the command
    out, error = capsys.readouterr()
    assert out == "one\ntwo\n"
    assert "Reading the data set..." in error
    last = [part for part in error.split("\r") if "Epoch" in part][-1]
    assert "Epoch 1/2" in last and "step 40/100" in last and "loss 0.5123" in last and "left" in last
    assert error.endswith("\r")  # the bar's line is cleared at the end
    assert handler.stream is before and "look out" in before.getvalue()


def test_the_bar_tells_speed_without_what_was_waited_for(capsys, monkeypatch):
    now = [1000.0]
    with progress.Progress(terminal=True) as shown:
        monkeypatch.setattr(shown._bar, "_time", lambda: now[0])
        shown.step(10, 100, "1/2", 0.5, 64)
        for step in range(11, 20):
            if step == 15:
                shown.wait("Evaluating")
                now[0] += 1000
            now[0] += 0.5
            shown.step(step, 100, "1/2", 0.5, 64)
        shown.step(20, 100, "1/2", 0.5, 64)
        rate = shown._bar.format_dict["rate"]
    assert 1.5 < rate < 3, "two steps a second"
    assert "images/s" in capsys.readouterr().err


def test_curves_are_tensorboard_event_files(tmp_path):
    curves = progress.Curves(str(tmp_path), 0)
    curves.scalars(10, {"loss": 0.5, "spread": 0.25})
    curves.image(0, "views", b"png", 3, 5)
    curves.close()
    first, start, scalars, image = events(tmp_path)
    assert first.file_version == "brain.Event:2"
    assert start.session_log.status == tf.compat.v1.SessionLog.START and start.step == 0
    assert scalars.step == 10 and {value.tag: value.simple_value for value in scalars.summary.value} == {"loss": 0.5, "spread": 0.25}
    assert image.summary.value[0].image.encoded_image_string == b"png" and image.summary.value[0].image.height == 3


def test_tensorboard_reads_them_and_drops_what_a_resumed_run_repeats(tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    clock = iter(range(1700000000, 1700000100))
    monkeypatch.setattr(progress.time, "time", lambda: float(next(clock)))
    cut_off = progress.Curves(str(tmp_path), 0)
    for step in (10, 20, 30):
        cut_off.scalars(step, {"loss": 1.0})
    cut_off.close()
    resumed = progress.Curves(str(tmp_path), 20)
    resumed.scalars(30, {"loss": 2.0})
    resumed.close()
    seen = accumulator.EventAccumulator(str(tmp_path)).Reload()
    points = [(event.step, float(tf.make_ndarray(event.tensor_proto))) for event in seen.Tensors("loss")] \
        if "loss" in seen.Tags()["tensors"] else [(event.step, event.value) for event in seen.Scalars("loss")]
    assert points == [(10, 1.0), (20, 1.0), (30, 2.0)]


def test_a_full_disk_ends_the_curves_and_not_the_run(tmp_path, monkeypatch):
    curves = progress.Curves(str(tmp_path), 0)

    class Full:
        def write(self, record):
            raise tf.errors.ResourceExhaustedError(None, None, "No space left on device")

    warnings = []
    monkeypatch.setattr(progress.logging, "warning", lambda *parts: warnings.append(parts))
    curves._file = Full()
    curves.scalars(1, {"loss": 1.0})
    curves.scalars(2, {"loss": 1.0})
    assert len(warnings) == 1 and "No space left" in str(warnings[0])


@pytest.mark.parametrize("number, size, shape", [(16, 32, (2 * 328 - 8, 8 * 104 + 8, 3)), (3, 200, (632, 3 * 208 + 8, 3))])
def test_the_sheet_holds_the_images_and_their_views(number, size, shape):
    images = np.random.RandomState(0).randint(0, 256, (number, size, size, 3), np.uint8)
    sheet = progress.sheet_of_views(images, 0)
    assert sheet.shape == shape and sheet.dtype == np.uint8
    scale = max(1, 96 // size)
    tile = size * scale
    assert (sheet[8:8 + tile:scale, 8:8 + tile:scale] == images[0]).all()
    second, third = (sheet[8 + row * (tile + 8):][:tile, 8:8 + tile] for row in (1, 2))
    assert (second != 255).any() and (second != third).any()
    assert not tf.config.functions_run_eagerly()
    assert (tf.io.decode_png(progress.encode_png(sheet)).numpy() == sheet).all()


def test_a_terminal_is_both_stdout_and_stderr(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    with progress.Progress() as shown:
        shown.wait("Reading")
    assert capsys.readouterr().err == ""
