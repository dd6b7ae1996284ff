"""The training state on disk: to the bit, rotated, damaged, cut off, from the version before, and beside other programs' files."""
import errno
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from command import begin_tiny, completed, steps_done
from tensorflow.python.framework import func_graph

import checkpoints
import models
import npu_config
import pretraining
import runs
from commands import UserError

# The training state

class Small:
    """A state with one of everything, kept in a folder."""

    def __init__(self, folder, keep=5):
        self.folder = folder
        self.weight, self.history = tf.Variable(np.zeros(1000, np.float32)), checkpoints.History()
        self.kept = checkpoints.Checkpoints(str(folder), {"weight": self.weight}, self.history, keep)

    def save(self, step):
        self.weight.assign(np.full(1000, step, np.float32))
        self.history.losses = [1 / 3] * step
        return self.kept.save(step)

    def steps(self):
        return sorted(int(path.name.split("-")[1].split(".")[0]) for path in self.folder.glob("ckpt-*.index"))


def restored_step(folder):
    other = Small(folder)
    found = other.kept.restore()
    if found is None:
        return None
    assert len(set(other.weight.numpy())) == 1 and other.history.losses == [1 / 3] * int(other.weight[0])
    return int(other.weight[0])


def learner(scaled, precision=None):
    config = pretraining.Config(device="cpu", width_multiplier=1 / 16, loss_scale="dynamic" if scaled else "none",
                                precision_mode=precision)
    return pretraining.Byol(config, npu_config.open_device(config), total_steps=10, loop_size=1)


def test_the_whole_state_comes_back_to_the_bit(tmp_path):
    first, history = learner(True), checkpoints.History()
    random = np.random.RandomState(0)
    inner = first.optimizer.variables()
    for variable in list(first.variables) + list(inner):
        value = random.rand(*variable.shape) * (1 if variable.dtype.is_floating else 100)
        variable.assign(tf.cast(value, variable.dtype))
    first.optimizer._loss_scale.current_loss_scale.assign(4096.0)
    first.optimizer._loss_scale.counter.assign(17)
    history.losses, history.log, history.knn = [0.1, 1 / 3], [{"step": 2, "loss": 1 / 3}], [{"epoch": 0, "accuracy": 0.1}]
    checkpoints.Checkpoints(str(tmp_path), first.state(), history, 1).save(2)
    second, again = learner(True), checkpoints.History()
    assert checkpoints.Checkpoints(str(tmp_path), second.state(), again, 1).restore().endswith("ckpt-2")
    assert len(second.optimizer.variables()) == 2 * len(second.online_weights) + 1
    pairs = list(zip(first.variables, second.variables)) + list(zip(inner, second.optimizer.variables()))
    for mine, other in pairs:
        if "recent" not in mine.name:
            np.testing.assert_array_equal(mine, other, err_msg=mine.name)
    scale = second.optimizer._loss_scale
    assert (float(scale.current_loss_scale), int(scale.counter)) == (4096, 17)
    assert (again.losses, again.log, again.knn) == (history.losses, history.log, history.knn)


def test_steps_skipped_by_loss_scaling_are_no_failure():
    made = learner(True)
    made.optimizer._loss_scale.current_loss_scale.assign(2.0 ** 127)
    before = [weight.numpy() for weight in made.online_weights]
    x = tf.random.stateless_uniform((4, 8, 8, 3), [1, 2])
    made.train_step_pretraining(x, x[::-1])
    for array, weight in zip(before, made.online_weights):
        np.testing.assert_array_equal(array, weight)
    assert np.isfinite(made.recent.numpy()).all() and float(made.optimizer.loss_scale) == 2.0 ** 126
    assert all(np.isfinite(weight.numpy()).all() for weight in made.f_online.weights)


def test_the_oldest_are_dropped(tmp_path):
    small = Small(tmp_path, keep=2)
    for step in (5, 10, 15, 20):
        small.save(step)
    assert small.steps() == [15, 20] and restored_step(tmp_path) == 20
    assert Small(tmp_path, keep=1).save(100) and small.steps() == [100]


