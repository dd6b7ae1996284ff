"""The two views of BYOL, made for a whole batch at once: random crop, flip and resize, then colour distortion and grey.

What is drawn and what is done with it are separate. `sample_crops` and `sample_colors` draw, from a seed alone, so any
batch of any run can be made again; `crop_flip_resize` and `distort_colors` do exactly what they are told, and equal
cropping, flipping, resizing and `tf.image.adjust_*` of each image alone. `augment_images_pretraining` and
`augment_images_finetuning` join them. All shapes are static, nothing loops over the images, and the arithmetic is compiled
by XLA; it is meant for `tf.data`, where it runs on the host:

    dataset.batch(512, drop_remainder=True).enumerate().map(lambda step, x: augment_images_pretraining(x, (seed, step)))

The drawing is left out of the compiled part, because XLA's random numbers are not those of TensorFlow's own kernels. So the
same seed gives the same parameters in eager code, in a graph, and on TensorFlow 2.6 and 2.21 alike.
"""
from typing import Any, Dict, NamedTuple, Optional, Sequence, Tuple

import tensorflow as tf

# Distributions of the reference implementation (byol-tensorflow2), for images of 32 x 32.
MIN_CROP = 13 / 32  # the smallest crop's larger side, as a part of the image's side
MIN_ASPECT = 0.67  # a crop's smaller side is its larger side times a number in [0.67, 1), rounded down
FLIP_PROBABILITY = 0.25  # not 0.5: the reference tosses a coin, then flips by a second coin, so one image in four
MAX_BRIGHTNESS = 0.4  # added
MAX_CONTRAST = 0.4  # multiplied by 1 - 0.4 .. 1 + 0.4
MAX_SATURATION = 0.4  # the same
MAX_HUE = 0.1  # added, in turns of the colour circle
DISTORT_PROBABILITY = 0.8
GREY_PROBABILITY = 0.2
GREY_WEIGHTS = (0.2989, 0.5870, 0.1140)  # of red, green, blue: ITU-R BT.601's luma, as tf.image.rgb_to_grayscale rounds it

# One random stream for each parameter: a name stands here once, so no two parameters share one. Their order is part of
# what a seed means: new ones go to the end.
STREAMS = ("height", "width", "swap", "top", "left", "flip",
           "brightness", "contrast", "saturation", "hue", "distort", "grey")


class Crops(NamedTuple):
    """One crop for each image: tensors of shape (b,), int32, in pixels; `flip` is bool."""
    top: tf.Tensor
    left: tf.Tensor
    height: tf.Tensor
    width: tf.Tensor
    flip: tf.Tensor


class Colors(NamedTuple):
    """One colour distortion for each image: tensors of shape (b,), float32; `distort` and `grey` are bool."""
    brightness: tf.Tensor
    contrast: tf.Tensor
    saturation: tf.Tensor
    hue: tf.Tensor
    distort: tf.Tensor
    grey: tf.Tensor


def sample_crops(batch_size: int, seed: Any, image_size: int = 32) -> Crops:
    """Draw one crop and flip for each image of a batch.

    The larger side is uniform over the integers 13..32 (for another size in proportion, round(size * 13/32)..size), the
    smaller one floor(larger * u) with u uniform in [0.67, 1), which of the two is the height is a fair coin, the place is
    uniform over all that fit, and one image in four is to be flipped.

    batch_size: number of images. seed: a pair of integers, as Python ints or as an integer tensor of shape (2,); the same
    pair gives the same crops on every TensorFlow. image_size: side of the (square) images in pixels, at least 1.
    """
    draw = _uniform(batch_size, seed, STREAMS[:6])
    smallest = max(1, round(MIN_CROP * image_size))
    # floor(u * n) of float32 stays below n: u is at most 1 - 2^-23, so the product rounds to at most n - ulp.
    long = smallest + tf.floor(draw["height"] * (image_size - smallest + 1))
    short = tf.maximum(1., tf.floor(long * (MIN_ASPECT + (1 - MIN_ASPECT) * draw["width"])))
    swap = draw["swap"] < 0.5
    height, width = tf.where(swap, short, long), tf.where(swap, long, short)
    top = tf.floor(draw["top"] * (image_size - height + 1))
    left = tf.floor(draw["left"] * (image_size - width + 1))
    return Crops(*(tf.cast(x, tf.int32) for x in (top, left, height, width)), draw["flip"] < FLIP_PROBABILITY)


