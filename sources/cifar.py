"""CIFAR-10 and CIFAR-100 in their official layout: found or downloaded, and read without trusting the files.

The official files are Python pickles, and unpickling a hostile file can run any code. So the reader here knows nothing but the three
NumPy names that those files hold, and has an inert stand-in even for these: no function of NumPy or of anything else is called on a
file's behalf, and an array is made only after its type and shape were checked. It also reads the same on every NumPy, whichever way
that has moved its internals.
"""
import contextlib
import gzip
import io
import os
import pickle
import pickletools
import socket
import tarfile
import zlib
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple, Union

import numpy as np
from absl import logging

from commands import UserError
from sources import image_files


class Layout(NamedTuple):
    """How the authors publish a data set (https://www.cs.toronto.edu/~kriz/cifar.html)."""
    title: str
    folder: str
    train_files: Tuple[str, ...]
    test_files: Tuple[str, ...]
    names_file: str
    label_key: bytes
    names_key: bytes
    classes: int
    archive: str
    sha256: str  # of the archive, as Keras has it

    @property
    def url(self) -> str:
        return "https://www.cs.toronto.edu/~kriz/" + self.archive


LAYOUTS = {
    "cifar10": Layout(
        "CIFAR-10", "cifar-10-batches-py", tuple("data_batch_%d" % i for i in range(1, 6)), ("test_batch",),
        "batches.meta", b"labels", b"label_names", 10, "cifar-10-python.tar.gz",
        "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"),
    "cifar100": Layout(
        "CIFAR-100", "cifar-100-python", ("train",), ("test",),
        "meta", b"fine_labels", b"fine_label_names", 100, "cifar-100-python.tar.gz",
        "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7"),
}
IMAGE_SIZE = 32
FILE_LIMIT = 200 << 20  # bytes; the largest official file, CIFAR-100's train, has 156 million
ARCHIVE_LIMIT = 300 << 20  # bytes that an archive may unpack to; the official ones hold 190 million
LARGE = 1 << 20  # bytes of a part that is not copied out of a file in memory
PART_LIMIT = 5000000  # about five times what CIFAR-100's train has
DOWNLOAD_TIMEOUT = 20  # seconds without an answer
Content = Union[bytes, memoryview]


def read(name: str, data_dir: Optional[str] = None) -> Tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, Tuple[str, ...]]:
    """Read `name`, a key of LAYOUTS, from `data_dir`, else from Keras's cache, else download it by Keras.

    `data_dir` is a folder with the official files, or with their folder or archive in it, or the archive. Returns images for training,
    uint8 (n, 32, 32, 3), their int64 labels (n,), the same for testing, and the names of the classes. Raises UserError if a file that
    is there is damaged or foreign, or if the data are nowhere to be had.
    """
    layout = LAYOUTS[name]
    source = find(layout, data_dir) or _download(layout, data_dir)
    logging.info("Reading %s from %s.", layout.title, source)
    files = _archive_members(source, layout) if os.path.isfile(source) else _folder_files(source, layout)
    batches, names = {}, tuple(str(label) for label in range(layout.classes))
    for file, content in files:
        path = os.path.join(source, file)
        try:
            if file == layout.names_file:
                names = _class_names(unpickle(content), layout)
            else:
                batches[file] = _batch(unpickle(content), layout)
        except pickle.UnpicklingError as error:
            raise UserError("%s is damaged or no %s file (%s); get %s anew from %s."
                            % (path, layout.title, error, layout.archive, layout.url))
    for file in layout.train_files + layout.test_files:
        if file not in batches:
            raise UserError("%s lacks the file %s; get %s anew from %s." % (source, file, layout.archive, layout.url))
    train = _join([batches[file] for file in layout.train_files])
    return train + _join([batches[file] for file in layout.test_files]) + (names,)


