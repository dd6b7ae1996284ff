"""The training state on disk, from which a run goes on to the bit.

The checkpoint of a step is TensorFlow's own, ckpt-<step>.index and .data-*, in which each tensor has its checksum. Beside it
stands ckpt-<step>.json with the run's History and checksums of the index and of itself. It is written last: without it a
checkpoint is not finished. In a long run it has only the latest History: what is older stands, written once, in
history-<step>.json for all checkpoints that come after, so that one takes no longer late in a run than early. The folder is
marked as this program's, and only what bears such names in it is ever removed.
"""
import contextlib
import glob
import itertools
import json
import os
import re
import shutil
import zlib
from typing import Any, Callable, Container, Dict, Iterator, List, Optional, Sequence

import tensorflow as tf
from absl import logging

import commands
from commands import UserError

MARK = "about-this-folder.txt"
MARK_TEXT = "Training checkpoints of pretraining.py (BYOL), which removes files named ckpt-<number> from here as it goes on.\n"
SUMS = ".sha256.json"  # instead of .json in the layout before this one, which had the History among the tensors
HISTORY = "history/.ATTRIBUTES/py_state"  # and there by this name
FILES = re.compile(r"(?:\.tmp-\w{8}-)?ckpt-(0|[1-9][0-9]*)(_temp|(\.index|\.data-\d+-of-\d+)(\.tempstate\d+)?|(\.sha256)?\.json)$"
                   r"|checkpoint(\.tmp\w*)?$")  # the latter is a list that TensorFlow kept in the layout before
PART = 20000  # steps after which a part of the History gets a file of its own
PARTS = re.compile(r"(?:\.tmp-\w{8}-)?history-([1-9][0-9]*)\.json$")
RESULTS = r"(config\.json|losses\.txt|metrics\.json|result\.json|views\.png|f_online_(step_)?\d+\.h5)$"
CURVES = os.path.join("logs", "events.out.tfevents.*.byol")  # as progress.Curves names them
OUR_SETTINGS = {"encoder", "target_momentum", "images_crc"}  # in its config.json, and hardly in another's
DAMAGE = (OSError, ValueError, LookupError, TypeError, RuntimeError, AssertionError, tf.errors.OpError)  # how it may show


class History:
    """What a run has seen so far: every batch's loss, the figures of each log line, each k-NN accuracy.

    skipped: the numbers, from 1, of the steps that left the weights alone because of an overflow under loss scaling.
    """

    def __init__(self) -> None:
        self.losses = []  # type: List[float]
        self.log = []  # type: List[Dict[str, float]]
        self.knn = []  # type: List[Dict[str, float]]
        self.skipped = []  # type: List[int]

    def after(self, step: int) -> Dict[str, List[Any]]:
        """The part of it that came after this step; after step 0: all. In time that depends on that part alone."""
        if step == 0:
            return dict(vars(self))

        def latest(figures: List[Any], step_of: Callable[[Any], int]) -> List[Any]:
            return list(itertools.takewhile(lambda each: step_of(each) > step, reversed(figures)))[::-1]

        return {"losses": self.losses[step:], "log": latest(self.log, lambda line: int(line["step"])),
                "knn": latest(self.knn, lambda line: int(line["step"])), "skipped": latest(self.skipped, int)}

    def take(self, parts: Sequence[Dict[str, List[Any]]]) -> None:
        """Become what these parts are together."""
        for name in vars(self):
            setattr(self, name, [each for part in parts for each in part.get(name, [])])


@tf.function
def all_finite(network: Any) -> tf.Tensor:
    """Whether all numbers of its `weights` are finite: a bool scalar. One graph, made at the first call with this network.

    (Given the weights themselves, it would make one at each call in mixed precision: Keras's variables are not known again there.)
    """
    return tf.reduce_all([tf.reduce_all(tf.math.is_finite(weight)) for weight in network.weights])


