"""The report of a run: one page that needs nothing from outside, and clear words for folders that hold no run."""
import base64
import functools
import html
import itertools
import json
import math
import os
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import tensorflow as tf
from command import pretrain
from conftest import ROOT
from matplotlib.figure import Figure

import charts
import datasets
import evaluation
import models
import report
import weights
from commands import UserError

LINE = {"step": 5, "loss": 1.0, "spread": 0.07, "images_per_second": 100.0, "learning_rate": 1e-3}


def put(path, content):
    with open(path, "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())


def make_run(folder, **changes):
    """A folder as pretraining.py leaves it after 4 epochs of 10 steps, without weights."""
    os.makedirs(str(folder))
    config = dict(encoder="resnet18", width_multiplier=0.0625, dataset="shapes", data_dir=None, image_size=32, test_fraction=0.1,
                  batch_size=64, num_epochs=4, train_images=645)
    losses = np.linspace(2, 0.5, 40)
    log = [dict(LINE, step=step, loss=losses[step - 1], images_per_second=100.0 + step) for step in range(5, 41, 5)]
    files = {"config.json": json.dumps(dict(config, **changes)), "losses.txt": "".join("%g\n" % loss for loss in losses),
             "metrics.json": json.dumps({"log": log, "knn": [{"epoch": 4, "step": 40, "accuracy": 0.4321}]}),
             "result_linearevaluation.json": json.dumps({"test_accuracy": 0.8692})}
    for name, content in files.items():
        put(os.path.join(str(folder), name), content)
    return str(folder)


def test_the_page_needs_nothing_from_outside(tmp_path):
    run = make_run(tmp_path / "one")
    page = open(report.write([run], searched=0)).read()
    assert not re.search(r"(src|href)=\"(?!data:)|https?://|url\(|<script", page)
    pictures = re.findall(r"data:image/png;base64,([^\"]+)", page)
    assert len(pictures) == 6
    assert all(tf.io.decode_png(base64.b64decode(picture)).shape[1] == 900 for picture in pictures)
    for words in ("4 of 4 epochs (40 steps)", "0.6731", "43.21 %", "86.92 %", "122 images/s", "width_multiplier",
                  "No published losses are of such a run"):
        assert words in page, words
    assert {"report_loss.png", "report_knn.png", "report_spread.png", "report_learning_rate.png"} < set(os.listdir(run))
    assert not [name for name in os.listdir(run) if name.startswith(".tmp")]


def test_runs_are_compared_side_by_side(tmp_path):
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "b" / "one", batch_size=128)]
    page = open(report.write(runs, str(tmp_path / "out" / "both.html"), searched=0)).read()
    assert "<td>batch_size</td><td>64</td><td>128</td>" in page and "Where the runs differ" in page
    assert all(run in page for run in runs), "runs of one name are told apart by their folders"
    assert (tmp_path / "out" / "both_loss.png").exists()


def test_accuracies_of_runs_of_one_name_are_printed_for_each(tmp_path, capsys):
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "b" / "one")]
    report.main(runs + ["--searched=0"])
    lines = capsys.readouterr().out.splitlines()
    assert all(any(line.startswith("k-NN: %s: " % run) for line in lines) for run in runs), lines


def test_only_a_run_like_the_published_one_is_called_comparable(tmp_path):
    like = make_run(tmp_path / "like", width_multiplier=1.0, dataset="cifar10", batch_size=512, num_epochs=200)
    other = make_run(tmp_path / "sgd", width_multiplier=1.0, dataset="cifar10", batch_size=512, optimizer="sgd")
    assert report.Run(like).comparable() and not report.Run(other).comparable()
    assert not report.Run(make_run(tmp_path / "from", width_multiplier=1.0, dataset="cifar10", batch_size=512,
                                   encoder_weights="cifar10")).comparable()
    assert not report.Run(make_run(tmp_path / "other")).comparable()


@pytest.mark.parametrize("weights, told", [(None, "random weights"), ("/some/f_online_7.h5", "f_online_7.h5")])
def test_the_page_tells_what_a_run_began_with(tmp_path, weights, told):
    folder = make_run(tmp_path / "run", encoder_weights=weights)
    run = report.Run(folder)
    run.knn = dict(step=[0, 40], accuracy=[0.3, 0.4])
    assert set(run._accuracies()["k-NN"]) == ({False, True} if weights is None else {True})
    assert told in run._readings()["knn"].text