def find(layout: Layout, data_dir: Optional[str]) -> Optional[str]:
    """The folder that holds files of the layout, or the archive; None if there is none."""
    given = []
    if data_dir:
        data_dir = os.path.expanduser(data_dir)
        if not os.path.exists(data_dir):
            raise UserError("The data folder %s does not exist; give --data_dir the folder that holds %s, or "
                            "that file." % (data_dir, layout.archive))
        given = [data_dir, os.path.join(data_dir, layout.folder), os.path.join(data_dir, layout.archive)]
    cache = os.path.join(_keras_home(), "datasets")
    # Keras 2 unpacks into the folder's own name, beside the archive under that name; Keras 3 into "-target".
    cached = [os.path.join(cache, layout.folder), os.path.join(cache, layout.folder + ".tar.gz"),
              os.path.join(cache, layout.folder + "-target", layout.folder),
              os.path.join(cache, layout.archive)]
    for place in given + cached:
        names = layout.train_files + layout.test_files
        if os.path.isfile(place) or any(os.path.isfile(os.path.join(place, name)) for name in names):
            if data_dir and place not in given:
                logging.warning("There is no %s in %s; using Keras's cache.", layout.title, data_dir)
            return place
    return None


def _keras_home() -> str:
    return os.environ.get("KERAS_HOME") or os.path.join(os.path.expanduser("~"), ".keras")


def _download(layout: Layout, data_dir: Optional[str]) -> str:
    """Let Keras download the archive into its cache, and give its path."""
    from models import keras  # here, because reading files that are there needs no Keras

    logging.info("Downloading %s, about 170 MB, from %s.", layout.title, layout.url)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        with contextlib.suppress(OSError):
            # Without this folder Keras takes one in /tmp, which anyone may fill.
            os.makedirs(_keras_home(), exist_ok=True)
        with contextlib.redirect_stdout(io.StringIO()):  # people's scripts parse what this program prints
            path: str = keras.utils.get_file(layout.archive, layout.url, file_hash=layout.sha256,
                                             hash_algorithm="sha256", cache_dir=_keras_home())
            return path
    except Exception as error:  # Keras raises a bare one: "URL fetch failure on URL: None -- the reason"
        raise UserError(
            "There is no %s in %sKeras's cache %s, and it cannot be downloaded (%s). Get %s from %s, put it "
            "into a folder and give that as --data_dir; or try without it: --dataset shapes."
            % (layout.title, "the folder %s nor in " % data_dir if data_dir else "", _keras_home(),
               " ".join(str(error).split(" -- ")[-1].split()), layout.archive, layout.url))
    finally:
        socket.setdefaulttimeout(timeout)


def _folder_files(folder: str, layout: Layout) -> Iterator[Tuple[str, Content]]:
    for name in layout.train_files + layout.test_files + (layout.names_file,):
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            continue
        try:
            with open(path, "rb") as file:
                yield name, file.read(FILE_LIMIT + 1)
        except OSError as error:
            raise UserError("Cannot read %s (%s)." % (path, error.strerror))


def _archive_members(path: str, layout: Layout) -> Iterator[Tuple[str, Content]]:
    """The wanted files of an archive, in its own order, by exact name. Nothing is extracted."""
    wanted = {layout.folder + "/" + name: name for name in layout.train_files + layout.test_files + (layout.names_file,)}
    try:
        with gzip.open(path) as packed:
            data = packed.read(ARCHIVE_LIMIT + 1)
        if len(data) > ARCHIVE_LIMIT:
            raise tarfile.ReadError("it unpacks to more than %d MB" % (ARCHIVE_LIMIT >> 20))
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for member in archive:
                name = wanted.get(member.name[2:] if member.name.startswith("./") else member.name)
                if name and member.isreg():
                    yield name, memoryview(data)[member.offset_data:member.offset_data + member.size]
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise UserError("%s is damaged or not %s (%s); get it anew from %s." % (path, layout.archive, error, layout.url))


class _Inert:
    """What a file says about an array or its type: the arguments and the state. Nothing is made of it before it was checked."""
    arguments: Tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Parts(io.BytesIO):
    """A file in memory that can be read in so many parts and no more: each can become an object.

    Large ones are views of the file, not copies.
    """
    left = PART_LIMIT

    def __init__(self, content: Content) -> None:
        super().__init__(content)
        self.content = memoryview(content)

    def read(self, size: Optional[int] = -1) -> Any:
        self.left -= 1
        if self.left < 0:
            raise pickle.UnpicklingError("it has more than %d parts" % PART_LIMIT)
        if size is None or size < LARGE:
            return super().read(size)
        start = self.tell()
        return self.content[start:self.seek(size, 1)]


