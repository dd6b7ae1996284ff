"""The two views of BYOL, a whole batch at once: random crop, flip, resize, then colour distortion and grey.

What is drawn and what is done with it are separate. The functions `sample_...` draw, from a seed alone, so any batch of any run can
be made again. transforms.py does exactly as it is told. `augment_images_pretraining` and `augment_images_finetuning` join the two. It
is meant for `tf.data`, where it runs on the host. The drawing is kept out of the
compiled part, because XLA's random numbers are not those of TensorFlow's own kernels: so a seed means the same in eager code and in a
graph, on TensorFlow 2.6 and on 2.21.

    batches = dataset.batch(512, drop_remainder=True).enumerate()
    batches.map(lambda step, images: augment_images_pretraining(images, (seed, step)))
"""
import dataclasses
from typing import Any, Dict, NamedTuple, Optional, Sequence, Tuple

import tensorflow as tf

import transforms
from transforms import GREY_WEIGHTS, crop_flip_resize, distort_colors  # noqa: F401

MIN_CROP = 13 / 32  # a crop's longer side is at least this part of the image's side
MIN_ASPECT = 0.67  # its shorter side is the longer one times a number in [0.67, 1), rounded down
AREA_ASPECT = 4 / 3  # the most that width / height and height / width of a crop by area can be, as in torchvision
AREA_TRIES = 10  # rectangles that are drawn for it, likewise
BLURS = (0.1, 2.0)  # deviations of a Gaussian, in pixels (the BYOL paper)

# A random stream for each parameter. The order is part of what a seed means; a new name goes to the end.
STREAMS = ("height", "width", "swap", "top", "left", "flip", "brightness", "contrast", "saturation", "hue", "distort", "grey",
           "area", "aspect", "solarise", "order", "blur", "deviation")
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
    blur: Tuple[float, float] = (0.0, 0.0)  # likewise
    colour_order: str = "fixed"  # or "random", one for each image, with a clip after each of the four
    size: Optional[int] = None  # side in pixels of views that are smaller or larger than the images

    def __post_init__(self) -> None:
        numbers = [x for x in dataclasses.astuple(self)[:-1] + self.solarise + self.blur if isinstance(x, (int, float))]
        if (self.crop not in ("reference", "area") or self.colour_order not in ("fixed", "random") or self.size == 0
                or not all(0 <= x <= 1 for x in numbers)):
            raise ValueError("crop must be 'reference' or 'area', colour_order 'fixed' or 'random', strengths and probabilities in "
                             "[0, 1]: %s" % self)


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


def sample_blur(batch_size: int, seed: Any, views: Views, view: int) -> tf.Tensor:
    """Draw the deviation of each image's blur in pixels, uniform in BLURS, 0 for no blur: (b,) float32. Otherwise as that."""
    draw = _uniform([batch_size], seed, ("blur", "deviation"))
    return tf.where(draw["blur"] < views.blur[view % 2], BLURS[0] + (BLURS[1] - BLURS[0]) * draw["deviation"], 0.)


def sample_order(batch_size: int, seed: Any) -> tf.Tensor:
    """Draw each image's order of brightness, contrast, saturation and hue, as keys, the lowest first: (b, 4) float32 in [0, 1)."""
    return _uniform([batch_size, 4], seed, ("order",))["order"]


def augment_images_pretraining(images: Any, seed: Any, first: int = 0, batch_size: Optional[int] = None,
                               views: Views = Views(), view: int = 0) -> tf.Tensor:
    """Make one view of each image: crop, flip, resize; distort the colours of 80 %; turn 20 % grey. Then, if `views` say so,
    blur some, and solarise some (x >= 0.5 becomes 1 - x).

    images: (b, s, s, 3), uint8, or floating in [0, 1]: rows first..first+b of a batch of `batch_size` images (by default they are
    the batch). Parameters are drawn for the whole batch, so however workers share it, its views are the same: the parameters to the
    bit, the pixels to 1e-6. seed: a pair of integers, Python's or an integer tensor of shape (2,); the two views of a batch need two
    seeds. view: its number, for the probability of solarisation. Returns (b, s, s, 3) float32 in [0, 1]. Raises ValueError as
    `crop_flip_resize`, and for images that are not square, rows that are not in the batch, or a seed that is no pair.
    """
    images, rows, batch_size = _checked_rows(images, first, batch_size)
    drawn = sample_crops(batch_size, seed, images.shape[1], views) + sample_colors(batch_size, seed, views)
    more = {}
    if views.solarise[view % 2]:
        more["solarise"] = sample_solarise(batch_size, seed, views, view)[rows]
    if views.blur[view % 2]:
        more["blur"] = sample_blur(batch_size, seed, views, view)[rows]
    if views.colour_order == "random":
        more["order"] = sample_order(batch_size, seed)[rows]
    return transforms._compiled_augment(images, *(x[rows] for x in drawn), multiplies=views.brightness_multiplies,
                                        size=views.size, **more)


def augment_images_finetuning(images: Any, seed: Any, first: int = 0, batch_size: Optional[int] = None,
                              size: Optional[int] = None) -> tf.Tensor:
    """Crop, flip and resize each image, with its colours left alone; else as `augment_images_pretraining` with its defaults.

    size: side of the views in pixels, where it is not the images'.
    """
    images, rows, batch_size = _checked_rows(images, first, batch_size)
    crops = (x[rows] for x in sample_crops(batch_size, seed, images.shape[1]))
    return transforms._compiled_crop_flip_resize(images, *crops, size=size)


def _uniform(shape: Sequence[int], seed: Any, names: Sequence[str]) -> Dict[str, tf.Tensor]:
    """From each of the named streams, a float32 tensor of this shape, uniform in [0, 1)."""
    # A pair may mix a Python integer with a tensor, such as the step that tf.data counts, hence one by one.
    pair = tf.cast(seed, tf.int64) if tf.is_tensor(seed) else tf.stack([tf.cast(x, tf.int64) for x in seed])
    if pair.shape != (2,):
        raise ValueError("seed must be a pair of integers, not of shape %s" % pair.shape)
    seeds = tf.unstack(tf.random.experimental.stateless_split(pair, SPLIT))
    seeds += [tf.random.experimental.stateless_fold_in(pair, tf.constant(i, tf.int64)) for i in range(SPLIT, len(STREAMS))]
    return {name: tf.random.stateless_uniform(shape, seeds[STREAMS.index(name)]) for name in names}


def _checked_rows(images: Any, first: int, batch_size: Optional[int]) -> Tuple[tf.Tensor, slice, int]:
    """The images as a tensor, the rows of the whole batch that they are, and the size of that batch."""
    images = transforms._checked(images, bytes_too=True)
    count, height, width, _ = images.shape
    if height != width:
        raise ValueError("images must be square, not %d x %d" % (height, width))
    batch_size = count if batch_size is None else batch_size
    if not 0 <= first <= batch_size - count:
        raise ValueError("%d images from row %d on are not within a batch of %d" % (count, first, batch_size))
    return images, slice(first, first + count), batch_size
