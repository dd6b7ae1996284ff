"""Images decoded once: shared, kept up to date, whole after whatever happened, and never at the cost of anybody's files."""
import errno
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf
from command import run
from conftest import ROOT
from picture_files import jpeg, picture, png

import datasets
from commands import UserError
from sources import folders, image_files, mapped, store

N = 12


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(N):
        write(folder / ("%02d.png" % i), 10 * i)
    time.sleep(0.03)  # or the files would be too new to be sure of
    return folder


@pytest.fixture
def decoded(monkeypatch):
    """Names of the files that are decoded."""
    names, load = [], image_files.load

    def noting(path, size):
        names.append(os.path.basename(path))
        return load(path, size)

    monkeypatch.setattr(image_files, "load", noting)
    return names


def write(path, shade):
    path.write_bytes(png([bytes([shade] * 27)] * 9))


def load(folder, size=8, **more):
    more.setdefault("cache_dir", str(folder.parent / "cache"))
    return datasets.load("folder", str(folder), image_size=size, **more)


def shades(data):
    return data.train_images[:][:, 4, 4, 1].tolist()


def home(folder):
    """The one store in the cache."""
    path, = (folder.parent / "cache").iterdir()
    return path


def pixels(folder):
    path, = home(folder).glob("pixels-*")
    return path


def test_the_second_start_decodes_nothing_and_has_the_same_bits(photos, decoded):
    said = []
    first = load(photos, say=said.append)
    assert sorted(decoded) == ["%02d.png" % i for i in range(N)] and "Decoding 12 of 12" in said[0] and "Decoded 12" in said[1]
    assert sorted(path.name.split("-")[0] for path in home(photos).iterdir()) == ["about", "index.npz", "lock", "pixels"]
    decoded.clear()
    again = load(photos, say=said.append)
    assert not decoded and said[2:] == ["Using the 12 decoded images in %s." % home(photos)]
    assert first.train_files == again.train_files
    np.testing.assert_array_equal(first.train_images[:], again.train_images[:])
    np.testing.assert_array_equal(again.train_images[:], np.stack(
        [image_files.load(str(photos / name), 8) for name in first.train_files]))


def test_batches_are_those_of_images_in_memory(photos):
    data = load(photos)
    labels = np.arange(N, dtype=np.int64)
    chosen = np.array([5, 1, 1, 7, 9, 2])
    for images, memory, mine in ((data.train_images, data.train_images[:], labels),
                                 (data.train_images.take(chosen), data.train_images[chosen], labels[chosen])):
        assert isinstance(images, mapped.Images) and images.shape == memory.shape and len(images) == len(memory)
        for index in (3, slice(2, 5), np.array([4, 1]), slice(None)):
            np.testing.assert_array_equal(images[index], memory[index])
        for make in (lambda x: datasets.pretraining_batches(x, 4, 1, 1, 4, 2, 2),
                     lambda x: datasets.finetuning_batches(x, mine, 4, 1, 1, 4),
                     lambda x: tf.data.Dataset.zip((datasets.evaluation_batches(x, 4),) * 2)):
            pairs = list(zip(make(images), make(memory)))
            assert pairs
            for a, b in pairs:
                np.testing.assert_array_equal(a[0], b[0])
                np.testing.assert_array_equal(a[1], b[1])


def test_images_stay_on_the_disk(tmp_path):
    code = """if True:
        import sys
        import numpy as np
        import datasets
        from sources import mapped

        def private():  # KiB that this process alone has
            return [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")][0]

        pixels = mapped.pixels(sys.argv[1], 100000, 32)
        images = mapped.Images(pixels, np.arange(len(pixels)))
        few = mapped.Images(pixels, np.arange(16))
        next(iter(datasets.pretraining_batches(few, 8, 0, 0, 1)))
        before = private()
        next(iter(datasets.pretraining_batches(images, 8, 0, 0, 1)))
        print(private() - before)
    """
    with open(str(tmp_path / "pixels"), "wb") as file:
        file.truncate(100000 * 3072)  # 300,000 KiB
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "pixels")], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    assert int(done.stdout) < 100000


