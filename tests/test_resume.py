"""Runs that are stopped, killed, resumed, and run out of disk, as a user and a machine do it.

The encoder has one block and the images 8 x 8 pixels, because each run has to make its graph anew; all else is
the command as it is. KILLS is how often a run is killed at a random moment in its one test (50: by hand).
"""
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
import tensorflow as tf
from command import TINY, begin_tiny, completed, run, start, steps_done, wait_for
from conftest import ROOT

KILLS = int(os.environ.get("KILLS", "2"))
STEPS, EPOCH = 24, 4
ENDED_EARLY = "f_online_2.h5"  # what --max_steps=8 leaves, unlike a run that goes on


def begin(images, folder, *flags):
    return begin_tiny(images, folder, "--save_every=3", "--log_every=2", "--save_checkpoints_steps=2", *flags)


def end(process):
    out, error = process.communicate(timeout=400)
    return process.returncode, out, error


def complete(images, folder, *flags):
    return completed(begin(images, folder, *flags))


def results(folder):
    """Every loss and every weight that a run has left."""
    weights = {}
    for path in sorted(folder.glob("f_online_?.h5")):
        with h5py.File(str(path), "r") as file:
            file.visititems(lambda name, item: weights.update({path.name + name: np.array(item)})
                            if isinstance(item, h5py.Dataset) else None)
    return (folder / "losses.txt").read_text(), weights


def assert_same(folder, reference):
    losses, weights = results(folder)
    assert losses == reference[0]
    assert sorted(weights) == sorted(reference[1])
    for name, array in weights.items():
        np.testing.assert_array_equal(array, reference[1][name], err_msg=name)
    assert not [path for path in folder.rglob("*") if path.name.startswith(".tmp-") or "_temp" in path.name]


@pytest.fixture(scope="module")
def reference(tiny_images, tmp_path_factory):
    """What a run leaves that was never stopped."""
    folder = tmp_path_factory.mktemp("reference")
    complete(tiny_images, folder)
    found = results(folder)
    assert found[0].count("\n") == STEPS and len(found[1]) > 20
    return found


def test_another_process_gives_the_same_bits(tiny_images, reference, tmp_path):
    code = ("import sys, runpy, models; sys.argv = sys.argv[1:]\n"
            "models.ENCODERS['resnet18'] = lambda width, name='resnet18', **more: models.ResNet((0, 1, 0, 0), width, name, **more)\n"
            "runpy.run_path(sys.argv[0], run_name='__main__')")
    subprocess.check_call([sys.executable, "-B", "-c", code, os.path.join(ROOT, "pretraining.py")] + TINY
                          + ["--data_dir=%s" % tiny_images, "--save_every=3", "--log_every=4", "--output_dir=%s" % tmp_path],
                          env=dict(os.environ, PYTHONPATH=ROOT, PYTHONHASHSEED="7"), stdout=subprocess.DEVNULL)
    assert_same(tmp_path, reference)


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)])
def test_a_signal_saves_and_leaves_within_seconds(tiny_images, reference, tmp_path, number, status):
    process = begin(tiny_images, tmp_path)
    assert wait_for(lambda: steps_done(tmp_path) >= 6, process)
    began = time.time()
    process.send_signal(number)
    found, out, error = end(process)
    assert (found, error) == (status, "") and time.time() - began < 20
    assert "Stopped by %s at step" % number.name in out
    assert "Resuming from step %d of 24" % steps_done(tmp_path) in complete(tiny_images, tmp_path)
    assert_same(tmp_path, reference)


def test_a_second_signal_ends_it_at_once(tiny_images, reference, tmp_path):
    process = begin(tiny_images, tmp_path, "--num_epochs=100000", "--save_checkpoints_steps=1000")
    assert wait_for(lambda: "Batch" in process.output(), process)
    os.kill(process.pid, signal.SIGSTOP)  # so that it cannot end in between
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)  # whichever they are
    os.kill(process.pid, signal.SIGCONT)
    status, out, error = end(process)
    assert status in (-signal.SIGINT, -signal.SIGTERM) and error == ""
    assert "Stopped by" not in out  # it has printed nothing more


