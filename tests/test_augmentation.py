"""Views against tf.image, image by image; drawn parameters against the distributions that they must have."""
import dataclasses
import zlib

import numpy as np
import pytest
import tensorflow as tf

import augmentation
import transforms

MANY = 200000

# What seed (1, 2) draws for a batch of four, seen on TensorFlow 2.6.5 and 2.21.
GOLDEN_CROPS = [[1, 0, 3, 10], [2, 3, 4, 15], [28, 20, 29, 13], [21, 21, 23, 9], [False, True, True, False]]
GOLDEN_COLORS = [[-0.1879836, -0.2400019, 0.2856614, 0.3006409], [0.6008512, 0.6504046, 1.1946051, 0.9496482],
                 [1.1707597, 0.9911535, 0.8351221, 0.6518736], [0.0534992, -0.028297, 0.0562965, -0.0305476],
                 [0, 1, 1, 0], [0, 0, 1, 0]]

# The bits of 5000 draws of seed (1, 2), seen on both before there were any Views.
DRAWN_CROPS, DRAWN_COLORS = 0xc8f8c94e, 0x4e7adc3e


def random_images(count, height=32, width=32, seed=0):
    """(count, height, width, 3) uint8: noise, so that no pixel from a wrong place goes unnoticed."""
    return np.random.RandomState(seed).randint(0, 256, (count, height, width, 3)).astype(np.uint8)


def colorful_images(count, size=16, seed=0):
    """(count, size, size, 3) float32: dark and pale, with rows of primary colours, grey, ties, few levels."""
    random = np.random.RandomState(seed)
    images = random.rand(count, size, size, 3) ** random.choice([0.2, 1, 5], (count, 1, 1, 3))
    images[:, 0] = random.randint(0, 2, (count, size, 3))  # black, white, primary and secondary colours
    images[:, 1] = images[:, 1, :, :1]  # grey
    images[:, 2, :, 1] = images[:, 2, :, 0]  # red and green tie
    images[:, 3, :, 2] = images[:, 3, :, 1]  # green and blue tie
    images[:, 4, :, 2] = images[:, 4, :, 0]  # blue and red tie
    images[:, 5] = np.round(images[:, 5] * 3) / 3  # few levels
    return images.astype(np.float32)


def crop_one_by_one(images, crops):
    """What crop_flip_resize must give: each image cropped, flipped and resized by tf.image."""
    views = []
    for image, top, left, height, width, flip in zip(images, *(np.asarray(x) for x in crops)):
        image = tf.image.convert_image_dtype(image, tf.float32)
        view = tf.image.crop_to_bounding_box(image, int(top), int(left), int(height), int(width))
        view = tf.image.flip_left_right(view) if flip else view
        views.append(tf.image.resize(view, image.shape[:2], method="bilinear", antialias=False))
    return np.stack(views)


def distort_one_by_one(images, brightness, contrast, saturation, hue):
    """What distort_colors must give: tf.image's adjustments of each image, in order.

    adjust_saturation takes a hue that rounds up to a full turn for no colour at all (see
    test_slip_of_tf_image). Rounding within adjust_contrast leads there from green = blue, so where they are
    all but equal they are made equal in between.
    """
    views = []
    for image, *amounts in zip(images, *(np.asarray(x) for x in (brightness, contrast, saturation, hue))):
        image = tf.image.adjust_brightness(image, amounts[0])
        red, green, blue = np.moveaxis(tf.image.adjust_contrast(image, amounts[1]).numpy(), -1, 0)
        slip = (red >= blue) & (blue > green) & (blue - green < 1e-6 * (red - green))
        image = np.stack([red, np.where(slip, blue, green), blue], -1)
        image = tf.image.adjust_saturation(image, amounts[2])
        image = tf.image.adjust_hue(image, amounts[3])
        views.append(tf.clip_by_value(image, 0., 1.))
    return np.stack(views)


def distort_as_drawn(images, colors):
    """Distort the images whose turn it is, then turn those grey whose turn that is."""
    distort, grey = (x.numpy()[:, None, None, None] for x in (colors.distort, colors.grey))
    images = np.where(distort, distort_one_by_one(images, *colors[:4]), images)
    luma = images @ np.array([0.2989, 0.5870, 0.1140], np.float32)
    return np.where(grey, luma[..., None], images)


def assert_close(actual, expected, tolerance):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape and actual.dtype == expected.dtype == np.float32
    assert np.abs(actual - expected).max() <= tolerance  # a NaN fails, too


