"""The views of BYOL one image at a time, by tf.image: what augmentation.py is measured against.

The same distributions and the same arithmetic as augmentation.py, whose settings it uses, in the plain way: a random number is
drawn for one image, and each image is cut, flipped, resized and coloured by itself.
"""
from typing import Any, Tuple

import tensorflow as tf

import augmentation as spec


def draw_crop(size: int) -> Tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """top, left, height, width (int32) and flip (bool) for one image of size x size pixels."""
    smallest = max(1, round(spec.MIN_CROP * size))
    longer = tf.random.uniform([], smallest, size + 1, tf.int32)
    shorter = tf.cast(tf.cast(longer, tf.float32) * tf.random.uniform([], spec.MIN_ASPECT, 1.), tf.int32)
    swap = tf.random.uniform([]) < 0.5
    height, width = tf.where(swap, shorter, longer), tf.where(swap, longer, shorter)
    top = tf.random.uniform([], 0, size - height + 1, tf.int32)
    left = tf.random.uniform([], 0, size - width + 1, tf.int32)
    return top, left, height, width, tf.random.uniform([]) < spec.Views.flip


def draw_colors() -> Tuple[tf.Tensor, ...]:
    """brightness, contrast, saturation, hue (float32), distort and grey (bool) for one image."""
    return (tf.random.uniform([], -spec.Views.brightness, spec.Views.brightness),
            tf.random.uniform([], 1 - spec.Views.contrast, 1 + spec.Views.contrast),
            tf.random.uniform([], 1 - spec.Views.saturation, 1 + spec.Views.saturation),
            tf.random.uniform([], -spec.Views.hue, spec.Views.hue),
            tf.random.uniform([]) < spec.Views.distort, tf.random.uniform([]) < spec.Views.grey)


def apply(image: tf.Tensor, top: Any, left: Any, height: Any, width: Any, flip: Any, brightness: Any, contrast: Any,
          saturation: Any, hue: Any, distort: Any, grey: Any) -> tf.Tensor:
    """One view, float32 (s, s, 3) in [0, 1], of one image, uint8 (s, s, 3), by the given parameters, all scalars."""
    size = image.shape[0]
    x = tf.cast(image, tf.float32) / 255.
    x = tf.image.resize(x[top:top + height, left:left + width], (size, size))
    if flip:
        x = tf.image.flip_left_right(x)
    if distort:
        x = tf.image.adjust_brightness(x, brightness)
        x = tf.image.adjust_contrast(x, contrast)
        x = tf.image.adjust_saturation(x, saturation)
        x = tf.clip_by_value(tf.image.adjust_hue(x, hue), 0., 1.)
    if grey:
        x = tf.tile(tf.reduce_sum(x * tf.constant(spec.GREY_WEIGHTS), 2, keepdims=True), [1, 1, 3])
    return tf.ensure_shape(x, (size, size, 3))


def view(image: tf.Tensor) -> tf.Tensor:
    """One view, float32 (s, s, 3) in [0, 1], of one image, uint8 (s, s, 3), for a graph: in one, each use draws for itself."""
    return apply(image, *draw_crop(image.shape[0]), *draw_colors())


compiled_view = tf.function(view)


def called_for_each(images: tf.Tensor) -> Tuple[tf.Tensor, tf.Tensor]:
    """Two views of each image, (b, s, s, 3), by a call from Python for each: the way of the reference."""
    pairs = [(compiled_view(image), compiled_view(image)) for image in images]
    return tf.stack([pair[0] for pair in pairs]), tf.stack([pair[1] for pair in pairs])


def parallel_map(images: Any, batch_size: int) -> tf.data.Dataset:
    """Pairs of views (batch_size, s, s, 3) of the images, again and again, by a map over single images on all cores."""
    pixels = tf.convert_to_tensor(images)
    indices = tf.data.Dataset.range(len(images)).shuffle(len(images)).repeat()

    def two_views(index: tf.Tensor) -> Tuple[tf.Tensor, tf.Tensor]:
        image = tf.gather(pixels, index)
        return view(image), view(image)

    return indices.map(two_views, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).batch(
        batch_size, drop_remainder=True).prefetch(4)
