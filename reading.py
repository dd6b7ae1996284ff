"""How to read the curves of a pretraining: the rules by which a run is called healthy, collapsed, or too young to tell.

Each function is given one curve of a run and gives a Reading: one of KINDS, and a sentence with the run's own figures. What
the rules rest on: the loss first falls while the projections contract, and rises again while they spread. A low loss
is therefore no sign of a good encoder. The k-NN accuracy at first falls below that of random weights.
"""
from typing import Any, NamedTuple, Sequence

import numpy as np

from health import COLLAPSED

KINDS = ("overflow", "collapsed", "not learning", "not risen", "contracted", "uneven", "too early to tell", "healthy")  # worst first
CONTRACTED = 0.4  # of an even spread; healthy slow runs were seen at this and above
EARLY = 1000  # steps before which nothing is said of loss and spread; the spread was lowest at step 240 of a healthy run
EARLY_KNN = 5000  # the same of the k-NN accuracy, which rose above that of random weights at step 1500 of a healthy run
RISEN = 0.01  # an accuracy that differs by less may be by chance
UNEVEN = 0.5  # of the median speed
# The published losses, of ResNet-18 at batch 512 on CIFAR-10: in epoch 1 on an Ascend 910 (ModelZoo's README), and the range
# over epochs 98 to 100 of 100 on a V100 (the same).
PUBLISHED_BATCHES, PUBLISHED_LOSSES = (10, 20, 30), (1.00723, 0.89159, 0.82090)
PUBLISHED_EPOCHS, PUBLISHED_RANGE = (97, 100), (0.326, 0.380)


class Reading(NamedTuple):
    """kind: one of KINDS, or empty where there is nothing to judge. text: a sentence or two that say how to read the curve."""
    kind: str
    text: str


def worst(readings: Sequence[Reading]) -> Reading:
    """The one to tell first: that of the worst kind. Those without a kind do not count; there must be another."""
    return min((reading for reading in readings if reading.kind), key=lambda reading: KINDS.index(reading.kind))


def even_spread(outputs: int) -> float:
    """The spread of unit vectors of `outputs` numbers that lie evenly on the sphere: 1 / sqrt(outputs), 0.088 for 128."""
    return outputs ** -0.5


