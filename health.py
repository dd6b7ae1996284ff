"""Whether a training is well: losses and weights that are no numbers, steps without effect, projections that collapse.

Each function looks at figures that a run has, and gives what is wrong in words, or None.
"""
import math
from typing import Optional, Sequence

# Below this fraction of the spread that evenly spread projections have; slow healthy runs were seen at 0.4 and above.
COLLAPSED = 0.05
# So many steps without effect in a row. At first the loss scale, 2 ** 15, may have to be halved a few times; at 1 it ends.
SKIPPED = 5
HALVINGS = 16  # steps that are skipped before none is left


def bad_loss(losses: Sequence[float], step: int) -> Optional[str]:
    """losses: the latest, of which the last is of `step`, counted from 1."""
    bad = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
    return None if bad is None else "The loss of step %d is %s" % (step - len(losses) + bad + 1, losses[bad])


def told(scale: float, skipped: int) -> str:
    """The end of a log line: the loss scale, and how many steps were skipped so far. Nothing where the loss is not scaled (0)."""
    return ", loss scale %g, %d step%s skipped" % (scale, skipped, "" if skipped == 1 else "s") if scale else ""


def skipped_in_a_row(skipped: Sequence[int], step: int) -> int:
    """How many steps, up to `step`, were skipped. skipped: the numbers of all that were, rising."""
    return next((n for n, other in enumerate(reversed(skipped)) if other != step - n), len(skipped))


def overflowing(skipped: Sequence[int], step: int, scale: float) -> Optional[str]:
    """scale: the loss scale that the steps have come down to."""
    number = skipped_in_a_row(skipped, step)
    return None if number < SKIPPED else ("The last %d steps did not change the weights: their gradients overflowed. The loss scale "
                                          "is %g now." % (number, scale))


def without_effect(skipped: Sequence[int], step: int, steps_per_epoch: int, scale: float) -> Optional[str]:
    """Of a whole epoch or more: a lower loss scale did not help, or there is no lower one."""
    number = skipped_in_a_row(skipped, step)
    return None if number < max(steps_per_epoch, HALVINGS) else (
        "The gradients of the last %d steps, a whole epoch or more, overflowed, so that none of them changed the weights (loss scale "
        "%g)" % (number, scale))


def collapsed(spread: float, features: int, step: int) -> Optional[str]:
    """spread: of projections of so many features, as losses.projection_spread gives it."""
    even = features ** -0.5
    return None if spread >= COLLAPSED * even else (
        "The projections have all but collapsed: their spread is %.5f at step %d, where %.4f is even spread and 0 is collapse. A "
        "lower --learning_rate or a higher --target_momentum may help." % (spread, step, even))


def not_risen(before: float, after: float, random_start: bool) -> Optional[str]:
    """before, after: k-NN accuracies at the start and at the end. random_start: whether the weights were random at the start."""
    if after > before:
        return None
    return "It has not risen." if not random_start else (
        "It has not risen: BYOL's features first get worse than random ones and need thousands of steps to get better; the README "
        "has the curve of a longer run.")
