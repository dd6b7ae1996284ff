"""A data set that TensorFlow Datasets has prepared on this machine: `--dataset tfds:NAME --data_dir DIR`.

    DIR/NAME/VERSION/           or DIR/NAME/CONFIG/VERSION/
        dataset_info.json       which parts (splits) there are, and how many examples are in each file
        features.json           what an example holds

NAME may name the rest: tfds:NAME/CONFIG:1.0.0. Nothing is downloaded, and no code of the data set is run. The files as they were put
in, such as JPEGs, are read and brought to size as those of a folder are, and kept in the same kind of store.
"""
import glob
import itertools
import os
import re
from typing import Any, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import tensorflow as tf
from absl import logging

from commands import UserError
from sources import folders, image_files, mapped, store

PREFIX = "tfds:"
TEST_SPLITS = ("test", "validation", "val")  # by preference
NAME = re.compile(r"(\w+)(?:/([\w.+-]+))?(?::(\d+\.\d+\.\d+))?")
VERSION = re.compile(r"\d+\.\d+\.\d+")


class Part(NamedTuple):
    """The examples of one split: its name, how many, and size and times of the file that each lies in, int64 (n, 3)."""
    split: str
    number: int
    stamps: np.ndarray


class Prepared:
    """A prepared data set, opened. folder: of this version. label: the name of the feature with the class, or None."""

    def __init__(self, name: str, data_dir: Optional[str]) -> None:
        self.title = PREFIX + name
        self.folder = _find(name, data_dir)
        self._package = _package()
        open_folder = getattr(self._package, "builder_from_directory", None) or self._package.core.builder_from_directory
        try:
            self._builder = open_folder(self.folder)
            features = self._builder.info.features
            self._splits = {key: split for key, split in self._builder.info.splits.items() if split.num_examples}
        except Exception as error:  # of a newer version, of code that is not there, damaged
            raise self._unreadable(error)
        self.image, self.label = self._features(features)
        names = getattr(features[self.label], "names", None) if self.label else None
        self.class_names = tuple(names or ())

    def _unreadable(self, error: Exception) -> UserError:
        return UserError("TensorFlow Datasets %s cannot read %s (%s: %s); prepare it anew." % (
            self._package.__version__, self.folder, type(error).__name__, _first_line(error)))

    def _features(self, features: Any) -> Tuple[str, Optional[str]]:
        """The names of the features with the image and with its class. UserError if there is no such image."""
        kinds = self._package.features
        images, labels, shown = [], [], []
        for key, feature in sorted(features.items()) if isinstance(features, kinds.FeaturesDict) else ():
            if isinstance(feature, kinds.Image) and not isinstance(feature, getattr(kinds, "LabeledImage", ())):
                dtype = tf.as_dtype(getattr(feature, "tf_dtype", None) or feature.dtype)
                images += [key] if dtype.is_integer else []
                shown.append("%s: Image of %s" % (key, dtype.name))
            else:
                labels += [key] if isinstance(feature, kinds.ClassLabel) else []
                shown.append("%s: %s" % (key, type(feature).__name__))
        for keys, usual in ((images, "image"), (labels, "label")):
            if usual in keys:
                keys[:] = [usual]
        if len(images) != 1:
            raise UserError("An example of %s is not one image of 8 or 16 bits (%s); choose a data set of such images."
                            % (self.title, ", ".join(shown) or type(features).__name__))
        return images[0], labels[0] if len(labels) == 1 else None

    def parts(self) -> List[Part]:
        """The split for training, and that for testing if there is one. UserError if files are missing."""
        names = sorted(self._splits)
        train = "train" if "train" in names else names[0] if len(names) == 1 else ""
        if not train:
            raise UserError("%s has the parts %s, and none is called train." % (self.title, ", ".join(names) or "(none)"))
        tests = [name for name in TEST_SPLITS if name in names and name != train and self._is_labelled(name)]
        return [self._part(name) for name in [train] + tests[:1]]

    def _part(self, name: str) -> Part:
        split = self._splits[name]
        numbers = [int(number) for number in split.shard_lengths]
        stamps = [folders.stamp(os.path.join(self.folder, file)) for file in sorted(split.filenames)]
        for file, stamp in zip(sorted(split.filenames), stamps):
            if stamp[2] < 0:
                raise UserError("%s is not complete: %s is missing in %s; prepare it anew." % (self.title, file, self.folder))
        return Part(name, sum(numbers), np.repeat(np.array(stamps, np.int64).reshape(-1, 3), numbers, axis=0))

    def _is_labelled(self, split: str) -> bool:
        """Whether its first example has a label, if any of the data set has: parts for a competition have -1."""
        return self.label is None or next(self.examples(split, 0, 1))[1] >= 0

    def examples(self, split: str, start: int, stop: int) -> Iterator[Tuple[bytes, int]]:
        """Of the examples start..stop - 1 of a split the content of the image's file, and its class, -1 for none."""
        try:
            with tf.device("CPU:0"):
                for example in self._dataset(split).skip(start).take(stop - start):
                    yield example[self.image].numpy(), int(example[self.label]) if self.label else -1
        except (tf.errors.OpError, ValueError, TypeError, OSError, ImportError) as error:  # damaged, or in a format that is not there
            raise self._unreadable(error)

    def _dataset(self, split: str) -> tf.data.Dataset:
        keys = {key: True for key in (self.image, self.label) if key}
        decoding = self._package.decode.PartialDecoding(keys, decoders={self.image: self._package.decode.SkipDecoding()})
        in_order = self._package.ReadConfig(interleave_cycle_length=1, try_autocache=False)
        verbosity = logging.get_verbosity()
        logging.set_verbosity(min(verbosity, logging.ERROR))  # 4.9 warns of what it calls itself
        try:
            return self._builder.as_dataset(split=split, shuffle_files=False, decoders=decoding, read_config=in_order)
        finally:
            logging.set_verbosity(verbosity)


