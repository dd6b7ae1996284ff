"""The loss of BYOL (arXiv:2006.07733, equation 2)."""
from typing import Callable, Sequence

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


def multi_view_loss(predictions: Sequence[tf.Tensor], projections: Sequence[tf.Tensor]) -> tf.Tensor:
    """`byol_loss` for k >= 2 views, where the target of each view's prediction is the mean of the other views' projections.

    predictions, projections: k tensors (b, d) each, any float dtype, in the order of the views. Gives a float32 scalar in [0, 4]; for
    k = 2 it is BYOL's symmetric loss. As in FastSiam (Pototzky et al., 2022), the projections are averaged as they are, longer ones
    weighing more, and their mean is l2-normalised, being one side of a cosine. ValueError for other numbers of tensors.
    """
    k = len(projections)
    if len(predictions) != k or k < 2:
        raise ValueError("%d predictions and %d projections: give as many of both, at least 2" % (len(predictions), k))
    z = [tf.cast(projection, tf.float32) for projection in projections]
    targets = [tf.add_n(z[:view] + z[view + 1:]) / (k - 1) for view in range(k)]
    return byol_loss(tf.concat(predictions, axis=0), tf.concat(targets, axis=0))


def projection_spread(z: tf.Tensor, over_replicas: Callable[[tf.Tensor], tf.Tensor] = tf.identity) -> tf.Tensor:
    """Standard deviation of the l2-normalised projections over the batch, averaged over their dimensions.

    z: (n, d), any float dtype. Gives a float32 scalar: 0 when all images are projected to one point, which is a
    collapse, and about 1/sqrt(d), 0.088 for d = 128, when they spread evenly over the sphere.
    over_replicas: gives a tensor's mean over all devices where z is only a part of the batch.
    """
    z = tf.math.l2_normalize(tf.cast(z, tf.float32), axis=1)
    deviations = z - over_replicas(tf.reduce_mean(z, axis=0, keepdims=True))
    return tf.reduce_mean(tf.sqrt(over_replicas(tf.reduce_mean(tf.square(deviations), axis=0))))
