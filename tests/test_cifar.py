"""CIFAR-10 and CIFAR-100: small files in the official layout are read right, and no file can do harm."""
import contextlib
import gzip
import os
import pickle
import struct
import sys
import tarfile
import tracemalloc
import types
import warnings

import numpy as np
import pytest

import datasets
from commands import UserError
from sources import cifar

NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()


# Pickles as the authors wrote them, by Python 2: str is bytes, arrays are of NumPy 1, and everything is
# remembered.

def py2_str(data):
    return b"U" + bytes([len(data)]) + data if len(data) < 256 else b"T" + struct.pack("<I", len(data)) + data


def py2_int(number):
    return b"J" + struct.pack("<i", number)


def py2_list(items):
    return b"]q\x05(" + b"".join(items) + b"e"


def py2_array(array, code=b"u1", fortran=False):
    return (b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85U\x01b\x87Rq\x09"
            + b"(K\x01" + b"".join(py2_int(n) for n in array.shape) + b"\x86cnumpy\ndtype\nq\x0aU\x02" + code
            + b"K\x00K\x01\x87Rq\x0b(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
            + (b"\x88" if fortran else b"\x89") + py2_str(array.tobytes("F" if fortran else "C")) + b"tb")


def py2_dict(**items):
    pairs = [py2_str(key.encode()) + value for key, value in items.items()]
    return b"\x80\x02}q\x01(" + b"".join(pairs) + b"u."


def batch(images, labels, key="labels", **array):
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return py2_dict(**{"batch_label": py2_str(b"training batch 1 of 5"), key: py2_list(map(py2_int, labels)),
                       "data": py2_array(planes, **array), "filenames": py2_list([py2_str(b"a_s_0001.png")])})


def write_cifar10(folder, training, test=50):
    """CIFAR-10 of so many images of noise, in its official layout; the training images are a multiple of 5."""
    folder = folder / "cifar-10-batches-py"
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(0)
    for i, name in enumerate(["data_batch_%d" % i for i in range(1, 6)] + ["test_batch"]):
        count = training // 5 if i < 5 else test
        images = random.randint(0, 256, (count, 32, 32, 3)).astype(np.uint8)
        (folder / name).write_bytes(batch(images, random.randint(0, 10, count).tolist()))
    (folder / "batches.meta").write_bytes(py2_dict(label_names=py2_list(py2_str(name.encode()) for name in NAMES)))


def some_images(n, seed):
    return np.random.RandomState(seed).randint(0, 256, (n, 32, 32, 3)).astype(np.uint8)


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))


@pytest.fixture
def official(tmp_path):
    """A folder with cifar-10-batches-py in it: four images a training batch, five for testing."""
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for i in range(5):
        (folder / ("data_batch_%d" % (i + 1))).write_bytes(batch(some_images(4, i), [i, 9, 0, i]))
    (folder / "test_batch").write_bytes(batch(some_images(5, 9), [5, 4, 3, 2, 1]))
    (folder / "batches.meta").write_bytes(py2_dict(label_names=py2_list(py2_str(n.encode()) for n in NAMES)))
    return folder.parent


def pack(folder, path, change=None):
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, os.path.basename(folder), filter=change)
    return str(path)


def check(data):
    np.testing.assert_array_equal(data.train_images, np.concatenate([some_images(4, i) for i in range(5)]))
    assert data.train_labels.tolist() == [0, 9, 0, 0, 1, 9, 0, 1, 2, 9, 0, 2, 3, 9, 0, 3, 4, 9, 0, 4]
    np.testing.assert_array_equal(data.test_images, some_images(5, 9))
    assert data.test_labels.tolist() == [5, 4, 3, 2, 1] and data.class_names == tuple(NAMES)
    assert data.train_images.dtype == np.uint8 and data.train_labels.dtype == np.int64
    assert data.train_images.flags.c_contiguous


def refused(*arguments):
    with pytest.raises(UserError) as caught:
        datasets.load(*arguments)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    return message