class _Unpickler(pickle._Unpickler):
    """The unpickler in Python: the one in C reserves as much memory as a file demands by a single opcode.

    It knows the opcodes up to the protocol of the official files; later ones can also read past `_Parts`.
    """
    dispatch = {ord(opcode.code): pickle._Unpickler.dispatch[ord(opcode.code)] for opcode in pickletools.opcodes if opcode.proto <= 2}
    stand_ins = {("numpy.core.multiarray", "_reconstruct"): _Inert, ("numpy", "dtype"): _Inert,
                 ("numpy", "ndarray"): None}  # ndarray is but an argument of _reconstruct

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.stand_ins:
            raise pickle.UnpicklingError("it asks for %.40r of %.40r, which no official file does" % (name, module))
        return self.stand_ins[module, name]


def unpickle(content: Content) -> Dict[bytes, Any]:
    """Read a pickled dictionary; arrays in it are `_Inert`. Raises nothing but pickle.UnpicklingError."""
    if len(content) > FILE_LIMIT:
        raise pickle.UnpicklingError("it is larger than %d MB" % (FILE_LIMIT >> 20))
    try:
        value = _Unpickler(_Parts(content), encoding="bytes").load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a damaged pickle can raise anything: IndexError, KeyError, ...
        raise pickle.UnpicklingError("%s %.100s" % (type(error).__name__, " ".join(str(error).split())))
    if not isinstance(value, dict):
        raise pickle.UnpicklingError("it holds no dictionary")
    return value


def _batch(batch: Dict[bytes, Any], layout: Layout) -> Tuple[np.ndarray, np.ndarray]:
    """Images in planes, uint8 (n, 3072), and int64 labels (n,), once checked."""
    labels, array = batch.get(layout.label_key), batch.get(b"data")
    if not isinstance(labels, list) or not labels or not all(type(label) is int for label in labels):
        raise pickle.UnpicklingError("it holds no list of labels under %r" % layout.label_key.decode())
    if min(labels) < 0 or max(labels) >= layout.classes:
        raise pickle.UnpicklingError("it holds labels outside of 0 to %d" % (layout.classes - 1))
    shape = (len(labels), 3 * IMAGE_SIZE ** 2)
    state = array.state if isinstance(array, _Inert) and isinstance(array.state, tuple) and len(array.state) == 5 else [None] * 5
    _, claimed, kind, fortran, data = state
    if not isinstance(kind, _Inert) or kind.arguments[:1] != (b"u1",):
        raise pickle.UnpicklingError("it holds no array of uint8 under 'data'")
    if claimed != shape or not isinstance(data, (bytes, memoryview)) or len(data) != shape[0] * shape[1]:
        raise pickle.UnpicklingError("it holds %d labels, but no images of the shape %d x %d" % ((len(labels),) + shape))
    images = np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")
    return images, np.array(labels, np.int64)


def _join(batches: List[Tuple[np.ndarray, np.ndarray]]) -> Tuple[np.ndarray, np.ndarray]:
    """One array of images (n, 32, 32, 3) and one of labels, from batches in planes R, G, B."""
    labels = np.concatenate([labels for _, labels in batches])
    images = image_files.empty(len(labels), IMAGE_SIZE)
    start = 0
    for batch, _ in batches:
        planes = batch.reshape(-1, 3, IMAGE_SIZE, IMAGE_SIZE)
        for channel in range(3):  # plane by plane takes a third of the time of one transposed copy
            images[start:start + len(batch), :, :, channel] = planes[:, channel]
        start += len(batch)
    return images, labels


def _class_names(meta: Dict[bytes, Any], layout: Layout) -> Tuple[str, ...]:
    names = meta.get(layout.names_key)
    if (not isinstance(names, list) or len(names) != layout.classes or not all(isinstance(name, bytes) for name in names)):
        raise pickle.UnpicklingError("it holds no %d class names" % layout.classes)
    return tuple(name.decode("ascii", "replace") for name in names)
