"""What is done with a batch of images, as it is told: crop, flip, resize, colours, blur; equal to `tf.image` on each image alone.

All shapes are static, nothing loops over the images, and XLA compiles the arithmetic. What to do is drawn in augmentation.py.
"""
from typing import Any, Optional

import tensorflow as tf

GREY_WEIGHTS = (0.2989, 0.5870, 0.1140)  # red, green, blue: the luma of ITU-R BT.601
BLUR_PART = 10  # a Gaussian's kernel has a tenth of the image's height (the BYOL paper: 23 of 224 pixels)


def crop_flip_resize(images: Any, top: Any, left: Any, height: Any, width: Any, flip: Any,
                     size: Optional[int] = None) -> tf.Tensor:
    """Cut a rectangle out of each image, mirror it left to right where `flip`, resize it to the image's size, or to size x size.

    Equals, within 1e-5, `tf.image.resize` of each crop (bilinear, half-pixel centres, no antialiasing, edges clamped to the crop).

    images: (b, H, W, 3), uint8, or floating in [0, 1]. top, left, height, width: (b,) integers in pixels, of rectangles within the
    image, at least one pixel large. flip: (b,) bool. Returns (b, H, W, 3) float32 in [0, 1]. Raises ValueError for images of another
    rank, dtype or number of channels, or of a shape not known in advance.
    """
    images = _checked(images, bytes_too=True)
    sides = (tf.cast(x, tf.int32) for x in (top, left, height, width))
    return _compiled_crop_flip_resize(images, *sides, tf.cast(flip, tf.bool), size=size)


def distort_colors(images: Any, brightness: Any, contrast: Any, saturation: Any, hue: Any, multiplies: bool = False,
                   order: Any = None) -> tf.Tensor:
    """Adjust brightness, contrast, saturation and hue of each image, in this order, then clip to [0, 1].

    Or else, images in [0, 1], in an order of each image's own, with a clip after each: that of its keys in `order`, (b, 4) floating,
    for the four, the lowest first.

    Equals `tf.image.adjust_*` and `tf.clip_by_value`, image by image and within 1e-5 for what `sample_colors` draws, also for
    values outside of [0, 1] on the way. It leaves out one slip of adjust_saturation, which takes all colour from a red whose hue is
    less than 3e-8 short of a full turn: the hue rounds to 1, and no sector of the colour circle claims it.

    images: (b, H, W, 3) floating. The rest are (b,) floating: what is added to each pixel, or its factor where `multiplies`;
    the factor about each channel's mean over the image; the factor of the saturation (below 0 it acts as 0); the part of a turn of
    the colour circle. Returns (b, H, W, 3) float32 in [0, 1]. Raises ValueError as `crop_flip_resize`, and for uint8.
    """
    images = _checked(images, bytes_too=False)
    colors = (tf.cast(x, tf.float32) for x in (brightness, contrast, saturation, hue))
    return _compiled_distort_colors(images, *colors, order=order, multiplies=multiplies)


def blur(images: Any, deviation: Any) -> tf.Tensor:
    """Blur each image by a Gaussian of its own deviation in pixels, cut off at a tenth of the image's height in all; 0: not at all.

    As DeepMind's code: size 2 * int(height / 20) + 1, which is 23 at 224 pixels, weights that sum to 1, zeros beyond the edges.
    images: (b, H, W, 3) floating; deviation: (b,). Returns float32 of this shape. Raises ValueError as `distort_colors`.
    """
    return _compiled_blur(tf.cast(_checked(images, bytes_too=False), tf.float32), tf.cast(deviation, tf.float32))


def _checked(images: Any, bytes_too: bool) -> tf.Tensor:
    """The images as a tensor; ValueError unless they are (b, H, W, 3) of a dtype that can be used."""
    images = tf.convert_to_tensor(images)
    if images.shape.rank != 4 or images.shape[3] != 3 or not images.shape.is_fully_defined():
        raise ValueError("images must be (batch, height, width, 3), of a shape known in advance (in tf.data: drop_remainder=True), "
                         "not %s" % images.shape)
    if not (images.dtype.is_floating or bytes_too and images.dtype == tf.uint8):
        raise ValueError("images must be %sfloating point in [0, 1], not %s" % ("uint8 or " * bytes_too, images.dtype.name))
    return images


# In between, images lie as (b, H, 3, W): with a row of one channel contiguous, the compiled inner loops run over pixels and use
# vector instructions. The last operation writes (b, H, W, 3), at no cost of its own.


def _sample_points(length: tf.Tensor, size: int) -> tf.Tensor:
    """Where each of `size` resized pixels looks along one axis of its crop (half-pixel centres, clamped to it): (b, size) float32."""
    length = tf.cast(length, tf.float32)[:, None]
    return tf.clip_by_value((tf.range(size, dtype=tf.float32) + 0.5) * (length / size) - 0.5, 0., length - 1)


