"""Learning rate as a function of the step: pure functions, so that a resumed run needs nothing but its step."""
import math
from typing import Union

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


LEARNING_RATES = {"cosine": cosine, "constant": constant}
