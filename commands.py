"""What every command shares: flags from a dataclass, one-line errors, atomic files, signals, quiet start.

To be imported before TensorFlow: it decides what TensorFlow prints while it starts.
"""
import contextlib
import dataclasses
import errno
import gc
import json
import math
import os
import platform
import re
import signal
import sys
import tempfile
import threading
import typing
from logging import Formatter
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Type, TypeVar, Union

from absl import app, flags, logging

for number in range(3):  # a standard stream that is closed, as by >&-, leads nowhere: its number must not become a data file's
    try:
        os.fstat(number)
    except OSError:
        os.open(os.devnull, os.O_RDWR)
sys.stdout, sys.stderr = (open(os.devnull, "w") if stream is None else stream for stream in (sys.stdout, sys.stderr))

VERBOSE = "--verbose" in sys.argv
NPU_SECTION = "For an Ascend NPU only"
LOG_FORMAT = "%(levelname)s: %(message)s"
# 0 shows everything that TensorFlow's C++ side says, 2 only its errors, and 3 not those of several lines either that it has
# for a lost worker. A value set by the user wins.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "0" if VERBOSE else "3" if os.environ.get("TF_CONFIG") else "2")
# Keras 3, which TensorFlow would otherwise import, is of no use here (see models.py): saves a second of every start.
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
# What TensorFlow 2.21 writes to stderr at its start whatever that level is: notices, and on a machine without an NVIDIA
# driver that there is none.
NOTICES = re.compile(rb"[IW]\d{4} |/job:|WARNING: All log messages before absl::|To enable the following instructions"
                     + (rb"" if os.path.exists("/proc/driver/nvidia") else rb"|E\d{4} .*failed call to cuInit"))


@contextlib.contextmanager
def quiet_start() -> Iterator[None]:
    """Hold back what is written to stderr, also by C++, and pass it on at the end without TensorFlow's notices."""
    if VERBOSE:
        yield
        return
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            os.write(2, b"".join(line for line in held if not NOTICES.match(line)))


def end_silently_by_ctrl_c() -> None:
    """Ctrl-C ends the process as SIGTERM does. Python would raise KeyboardInterrupt, which TensorFlow's C++ does not bear."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def _starting() -> Iterator[None]:
    """For the import of TensorFlow: say on a terminal what is waited for, and be quick, quiet and easily stopped meanwhile."""
    waiting = sys.stderr.isatty() and "--quiet" not in sys.argv
    if waiting:
        sys.stderr.write("Starting TensorFlow...")
    gc.disable()  # what an import makes stays: to look for garbage in it takes a fifth of the import, and again at the end
    try:
        with quiet_start():
            yield
    finally:
        gc.freeze()
        gc.enable()
        if waiting:
            sys.stderr.write("\r\x1b[K")  # the line is empty again


# Where Python was started with one of the commands beside this file, rather than with a program that imports them.
if os.path.isfile(os.path.join(os.path.dirname(getattr(sys.modules["__main__"], "__file__", None) or "-"), "commands.py")):
    end_silently_by_ctrl_c()

with _starting():
    import tensorflow as tf


class UserError(Exception):
    """Something the user can mend. Its text is one line: what was wrong, with the value, and what to do."""


Config = TypeVar("Config")


def flag(default: Any, text: str, choices: Sequence[str] = (), low: Optional[float] = None,
         high: Optional[float] = None, alias: str = "") -> Any:
    """A field of a command's frozen dataclass that is also a flag of the same name. Bounds are inclusive."""
    return dataclasses.field(default=default, metadata={
        "text": text, "choices": choices, "low": low, "high": high, "alias": alias})


def define_flags(config: Type[Any]) -> None:
    """Define one absl flag for each field of the dataclass `config`; its type annotation tells the flag's type."""
    types = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        known = dict(field.metadata)
        default = field.default  # type: Any
        kind = next(t for t in (bool, int, float, str) if t in (types[field.name],) + getattr(types[field.name], "__args__", ()))
        if known["choices"]:
            flags.DEFINE_string(field.name, default, "<%s>: %s" % ("|".join(known["choices"]), known["text"]))
        elif kind is bool:
            flags.DEFINE_boolean(field.name, default, known["text"])
        elif kind is str:
            flags.DEFINE_string(field.name, default, known["text"])
        else:
            define = flags.DEFINE_integer if kind is int else flags.DEFINE_float  # type: Any
            define(field.name, default, known["text"], lower_bound=known["low"], upper_bound=known["high"])
        names = [field.name]
        if known["alias"]:
            flags.DEFINE_alias(known["alias"], field.name)
            names.append(known["alias"])
        for name in names:  # so that --help of the command shows it, those that only an NPU knows at its end
            section = NPU_SECTION if known["text"].startswith("NPU: ") else sys.argv[0]
            flags.FLAGS.register_key_flag_for_module(section, flags.FLAGS[name])


def from_flags(config: Type[Config]) -> Config:
    """The flags as the user set them, as one instance of the dataclass `config`. UserError as `check`."""
    settings = config(**{field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(config)})  # type: ignore[arg-type]
    check(settings)
    return settings