def extreme_crops(height, width, sides):
    """Every pair of sides in every corner and in the middle, flipped and not."""
    rows = [(top, left, h, w, flip) for h, w in sides
            for top, left in [(0, 0), (0, width - w), (height - h, 0), (height - h, width - w),
                              ((height - h) // 2, (width - w) // 2)] for flip in (False, True)]
    return augmentation.Crops(*(np.array(column) for column in zip(*rows)))


# The crop.


@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_drawn_crops_equal_tf_image(kind):
    images = random_images(256)
    images = images if kind == "uint8" else images.astype(np.float32) / np.float32(255)
    crops = augmentation.sample_crops(256, (3, 5))
    assert_close(augmentation.crop_flip_resize(images, *crops), crop_one_by_one(images, crops), 1e-5)


@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_extreme_crops_equal_tf_image(kind):
    sides = [(13, 8), (8, 13), (13, 12), (32, 21), (21, 32), (32, 31), (32, 32), (1, 1), (1, 32), (2, 3)]
    crops = extreme_crops(32, 32, sides)
    images = random_images(len(crops.top))
    images = images if kind == "uint8" else np.random.RandomState(1).rand(*images.shape).astype(np.float32)
    assert_close(augmentation.crop_flip_resize(images, *crops), crop_one_by_one(images, crops), 1e-5)


@pytest.mark.parametrize("size", [8, 33, 48, 64])
def test_crops_of_other_sizes_equal_tf_image(size):
    images = random_images(24, size, size)
    crops = augmentation.sample_crops(24, (0, size), size)
    assert_close(augmentation.crop_flip_resize(images, *crops), crop_one_by_one(images, crops), 1e-5)


def test_crops_of_images_that_are_not_square_equal_tf_image():
    crops = extreme_crops(24, 40, [(24, 40), (10, 17), (17, 10), (24, 1)])
    images = random_images(len(crops.top), 24, 40)
    assert_close(augmentation.crop_flip_resize(images, *crops), crop_one_by_one(images, crops), 1e-5)


def test_whole_image_unflipped_is_the_image():
    images = random_images(64)
    nothing, whole = np.zeros(64, int), np.full(64, 32)
    assert_close(augmentation.crop_flip_resize(images, nothing, nothing, whole, whole, nothing > 0),
                 images.astype(np.float32) / np.float32(255), 1e-6)
    assert_close(augmentation.crop_flip_resize(images, nothing, nothing, whole, whole, nothing == 0),
                 images[:, :, ::-1].astype(np.float32) / np.float32(255), 1e-6)


def test_bytes_and_floats_give_the_same_view():
    images = random_images(256)
    crops = augmentation.sample_crops(256, (1, 1))
    assert_close(augmentation.crop_flip_resize(images, *crops),
                 augmentation.crop_flip_resize((images / 255).astype(np.float32), *crops), 1e-6)


# The colours.


def test_drawn_distortions_equal_tf_image():
    images = colorful_images(256)
    colors = augmentation.sample_colors(256, (3, 5))[:4]
    assert_close(augmentation.distort_colors(images, *colors), distort_one_by_one(images, *colors), 1e-5)


@pytest.mark.parametrize("brightness", [-1.2, -0.4, 0, 0.4, 1.5])
def test_extreme_distortions_equal_tf_image(brightness):
    """Such a brightness pushes pixels partly or wholly out of [0, 1] before the later steps see them."""
    hues = [-1, -0.5, -0.1, 0, 0.1, 1 / 6, 0.5, 0.9, 1]
    grid = np.meshgrid([0, 0.6, 1, 1.4, 3], [0, 0.6, 1, 1.4, 10], hues)
    contrast, saturation, hue = np.array(grid, np.float32).reshape(3, -1)
    images = colorful_images(len(hue), 8, seed=2)
    colors = np.full_like(hue, brightness), contrast, saturation, hue
    assert_close(augmentation.distort_colors(images, *colors), distort_one_by_one(images, *colors), 1e-4)


def test_saturation_of_values_out_of_range_equals_tf_image():
    """Nothing clips between the steps, so saturation and hue meet values below 0 and above 1: all kinds."""
    levels = [-0.7, -0.2, -1e-3, 0, 1e-3, 0.3, 0.5, 1, 1.001, 1.6]
    pixels = np.array(np.meshgrid(levels, levels, levels), np.float32).reshape(3, -1).T.reshape(1, 40, 25, 3)
    one = np.ones(1, np.float32)
    for saturation in (-0.5, 0, 0.6, 1, 1.4, 20):
        for hue in (-0.4, -0.1, 0, 0.1, 0.7):
            colors = one * 0, one, one * np.float32(saturation), one * np.float32(hue)
            expected = distort_one_by_one(pixels, *colors)
            assert_close(augmentation.distort_colors(pixels, *colors), expected, 1e-5)


def test_slip_of_tf_image():
    """The one difference from tf.image: a red with a trace more blue than green stays red."""
    pixel = np.array([1, 0.5, 0.50000006], np.float32).reshape(1, 1, 1, 3)
    assert np.allclose(tf.image.adjust_saturation(pixel, 0.6), [0.7, 0.7, 0.7], atol=1e-6)
    assert np.allclose(augmentation.distort_colors(pixel, [0.], [1.], [0.6], [0.]), [1, 0.7, 0.7], atol=1e-6)


def test_ties_of_channels_and_grey_of_any_brightness_equal_tf_image():
    """Where two channels are equal or one bit apart, the compiled code must not lose the largest of them."""
    base = np.linspace(0.01, 1, 300, dtype=np.float32)
    low = base * np.float32(0.3)
    pixels = np.stack([np.stack(p, -1) for p in [
        (base, base, low), (base, low, base), (low, base, base),
        (base, low, low), (low, base, low), (low, low, base),
        (base, np.nextafter(base, np.float32(2)), low), (low, base, np.nextafter(base, np.float32(2))),
        (np.nextafter(base, np.float32(2)), low, base), (base, base, base)]])[:, None]  # (10, 1, 300, 3)
    count = len(pixels)
    for contrast, hue in [(1, 0.03), (1, -0.1), (1.4, 0.1), (0.61, -0.07)]:
        colors = [np.full(count, x, np.float32) for x in (0.1, contrast, 1.2, hue)]
        assert_close(augmentation.distort_colors(pixels, *colors), distort_one_by_one(pixels, *colors), 1e-5)


def test_neutral_distortion_is_the_image():
    images = colorful_images(256)
    nothing, one = np.zeros(256), np.ones(256)
    assert_close(augmentation.distort_colors(images, nothing, one, one, nothing), images, 1e-6)


# The draws.


@pytest.fixture(scope="module")
def crops():
    return augmentation.Crops(*(x.numpy() for x in augmentation.sample_crops(MANY, (11, 7))))


@pytest.fixture(scope="module")
def colors():
    return augmentation.Colors(*(x.numpy() for x in augmentation.sample_colors(MANY, (11, 7))))


def assert_counts(values, low, expected):
    """Integers from `low` on occur in the `expected` proportions, and no others: chi-squared, 6 sigma."""
    assert values.min() >= low and values.max() < low + len(expected)
    expected = len(values) * np.asarray(expected) / np.sum(expected)
    counts = np.bincount(values - low, minlength=len(expected))
    assert np.all(counts[expected > 50] > 0) and np.all(counts[expected == 0] == 0)
    chi_squared = np.sum((counts - expected)[expected > 0] ** 2 / expected[expected > 0])
    freedom = np.sum(expected > 0) - 1
    assert chi_squared < freedom + 6 * np.sqrt(2 * freedom) + 6


def assert_rate(happened, probability):
    assert abs(np.mean(happened) - probability) < 5 * np.sqrt(probability * (1 - probability) / len(happened))


def assert_uniform(values, low, high):
    """Within [low, high], and in each of 50 equal parts equally often."""
    assert values.dtype == np.float32 and low - 1e-6 <= values.min() and values.max() <= high + 1e-6
    parts = np.minimum((values.astype(np.float64) - low) / (high - low) * 50, 49.999)
    assert_counts(np.maximum(parts, 0).astype(int), 0, np.ones(50))


def test_crop_sides_have_the_distribution(crops):
    longer, shorter = np.maximum(crops.height, crops.width), np.minimum(crops.height, crops.width)
    assert_counts(longer, 13, np.ones(20))  # 13 and 32 both occur, 33 never
    for length in range(13, 33):  # shorter = floor(longer * u), u uniform in [0.67, 1)
        edges = np.clip(np.arange(length + 1) / length, 0.67, 1)
        assert_counts(shorter[longer == length], 0, np.diff(edges))
    assert shorter.min() == 8 and np.all(shorter < longer)
    assert_rate(crops.height < crops.width, 0.5)


def test_crop_places_have_the_distribution(crops):
    for start, length in ((crops.top, crops.height), (crops.left, crops.width)):
        for side in range(8, 33):
            chosen = start[length == side]
            assert_counts(chosen, 0, np.ones(32 - side + 1))
    assert np.all(crops.top + crops.height <= 32) and np.all(crops.left + crops.width <= 32)


def test_rates_of_flip_distort_and_grey(crops, colors):
    assert_rate(crops.flip, 0.25)
    assert_rate(colors.distort, 0.8)
    assert_rate(colors.grey, 0.2)


def test_colors_have_the_distribution(colors):
    assert_uniform(colors.brightness, -0.4, 0.4)
    assert_uniform(colors.contrast, 0.6, 1.4)
    assert_uniform(colors.saturation, 0.6, 1.4)
    assert_uniform(colors.hue, -0.1, 0.1)


def test_no_parameter_depends_on_another(crops, colors):
    """No two are correlated; two parameters on one random stream would be one and the same number."""
    longer, shorter = np.maximum(crops.height, crops.width), np.minimum(crops.height, crops.width)
    places = [(crops.top + 0.5) / (33 - crops.height), (crops.left + 0.5) / (33 - crops.width)]
    sides = [longer, (shorter + 0.5) / longer, crops.height < crops.width]
    correlation = np.corrcoef(np.asarray(sides + places + [crops.flip] + list(colors), np.float64))
    assert np.abs(correlation - np.eye(12)).max() < 6 / np.sqrt(MANY)


@pytest.mark.parametrize("size, smallest", [(8, 3), (48, 20), (64, 26), (224, 91)])
def test_crop_sides_in_proportion_for_other_sizes(size, smallest):
    drawn = [x.numpy() for x in augmentation.sample_crops(50000, (2, size), size)]
    top, left, height, width, _ = drawn
    assert_counts(np.maximum(height, width), smallest, np.ones(size - smallest + 1))
    assert int(0.67 * smallest) <= np.minimum(height, width).min() <= 0.67 * smallest + 1
    assert top.min() == left.min() == 0 and (top + height).max() == (left + width).max() == size


@pytest.mark.parametrize("size", [1, 2, 3])
def test_crops_of_tiny_images_fit(size):
    top, left, height, width, _ = (x.numpy() for x in augmentation.sample_crops(1000, (2, 2), size))
    assert min(height.min(), width.min()) == 1 and min(top.min(), left.min()) == 0
    assert (top + height).max() <= size and (left + width).max() <= size


def test_dtypes_and_names_of_the_draws():
    crops, colors = augmentation.sample_crops(3, (0, 0)), augmentation.sample_colors(3, (0, 0))
    assert crops._fields == ("top", "left", "height", "width", "flip")
    assert colors._fields == ("brightness", "contrast", "saturation", "hue", "distort", "grey")
    assert [x.dtype for x in crops] == [tf.int32] * 4 + [tf.bool]
    assert [x.dtype for x in colors] == [tf.float32] * 4 + [tf.bool] * 2
    assert all(x.shape == (3,) for x in crops + colors)


def test_a_seed_means_the_same_on_every_tensorflow():
    crops, colors = augmentation.sample_crops(4, (1, 2)), augmentation.sample_colors(4, (1, 2))
    assert [x.numpy().tolist() for x in crops] == GOLDEN_CROPS
    assert np.allclose([x.numpy() for x in colors], GOLDEN_COLORS, rtol=0, atol=1e-6)


def test_what_a_seed_draws_has_not_changed():
    for drawn, expected in ((augmentation.sample_crops(5000, (1, 2)), DRAWN_CROPS),
                            (augmentation.sample_colors(5000, (1, 2)), DRAWN_COLORS)):
        assert zlib.crc32(b"".join(x.numpy().tobytes() for x in drawn)) == expected


@pytest.mark.parametrize("seed", [
    [1, 2], np.array([1, 2]), tf.constant([1, 2]), tf.constant([1, 2], tf.int64), (1, tf.constant(2)),
    (tf.constant(1, tf.int64), 2)])
def test_every_way_to_write_a_seed(seed):
    for sample in (augmentation.sample_crops, augmentation.sample_colors):
        for actual, expected in zip(sample(50, seed), sample(50, (1, 2))):
            assert np.array_equal(actual, expected)


def test_each_half_of_a_seed_matters():
    seeds = [(0, 0), (0, 1), (1, 0), (1, 1), (-1, 0), (2 ** 32, 0), (0, 2 ** 40)]
    drawn = {tuple(np.asarray(augmentation.sample_colors(8, seed).hue)) for seed in seeds}
    assert len(drawn) == len(seeds)


# The views.


def test_pretraining_view_is_the_draws_applied_by_tf_image():
    images = random_images(160, seed=3)
    crops, colors = augmentation.sample_crops(160, (4, 2)), augmentation.sample_colors(160, (4, 2))
    expected = distort_as_drawn(crop_one_by_one(images, crops), colors)
    assert_close(augmentation.augment_images_pretraining(images, (4, 2)), expected, 1e-4)
    kinds = set(zip(colors.distort.numpy(), colors.grey.numpy()))
    assert len(kinds) == 4  # distorted or not, grey or not: all four were compared


def test_finetuning_view_is_the_crop_alone():
    images = random_images(64, seed=3)
    expected = crop_one_by_one(images, augmentation.sample_crops(64, (4, 2)))
    assert_close(augmentation.augment_images_finetuning(images, (4, 2)), expected, 1e-5)


@pytest.mark.parametrize(
    "augment", [augmentation.augment_images_pretraining, augmentation.augment_images_finetuning])
class TestBoth:
    def test_same_seed_same_bits_other_seed_other_view(self, augment):
        images = random_images(64)
        view, again, other = (augment(images, seed).numpy() for seed in ((5, 0), (5, 0), (5, 1)))
        assert view.tobytes() == again.tobytes()
        assert np.all(np.abs(view - other).max((1, 2, 3)) > 0.05)  # two views of each image differ

    def test_images_of_a_batch_get_different_parameters(self, augment):
        images = np.repeat(random_images(1), 64, axis=0)
        views = augment(images, (5, 0)).numpy().reshape(64, -1)
        assert len(np.unique(views.round(3), axis=0)) == 64

    @pytest.mark.parametrize("kind", ["uint8", "float16", "float32", "float64"])
    def test_range_and_dtype(self, augment, kind):
        images = random_images(64) if kind == "uint8" else (random_images(64) / 255).astype(kind)
        view = augment(images, (5, 0))
        assert view.dtype == tf.float32 and view.shape == (64, 32, 32, 3)
        assert -1e-6 < view.numpy().min() < 0.1 and 0.9 < view.numpy().max() < 1 + 1e-6

    @pytest.mark.parametrize("workers", [3, 64])
    def test_parts_of_a_batch_equal_the_whole(self, augment, workers):
        images = random_images(192)
        rows = 192 // workers
        parts = [augment(images[first:first + rows], (5, 0), first, 192) for first in range(0, 192, rows)]
        assert_close(np.concatenate(parts), augment(images, (5, 0)), 1e-6)

    @pytest.mark.parametrize("size", [48, 64])
    def test_other_sizes(self, augment, size):
        images = random_images(24, size, size)
        expected = crop_one_by_one(images, augmentation.sample_crops(24, (5, 0), size))
        if augment is augmentation.augment_images_pretraining:
            expected = distort_as_drawn(expected, augmentation.sample_colors(24, (5, 0)))
        assert_close(augment(images, (5, 0)), expected, 1e-4)

    def test_inside_tf_data(self, augment):
        """With the step as half of the seed: static shapes, and the bits of an eager call."""
        images = random_images(128)
        dataset = tf.data.Dataset.from_tensor_slices(images).batch(64, drop_remainder=True).enumerate()
        views = dataset.map(lambda step, x: augment(x, (9, step)), num_parallel_calls=2)
        assert views.element_spec == tf.TensorSpec((64, 32, 32, 3), tf.float32)
        seeds = dataset.map(lambda step, x: augment(x, tf.stack([9, step])), num_parallel_calls=2)
        results = list(zip(views, seeds))
        assert len(results) == 2
        for step, (view, same) in enumerate(results):
            eager = augment(images[64 * step:64 * (step + 1)], (9, step)).numpy()
            assert view.numpy().tobytes() == same.numpy().tobytes() == eager.tobytes()

    @pytest.mark.parametrize("images, message", [
        (np.zeros((32, 32, 3), np.uint8), "shape"), (np.zeros((2, 32, 32, 1), np.uint8), "shape"),
        (np.zeros((2, 3, 32, 32), np.uint8), "shape"), (np.zeros((2, 32, 32, 3), np.int32), "int32"),
        (np.zeros((2, 32, 24, 3), np.uint8), "square")])
    def test_wrong_images_are_named(self, augment, images, message):
        with pytest.raises(ValueError, match=message):
            augment(images, (0, 0))

    @pytest.mark.parametrize("first, batch_size", [(-1, 8), (5, 8), (0, 3), (1, None)])
    def test_rows_outside_of_the_batch_are_refused(self, augment, first, batch_size):
        with pytest.raises(ValueError, match="4 images from row"):
            augment(random_images(4), (0, 0), first, batch_size)

    @pytest.mark.parametrize("seed", [(1,), (1, 2, 3), tf.constant(1)])
    def test_a_seed_that_is_no_pair_is_refused(self, augment, seed):
        with pytest.raises(ValueError, match="pair"):
            augment(random_images(4), seed)

    def test_a_batch_of_unknown_size_is_refused(self, augment):
        dataset = tf.data.Dataset.from_tensor_slices(random_images(6)).batch(4)
        with pytest.raises(ValueError, match="drop_remainder"):
            dataset.map(lambda x: augment(x, (0, 0)))


def test_colors_of_bytes_are_refused():
    with pytest.raises(ValueError, match="not uint8"):
        augmentation.distort_colors(random_images(1), [0.], [1.], [1.], [0.])


def test_what_is_applied_is_compiled_by_xla():
    images = tf.constant(random_images(4))
    drawn = augmentation.sample_crops(4, (0, 0)) + augmentation.sample_colors(4, (0, 0))
    for function, arguments, settings in [
            (transforms._compiled_augment, drawn, {}), (transforms._compiled_crop_flip_resize, drawn[:5], {}),
            (transforms._compiled_augment, drawn, dict(solarise=drawn[4], multiplies=True))]:
        assert function.get_concrete_function(images, *arguments, **settings).function_def.attr["_XlaMustCompile"].b


# Views other than the reference's.


AREA = augmentation.Views(crop="area")
# All that can be chosen, chosen otherwise.
OTHERWISE = augmentation.Views(crop="area", min_area=0.2, flip=0.5, brightness=0.3, contrast=0.2, saturation=0.5, hue=0.05,
                               brightness_multiplies=True, distort=0.7, grey=0.3, solarise=(0.2, 0.6))


def area_crop_of_one(tries, min_area, size):
    """Height and width as torchvision's RandomResizedCrop has them, from a random number for area and aspect of each try."""
    for area, aspect in tries:
        target = size * size * (min_area + (1 - min_area) * area)
        ratio = np.exp(np.log(3 / 4) + (np.log(4 / 3) - np.log(3 / 4)) * aspect)
        width, height = round(np.sqrt(target * ratio)), round(np.sqrt(target / ratio))
        if 0 < width <= size and 0 < height <= size:
            return height, width
    return size, size


@pytest.mark.parametrize("size, min_area", [(32, 0.08), (32, 0.9), (48, 0.2), (3, 0), (1, 0.5)])
def test_crops_by_area_equal_torchvisions_one_by_one(size, min_area):
    views = dataclasses.replace(AREA, min_area=min_area)
    crops = augmentation.sample_crops(5000, (8, size), size, views)
    draw = augmentation._uniform([5000, 10], (8, size), ("area", "aspect"))
    expected = [area_crop_of_one(tries, min_area, size) for tries in np.stack([draw["area"], draw["aspect"]], 2).astype(np.float64)]
    same = np.mean(np.all(np.stack([crops.height, crops.width], 1) == expected, axis=1))
    assert same >= 0.999  # a side next to a half may round the other way in float32
    assert [x.dtype for x in crops] == [tf.int32] * 4 + [tf.bool]
    for start, length in ((crops.top, crops.height), (crops.left, crops.width)):
        assert np.min(start) >= 0 and np.min(length) >= 1 and np.max(start + length) <= size


@pytest.mark.parametrize("min_area", [0.08, 0.95])
def test_sides_of_crops_by_area_have_the_distribution(min_area):
    """Against the measure of all (area, aspect) that round to a pair of sides, which a grid of 2000 x 2000 points gives."""
    middle = (np.arange(2000) + 0.5) / 2000
    root = 32 * np.sqrt(min_area + (1 - min_area) * middle)[:, None]
    stretch = (4 / 3) ** (middle - 0.5)
    height, width = np.round(root / stretch).astype(int), np.round(root * stretch).astype(int)
    fits = (height <= 32) & (width <= 32)
    once = np.bincount((33 * height + width)[fits], minlength=33 * 33) / fits.size
    missed = 1 - once.sum()
    expected = once * (1 - missed ** 10) / once.sum()
    expected[33 * 32 + 32] += missed ** 10
    crops = augmentation.sample_crops(MANY, (11, 8), views=dataclasses.replace(AREA, min_area=min_area))
    assert (missed ** 10 * MANY > 1000) == (min_area == 0.95)  # then the whole image is also what is left if no try fits
    expected[expected * MANY < 0.5] = 0  # pairs that all but never come
    drawn = 33 * crops.height.numpy() + crops.width.numpy()
    assert np.mean(expected[drawn] == 0) < 1e-3
    assert_counts(drawn[expected[drawn] > 0], 0, expected)


def test_places_of_crops_by_area_have_the_distribution():
    crops = augmentation.sample_crops(MANY, (11, 9), views=AREA)
    for start, length in ((crops.top.numpy(), crops.height.numpy()), (crops.left.numpy(), crops.width.numpy())):
        for side in range(12, 33):
            assert_counts(start[length == side], 0, np.ones(32 - side + 1))


def test_amounts_and_rates_are_those_of_the_views():
    colors = augmentation.Colors(*(x.numpy() for x in augmentation.sample_colors(MANY, (11, 7), OTHERWISE)))
    assert_uniform(colors.brightness, 0.7, 1.3)
    assert_uniform(colors.contrast, 0.8, 1.2)
    assert_uniform(colors.saturation, 0.5, 1.5)
    assert_uniform(colors.hue, -0.05, 0.05)
    assert_rate(colors.distort, 0.7)
    assert_rate(colors.grey, 0.3)
    for views in (OTHERWISE, dataclasses.replace(OTHERWISE, crop="reference")):
        assert_rate(augmentation.sample_crops(MANY, (11, 7), views=views).flip.numpy(), 0.5)
    for view, rate in ((0, 0.2), (1, 0.6), (2, 0.2), (3, 0.6)):
        assert_rate(augmentation.sample_solarise(MANY, (11, 7), OTHERWISE, view).numpy(), rate)
    added = augmentation.sample_colors(MANY, (1, 1), dataclasses.replace(OTHERWISE, brightness_multiplies=False)).brightness
    assert_uniform(added.numpy(), -0.3, 0.3)


def test_later_parameters_depend_on_no_other():
    drawn = augmentation._uniform([MANY], (11, 7), augmentation.STREAMS)
    correlation = np.corrcoef([drawn[name] for name in augmentation.STREAMS])
    assert len(set(augmentation.STREAMS)) == len(augmentation.STREAMS) == 18
    assert np.abs(correlation - np.eye(18)).max() < 6 / np.sqrt(MANY)


def test_brightness_that_multiplies_equals_each_image_times_its_factor():
    images = colorful_images(256)
    colors = augmentation.sample_colors(256, (3, 5), OTHERWISE)[:4]
    nothing = np.zeros(256, np.float32)
    expected = distort_one_by_one(images * colors[0].numpy()[:, None, None, None], nothing, *colors[1:])
    assert_close(augmentation.distort_colors(images, *colors, multiplies=True), expected, 1e-5)
    assert np.abs(expected - distort_one_by_one(images, *colors)).max() > 0.1


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("view", [0, 1])
def test_every_setting_is_applied_image_by_image(size, view):
    images = random_images(160, size, size, seed=3)
    crops, colors = augmentation.sample_crops(160, (4, 2), size, OTHERWISE), augmentation.sample_colors(160, (4, 2), OTHERWISE)
    solarise = augmentation.sample_solarise(160, (4, 2), OTHERWISE, view).numpy()
    assert 10 < solarise.sum() < 150
    x = crop_one_by_one(images, crops)
    x = np.where(colors.distort.numpy()[:, None, None, None], x * colors.brightness.numpy()[:, None, None, None], x)
    x = distort_as_drawn(x, colors._replace(brightness=np.zeros(160, np.float32)))
    solarised = np.stack([np.where(image >= 0.5, 1 - image, image) if turn else image for image, turn in zip(x, solarise)])
    assert_close(augmentation.augment_images_pretraining(images, (4, 2), views=OTHERWISE, view=view), solarised, 1e-4)


def test_parts_of_a_batch_of_other_views_equal_the_whole():
    images = random_images(192)
    parts = [augmentation.augment_images_pretraining(images[i:i + 64], (5, 0), i, 192, OTHERWISE, 1) for i in (0, 64, 128)]
    assert_close(np.concatenate(parts), augmentation.augment_images_pretraining(images, (5, 0), views=OTHERWISE, view=1), 1e-5)


def test_views_are_immutable_and_can_be_keys():
    assert {AREA: 1}[augmentation.Views(crop="area")] == 1 and AREA != augmentation.Views()
    with pytest.raises(dataclasses.FrozenInstanceError):
        AREA.flip = 0.5


@pytest.mark.parametrize("wrong", [dict(crop="centre"), dict(flip=1.1), dict(hue=-0.1), dict(solarise=(0.0, 2.0)), dict(min_area=8)])
def test_views_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match="%s=" % list(wrong)[0]):
        augmentation.Views(**wrong)


# The paper's views.


PAPER = augmentation.Views(crop="area", flip=0.5, saturation=0.2, solarise=(0.0, 0.2), blur=(1.0, 0.1), colour_order="random")


def distort_in_order(image, amounts, keys):
    """tf.image's adjustments of one image in the order of the keys, clipped to [0, 1] after each."""
    adjust = (tf.image.adjust_brightness, tf.image.adjust_contrast, tf.image.adjust_saturation, tf.image.adjust_hue)
    for number in np.argsort(keys):
        if number == 2:  # see distort_one_by_one
            red, green, blue = np.moveaxis(np.asarray(image), -1, 0)
            slip = (red >= blue) & (blue > green) & (blue - green < 1e-6 * (red - green))
            image = np.stack([red, np.where(slip, blue, green), blue], -1)
        image = tf.clip_by_value(adjust[number](image, amounts[number]), 0., 1.)
    return image.numpy()


def blur_one(image, deviation):
    """A depthwise convolution along each axis, zeros beyond the edges."""
    radius = int(len(image) / 20)
    taps = np.exp(-np.arange(-radius, radius + 1) ** 2 / (2 * float(deviation) ** 2)) if deviation else np.ones(1)
    taps = np.tile((taps / taps.sum())[:, None], (1, 3)).astype(np.float32)
    for kernel in (taps[:, None, :, None], taps[None, :, :, None]):
        image = tf.nn.depthwise_conv2d(image[None], kernel, [1, 1, 1, 1], "SAME")[0]
    return image.numpy()


def test_distortions_in_random_order_equal_tf_image():
    images = random_images(192, 16, 16, seed=5).astype(np.float32) / np.float32(255)
    colors, order = augmentation.sample_colors(192, (3, 5), PAPER)[:4], augmentation.sample_order(192, (3, 5)).numpy()
    assert len({tuple(np.argsort(keys)) for keys in order}) == 24  # all orders were compared
    expected = np.stack([distort_in_order(image, [float(c[i]) for c in colors], order[i]) for i, image in enumerate(images)])
    assert_close(augmentation.distort_colors(images, *colors, order=order), expected, 1e-5)


@pytest.mark.parametrize("size", [16, 32, 96, 224])
def test_blur_equals_a_convolution_of_each_image(size):
    images = random_images(6, size, size).astype(np.float32) / np.float32(255)
    deviation = np.array([0, 0.1, 0.5, 1, 1.7, 2], np.float32)
    assert_close(transforms.blur(images, deviation), np.stack(list(map(blur_one, images, deviation))), 1e-5)


def test_orders_and_blurs_have_the_distribution():
    order = np.argsort(augmentation.sample_order(MANY, (11, 7)), axis=1)
    assert_counts(order @ [64, 16, 4, 1], 0, [len(set(np.base_repr(i + 256, 4)[1:])) == 4 for i in range(256)])
    for view, rate in ((0, 1.0), (1, 0.1), (3, 0.1)):
        drawn = augmentation.sample_blur(MANY, (11, 7), PAPER, view).numpy()
        assert np.all(drawn > 0) if rate == 1 else abs(np.mean(drawn > 0) - rate) < 5 * np.sqrt(rate * (1 - rate) / MANY)
        assert_uniform(drawn[drawn > 0], 0.1, 2.0)


@pytest.mark.parametrize("view", [0, 1])
def test_the_papers_views_are_the_draws_applied_image_by_image(view):
    """From images of 48 pixels to views of 40."""
    images, views = random_images(96, 48, 48, seed=3), dataclasses.replace(PAPER, size=40)
    crops, colors = augmentation.sample_crops(96, (4, 2), 48, views), augmentation.sample_colors(96, (4, 2), views)
    order, deviation = augmentation.sample_order(96, (4, 2)).numpy(), augmentation.sample_blur(96, (4, 2), views, view).numpy()
    solarise = augmentation.sample_solarise(96, (4, 2), views, view).numpy()
    expected = []
    for i, image in enumerate(images):
        top, left, height, width, flip = (int(x[i]) for x in crops)
        x = tf.image.convert_image_dtype(image[top:top + height, left:left + width], tf.float32)
        x = tf.image.resize(x[:, ::-1] if flip else x, (40, 40)).numpy()
        x = distort_in_order(x, [float(c[i]) for c in colors[:4]], order[i]) if colors.distort[i] else x
        x = np.repeat(x @ np.array([[0.2989], [0.5870], [0.1140]], np.float32), 3, axis=2) if colors.grey[i] else x
        x = blur_one(x, deviation[i])
        expected.append(np.where(x >= 0.5, 1 - x, x) if solarise[i] else x)
    found = augmentation.augment_images_pretraining(images, (4, 2), views=views, view=view).numpy()
    assert found.shape == (96, 40, 40, 3) and (solarise.any() == (view == 1))
    apart = np.abs(found - expected)
    near = np.abs(np.stack(expected) - 0.5) < 1e-4  # where rounding may decide what is solarised
    assert apart[~near].max() <= 1e-4 and near.mean() < 1e-3