def test_every_place_gives_the_same(official, tmp_path, monkeypatch):
    archive = pack(official / "cifar-10-batches-py", tmp_path / "cifar-10-python.tar.gz")
    before = sorted(os.listdir(str(tmp_path)))
    for data_dir in (official, official / "cifar-10-batches-py", archive, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check(datasets.load("cifar10", str(data_dir)))
    assert sorted(os.listdir(str(tmp_path))) == before  # nothing was extracted

    said = []
    monkeypatch.setattr(cifar.logging, "warning", lambda *words: said.append(words[0] % words[1:]))
    for place in ("cifar-10-batches-py", "cifar-10-batches-py-target/cifar-10-batches-py"):
        monkeypatch.setenv("KERAS_HOME", str(tmp_path / place.replace("/", "-")))
        cached = tmp_path / place.replace("/", "-") / "datasets" / place
        cached.parent.mkdir(parents=True)
        (official / "cifar-10-batches-py").rename(cached)
        check(datasets.load("cifar10"))
        assert not said
        check(datasets.load("cifar10", str(official)))  # which is empty now
        assert len(said) == 1 and str(official) in said.pop()
        cached.rename(official / "cifar-10-batches-py")
    cached = tmp_path / "keras" / "datasets"
    cached.mkdir(parents=True)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    for name in ("cifar-10-batches-py.tar.gz", "cifar-10-python.tar.gz"):
        os.rename(archive, str(cached / name))
        check(datasets.load("cifar10"))
        os.rename(str(cached / name), archive)


def test_arrays_in_either_order_and_a_subset(official):
    path = official / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(batch(some_images(5, 9), [5, 4, 3, 2, 1], fortran=True))
    check(datasets.load("cifar10", str(official)))
    data = datasets.load("cifar10", str(official), train_size=5, test_size=5)
    assert data.train_labels.tolist() == [0, 1, 2, 3, 4] and len(data.test_images) == 5
    assert "21 training images were asked for, but the data set has 20" in refused(
        "cifar10", str(official), 32, 0.1, 0, 21)


def test_cifar100(tmp_path):
    names = ["fine_%d" % i for i in range(100)]
    for file, n in (("train", 7), ("test", 3)):
        (tmp_path / file).write_bytes(batch(some_images(n, n), range(93, 93 + n), "fine_labels"))
    (tmp_path / "meta").write_bytes(py2_dict(fine_label_names=py2_list(py2_str(n.encode()) for n in names)))
    data = datasets.load("cifar100", str(tmp_path))
    np.testing.assert_array_equal(data.train_images, some_images(7, 7))
    assert data.train_labels.tolist() == list(range(93, 100)) and data.test_labels.tolist() == [93, 94, 95]
    assert data.class_names == tuple(names)


def test_what_is_missing_is_named(official, tmp_path):
    assert "%s does not exist" % (tmp_path / "nowhere") in refused("cifar10", str(tmp_path / "nowhere"))
    (official / "cifar-10-batches-py" / "data_batch_3").unlink()
    assert "lacks the file data_batch_3" in refused("cifar10", str(official))


def test_damaged_and_foreign_files_are_named(official):
    path = official / "cifar-10-batches-py" / "data_batch_2"
    whole = path.read_bytes()
    images = some_images(4, 0)
    array = py2_array(images[:1].reshape(1, -1))
    for content, reason in (
            (b"", "EOFError"), (b"not a pickle", ""), (b"\x89PNG\r\n", ""), (b"}.", "no list of labels"),
            (pickle.dumps([1, 2], 2), "no dictionary"),
            (batch(images, [1, 2, 3]), "3 labels, but no images of the shape 3 x 3072"),
            (batch(images, [0, 1, 2, 10]), "labels outside of 0 to 9"),
            (batch(images, [0, 1, 2, -1]), "labels outside of 0 to 9"),
            (batch(images, [1] * 4, code=b"i1"), "no array of uint8"),
            (batch(images, [1] * 4, code=b"O8"), "no array of uint8"),
            (batch(images, [1] * 4).replace(b"u1K\0K\x01\x87R", b"u1K\0K\x01\x87\x81"), "no array of uint8"),  # made by NEWOBJ
            (batch(images, [1] * 4).replace(b"(K\x01J", b"(K\x01K\x01J"), "no array of uint8"),  # a state of six parts
            (batch(images[:, :16], [1] * 4), "no images of the shape 4 x 3072"),
            (batch(images, [], "labels"), "no list of labels"),
            (batch(images, [1] * 4, "fine_labels"), "no list of labels"),
            (py2_dict(labels=py2_list([b"\x88"]), data=array), "no list of labels"),  # True
            (py2_dict(labels=py2_list([b"F1.0\n"]), data=array), "no list of labels"),
            (py2_dict(labels=py2_list([b"K\x01"]), data=py2_str(bytes(3072))), "no array of uint8"),
            (whole.replace(struct.pack("<i", 3072), struct.pack("<i", 2 ** 31 - 1)), "no images of")):
        path.write_bytes(content)
        message = refused("cifar10", str(official))
        for part in ("%s is damaged or no CIFAR-10 file" % path, reason, cifar.LAYOUTS["cifar10"].url):
            assert part in message
    path.write_bytes(whole)
    check(datasets.load("cifar10", str(official)))


def test_no_cut_and_no_flipped_byte_raises_anything_else():
    layout = cifar.LAYOUTS["cifar10"]
    whole = batch(some_images(1, 0), [7])
    random = np.random.RandomState(0)
    damaged = [whole[:n] for n in random.randint(0, len(whole), 100)]
    for place in list(range(250)) + list(range(len(whole) - 60, len(whole))):
        damaged.append(whole[:place] + bytes([random.randint(256)]) + whole[place + 1:])
    refusals = 0
    for content in damaged:
        try:
            cifar._batch(cifar.unpickle(content), layout)
        except pickle.UnpicklingError:
            refusals += 1
    assert 200 < refusals < len(damaged)  # some bytes stand for nothing that is looked at


def attacks(path):
    """Pickles that would make the file at `path`, or get hold of something they should not."""
    command = "touch %s" % path
    call = b"(S'%s'\ntR" % command.encode()
    system = b"cposix\nsystem\n" + call
    short = bytes([len(command)]) + command.encode()
    modern = b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c" + short + b"\x85R."
    array = py2_array(some_images(1, 0).reshape(1, -1))
    return {
        "os.system": b"\x80\x02cos\nsystem\n" + call + b".",
        "posix.system": b"\x80\x02" + system + b".",
        "old text": system + b".",
        "inst": b"(S'%s'\niposix\nsystem\n." % command.encode(),
        "obj": b"(cposix\nsystem\nS'%s'\no." % command.encode(),
        "protocol 4": modern,
        "a key of the dictionary": b"\x80\x02}(" + system + b"K\x01u.",
        "among the labels": py2_dict(labels=b"](" + system + b"e", data=array),
        "inside an array's state": py2_dict(data=array[:array.rindex(b"T")] + system + b"tb"),
        "eval": b"\x80\x02c__builtin__\neval\n(S'__import__(\"os\").system(\"%s\")'\ntR." % command.encode(),
        "getattr": b"\x80\x02cbuiltins\ngetattr\n(cnumpy\nndarray\nS'tofile'\ntR.",
        "another name of the module": b"\x80\x02cnumpy.core.multiarray\nfromfile\n(S'/etc/passwd'\ntR.",
        "scalar": b"\x80\x02cnumpy.core.multiarray\nscalar\n.",
        "numpy.load": b"\x80\x02cnumpy\nload\n.",
        "a dotted name": b"\x80\x02cnumpy\nndarray.tofile\n.",
        "a dotted name, protocol 4": b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
        "dotted through the module": b"\x80\x02cnumpy\ncore.multiarray._reconstruct\n.",
        "the registry of extensions": b"\x80\x02\x82\x01.",
        "persistent": b"\x80\x02Pid\n.",
        "attributes of the reader": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n}U\x08__init__NsNb.",
        "a new instance of it": b"\x80\x02cnumpy\ndtype\n)\x81}U\x04codeU\x02u1sb.",
        "calling what is no class": b"\x80\x02cnumpy\nndarray\n)R.",
    }


