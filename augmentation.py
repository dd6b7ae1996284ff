"""The two views of BYOL, a whole batch at once: random crop, flip, resize, then colour distortion and grey.

What is drawn and what is done with it are separate. `sample_crops`, `sample_colors` and `sample_solarise` draw, from a seed alone,
so any batch of any run can be made again. `crop_flip_resize` and `distort_colors` do exactly as they are told: they equal `tf.image`
on each image alone. `augment_images_pretraining` and `augment_images_finetuning` join the two. All shapes are static, nothing loops
over the images, and XLA compiles the arithmetic; it is meant for `tf.data`, where it runs on the host. The drawing is kept out of the
compiled part, because XLA's random numbers are not those of TensorFlow's own kernels: so a seed means the same in eager code and in a
graph, on TensorFlow 2.6 and on 2.21.

    batches = dataset.batch(512, drop_remainder=True).enumerate()
    batches.map(lambda step, images: augment_images_pretraining(images, (seed, step)))
"""
import dataclasses
from typing import Any, Dict, NamedTuple, Optional, Sequence, Tuple

import tensorflow as tf

MIN_CROP = 13 / 32  # a crop's longer side is at least this part of the image's side
MIN_ASPECT = 0.67  # its shorter side is the longer one times a number in [0.67, 1), rounded down
AREA_ASPECT = 4 / 3  # the most that width / height and height / width of a crop by area can be, as in torchvision
AREA_TRIES = 10  # rectangles that are drawn for it, likewise
GREY_WEIGHTS = (0.2989, 0.5870, 0.1140)  # red, green, blue: the luma of ITU-R BT.601

# A random stream for each parameter. The order is part of what a seed means; a new name goes to the end.
STREAMS = ("height", "width", "swap", "top", "left", "flip", "brightness", "contrast", "saturation", "hue", "distort", "grey",
           "area", "aspect", "solarise")
SPLIT = 12  # a seed is split for so many of them; later ones are derived one by one, which leaves the first as they were


@dataclasses.dataclass(frozen=True)
class Views:
    """How views are made; the defaults are the reference implementation's (byol-tensorflow2). ValueError for what cannot be."""
    crop: str = "reference"  # or "area", the random resized crop of the BYOL paper: see sample_crops
    min_area: float = 0.08  # of a crop by area: the least part of the image
    flip: float = 0.25  # probability; not 0.5: the reference tosses a coin, and then a second one that flips
    brightness: float = 0.4  # added, at most; or else, with brightness_multiplies, the factor is 1 - 0.4 to 1 + 0.4
    contrast: float = 0.4  # the factor is 1 - 0.4 to 1 + 0.4
    saturation: float = 0.4  # likewise
    hue: float = 0.1  # added, in turns of the colour circle
    brightness_multiplies: bool = False  # as in torchvision and SimCLR v2
    distort: float = 0.8  # probability of the four together
    grey: float = 0.2  # probability
    solarise: Tuple[float, float] = (0.0, 0.0)  # probability in view 0 and in view 1; further views take turns

    def __post_init__(self) -> None:
        numbers = [x for x in dataclasses.astuple(self) + self.solarise if isinstance(x, (int, float))]
        if self.crop not in ("reference", "area") or not all(0 <= x <= 1 for x in numbers):
            raise ValueError("crop must be 'reference' or 'area', strengths and probabilities in [0, 1]: %s" % self)


class Crops(NamedTuple):
    """A crop for each image: tensors of shape (b,), int32, in pixels; `flip` is bool."""
    top: tf.Tensor
    left: tf.Tensor
    height: tf.Tensor
    width: tf.Tensor
    flip: tf.Tensor


class Colors(NamedTuple):
    """A colour distortion for each image: tensors of shape (b,), float32; `distort` and `grey` are bool."""
    brightness: tf.Tensor
    contrast: tf.Tensor
    saturation: tf.Tensor
    hue: tf.Tensor
    distort: tf.Tensor
    grey: tf.Tensor


