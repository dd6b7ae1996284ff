"""The charts of report.py's page, as PNG, and how names are drawn in any picture by matplotlib: as plain text."""
import functools
import io
from typing import Any, Callable, Dict, List, Sequence

import numpy as np

import reading
from runfiles import Run

POINTS = 20000  # of a curve; more would be dots upon dots, and slow to draw
LONGEST = 40  # letters of a name
FIRST_BATCHES = 100
CURVES = (  # name, title, axes
    ("knn", "k-NN accuracy", "epoch", "%"), ("loss", "Loss", "epoch", "loss"),
    ("spread", "Spread of the projections", "epoch", "standard deviation"),
    ("first_batches", "Loss of the first %d batches" % FIRST_BATCHES, "batch", "loss"),
    ("learning_rate", "Learning rate", "epoch", ""), ("speed", "Speed", "epoch", "images/s"))


def plain(name: Any, longest: int = LONGEST) -> str:
    r"""A name such that matplotlib draws it letter by letter: one line, no formula, not hidden, `longest` letters at most.

    >>> plain("$\\frac{$\n_run")
    '\\$\\frac{\\$ _run'

    matplotlib hides labels that are empty or begin with an underscore, so a space goes before it:

    >>> plain("_run")
    ' _run'
    """
    text = "".join(letter if letter.isprintable() else "?" for letter in " ".join(str(name).split()))
    if len(text) > longest:  # names of runs often differ in their ends
        text = text[:longest // 2] + "..." + text[3 - longest + longest // 2:]
    return (" " if text[:1] in ("", "_") else "") + text.replace("$", r"\$")


def thin(*values: Any) -> List[np.ndarray]:
    """Every second, third ... of the values of a curve, so that at most POINTS are drawn; the last among them.

    >>> thin(range(3 * POINTS))[0].tolist()[-3:]
    [59993, 59996, 59999]
    """
    step = -(-len(values[0]) // POINTS) or 1
    return [np.asarray(each)[::-1][::step][::-1] for each in values]


def chart(draw: Callable[[Any], None], title: str, x: str, y: str) -> bytes:
    """A chart as a PNG's content; `draw` is given its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.8), dpi=150)
    axes = figure.add_subplot(1, 1, 1)
    draw(axes)
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.margins(x=0.02)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    content = io.BytesIO()
    figure.savefig(content)
    return content.getvalue()


def curves(runs: Sequence[Run]) -> Dict[str, bytes]:
    """name -> PNG of every curve that there is something to draw for."""
    def draw(axes: Any, name: str) -> None:
        for i, run in enumerate(runs):
            style = {"color": "C%d" % i, "label": plain(run.name)}  # type: Dict[str, Any]
            if name == "loss":
                at, curve = run.epochs(np.arange(1, len(run.losses) + 1)), reading.smooth(run.losses)
                axes.plot(*thin(at, run.losses), color=style["color"], alpha=0.25, linewidth=0.5)
                axes.plot(*thin(at[-len(curve):], curve), **style)
            elif name == "first_batches":
                first = run.losses[:FIRST_BATCHES]
                axes.plot(np.arange(1, len(first) + 1), first, **style)
            elif name == "knn" and run.knn:
                axes.plot(run.epochs(run.knn["step"]), 100 * np.array(run.knn["accuracy"]), "o-", markersize=3, **style)
            elif name != "knn" and run.log:
                axes.plot(*thin(run.epochs(run.log["step"]), run.log["images_per_second" if name == "speed" else name]), **style)
        comparable = [run for run in runs if run.comparable()]
        if name == "first_batches" and comparable:
            axes.plot(reading.PUBLISHED_BATCHES, reading.PUBLISHED_LOSSES, "kx", label="published (Ascend 910)")
        if name == "loss" and any(run.num_epochs >= reading.PUBLISHED_EPOCHS[1] for run in comparable):
            axes.fill_between(reading.PUBLISHED_EPOCHS, *([value] * 2 for value in reading.PUBLISHED_RANGE), color="black",
                              label="published, epochs 98 to 100")
        if name == "spread":
            for even in sorted({run.even_spread() for run in runs}):
                axes.axhline(even, color="black", linestyle=":", linewidth=1, label="evenly spread: %.3f" % even)
            axes.set_ylim(bottom=0)

    return {name: chart(functools.partial(draw, name=name), title, x, y) for name, title, x, y in CURVES
            if any(name in run.readings for run in runs)}