def test_only_what_has_changed_is_decoded(photos, decoded):
    load(photos)
    before = pixels(photos).read_bytes()
    (photos / "03.png").unlink()
    write(photos / "new.png", 200)
    write(photos / "05.png", 77)
    time.sleep(0.03)
    decoded.clear()
    data = load(photos)
    assert sorted(decoded) == ["05.png", "new.png"]
    assert shades(data) == [0, 10, 20, 40, 77, 60, 70, 80, 90, 100, 110, 200]
    assert pixels(photos).read_bytes()[:len(before)] == before  # so that who reads the store meanwhile is not disturbed
    decoded.clear()
    assert shades(load(photos)) == shades(data) and not decoded


def test_a_change_that_keeps_size_and_time_is_noticed(photos, decoded):
    load(photos)
    status = os.stat(str(photos / "05.png"))
    (photos / "05.png").write_bytes(bytes(png([bytes([77] * 27)] * 9)).ljust(status.st_size, b"\0")[:status.st_size])
    os.utime(str(photos / "05.png"), ns=(status.st_atime_ns, status.st_mtime_ns))
    assert os.stat(str(photos / "05.png")).st_mtime_ns == status.st_mtime_ns
    decoded.clear()
    assert shades(load(photos))[5] == 77 and decoded == ["05.png"]


def test_a_file_that_was_written_this_moment_is_looked_at_again(photos, decoded, monkeypatch):
    monkeypatch.setattr(folders, "TICK", 10 ** 12)
    load(photos)
    monkeypatch.setattr(folders, "TICK", 0)
    decoded.clear()
    load(photos)
    assert len(decoded) == N
    decoded.clear()
    load(photos)
    assert not decoded


def test_what_is_no_image_is_remembered(photos, decoded, monkeypatch):
    (photos / "zz.txt").write_text("no image")
    (photos / "gone").symlink_to("nowhere")
    time.sleep(0.03)
    said = []
    monkeypatch.setattr(folders.logging, "warning", lambda *words: said.append(words[0] % words[1:]))
    for i in range(2):
        assert len(load(photos).train_images) == N
        assert "Skipped 2 of 14" in said[i] and "'gone' (cannot be read" in said[i] and "'zz.txt' (not a readable" in said[i]
    assert decoded.count("zz.txt") == 1
    monkeypatch.setattr(store, "FORMATS", ["OTHER"])  # a Pillow that reads more
    load(photos)
    assert decoded.count("zz.txt") == 2 and decoded.count("01.png") == 1


def test_sizes_and_folders_have_stores_of_their_own(photos, decoded):
    load(photos)
    assert load(photos, 16).train_images.shape == (N, 16, 16, 3)
    other = photos.parent / "other" / "photos"
    shutil.copytree(str(photos), str(other))
    write(other / "00.png", 99)
    cache = str(photos.parent / "cache")
    assert shades(load(other, cache_dir=cache))[0] == 99 and shades(load(photos))[0] == 0
    assert len(os.listdir(cache)) == 3
    link = photos.parent / "link"
    link.symlink_to(photos)
    decoded.clear()
    assert shades(load(link)) == shades(load(photos)) and not decoded


def test_a_folder_that_is_renamed_keeps_its_store(photos, decoded):
    expected = shades(load(photos))
    photos.rename(photos.parent / "moved")
    decoded.clear()
    assert shades(load(photos.parent / "moved")) == expected and not decoded
    assert home(photos).name.startswith("moved-8-")


@pytest.mark.parametrize("damage", ["short", "gone", "flipped", "index cut", "index empty", "index foreign", "other version",
                                    "rows outside"])