def sample_crops(batch_size: int, seed: Any, image_size: int = 32, views: Views = Views()) -> Crops:
    """Draw a crop and a flip for each image of a batch.

    A 'reference' crop's longer side is uniform over the integers 13..32 (for other images in proportion: round(size * 13/32)..size),
    the shorter one floor(longer * u) with u uniform in [0.67, 1); a fair coin tells which of them is the height. A crop by 'area' is
    torchvision's RandomResizedCrop: its part of the image is uniform in [min_area, 1], its width / height log-uniform in [3/4, 4/3],
    and the sides are rounded; of ten such rectangles it is the first that fits into the image, and the whole image if none does.
    The place is uniform over all that fit.

    seed: a pair of integers, Python's or an integer tensor of shape (2,); the same pair draws the same crops on every TensorFlow, but
    for a crop by area with a side so near to a half that float32 may round it either way. image_size: side of the square images in
    pixels, at least 1. Raises ValueError for a seed that is no pair.
    """
    draw = _uniform([batch_size], seed, STREAMS[:6])
    if views.crop == "area":
        height, width = _sides_by_area(batch_size, seed, image_size, views.min_area)
    else:
        smallest = max(1, round(MIN_CROP * image_size))
        # floor(u * n) is below n in float32, too: u is at most 1 - 2^-23, so the product never rounds to n.
        longer = smallest + tf.floor(draw["height"] * (image_size - smallest + 1))
        shorter = tf.maximum(1., tf.floor(longer * (MIN_ASPECT + (1 - MIN_ASPECT) * draw["width"])))
        swap = draw["swap"] < 0.5
        height, width = tf.where(swap, shorter, longer), tf.where(swap, longer, shorter)
    top, left = (tf.floor(draw[name] * (image_size - side + 1)) for name, side in (("top", height), ("left", width)))
    top, left, height, width = (tf.cast(x, tf.int32) for x in (top, left, height, width))
    return Crops(top, left, height, width, draw["flip"] < views.flip)


def _sides_by_area(batch_size: int, seed: Any, image_size: int, min_area: float) -> Sequence[tf.Tensor]:
    """Heights and widths of crops by area: (b,) float32, whole numbers. All tries are drawn at once."""
    draw = _uniform([batch_size, AREA_TRIES], seed, ("area", "aspect"))
    side = image_size * tf.sqrt(min_area + (1 - min_area) * draw["area"])  # of the square of this area
    stretch = AREA_ASPECT ** (draw["aspect"] - 0.5)  # the square root of width / height
    sides = tf.round(tf.stack([side / stretch, side * stretch]))  # (2, b, tries)
    fits = tf.reduce_all((sides >= 1) & (sides <= image_size), axis=0)
    first = tf.reduce_min(tf.where(fits, tf.range(AREA_TRIES), AREA_TRIES), axis=1)
    sides = tf.pad(sides, [[0, 0], [0, 0], [0, 1]], constant_values=image_size)  # the whole image after the last try
    return tf.unstack(tf.gather(sides, tf.stack([first, first]), batch_dims=2))


def sample_colors(batch_size: int, seed: Any, views: Views = Views()) -> Colors:
    """Draw a colour distortion for each image of a batch, each amount uniform up to what `views` allow; it owes nothing to the crops
    of the same seed. Arguments and errors as for `sample_crops`.
    """
    draw = _uniform([batch_size], seed, STREAMS[6:SPLIT])
    brightness = views.brightness * (2 * draw["brightness"] - 1)
    return Colors(brightness=1 + brightness if views.brightness_multiplies else brightness,
                  contrast=1 + views.contrast * (2 * draw["contrast"] - 1),
                  saturation=1 + views.saturation * (2 * draw["saturation"] - 1),
                  hue=views.hue * (2 * draw["hue"] - 1), distort=draw["distort"] < views.distort, grey=draw["grey"] < views.grey)


def sample_solarise(batch_size: int, seed: Any, views: Views, view: int) -> tf.Tensor:
    """Draw which images are solarised in view number `view`: (b,) bool. Other arguments and errors as for `sample_crops`."""
    return _uniform([batch_size], seed, ("solarise",))["solarise"] < views.solarise[view % 2]


