"""The training state on disk: to the bit, rotated, damaged, cut off."""
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

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
        self.kept = checkpoints.Checkpoints(str(folder), {"weight": self.weight, "history": self.history}, keep)

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


def learner(scaled):
    config = pretraining.Config(device="cpu", width_multiplier=1 / 16, loss_scale="dynamic" if scaled else "none")
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
    checkpoints.Checkpoints(str(tmp_path), dict(first.state(), history=history), 1).save(2)
    second, again = learner(True), checkpoints.History()
    assert checkpoints.Checkpoints(str(tmp_path), dict(second.state(), history=again), 1).restore().endswith("ckpt-2")
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
                 "checkpoint.tmp12", ".tmp-abcdefgh-ckpt-10.sha256.json"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / "mine.txt").write_text("not ours")
    assert restored_step(tmp_path) == 5
    checkpoints.remove_unfinished(str(tmp_path))
    left = sorted(path.name for path in tmp_path.iterdir() if ".data-" not in path.name)
    assert left == ["checkpoint", "ckpt-5.index", "ckpt-5.sha256.json", "mine.txt"]
    assert not list(tmp_path.glob("ckpt-10*")) and list(tmp_path.glob("ckpt-5.data-*"))


@pytest.mark.parametrize("keep", [1, 2])
def test_a_kill_at_any_moment_of_saving_leaves_a_whole_one(tmp_path, monkeypatch, keep):
    """A process that is killed does no more than it had done: here an error that nothing handles, at each step of a save."""
    class Killed(BaseException):
        pass

    def stop(*arguments, **named):
        raise Killed

    Small(tmp_path, keep).save(5)
    for target, name in ((tf.train.CheckpointManager, "save"), (checkpoints, "_sha256"), (checkpoints.commands, "write_json"),
                         (checkpoints, "remove_unfinished")):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, stop)
            with pytest.raises(Killed):
                Small(tmp_path, keep).save(10)
        assert restored_step(tmp_path) == (10 if name == "remove_unfinished" else 5)


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


@pytest.mark.parametrize("ending", ["data-*", "index", "sha256.json"])
@pytest.mark.parametrize("how", ["gone", "short", "empty", 0.0, 0.3, 0.5, 0.9])
def test_a_damaged_one_is_named_and_the_one_before_used(tmp_path, monkeypatch, ending, how):
    small = Small(tmp_path)
    small.save(5)
    small.save(10)
    path = sorted(tmp_path.glob("ckpt-10." + ending))[-1]  # TensorFlow 2.6.5 makes two shards
    damage(path, how)
    before = path.exists() and path.read_bytes()
    if ending == "sha256.json" and how == "gone":  # no different from one that was not finished
        assert restored_step(tmp_path) == 5
        return
    messages = []
    monkeypatch.setattr(checkpoints.logging, "warning", lambda text, *values: messages.append(text % values))
    step = restored_step(tmp_path)
    if ending == "sha256.json" and how == "short":  # its last line's end: the sums are all there
        assert step == 10 and before
        return
    assert step == 5 and len(messages) == 1 and "ckpt-10 is damaged" in messages[0]
    again = Small(tmp_path)
    again.kept.restore()
    again.save(7)  # the damaged one is of a later step; it must not outlive this one
    assert again.steps() == [5, 7] and restored_step(tmp_path) == 7


def test_none_good_is_an_error(tmp_path):
    Small(tmp_path).save(5)
    damage(tmp_path / "ckpt-5.index", 0.5)
    with pytest.raises(UserError, match="None of the 1 checkpoints in .* is whole"):
        restored_step(tmp_path)


@pytest.mark.parametrize("content", [b"", b"garbage {", b"\xff\xfe", b'model_checkpoint_path: "/nowhere/ckpt-3"\n'])
def test_tensorflows_own_list_may_be_damaged(tmp_path, content):
    small = Small(tmp_path, keep=2)
    small.save(5)
    small.save(10)
    (tmp_path / "checkpoint").write_bytes(content)
    assert restored_step(tmp_path) == 10
    Small(tmp_path, keep=2).save(15)
    assert small.steps() == [10, 15] and restored_step(tmp_path) == 15


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
