"""A folder of one's own images as a data set, in class folders or not, however large.

    folder/cat/1.jpg  folder/dog/1.jpg              labelled; a part of each class is kept for testing
    folder/train/cat/1.jpg  folder/test/cat/2.jpg   labelled, with a split of one's own
    folder/1.jpg                                    without labels, for pretraining
    folder/train/1.jpg  folder/test/2.jpg           the same
"""
import hashlib
import os
import time
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

import numpy as np
import tensorflow as tf
from absl import logging

from commands import UserError
from sources import image_files, mapped, store

NAMES_SHOWN = 5  # of skipped files, in the warning
TICK = 20000000  # nanoseconds within which a file can change twice and keep its time


class Listing(NamedTuple):
    """Files, and the name of the class of each, or None where there are no class folders."""
    paths: List[str]
    classes: Optional[List[str]]


def read(folder: str, image_size: int, test_fraction: float, cache_dir: Optional[str] = None, say: Optional[store.Say] = None,
         thorough: bool = False) -> Tuple[mapped.Images, Optional[np.ndarray], mapped.Images, Optional[np.ndarray],
                                          Tuple[str, ...], Tuple[str, ...], Tuple[str, ...]]:
    """Read a folder of images: the fields of `datasets.Data` in their order, images as uint8 (n, s, s, 3).

    Images are decoded once, into a `store.Store` in `cache_dir`. Files that are no usable images, and folders that cannot be read, are
    skipped with a warning that names them; hidden files and links to folders are ignored. The split depends on nothing but the files'
    names. Raises UserError if what is left is no data set.
    """
    folder = os.path.expanduser(folder)
    if not os.path.isdir(folder):
        raise UserError("The image folder %s does not exist or is no folder." % folder)
    check_fraction(test_fraction)
    real, cache = (os.path.realpath(os.path.expanduser(path)) for path in (folder, cache_dir or store.default_folder()))
    if (cache + os.sep).startswith(real + os.sep) and os.sep + "." not in cache[len(real):]:
        raise UserError("--cache_dir %s lies in the folder of images %s, and would be taken for images; choose another."
                        % (store.printable(cache), folder))
    train, test = _listings(folder, test_fraction)
    paths = train.paths + test.paths
    usable, stored = _decode(paths, folder, image_size, cache_dir, say, thorough) if paths else ([], None)
    first = len(train.paths)
    rows = [np.array([i for i in usable if i < first], np.int64), np.array([i for i in usable if i >= first], np.int64)]
    train, test = _only(train, rows[0].tolist()), _only(test, (rows[1] - first).tolist())
    if stored is None or len(train.paths) < 2:
        raise UserError("The folder %s holds %d usable images for training (%s); it needs "
                        "2 at least, in class folders, or without for pretraining."
                        % (folder, len(train.paths), ", ".join(image_files.FORMATS)))
    train_images, test_images = (stored.images(part) for part in rows)
    train_files, test_files = _names(train, folder), _names(test, folder)
    if train.classes is None or test.classes is None:
        return train_images, None, test_images, None, (), train_files, test_files

    names = sorted(set(train.classes))
    if len(names) < 2:
        raise UserError("The folder %s has one class only, %r; add folders of other classes, or for "
                        "pretraining without labels put the images into the folder itself."
                        % (folder, names[0]))
    if test_fraction > 0 and not test.paths:
        raise UserError("The folder %s has %d usable images in %d classes and none for testing; put some "
                        "into a folder test, or at least two into a class."
                        % (folder, len(train.paths), len(names)))
    unknown = sorted(set(test.classes) - set(names))
    if unknown:
        raise UserError("The class %r of %s has images for testing, but no usable one for training." % (unknown[0], folder))
    number = {name: index for index, name in enumerate(names)}
    train_labels = np.array([number[name] for name in train.classes], np.int64)
    test_labels = np.array([number[name] for name in test.classes], np.int64)
    return train_images, train_labels, test_images, test_labels, tuple(names), train_files, test_files


def check_fraction(test_fraction: float) -> None:
    """UserError if it is not a fraction."""
    if not 0 <= test_fraction < 1:
        raise UserError("The fraction of test images is %g; it must be at least 0 and less than 1." % test_fraction)


def _listings(folder: str, test_fraction: float) -> Tuple[Listing, Listing]:
    """The files for training and for testing."""
    inside, beside = _entries(folder)
    if {"train", "test"} <= set(inside):
        if len(inside) > 2:
            logging.warning("Beside train and test, these folders in %s are ignored: %s.", folder,
                            ", ".join(repr(name) for name in inside if name not in ("train", "test")))
        train, test = (_list(path, *_entries(path)) for path in (os.path.join(folder, "train"), os.path.join(folder, "test")))
        if not test.paths:
            return train, _only(train, [])
        if (train.classes is None) != (test.classes is None):
            raise UserError("Of the folders train and test in %s, one has class folders and the other has "
                            "not." % folder)
        return train, test
    if inside and set(inside) <= {"train", "test", "val", "valid", "validation"}:
        raise UserError("The folder %s has the folder %s, but not both train and test; rename or add what is "
                        "missing." % (folder, " and ".join(inside)))
    everything = _list(folder, inside, beside)
    if everything.classes is None:
        return everything, _only(everything, [])
    chosen = choose(_names(everything, folder), everything.classes, test_fraction)
    others = [i for i in range(len(everything.paths)) if i not in chosen]
    return _only(everything, others), _only(everything, sorted(chosen))