def sample_colors(batch_size: int, seed: Any) -> Colors:
    """Draw one colour distortion for each image of a batch; none of it depends on `sample_crops` of the same seed.

    brightness is uniform in [-0.4, 0.4), contrast and saturation in [0.6, 1.4), hue in [-0.1, 0.1); distort is true with
    probability 0.8 and grey with 0.2. Arguments as for `sample_crops`.
    """
    draw = _uniform(batch_size, seed, STREAMS[6:])
    return Colors(brightness=MAX_BRIGHTNESS * (2 * draw["brightness"] - 1),
                  contrast=1 + MAX_CONTRAST * (2 * draw["contrast"] - 1),
                  saturation=1 + MAX_SATURATION * (2 * draw["saturation"] - 1),
                  hue=MAX_HUE * (2 * draw["hue"] - 1),
                  distort=draw["distort"] < DISTORT_PROBABILITY, grey=draw["grey"] < GREY_PROBABILITY)


def crop_flip_resize(images: Any, top: Any, left: Any, height: Any, width: Any, flip: Any) -> tf.Tensor:
    """Cut one rectangle out of each image, mirror it left to right where `flip`, and resize it to the image's own size.

    Equals, image by image, cropping, flipping and `tf.image.resize` (bilinear, half-pixel centres, no antialiasing, edges
    clamped to the crop), within 1e-5.

    images: (b, H, W, 3), uint8, or floating in [0, 1]. top, left, height, width: (b,) integers in pixels, of rectangles
    that lie within the image and have at least one pixel. flip: (b,) bool. Returns (b, H, W, 3) float32 in [0, 1].
    Raises ValueError for images of another rank, dtype or number of channels, or a batch size not known in advance.
    """
    images = _checked(images, allow_bytes=True)
    return _compiled_crop_flip_resize(images, *(tf.cast(x, tf.int32) for x in (top, left, height, width)),
                                      tf.cast(flip, tf.bool))


def distort_colors(images: Any, brightness: Any, contrast: Any, saturation: Any, hue: Any) -> tf.Tensor:
    """Adjust brightness, contrast, saturation and hue of each image, in this order, then clip to [0, 1].

    Equals, image by image, `tf.image.adjust_brightness`, `adjust_contrast`, `adjust_saturation`, `adjust_hue` and
    `tf.clip_by_value`, within 1e-5 in the ranges of `sample_colors`, and treats values outside of [0, 1] on the way as they
    do. One slip of theirs is not followed: `adjust_saturation` makes a pixel grey whose hue lies within 3e-8 below a full
    turn, because its hue rounds to 1 and no sector of the colour circle claims it.

    images: (b, H, W, 3) floating. The others are (b,) floating: what is added to each pixel; the factor about each
    channel's mean over the image; the factor of saturation (a negative one acts as 0); the part of a turn of the colour
    circle. Returns (b, H, W, 3) float32 in [0, 1]. Raises ValueError as `crop_flip_resize`, and for uint8 images.
    """
    images = _checked(images, allow_bytes=False)
    return _compiled_distort_colors(images, *(tf.cast(x, tf.float32) for x in (brightness, contrast, saturation, hue)))


def augment_images_pretraining(images: Any, seed: Any, first: int = 0, batch_size: Optional[int] = None) -> tf.Tensor:
    """Make one view of each image: crop, flip, resize; distort the colours of 80 %; turn 20 % grey.

    images: (b, s, s, 3), uint8, or floating in [0, 1]: rows first..first+b of a batch of `batch_size` images (default: all
    of it). The parameters are drawn for the whole batch, so any way of sharing a batch among workers gives the same views
    (the same parameters to the bit, pixels to 1e-6). seed: a pair of integers, Python ints or an integer tensor of
    shape (2,); two views of one batch need two seeds.
    Returns (b, s, s, 3) float32 in [0, 1]. Raises ValueError as `crop_flip_resize`, for images that are not square, and for
    rows that are not within the batch.
    """
    images, rows, batch_size = _checked_rows(images, first, batch_size)
    crops = sample_crops(batch_size, seed, images.shape[1])
    colors = sample_colors(batch_size, seed)
    return _compiled_augment(images, *(x[rows] for x in crops), *(x[rows] for x in colors))


