"""Learning rate and target momentum as functions of the step: pure, so that a resumed run needs nothing but its step."""
import math
from typing import Callable, Union

import tensorflow as tf

Step = Union[int, tf.Tensor]


def scaled_learning_rate(learning_rate: float, batch_size: int) -> float:
    """The linear scaling rule (Goyal et al., 2017, arXiv:1706.02677): `learning_rate` is given for a batch of 512."""
    return learning_rate * batch_size / 512


def cosine(step: Step, base: float, total_steps: int) -> tf.Tensor:
    """Half a cosine from `base` at step 0 to 0 at `total_steps`, without restarts (arXiv:1608.03983). float32 scalar.

    >>> [round(float(cosine(step, 2.0, 100)), 6) for step in (0, 50, 100)]
    [2.0, 1.0, 0.0]
    """
    progress = tf.minimum(tf.cast(step, tf.float32) / float(total_steps), 1.0)
    return 0.5 * base * (1.0 + tf.cos(math.pi * progress))


def constant(step: Step, base: float, total_steps: int) -> tf.Tensor:
    """`base` at every step. float32 scalar."""
    del step, total_steps
    return tf.constant(base, tf.float32)


def polynomial(step: Step, base: float, total_steps: int, end: float, power: float) -> tf.Tensor:
    """From `base` at step 0 to `end` at `total_steps` and after: (base - end) * (1 - step / total)^power + end."""
    left = 1.0 - tf.minimum(tf.cast(step, tf.float32) / float(total_steps), 1.0)
    return (base - end) * left ** power + end


def warmup(step: Step, base: float, total_steps: int, warmup_steps: int, schedule: Callable[..., tf.Tensor] = cosine) -> tf.Tensor:
    """Linear from 0 at step 0 to `base` at `warmup_steps`, then `schedule` over the steps that are left. float32 scalar.

    As in Goyal et al., 2017 (arXiv:1706.02677), section 2.2, and in the BYOL paper. `schedule` must begin at `base`. ValueError if no
    steps are left. With warmup_steps 0 it is `schedule` to the bit.

    >>> [round(float(warmup(step, 2.0, 110, 10)), 6) for step in (0, 5, 10, 60, 110)]
    [0.0, 1.0, 2.0, 1.0, 0.0]
    """
    if not warmup_steps:
        return schedule(step, base, total_steps)
    if warmup_steps >= total_steps:
        raise ValueError("%d warm-up steps leave none of %d" % (warmup_steps, total_steps))
    step = tf.cast(step, tf.float32)
    rate = schedule(tf.maximum(step - float(warmup_steps), 0.0), base, total_steps - warmup_steps)
    return rate * tf.minimum(step / float(warmup_steps), 1.0)


def momentum_to_one(step: Step, base: float, total_steps: int) -> tf.Tensor:
    """The target's momentum, from `base` at step 0 to 1 at `total_steps`, by half a cosine. float32 scalar.

    1 - (1 - base) * (cos(pi * step / total_steps) + 1) / 2, as in the BYOL paper (arXiv:2006.07733), section 3.3.

    >>> [round(float(momentum_to_one(step, 0.9, 100)), 6) for step in (0, 50, 100)]
    [0.9, 0.95, 1.0]
    """
    return 1.0 - cosine(step, 1.0 - base, total_steps)


LEARNING_RATES = {"cosine": cosine, "constant": constant}
TARGET_MOMENTA = {"constant": constant, "cosine": momentum_to_one}