def _names(listing: Listing, folder: str) -> Tuple[str, ...]:
    return tuple(os.path.relpath(path, folder) for path in listing.paths)


def choose(names: Sequence[str], classes: Sequence[Any], fraction: float) -> Set[int]:
    """Indices for testing: of each class the fraction whose names have the least hashes, but one at least where the class has two.

    So every command, whatever its seed, keeps the same images apart, and new files change little of it.
    """
    members: Dict[Any, List[int]] = {}
    chosen: Set[int] = set()
    for index, name in enumerate(classes):
        members.setdefault(name, []).append(index)
    for mine in members.values():
        mine.sort(key=lambda index: hashlib.sha256(os.fsencode(names[index])).digest())
        number = 0 if fraction == 0 or len(mine) < 2 else max(1, round(fraction * len(mine)))
        chosen.update(mine[:number])
    return chosen


def _only(listing: Listing, indices: List[int]) -> Listing:
    return Listing([listing.paths[i] for i in indices], None if listing.classes is None else [listing.classes[i] for i in indices])


def _entries(folder: str) -> Tuple[List[str], List[str]]:
    """Names of the folders and of all else in a folder, sorted, without hidden ones and links to folders."""
    _, folders, others = next(os.walk(folder, onerror=_unreadable), ("", [], []))
    folders, others = (sorted(name for name in names if not name.startswith(".")) for names in (folders, others))
    links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
    if links:
        logging.warning("Links to folders in %s are not followed: %s.", folder, _shown([repr(name) for name in links]))
    return [name for name in folders if name not in links], others


def _unreadable(error: OSError) -> None:
    logging.warning("Skipped the folder %r, which cannot be read: %s.", error.filename, error.strerror)


def _list(folder: str, inside: List[str], beside: List[str]) -> Listing:
    """All files below the class folders in `folder`; if these hold none, all in `folder` itself."""
    paths, classes = [], []
    for name in inside:
        below = _files(os.path.join(folder, name))
        paths += below
        classes += [name] * len(below)
    if not paths:
        return Listing([os.path.join(folder, name) for name in beside], None)
    if beside:
        logging.warning("Of the files in %s, %d beside the class folders are ignored: %s.", folder, len(beside),
                        _shown([repr(name) for name in beside]))
    return Listing(paths, classes)


def _files(folder: str) -> List[str]:
    paths = []
    for parent, folders, names in os.walk(folder, onerror=_unreadable):  # does not follow links
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths += [os.path.join(parent, name) for name in sorted(names) if not name.startswith(".")]
    return paths


def _decode(paths: List[str], folder: str, image_size: int, cache_dir: Optional[str], say: Optional[store.Say], thorough: bool
            ) -> Tuple[List[int], store.Store]:
    """Which files are usable, and the store with their images."""
    stamps = np.array([stamp(path) for path in paths], np.int64)
    there = np.flatnonzero(stamps[:, 2] >= 0)
    files = [paths[i] for i in there]
    names = [os.fsencode(os.path.relpath(path, folder)) for path in files]

    def load(indices: Sequence[int], size: int) -> Iterator[store.Result]:
        return _load_all([files[i] for i in indices], size)

    source = store.Source(folder, os.path.realpath(folder), os.stat(folder).st_ino, names, stamps[there], load,
                          os.path.basename(os.path.realpath(folder)))
    stored = store.Store(source, image_size, cache_dir, say, thorough)
    reasons = {int(there[i]): reason for i, reason in stored.reasons.items()}
    for i in np.flatnonzero(stamps[:, 2] < 0).tolist():  # a link to nowhere
        reasons[i] = str(next(_load_all([paths[i]], image_size)))
    stored.rows, usable = _spread(stored.rows, there, len(paths)), [i for i in range(len(paths)) if i not in reasons]
    warn_of_skipped({os.path.relpath(paths[i], folder): reasons[i] for i in sorted(reasons)}, len(paths), folder)
    return usable, stored


def warn_of_skipped(reasons: Dict[str, str], number: int, where: str) -> None:
    """Name files that are no usable images, and why, of a number of them."""
    if reasons:
        skipped = ["%r (%s)" % item for item in reasons.items()]
        logging.warning("Skipped %d of %d files in %s: %s.", len(skipped), number, where, _shown(skipped))


def _spread(rows: np.ndarray, there: np.ndarray, number: int) -> np.ndarray:
    """Rows of the files that are there, as those of all files."""
    result = np.full(number, store.UNUSABLE, np.int64)
    result[there] = rows
    return result


def stamp(path: str) -> Tuple[int, int, int]:
    """Size and times of a file, by which a change is noticed; the last is -1 if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1, -1
    just_now = abs(time.time_ns() - status.st_ctime_ns) < TICK  # it could change again without a sign
    return -1 if just_now else status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _load_all(paths: List[str], image_size: int) -> Iterator[store.Result]:
    """For each path its image, without a label, or why there is none."""
    def load(path: str) -> store.Result:
        try:
            with tf.device("CPU:0"):
                return image_files.load(path, image_size), -1
        except image_files.Unusable as error:
            return error

    return image_files.several_at_once(load, paths, image_size)


def _shown(names: List[str]) -> str:
    more = ", and %d more" % (len(names) - NAMES_SHOWN) if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
