"""Data sets as uint8 images in memory, and the tf.data pipelines that make batches of them.

Which images a batch holds and how they are augmented is a function of the seed and the step alone. So a run can go on from any step
with the batches that it would have had, and any number of workers can share a batch.

    python datasets.py prepare --data_dir PHOTOS --image_size 64

decodes a folder of images beforehand, or with --dataset tfds:NAME what TensorFlow Datasets has prepared, into the store that every
command then starts from. It also repairs that: all checksums are compared, and files that were no usable images are tried again.

Random numbers: [seed, step] gives the seeds of a step's views, [seed, -1 - epoch] an epoch's order. Steps are never negative, so no
two draws share a stream.
"""
import dataclasses
import sys
from typing import Any, Callable, NamedTuple, Optional, Tuple, Union

import commands  # before TensorFlow, whose start it quiets

# isort: split

import numpy as np
import tensorflow as tf
from absl import logging

import augmentation
from commands import UserError, flag
from sources import cifar, folders, image_files, mapped, shapes, store, tfds

NAMES = ("cifar10", "cifar100", "shapes", "folder", "tfds:NAME")
SHAPES_TRAIN, SHAPES_TEST = 5000, 1000
Images = Union[np.ndarray, mapped.Images]


class Data(NamedTuple):
    """A data set. Images are uint8 (n, s, s, 3) and have len() and slices; labels are int64 (n,), or None."""
    train_images: Images
    train_labels: Optional[np.ndarray]
    test_images: Images
    test_labels: Optional[np.ndarray]
    class_names: Tuple[str, ...]
    train_files: Tuple[str, ...] = ()  # paths below the folder, where each image has a file
    test_files: Tuple[str, ...] = ()


def load(name: str, data_dir: Optional[str] = None, image_size: int = 32, test_fraction: float = 0.1,
         seed: int = 0, train_size: Optional[int] = None, test_size: Optional[int] = None,
         cache_dir: Optional[str] = None, say: Optional[store.Say] = None, store_size: Optional[int] = None) -> Data:
    """Load the data set `name`, one of NAMES; tfds:NAME stands for all that TensorFlow Datasets has prepared.

    data_dir: for CIFAR see `cifar.read`, for a folder of images `folders.read`, for tfds:NAME `tfds.read`; shapes need none.
    image_size: to which images are brought, and at which shapes are drawn; CIFAR's are 32 x 32. test_fraction: what is set aside of
    a folder without train/ and test/, and of what has no part test or validation. seed: of the shapes, modulo 2^32; runs that are to
    be compared need the same one. train_size, test_size: how many shapes to draw (default 5,000 and 1,000); of other data sets, how
    many images to take, evenly spread (default all). cache_dir: where images are kept decoded, one store for each source and size
    (default: `store.default_folder()`). say: prints a line about that; without it nothing is printed. store_size: see `stored_size`;
    the images have that size then. Raises UserError for what is not there, is damaged or does not fit together.
    """
    if name not in NAMES and not name.startswith(tfds.PREFIX):
        raise UserError("There is no data set %r; choose one of %s." % (name, ", ".join(NAMES)))
    side = stored_size(image_size, store_size)
    if name == "shapes":
        seed %= 1 << 32
        train = shapes.make(SHAPES_TRAIN if train_size is None else train_size, (seed, 0), side)
        test = shapes.make(SHAPES_TEST if test_size is None else test_size, (seed, 1), side)
        return Data(*train, *test, shapes.CLASS_NAMES)
    if name == "folder" or name.startswith(tfds.PREFIX):
        data = _decoded(name, data_dir, side, test_fraction, cache_dir, say)
    else:
        if image_size != cifar.IMAGE_SIZE:
            raise UserError("The images of %s have 32 x 32 pixels, not --image_size %d." % (name, image_size))
        if side != cifar.IMAGE_SIZE:
            raise UserError("The images of %s have 32 x 32 pixels; --store_size %d is for folders, shapes and tfds:NAME."
                            % (name, side))
        data = Data(*cifar.read(name, data_dir))
    images, labels, files = _spread(data.train_images, data.train_labels, data.train_files, train_size, "training")
    data = data._replace(train_images=images, train_labels=labels, train_files=files)
    images, labels, files = _spread(data.test_images, data.test_labels, data.test_files, test_size, "test")
    return data._replace(test_images=images, test_labels=labels, test_files=files)


def _decoded(name: str, data_dir: Optional[str], side: int, test_fraction: float, cache_dir: Optional[str], say: Optional[store.Say],
             thorough: bool = False) -> Data:
    """What is kept in a store. thorough: see there."""
    if name.startswith(tfds.PREFIX):
        return Data(*tfds.read(name[len(tfds.PREFIX):], data_dir, side, test_fraction, cache_dir, say, thorough))
    if not data_dir:
        raise UserError("--dataset folder needs --data_dir, the folder of images.")
    return Data(*folders.read(data_dir, side, test_fraction, cache_dir, say, thorough))


