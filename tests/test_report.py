"""The report of a run: one page that needs nothing from outside, and clear words for folders that hold no run."""
import base64
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from command import pretrain
from conftest import ROOT

import report
from commands import UserError


def make_run(folder, **changes):
    """A folder as pretraining.py leaves it after 4 epochs of 10 steps, without weights."""
    os.makedirs(str(folder))
    config = dict(encoder="resnet18", width_multiplier=0.0625, dataset="shapes", data_dir=None, image_size=32, test_fraction=0.1,
                  batch_size=64, num_epochs=4, train_images=645)
    losses = np.linspace(2, 0.5, 40)
    log = [{"step": step, "loss": losses[step - 1], "spread": 0.07, "images_per_second": 100.0 + step, "learning_rate": 1e-3}
           for step in range(5, 41, 5)]
    files = {"config.json": json.dumps(dict(config, **changes)), "losses.txt": "".join("%g\n" % loss for loss in losses),
             "metrics.json": json.dumps({"log": log, "knn": [{"epoch": 4, "step": 40, "accuracy": 0.4321}]}),
             "result_linearevaluation.json": json.dumps({"test_accuracy": 0.8692})}
    for name, content in files.items():
        with open(os.path.join(str(folder), name), "w") as file:
            file.write(content)
    return str(folder)


def test_the_page_needs_nothing_from_outside(tmp_path):
    run = make_run(tmp_path / "one")
    page = open(report.write([run], searched=0)).read()
    assert not re.search(r"(src|href)=\"(?!data:)|https?://|url\(|<script", page)
    pictures = re.findall(r"data:image/png;base64,([^\"]+)", page)
    assert len(pictures) == 6
    assert all(tf.io.decode_png(base64.b64decode(picture)).shape[1] == 900 for picture in pictures)
    for words in ("4 of 4 epochs (40 steps)", "0.6731", "43.21 %", "86.92 %", "122 images/s", "width_multiplier", "one is not"):
        assert words in page, words
    assert {"report_loss.png", "report_knn.png", "report_spread.png", "report_learning_rate.png"} < set(os.listdir(run))
    assert not [name for name in os.listdir(run) if name.startswith(".tmp")]


def test_runs_are_compared_side_by_side(tmp_path):
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "b" / "one", batch_size=128)]
    page = open(report.write(runs, str(tmp_path / "out" / "both.html"), searched=0)).read()
    assert "<td>batch_size</td><td>64</td><td>128</td>" in page and "Where the runs differ" in page
    assert all(run in page for run in runs), "runs of one name are told apart by their folders"
    assert (tmp_path / "out" / "both_loss.png").exists()


def test_only_a_run_like_the_published_one_is_called_comparable(tmp_path):
    like = make_run(tmp_path / "like", width_multiplier=1.0, dataset="cifar10", batch_size=512, num_epochs=200)
    assert report.Run(like).comparable() and not report.Run(make_run(tmp_path / "other")).comparable()


def test_names_and_flags_are_escaped(tmp_path):
    run = make_run(tmp_path / "<b>&'\"", data_dir="<script>alert(1)</script>")
    page = open(report.write([run], searched=0)).read()
    assert "<script>" not in page and "<b>" not in page and "&lt;b&gt;&amp;" in page


def test_what_keeps_neighbours_from_being_drawn_is_told(tmp_path):
    page = open(report.write([make_run(tmp_path / "one")], searched=100)).read()
    assert "Not drawn: the run has saved no weights yet." in page


def test_a_real_run_shows_views_and_neighbours(tmp_path):
    run = tmp_path / "run"
    status, _, error = pretrain(run, "--num_epochs=1", "--max_steps=10", "--knn_every=0")
    assert status == 0, error
    page = open(report.write([str(run)], searched=100)).read()
    assert "Not drawn" not in page and "their two views" in page and "most similar" in page
    picture = tf.io.decode_png((run / "report_neighbours.png").read_bytes()).numpy()
    frames = {tuple(colour) for colour in picture[6, ::16].tolist()}
    assert report.NEUTRAL in frames
    assert any((picture == report.RIGHT).all(-1).ravel()) and any((picture == report.WRONG).all(-1).ravel())


def damaged(name, content):
    def damage(run):
        with open(os.path.join(run, name), "w") as file:
            file.write(content)
    return damage


@pytest.mark.parametrize("damage, words", [
    (lambda run: os.remove(os.path.join(run, "config.json")), ["holds no run", "config.json", "--output_dir"]),
    (lambda run: os.remove(os.path.join(run, "losses.txt")), ["no losses yet", "first epoch"]),
    (damaged("config.json", "{"), ["config.json is damaged"]),
    (damaged("losses.txt", "1.0\nabc\n"), ["losses.txt is damaged", "abc"]),
    (damaged("metrics.json", "x"), ["metrics.json is damaged"]),
])
def test_a_folder_without_a_whole_run_is_one_clear_error(tmp_path, damage, words):
    run = make_run(tmp_path / "one")
    damage(run)
    with pytest.raises(UserError) as error:
        report.write([run], searched=0)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_the_command_answers_in_one_line(tmp_path):
    process = subprocess.Popen([sys.executable, "-B", os.path.join(ROOT, "report.py"), str(tmp_path / "none")],
                               stderr=subprocess.PIPE, universal_newlines=True)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert error == "report.py: There is no folder %s; give the --output_dir of a pretraining.\n" % (tmp_path / "none")