def check(settings: Any) -> None:
    """UserError if a field of such a dataclass is not among its choices, not within its bounds, or not a finite number."""
    for field in dataclasses.fields(settings):
        value, known = getattr(settings, field.name), field.metadata
        if value is None or not known:
            continue
        # kind:NAME among the choices stands for any name
        if known["choices"] and not any(value == c or c[-5:] == ":NAME" and str(value).startswith(c[:-4]) for c in known["choices"]):
            raise UserError("--%s is %r; give one of %s." % (field.name, value, ", ".join(known["choices"])))
        low, high = known["low"], known["high"]
        if isinstance(value, int) and high is None:
            high = 2 ** 31 - 1  # TensorFlow's counters have 64 bits, and a run has many steps an epoch
        finite = not isinstance(value, float) or math.isfinite(value)
        if not finite or low is not None and value < low or high is not None and value > high:
            bounds = " and ".join("%s %s" % part for part in (("at least", low), ("at most", high)) if part[1] is not None)
            raise UserError("--%s is %s; give a number%s." % (field.name, value, " of " + bounds if bounds else ""))


def _parse(argv: List[str]) -> List[str]:
    """absl's parser, with its complaints in one line, and with the NPU's flags at the end of --help."""
    if {"--help", "-help", "-h", "--helpshort"} & set(argv[1:]):
        print("%s\n\n%s\n\n%s" % (sys.modules["__main__"].__doc__, *map(flags.FLAGS.module_help, (argv[0], NPU_SECTION))))
        sys.exit()
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        text = " ".join(str(error).split()).rstrip(".").replace(" ?", "?")
        sys.exit("%s: %s%s See --help." % (os.path.basename(argv[0]), text, "" if text.endswith("?") else "."))


@contextlib.contextmanager
def one_line_errors(command: str) -> Iterator[None]:
    """What the user can mend becomes one line on stderr and exit status 1."""
    try:
        yield
    except UserError as error:
        sys.exit("%s: %s" % (command, str(error).replace("\n", " ")))  # of a path's name, say
    except OSError as error:
        # A full disk, a folder that became read-only, a file that vanished: its name and the reason are the whole story.
        where = " (%s)" % str(error.filename).replace("\n", " ") if error.filename else ""
        sys.exit("%s: %s%s" % (command, error.strerror or error, where))


def run(main: Callable[[], Any]) -> None:
    """Run a command's `main` under absl, with `one_line_errors`."""

    def guarded(argv: List[str]) -> None:
        with one_line_errors(os.path.basename(argv[0])):
            if len(argv) > 1:
                raise UserError("Unexpected argument %r: settings are given as --flag=value; see --help." % argv[1])
            main()

    end_silently_by_ctrl_c()
    logging.get_absl_handler().setFormatter(Formatter(LOG_FORMAT))
    with quiet_start():
        tf.config.list_physical_devices()  # which TensorFlow does in app.run anyway, not quietly
    app.run(guarded, flags_parser=_parse)


@contextlib.contextmanager
def atomic_path(path: str) -> Iterator[str]:
    """Give a temporary name beside `path`; when the block ends well, flush that file and rename it to `path`.

    If the block raises, the temporary file is removed and what was at `path` stays whole. The temporary name keeps
    the ending of `path`, because Keras chooses a file's format by it.

    >>> import tempfile
    >>> target = os.path.join(tempfile.mkdtemp(), "a.txt")
    >>> with atomic_path(target) as name:
    ...     _ = open(name, "w").write("whole")
    >>> open(target).read()
    'whole'
    """
    folder, name = os.path.split(os.path.abspath(path))
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=".tmp-", suffix="-" + name)
        os.close(handle)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that only their owner may read
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        if isinstance(error, OSError) and (error.filename is None or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)):
            raise UserError("Could not write %s (%s); what was there before is whole." % (path, error.strerror or error))
        raise


def write_atomically(path: str, content: Union[bytes, str]) -> None:
    """Write `content` to `path`, all of it or nothing."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)


def make_folder(path: str) -> str:
    """Make the folder `path` if need be; UserError if that or writing into it is not possible."""
    try:
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError("Cannot write into the folder %s (%s); choose another." % (path, error.strerror or error))
    return path


class Stopped(KeyboardInterrupt):
    """A signal, whose number this holds, has ended a training between two steps; what it had reached is saved."""


class Signals:
    """number: that of the first signal that has come, None until then."""
    number = None  # type: Optional[int]

    def check(self) -> None:
        """Raise Stopped if a signal has come."""
        if self.number:
            raise Stopped(self.number)


@contextlib.contextmanager
def signals_noted() -> Iterator[Signals]:
    """The signals that end a process are noted, for a run to end in good order; a second one has its usual effect.

    They are those of Ctrl-C, kill, a closed terminal, and SIGUSR1, by which some schedulers warn. What is ignored stays so, as
    SIGHUP under nohup. Outside of the main thread, where Python has no handlers, none is noted.
    """
    noted = Signals()
    own = []  # type: List[int]  # noted.number may be what another worker has got
    before = {}  # type: Dict[int, Any]

    def note(number: int, frame: Any) -> None:
        signal.signal(number, before[number])
        if own:  # one of another kind, perhaps before Python could look for the first
            os.kill(os.getpid(), number)
        own.append(number)
        noted.number = noted.number or number

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, note)
    try:
        yield noted
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def write_result(path: str, result: Dict[str, Any]) -> None:
    """Write a command's figures as JSON, with the versions that they were made with."""
    versions = {"python": platform.python_version()}
    for name in ("tensorflow", "tf_keras", "keras", "numpy", "npu_device"):
        module = sys.modules.get(name)
        if module is not None and hasattr(module, "__version__"):
            versions[name] = module.__version__
    write_json(path, dict(result, versions=versions, machine=platform.machine(), cpus=os.cpu_count()))


def write_json(path: str, content: Dict[str, Any]) -> None:
    """Write `content` as readable JSON, atomically, and piece by piece: the text of a long run's figures would take gigabytes."""
    with atomic_path(path) as temporary, open(temporary, "w") as file:
        json.dump(content, file, indent=2, sort_keys=True)
        file.write("\n")