def read(name: str, data_dir: Optional[str], image_size: int, test_fraction: float, cache_dir: Optional[str] = None,
         say: Optional[store.Say] = None, thorough: bool = False
         ) -> Tuple[mapped.Images, Optional[np.ndarray], mapped.Images, Optional[np.ndarray], Tuple[str, ...], Tuple[str, ...],
                    Tuple[str, ...]]:
    """Read the prepared data set `name`, with its configuration and version or not: as `folders.read`, the fields of `datasets.Data`.

    data_dir: where it was prepared (default: $TFDS_DATA_DIR, or else ~/tensorflow_datasets). Images for testing are those of the part
    test, or validation, that has labels; without either a `test_fraction` of each class is taken from train. A name such as train/17
    is that of the image at place 17 in TensorFlow Datasets' own order: train[17:18]. UserError for what is no set of images, is not
    there, or not whole.
    """
    folders.check_fraction(test_fraction)
    prepared = Prepared(name, data_dir)
    parts = prepared.parts()
    names = ["%s/%d" % (part.split, i) for part in parts for i in range(part.number)]

    def load(indices: Sequence[int], size: int) -> Iterator[store.Result]:
        def one(example: Tuple[bytes, int]) -> store.Result:
            try:
                with tf.device("CPU:0"):
                    return image_files.square(image_files.decode(example[0], size), size), example[1]
            except image_files.Unusable as error:
                return error

        return image_files.several_at_once(one, _chosen(prepared, parts, indices), size)

    source = store.Source(prepared.title, os.path.realpath(prepared.folder), os.stat(prepared.folder).st_ino,
                          [text.encode() for text in names], np.concatenate([part.stamps for part in parts]), load,
                          prepared.title)
    stored = store.Store(source, image_size, cache_dir, say, thorough)
    folders.warn_of_skipped(dict((names[i], reason) for i, reason in sorted(stored.reasons.items())), len(names), prepared.title)
    usable = np.flatnonzero(stored.rows >= 0)
    train, test = usable[usable < parts[0].number], usable[usable >= parts[0].number]
    labels = _labels(prepared, stored.labels, usable)
    if len(parts) == 1 and labels is not None:
        kept = folders.choose([names[i] for i in train], labels[train].tolist(), test_fraction)
        is_test = np.isin(np.arange(len(train)), sorted(kept))
        train, test = train[~is_test], train[is_test]
    if len(train) < 2:
        raise UserError("%s has %d usable images for training; it needs 2 at least." % (prepared.title, len(train)))
    files = [tuple(names[i] for i in part) for part in (train, test)]
    if labels is None:
        return stored.images(train), None, stored.images(test), None, (), files[0], files[1]
    class_names = prepared.class_names or tuple(str(i) for i in range(labels.max() + 1))
    return stored.images(train), labels[train], stored.images(test), labels[test], class_names, files[0], files[1]


