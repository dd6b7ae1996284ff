"""Folders of one's own images: every layout, what is left out, and what is refused."""
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from picture_files import bmp, gif, jpeg, picture, png

import datasets
from commands import UserError
from sources import folders


@pytest.fixture
def said(monkeypatch):
    """What was warned of."""
    lines = []
    monkeypatch.setattr(folders.logging, "warning", lambda *words: lines.append(words[0] % words[1:]))
    return lines


def fill(folder, names, shade=0):
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = np.full((20, 24, 3), shade + i, np.uint8)
        path.write_bytes({"png": png(list(image.reshape(20, -1))), "jpg": jpeg(image), "bmp": bmp(image),
                          "gif": gif([np.zeros((20, 24))], [(shade + i,) * 3])}[name[-3:]])


@pytest.fixture
def classes(tmp_path):
    for shade, name in ((0, "cat"), (100, "dog"), (200, "owl")):
        kinds = ("png", "bmp", "gif", "jpg")
        fill(tmp_path / name, ["%d.%s" % (i, kind) for i in range(5) for kind in kinds], shade)
    return tmp_path


def load(folder, *arguments, **named):
    return datasets.load("folder", str(folder), *arguments, **named)


def refused(folder, **named):
    with pytest.raises(UserError) as caught:
        load(folder, **named)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    return str(caught.value)


