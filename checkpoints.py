"""The training state to resume from.

A checkpoint is TensorFlow's own, in the folder `checkpoints`, plus a file of SHA-256 sums that is written last. So
one without sums was cut off while it was written, and one whose sums do not fit is damaged; neither is used.
"""
import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
from typing import Any, Container, Dict, List, Optional

import numpy as np
import tensorflow as tf
from absl import logging

import commands
from commands import UserError

SUMS = ".sha256.json"
RESULTS = ("config.json", "losses.txt", "metrics.json", "result.json", "views.png", "checkpoints")


class History(tf.train.experimental.PythonState):
    """What a run has seen so far: every batch's loss, the figures of each log line, each k-NN accuracy. Saved as JSON."""

    def __init__(self) -> None:
        super().__init__()
        self.losses = []  # type: List[float]
        self.log = []  # type: List[Dict[str, float]]
        self.knn = []  # type: List[Dict[str, float]]

    def serialize(self) -> str:
        return json.dumps({"losses": self.losses, "log": self.log, "knn": self.knn})

    def deserialize(self, string_value: Any) -> None:
        text = string_value.decode() if isinstance(string_value, bytes) else string_value
        self.__dict__.update(json.loads(text))


class Checkpoints:
    """The training state on disk: `save` it, `restore` the newest that is whole.

    state: name -> trackable object (tf.Module, optimiser, Variable, History), all of it restored to the bit.
    """

    def __init__(self, folder: str, state: Dict[str, Any], history: History, keep: int) -> None:
        state = dict(state, history=history)
        os.makedirs(folder, exist_ok=True)
        self._folder = folder
        self._keep = keep
        self._checkpoint = tf.train.Checkpoint(**state)
        # The manager drops old ones before the new one's sums vouch for it, so it must have none to drop: `save` does.
        most = max(keep, len(finished(folder))) + 1
        try:
            self._manager = tf.train.CheckpointManager(self._checkpoint, folder, max_to_keep=most)
        except (ValueError, tf.errors.OpError):  # TensorFlow's own list of checkpoints is damaged; the sums are what counts here
            os.remove(os.path.join(folder, "checkpoint"))
            self._manager = tf.train.CheckpointManager(self._checkpoint, folder, max_to_keep=most)

    def save(self, step: int) -> str:
        """Write the state as of `step` and drop the oldest beyond `keep`. UserError if the disk will not take it."""
        path = os.path.join(self._folder, "ckpt-%d" % step)
        try:
            if os.path.exists(path + SUMS):  # a damaged one, or this run would not be at this step again
                os.remove(path + SUMS)
            self._manager.save(checkpoint_number=step)
            files = [name for name in sorted(glob.glob(glob.escape(path) + ".*"))
                     if re.search(r"\.(index|data-\d+-of-\d+)$", name)]
            for name in files:  # on the disk, not only in its cache, before the sums vouch for them
                with open(name, "rb+") as file:
                    os.fsync(file.fileno())
            commands.write_json(path + SUMS, {os.path.basename(name): _sha256(name) for name in files})
        except (OSError, UserError, tf.errors.OpError) as error:
            with contextlib.suppress(OSError):
                remove_unfinished(self._folder)
            raise UserError("Could not write the checkpoint of step %d into %s (%s); the earlier ones are whole. Make room, "
                            "then start the same command again." % (step, self._folder, _first_line(error)))
        # One of a later step is damaged: had it been whole, the run would have gone on from it.
        numbers = [number for number in map(_step, finished(self._folder)) if number <= step]
        for other in finished(self._folder):
            if _step(other) not in numbers[:self._keep]:
                os.remove(other + SUMS)
        remove_unfinished(self._folder)
        return path

    def restore(self) -> Optional[str]:
        """Restore the newest checkpoint that is whole and give its path; None if none was ever finished.

        Damaged ones are named in a warning. UserError if there are some and all are damaged.
        """
        found = finished(self._folder)
        for path in found:
            problem = _damage(path)
            if problem is None:
                self._checkpoint.restore(path).assert_consumed()
                return path
            logging.warning("The checkpoint %s is damaged (%s); trying the one before it.", path, problem)
        if found:
            raise UserError("None of the %d checkpoints in %s is whole; restore them from a copy, or start anew with "
                            "--noresume --overwrite." % (len(found), self._folder))
        return None


