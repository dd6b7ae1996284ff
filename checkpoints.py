"""What is kept: weight files that travel between versions and encoders' users, and the training state to resume from.

A checkpoint is TensorFlow's own, in the folder `checkpoints`, plus a file of SHA-256 sums that is written last. So
one without sums was cut off while it was written, and one whose sums do not fit is damaged; neither is used.
"""
import collections
import glob
import hashlib
import json
import os
import shutil
from typing import Any, Container, Dict, List, Optional, Tuple

import numpy as np
import tensorflow as tf
from absl import logging

import commands
from commands import UserError

SUMS = ".sha256.json"


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

    def __init__(self, folder: str, state: Dict[str, Any], keep: int) -> None:
        self._folder = folder
        self._checkpoint = tf.train.Checkpoint(**state)
        self._manager = tf.train.CheckpointManager(self._checkpoint, folder, max_to_keep=keep)

    def save(self, step: int) -> str:
        """Write the state as of `step` and drop the oldest beyond `keep`. UserError if the disk will not take it."""
        try:
            path = str(self._manager.save(checkpoint_number=step))
            files = [name for name in sorted(glob.glob(glob.escape(path) + ".*")) if not name.endswith(SUMS)]
            for name in files:  # on the disk, not only in its cache, before the sums vouch for them
                with open(name, "rb+") as file:
                    os.fsync(file.fileno())
            commands.write_json(path + SUMS, {os.path.basename(name): _sha256(name) for name in files})
        except (OSError, tf.errors.OpError) as error:
            self._remove_unfinished()
            raise UserError("Could not write the checkpoint of step %d into %s (%s); the earlier ones are whole. Make room, then "
                            "start the same command again." % (step, self._folder, _first_line(error)))
        self._remove_unfinished()
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
            raise UserError("None of the %d checkpoints in %s is whole; restore them from a copy, or start anew with --noresume "
                            "--overwrite." % (len(found), self._folder))
        return None

    def _remove_unfinished(self) -> None:
        """Remove what a write that was cut off left behind, and the sums of checkpoints that have been dropped."""
        keep = {os.path.basename(path) for path in self._manager.checkpoints}
        for name in os.listdir(self._folder):
            stem = name.split(".")[0].split("_temp")[0]
            whole = stem in keep and os.path.exists(os.path.join(self._folder, stem + SUMS))
            if stem.startswith("ckpt-") and not whole:
                remove(os.path.join(self._folder, name))


def claim_folder(output_dir: str, settings: Dict[str, Any], free: Container[str], resume: bool, overwrite: bool) -> None:
    """Write config.json; UserError if the folder holds a run that this one must neither continue nor overwrite.

    settings: all that the run is made with; those named in `free` may differ from those of the run to continue.
    """
    path = os.path.join(output_dir, "config.json")
    folder = os.path.join(output_dir, "checkpoints")
    if not resume:
        results = sorted(name for name in os.listdir(output_dir)
                         if name in ("config.json", "losses.txt", "checkpoints") or name.startswith("f_online_"))
        if results and not overwrite:
            raise UserError("--noresume, but %s holds an earlier run (%s); add --overwrite, or choose another --output_dir."
                            % (output_dir, ", ".join(results)))
        for name in results:
            remove(os.path.join(output_dir, name))
    elif os.path.isdir(folder) and finished(folder):
        try:
            with open(path) as file:
                before = json.load(file)
        except (OSError, ValueError) as error:
            raise UserError("%s cannot be read (%s), so this run cannot tell whether it may go on from the checkpoints beside it; "
                            "restore it, or start anew with --noresume --overwrite." % (path, _first_line(error)))
        differing = ["%s was %s, is %s" % (name, before.get(name), settings[name])
                     for name in sorted(settings) if name not in free and before.get(name) != settings[name]]
        if differing:
            raise UserError("The run in %s was made with other settings (%s); give the same, or choose another --output_dir."
                            % (output_dir, "; ".join(differing)))
    commands.write_json(path, settings)


def remove(path: str) -> None:
    """Remove a file, or a folder with all that it holds."""
    if os.path.isdir(path):
        shutil.rmtree(path)
    else:
        os.remove(path)