def _labels(prepared: Prepared, labels: np.ndarray, usable: np.ndarray) -> Optional[np.ndarray]:
    missing = int((labels[usable] < 0).sum())
    if prepared.label and 0 < missing < len(usable):
        logging.warning("%d of the %d images of %s have no label; it is used as one without labels.", missing, len(usable),
                        prepared.title)
    return None if missing or not len(usable) else labels


def _chosen(prepared: Prepared, parts: Sequence[Part], indices: Sequence[int]) -> Iterator[Tuple[bytes, int]]:
    """The examples of these ascending indices, those of the parts numbered one after the other."""
    first = 0
    for part in parts:
        wanted = {index - first for index in indices if first <= index < first + part.number}
        if wanted:
            start, stop = min(wanted), max(wanted) + 1
            for place, example in zip(itertools.count(start), prepared.examples(part.split, start, stop)):
                if place in wanted:
                    yield example
        first += part.number


def _find(name: str, data_dir: Optional[str]) -> str:
    """The folder of the wanted or else the newest version of a data set."""
    match = NAME.fullmatch(name)
    if not match:
        raise UserError("--dataset is %s%s; give %sNAME, and its configuration and version if need be, as in %scifar10_1/v4:1.0.0."
                        % (PREFIX, name, PREFIX, PREFIX))
    title, config, version = match.groups()
    parent = os.path.expanduser(data_dir or os.environ.get("TFDS_DATA_DIR") or os.path.join("~", "tensorflow_datasets"))
    found = {}  # type: Dict[Tuple[str, Tuple[int, ...]], str]
    pattern = os.path.join(glob.escape(os.path.join(parent, title)), glob.escape(config) if config else "**", "*", "dataset_info.json")
    for path in glob.glob(pattern, recursive=True):
        folder = os.path.dirname(path)
        above = os.path.relpath(os.path.dirname(folder), os.path.join(parent, title))
        if VERSION.fullmatch(os.path.basename(folder)) and version in (None, os.path.basename(folder)):
            found["" if above == "." else above, tuple(map(int, os.path.basename(folder).split(".")))] = folder
    configs = sorted({key[0] for key in found})
    if not found:
        raise UserError("%s%s is not prepared in %s, and nothing is downloaded here; prepare it with: python -c \"import "
                        "tensorflow_datasets as t; t.builder('%s', data_dir='%s').download_and_prepare()\""
                        % (PREFIX, name, parent, name, parent))
    if len(configs) > 1:
        raise UserError("%s%s is prepared in several configurations; choose one: %s."
                        % (PREFIX, name, ", ".join("%s%s/%s" % (PREFIX, title, each) for each in configs)))
    return found[max(found)]


def _package() -> Any:
    try:
        import tensorflow_datasets
    except Exception as error:  # one that was made for another TensorFlow can raise anything
        raise UserError("--dataset tfds:NAME needs the package tensorflow-datasets (%s: %s); install it with: pip install -r "
                        "requirements-extra.txt" % (type(error).__name__, _first_line(error)))
    return tensorflow_datasets


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0][:200]