def test_class_folders(classes, said, capfd):
    data = load(classes, test_fraction=0.2)
    assert data.class_names == ("cat", "dog", "owl") and not said
    assert data.train_images.shape == (48, 32, 32, 3) and data.train_images.dtype == np.uint8
    assert np.bincount(data.train_labels).tolist() == [16] * 3
    assert np.bincount(data.test_labels).tolist() == [4] * 3
    assert data.train_labels.dtype == data.test_labels.dtype == np.int64
    for images, labels, files in ((data.train_images, data.train_labels, data.train_files),
                                  (data.test_images, data.test_labels, data.test_files)):
        assert [data.class_names[label] for label in labels] == [file.split(os.sep)[0] for file in files]
        np.testing.assert_array_equal(images[:][:, 0, 0, 0] // 90, labels)
    everything = set(data.train_files) | set(data.test_files)
    assert len(everything) == 60 and "cat/0.png" in everything
    assert capfd.readouterr().err == ""  # no library has its word


def test_the_split_depends_on_names_alone(classes):
    first = load(classes, test_fraction=0.25)
    again = load(classes, test_fraction=0.25, seed=5, image_size=16)
    assert first.test_files == again.test_files and again.test_images.shape[1:] == (16, 16, 3)
    fill(classes / "cat", ["new.png"])
    assert len(set(load(classes, test_fraction=0.25).test_files) - set(first.test_files)) <= 1
    assert len(load(classes, test_fraction=0).test_images) == 0


def test_a_split_of_ones_own(tmp_path, said):
    fill(tmp_path / "train", ["a/1.png", "a/deeper/2.png", "b/3.png"])
    fill(tmp_path / "test", ["b/4.png"], 50)
    fill(tmp_path / "extra", ["5.png"])
    data = load(tmp_path)
    assert data.train_labels.tolist() == [0, 0, 1] and data.test_labels.tolist() == [1]
    assert data.test_files == (os.path.join("test", "b", "4.png"),)
    assert len(said) == 1 and "'extra'" in said[0]
    fill(tmp_path / "test", ["c/1.png"])
    assert "class 'c'" in refused(tmp_path)

    shutil.rmtree(str(tmp_path / "test"))
    (tmp_path / "test").mkdir()
    assert "3 usable images in 2 classes and none for testing" in refused(tmp_path)
    data = load(tmp_path, test_fraction=0)
    assert data.train_labels.tolist() == [0, 0, 1] and data.test_labels.tolist() == []


def test_images_without_labels(tmp_path):
    fill(tmp_path, ["%d.png" % i for i in range(5)])
    data = load(tmp_path)
    assert data.train_labels is None and data.test_labels is None and data.class_names == ()
    assert data.train_images[:][:, 3, 3, 1].tolist() == [0, 1, 2, 3, 4] and len(data.test_images) == 0
    assert data.train_files == tuple("%d.png" % i for i in range(5))
    assert list(datasets.evaluation_batches(data.test_images, 2)) == []

    split = tmp_path / "split"
    fill(split / "train", ["1.png", "2.png"])
    fill(split / "test", ["3.png"], 9)
    data = load(split)
    assert data.train_labels is None and data.test_labels is None and data.test_images[0][0, 0, 0] == 9
    fill(split / "test", ["a/1.png"])
    assert "one has class folders" in refused(split)


def test_what_is_no_image_is_skipped_by_name(classes, said, monkeypatch):
    (classes / "cat" / "notes.txt").write_text("not an image")
    (classes / "cat" / "empty.png").write_bytes(b"")
    (classes / "dog" / "broken.jpg").write_bytes(jpeg(picture(16, 16))[:200])
    (classes / "dog" / "bomb.png").write_bytes(png([bytes(30)] * 10, size=(60000, 60000)))
    (classes / "dog" / "gone.png").symlink_to(classes / "nowhere")
    (classes / "owl" / ".hidden.png").write_bytes(b"")
    (classes / ".git").mkdir()
    (classes / ".git" / "x.png").write_bytes(b"")
    (classes / "empty").mkdir()
    (classes / "readme.txt").write_text("beside")
    os.mkfifo(str(classes / "owl" / "pipe.png"))  # reading it would wait for ever
    (classes / "owl" / "loop.png").symlink_to("loop.png")
    data = load(classes, test_fraction=0)
    assert data.class_names == ("cat", "dog", "owl") and len(data.train_images) == 60
    assert len(said) == 2 and "'readme.txt'" in said[0]
    assert said[1].startswith("Skipped 7 of 67 files in %s: " % classes)
    assert said[1].endswith(", and 2 more.")
    monkeypatch.setattr(folders, "NAMES_SHOWN", 9)
    said.clear()
    load(classes, test_fraction=0)
    for part in ("dog/gone.png' (cannot be read: No such file", "owl/loop.png' (cannot be read: Too many levels",
                 "owl/pipe.png' (no regular file)", "cat/empty.png' (not a readable JPEG, PNG",
                 "cat/notes.txt' (not a readable JPEG, PNG", "dog/broken.jpg' (damaged)",
                 "dog/bomb.png' (more than 50 million pixels)"):
        assert part in said[1]
    np.testing.assert_array_equal(data.train_images[:][:, 0, 0, 0] // 90, data.train_labels)

    for i in range(20):
        (classes / "cat" / ("bad%02d.png" % i)).write_bytes(b"?")
    said.clear()
    load(classes, test_fraction=0)
    assert "Skipped 27 of 87" in said[1] and said[1].endswith(", and 18 more.")


def test_a_link_that_loops_among_photographs(tmp_path, said):
    fill(tmp_path, ["1.png", "2.png"])
    (tmp_path / "loop").symlink_to("loop")
    server = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(str(tmp_path))  # a socket's path may have 107 bytes
    server.bind("socket.png")
    os.chdir(here)
    assert load(tmp_path).train_files == ("1.png", "2.png")
    assert said == ["Skipped 2 of 4 files in %s: 'loop' (cannot be read: Too many levels of symbolic links), "
                    "'socket.png' (no regular file)." % tmp_path]
    server.close()


def test_a_folder_that_cannot_be_read(classes, said, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if os.path.basename(path) in ("dog", "lost\nfound"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    (classes / "cat" / "lost\nfound").mkdir()
    monkeypatch.setattr(os, "scandir", refuse)
    data = load(classes)
    assert data.class_names == ("cat", "owl") and len(data.train_files) + len(data.test_files) == 40
    assert len(said) == 2 and all("Skipped the folder" in line and "Permission denied" in line and "\n" not in line for line in said)


def test_files_that_vanish(classes, said, monkeypatch):
    listed = folders._listings

    def listings(*arguments):
        found = listed(*arguments)
        (classes / "cat" / "1.png").unlink()
        shutil.rmtree(str(classes / "dog"))
        return found

    monkeypatch.setattr(folders, "_listings", listings)
    data = load(classes, test_fraction=0)
    assert data.class_names == ("cat", "owl") and len(data.train_files) == 39
    assert said[0].startswith("Skipped 21 of 60") and "'cat/1.png' (cannot be read: No such file or directory)" in said[0]


def test_links_to_folders_are_not_followed(classes, said):
    (classes / "cat" / "loop").symlink_to(classes)
    (classes / "again").symlink_to(classes)
    assert len(load(classes, test_fraction=0).train_images) == 60
    assert len(said) == 1 and "again" in said[0]


def test_names_that_are_no_text(classes, said):
    path = os.path.join(os.fsencode(str(classes)), b"cat", b"\xff\n.png")
    with open(path, "wb") as file:
        file.write(b"?")
    load(classes)
    assert len(said) == 1 and "\n" not in said[0]
    said[0].encode("utf-8")


@pytest.mark.parametrize("environment", [{"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_names_in_other_letters_whatever_the_locale(tmp_path, environment):
    folder = tmp_path / "Fotos für 猫"
    fill(folder, ["猫/é1.png", "猫/2.png", "chien/ü1.png", "chien/2.png", "chien/3.jpg"])
    other = os.path.join(os.fsencode(str(folder)), b"chien", b"\xff.png")
    shutil.copy(os.fsencode(str(folder / "chien" / "2.png")), other)
    (folder / "chien" / "né.jpg").write_bytes(b"?")
    code = """if True:
        import os, sys
        import datasets
        folder = sys.argv[1]
        data = datasets.load("folder", folder, test_fraction=0, cache_dir=sys.argv[2])
        batch, = datasets.evaluation_batches(data.train_images, 9)
        names = [os.fsencode(name) for name in data.class_names + data.train_files]
        print(b",".join(names).hex(), data.train_labels.tolist(), batch.shape)
    """
    named = [sys.executable, "-B", "-c", code, str(folder), str(tmp_path / "cache é")]
    done = subprocess.run(named, cwd=ROOT, env=dict(os.environ, **environment), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    names = [name.encode() for name in ("chien", "猫", "chien/2.png", "chien/3.jpg", "chien/ü1.png")]
    names += [b"chien/\xff.png", "猫/2.png".encode(), "猫/é1.png".encode()]
    assert done.stdout.decode().split() == (b",".join(names).hex() + " [0, 0, 0, 0, 1, 1] (6, 32, 32, 3)").split()
    lines = [line for line in done.stderr.decode("ascii", "replace").splitlines() if "Skipped" in line]
    assert len(lines) == 1 and "Skipped 1 of 7" in lines[0]


def test_what_is_no_data_set_is_refused(tmp_path, said):
    assert "does not exist" in refused(tmp_path / "nowhere")
    assert "0 usable images" in refused(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(b"?")
    assert "0 usable images" in refused(tmp_path)
    fill(tmp_path / "a", ["1.png"])
    assert "1 usable images" in refused(tmp_path)
    fill(tmp_path / "a", ["1.png", "2.png", "3.png"])
    assert "one class only, 'a'" in refused(tmp_path)
    (tmp_path / "two").mkdir()
    fill(tmp_path / "two", ["x/1.png", "y/1.png"])
    assert "2 usable images in 2 classes and none for testing" in refused(tmp_path / "two")
    fill(tmp_path / "half" / "train", ["x/1.png", "y/1.png"])
    assert "not both train and test" in refused(tmp_path / "half")
    fill(tmp_path / "half" / "val", ["x/1.png", "y/1.png"])
    assert "train and val" in refused(tmp_path / "half")
    with pytest.raises(UserError, match="fraction of test images is 1"):
        load(tmp_path, test_fraction=1)
    with pytest.raises(UserError, match="batch size is 512.*number of training images, 2"):
        datasets.pretraining_batches(load(tmp_path / "two", test_fraction=0).train_images, 512, 0, 0, 1)