def test_names_and_flags_are_escaped(tmp_path):
    run = make_run(tmp_path / "<b>&'\"", data_dir="<script>alert(1)</script>")
    page = open(report.write([run], searched=0)).read()
    assert "<script>" not in page and "<b>" not in page and "&lt;b&gt;&amp;" in page


@pytest.mark.parametrize("name", [r"$\frac{$", "$x$", "_hidden", "two\nlines", "<b>&amp;", "x" * 250, "\udcff", "a & b %s {}"])
def test_any_name_of_a_run_is_drawn_as_it_is(tmp_path, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        page = open(report.write([make_run(tmp_path / name), make_run(tmp_path / "other")], str(tmp_path / "page.html"),
                                 searched=0)).read()
    assert html.escape(name.encode("utf-8", "replace").decode()) in page


def test_accuracies_come_first_and_are_compared_with_those_of_random_weights(tmp_path):
    run = make_run(tmp_path / "run")
    for folder, name, figures in ((".", "linearevaluation", {"test_accuracy": 0.46, "knn": 0.4}),
                                  (".", "finetuning", {"test_accuracy": 0.7}),
                                  ("random", "linearevaluation", {"test_accuracy": 0.35, "knn": 0.3}),
                                  ("other", "linearevaluation", {"test_accuracy": 0.99})):
        os.makedirs(os.path.join(run, folder), exist_ok=True)
        settings = {"encoder_weights": "none" if folder == "random" else "x/f_online_4.h5", "dataset": "shapes", "label_fraction": 0.1}
        put(os.path.join(run, folder, "result_%s.json" % name), json.dumps(dict(figures, config=settings)))
    put(os.path.join(run, "other", "config.json"), "{}")  # a run of its own
    page = open(report.write([run], searched=0)).read()
    table = page[page.index("<table>"):page.index("</table>")]
    rows = [re.findall("<td>(.*?)</td>", row) for row in table.split("<tr>")]
    assert rows[2:] == [["linear", "35.00 %", "46.00 % (f_online_4.h5)", "+11.00"], ["k-NN", "30.00 %", "43.21 % (epoch 4)", "+13.21"],
                        ["fine-tuned on 10 % of the labels", "-", "70.00 % (f_online_4.h5)", "-"]]
    assert page.index("</table>") < page.index("<img")


def test_an_encoder_that_comes_with_the_program_has_rows_of_its_own(tmp_path, capsys):
    """As in the demo: a short run, and cifar10-narrow, each against random weights."""
    run = make_run(tmp_path / "run")
    for of, figures in (("none", {"test_accuracy": 0.1, "knn": 0.2}), ("cifar10-narrow", {"test_accuracy": 0.3, "knn": 0.4})):
        os.makedirs(os.path.join(run, of))
        put(os.path.join(run, of, "result_linearevaluation.json"),
            json.dumps(dict(figures, config={"encoder_weights": of, "dataset": "shapes", "cached_features": True})))
    report.main([run, "--searched=0"])
    assert capsys.readouterr().out.splitlines() == [
        "linear: random weights -, pretrained 86.92 %, difference -",
        "linear, cached features, cifar10-narrow: random weights 10.00 %, pretrained 30.00 %, difference +20.00",
        "k-NN: random weights 20.00 %, pretrained 43.21 % (epoch 4), difference +23.21",
        "k-NN, cifar10-narrow: random weights 20.00 %, pretrained 40.00 %, difference +20.00",
        "Wrote %s." % os.path.join(run, "report.html")]


@pytest.mark.parametrize("comparable, marks", [(True, 1), (False, 0)])
def test_published_marks_are_drawn_where_they_can_be_compared(tmp_path, monkeypatch, comparable, marks):
    drawn = {}
    monkeypatch.setattr(charts, "chart", lambda draw, title, *_: draw(drawn.setdefault(title, Figure().add_subplot())))
    settings = dict(width_multiplier=1.0, dataset="cifar10", batch_size=512, num_epochs=100) if comparable else {}
    charts.curves([report.Run(make_run(tmp_path / "run", **settings))])
    for title in ("Loss of the first 100 batches", "Loss"):
        labels = drawn[title].get_legend_handles_labels()[1]
        assert sum(label.startswith("published") for label in labels) == marks and "run" in labels


def test_the_size_of_the_heads_sets_what_even_spread_is(tmp_path):
    runs = [report.Run(make_run(tmp_path / str(i), **settings)) for i, settings in enumerate(
        [{}, {"head_features": 64}, {"head_features": 256}, {"head_features": "x"}])]
    assert [run.even_spread() for run in runs] == [128 ** -0.5, 1 / 8, 1 / 16, 128 ** -0.5]
    assert "0.79 of an even one" in runs[0].readings["spread"].text and "0.56 of" in runs[1].readings["spread"].text


def test_what_keeps_neighbours_from_being_drawn_is_told(tmp_path):
    page = open(report.write([make_run(tmp_path / "one")], searched=100)).read()
    assert "Not drawn: the run has saved no weights yet." in page


def test_a_real_run_shows_views_and_neighbours(tmp_path):
    run = tmp_path / "run"
    status, _, error = pretrain(run, "--num_epochs=1", "--knn_every=0", forked=True, images=(640, 100))
    assert status == 0, error
    page = open(report.write([str(run)], searched=100, beside=["cifar10-narrow", "none"])).read()
    assert "Not drawn" not in page and "their two views" in page and "most similar" in page
    for of in ("by f_online_1.h5", "by cifar10-narrow", "by random weights"):
        assert of in page, of
    assert len({(run / ("report_neighbours%s.png" % which)).read_bytes() for which in ("", "_1", "_2")}) == 3
    picture = tf.io.decode_png((run / "report_neighbours.png").read_bytes()).numpy()
    frames = {tuple(colour) for colour in picture[6, ::16].tolist()}
    assert report.NEUTRAL in frames
    assert any((picture == report.RIGHT).all(-1).ravel()) and any((picture == report.WRONG).all(-1).ravel())


def damaged(name, content):
    return lambda run: put(os.path.join(run, name), content)


@pytest.mark.parametrize("damage, words", [
    (lambda run: os.remove(os.path.join(run, "config.json")), ["holds no run", "config.json", "--output_dir"]),
    (lambda run: os.remove(os.path.join(run, "losses.txt")), ["no losses yet", "first epoch"]),
    (damaged("config.json", "{"), ["config.json is damaged"]),
    (damaged("losses.txt", "1.0\nabc\n"), ["losses.txt is damaged", "abc"]),
    (damaged("config.json", "[]"), ["config.json is damaged", "holds []"]),
])
def test_a_folder_without_a_whole_run_is_one_clear_error(tmp_path, damage, words):
    run = make_run(tmp_path / "one")
    damage(run)
    with pytest.raises(UserError) as error:
        report.write([run], searched=0)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_what_is_damaged_is_left_out_with_a_word(tmp_path):
    run = make_run(tmp_path / "one")
    put(os.path.join(run, "metrics.json"), "x")
    put(os.path.join(run, "result_finetuning.json"), json.dumps({"test_accuracy": "high"}))
    put(os.path.join(run, "projection.png"), "no picture")
    page = open(report.write([run], searched=0)).read()
    for words in ("metrics.json is damaged", "What it holds is left out",
                  "test_accuracy of %s/result_finetuning.json, which is high" % run, "projection.png is no PNG", "86.92 %"):
        assert words in page, words
    assert len(re.findall("<img", page)) == 2
    put(os.path.join(run, "metrics.json"), json.dumps({"log": [{"step": 5}, 3, LINE], "knn": [{"step": 1, "accuracy": 12}]}))
    page = open(report.write([run], searched=0)).read()
    assert "2 of 3 lines of log" in page and "1 of 1 lines of knn" in page and len(re.findall("<img", page)) == 5


WRONG = [None, True, "", "text", "\ud800", "<i>$\\frac{$", [], {}, [[1]], {"step": None}, -1, 0, 0.5, 2 ** 31, 1e308, 10 ** 400,
         math.nan, -math.inf, functools.reduce(lambda inner, _: [inner], range(500), [])]
CONTENTS = [b"", b" ", b"{", b"{}", b"[]", b"[1, 2]", b"null", b"1", b"NaN", b"-Infinity", b'"text"', b"\xff\x00\xfe",
            b"nan\ninf\n1e999", b"1\n-1e308\n1e308\n", b"[" * 100000, b"9" * 5000, b'{"log": 1, "knn": {}, "config": 2}', b"{'a': 1}"]


def places(content):
    """Each place in a JSON value, as a path of keys."""
    items = content.items() if isinstance(content, dict) else enumerate(content[:1]) if isinstance(content, list) else ()
    return [(key,) + rest for key, value in items for rest in [()] + places(value)]


def changed(content, place, value):
    """A copy with another value at that place; without it where the value is `places` itself."""
    copy = json.loads(json.dumps(content))
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    if value is places:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return copy


@pytest.fixture
def answers(monkeypatch):
    """A function that makes the page of a folder, which must be whole, or fails in one line; it gives either.

    The charts of the same figures are drawn once only, and one of each ten laid out and saved, for that takes most of the time.
    """
    whole, count, axes, drawn = charts.chart, itertools.count(), Figure().add_subplot(), set()

    def quick(draw, *texts):
        if next(count) % 10 == 0:
            return whole(draw, *texts)
        axes.clear()
        draw(axes)
        return b""

    def answer(folder):
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            warnings.simplefilter("error", UserWarning)
            try:
                run = report.Run(folder)
                key = str([run.losses.tolist(), run.log, run.knn, run.steps_per_epoch, run.num_epochs, run.even_spread()])
                text = report.page([run], {} if key in drawn else charts.curves([run]), [])
                drawn.add(key)
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 500 + 2 * len(folder)
                return str(error)
        assert text.endswith("</body></html>\n") and "<i>" not in text
        return text

    monkeypatch.setattr(charts, "chart", quick)
    return answer


def test_nothing_in_the_files_of_a_run_is_a_traceback(tmp_path, answers):
    """Each key of each file, missing and with each wrong value; each file with each content, and with random bytes."""
    run = make_run(tmp_path / "run")
    put(os.path.join(run, "result.json"), json.dumps({"seconds": 12.5, "device": "CPU", "machine": "x86_64", "cpus": 2,
                                                      "versions": {"python": "3.11"}}))
    put(os.path.join(run, "result_finetuning.json"), json.dumps({"test_accuracy": 0.5, "config": {
        "encoder_weights": "none", "dataset": "shapes", "label_fraction": 0.1, "freeze": False}}))
    random = np.random.RandomState(0)
    noise = [bytes(bytearray(random.randint(0, 256, 50).tolist())) for _ in range(3)]
    cases = 0
    for name in sorted(os.listdir(run)):
        path = os.path.join(run, name)
        with open(path, "rb") as file:
            before = file.read()
        contents = CONTENTS + noise
        if name.endswith(".json"):
            whole = json.loads(before.decode())
            contents = contents + [json.dumps(changed(whole, place, value)).encode() for place in places(whole)
                                   for value in WRONG + [places]]
        for content in contents:
            put(path, content)
            told = answers(run)
            cases += 1
            if content in noise + [b"{", b"[" * 100000]:
                assert "is damaged (" in told, (name, content)
        os.remove(path)
        answers(run)
        os.mkdir(path)
        assert "is damaged (" in answers(run) or name.startswith("result_")
        os.rmdir(path)
        put(path, before)
    assert cases > 700 and "4 of 4 epochs" in answers(run)


def test_no_setting_keeps_the_page_from_being_written_without_neighbours(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "SHAPES_TRAIN", 20)
    monkeypatch.setattr(datasets, "SHAPES_TEST", 10)
    run = report.Run(make_run(tmp_path / "one"))
    put(run.path("f_online_4.h5"), "damaged")
    assert "f_online_4.h5 is not a whole Keras weights file" in report.similar(run, 100)[1]
    settings = dict(run.config)
    for name in ("encoder", "width_multiplier", "dataset", "data_dir", "image_size", "test_fraction"):
        for value in (None, True, "text", [], {"step": None}, -1, 1e308, 10 ** 400, math.nan):
            run.config = dict(settings, **{name: value})
            reason = report.similar(run, 100)[1]
            assert isinstance(reason, str) and "\n" not in reason, (name, value)
        del run.config[name]
        assert name in report.similar(run, 100)[1]
    run.config = dict(settings, dataset="folder", data_dir=str(tmp_path / "gone"))
    assert "gone" in report.similar(run, 100)[1]


def test_many_runs_of_one_network_trace_it_once(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "SHAPES_TRAIN", 20)
    monkeypatch.setattr(datasets, "SHAPES_TEST", 10)
    runs = [report.Run(make_run(tmp_path / str(i))) for i in range(6)]
    for i, run in enumerate(runs):
        weights.save_weights(models.ResNet18(0.0625), run.path("f_online_4.h5"))
    traced = evaluation.inference.experimental_get_tracing_count()
    pictures = [report.neighbours(run, 100) for run in runs]
    assert evaluation.inference.experimental_get_tracing_count() <= traced + 1
    assert not np.array_equal(pictures[0], pictures[1]), "each has its own weights"


def test_the_command_answers_in_one_line(tmp_path):
    process = subprocess.Popen([sys.executable, "-B", os.path.join(ROOT, "report.py"), str(tmp_path / "none")],
                               stderr=subprocess.PIPE, universal_newlines=True)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert error == "report.py: There is no folder %s; give the --output_dir of a pretraining.\n" % (tmp_path / "none")