def all_finite(variables: Any) -> bool:
    """Whether all of them are finite."""
    return all(bool(np.isfinite(variable.numpy()).all()) for variable in variables)


def remove_unfinished(folder: str) -> None:
    """Remove from the folder `checkpoints` what belongs to none that was finished, as a write leaves it that was cut off."""
    whole = {os.path.basename(path) for path in finished(folder)}
    for name in os.listdir(folder):
        match = re.match(r"(ckpt-\d+)(\.index|\.data-\d+-of-\d+|%s)$" % re.escape(SUMS), name)
        ours = name.startswith(("ckpt-", ".tmp-", "checkpoint.tmp"))
        if ours and not (match and match.group(1) in whole):
            remove(os.path.join(folder, name))


def claim_folder(output_dir: str, settings: Dict[str, Any], free: Container[str], resume: bool, overwrite: bool) -> None:
    """Write config.json; UserError if the folder holds a run that this one must neither continue nor overwrite.

    settings: all that the run is made with; those named in `free` may differ from those of the run to continue.
    """
    path = os.path.join(output_dir, "config.json")
    folder = os.path.join(output_dir, "checkpoints")
    if not resume:
        results = sorted(name for name in os.listdir(output_dir) if name in RESULTS or name.startswith("f_online_"))
        if results and not overwrite:
            raise UserError("--noresume, but %s holds an earlier run (%s); add --overwrite, or choose another --output_dir."
                            % (output_dir, ", ".join(results)))
        curves = glob.glob(os.path.join(glob.escape(output_dir), "logs", "events.out.tfevents.*"))
        for name in curves + [os.path.join(output_dir, name) for name in results]:
            remove(name)
    elif not os.path.isdir(folder) or not finished(folder):
        if os.path.exists(os.path.join(output_dir, "losses.txt")):  # which comes after the first checkpoint
            raise UserError("%s has the losses.txt of an earlier run, but no finished checkpoint to go on from; restore the folder "
                            "checkpoints from a copy, choose another --output_dir, or start anew with --noresume --overwrite."
                            % output_dir)
    else:
        try:
            with open(path) as file:
                before = dict(json.load(file))
        except (OSError, ValueError, TypeError) as error:
            raise UserError("%s cannot be read (%s), so this run cannot tell whether it may go on from the checkpoints beside it; "
                            "restore it, or start anew with --noresume --overwrite." % (path, _first_line(error)))
        differing = ["%s was %s, is %s" % (name, before.get(name), settings[name])
                     for name in sorted(settings) if name not in free and before.get(name) != settings[name]]
        if differing:
            raise UserError("The run in %s was made with other settings (%s); give the same, or choose another --output_dir."
                            % (output_dir, "; ".join(differing)))
    for name in os.listdir(output_dir):  # what a run that was killed had not finished
        if re.match(r"\.tmp-\w{8}-(%s|f_online_\w+\.h5)$" % "|".join(map(re.escape, RESULTS)), name):
            os.remove(os.path.join(output_dir, name))
    if os.path.isdir(folder):
        remove_unfinished(folder)
    commands.write_json(path, settings)


def remove(path: str) -> None:
    """Remove a file, or a folder with all that it holds."""
    if os.path.isdir(path):
        shutil.rmtree(path)
    else:
        os.remove(path)


def finished(folder: str) -> List[str]:
    """Paths of the checkpoints in `folder` that were written to their end, newest first."""
    names = [name[:-len(SUMS)] for name in os.listdir(folder) if re.match(r"ckpt-\d+%s$" % re.escape(SUMS), name)]
    return sorted((os.path.join(folder, name) for name in names), key=_step, reverse=True)


def _step(path: str) -> int:
    return int(path.rpartition("-")[2])


def _damage(path: str) -> Optional[str]:
    """What is wrong with the checkpoint at `path`, or None."""
    try:
        with open(path + SUMS) as file:
            sums = json.load(file)
        for name, expected in sums.items():
            if _sha256(os.path.join(os.path.dirname(path), name)) != expected:
                return "%s has changed since it was written" % name
        return None if sums else "its list of sums is empty"
    except (OSError, ValueError, AttributeError) as error:
        return _first_line(error)


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 22), b""):
            digest.update(block)
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    text = re.sub(r"^\{\{.*?\}\} ?", "", str(error).strip())  # TensorFlow begins with the node that failed
    return text.split("\n")[0] or type(error).__name__
