"""The loss of BYOL (arXiv:2006.07733, equation 2)."""
from typing import Callable, List, Sequence

import tensorflow as tf


def byol_loss(p: tf.Tensor, z: tf.Tensor) -> tf.Tensor:
    """2 - 2 * mean over the rows of the cosine of p and z: 0 when all point the same way, 4 when opposite.

    p: (n, d) predictions of the online networks; z: (n, d) projections of the target networks; any float dtype, as
    large as they like: they are compared in float32. For BYOL's symmetric loss p is [p1; p2] and z is [z2; z1].
    Gives a float32 scalar. Gradients pass through z as well: it is the train step that differentiates by the online weights only.

    >>> float(byol_loss(tf.constant([[3., 4.]]), tf.constant([[4., -3.]])))
    2.0
    """
    p = tf.math.l2_normalize(tf.cast(p, tf.float32), axis=1)
    z = tf.math.l2_normalize(tf.cast(z, tf.float32), axis=1)
    return 2.0 - 2.0 * tf.reduce_mean(tf.reduce_sum(p * z, axis=1))


def targets_of_views(projections: Sequence[tf.Tensor]) -> List[tf.Tensor]:
    """What the prediction from each of k >= 2 views is held against: the mean of the other views' projections.

    projections: k tensors (b, d), any float dtype, in the order of the views. Gives k of float32. For k = 2 each is the other view's
    projection, as in BYOL. As in FastSiam (Pototzky et al., 2022), the projections are averaged as they are, longer ones weighing
    more; `byol_loss` normalises the mean, being one side of a cosine. ValueError for fewer than 2.
    """
    k = len(projections)
    if k < 2:
        raise ValueError("%d projections: there must be those of at least 2 views" % k)
    z = [tf.cast(projection, tf.float32) for projection in projections]
    return [tf.add_n(z[:view] + z[view + 1:]) / (k - 1) for view in range(k)]


def projection_spread(z: tf.Tensor, over_replicas: Callable[[tf.Tensor], tf.Tensor] = tf.identity) -> tf.Tensor:
    """Standard deviation of the l2-normalised projections over the batch, averaged over their dimensions.

    z: (n, d), any float dtype. Gives a float32 scalar: 0 when all images are projected to one point, which is a
    collapse, and about 1/sqrt(d), 0.088 for d = 128, when they spread evenly over the sphere.
    over_replicas: gives a tensor's mean over all devices where z is only a part of the batch.
    """
    z = tf.math.l2_normalize(tf.cast(z, tf.float32), axis=1)
    deviations = z - over_replicas(tf.reduce_mean(z, axis=0, keepdims=True))
    return tf.reduce_mean(tf.sqrt(over_replicas(tf.reduce_mean(tf.square(deviations), axis=0))))