def test_damage_is_repaired(photos, damage):
    expected = shades(load(photos))
    path, index = pixels(photos), home(photos) / "index.npz"
    if damage == "short":
        path.write_bytes(path.read_bytes()[:500])
    elif damage == "gone":
        path.unlink()
    elif damage == "flipped":
        content = bytearray(path.read_bytes())
        content[700] ^= 255
        path.write_bytes(bytes(content))
    elif damage in ("other version", "rows outside"):
        with np.load(str(index)) as file:
            content = dict(file)
        content["version"] += damage == "other version"
        content["rows"] += damage == "rows outside"
        np.savez(str(index), **content)
    else:
        index.write_bytes({"index cut": index.read_bytes()[:-9], "index empty": b"", "index foreign": b"PK hello"}[damage])
    for _ in range(2):
        assert shades(load(photos)) == expected
    assert len(list(home(photos).glob("pixels-*"))) == 1


WRITER = """if True:
    import sys
    import time
    import datasets
    from sources import image_files, store
    slow = float(sys.argv[3])
    load = image_files.load
    store.SECONDS_A_COMMIT = 0
    def loading(path, size):
        print("decoding", flush=True)
        time.sleep(slow)
        return load(path, size)
    image_files.load = loading
    image_files.THREADS = 1
    from sources import folders
    image_files.WAITING = 1
    data = datasets.load("folder", sys.argv[1], image_size=8, cache_dir=sys.argv[2], say=lambda text: print(text, flush=True))
    print(data.train_images[:][:, 4, 4, 1].tolist())
"""


def writer(photos, slow):
    return subprocess.Popen([sys.executable, "-B", "-c", WRITER, str(photos), str(photos.parent / "cache"), str(slow)], cwd=ROOT,
                            stdout=subprocess.PIPE, universal_newlines=True)