def test_nobody_reads_its_lines_any_more(tiny_images, reference, tmp_path):
    """As after `| head`: it is as good a reason to save as a signal."""
    flags = ["--save_every=3", "--log_every=2", "--save_checkpoints_steps=24", "--data_dir=%s" % tiny_images]
    process = start("pretraining.py", *TINY + flags + ["--output_dir=%s" % tmp_path])
    assert any(line.startswith("[Epoch 1/") for line in process.stdout)
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(100) == 128 + signal.SIGPIPE and error == ""
    reached = steps_done(tmp_path)
    assert 2 <= reached < 24 and reached == len((tmp_path / "losses.txt").read_text().splitlines())


@pytest.mark.parametrize("step, weights", [(8, ENDED_EARLY), (11, "f_online_step_11.h5"), (10, "f_online_step_10.h5")])
def test_max_steps_at_a_boundary_and_in_mid_epoch(tiny_images, reference, tmp_path, step, weights):
    complete(tiny_images, tmp_path, "--max_steps=%d" % step)
    assert [path.name for path in tmp_path.glob("*.h5")] == [weights]
    (tmp_path / weights).unlink()
    assert len((tmp_path / "losses.txt").read_text().splitlines()) == steps_done(tmp_path) == step
    complete(tiny_images, tmp_path, "--log_every=1", "--keep_checkpoint_max=1")
    assert_same(tmp_path, reference)


def test_sigkill_at_random_moments(tiny_images, reference, tmp_path):
    """Each run is killed once, half of them among the steps, the others at any moment of their life, and then completed."""
    chance = random.Random(int(os.environ.get("SEED", "0")))
    began = time.time()
    complete(tiny_images, tmp_path / "timed")
    seconds = time.time() - began
    killed_at = []
    while len(killed_at) < KILLS:
        folder = tmp_path / str(len(killed_at))
        process = begin(tiny_images, folder)
        if len(killed_at) % 2:  # anywhere, the start included
            time.sleep(chance.uniform(0, seconds))
        else:  # among the steps
            step = chance.randrange(STEPS - 2)
            wait_for(lambda: folder.joinpath("checkpoints").is_dir() and steps_done(folder) >= step, process)
            time.sleep(chance.uniform(0, 0.3))
        with contextlib.suppress(ProcessLookupError):  # it has come to its end already
            process.send_signal(signal.SIGKILL)
        process.communicate()
        reached = steps_done(folder) if (folder / "checkpoints").is_dir() else 0
        out = complete(tiny_images, folder)
        assert reached == 0 or "Resuming from step %d of" % reached in out
        assert_same(folder, reference)
        shutil.rmtree(str(folder))
        if process.returncode == -signal.SIGKILL:
            killed_at.append(reached)
            print("killed %d times, newest checkpoint then: %d" % (len(killed_at), reached), flush=True)


@pytest.mark.parametrize("first", [True, False])
def test_sigkill_in_the_middle_of_a_checkpoint(tiny_images, reference, tmp_path, first):
    """Killed when TensorFlow's temporary folder is there: for the very first checkpoint, nothing is lost but time."""
    folder = tmp_path / "checkpoints"
    for _ in range(20):
        process = begin(tiny_images, tmp_path)
        if wait_for(lambda: folder.is_dir() and (first or steps_done(tmp_path) >= 8)
                    and any("_temp" in name for name in os.listdir(str(folder))), process):
            process.send_signal(signal.SIGKILL)
        process.communicate()
        sums = {path.name.split(".")[0] for path in folder.glob("*.json")}
        left = [path for path in folder.glob("ckpt-*") if path.name.split(".")[0].split("_temp")[0] not in sums]
        if left and (steps_done(tmp_path) == 0) == first:
            break
        shutil.rmtree(str(folder))
        (tmp_path / "losses.txt").exists() and (tmp_path / "losses.txt").unlink()
    else:
        raise AssertionError("never caught in the middle")
    assert ("Resuming" in complete(tiny_images, tmp_path)) != first
    assert_same(tmp_path, reference)