@pytest.mark.parametrize("name", sorted(attacks("x")))
def test_a_hostile_file_runs_nothing(official, tmp_path, name):
    made = tmp_path / "made"
    (official / "cifar-10-batches-py" / "data_batch_2").write_bytes(attacks(str(made))[name])
    message = refused("cifar10", str(official))
    assert "data_batch_2 is damaged or no CIFAR-10 file" in message
    assert not made.exists()


def test_the_attacks_are_real(tmp_path):
    working = []
    for name, content in attacks(str(tmp_path / "made")).items():
        with warnings.catch_warnings(), contextlib.suppress(Exception):
            warnings.simplefilter("ignore")
            pickle.loads(content)
        if (tmp_path / "made").exists():
            working.append(name)
            (tmp_path / "made").unlink()
    assert len(working) >= 8, working


@pytest.mark.parametrize("content", [
    b"\x80\x02]r\xff\xff\xff\x7f.",  # remembered at place 2 ** 31 - 1, which C's unpickler makes room for
    b"\x80\x02T\xff\xff\xff\x7f.", b"\x80\x02\x8b\xff\xff\xff\x7f.", b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.",
    b"\x80\x04\x95" + struct.pack("<Q", 2000003) + b"]" * 2000000 + b"." * 3,
], ids=["memo", "string", "long", "bytes", "frame"])
def test_a_small_file_cannot_take_the_memory(monkeypatch, content):
    monkeypatch.setattr(cifar._Parts, "left", 100000)
    tracemalloc.start()
    with pytest.raises(pickle.UnpicklingError):
        cifar.unpickle(content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6 + 2 * len(content)


def test_the_number_of_objects_is_limited(monkeypatch):
    monkeypatch.setattr(cifar._Parts, "left", 1000)
    with pytest.raises(pickle.UnpicklingError, match="parts"):
        cifar.unpickle(b"\x80\x02(" + b"]" * 2000 + b"l.")
    monkeypatch.setattr(cifar, "FILE_LIMIT", 1000)
    with pytest.raises(pickle.UnpicklingError, match="larger than"):
        cifar.unpickle(b"}." + bytes(1000))


def test_archives_that_are_damaged_or_hostile(official, tmp_path, monkeypatch):
    folder, path = official / "cifar-10-batches-py", tmp_path / "cifar-10-python.tar.gz"
    whole = open(pack(folder, path), "rb").read()
    for content in (b"", b"no archive", whole[:len(whole) // 2], whole[:-4], gzip.compress(b"no tar" * 200)):
        path.write_bytes(content)
        message = refused("cifar10", str(path))
        assert str(path) in message and ("damaged" in message or "lacks" in message)

    def link(member):
        if member.name.endswith("data_batch_4"):
            member.type, member.linkname, member.size = tarfile.SYMTYPE, "/etc/passwd", 0
        return member

    def escape(member):
        member.name = "../" + member.name
        return member

    pack(folder, path, link)
    assert "lacks the file data_batch_4" in refused("cifar10", str(path))
    pack(folder, path, escape)
    assert "lacks the file data_batch_1" in refused("cifar10", str(path))
    assert sorted(os.listdir(str(tmp_path))) == ["cifar-10-python.tar.gz", "data"]

    # A header of 300 MB for one member, which tarfile would read whole.
    monkeypatch.setattr(cifar, "ARCHIVE_LIMIT", 20 << 20)
    header = tarfile.TarInfo("header")
    header.type, header.size = tarfile.XHDTYPE, 300 << 20
    with gzip.open(str(path), "wb", 1) as file:
        file.write(header.tobuf())
        for _ in range(300):
            file.write(bytes(1 << 20))
    tracemalloc.start()
    assert "unpacks to more than 20 MB" in refused("cifar10", str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 << 20


def test_downloading(official, tmp_path, monkeypatch, capsys):
    archive = pack(official / "cifar-10-batches-py", tmp_path / "some.tar.gz")
    asked = []

    def get_file(name, origin, file_hash, hash_algorithm, cache_dir):
        asked.append((name, origin, hash_algorithm, len(file_hash), cache_dir))
        print("Downloading data from " + origin)
        return archive

    def fail(name, *_, **__):
        raise Exception("URL fetch failure on %s: None --\n unreachable" % name)

    def provide(function):
        utils = types.SimpleNamespace(get_file=function)
        fake = types.SimpleNamespace(keras=types.SimpleNamespace(utils=utils))
        monkeypatch.setitem(sys.modules, "models", fake)

    provide(get_file)
    check(datasets.load("cifar10"))
    assert asked == [("cifar-10-python.tar.gz", "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
                      "sha256", 64, str(tmp_path / "keras"))]
    provide(fail)
    empty = tmp_path / "empty"
    empty.mkdir()
    message = refused("cifar10", str(empty))
    for part in (str(empty), str(tmp_path / "keras"), "unreachable", cifar.LAYOUTS["cifar10"].url,
                 "--data_dir", "--dataset shapes"):
        assert part in message
    assert capsys.readouterr().out == ""
