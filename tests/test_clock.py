"""The time of day set back and forth while the program is at work: what it tells and does goes by a clock that only goes on."""
import os
import re
import time
from types import SimpleNamespace

import pytest
from command import BLOCKS, encoder_of

import models
import pretraining
import progress
import runfiles
import runs
from sources import folders, store

DAY = 86400.0


@pytest.fixture
def jumping(monkeypatch):
    """A time of day that each look at it finds a day earlier or later; begins so many days from now."""
    real, state = time.time, SimpleNamespace(days=0.0, step=1.0)

    def now():
        state.days += state.step
        state.step = -state.step
        return real() + state.days * DAY

    monkeypatch.setattr(time, "time", now)
    return state


def train(images, folder, **settings):
    return pretraining.train(pretraining.Config(
        dataset="folder", data_dir=str(images), image_size=8, device="cpu", width_multiplier=1 / 16, batch_size=16, num_epochs=6,
        log_every=1, output_dir=str(folder), **settings))


def test_a_run(tiny_images, tmp_path, monkeypatch, jumping, capsys):
    monkeypatch.setitem(models.ENCODERS, "resnet18", encoder_of(BLOCKS))
    first = train(tiny_images, tmp_path, max_steps=8)
    os.utime(first.weights, (time.time() + 9 * DAY,) * 2)  # before the clock was set back
    jumping.days = -5.0
    second = train(tiny_images, tmp_path, max_steps=13)
    assert (first.step, second.step) == (8, 13)
    assert [os.path.basename(result.weights) for result in (first, second)] == ["f_online_2.h5", "f_online_step_13.h5"]
    assert runfiles.Run(str(tmp_path)).weights() == second.weights
    lines = re.findall(r"Time=(\S+), (\S+) images/s, .* (\d+):(\d\d):(\d\d) left", capsys.readouterr().out)
    assert len(lines) == 13
    for line in lines:
        seconds, rate, hours = (float(figure) for figure in line[:3])
        assert 0 <= seconds < 600 and rate > 0 and hours == 0
    assert all(0 < figures["images_per_second"] for figures in second.history.log)


def test_a_pause_is_no_part_of_the_time_that_is_left(tiny_images, tmp_path, monkeypatch, capsys):
    """As that of a laptop that slept for a day."""
    monkeypatch.setitem(models.ENCODERS, "resnet18", encoder_of(BLOCKS))
    log = runs.Run._log

    def after_a_pause(run, *figures):
        if run.step == 7:
            run.since -= DAY
        log(run, *figures)

    monkeypatch.setattr(runs.Run, "_log", after_a_pause)
    train(tiny_images, tmp_path)
    lines = re.findall(r"Time=(\S+), .* (\d+):\d\d:\d\d left", capsys.readouterr().out)
    assert [float(seconds) >= DAY for seconds, _ in lines] == [step == 7 for step in range(1, 25)]
    assert {hours for _, hours in lines} == {"0"}


def test_curves_stay_in_the_order_in_which_runs_were_started(tmp_path, monkeypatch):
    """TensorBoard reads the files of a folder in the order of their names."""
    names = []
    for days in (0, -1, 2, 2, -3):
        monkeypatch.setattr(time, "time", lambda days=days: 1.7e9 + days * DAY)
        progress.Curves(str(tmp_path), 0).close()
        names += [name for name in os.listdir(str(tmp_path)) if name not in names]
    assert len(names) == 5 and names == sorted(names)


def test_the_bar_moves_on(monkeypatch, capsys):
    real, back = time.time, []
    monkeypatch.setattr("tqdm.std.time", lambda: real() - DAY * len(back))
    with progress.Progress(terminal=True) as shown:
        shown.step(1, 100, "1/2", 0.5, 64)
        back.append(1)
        monkeypatch.setattr(shown._bar, "mininterval", 0.0)
        for step in range(2, 8):
            time.sleep(0.01)
            shown.step(step, 100, "1/2", 0.5, 64)
        assert shown._bar.last_print_n == 7 and shown._bar.format_dict["elapsed"] >= 0
    assert "step 7/100" in capsys.readouterr().err


def test_a_store_is_committed_as_often(tmp_path, monkeypatch, tiny_images):
    """A clock that is set back must not put off the next time by a day."""
    monkeypatch.setattr(store, "SECONDS_A_COMMIT", 0.0)
    commits, real, since = [], store.Store._commit, []

    def back():
        since.append(1)
        return 1.7e9 - len(since)

    monkeypatch.setattr(time, "time", back)
    monkeypatch.setattr(store.Store, "_commit", lambda self, file: commits.append(1) or real(self, file))
    said = []
    folders.read(str(tiny_images), 8, 0.1, cache_dir=str(tmp_path), say=said.append)
    assert len(commits) > 1 and re.search(r"Decoded \d+ images in \d+ s", said[-1])