def test_after_sigkill_it_goes_on_and_leaves_no_litter(photos, decoded):
    process = writer(photos, 0.3)
    while not list((photos.parent / "cache").glob("*/index.npz")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    (home(photos) / "pixels-0123456789abcdef").write_bytes(b"of one who was killed while it began anew")
    (home(photos) / ".tmp-abc-index.npz").write_bytes(b"half")
    with open(str(pixels(photos) if len(list(home(photos).glob("pixels-*"))) == 1 else
                  [path for path in home(photos).glob("pixels-*") if path.name != "pixels-0123456789abcdef"][0]), "ab") as file:
        file.write(b"half an image")
    assert shades(load(photos)) == [10 * i for i in range(N)]
    assert 0 < len(decoded) < N
    assert len(os.listdir(str(home(photos)))) == 4
    assert pixels(photos).stat().st_size == N * 8 * 8 * 3


def test_two_at_once_make_it_once(photos):
    processes = [writer(photos, 0.2) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum(output.count("decoding\n") for output in outputs) == N
    assert all(str([10 * i for i in range(N)]) in output for output in outputs)


def test_who_reads_is_not_disturbed_by_one_who_cleans_up(photos):
    reader = load(photos)
    expected = reader.train_images[:]
    for i in range(N):
        write(photos / ("%02d.png" % i), 200)
    time.sleep(0.03)
    assert shades(load(photos)) == [200] * N
    assert pixels(photos).stat().st_size == N * 8 * 8 * 3  # the old ones are gone from the disk
    np.testing.assert_array_equal(reader.train_images[:], expected)


def test_a_full_disk_is_one_line_and_keeps_what_was_there(photos, monkeypatch, decoded):
    load(photos)
    before = pixels(photos).read_bytes()
    write(photos / "x.png", 1)
    write(photos / "y.png", 2)

    def full(paths, size):
        yield np.zeros((8, 8, 3), np.uint8), -1
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(folders, "_load_all", full)
        with pytest.raises(UserError, match="Cannot keep the decoded images in .*No space left.*make room.*--cache_dir") as caught:
            load(photos)
    assert "\n" not in str(caught.value) and pixels(photos).read_bytes() == before
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
        with pytest.raises(UserError, match="0 MB are needed and 0 are free"):
            load(photos)
    decoded.clear()
    time.sleep(0.03)
    assert shades(load(photos))[-2:] == [1, 2] and sorted(decoded) == ["x.png", "y.png"]


def test_files_of_others_are_never_touched(photos, tmp_path):
    load(photos)
    place = home(photos)
    shutil.rmtree(str(place))
    place.mkdir()
    (place / "pixels-0123456789abcdef").write_text("mine")
    with pytest.raises(UserError, match="holds files of another program; choose another --cache_dir"):
        load(photos)
    assert [path.name for path in place.iterdir()] == ["pixels-0123456789abcdef"]
    (place / "pixels-0123456789abcdef").unlink()
    load(photos)

    victim = tmp_path / "victim"
    victim.write_bytes(b"mine" * 500)
    own = pixels(photos)
    own.unlink()
    own.symlink_to(victim)
    (place / "notes").write_text("mine")
    write(photos / "x.png", 1)
    with pytest.raises(UserError, match="symbolic link|Too many levels"):
        load(photos)
    (place / "lock").unlink()
    (place / "lock").symlink_to(tmp_path / "made")
    with pytest.raises(UserError, match="Too many levels"):
        load(photos)
    assert victim.read_bytes() == b"mine" * 500 and (place / "notes").read_text() == "mine" and not (tmp_path / "made").exists()


def test_a_store_that_may_only_be_read_is_used(photos, monkeypatch, decoded):
    expected = shades(load(photos))
    decoded.clear()

    def refuse(path, flags=0, *more, **named):
        raise OSError(errno.EROFS, "Read-only file system", path)

    for name in ("open", "makedirs", "rename", "remove"):
        monkeypatch.setattr(store.os, name, refuse)
    (photos / "11.png").unlink()
    assert shades(load(photos)) == expected[:-1] and not decoded
    write(photos / "x.png", 1)
    with pytest.raises(UserError, match="Read-only file system.*choose another --cache_dir"):
        load(photos)


def test_a_cache_that_cannot_be_is_refused(photos, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot keep the decoded images"):
        load(photos, cache_dir=str(tmp_path / "file"))
    with pytest.raises(UserError, match="lies in the folder of images"):
        load(photos, cache_dir=str(photos / "cache"))
    assert (photos / "cache").exists() is False
    assert len(load(photos, cache_dir=str(photos / ".cache")).train_images) == N
    assert len(load(photos, cache_dir=str(photos / ".cache")).train_images) == N


def test_names_of_any_bytes(tmp_path):
    folder = os.path.join(os.fsencode(str(tmp_path)), b"f\xff\n")
    cache = os.fsdecode(os.path.join(os.fsencode(str(tmp_path)), b"c\xfe"))
    os.mkdir(folder)
    for name in (b"\xff.png", b"a\nb.png", "ü.jpg".encode()):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(jpeg(picture(9, 9)))
    time.sleep(0.03)
    said = []
    for _ in range(2):
        data = datasets.load("folder", os.fsdecode(folder), image_size=8, cache_dir=cache, say=said.append)
        assert sorted(os.fsencode(name) for name in data.train_files) == sorted([b"\xff.png", b"a\nb.png", "ü.jpg".encode()])
    assert "Using the 3" in said[-1]
    for line in said:
        assert "\n" not in line and line.encode("utf-8")


def test_prepare_makes_and_repairs_it(photos, decoded):
    arguments = ["prepare", "--data_dir=%s" % photos, "--image_size=8", "--cache_dir=%s" % (photos.parent / "cache")]
    status, out, error = run("datasets.py", *arguments)
    assert status == 0, error
    assert "Decoding 12 of 12 images of %s into %s" % (photos, home(photos)) in out
    assert "12 images for training and 0 for testing, 0 classes." in out
    assert shades(load(photos)) == [10 * i for i in range(N)] and not decoded
    content = bytearray(pixels(photos).read_bytes())
    content[-1] ^= 255
    pixels(photos).write_bytes(bytes(content))
    status, out, error = run("datasets.py", *arguments)
    assert status == 0 and "Decoding 1 of 12" in out and "1 images in %s are damaged" % home(photos) in error
    for wrong, message in (([], "give prepare"), (["prepare"], "--data_dir is missing"),
                           (["prepare", "--data_dir=%s/nowhere" % photos], "does not exist")):
        status, out, error = run("datasets.py", *wrong)
        assert status == 1 and out == "" and message in error and error.count("\n") == 1