def smooth(values: Any) -> np.ndarray:
    """Means of neighbouring values, a two-hundredth of them each: float64 (n - n // 200 + 1,), or (n,) of fewer than 400.

    In blocks as wide as the mean: the end of one and the beginning of the next are summed each but once, so that the work is of n
    and not of its square, and a value that is not finite spoils no other mean than those it is in.
    """
    width = max(1, len(values) // 200)
    number = len(values) - width + 1
    blocks = np.zeros((-(-len(values) // width), width))
    blocks.flat[:len(values)] = values
    ends, begun = np.cumsum(blocks[:, ::-1], axis=1)[:, ::-1].ravel(), np.cumsum(blocks, axis=1).ravel()
    return (ends[:number] + np.where(np.arange(number) % width, begun[width - 1:width - 1 + number], 0)) / width


def loss(losses: Any, collapsed: bool = False) -> Reading:
    """Of the losses of all batches, at least one. collapsed: whether `spread` is called so."""
    values = np.asarray(losses, np.float64)
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        return Reading("overflow", "The loss of step %d is not a finite number, and what follows is worth nothing. Try a lower "
                       "--learning_rate, or --precision_mode must_keep_origin_dtype." % (bad[0] + 1))
    if collapsed:
        return Reading("collapsed", "The loss is low because all images are projected to nearly the same point.")
    if len(values) < EARLY:
        return Reading("too early to tell", "These are %d steps. The loss falls first, while the projections contract, and rises "
                       "later, while they spread." % len(values))
    curve = smooth(values)
    lowest, last = curve.min(), curve[-1]
    if last > 0.9 * values[:10].mean():
        return Reading("not learning", "The loss is %.3f and was %.3f in the first 10 steps: it should have fallen. The "
                       "--learning_rate may be too low, or too high." % (last, values[:10].mean()))
    if last > 1.1 * lowest:
        return Reading("healthy", "The loss fell to %.3f by step %d and has risen to %.3f, as it does while the projections "
                       "spread." % (lowest, int(curve.argmin()) + len(values) - len(curve) + 1, last))
    return Reading("healthy", "The loss is %.3f, near its lowest. A low loss does not mean a good encoder." % last)


def first_batches(losses: Any, comparable: bool) -> Reading:
    """Of the losses of the first batches. comparable: whether the published ones are of such a run."""
    if not comparable:
        return Reading("", "No published losses are of such a run: they are of ResNet-18 at full width on CIFAR-10 at batch 512.")
    pairs = [(batch, losses[batch - 1], known) for batch, known in zip(PUBLISHED_BATCHES, PUBLISHED_LOSSES) if batch <= len(losses)]
    return Reading("", "Published: %s. They are of single batches of another device and seed."
                   % ", ".join("%.3f at batch %d, here %.3f" % (known, batch, own) for batch, own, known in pairs)
                   if pairs else "The published losses begin at batch %d." % PUBLISHED_BATCHES[0])


def spread(steps: Sequence[float], spreads: Sequence[float], even: float) -> Reading:
    """Of the spread of the projections at each of these steps, at least one. even: see `even_spread`."""
    values = np.asarray(spreads, np.float64)
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        return Reading("overflow", "The spread is not a finite number at step %d." % steps[bad[0]])
    parts = values / even
    lowest = int(parts.argmin())
    last = float(np.median(parts[-5:]))
    told = "The spread is %.2f of an even one (dotted)" % last
    if last < COLLAPSED:
        return Reading("collapsed", "%s: all images are projected to nearly the same point. Try a lower --learning_rate, or a "
                       "higher --target_momentum." % told)
    if steps[-1] < EARLY:
        return Reading("too early to tell", "%s after %d steps. It falls at first and rises later; near 0 would be a collapse."
                       % (told, steps[-1]))
    if last > parts[lowest] + 0.02:
        told += "; it was lowest, %.2f, at step %d and has risen since" % (parts[lowest], steps[lowest])
    if last < CONTRACTED:
        return Reading("contracted", "%s. Healthy runs stay above %g: if it does not rise, try a lower --learning_rate or a higher "
                       "--target_momentum." % (told, CONTRACTED))
    return Reading("healthy", told + ".")


def knn(steps: Sequence[float], accuracies: Sequence[float], taken: int, start: str = "random weights") -> Reading:
    """Of the k-NN accuracies in [0, 1] at each of these steps, at least one. taken: how many steps the run has taken.

    start: the weights that it began with, in words.
    """
    first, last, best = accuracies[0], accuracies[-1], max(accuracies)
    if steps[0] > 0:
        return Reading("", "The k-NN accuracy is %.2f %% at step %d; that of %s, to compare it with, was not measured."
                       % (100 * last, steps[-1], start))
    if len(accuracies) == 1:
        return Reading("too early to tell", "The k-NN accuracy is %.2f %% with %s, and was not measured again yet."
                       % (100 * last, start))
    told = "The k-NN accuracy is %.2f %% at step %d and was %.2f %% with %s" % (100 * last, steps[-1], 100 * first, start)
    if last > first + RISEN:
        fallen = "; the best was %.2f %%" % (100 * best) if best > last + RISEN else ""
        return Reading("healthy", "%s%s. This is the best sign of learning." % (told, fallen))
    if taken < EARLY_KNN:
        return Reading("too early to tell", "%s. It falls at first, and needs thousands of steps to rise." % told)
    return Reading("not risen", "%s: after so many steps it should have risen. Look at the spread of the projections." % told)


def learning_rate(rates: Sequence[float]) -> Reading:
    """Of the learning rate at each log line, at least one."""
    return Reading("", "It went from %.3g to %.3g; the flag --learning_rate is for a batch of 512." % (rates[0], rates[-1]))


def speed(images_per_second: Sequence[float]) -> Reading:
    """Of the speed at each log line, at least one."""
    median = float(np.median(images_per_second))
    slow = float(np.mean(np.asarray(images_per_second) < UNEVEN * median))
    if slow < 0.05:
        return Reading("", "The median is %.0f images/s." % median)
    return Reading("uneven", "The median is %.0f images/s, but %.0f %% of the log lines are below half of it, as when other work runs "
                   "on the machine." % (median, 100 * slow))
