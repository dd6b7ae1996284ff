"""Steps that loss scaling skips: told in the log line and the figures, warned of, and the end of a run that takes no other.

An overflow comes from the stand-in for the NPU's adapter, or on the CPU from a loss whose gradient is infinite.
"""
import json
import re
import shutil

import pytest
from command import BLOCKS, FAKE_NPU, TINY, begin_tiny, run


def pretrain(images, folder, *flags, **variables):
    """24 steps, 4 an epoch, a log line each 2."""
    process = begin_tiny(images, folder, "--log_every=2", *flags, env=dict(variables, PYTHONPATH=FAKE_NPU))
    out, error = process.communicate(timeout=300)
    return process.returncode, re.findall(r"^\[Epoch .*images/s.*$", out, re.M), error


def figures(folder):
    with open(str(folder / "metrics.json")) as file:
        return [(entry["step"], entry["loss_scale"], entry["skipped"]) for entry in json.load(file)["log"]]


@pytest.mark.parametrize("version, flag", [("", "--loss_scale=auto"), ("2022", "--loss_scale=auto"), ("", "--loss_scale=1024")])
def test_skipped_steps_and_the_scale_are_told_also_after_resuming(tiny_images, tmp_path, version, flag):
    where = dict(FAKE_NPU_OVERFLOW="2,3,9", FAKE_NPU_VERSION=version)
    flags = ["--device=npu", flag]
    status, lines, error = pretrain(tiny_images, tmp_path, *flags, "--max_steps=7", **where)
    assert (status, error) == (0, "")
    status, more, error = pretrain(tiny_images, tmp_path, *flags, "--max_steps=12", **where)
    assert (status, error) == (0, "")
    lines += more
    assert all(re.match(r"\[Epoch \d/6 Batch \d/4\] Loss=\d\.\d{5}\. Time=\d+\.\d\d, [\d.]+ images/s, ", line) for line in lines)
    fixed = flag.endswith("1024")
    scales = [1024] * 6 if fixed else [2 ** 14, 2 ** 13, 2 ** 13, 2 ** 13, 2 ** 12, 2 ** 12]
    skipped = [1, 2, 2, 2, 3, 3]
    told = ["left, loss scale %g, %d step%s skipped" % (scale, n, "" if n == 1 else "s") for scale, n in zip(scales, skipped)]
    assert all(line.endswith(end) for line, end in zip(lines, told)), lines
    assert figures(tmp_path) == list(zip([2, 4, 6, 8, 10, 12], scales, skipped))


def test_without_loss_scaling_nothing_of_it_is_told(tiny_images, tmp_path):
    status, lines, error = pretrain(tiny_images, tmp_path, "--max_steps=4", "--device=npu", "--loss_scale=none")
    assert status == 0 and len(lines) == 2 and all(line.endswith(" left") for line in lines)
    with open(str(tmp_path / "metrics.json")) as file:
        assert not {"loss_scale", "skipped"} & set(json.load(file)["log"][0])


@pytest.mark.parametrize("where", ["npu", "cpu", "cpu --num_devices=2"])
def test_overflow_without_end_ends_the_run_in_one_line(tiny_images, tmp_path, where):
    variable = {"FAKE_NPU_OVERFLOW": "always"} if where == "npu" else {"STEEP": "1"}
    flags = ("--device=" + where).split() + ["--loss_scale=dynamic"]
    status, lines, error = pretrain(tiny_images, tmp_path, *flags, **variable)
    # Epochs of 4 steps: it takes 16 steps until the scale, 2 ** 15 at first, is 1 and that has been tried, too.
    assert status == 1 and len(lines) == 8
    assert lines[-1].endswith("loss scale 1, 16 steps skipped")
    *warnings, last = error.splitlines()
    assert last == (
        "pretraining.py: The gradients of the last 16 steps, a whole epoch or more, overflowed, so that none of them changed the "
        "weights (loss scale 1), so the run stops; its last good checkpoint is kept in %s/checkpoints. Try a lower --learning_rate, "
        "or --precision_mode must_keep_origin_dtype." % tmp_path)
    assert [line.split("steps")[0] for line in warnings] == ["WARNING: The last %d " % n for n in (6, 8, 10, 12, 14, 16)]
    assert not list(tmp_path.glob("f_online*.h5")) and not (tmp_path / "checkpoints" / "ckpt-16.index").exists()


def test_a_run_that_is_resumed_in_the_middle_of_its_skipped_steps_counts_on(tiny_images, tmp_path):
    where = dict(FAKE_NPU_OVERFLOW=",".join(map(str, range(3, 25))))
    assert pretrain(tiny_images, tmp_path / "one", "--device=npu", "--max_steps=10", **where)[0] == 0
    shutil.copytree(str(tmp_path / "one"), str(tmp_path / "two"))
    status, lines, error = pretrain(tiny_images, tmp_path / "two", "--device=npu", **where)
    assert status == 1 and "The gradients of the last 18 steps" in error and len(lines) == 5
    # One good step among them, and it goes on.
    where = dict(FAKE_NPU_OVERFLOW=",".join(str(step) for step in range(3, 21) if step != 18))
    status, lines, error = pretrain(tiny_images, tmp_path / "one", "--device=npu", **where)
    assert status == 0 and lines[-1].endswith("loss scale 1, 17 steps skipped") and (tmp_path / "one" / "f_online_6.h5").exists()


@pytest.mark.parametrize("command, flags", [("linearevaluation.py", ["--cached_features"]), ("finetuning.py", [])])
def test_evaluating_commands_tell_skipped_steps_and_end_without_others(tiny_images, tmp_path, command, flags):
    """4 steps an epoch, of which the first three overflow; then all, which ends them when 16 have been tried."""
    def train(**where):
        return run(command, *TINY, "--data_dir=%s" % tiny_images, "--output_dir=%s" % tmp_path, "--encoder_weights=none",
                   "--device=npu", *flags, forked=True, blocks=BLOCKS, env=dict(where, PYTHONPATH=FAKE_NPU))

    status, out, error = train(FAKE_NPU_OVERFLOW="1,2,3")
    assert status == 0, error
    last, = re.findall(r"^\[Epoch 6/6 Batch 4/4\] loss .*$", out, re.M)
    assert last.endswith(" s, loss scale 4096, 3 steps skipped") and "Time" not in out and "Loss" not in out
    result = json.loads((tmp_path / ("result_" + command[:-3] + ".json")).read_text())
    assert (result["skipped"], result["loss_scale"], result["steps"]) == (3, 4096, 24)
    status, _, error = train(FAKE_NPU_OVERFLOW="always")
    assert status == 1 and error == (
        "%s: The gradients of the last 16 steps, a whole epoch or more, overflowed, so that none of them changed the weights (loss "
        "scale 1); try a lower --learning_rate, or --precision_mode must_keep_origin_dtype.\n" % command)
