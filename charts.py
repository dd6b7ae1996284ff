"""The charts of report.py's page: loss, k-NN accuracy, spread, learning rate and speed of one or more runs, as PNG."""
import io
from typing import Any, Callable, Dict, Sequence, Tuple

import numpy as np

# The published losses, of ResNet-18 at batch 512: epoch 1 on an Ascend 910 (ModelZoo's README), and the range over
# epochs 98 to 100 of 100 on a V100 (the same).
PUBLISHED_BATCHES, PUBLISHED_LOSSES = (10, 20, 30), (1.00723, 0.89159, 0.82090)
PUBLISHED_EPOCHS, PUBLISHED_RANGE = (97, 100), (0.326, 0.380)
FIRST_BATCHES = 100
EVEN_SPREAD = 128 ** -0.5  # of 128 numbers that are spread evenly


def _figure(draw: Callable[[Any], None], title: str, x: str, y: str) -> bytes:
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


def curves(runs: Sequence[Any]) -> Dict[str, Tuple[bytes, str]]:
    """name -> (PNG, caption) of every curve that there is something to draw for. runs: report.Run."""
    def loss(axes: Any) -> None:
        for i, run in enumerate(runs):
            width = max(1, len(run.losses) // 200)
            smooth = np.convolve(run.losses, np.ones(width) / width, "valid")
            at = run.epochs(np.arange(1, len(run.losses) + 1))
            axes.plot(at, run.losses, color="C%d" % i, alpha=0.25, linewidth=0.5)
            axes.plot(at[width - 1:], smooth, color="C%d" % i, label=run.name)
        if max(run.config["num_epochs"] for run in runs) >= PUBLISHED_EPOCHS[1]:
            axes.fill_between(PUBLISHED_EPOCHS, *([value] * 2 for value in PUBLISHED_RANGE), color="black",
                              label="published, epochs 98 to 100")

    def first(axes: Any) -> None:
        for i, run in enumerate(runs):
            losses = run.losses[:FIRST_BATCHES]
            axes.plot(np.arange(1, len(losses) + 1), losses, color="C%d" % i, label=run.name)
        axes.plot(PUBLISHED_BATCHES, PUBLISHED_LOSSES, "kx", label="published (Ascend 910)")

    def knn(axes: Any) -> None:
        for i, run in enumerate(runs):
            axes.plot(run.epochs([point["step"] for point in run.knn]), [100 * point["accuracy"] for point in run.knn],
                      "o-", color="C%d" % i, markersize=3, label=run.name)

    def logged(name: str) -> Callable[[Any], None]:
        def draw(axes: Any) -> None:
            for i, run in enumerate(runs):
                axes.plot(*run.logged(name), color="C%d" % i, label=run.name)
            if name == "spread":
                axes.axhline(EVEN_SPREAD, color="black", linestyle=":", linewidth=1, label="evenly spread")
                axes.set_ylim(bottom=0)
        return draw

    published = ("The published losses are of ResNet-18 on CIFAR-10 at batch 512 and can be compared with such a run only; "
                 + ", ".join("%s is %s" % (run.name, "one" if run.comparable() else "not") for run in runs) + ".")
    charts = {
        "loss": (_figure(loss, "Loss", "epoch", "loss"), "Each batch, and the mean over neighbouring batches. Published for epochs "
                 "98 to 100 of 100 on a V100: %.3f to %.3f." % PUBLISHED_RANGE),
        "first_batches": (_figure(first, "Loss of the first %d batches" % FIRST_BATCHES, "batch", "loss"), published)}
    if any(run.knn for run in runs):
        charts["knn"] = (_figure(knn, "k-NN accuracy", "epoch", "%"), "Of test images, by the 200 nearest training images.")
    if any(run.log for run in runs):
        charts["spread"] = (_figure(logged("spread"), "Spread of the projections", "epoch", "standard deviation"),
                            "Of the normalised projections: 0 is collapse.")
        charts["learning_rate"] = (_figure(logged("learning_rate"), "Learning rate", "epoch", ""), "")
        charts["speed"] = (_figure(logged("images_per_second"), "Speed", "epoch", "images/s"), "")
    return charts