def stored_size(image_size: int, store_size: Optional[int]) -> int:
    """The side in pixels of images as they are kept: `store_size`, from which views of `image_size` are cut, or else that itself.

    UserError if it is smaller.
    """
    if store_size is not None and store_size < image_size:
        raise UserError("--store_size is %d; give at least --image_size, %d." % (store_size, image_size))
    return store_size or image_size


def _spread(images: Images, labels: Optional[np.ndarray], files: Tuple[str, ...], size: Optional[int],
            what: str) -> Tuple[Images, Optional[np.ndarray], Tuple[str, ...]]:
    """`size` images at even distances, because a folder's images are sorted by class."""
    if size is None:
        return images, labels, files
    if not 1 <= size <= len(images):
        raise UserError("%d %s images were asked for, but the data set has %d." % (size, what, len(images)))
    chosen = np.arange(size) * len(images) // size
    chosen_files = tuple(files[i] for i in chosen) if files else ()
    return images.take(chosen, axis=0), None if labels is None else labels[chosen], chosen_files


def pretraining_batches(images: Any, batch_size: int, seed: int, first_step: int, last_step: int, first: int = 0,
                        rows: Optional[int] = None, views: augmentation.Views = augmentation.Views(),
                        number_of_views: int = 2) -> tf.data.Dataset:
    """Two or more views of the batch of each of the steps first_step..last_step - 1 of a run.

    Gives tuples of float32 (rows, s, s, 3) in [0, 1], of static shapes. An epoch has n // batch_size steps, in a
    fresh order; the images that are left over are dropped. images: uint8 (n, s, s, 3), as in Data. seed: an integer of 64 bits. first,
    rows: make only these rows of each batch (default all), as one of several workers; together they make the same views as one would.
    views, number_of_views: how they are made, and how many, at least 2. The first two are the same whatever the number. Raises
    UserError if the batch is larger than the data set, ValueError if the rows are not within it.
    """
    gather = _gather(images)
    rows = batch_size - first if rows is None else rows

    def make(step: tf.Tensor, indices: tf.Tensor) -> Tuple[tf.Tensor, ...]:
        batch, seeds = gather(indices), _seeds(seed, step, number_of_views)
        return tuple(augmentation.augment_images_pretraining(batch, seeds[view], first, batch_size, views, view)
                     for view in range(number_of_views))

    return _batches(make, len(images), batch_size, seed, first_step, last_step, first, rows)


def finetuning_batches(images: Any, labels: Optional[np.ndarray], batch_size: int, seed: int, first_step: int,
                       last_step: int, first: int = 0, rows: Optional[int] = None, size: Optional[int] = None) -> tf.data.Dataset:
    """As `pretraining_batches`, but (view, label): one view by crop and flip, and int64 labels (rows,).

    size: side of the views in pixels, where it is not the images'.
    """
    if labels is None:
        raise UserError("The data set has no labels, and only pretraining does without; put images into class folders.")
    gather, classes = _gather(images), _on_host(labels)
    rows = batch_size - first if rows is None else rows

    def view(step: tf.Tensor, indices: tf.Tensor) -> Tuple[tf.Tensor, tf.Tensor]:
        batch, seeds = gather(indices), _seeds(seed, step)
        return (augmentation.augment_images_finetuning(batch, seeds[0], first, batch_size, size), tf.gather(classes, indices))

    return _batches(view, len(images), batch_size, seed, first_step, last_step, first, rows)


def evaluation_batches(images: Any, batch_size: int) -> tf.data.Dataset:
    """All images in their order, as float32 (b, s, s, 3) in [0, 1]. The last batch may be smaller."""
    if batch_size < 1:
        raise UserError("The batch size is %d; it must be at least 1." % batch_size)
    gather = _gather(images)
    indices = tf.data.Dataset.range(len(images)).batch(batch_size)
    return map_elements(indices, lambda i: tf.cast(gather(i), tf.float32) / 255).prefetch(2)


def _gather(images: Images) -> Callable[[tf.Tensor], tf.Tensor]:
    """A function of indices (b,) that reads these images, uint8 (b, s, s, 3), and no others."""
    if isinstance(images, mapped.Images):
        pixels, rows = _on_host(images.pixels), _on_host(images.rows)
        return lambda indices: tf.gather(pixels, tf.gather(rows, indices))
    tensor = _on_host(images)
    return lambda indices: tf.gather(tensor, indices)


def _on_host(array: Any) -> tf.Tensor:
    """The array as a tensor that tf.data can capture by reference, wherever the networks are.

    It shares the array's memory where that is such as `image_files.empty` gives, which must not change any more then.
    """
    with tf.device("CPU:0"):
        usable = array.size and array.flags.c_contiguous and array.flags.writeable
        if usable and array.ctypes.data % image_files.ALIGNMENT == 0 and hasattr(array, "__dlpack__"):
            return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
        return tf.convert_to_tensor(array)  # which copies, but not what is aligned on TensorFlow 2.6


