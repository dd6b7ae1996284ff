"""Images that are decoded once and kept on disk, for every later start, command and worker of the machine.

    CACHE_DIR/PHOTOS-64-0123456789abcdef/
        about-this-folder.txt   marks the folder as the program's: in one without it nothing is written or removed
        pixels-0123456789abcdef uint8, one image (size, size, 3) after the other, in no order; images are appended, never changed
        index.npz               which files they are of; written after the pixels, and whole or not at all
        lock                    held by the one process that writes

So a process that is killed has lost what came after the last index, and the next one goes on from there. Who reads keeps the images
that were opened, whatever others add meanwhile.
"""
import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import sys
import time
import zlib
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
from absl import logging
from tqdm import tqdm

import commands
from commands import UserError
from sources import mapped
from sources.image_files import FORMATS, Unusable

VERSION = 1
PENDING, UNUSABLE = -2, -1  # instead of a place among the pixels
MARK, INDEX = "about-this-folder.txt", "index.npz"
PIXELS = re.compile(r"pixels-[0-9a-f]{16}")
LEFT_BEHIND = re.compile(r"\.tmp-.*-(%s|%s)" % (re.escape(INDEX), re.escape(MARK)))  # commands.atomic_path's, of a killed process
SAMPLE = 64  # images whose checksums are compared at each start
SECONDS_A_COMMIT = 20.0
Say = Callable[[str], None]
Result = Union[Tuple[np.ndarray, int], Unusable]


class Source(NamedTuple):
    """What a store is made of. title: for people. identity: the same for the same source, as a path; inode: of that path, or 0.
    name: after which the store is called.

    stamps: int64 (n, 3), size and times of each file: other ones tell that it has changed. load: gives for indices of files and a size
    the image, uint8 (s, s, 3), and its label, -1 for none, or why there is none.
    """
    title: str
    identity: str
    inode: int
    names: List[bytes]
    stamps: np.ndarray
    load: Callable[[Sequence[int], int], Iterator[Result]]
    name: str


