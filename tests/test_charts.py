"""Names in pictures are drawn as they are written."""
import warnings

import numpy as np
import pytest
import tensorflow as tf
from matplotlib.figure import Figure
from matplotlib.mathtext import MathTextParser

import charts
import embed
import finetuning

NAMES = [r"$\frac{$", "_hidden", "a\n\tb", "<b>&", "x" * 300, "$a$ and $b$", r"\$", "\udcff", "", "%s {}"]


@pytest.fixture
def no_formulas(monkeypatch):
    """Fails where matplotlib reads a text as a formula, or warns."""
    def parse(*_, **__):
        raise AssertionError("a name was read as a formula")

    monkeypatch.setattr(MathTextParser, "parse", parse)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.mark.parametrize("name, drawn", [
    ("cat", "cat"), ("cost in $", r"cost in \$"), (r"$\frac{$", r"\$\frac{\$"), ("_a", " _a"), ("a\n\tb ", "a b"), ("a\0b", "a?b"),
    ("\ud800", "?"), ("", " "), ("x" * 20 + "y" * 2 + "z" * 20, "x" * 20 + "..." + "z" * 17), ("y" * 40, "y" * 40), (7, "7")])
def test_plain(name, drawn):
    assert charts.plain(name) == drawn and len(drawn.replace("\\$", "$")) <= charts.LONGEST + 1


@pytest.mark.parametrize("name", NAMES)
def test_a_chart_and_its_legend(name, no_formulas):
    png = charts.chart(lambda axes: axes.plot([1, 2], label=charts.plain(name)), "title", "x", "y")
    assert tf.io.decode_png(png).shape[:2] == (570, 900)


def test_every_class_is_in_the_legend_of_a_map(tmp_path, no_formulas, monkeypatch):
    legends = []
    monkeypatch.setattr(Figure, "legend", lambda self, handles, labels, **_: legends.append(labels))
    points = np.random.RandomState(0).rand(30, 2)
    embed.draw({"PCA": points}, np.arange(30) % 10, NAMES, str(tmp_path / "map.png"))
    assert legends == [[charts.plain(name, 18) for name in NAMES]]


def test_any_name_of_a_class_is_drawn_in_both_pictures(tmp_path, no_formulas):
    points = np.random.RandomState(0).rand(30, 2)
    embed.draw({"PCA": points, "t-SNE": points}, np.arange(30) % 10, NAMES, str(tmp_path / "map.png"))
    finetuning.draw_confusion(np.eye(10, dtype=np.int64), NAMES, str(tmp_path / "confusion.png"))
    size = tf.io.decode_png((tmp_path / "confusion.png").read_bytes()).shape
    assert (tmp_path / "map.png").stat().st_size > 1000 and max(size) < 2000, "long names do not make the picture large"


@pytest.mark.parametrize("n", [0, 1, charts.POINTS, charts.POINTS + 1, 5 * charts.POINTS + 3])
def test_a_curve_of_millions_is_drawn_by_some_of_its_points(n):
    x, y = charts.thin(np.arange(n), np.arange(n) * 2)
    assert (y == 2 * x).all() and len(x) == len(y) <= charts.POINTS and (n > charts.POINTS or len(x) == n)
    assert n == 0 or x[-1] == n - 1 and (np.diff(x) == -(-n // charts.POINTS)).all()