def finished(folder: str) -> List[str]:
    """Paths of the checkpoints in `folder` that were written to their end, newest first."""
    names = [name[:-len(SUMS)] for name in os.listdir(folder) if name.startswith("ckpt-") and name.endswith(SUMS)]
    return [os.path.join(folder, name) for name in sorted(names, key=lambda name: -int(name.split("-")[1]))]


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
    return str(error).strip().split("\n")[0] or type(error).__name__


# Weight files

def save_weights(network: Any, path: str) -> None:
    """Write a network's weights as Keras 2's HDF5 file, all of it or nothing."""
    with commands.atomic_path(path) as temporary:
        network.save_weights(temporary, save_format="h5")


def load_weights(network: Any, path: str) -> None:
    """Read the weights of an encoder from a Keras 2 HDF5 file into `network`.

    Layers are matched by their order and shape, not by name or nesting, so that files fit which another program's
    ResNet of the same architecture saved. UserError, and `network` untouched, if the file is not whole or not of this
    architecture and width.
    """
    wanted = _layers((weight.name, weight) for weight in network.trainable_weights + network.non_trainable_weights)
    given = _layers(_read(path))
    pairs = _match(wanted, given)
    if pairs is None:
        raise UserError("%s holds the weights of %s, but they are to go into %s: give the --encoder and --width_multiplier that it "
                        "was made with." % (path, _describe(given), _describe(wanted)))
    for variable, array in pairs:
        variable.assign(array)


def _read(path: str) -> List[Tuple[str, np.ndarray]]:
    """(group/name, array) of each weight in a Keras HDF5 file, in the file's order. UserError if it is none."""
    import h5py

    if not os.path.isfile(path):
        raise UserError("There is no weights file %s; pretraining.py writes f_online_<epoch>.h5 into its --output_dir." % path)
    try:
        with h5py.File(path, "r") as file:
            root = file["model_weights"] if "model_weights" in file else file
            return [("%s|%s" % (_text(group), _text(name)), np.array(root[_text(group)][_text(name)]))
                    for group in root.attrs["layer_names"] for name in root[_text(group)].attrs["weight_names"]]
    except (OSError, KeyError, ValueError, RuntimeError, TypeError) as error:
        raise UserError("%s is not a whole Keras weights file in HDF5 (%s); copy or save it again."
                        % (path, _first_line(error).strip("'\"")))


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


Layers = List[Tuple[Dict[str, Any], Dict[str, Any]]]


def _layers(weights: Any) -> Layers:
    """Weights in order -> (convolution, the BatchNorm after it) pairs in order, each a dict from 'kernel' etc. to the weight."""
    by_layer = collections.OrderedDict()  # type: Dict[str, Dict[str, Any]]
    for name, weight in weights:
        layer, _, kind = name.rpartition("/")
        by_layer.setdefault(layer, {})[kind.split(":")[0]] = weight
    convolutions = [layer for layer in by_layer.values() if "kernel" in layer]
    norms = [layer for layer in by_layer.values() if "gamma" in layer]
    return list(zip(convolutions, norms)) if len(convolutions) == len(norms) else []


def _match(wanted: Layers, given: Layers) -> Optional[List[Tuple[tf.Variable, np.ndarray]]]:
    """Pair the weights, or None. A block's shortcut may stand before its other convolutions: shapes tell it apart."""
    left = list(given)
    pairs = []
    for layers in wanted:
        place = next((i for i, other in enumerate(left[:3]) if _shapes(other) == _shapes(layers)), None)
        if place is None:
            return None
        for layer, other in zip(layers, left.pop(place)):
            pairs += [(weight, other[kind]) for kind, weight in layer.items()]
    return pairs if not left and pairs else None


def _shapes(layers: Tuple[Dict[str, Any], Dict[str, Any]]) -> List[Dict[str, Tuple[int, ...]]]:
    return [{kind: tuple(weight.shape) for kind, weight in layer.items()} for layer in layers]


def _describe(layers: Layers) -> str:
    """For example: resnet18 with width_multiplier 0.25."""
    names = {20: "resnet18", 36: "resnet34"}
    if len(layers) not in names:
        return "no encoder known here (%d convolutions with BatchNorm)" % len(layers)
    return "%s with width_multiplier %g" % (names[len(layers)], layers[0][0]["kernel"].shape[-1] / 64)