def default_folder() -> str:
    """The user's folder for such things: $XDG_CACHE_HOME/byol, as a rule ~/.cache/byol."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache"), "byol")


class Store:
    """The images of a source at one size; made, completed or merely opened.

    labels: int64 (n,), as the source told them. reasons: of files that are no usable images, by their indices. decoded: how many were
    decoded now. say: prints a line; None for silence. thorough: compare all checksums, and try again what was not usable. UserError
    for a folder that cannot be used, and a full disk.
    """

    def __init__(self, source: Source, image_size: int, cache_dir: Optional[str] = None, say: Optional[Say] = None,
                 thorough: bool = False) -> None:
        self._source, self._size, self._say, self._thorough = source, image_size, say or (lambda text: None), thorough
        self._shown = say is not None
        parent = os.path.abspath(os.path.expanduser(cache_dir or default_folder()))
        title = re.sub(r"[^A-Za-z0-9_.-]+", "-", source.name).strip(".-")[:40] or "images"
        digest = hashlib.sha256(os.fsencode("%d %d " % (VERSION, image_size)) + os.fsencode(source.identity)).hexdigest()[:16]
        self.folder = os.path.join(parent, "%s-%d-%s" % (title, image_size, digest))
        self.decoded = 0
        self._adopt(parent)
        self._look()
        if (self.rows == PENDING).any():
            try:
                os.makedirs(self.folder, exist_ok=True)
                with self._alone():
                    self._look()
                    self._fill()
            except OSError as error:
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                raise UserError("Cannot keep the decoded images in %s (%s); %schoose another --cache_dir." % (
                    printable(self.folder), error.strerror or error,
                    "what was decoded before is kept there; make room, or remove that folder and " if full else ""))
        else:
            self._say("Using the %d decoded images in %s." % ((self.rows >= 0).sum(), printable(self.folder)))

    def images(self, chosen: np.ndarray) -> mapped.Images:
        """Those of the given files, which must be usable."""
        return mapped.Images(self._pixels, self.rows[chosen])

    # What is there

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def _adopt(self, parent: str) -> None:
        """Take over the store of this very folder under its former name."""
        if not self._source.inode or os.path.exists(self.folder) or not os.path.isdir(parent):
            return
        for name in os.listdir(parent):
            other = os.path.join(parent, name)
            index = self._read(other) if re.search(r"-%d-[0-9a-f]{16}$" % self._size, name) and is_store(other) else {}
            if index and int(index["inode"]) == self._source.inode and not os.path.exists(os.fsdecode(index["source"].tobytes())):
                with contextlib.suppress(OSError):
                    os.rename(other, self.folder)
                return

    def _read(self, folder: str) -> Dict[str, np.ndarray]:
        """The index in a folder; empty if there is none, or none that makes sense."""
        try:
            with np.load(os.path.join(folder, INDEX), allow_pickle=False) as file:
                index = {name: file[name] for name in file.files}
            n = len(index["rows"])
            good = index["stamps"].shape == (n, 3) and index["checksums"].shape == (n,) and index["labels"].shape == (n,)
            good = good and all(index[name].dtype == np.int64 for name in ("stamps", "rows", "labels"))
            good = good and index["version"] == VERSION and index["size"] == self._size and index["rows"].min(initial=0) >= PENDING
            good = good and index["rows"].max(initial=-1) < index["length"] and len(_split(index["names"])) == n
            if not good or not PIXELS.fullmatch(os.fsdecode(index["pixels"].tobytes())):
                raise ValueError("it does not fit together")
            return index
        except FileNotFoundError:
            return {}
        except PermissionError as error:
            raise UserError("Cannot read the decoded images in %s (%s); choose another --cache_dir."
                            % (printable(folder), error.strerror))
        except Exception as error:  # a damaged file can raise anything
            logging.warning("The index of %s is damaged (%s); the images are decoded again.", printable(folder), error)
            return {}

    def _look(self) -> None:
        """Find out which files' images are there already, unchanged and undamaged."""
        names, n = self._source.names, len(self._source.names)
        index = self._read(self.folder) if is_store(self.folder) else {}
        self.rows, self.labels = np.full(n, PENDING, np.int64), np.full(n, -1, np.int64)
        self._checksums, self.reasons = np.zeros(n, np.uint32), {}  # type: np.ndarray, Dict[int, str]
        self._length, self._pixels_name = 0, ""
        if index:
            self._length, self._pixels_name = int(index["length"]), os.fsdecode(index["pixels"].tobytes())
            known = _split(index["names"])
            if known == names:
                found = np.arange(n)
            else:
                place = {name: i for i, name in enumerate(known)}
                found = np.array([place.get(name, -1) for name in names], np.int64)
            mine = np.flatnonzero(found >= 0)
            mine = mine[(index["stamps"][found[mine]] == self._source.stamps[mine]).all(axis=1)]
            for ours, theirs in ((self.rows, "rows"), (self.labels, "labels"), (self._checksums, "checksums")):
                ours[mine] = index[theirs][found[mine]]
            reasons = dict(zip(np.flatnonzero(index["rows"] == UNUSABLE).tolist(), _split(index["reasons"])))
            self.reasons = {i: reasons[int(found[i])].decode() for i in mine[self.rows[mine] == UNUSABLE].tolist()}
            if self._thorough or index["formats"].tobytes().decode() != " ".join(FORMATS):
                self.rows[list(self.reasons)] = PENDING
        self._open()
        self._compare()

    def _open(self) -> None:
        """Map the pixels. What the file is too short for is to be decoded again."""
        self._pixels = mapped.pixels(self._path(self._pixels_name), self._length, self._size)
        lost = self.rows >= len(self._pixels)
        if lost.any():
            logging.warning("%d images are missing in %s; they are decoded again.", lost.sum(), printable(self.folder))
            self.rows[lost] = PENDING
        self._length = len(self._pixels)

    def _compare(self) -> None:
        """Compare the checksums of some images, evenly chosen, or of all where one is wrong."""
        usable = np.flatnonzero(self.rows >= 0)
        some = usable if self._thorough else usable[np.unique(np.arange(SAMPLE) * len(usable) // SAMPLE)] if len(usable) else usable
        wrong = [i for i in some if zlib.crc32(self._pixels[self.rows[i]]) != self._checksums[i]]
        if wrong:
            wrong = [i for i in usable if zlib.crc32(self._pixels[self.rows[i]]) != self._checksums[i]]
            logging.warning("%d images in %s are damaged; they are decoded again.", len(wrong), printable(self.folder))
            self.rows[wrong] = PENDING

    # Writing

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the store for this process, once others have finished. UserError if the folder is not a store."""
        import fcntl

        def refuse_foreign() -> None:
            others = [name for name in os.listdir(self.folder) if name != "lock" and not LEFT_BEHIND.fullmatch(name)]
            if others and not is_store(self.folder):
                raise UserError("The folder %s holds files of another program; choose another --cache_dir." % printable(self.folder))

        refuse_foreign()
        with open(os.open(self._path("lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "rb+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._say("Another process is decoding these images; waiting for it.")
                fcntl.flock(lock, fcntl.LOCK_EX)
            refuse_foreign()
            if not is_store(self.folder):
                commands.write_atomically(self._path(MARK), "Images decoded by BYOL's commands, to start faster. To be removed at "
                                          "will, while none of them runs; they are decoded anew then.\n")
            yield

    def _fill(self) -> None:
        """Decode what is pending, append it, and write the index now and then."""
        todo, image = np.flatnonzero(self.rows == PENDING), self._size ** 2 * 3
        if not len(todo):
            return
        kept = np.flatnonzero(self.rows >= 0)
        compact = not self._pixels_name or not self._length or self._length - len(kept) >= len(kept) + len(todo)
        wanted = (len(todo) + compact * len(kept)) * image
        if shutil.disk_usage(self.folder).free < wanted:
            raise OSError(errno.ENOSPC, "%d MB are needed and %d are free" % (
                wanted >> 20, shutil.disk_usage(self.folder).free >> 20))
        if compact:  # nothing there, or mostly images that are not wanted any more
            self._pixels_name = "pixels-" + secrets.token_hex(8)
        self._remove_left_behind()
        self._say("Decoding %d of %d images of %s into %s, once: later starts find them there."
                  % (len(todo), len(self._source.names), printable(self._source.title), printable(self.folder)))
        began = time.monotonic()
        flags = os.O_RDWR | os.O_NOFOLLOW | (os.O_CREAT | os.O_EXCL if compact else 0)
        with open(os.open(self._path(self._pixels_name), flags, 0o666), "rb+") as file:
            if compact:
                for place, i in enumerate(kept.tolist()):
                    file.write(self._pixels[self.rows[i]].data)
                    self.rows[i] = place
                self._length = len(kept)
            committed = self._length
            file.truncate(committed * image)  # a killed process may have left more
            file.seek(committed * image)
            with tqdm(total=len(todo), desc="Decoding", unit=" images", leave=False, dynamic_ncols=True, file=sys.stderr,
                      disable=None if self._shown else True) as bar:
                bar._time = time.monotonic  # type: ignore[attr-defined]  # the time of day may be set back
                bar.reset()
                next_commit, pause = time.monotonic() + SECONDS_A_COMMIT, SECONDS_A_COMMIT
                try:
                    for index, result in zip(todo.tolist(), self._source.load(todo.tolist(), self._size)):
                        self._take(index, result, file)
                        bar.update()
                        if time.monotonic() > next_commit:
                            started = time.monotonic()
                            self._commit(file)
                            committed = self._length
                            pause = max(pause, 20 * (time.monotonic() - started))  # a large index takes its time
                            next_commit = time.monotonic() + pause
                    self._commit(file)
                    committed = self._length
                except BaseException:
                    with contextlib.suppress(OSError):
                        file.truncate(committed * image)
                    raise
        self.decoded = len(todo)
        self._remove_left_behind()
        self._open()
        self._say("Decoded %d images in %.0f s." % (len(todo), time.monotonic() - began))

    def _take(self, i: int, result: Result, file: Any) -> None:
        self.reasons.pop(i, None)
        if isinstance(result, Unusable):
            self.rows[i], self.reasons[i] = UNUSABLE, str(result).replace("\0", " ")
            return
        pixels, self.labels[i] = np.ascontiguousarray(result[0]), result[1]
        file.write(pixels.data)
        self.rows[i], self._checksums[i] = self._length, zlib.crc32(pixels.data)
        self._length += 1

    def _commit(self, file: Any) -> None:
        """Make sure that the pixels are on the disk, then let the index tell of them."""
        file.flush()
        os.fsync(file.fileno())
        reasons = [self.reasons[i].encode() for i in np.flatnonzero(self.rows == UNUSABLE).tolist()]
        with commands.atomic_path(self._path(INDEX)) as temporary:
            np.savez(temporary, version=VERSION, size=self._size, inode=self._source.inode, length=self._length, rows=self.rows,
                     stamps=self._source.stamps, labels=self.labels, checksums=self._checksums, reasons=_joined(reasons),
                     names=_joined(self._source.names), source=_bytes(os.fsencode(self._source.identity)),
                     pixels=_bytes(self._pixels_name.encode()), formats=_bytes(" ".join(FORMATS).encode()))

    def _remove_left_behind(self) -> None:
        """Files of this program in its store that no index tells of: of a killed process, or replaced."""
        index = self._read(self.folder)
        used = {self._pixels_name, os.fsdecode(index["pixels"].tobytes()) if index else ""}
        for name in os.listdir(self.folder):
            if name not in used and (PIXELS.fullmatch(name) or LEFT_BEHIND.fullmatch(name)):
                os.remove(self._path(name))


def is_store(folder: str) -> bool:
    """Whether the folder is marked as this program's."""
    return os.path.isfile(os.path.join(folder, MARK))


def printable(path: str) -> str:
    """A path of any bytes as text that can be printed."""
    return os.fsencode(path).decode("utf-8", "replace").replace("\n", " ")


def _bytes(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def _joined(texts: List[bytes]) -> np.ndarray:
    return _bytes(b"".join(text + b"\0" for text in texts))


def _split(array: np.ndarray) -> List[bytes]:
    return array.tobytes().split(b"\0")[:-1]