def _crop_flip_resize(images: tf.Tensor, top: tf.Tensor, left: tf.Tensor, height: tf.Tensor, width: tf.Tensor,
                      flip: tf.Tensor, *, size: Optional[int] = None) -> tf.Tensor:
    """(b, H, W, 3) to (b, H, 3, W), or to `size` x `size` pixels: Wy . image . Wx^T, an interpolation matrix for each image and axis.

    A row of Wy has at most two weights that are not 0, so its product is two gathers of whole rows, straight from the bytes.
    Columns are not contiguous; for them a true matrix product is faster.
    """
    count, rows, columns, _ = images.shape
    high, wide = (size, size) if size else (rows, columns)
    points = _sample_points(height, high)
    above = tf.floor(points)
    below = tf.minimum(above + 1, tf.cast(height, tf.float32)[:, None] - 1)
    start = tf.range(count)[:, None] * rows + top[:, None]  # where a crop's first row is among all
    lines = tf.reshape(images, [count * rows, columns * 3])
    upper = tf.cast(tf.gather(lines, start + tf.cast(above, tf.int32)), tf.float32)  # (b, H, W * 3)
    lower = tf.cast(tf.gather(lines, start + tf.cast(below, tf.int32)), tf.float32)
    x = upper + (lower - upper) * (points - above)[:, :, None]
    x = x / 255 if images.dtype == tf.uint8 else x
    x = tf.transpose(tf.reshape(x, [count, high, columns, 3]), [0, 1, 3, 2])

    points = _sample_points(width, wide)
    points = tf.where(flip[:, None], points[:, ::-1], points) + tf.cast(left, tf.float32)[:, None]
    weights = tf.maximum(0., 1 - tf.abs(points[:, :, None] - tf.range(columns, dtype=tf.float32)))
    x = tf.matmul(tf.reshape(x, [count, high * 3, columns]), weights, transpose_b=True)
    return tf.reshape(x, [count, high, 3, wide])


def _shade(x: tf.Tensor, brightness: tf.Tensor, contrast: tf.Tensor, multiplies: bool) -> tf.Tensor:
    """Brightness, then contrast, of (b, H, 3, W)."""
    mean = tf.reduce_mean(tf.reduce_mean(x, 3, keepdims=True), 1, keepdims=True)  # short sums: less rounding
    brightness, contrast = brightness[:, None, None, None], contrast[:, None, None, None]
    if multiplies:  # the same before and after the contrast, since it multiplies the mean as well
        return (brightness * contrast) * x + brightness * (1 - contrast) * mean
    return contrast * x + ((1 - contrast) * mean + brightness)


def _tint(x: tf.Tensor, saturation: tf.Tensor, hue: tf.Tensor, axis: int) -> tf.Tensor:
    """Saturation and hue of (b, H, 3, W), in closed form, with the channels of the result along this axis, 2 or 3; clipped to [0, 1].

    In HSV, with value V (the largest channel), chroma C (largest less smallest) and hue h in sixths of a turn, a channel is V - C *
    clip(|h - n| - 1, 0, 1), where n is its own hue (red 0, green 2, blue 4) and |.| goes the short way round. adjust_saturation
    multiplies C / V and keeps it at most 1, which makes the chroma min(C * factor, V); adjust_hue adds to h; both leave V alone.
    """
    red, green, blue = tf.unstack(x, axis=2)  # (b, H, W) each
    value = tf.maximum(red, tf.maximum(green, blue))
    chroma = value - tf.minimum(red, tf.minimum(green, blue))
    inverse = 1 / tf.maximum(chroma, 1e-20)  # a grey pixel gets any hue, to no effect: its chroma is 0
    # Which channel is largest is told by comparing channels, never by `channel == value`: the compiler may compute a channel
    # twice, rounded differently, and then none equals `value`. In a tie both hues agree.
    angle = tf.where(blue > tf.maximum(red, green), 4 + (red - green) * inverse,
                     tf.where(green > red, 2 + (blue - red) * inverse, (green - blue) * inverse))
    angle = angle + 6 * hue[:, None, None]
    # Where V <= 0, tf.image takes the saturation as 0; here all channels come out <= 0, and the clip agrees.
    chroma = tf.minimum(tf.maximum(saturation, 0.)[:, None, None] * chroma, value)

    value, chroma, angle = (tf.expand_dims(part, axis) for part in (value, chroma, angle))
    away = angle - tf.reshape(tf.constant([0., 2., 4.]), [3, 1] if axis == 2 else [3])
    away = tf.abs(away - 6 * tf.round(away / 6))
    return tf.clip_by_value(value - chroma * tf.clip_by_value(away - 1, 0., 1.), 0., 1.)


def _distort(x: tf.Tensor, brightness: tf.Tensor, contrast: tf.Tensor, saturation: tf.Tensor, hue: tf.Tensor, *,
             order: Optional[tf.Tensor], multiplies: bool) -> tf.Tensor:
    """(b, H, 3, W) to (b, H, W, 3): the four one after the other, or in the order of each image's keys."""
    if order is not None:
        return _distort_in_order(x, brightness, contrast, saturation, hue, order=order, multiplies=multiplies)
    return _tint(_shade(x, brightness, contrast, multiplies), saturation, hue, 3)


