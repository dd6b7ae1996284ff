"""What every command shares: signals, closed streams, the bounds of flags."""
import dataclasses
import errno
import math
import os
import re
import signal
import subprocess
import sys
import threading
from typing import Optional

import pytest
from conftest import ROOT

import commands
import embed
import finetuning
import linearevaluation
import pretraining
from commands import UserError, flag

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_is_noted_and_a_second_one_has_its_usual_effect(number):
    came = []
    before = [signal.signal(number, lambda *_: came.append("usual")) for number in NUMBERS]
    try:
        usual = [signal.getsignal(number) for number in NUMBERS]
        with commands.signals_noted() as signals:
            signals.check()
            os.kill(os.getpid(), number)
            assert signals.number == number and not came
            with pytest.raises(commands.Stopped) as error:
                signals.check()
            assert error.value.args == (number,) and isinstance(error.value, KeyboardInterrupt)
            os.kill(os.getpid(), signal.SIGTERM)
            assert came == ["usual"] and signals.number == number
        assert [signal.getsignal(number) for number in NUMBERS] == usual
    finally:
        for number, handler in zip(NUMBERS, before):
            signal.signal(number, handler)


def test_the_own_first_signal_is_no_second_one_where_another_worker_had_it_before():
    """A signal to all workers reaches each at another moment: one that already saves for another's sake must not end at its own."""
    came = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append("usual"))
    try:
        with commands.signals_noted() as signals:
            signals.number = signal.SIGINT  # as the workers agree when one of them has got it
            os.kill(os.getpid(), signal.SIGTERM)
            assert not came and signals.number == signal.SIGINT
            os.kill(os.getpid(), signal.SIGTERM)
            assert came == ["usual"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with commands.signals_noted() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
        assert signals.number is None and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_of_the_main_thread_handlers_stay_as_they_are():
    before, found = signal.getsignal(signal.SIGTERM), []

    def work():
        with commands.signals_noted() as signals:
            found.append((signals.number, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(None, before)]


@pytest.mark.parametrize("command", ["pretraining.py", "report.py"])
@pytest.mark.parametrize("closed, printed", [(">&-", False), ("2>&-", True), ("<&- >&- 2>&-", False)])
def test_closed_streams_do_no_harm(command, closed, printed):
    done = subprocess.run("exec %s %s --help %s" % (sys.executable, os.path.join(ROOT, command), closed), shell=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert (b"python " + command.encode() in done.stdout) == printed


@dataclasses.dataclass(frozen=True)
class Settings:
    rate: float = flag(0.5, "A rate.", low=0, high=1)
    any_number: float = flag(0.5, "Any number.")
    count: Optional[int] = flag(None, "A count.", low=1)
    kind: str = flag("a", "A kind.", choices=("a", "b"))


@pytest.mark.parametrize("settings, words", [
    (dict(rate=math.nan), "--rate is nan; give a number of at least 0 and at most 1"),
    (dict(rate=math.inf), "--rate is inf"),
    (dict(rate=1.5), "--rate is 1.5"),
    (dict(rate=-0.1), "--rate is -0.1"),
    (dict(any_number=math.nan), "--any_number is nan; give a number"),
    (dict(any_number=-math.inf), "--any_number is -inf"),
    (dict(count=0), "--count is 0; give a number of at least 1"),
    (dict(count=10 ** 20), "--count is 100000000000000000000; give a number of at least 1 and at most 2147483647"),
    (dict(kind="c"), "--kind is 'c'; give one of a, b"),
])
def test_values_out_of_bounds_are_named(settings, words):
    commands.check(Settings())
    with pytest.raises(UserError) as error:
        commands.check(Settings(**settings))
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("config", [pretraining.Config, linearevaluation.Config, finetuning.Config, embed.Config])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_float_flag_of_any_command_takes_what_is_no_number(config, value):
    names = [field.name for field in dataclasses.fields(config) if isinstance(field.default, float)]
    assert "width_multiplier" in names
    for name in names:
        with pytest.raises(UserError, match="--%s is" % name):
            commands.check(config(**{name: value}))


def test_flags_of_the_npu_are_at_the_end_of_the_help():
    text = subprocess.run([sys.executable, os.path.join(ROOT, "pretraining.py"), "--help"], stdout=subprocess.PIPE,
                          universal_newlines=True).stdout
    common, npu = text.split(commands.NPU_SECTION)
    for name in ("fusion_off_file", "mixlist_file", "hcom_parallel", "over_dump_path", "data_dump_step", "profiling"):
        assert name in npu and name not in common, name
    assert "--target_momentum" in common and "--target_momentum" not in npu


@pytest.mark.parametrize("command", ["linearevaluation.py", "finetuning.py", "embed.py"])
def test_verbose_shows_what_tensorflow_says(command, tmp_path):
    done = subprocess.run([sys.executable, "-B", os.path.join(ROOT, command), "--verbose", "--device=cpu",
                           "--encoder_weights=none", "--dataset=folder", "--data_dir=/nowhere", "--output_dir=%s" % tmp_path],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
                          env={name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"})
    *others, last = done.stderr.splitlines()
    assert done.returncode == 1 and last.startswith(command + ": ") and "/nowhere" in last
    assert any(re.match(r"[IW]\d{4} |\d{4}-\d\d-\d\d .*: [IW] ", line) for line in others)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOSPC])
@pytest.mark.parametrize("call", ["fsync", "chmod", "replace"])
def test_a_disk_that_fails_is_told_with_the_files_name(tmp_path, monkeypatch, number, call):
    """fsync tells none, of a network folder that fails now and then."""
    path = tmp_path / "losses.txt"
    path.write_text("before")

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(UserError, match="Could not write .*losses.txt .%s" % os.strerror(number)):
        commands.write_atomically(str(path), "after")
    assert os.listdir(str(tmp_path)) == ["losses.txt"] and path.read_text() == "before"


@pytest.mark.parametrize("error", [commands.UserError("There is no\nfolder."), OSError(2, "No such file", "/a\nb")])
def test_a_path_of_two_lines_makes_one_line(error):
    with pytest.raises(SystemExit) as ended, commands.one_line_errors("embed.py"):
        raise error
    assert ended.value.code in ("embed.py: There is no folder.", "embed.py: No such file (/a b)")