def crop_flip_resize(images: Any, top: Any, left: Any, height: Any, width: Any, flip: Any) -> tf.Tensor:
    """Cut a rectangle out of each image, mirror it left to right where `flip`, resize it to the image's size.

    Equals, within 1e-5, `tf.image.resize` of each crop (bilinear, half-pixel centres, no antialiasing, edges clamped to the crop).

    images: (b, H, W, 3), uint8, or floating in [0, 1]. top, left, height, width: (b,) integers in pixels, of rectangles within the
    image, at least one pixel large. flip: (b,) bool. Returns (b, H, W, 3) float32 in [0, 1]. Raises ValueError for images of another
    rank, dtype or number of channels, or of a shape not known in advance.
    """
    images = _checked(images, bytes_too=True)
    sides = (tf.cast(x, tf.int32) for x in (top, left, height, width))
    return _compiled_crop_flip_resize(images, *sides, tf.cast(flip, tf.bool))


def distort_colors(images: Any, brightness: Any, contrast: Any, saturation: Any, hue: Any, multiplies: bool = False) -> tf.Tensor:
    """Adjust brightness, contrast, saturation and hue of each image, in this order, then clip to [0, 1].

    Equals `tf.image.adjust_*` and `tf.clip_by_value`, image by image and within 1e-5 for what `sample_colors` draws, also for
    values outside of [0, 1] on the way. It leaves out one slip of adjust_saturation, which takes all colour from a red whose hue is
    less than 3e-8 short of a full turn: the hue rounds to 1, and no sector of the colour circle claims it.

    images: (b, H, W, 3) floating. The rest are (b,) floating: what is added to each pixel, or its factor where `multiplies`;
    the factor about each channel's mean over the image; the factor of the saturation (below 0 it acts as 0); the part of a turn of
    the colour circle. Returns (b, H, W, 3) float32 in [0, 1]. Raises ValueError as `crop_flip_resize`, and for uint8.
    """
    images = _checked(images, bytes_too=False)
    colors = (tf.cast(x, tf.float32) for x in (brightness, contrast, saturation, hue))
    return _compiled_distort_colors(images, *colors, multiplies=multiplies)


def augment_images_pretraining(images: Any, seed: Any, first: int = 0, batch_size: Optional[int] = None,
                               views: Views = Views(), view: int = 0) -> tf.Tensor:
    """Make one view of each image: crop, flip, resize; distort the colours of 80 %; turn 20 % grey. Then, if `views` say so,
    solarise some (x >= 0.5 becomes 1 - x).

    images: (b, s, s, 3), uint8, or floating in [0, 1]: rows first..first+b of a batch of `batch_size` images (by default they are
    the batch). Parameters are drawn for the whole batch, so however workers share it, its views are the same: the parameters to the
    bit, the pixels to 1e-6. seed: a pair of integers, Python's or an integer tensor of shape (2,); the two views of a batch need two
    seeds. view: its number, for the probability of solarisation. Returns (b, s, s, 3) float32 in [0, 1]. Raises ValueError as
    `crop_flip_resize`, and for images that are not square, rows that are not in the batch, or a seed that is no pair.
    """
    images, rows, batch_size = _checked_rows(images, first, batch_size)
    drawn = sample_crops(batch_size, seed, images.shape[1], views) + sample_colors(batch_size, seed, views)
    solarise = sample_solarise(batch_size, seed, views, view)[rows] if any(views.solarise) else None
    return _compiled_augment(images, *(x[rows] for x in drawn), solarise=solarise, multiplies=views.brightness_multiplies)


def augment_images_finetuning(images: Any, seed: Any, first: int = 0, batch_size: Optional[int] = None) -> tf.Tensor:
    """Crop, flip and resize each image, with its colours left alone; else as `augment_images_pretraining` with its defaults."""
    images, rows, batch_size = _checked_rows(images, first, batch_size)
    return _compiled_crop_flip_resize(images, *(x[rows] for x in sample_crops(batch_size, seed, images.shape[1])))