@pytest.fixture
def half(tiny_images, tmp_path_factory):
    """A run of 8 steps, which each test may spoil."""
    folder = tmp_path_factory.mktemp("half")
    complete(tiny_images, folder, "--max_steps=8")
    (folder / ENDED_EARLY).unlink()
    return folder


def test_other_settings_are_refused_and_named(tiny_images, reference, half, tmp_path):
    status, _, error = end(begin(tiny_images, half, "--learning_rate=0.5", "--num_epochs=7", "--log_every=1"))
    assert status == 1 and len(error.splitlines()) == 1
    assert "learning_rate was 0.001, is 0.5" in error and "num_epochs was 6, is 7" in error and "log_every" not in error
    changed = tmp_path / "changed"
    shutil.copytree(str(tiny_images), str(changed))
    picture = next((changed / "train" / "0").iterdir())
    picture.write_bytes(tf.io.encode_png(np.zeros((8, 8, 3), np.uint8)).numpy())
    status, _, error = end(begin(changed, half))
    assert status == 1 and len(error.splitlines()) == 1 and "images_crc was" in error
    status, _, error = end(begin(tiny_images, half, "--noresume"))
    assert status == 1 and len(error.splitlines()) == 1 and "--overwrite" in error and steps_done(half) == 8
    assert "Resuming" not in complete(tiny_images, half, "--noresume", "--overwrite")
    assert_same(half, reference)


def test_a_run_of_an_earlier_version_that_had_fewer_settings_goes_on(tiny_images, reference, half):
    config = json.loads((half / "config.json").read_text())
    for name in ("recipe", "crop", "head_hidden", "optimizer", "target_momentum_schedule", "check_npu"):
        del config[name]
    (half / "config.json").write_text(json.dumps(config))
    status, _, error = end(begin(tiny_images, half, "--head_hidden=32"))
    assert status == 1 and "head_hidden was 256, is 32" in error
    assert "Resuming from step 8" in complete(tiny_images, half)
    assert_same(half, reference)