@pytest.mark.parametrize("keep", [1, 3])
def test_one_that_was_cut_off_is_ignored_and_removed(tmp_path, keep):
    Small(tmp_path, keep).save(5)
    (tmp_path / "ckpt-10_temp").mkdir()
    for name in ("ckpt-10_temp/part-0", "ckpt-10.index", "ckpt-10.data-00000-of-00001", "ckpt-10.index.tempstate1",
                 "checkpoint", "checkpoint.tmp12", ".tmp-abcdefgh-ckpt-10.json", ".tmp-abcdefgh-ckpt-10.sha256.json"):
        (tmp_path / name).write_bytes(b"half")
    others = ["mine.txt", "ckpt-final.pt", "ckpt-1.pt", "ckpt-7.index.bak", "ckpt.index", "ckpt-07.index", "checkpoint.txt", ".tmp-x"]
    for name in others:
        (tmp_path / name).write_text("not ours")
    (tmp_path / "ckpt-best").mkdir()
    assert restored_step(tmp_path) == 5
    Small(tmp_path, keep).save(6)
    left = {path.name for path in tmp_path.iterdir()} - set(others) - {"ckpt-best", checkpoints.MARK}
    assert left == {"ckpt-%d%s" % (step, ending) for step in (5, 6)[-keep:]
                    for ending in (".index", ".data-00000-of-00001", ".json")}
    assert all((tmp_path / name).read_text() == "not ours" for name in others) and (tmp_path / "ckpt-best").is_dir()


@pytest.mark.parametrize("keep", [1, 2])
def test_a_kill_at_any_moment_of_saving_leaves_a_whole_one(tmp_path, monkeypatch, keep):
    """A process that is killed does no more than it had done: here an error that nothing handles, at each step of a save."""
    class Killed(BaseException):
        pass

    Small(tmp_path, keep).save(5)
    for target, name, at in ((checkpoints, "_remove", 1), (tf.train.Checkpoint, "write", 1), (checkpoints, "_crc_of_index", 1),
                             (checkpoints.commands, "write_atomically", 1), (checkpoints, "_remove", 2)):
        calls, real = [], getattr(target, name)

        def stop(*arguments, calls=calls, real=real, at=at):
            calls.append(1)
            if len(calls) == at:
                raise Killed
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(target, name, stop)
            with pytest.raises(Killed):
                Small(tmp_path, keep).save(10)
        assert restored_step(tmp_path) == (10 if at == 2 else 5)


def test_none_is_none(tmp_path):
    assert restored_step(tmp_path) is None


def damage(path, how):
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "short":
        path.write_bytes(content[:-1])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        place = int(how * (len(content) - 1))
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1:])


@pytest.fixture
def warned(monkeypatch):
    """What was warned of."""
    messages = []
    monkeypatch.setattr(checkpoints.logging, "warning", lambda text, *values: messages.append(text % values))
    return messages


@pytest.mark.parametrize("ending", ["data-*", "index", "json"])
@pytest.mark.parametrize("how", ["gone", "short", "empty", 0.0, 0.3, 0.5, 0.9])
def test_a_damaged_one_is_named_and_the_one_before_used(tmp_path, warned, ending, how):
    small = Small(tmp_path)
    small.save(5)
    small.save(10)
    damage(next(tmp_path.glob("ckpt-10." + ending)), how)
    assert restored_step(tmp_path) == 5
    if ending == "json" and how == "gone":  # no different from one that was not finished
        assert not warned
    else:
        assert len(warned) == 1 and "ckpt-10 is damaged" in warned[0] and "/proc/" not in warned[0]
    again = Small(tmp_path)
    again.kept.restore()
    again.save(7)  # the damaged one is of a later step; it must not outlive this one
    assert again.steps() == [5, 7] and restored_step(tmp_path) == 7