def _uniform(shape: Sequence[int], seed: Any, names: Sequence[str]) -> Dict[str, tf.Tensor]:
    """From each of the named streams, a float32 tensor of this shape, uniform in [0, 1)."""
    # A pair may mix a Python integer with a tensor, such as the step that tf.data counts, hence one by one.
    pair = tf.cast(seed, tf.int64) if tf.is_tensor(seed) else tf.stack([tf.cast(x, tf.int64) for x in seed])
    if pair.shape != (2,):
        raise ValueError("seed must be a pair of integers, not of shape %s" % pair.shape)
    seeds = tf.unstack(tf.random.experimental.stateless_split(pair, SPLIT))
    seeds += [tf.random.experimental.stateless_fold_in(pair, tf.constant(i, tf.int64)) for i in range(SPLIT, len(STREAMS))]
    return {name: tf.random.stateless_uniform(shape, seeds[STREAMS.index(name)]) for name in names}


def _checked(images: Any, bytes_too: bool) -> tf.Tensor:
    """The images as a tensor; ValueError unless they are (b, H, W, 3) of a dtype that can be used."""
    images = tf.convert_to_tensor(images)
    if images.shape.rank != 4 or images.shape[3] != 3 or not images.shape.is_fully_defined():
        raise ValueError("images must be (batch, height, width, 3), of a shape known in advance (in tf.data: drop_remainder=True), "
                         "not %s" % images.shape)
    if not (images.dtype.is_floating or bytes_too and images.dtype == tf.uint8):
        raise ValueError("images must be %sfloating point in [0, 1], not %s" % ("uint8 or " * bytes_too, images.dtype.name))
    return images


def _checked_rows(images: Any, first: int, batch_size: Optional[int]) -> Tuple[tf.Tensor, slice, int]:
    """The images as a tensor, the rows of the whole batch that they are, and the size of that batch."""
    images = _checked(images, bytes_too=True)
    count, height, width, _ = images.shape
    if height != width:
        raise ValueError("images must be square, not %d x %d" % (height, width))
    batch_size = count if batch_size is None else batch_size
    if not 0 <= first <= batch_size - count:
        raise ValueError("%d images from row %d on are not within a batch of %d" % (count, first, batch_size))
    return images, slice(first, first + count), batch_size


# In between, images lie as (b, H, 3, W): with a row of one channel contiguous, the compiled inner loops run over pixels and use
# vector instructions. The last operation writes (b, H, W, 3), at no cost of its own.


def _sample_points(length: tf.Tensor, size: int) -> tf.Tensor:
    """Where each of `size` resized pixels looks along one axis of its crop (half-pixel centres, clamped to it): (b, size) float32."""
    length = tf.cast(length, tf.float32)[:, None]
    return tf.clip_by_value((tf.range(size, dtype=tf.float32) + 0.5) * (length / size) - 0.5, 0., length - 1)


def _crop_flip_resize(images: tf.Tensor, top: tf.Tensor, left: tf.Tensor, height: tf.Tensor, width: tf.Tensor,
                      flip: tf.Tensor) -> tf.Tensor:
    """(b, H, W, 3) to (b, H, 3, W): Wy . image . Wx^T, an interpolation matrix for each image and axis.

    A row of Wy has at most two weights that are not 0, so its product is two gathers of whole rows, straight from the bytes.
    Columns are not contiguous; for them a true matrix product is faster.
    """
    count, rows, columns, _ = images.shape
    points = _sample_points(height, rows)
    above = tf.floor(points)
    below = tf.minimum(above + 1, tf.cast(height, tf.float32)[:, None] - 1)
    start = tf.range(count)[:, None] * rows + top[:, None]  # where a crop's first row is among all
    lines = tf.reshape(images, [count * rows, columns * 3])
    upper = tf.cast(tf.gather(lines, start + tf.cast(above, tf.int32)), tf.float32)  # (b, H, W * 3)
    lower = tf.cast(tf.gather(lines, start + tf.cast(below, tf.int32)), tf.float32)
    x = upper + (lower - upper) * (points - above)[:, :, None]
    x = x / 255 if images.dtype == tf.uint8 else x
    x = tf.transpose(tf.reshape(x, [count, rows, columns, 3]), [0, 1, 3, 2])

    points = _sample_points(width, columns)
    points = tf.where(flip[:, None], points[:, ::-1], points) + tf.cast(left, tf.float32)[:, None]
    weights = tf.maximum(0., 1 - tf.abs(points[:, :, None] - tf.range(columns, dtype=tf.float32)))
    x = tf.matmul(tf.reshape(x, [count, rows * 3, columns]), weights, transpose_b=True)
    return tf.reshape(x, [count, rows, 3, columns])


