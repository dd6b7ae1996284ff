"""Signals, as every command has them."""
import os
import signal
import sys
import threading
import time

import pytest

import commands

# isort: split

import tensorflow as tf


@pytest.mark.parametrize("number, name", [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_a_signal_outside_of_the_training_is_one_line(capsys, number, name):
    with pytest.raises(SystemExit) as status, commands.one_line_errors("some.py"):
        os.kill(os.getpid(), number)
        time.sleep(60)
    assert status.value.code == 128 + number and capsys.readouterr().err == "some.py: stopped by %s.\n" % name


@pytest.mark.parametrize("raises", [False, True])
def test_a_signal_is_raised_where_tensorflow_has_returned(raises):
    """Within, where C++ may have called Python, it can crash the process."""
    done = []

    def called():  # such as what tf.function traces
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("own code within TensorFlow's")

    names = {"__name__": "tensorflow.python.some", "called": called, "done": done}
    exec("def inner():\n  called()\n  done.append('TensorFlow')\n  %s\ndef outer():\n  inner()\n"
         % ("raise ValueError()" if raises else "return 1"), names)

    def caller():
        try:
            names["outer"]()
        except ValueError:
            pass
        done.append("what comes next")

    with pytest.raises(commands.Interrupted) as error, commands.signals() as signals, signals.interrupting():
        caller()
        done.append("the caller's caller")
    assert done == ["own code within TensorFlow's", "TensorFlow"] and error.value.args == (signal.SIGTERM,)
    assert sys.gettrace() is None


def test_signals_while_iterators_are_made_do_no_harm(monkeypatch):
    """TensorFlow's C++ calls Python there, and its destructors may run anywhere."""
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append, raising=False)
    batches = tf.data.Dataset.range(10).map(lambda i: (i, {"next": i + 1})).batch(2)
    for number in range(30):
        with pytest.raises(commands.Interrupted), commands.signals() as signals, signals.interrupting():
            timer = threading.Timer(number / 3000, os.kill, (os.getpid(), signal.SIGTERM))
            timer.start()
            end = time.time() + 60
            while time.time() < end:
                list(batches)
        timer.join()
    assert not unraisable