def _seeds(seed: int, step: tf.Tensor, n: int = 2) -> tf.Tensor:
    """A pair of integers for each of n views of a step, int64 (n, 2); those of the first two do not depend on n.

    Drawn, not counted up, so that streams which augmentation derives from neighbouring seeds cannot meet.
    """
    pair = tf.stack([tf.constant(seed, tf.int64), step])
    seeds = tf.random.stateless_uniform((2, 2), pair, None, None, tf.int64)
    others = tf.random.experimental.stateless_fold_in(pair, tf.constant(2, tf.int64))
    return tf.concat([seeds, tf.random.stateless_uniform((n - 2, 2), others, None, None, tf.int64)], axis=0)


def _order(seed: int, epoch: tf.Tensor, n: int) -> tf.Tensor:
    """A permutation of 0..n - 1, int32 (n,)."""
    pair = tf.stack([tf.constant(seed, tf.int64), -1 - epoch])
    return tf.argsort(tf.random.stateless_uniform((n,), pair, None, None, tf.int64))


def _batches(make: Callable[[tf.Tensor, tf.Tensor], Tuple[tf.Tensor, ...]], n: int, batch_size: int,
             seed: int, first_step: int, last_step: int, first: int, rows: int) -> tf.data.Dataset:
    """`make(step, indices)` for each step; indices, int32 (rows,), are these rows of the step's batch."""
    if not 1 <= batch_size <= n:
        raise UserError("The batch size is %d; it must be at least 1 and at most the number of training "
                        "images, %d." % (batch_size, n))
    if not 0 <= first < first + rows <= batch_size:
        raise ValueError("Rows %d to %d are not within a batch of %d." % (first, first + rows, batch_size))
    steps_per_epoch = n // batch_size

    @tf.autograph.experimental.do_not_convert  # plain Python, as `make` is: saves the conversion's time at every start
    def steps_of(epoch: tf.Tensor) -> tf.data.Dataset:
        order = _order(seed, epoch, n)[:steps_per_epoch * batch_size]
        indices = tf.reshape(order, (steps_per_epoch, batch_size))[:, first:first + rows]
        steps = epoch * steps_per_epoch + tf.range(steps_per_epoch, dtype=tf.int64)
        return tf.data.Dataset.from_tensor_slices((steps, indices))

    first_epoch, skipped = divmod(first_step, steps_per_epoch)
    epochs = tf.data.Dataset.range(first_epoch, -(-last_step // steps_per_epoch))
    steps = epochs.flat_map(steps_of).skip(skipped).take(max(0, last_step - first_step))
    return map_elements(steps, tf.autograph.experimental.do_not_convert(make)).prefetch(4)


def map_elements(elements: tf.data.Dataset, function: Callable[..., Any]) -> tf.data.Dataset:
    """Several at a time, in order, as many as there are cores, but 16 at most.

    Without tf.data's rewriting, which would copy all images and finds nothing to improve. And without its tuning, whose thread sleeps
    ever longer, up to a minute, and the end of an iterator waits for it: a signal's save and each copy of a linear evaluation with it.
    """
    options = tf.data.Options()
    options.experimental_optimization.apply_default_optimizations = False
    if hasattr(options, "autotune"):  # TensorFlow 2.6 has other tuning, which does not wait
        options.autotune.enabled = False
    return elements.map(function, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).with_options(options)


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of `prepare`: each is a flag."""
    dataset: str = flag("folder", "A folder of images, or what TensorFlow Datasets has prepared.", choices=("folder", "tfds:NAME"))
    data_dir: Optional[str] = flag(None, "The folder of images, or that of TensorFlow Datasets (default: its own).", alias="data_path")
    image_size: int = flag(32, "Height and width to bring them to.", low=8, high=1024)
    store_size: Optional[int] = flag(None, "The same, for commands that get --store_size too; it wins over --image_size.", low=8,
                                     high=1024)
    cache_dir: Optional[str] = flag(None, "Where they are kept decoded, for every later start (default: ~/.cache/byol).")
    test_fraction: float = flag(0.1, "Of what has no images for testing of its own: the part kept for that.", low=0, high=0.9)
    quiet: bool = flag(False, "Print warnings and errors only.")


def prepare(config: Config) -> None:
    """Decode images into their store, or complete and repair that. UserError for what the user can mend."""
    commands.check(config)
    logging.set_verbosity(logging.WARNING)
    if config.dataset == "folder" and not config.data_dir:
        raise UserError("--data_dir is missing: give the folder of images.")
    say = None if config.quiet else lambda text: print(text, flush=True)
    side = stored_size(config.image_size, config.store_size)
    data = _decoded(config.dataset, config.data_dir, side, config.test_fraction, config.cache_dir, say, thorough=True)
    if say:
        say("%d images for training and %d for testing, %d classes." % (
            len(data.train_images), len(data.test_images), len(data.class_names)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["prepare"]:
        del sys.argv[1]
    elif not {"--help", "--helpshort"} & set(sys.argv):
        sys.exit("datasets.py: give prepare as the first argument; see --help.")
    commands.define_flags(Config)
    commands.run(lambda: prepare(commands.from_flags(Config)))