def _distort_in_order(x: tf.Tensor, brightness: tf.Tensor, contrast: tf.Tensor, saturation: tf.Tensor, hue: tf.Tensor, *,
                      order: tf.Tensor, multiplies: bool) -> tf.Tensor:
    """(b, H, 3, W) to (b, H, W, 3): the four in the order of each image's keys, (b, 4), with a clip to [0, 1] after each.

    Within [0, 1] saturation and hue can change places. So each has its turn before, between or after brightness and contrast: three
    passes in which those of another turn get amounts that change nothing.
    """
    first, second, third, fourth = tf.unstack(order, axis=1)
    before = [tf.cast(first < key, tf.int32) + tf.cast(second < key, tf.int32) for key in (third, fourth)]
    for turn in range(3):
        x = _tint(x, tf.where(before[0] == turn, saturation, 1.), tf.where(before[1] == turn, hue, 0.), 3 if turn == 2 else 2)
        if turn < 2:
            bright = (first < second) == (turn == 0)
            x = _shade(x, tf.where(bright, brightness, float(multiplies)), tf.where(bright, 1., contrast), multiplies)
            x = tf.clip_by_value(x, 0., 1.)
    return x


def _blur(x: tf.Tensor, deviation: tf.Tensor) -> tf.Tensor:
    """(b, H, W, 3), by a Gaussian of so many pixels for each image, 0 for none: G . image . G^T, with nothing beyond the edges."""
    count, rows, columns, _ = x.shape
    products = []
    for side in (rows, columns):
        away = tf.range(side, dtype=tf.float32)
        away = (away[:, None] - away) ** 2  # squared distances
        radius = int(rows / BLUR_PART / 2)
        half = -0.5 / tf.maximum(deviation, 1e-3)[:, None, None] ** 2
        taps = tf.reduce_sum(tf.exp(half * tf.range(-radius, radius + 1, dtype=tf.float32) ** 2), 2, keepdims=True)
        products.append(tf.where(away <= radius ** 2, tf.exp(half * away) / taps, 0.))
    x = tf.matmul(products[0], tf.reshape(x, [count, rows, columns * 3]))
    x = tf.transpose(tf.reshape(x, [count, rows, columns, 3]), [0, 1, 3, 2])
    x = tf.matmul(tf.reshape(x, [count, rows * 3, columns]), products[1])
    return tf.transpose(tf.reshape(x, [count, rows, 3, columns]), [0, 1, 3, 2])


# Made at import, because the NPU adapter drops jit_compile from functions that are made after it opened.


@tf.function(jit_compile=True, autograph=False)
def _compiled_crop_flip_resize(images: tf.Tensor, *crops: tf.Tensor, size: Optional[int] = None) -> tf.Tensor:
    return tf.transpose(_crop_flip_resize(images, *crops, size=size), [0, 1, 3, 2])


@tf.function(jit_compile=True, autograph=False)
def _compiled_distort_colors(images: tf.Tensor, *colors: tf.Tensor, order: Optional[tf.Tensor] = None,
                             multiplies: bool = False) -> tf.Tensor:
    x = tf.transpose(tf.cast(images, tf.float32), [0, 1, 3, 2])
    return _distort(x, *colors, order=order, multiplies=multiplies)


@tf.function(jit_compile=True, autograph=False)
def _compiled_blur(images: tf.Tensor, deviation: tf.Tensor) -> tf.Tensor:
    return _blur(images, deviation)


@tf.function(jit_compile=True, autograph=False)
def _compiled_augment(images: tf.Tensor, *drawn: tf.Tensor, solarise: Optional[tf.Tensor] = None, blur: Optional[tf.Tensor] = None,
                      order: Optional[tf.Tensor] = None, multiplies: bool = False, size: Optional[int] = None) -> tf.Tensor:
    brightness, contrast, saturation, hue, distort, grey = drawn[5:]
    x = _crop_flip_resize(images, *drawn[:5], size=size)
    # An image not to be distorted gets parameters that change nothing: cheaper than a choice for each pixel.
    brightness, contrast = tf.where(distort, brightness, float(multiplies)), tf.where(distort, contrast, 1.)
    saturation, hue = tf.where(distort, saturation, 1.), tf.where(distort, hue, 0.)
    x = _distort(x, brightness, contrast, saturation, hue, order=order, multiplies=multiplies)
    x = tf.where(grey[:, None, None, None], tf.reduce_sum(x * tf.constant(GREY_WEIGHTS), 3, keepdims=True), x)
    x = x if blur is None else _blur(x, blur)
    if solarise is not None:
        x = tf.where(solarise[:, None, None, None] & (x >= 0.5), 1 - x, x)
    return x
