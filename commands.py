"""What every command shares: flags from a dataclass, one-line errors, atomic files, one run a folder, quiet start.

To be imported before TensorFlow: it decides what TensorFlow prints while it starts.
"""
import contextlib
import dataclasses
import errno
import gc
import json
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

VERBOSE = "--verbose" in sys.argv
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


@contextlib.contextmanager
def signals_end_the_process() -> Iterator[None]:
    """SIGTERM and Ctrl-C end the process at once and silently, even while C++ is at work, which lets no handler of Python's run."""
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT) if main}
    ours = {number: handler for number, handler in before.items() if handler not in (None, signal.SIG_IGN)}
    for number in ours:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _starting() -> Iterator[None]:
    """For the import of TensorFlow: say on a terminal what is waited for, and be quick, quiet and easily stopped meanwhile."""
    waiting = sys.stderr.isatty() and "--quiet" not in sys.argv
    if waiting:
        sys.stderr.write("Starting TensorFlow...")
    gc.disable()  # what an import makes stays: to look for garbage in it takes a fifth of the import, and again at the end
    try:
        with quiet_start(), signals_end_the_process():
            yield
    finally:
        gc.freeze()
        gc.enable()
        if waiting:
            sys.stderr.write("\r\x1b[K")  # the line is empty again


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
            flags.DEFINE_enum(field.name, default, list(known["choices"]), known["text"])
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
        for name in names:  # so that --help of the command shows it
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])


def from_flags(config: Type[Config]) -> Config:
    """The flags as the user set them, as one instance of the dataclass `config`."""
    return config(**{field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(config)})  # type: ignore[arg-type]


def was_set(name: str) -> bool:
    """Whether the user gave the flag `name` a value, rather than leave it at its default."""
    return bool(flags.FLAGS[name].present)


def _parse(argv: List[str]) -> List[str]:
    """absl's parser, with its complaints in one line."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        text = " ".join(str(error).split()).rstrip(".").replace(" ?", "?")
        sys.exit("%s: %s%s See --help." % (os.path.basename(argv[0]), text, "" if text.endswith("?") else "."))


@contextlib.contextmanager
def one_line_errors(command: str) -> Iterator[None]:
    """What the user can mend becomes one line on stderr and exit status 1; a signal becomes one with status 128 + its number."""
    try:
        with signals() as noted, noted.interrupting():
            yield
    except UserError as error:
        sys.exit("%s: %s" % (command, error))
    except OSError as error:
        # A full disk, a folder that became read-only, a file that vanished: its name and the reason are the whole story.
        where = " (%s)" % error.filename if error.filename else ""
        sys.exit("%s: %s%s" % (command, error.strerror or error, where))
    except Interrupted as error:  # where a command has nothing to save
        number = error.args[0]
        print("%s: stopped by %s." % (command, "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name), file=sys.stderr)
        sys.exit(128 + number)


def run(main: Callable[[], Any]) -> None:
    """Run a command's `main` under absl, with `one_line_errors`."""

    def guarded(argv: List[str]) -> Any:
        with one_line_errors(os.path.basename(argv[0])):
            if len(argv) > 1:
                raise UserError("Unexpected argument %r: settings are given as --flag=value; see --help." % argv[1])
            return main()

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
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):  # which name no file
            raise UserError("Could not write %s (%s); what was there before is whole." % (path, error.strerror or error))
        raise


def write_atomically(path: str, content: Union[bytes, str]) -> None:
    """Write `content` to `path`, all of it or nothing."""
    with atomic_path(path) as temporary:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)


def make_folder(path: str) -> str:
    """Make the folder `path` if need be; UserError if that or writing into it is not possible."""
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError("Cannot write into the folder %s (%s); choose another." % (path, error.strerror or error))
    return path


class Interrupted(KeyboardInterrupt):
    """A signal, whose number this holds, came while `Signals.interrupting` was at work."""


class Signals(List[int]):
    """The numbers of the signals that have come."""

    def __init__(self) -> None:
        super().__init__()
        self._interrupts = False

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """For what is long and may be left undone: a signal raises Interrupted, and one that came before does so at once.

        Where TensorFlow is at work, it is raised when that has returned: its C++ calls Python and takes for granted that nothing
        is raised there. The process would crash, or go on as if nothing had come.
        """
        self.check()
        self._interrupts = True
        try:
            yield
            self.check()
        finally:
            self._interrupts = False

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self:
            raise Interrupted(self[0])

    def note(self, number: int, frame: Any) -> None:
        """The signals' handler. The next one of this number has its usual effect."""
        self.append(number)
        signal.signal(number, signal.SIG_DFL)
        if self._interrupts:
            caller = _caller_of_tensorflow(frame)
            if caller is None:
                self.check()
            else:  # its next line, its return or an exception in it comes when TensorFlow has returned
                caller.f_trace = self._back
                sys.settrace(lambda *_: None)

    def _back(self, frame: Any, event: str, argument: Any) -> None:
        """The trace function of TensorFlow's caller."""
        sys.settrace(None)
        if self._interrupts:
            self.check()


def _caller_of_tensorflow(frame: Any) -> Any:
    """The innermost frame on the stack from which all of TensorFlow's own are called; None if there are none."""
    caller = None
    while frame is not None:
        if frame.f_globals.get("__name__", "").split(".")[0] in ("tensorflow", "tf_keras", "keras", "npu_device"):
            caller = frame.f_back
        frame = frame.f_back
    return caller


@contextlib.contextmanager
def signals() -> Iterator[Signals]:
    """SIGTERM and Ctrl-C are noted in what this gives, for a run to end in good order; a second one ends it at once."""
    noted = Signals()
    before = {number: signal.signal(number, noted.note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def only_run_in(folder: str) -> Iterator[None]:
    """Hold the folder for this process; UserError if another run holds it. The lock ends with the process, however it ends."""
    import fcntl

    with open(os.path.join(folder, ".lock"), "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError("Another run is at work in the folder %s; wait for it, or choose another --output_dir."
                            % folder)
        yield


def write_result(path: str, result: Dict[str, Any]) -> None:
    """Write a command's figures as JSON, with the versions that they were made with."""
    versions = {"python": platform.python_version()}
    for name in ("tensorflow", "tf_keras", "keras", "numpy", "npu_device"):
        module = sys.modules.get(name)
        if module is not None and hasattr(module, "__version__"):
            versions[name] = module.__version__
    write_json(path, dict(result, versions=versions, machine=platform.machine(), cpus=os.cpu_count()))


def write_json(path: str, content: Dict[str, Any]) -> None:
    """Write `content` as readable JSON, atomically."""
    write_atomically(path, json.dumps(content, indent=2, sort_keys=True) + "\n")