class Checkpoints:
    """The training state on disk: `save` it, `restore` the newest that is whole.

    state: name -> trackable object (tf.Module, optimiser, Variable), all of it, and `history`, restored to the bit.
    """

    def __init__(self, folder: str, state: Dict[str, Any], history: History, keep: int) -> None:
        self._folder, self._history, self._keep = folder, history, keep
        self._checkpoint = tf.train.Checkpoint(**state)
        self._parts = []  # type: List[List[int]]  # of the History, that have files: the step each goes up to, and its checksum

    def save(self, step: int) -> str:
        """Write the state as of `step` and drop the oldest beyond `keep`. UserError if the disk will not take it."""
        own(self._folder)
        path = os.path.join(self._folder, "ckpt-%d" % step)
        # One of this step or a later one is damaged: had it been whole, the run would have gone on from it.
        before = [number for number in map(_step, finished(self._folder)) if number < step]
        try:
            _remove(self._folder, before)
            with for_tensorflow(path) as prefix:
                self._checkpoint.write(prefix)
            for name in glob.glob(glob.escape(path) + ".*"):  # on the disk, not only in its cache, before the JSON vouches for it
                with open(name, "rb+") as file:
                    os.fsync(file.fileno())
            packed = self._parts[-1][0] if self._parts else 0
            if step - packed >= PART:
                text = _sealed(self._history.after(packed))
                commands.write_atomically(_part(self._folder, step), text)
                self._parts, packed = self._parts + [[step, zlib.crc32(text.encode())]], step
            content = {"history": self._history.after(packed), "index": _crc_of_index(path)}
            commands.write_atomically(path + ".json", _sealed(dict(content, parts=self._parts) if self._parts else content))
        except (OSError, UserError, tf.errors.OpError) as error:
            with contextlib.suppress(OSError):
                _remove(self._folder, before)
            raise UserError("Could not write the checkpoint of step %d into %s (%s); %s. Make room, then start the same command again."
                            % (step, self._folder, _first_line(error),
                               "the earlier ones are whole" if before else "there is none from before"))
        _remove(self._folder, [step] + before[:self._keep - 1])
        return path

    def restore(self) -> Optional[str]:
        """Restore the newest checkpoint that is whole and give its path; None if none was ever finished.

        Damaged ones are named in a warning. UserError if there are some and all are damaged.
        """
        found = finished(self._folder)
        for path in found:
            try:
                content = _vouched(path)
                with for_tensorflow(path) as prefix:
                    if "history" not in content:
                        content["history"] = json.loads(tf.train.load_checkpoint(prefix).get_tensor(HISTORY))
                    self._checkpoint.read(prefix).assert_existing_objects_matched().expect_partial()
                self._history.take([_history_in(self._folder, *part) for part in content.get("parts", [])] + [content["history"]])
                self._parts = content.get("parts", [])
                return path
            except DAMAGE as error:
                logging.warning("The checkpoint %s is damaged (%s); trying the one before it.", path, _first_line(error))
        if found:
            raise UserError("None of the %d checkpoints in %s is whole; restore them from a copy, or start anew with "
                            "--noresume --overwrite." % (len(found), self._folder))
        return None