def _distort_colors(x: tf.Tensor, brightness: tf.Tensor, contrast: tf.Tensor, saturation: tf.Tensor, hue: tf.Tensor, *,
                    multiplies: bool) -> tf.Tensor:
    """(b, H, 3, W) to (b, H, W, 3), in closed form.

    In HSV, with value V (the largest channel), chroma C (largest less smallest) and hue h in sixths of a turn, a channel is V - C *
    clip(|h - n| - 1, 0, 1), where n is its own hue (red 0, green 2, blue 4) and |.| goes the short way round. adjust_saturation
    multiplies C / V and keeps it at most 1, which makes the chroma min(C * factor, V); adjust_hue adds to h; both leave V alone.
    """
    mean = tf.reduce_mean(tf.reduce_mean(x, 3, keepdims=True), 1, keepdims=True)  # short sums: less rounding
    brightness, contrast = brightness[:, None, None, None], contrast[:, None, None, None]
    if multiplies:  # the same before and after the contrast, since it multiplies the mean as well
        x = (brightness * contrast) * x + brightness * (1 - contrast) * mean
    else:
        x = contrast * x + ((1 - contrast) * mean + brightness)

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

    away = angle[..., None] - tf.constant([0., 2., 4.])  # from here on (b, H, W, 3)
    away = tf.abs(away - 6 * tf.round(away / 6))
    return tf.clip_by_value(value[..., None] - chroma[..., None] * tf.clip_by_value(away - 1, 0., 1.), 0., 1.)


# Made at import, because the NPU adapter drops jit_compile from functions that are made after it opened.


@tf.function(jit_compile=True, autograph=False)
def _compiled_crop_flip_resize(images: tf.Tensor, *crops: tf.Tensor) -> tf.Tensor:
    return tf.transpose(_crop_flip_resize(images, *crops), [0, 1, 3, 2])


@tf.function(jit_compile=True, autograph=False)
def _compiled_distort_colors(images: tf.Tensor, *colors: tf.Tensor, multiplies: bool = False) -> tf.Tensor:
    return _distort_colors(tf.transpose(tf.cast(images, tf.float32), [0, 1, 3, 2]), *colors, multiplies=multiplies)


@tf.function(jit_compile=True, autograph=False)
def _compiled_augment(images: tf.Tensor, *drawn: tf.Tensor, solarise: Optional[tf.Tensor] = None,
                      multiplies: bool = False) -> tf.Tensor:
    brightness, contrast, saturation, hue, distort, grey = drawn[5:]
    x = _crop_flip_resize(images, *drawn[:5])
    # An image not to be distorted gets parameters that change nothing: cheaper than a choice for each pixel.
    x = _distort_colors(x, tf.where(distort, brightness, float(multiplies)), tf.where(distort, contrast, 1.),
                        tf.where(distort, saturation, 1.), tf.where(distort, hue, 0.), multiplies=multiplies)
    x = tf.where(grey[:, None, None, None], tf.reduce_sum(x * tf.constant(GREY_WEIGHTS), 3, keepdims=True), x)
    if solarise is not None:
        x = tf.where(solarise[:, None, None, None] & (x >= 0.5), 1 - x, x)
    return x