def augment_images_finetuning(images: Any, seed: Any, first: int = 0, batch_size: Optional[int] = None) -> tf.Tensor:
    """Crop, flip and resize each image, with its colours left alone; otherwise as `augment_images_pretraining`."""
    images, rows, batch_size = _checked_rows(images, first, batch_size)
    return _compiled_crop_flip_resize(images, *(x[rows] for x in sample_crops(batch_size, seed, images.shape[1])))


def _uniform(batch_size: int, seed: Any, names: Sequence[str]) -> Dict[str, tf.Tensor]:
    """Draw a (batch_size,) float32 tensor, uniform in [0, 1), from the stream of each of the names."""
    # One by one, because a pair may mix a Python integer with a tensor, such as the step that tf.data counts.
    pair = tf.cast(seed, tf.int64) if tf.is_tensor(seed) else tf.stack([tf.cast(x, tf.int64) for x in seed])
    if pair.shape != (2,):
        raise ValueError("seed must be a pair of integers, not of shape %s" % pair.shape)
    seeds = dict(zip(STREAMS, tf.unstack(tf.random.experimental.stateless_split(pair, len(STREAMS)))))
    return {name: tf.random.stateless_uniform([batch_size], seeds[name]) for name in names}


def _checked(images: Any, allow_bytes: bool) -> tf.Tensor:
    """The images as a tensor; ValueError unless it is (b, H, W, 3) of a dtype that can be used."""
    images = tf.convert_to_tensor(images)
    if images.shape.rank != 4 or images.shape[3] != 3 or not images.shape.is_fully_defined():
        raise ValueError("images must have the shape (batch, height, width, 3), all of it known in advance "
                         "(in tf.data: batch with drop_remainder=True), not %s" % images.shape)
    if not (images.dtype.is_floating or allow_bytes and images.dtype == tf.uint8):
        raise ValueError("images must be %sfloating point in [0, 1], not %s"
                         % ("uint8 or " if allow_bytes else "", images.dtype.name))
    return images


def _checked_rows(images: Any, first: int, batch_size: Optional[int]) -> Tuple[tf.Tensor, slice, int]:
    """The images as a tensor, which rows of the whole batch they are, and that batch's size."""
    images = _checked(images, allow_bytes=True)
    count, height, width = images.shape[0], images.shape[1], images.shape[2]
    if height != width:
        raise ValueError("images must be square, not %d x %d" % (height, width))
    batch_size = count if batch_size is None else batch_size
    if not 0 <= first <= batch_size - count:
        raise ValueError("%d images from row %d on are not within a batch of %d" % (count, first, batch_size))
    return images, slice(first, first + count), batch_size


# Inside, images lie as (b, H, 3, W): a row of one channel is contiguous, so the compiler's inner loops run over pixels, and
# the last step writes (b, H, W, 3) at no cost.


def _sample_points(start: tf.Tensor, length: tf.Tensor, size: int) -> Tuple[tf.Tensor, tf.Tensor]:
    """Where in a crop each of `size` pixels of a resized axis looks: (b, size) float32, from 0 at the crop's start.

    Half-pixel centres, clamped to the crop. Returns the points and the crop's start as (b, 1) float32.
    """
    length = tf.cast(length, tf.float32)[:, None]
    points = (tf.range(size, dtype=tf.float32) + 0.5) * (length / size) - 0.5
    return tf.clip_by_value(points, 0., length - 1), tf.cast(start, tf.float32)[:, None]


def _crop_flip_resize(images: tf.Tensor, top: tf.Tensor, left: tf.Tensor, height: tf.Tensor, width: tf.Tensor,
                      flip: tf.Tensor) -> tf.Tensor:
    """(b, H, W, 3) to (b, H, 3, W): out = Wy . image . Wx^T, with one interpolation matrix for each image and axis.

    Wy has at most two weights in a row, so its product is two gathers of whole rows, straight from the bytes. Columns are
    not contiguous, and for them a matrix product is faster than gathering.
    """
    count, rows, columns, _ = images.shape
    points, start = _sample_points(top, height, rows)
    above = tf.floor(points)
    below = tf.minimum(above + 1, tf.cast(height, tf.float32)[:, None] - 1)
    numbers = tf.range(count)[:, None] * rows + tf.cast(start, tf.int32)  # of each crop's first row among all rows
    lines = tf.reshape(images, [count * rows, columns * 3])
    upper = tf.cast(tf.gather(lines, numbers + tf.cast(above, tf.int32)), tf.float32)  # (b, H, W * 3)
    lower = tf.cast(tf.gather(lines, numbers + tf.cast(below, tf.int32)), tf.float32)
    x = upper + (lower - upper) * (points - above)[:, :, None]
    if images.dtype == tf.uint8:
        x = x / 255
    x = tf.transpose(tf.reshape(x, [count, rows, columns, 3]), [0, 1, 3, 2])

    points, start = _sample_points(left, width, columns)
    points = start + tf.where(flip[:, None], points[:, ::-1], points)
    across = tf.maximum(0., 1 - tf.abs(points[:, :, None] - tf.range(columns, dtype=tf.float32)))  # (b, W out, W in)
    x = tf.matmul(tf.reshape(x, [count, rows * 3, columns]), across, transpose_b=True)
    return tf.reshape(x, [count, rows, 3, columns])