def test_every_changed_byte_of_every_file_is_noticed(tmp_path, warned):
    small = Small(tmp_path)
    small.save(5)
    small.save(10)
    files = sorted(tmp_path.glob("ckpt-10.*"))
    assert [path.suffix[:5] for path in files] == [".data", ".inde", ".json"]
    for path in files:
        content = path.read_bytes()
        places = list(range(0, len(content), len(content) // 60)) + list(range(len(content) - 48, len(content)))  # the index's footer
        for place in places:
            path.write_bytes(content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1:])
            warned.clear()
            assert restored_step(tmp_path) == 5 and len(warned) == 1, (path.name, place)
        path.write_bytes(content)
    assert restored_step(tmp_path) == 10


def test_files_of_different_steps_do_not_make_one(tmp_path, warned):
    small = Small(tmp_path)
    for step in (5, 10, 15):
        small.save(step)
    for ending in (".index", ".data-00000-of-00001"):
        shutil.copy(str(tmp_path / ("ckpt-5" + ending)), str(tmp_path / ("ckpt-15" + ending)))
    assert restored_step(tmp_path) == 10 and "its index has changed" in warned[0]
    shutil.copy(str(tmp_path / "ckpt-5.data-00000-of-00001"), str(tmp_path / "ckpt-10.data-00000-of-00001"))
    assert restored_step(tmp_path) == 5


def test_none_good_is_an_error(tmp_path):
    Small(tmp_path).save(5)
    damage(tmp_path / "ckpt-5.index", 0.5)
    with pytest.raises(UserError, match="None of the 1 checkpoints in .* is whole"):
        restored_step(tmp_path)


@pytest.mark.parametrize("earlier", [True, False])
def test_a_full_disk_is_told_as_it_is(tmp_path, monkeypatch, earlier):
    small = Small(tmp_path)
    if earlier:
        small.save(5)

    def full(checkpoint, prefix):
        with open(prefix + ".index", "w"):
            raise tf.errors.ResourceExhaustedError(None, None, prefix + ".index; No space left on device")

    monkeypatch.setattr(tf.train.Checkpoint, "write", full)
    with pytest.raises(UserError) as caught:
        small.save(10)
    assert ("the earlier ones are whole" in str(caught.value)) == earlier
    assert "(ckpt-10.index; No space left on device)" in str(caught.value) and str(tmp_path) in str(caught.value)
    assert restored_step(tmp_path) == (5 if earlier else None) and not list(tmp_path.glob("ckpt-10*"))


def test_a_file_system_without_locks_is_warned_of_and_used(tmp_path, warned, monkeypatch):
    """As ENOLCK of NFS without its lock daemon and ENOSYS of Lustre: nobody holds the folder then."""
    import fcntl

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with checkpoints.only_run_in(str(tmp_path)):
        assert len(warned) == 1 and "No locks available" in warned[0] and "no other run" in warned[0]
    monkeypatch.undo()
    with checkpoints.only_run_in(str(tmp_path)), pytest.raises(UserError, match="Another run is at work"):
        with checkpoints.only_run_in(str(tmp_path)):
            pass


@pytest.fixture
def long(tmp_path, monkeypatch):
    """A run of 120 steps with a part of its history each 20 or so, and a function that takes its History so far."""
    monkeypatch.setattr(checkpoints, "PART", 20)
    small = Small(tmp_path, keep=3)

    def reach(step, run=small):
        run.history.losses = [number / 7 for number in range(1, step + 1)]
        run.history.log = [{"step": number, "loss": number / 7} for number in range(2, step + 1, 2)]
        run.history.knn = [{"step": number, "accuracy": 0.5} for number in range(0, step + 1, 12)]
        run.history.skipped = list(range(1, step + 1, 9))
        run.weight.assign(np.full(1000, step, np.float32))
        run.kept.save(step)

    for step in range(6, 121, 6):
        reach(step)
    return reach


def test_a_checkpoint_late_in_a_long_run_is_no_larger_than_an_early_one(long, tmp_path):
    sizes = {path.name: path.stat().st_size for path in tmp_path.glob("*.json")}
    assert sorted(sizes) == sorted(["history-%d.json" % step for step in (24, 48, 72, 96, 120)]
                                   + ["ckpt-%d.json" % step for step in (108, 114, 120)])
    assert all(size < 3000 for size in sizes.values()) and sizes["ckpt-120.json"] < 500
    other = Small(tmp_path)
    assert other.kept.restore().endswith("ckpt-120")
    history = vars(other.history)
    assert history["losses"] == [number / 7 for number in range(1, 121)]
    assert [line["step"] for line in history["log"]] == list(range(2, 121, 2))
    assert [line["step"] for line in history["knn"]] == list(range(0, 121, 12))
    assert history["skipped"] == list(range(1, 121, 9))
    long(126, other)  # it goes on as it would have, and so does the next
    again = Small(tmp_path)
    assert again.kept.restore().endswith("ckpt-126") and len(again.history.losses) == 126


def test_from_an_earlier_checkpoint_of_a_long_run_later_parts_are_dropped(long, tmp_path, warned):
    (tmp_path / "ckpt-120.index").write_bytes(b"")
    other = Small(tmp_path, keep=3)
    assert other.kept.restore().endswith("ckpt-114") and len(other.history.losses) == 114
    assert len(warned) == 1
    long(116, other)
    assert sorted(path.name for path in tmp_path.glob("history-*")) == sorted(
        "history-%d.json" % step for step in (24, 48, 72, 96, 116))
    assert Small(tmp_path).kept.restore().endswith("ckpt-116")


def test_a_changed_part_is_noticed(long, tmp_path, warned):
    part = tmp_path / "history-120.json"
    part.write_bytes(part.read_bytes().replace(b"7", b"8", 1))
    assert Small(tmp_path).kept.restore().endswith("ckpt-114")  # which does without that part
    assert len(warned) == 1 and "history-120.json has changed" in warned[0]
    (tmp_path / "history-24.json").unlink()
    with pytest.raises(UserError, match="None of the 3 checkpoints"):
        Small(tmp_path).kept.restore()


def test_a_long_run_of_an_earlier_version_goes_on(tmp_path, monkeypatch):
    Small(tmp_path).save(70)  # all of its history in its JSON
    monkeypatch.setattr(checkpoints, "PART", 20)
    other = Small(tmp_path)
    assert other.kept.restore().endswith("ckpt-70")
    other.save(76)
    assert restored_step(tmp_path) == 76 and (tmp_path / "history-76.json").exists()


def test_starting_anew_removes_the_parts_too(long, tmp_path):
    (tmp_path / "history-x.json").write_text("not ours")
    checkpoints._remove(str(tmp_path), [])
    assert sorted(path.name for path in tmp_path.iterdir()) == [checkpoints.MARK, "history-x.json"]


@pytest.mark.parametrize("precision", ["must_keep_origin_dtype", "allow_mix_precision"])
def test_a_second_save_makes_no_graph(tmp_path, monkeypatch, precision):
    """On a device such a graph stays until the process ends."""
    made, real = [], func_graph.FuncGraph.__init__

    def counted(graph, name, *arguments, **settings):
        made.append(name)
        real(graph, name, *arguments, **settings)

    monkeypatch.setattr(func_graph.FuncGraph, "__init__", counted)
    state, history = learner(True, precision), checkpoints.History()
    kept = checkpoints.Checkpoints(str(tmp_path), state.state(), history, 2)
    kept.save(1)
    made.clear()
    kept.save(2)
    kept.save(3)
    assert made == []
    for _ in range(3):
        assert checkpoints.all_finite(state.f_online)
    assert len([name for name in made if "all_finite" in name]) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_found_in_any_variable(value):
    network = tf.Module()
    network.weights = [tf.Variable(np.zeros(shape, np.float32)) for shape in ((), (3,), (2, 2, 2))]
    assert checkpoints.all_finite(network)
    for variable in network.weights:
        variable.assign(np.full(variable.shape, value))
        assert not checkpoints.all_finite(network)
        variable.assign(np.zeros(variable.shape))
    assert checkpoints.all_finite(network)


# Folders of the version before

class OldHistory(tf.train.experimental.PythonState):
    def __init__(self, history):
        super().__init__()
        self.history = history

    def serialize(self):
        return json.dumps(vars(self.history))

    def deserialize(self, string_value):
        raise AssertionError("only written here")


def save_as_before(small, steps):
    """The History among the tensors, TensorFlow's manager, and sums that vouch for the files."""
    state = tf.train.Checkpoint(weight=small.weight, history=OldHistory(small.history))
    manager = tf.train.CheckpointManager(state, str(small.folder), max_to_keep=9)
    for step in steps:
        small.weight.assign(np.full(1000, step, np.float32))
        small.history.losses = [1 / 3] * step
        manager.save(checkpoint_number=step)
        sums = {path.name: "0" * 64 for path in small.folder.glob("ckpt-%d.*" % step)}
        (small.folder / ("ckpt-%d.sha256.json" % step)).write_text(json.dumps(sums))


def test_a_folder_of_the_version_before_is_resumed(tmp_path, warned):
    save_as_before(Small(tmp_path), (5, 10, 15))
    assert restored_step(tmp_path) == 15
    damage(sorted(tmp_path.glob("ckpt-15.data-*"))[-1], 0.5)
    assert restored_step(tmp_path) == 10 and len(warned) == 1
    damage(tmp_path / "ckpt-10.sha256.json", "empty")
    small = Small(tmp_path, keep=2)
    assert small.kept.restore().endswith("ckpt-5")
    small.save(12)
    assert small.steps() == [10, 12] and restored_step(tmp_path) == 12
    small.save(14)
    small.save(16)
    assert sorted(path.name for path in tmp_path.iterdir() if ".data-" not in path.name) == [
        checkpoints.MARK, "ckpt-14.index", "ckpt-14.json", "ckpt-16.index", "ckpt-16.json"]


# Names of folders

@pytest.mark.parametrize("name", ["lr[1e-3]", "*", "a ?b", "[", "back\\slash", "学习 ü", "{a,b}", "%s"])
def test_a_folder_may_have_any_name(tmp_path, name):
    folder = tmp_path / name / "checkpoints"
    small = Small(folder, keep=2)
    for step in (5, 10, 15):
        assert small.save(step) == str(folder / ("ckpt-%d" % step))
    assert small.steps() == [10, 15] and restored_step(folder) == 15
    (tmp_path / "f").mkdir()
    assert restored_step(tmp_path / "f") is None


def test_a_run_in_a_folder_with_brackets_is_resumed(tiny_images, tmp_path):
    folder = tmp_path / "lr[1e-3] * ü"
    assert "Resuming" not in completed(begin_tiny(tiny_images, folder, "--max_steps=1"))
    assert "Resuming from step 1 of" in completed(begin_tiny(tiny_images, folder, "--max_steps=2")) and steps_done(folder) == 2
    process = begin_tiny(tiny_images, os.fsdecode(os.fsencode(str(tmp_path)) + b"/\xff"), "--max_steps=1")
    _, error = process.communicate(timeout=400)
    assert process.returncode == 1 and len(error.splitlines()) == 1 and "is not UTF-8" in error


# Other programs' files

SETTINGS = {"encoder": "resnet18", "target_momentum": 0.99, "images_crc": 1, "seed": 0}


def claim(folder, resume=True, overwrite=False, **changed):
    checkpoints.claim_folder(str(folder), dict(SETTINGS, **changed), {"seed"}, resume, overwrite)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def write(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("of somebody else")


@pytest.mark.parametrize("flags", [{}, {"resume": False}, {"resume": False, "overwrite": True}])
@pytest.mark.parametrize("names", [
    ["checkpoints/ckpt-7.index", "checkpoints/ckpt-7.data-00000-of-00001", "checkpoints/ckpt-final.pt", "checkpoints/ckpt-best/a"],
    ["checkpoints/ckpt-7.json", "checkpoints/ckpt-7.index"], ["checkpoints/ckpt-7.sha256.json"], ["checkpoints/notes.txt"],
    ["config.json"], ["losses.txt"], ["views.png"], ["f_online_1.h5", "result.json"], ["metrics.json", "logs/events.out.tfevents.1"]])
def test_what_another_program_has_written_is_refused_and_left(tmp_path, flags, names):
    write(tmp_path, *names)
    before = contents(tmp_path)
    with pytest.raises(UserError) as caught:
        claim(tmp_path, **flags)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert any(os.path.basename(name) in str(caught.value) for name in names) and "choose another --output_dir" in str(caught.value)
    assert contents(tmp_path) == before


def test_a_config_of_another_program_is_refused_and_left(tmp_path):
    (tmp_path / "config.json").write_text('{"model": "bert", "encoder": "bpe"}')
    for flags in ({}, {"resume": False, "overwrite": True}):
        with pytest.raises(UserError, match="config.json is damaged, or not of a run of this program .it lacks images_crc"):
            claim(tmp_path, **flags)
    assert json.loads((tmp_path / "config.json").read_text())["model"] == "bert" and os.listdir(str(tmp_path)) == ["config.json"]


def test_overwriting_removes_what_is_ours_alone(tmp_path):
    write(tmp_path, "logs/events.out.tfevents.1.host.2", "logs/notes.txt", "f_online_x.h5", "f_online_1.h5.bak", "model.h5",
          "config.json.txt")
    claim(tmp_path)
    Small(tmp_path / "checkpoints").save(5)
    write(tmp_path, "checkpoints/ckpt-best/weights", "checkpoints/ckpt-final.pt", "checkpoints/mine.txt")
    theirs = contents(tmp_path)
    theirs = {name: content for name, content in theirs.items() if content == b"of somebody else"}
    assert len(theirs) == 9
    write(tmp_path, "losses.txt", "views.png", "metrics.json", "result.json", "f_online_1.h5", "f_online_step_7.h5",
          "logs/events.out.tfevents.1.host.2.byol", ".tmp-abcdefgh-losses.txt")
    with pytest.raises(UserError, match="an earlier run .config.json, f_online_1.h5, .*, views.png, checkpoints.; add --over"):
        claim(tmp_path, resume=False)
    claim(tmp_path, resume=False, overwrite=True, images_crc=2)
    left = contents(tmp_path)
    assert json.loads(left.pop("config.json").decode())["images_crc"] == 2
    assert left.pop("checkpoints/" + checkpoints.MARK) == checkpoints.MARK_TEXT.encode()
    assert {name: content for name, content in left.items() if content is not None} == theirs


def test_a_folder_is_claimed_again(tmp_path):
    """By the run that goes on; where nothing but the mark is; where the mark is gone, and where only an empty folder is."""
    (tmp_path / "checkpoints").mkdir()
    claim(tmp_path)
    claim(tmp_path)
    Small(tmp_path / "checkpoints").save(5)
    (tmp_path / "checkpoints" / checkpoints.MARK).unlink()
    claim(tmp_path, seed=1)
    assert (tmp_path / "checkpoints" / checkpoints.MARK).exists() and restored_step(tmp_path / "checkpoints") == 5
    with pytest.raises(UserError, match="made with other settings .images_crc was 1, is 2.; give the same"):
        claim(tmp_path, images_crc=2)
    (tmp_path / "checkpoints" / checkpoints.MARK).unlink()
    write(tmp_path, "checkpoints/ckpt-7.index")  # not cut off by this program, as far as one can know
    with pytest.raises(UserError, match="ckpt-7.index"):
        claim(tmp_path)
    (tmp_path / "checkpoints" / "ckpt-7.index").unlink()
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="config.json is gone, so"):
        claim(tmp_path)
    claim(tmp_path, resume=False, overwrite=True)
    assert restored_step(tmp_path / "checkpoints") is None


def test_curves_are_marked_as_ours(tmp_path):
    curves = pretraining.progress.Curves(str(tmp_path / "logs"), 0)
    curves.close()
    assert len(list((tmp_path / "logs").glob("events.out.tfevents.*"))) == 1
    claim(tmp_path, resume=False)
    assert not list((tmp_path / "logs").iterdir())


# Collapse and failure, as a run sees them

@pytest.mark.parametrize("spread, warned", [(0.0, True), (0.004, True), (0.037, False), (0.07, False)])
def test_a_collapse_is_warned_of_and_a_healthy_run_is_not(monkeypatch, tmp_path, spread, warned):
    messages = []
    monkeypatch.setattr(runs.logging, "warning", lambda text, *values: messages.append(text % values))
    config = pretraining.Config(device="cpu", batch_size=2, output_dir=str(tmp_path))
    run = runs.Run(config, npu_config.open_device(config), SimpleNamespace(train_images=np.zeros((4, 8, 8, 3))),
                          SimpleNamespace(say=lambda text: None))
    run.learner = SimpleNamespace(g_online=SimpleNamespace(features=128), f_online=models.ResNet18(1 / 16),
                                  schedule=lambda step: 0.0)
    run.curves = SimpleNamespace(scalars=lambda step, values: None)
    run.history.losses = [1.0]
    run.step = 1
    run._log(1.0, spread)
    assert bool(messages) == warned and all("collapse" in text and "step 1" in text for text in messages)


def test_the_first_bad_loss_is_named_and_bad_weights_are_not_saved(tmp_path):
    config = pretraining.Config(device="cpu", batch_size=2, output_dir=str(tmp_path))
    run = runs.Run(config, npu_config.open_device(config), SimpleNamespace(train_images=np.zeros((8, 8, 8, 3))),
                          SimpleNamespace(say=lambda text: None))
    run.learner = SimpleNamespace(f_online=models.ResNet18(1 / 16))
    run.history.losses, run.step, run.saved = [1.0, 2.0], 2, 2
    run._check_finite()
    run.history.losses, run.step = run.history.losses + [float("nan"), float("inf")], 4
    with pytest.raises(UserError, match="The loss of step 3 is nan.*last good checkpoint is kept"):
        run._check_finite()
    run.history.losses, run.step, run.saved = [1.0], 1, 0
    run.learner.f_online.stem_norm.moving_mean.assign([np.nan] * 4)
    with pytest.raises(UserError, match="The weights after step 1 are not finite.*there was no checkpoint yet"):
        run._check_finite()