def test_more_epochs_with_a_constant_rate_are_the_same_run(tiny_images, tmp_path):
    whole, longer = tmp_path / "whole", tmp_path / "longer"
    complete(tiny_images, whole, "--lr_schedule=constant", "--save_every=1")
    complete(tiny_images, longer, "--lr_schedule=constant", "--save_every=1", "--num_epochs=2")
    assert "Resuming from step 8 of 24" in complete(tiny_images, longer, "--lr_schedule=constant", "--save_every=1")
    assert_same(longer, results(whole))


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tiny_images, reference, half):
    newest = sorted((half / "checkpoints").glob("ckpt-8.data-*"))[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    status, out, error = end(begin(tiny_images, half))
    assert status == 0 and "ckpt-8 is damaged" in error and "Resuming from step 6 of 24" in out
    assert_same(half, reference)


def test_no_good_checkpoint_is_an_error(tiny_images, half):
    for path in (half / "checkpoints").glob("*.index"):
        path.write_bytes(b"x" + path.read_bytes()[1:])
    status, out, error = end(begin(tiny_images, half))
    assert status == 1 and "None of the 4 checkpoints" in error.splitlines()[-1] and "Traceback" not in error
    shutil.rmtree(str(half / "checkpoints"))  # nor does a run begin anew where results say that there was one
    status, out, error = end(begin(tiny_images, half))
    assert status == 1 and "losses.txt" in error and len(error.splitlines()) == 1


def test_a_second_run_in_the_folder_is_refused(tiny_images, tmp_path):
    first = begin(tiny_images, tmp_path, "--num_epochs=1000")
    assert wait_for(lambda: (tmp_path / "checkpoints").is_dir() and steps_done(tmp_path), first)
    status, _, error = end(begin(tiny_images, tmp_path))
    assert status == 1 and "Another run" in error and len(error.splitlines()) == 1
    first.send_signal(signal.SIGKILL)
    first.communicate()
    step = steps_done(tmp_path)
    out = complete(tiny_images, tmp_path, "--num_epochs=1000", "--max_steps=%d" % (step + 1))
    assert "Resuming from step %d of" % step in out


def test_a_loss_that_is_not_finite_stops_the_run(tiny_images, half):
    before = sorted(path.name for path in (half / "checkpoints").iterdir())
    code, out, error = end(begin(tiny_images, half, "--noresume", "--overwrite", "--learning_rate=1e38", "--log_every=4",
                                 "--save_checkpoints_steps=4"))
    assert before and code == 1 and len(error.splitlines()) == 1 and "The loss of step" in error and "no checkpoint yet" in error
    assert not list(half.glob("f_online_*")) and not list((half / "checkpoints").glob("ckpt-*"))


@pytest.fixture
def disk(tmp_path):
    """A file system of 8 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.call(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)], stderr=subprocess.DEVNULL):
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.check_call(["umount", "-l", str(folder)])


def contents(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and "tfevents" not in path.name
            and path.name not in ("fill", ".lock")}


@pytest.mark.parametrize("room", [0, 60000, 600000])
def test_a_full_disk(tiny_images, reference, disk, room):
    complete(tiny_images, disk, "--max_steps=8", "--keep_checkpoint_max=2")
    (disk / ENDED_EARLY).unlink()
    before = contents(disk)
    (disk / "fill").write_bytes(b"")
    with open(str(disk / "fill"), "ab", buffering=0) as file:
        while file.tell() < 8 << 20:
            try:
                file.write(b"x" * 4096)
            except OSError:
                break
        file.truncate(max(0, file.tell() - room))
    status, out, error = end(begin(tiny_images, disk, "--keep_checkpoint_max=2"))
    assert status == 1 and "Traceback" not in error and error.splitlines()[-1].startswith("pretraining.py: ")
    assert "write" in error.splitlines()[-1] or "space" in error.splitlines()[-1].lower(), error
    after = contents(disk)
    assert not [name for name in after if ".tmp" in name or "_temp" in name]
    for name in set(before) & set(after) - {str(disk / "config.json")}:
        assert after[name] == before[name] or name.endswith(("losses.txt", "metrics.json", "checkpoint")), name
    assert json.loads((disk / "config.json").read_text())["batch_size"] == 16
    (disk / "fill").unlink()
    complete(tiny_images, disk, "--keep_checkpoint_max=2")
    assert_same(disk, reference)


def test_a_folder_that_becomes_read_only(tiny_images, reference, tmp_path):
    """Also root cannot write into a folder that is marked as immutable."""
    folder = tmp_path / "run"
    process = begin(tiny_images, folder)
    assert wait_for(lambda: (folder / "checkpoints").is_dir() and steps_done(folder) >= 4, process)
    folders = [str(folder), str(folder / "checkpoints")]
    try:
        if subprocess.call(["chattr", "+i"] + folders, stderr=subprocess.DEVNULL):
            process.send_signal(signal.SIGKILL)
            process.communicate()
            pytest.skip("no folder can be made immutable here")
        status, _, error = end(process)
        assert status == 1 and "Traceback" not in error and len(error.splitlines()) == 1
        assert "write" in error or "not permitted" in error
        status, _, error = end(begin(tiny_images, folder))
        assert status == 1 and len(error.splitlines()) == 1 and "Cannot write into the folder" in error
    finally:
        subprocess.call(["chattr", "-i"] + folders, stderr=subprocess.DEVNULL)
    complete(tiny_images, folder)
    assert_same(folder, reference)


def test_help_comes_from_a_fork_too():
    assert run("pretraining.py", "--help", forked=True)[1].count("--max_steps")