def _distort_colors(x: tf.Tensor, brightness: tf.Tensor, contrast: tf.Tensor, saturation: tf.Tensor,
                    hue: tf.Tensor) -> tf.Tensor:
    """(b, H, 3, W) to (b, H, W, 3), in closed form.

    Saturation and hue both leave a pixel's largest value V alone. With R = V - smallest value (HSV's chroma) and the hue h
    in sixths of a turn, each channel is V - R * clip(|h - n| - 1, 0, 1), where n is the channel's own hue (red 0, green 2,
    blue 4) and |.| the way round the circle (the HSV formulas, solved for the channel). Multiplying the saturation, R / V,
    which adjust_saturation keeps at most 1, makes R the smaller of R * factor and V; adjust_hue adds to h.
    """
    mean = tf.reduce_mean(tf.reduce_mean(x, 3, keepdims=True), 1, keepdims=True)  # in two steps: a better rounded sum
    contrast = contrast[:, None, None, None]
    x = contrast * x + ((1 - contrast) * mean + brightness[:, None, None, None])

    red, green, blue = tf.unstack(x, axis=2)  # (b, H, W) each
    value = tf.maximum(red, tf.maximum(green, blue))
    chroma = value - tf.minimum(red, tf.minimum(green, blue))
    inverse = 1 / tf.maximum(chroma, 1e-20)  # a grey pixel has any hue; its chroma of 0 makes that harmless
    # Which channel is largest is asked by comparing channels, never with `value`: the compiler may compute a channel twice
    # and round it in two ways, and then none would equal `value`. At a tie both answers give the same hue.
    angle = tf.where(blue > tf.maximum(red, green), 4 + (red - green) * inverse,
                     tf.where(green > red, 2 + (blue - red) * inverse, (green - blue) * inverse))
    angle = angle + 6 * hue[:, None, None]
    # tf.image takes the saturation of a pixel with value <= 0 as 0; here min() goes below 0, and the clip gives 0 as well.
    chroma = tf.minimum(tf.maximum(saturation, 0.)[:, None, None] * chroma, value)

    away = angle[..., None] - tf.constant([0., 2., 4.])  # from here on (b, H, W, 3)
    away = tf.abs(away - 6 * tf.round(away / 6))
    return tf.clip_by_value(value[..., None] - chroma[..., None] * tf.clip_by_value(away - 1, 0., 1.), 0., 1.)


# Compiled where they are defined, that is at import: the NPU adapter drops jit_compile from functions made after it opened.


@tf.function(jit_compile=True)
def _compiled_crop_flip_resize(images, top, left, height, width, flip):
    return tf.transpose(_crop_flip_resize(images, top, left, height, width, flip), [0, 1, 3, 2])


@tf.function(jit_compile=True)
def _compiled_distort_colors(images, brightness, contrast, saturation, hue):
    images = tf.transpose(tf.cast(images, tf.float32), [0, 1, 3, 2])
    return _distort_colors(images, brightness, contrast, saturation, hue)


@tf.function(jit_compile=True)
def _compiled_augment(images, top, left, height, width, flip, brightness, contrast, saturation, hue, distort, grey):
    x = _crop_flip_resize(images, top, left, height, width, flip)
    # An image that is not distorted gets the parameters that change nothing, which costs less than a choice by the pixel.
    x = _distort_colors(x, tf.where(distort, brightness, 0.), tf.where(distort, contrast, 1.),
                        tf.where(distort, saturation, 1.), tf.where(distort, hue, 0.))
    luma = tf.reduce_sum(x * tf.constant(GREY_WEIGHTS), 3, keepdims=True)
    return tf.where(grey[:, None, None, None], luma, x)