@contextlib.contextmanager
def only_run_in(folder: str) -> Iterator[None]:
    """Hold the folder for this process; UserError if another run holds it. The lock ends with the process, however it ends.

    Where the file system knows no locks, as some of a network do, that is warned of.
    """
    import fcntl

    with open(os.path.join(folder, ".lock"), "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError("Another run is at work in the folder %s; wait for it, or choose another --output_dir." % folder)
        except OSError as error:
            logging.warning("%s cannot be locked (%s); see to it that no other run is started in it.", folder, error.strerror)
        yield


def claim_folder(output_dir: str, settings: Dict[str, Any], free: Container[str], resume: bool, overwrite: bool,
                 defaults: Optional[Dict[str, Any]] = None) -> None:
    """Write config.json; UserError if the folder holds a run that this one must neither continue nor overwrite, or another's files.

    settings: all that the run is made with; those named in `free` may differ from those of the run to continue. defaults: what was in
    force for settings that an earlier version did not have.
    """
    try:
        output_dir.encode()
    except UnicodeEncodeError:
        raise UserError("The name of the folder %a is not UTF-8, or not so in this locale, and TensorFlow cannot write there; choose "
                        "another --output_dir, or set LC_ALL=C.UTF-8." % output_dir)
    path, folder = os.path.join(output_dir, "config.json"), os.path.join(output_dir, "checkpoints")
    before, begun, done = _settings(path), _is_ours(folder), finished(folder)
    results = sorted(name for name in os.listdir(output_dir) if re.match(RESULTS, name))
    if results and not (before or begun):
        raise UserError("%s holds %s, but no config.json that shows them to be of a run of this program; move them away, or choose "
                        "another --output_dir." % (output_dir, ", ".join(results)))
    if not resume:
        if (results or begun) and not overwrite:
            raise UserError("--noresume, but %s holds an earlier run (%s); add --overwrite, or choose another --output_dir."
                            % (output_dir, ", ".join(results + ["checkpoints"] * begun)))
        for name in glob.glob(os.path.join(glob.escape(output_dir), CURVES)) + [os.path.join(output_dir, name) for name in results]:
            os.remove(name)
    elif not done and "losses.txt" in results:  # which comes after the first checkpoint
        raise UserError("%s has the losses.txt of an earlier run, but no finished checkpoint to go on from; restore the folder "
                        "checkpoints from a copy, choose another --output_dir, or start anew with --noresume --overwrite."
                        % output_dir)
    elif done and not before:
        raise UserError("%s is gone, so this run cannot tell whether it may go on from the checkpoints beside it; restore it, or "
                        "start anew with --noresume --overwrite." % path)
    elif done:
        then = dict(defaults or {}, **before)
        differing = ["%s was %s, is %s" % (name, then.get(name), settings[name])
                     for name in sorted(settings) if name not in free and then.get(name) != settings[name]]
        if differing:
            raise UserError("The run in %s was made with other settings (%s); give the same, or choose another --output_dir."
                            % (output_dir, "; ".join(differing)))
    own(folder)
    _remove(folder, list(map(_step, done)) if resume else [])
    for name in os.listdir(output_dir):  # what a run that was killed had not finished
        if re.match(r"\.tmp-\w{8}-" + RESULTS, name):
            os.remove(os.path.join(output_dir, name))
    commands.write_json(path, settings)


def own(folder: str) -> None:
    """Make `folder` for checkpoints and mark it as this program's. UserError if it holds what another has written."""
    if not os.path.exists(os.path.join(folder, MARK)):
        _is_ours(folder)
        os.makedirs(folder, exist_ok=True)
        commands.write_atomically(os.path.join(folder, MARK), MARK_TEXT)


def finished(folder: str) -> List[str]:
    """Paths of the checkpoints in `folder` that were written to their end, newest first; none if there is no folder."""
    matches = map(re.compile(r"(ckpt-(?:0|[1-9][0-9]*))(\.sha256)?\.json$").match, os.listdir(folder) if os.path.isdir(folder) else [])
    return sorted({os.path.join(folder, match.group(1)) for match in matches if match}, key=_step, reverse=True)


def _settings(path: str) -> Dict[str, Any]:
    """What an earlier run wrote as config.json, {} if there is none. UserError if it is damaged or another program's."""
    try:
        with open(path) as file:
            settings = dict(json.load(file))
        if OUR_SETTINGS <= set(settings):
            return settings
        problem = "it lacks " + ", ".join(sorted(OUR_SETTINGS - set(settings)))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        problem = _first_line(error)
    raise UserError("%s is damaged, or not of a run of this program (%s); restore it or move it away, or choose another --output_dir."
                    % (path, problem))


def _is_ours(folder: str) -> bool:
    """Whether `folder` is marked as this program's or holds a checkpoint of it; UserError if it holds anything else."""
    names = sorted(name for name in os.listdir(folder) if not name.startswith(".")) if os.path.isdir(folder) else []
    if MARK in names or not names:
        return bool(names)
    done = finished(folder)
    steps = {int(match.group(1)) for match in map(FILES.match, names) if match and match.group(1)}
    for path in done if steps == set(map(_step, done)) else []:  # what was cut off in an unmarked folder may be another's
        with contextlib.suppress(*DAMAGE):
            _vouched(path)
            return True
    raise UserError("%s holds files that this program is not known to have written (%s); move them away, or choose another "
                    "--output_dir." % (folder, ", ".join(names[:5] + ["..."] * (len(names) > 5))))


def _remove(folder: str, keep: Sequence[int]) -> None:
    """Remove from `folder` what this program has written there, except checkpoints of the steps `keep` and what they need."""
    for name in sorted(os.listdir(folder), key=lambda name: (not name.endswith(".json"), name)):  # what vouches for others first
        match, part = FILES.match(name), PARTS.match(name)
        if match and int(match.group(1) or -1) not in keep or part and (name[0] == "." or int(part.group(1)) > max(keep, default=0)):
            path = os.path.join(folder, name)
            if os.path.isdir(path):
                shutil.rmtree(path)
            else:
                os.remove(path)


def _step(path: str) -> int:
    return int(path.rpartition("-")[2])


def _sealed(content: Dict[str, Any]) -> str:
    """JSON of `content` and its checksum."""
    text = json.dumps(content)
    return '{"crc32": %d, "content": %s}\n' % (zlib.crc32(text.encode()), text)


def _vouched(path: str) -> Dict[str, Any]:
    """What the JSON of the checkpoint at `path` holds: no history in the layout before. One of DAMAGE if it is not whole."""
    old = not os.path.exists(path + ".json")
    with open(path + (SUMS if old else ".json")) as file:
        text = file.read()
    content = json.loads(text)
    if old:
        return {"sha256": content[os.path.basename(path) + ".index"]}
    if _sealed(content["content"]) != text:
        raise ValueError("its JSON has changed since it was written")
    if content["content"]["index"] != _crc_of_index(path):
        raise ValueError("its index has changed since it was written")
    return dict(content["content"])


def _part(folder: str, step: int) -> str:
    return os.path.join(folder, "history-%d.json" % step)


def _history_in(folder: str, step: int, checksum: int) -> Dict[str, Any]:
    """A part of the History; one of DAMAGE if it is not as it was written."""
    with open(_part(folder, step), "rb") as file:
        text = file.read()
    if zlib.crc32(text) != checksum:
        raise ValueError("%s has changed since it was written" % os.path.basename(_part(folder, step)))
    return dict(json.loads(text.decode())["content"])


def _crc_of_index(path: str) -> int:
    with open(path + ".index", "rb") as file:
        return zlib.crc32(file.read())


@contextlib.contextmanager
def for_tensorflow(path: str) -> Iterator[str]:
    """A name for `path` without what is in its folder's: TensorFlow takes [ and * there for patterns."""
    folder, name = os.path.split(path)
    handle = os.open(folder, os.O_RDONLY)
    try:
        plain = "/proc/self/fd/%d" % handle
        yield os.path.join(plain if os.path.isdir(plain) else folder, name)
    finally:
        os.close(handle)


def _first_line(error: BaseException) -> str:
    text = re.sub(r"^\{\{.*?\}\} ?|/proc/self/fd/\d+/", "", str(error).strip())  # TensorFlow begins with the node that failed
    return text.split("\n")[0] or type(error).__name__
