"""What a pretraining has left in its folder, read so that what is damaged is left out and told."""
import glob
import json
import os
import re
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import numpy as np

import reading
import recipes
from commands import UserError

HUGE = 1e30  # what is larger is no figure of a run, and more than charts can show
OUTPUTS = 128  # of the heads; early versions did not write it
FIGURES = ("step", "spread", "learning_rate", "images_per_second")  # of a log line
BOUNDS = {"step": (0, HUGE), "accuracy": (0, 1), "label_fraction": (0, 1)}
MEASURES = ("linear", "k-NN", "fine-tuned")  # in their order on the page


class Accuracy(NamedTuple):
    """value: in [0, 1]. of: the weights file or the epoch."""
    value: float
    of: str


class Run:
    """What a run's folder holds. UserError if it holds no run, or one whose settings or losses cannot be read.

    losses: (steps,), nan for what is not a finite number.
    log, knn: name -> values, from the lines of metrics.json that are whole.
    readings: how to read the curves that there is something to draw for.
    accuracies: what was measured -> {False: with random weights, True: with trained ones}, either or both.
    notes: what is damaged and was left out.
    """

    def __init__(self, folder: str) -> None:
        if not os.path.isdir(folder):
            raise UserError("There is no folder %s; give the --output_dir of a pretraining." % folder)
        self.folder = folder
        self.name = os.path.basename(os.path.abspath(folder))
        self.notes = []  # type: List[str]
        self.config = _read_json(self.path("config.json"))
        known = dict({"train_images": 50000}, **self.config)  # which early versions did not write
        for name, kind in (("encoder", str), ("batch_size", int), ("num_epochs", int), ("train_images", int)):
            if type(known.get(name)) is not kind or kind is int and not 0 < known[name] < HUGE:
                raise UserError("%s holds no run: %s is %s in its config.json; give the --output_dir of a pretraining."
                                % (folder, name, short(known[name], 60) if name in known else "missing"))
        self.num_epochs = known["num_epochs"]  # type: int
        self.steps_per_epoch = max(1, known["train_images"] // known["batch_size"])
        self.losses = self._losses()
        metrics = self._json(self.path("metrics.json"))
        self.log = self._lines(metrics, "log", FIGURES)
        self.knn = self._lines(metrics, "knn", ("step", "accuracy"))
        self.result = self._json(self.path("result.json"))
        self.readings = self._readings()
        self.accuracies = self._accuracies()

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def _losses(self) -> np.ndarray:
        try:
            with open(self.path("losses.txt")) as file:
                losses = np.array([float(word) for word in file.read().split()])
        except FileNotFoundError:
            losses = np.array([])
        except (OSError, ValueError) as error:
            raise UserError("%s is damaged (%s)." % (self.path("losses.txt"), short(error, 100)))
        if not len(losses):
            raise UserError("The run in %s has no losses yet: they are written with its first checkpoint, at the latest at the "
                            "end of its first epoch." % self.folder)
        return np.where(np.abs(losses) < HUGE, losses, np.nan)

    def _json(self, path: str) -> Dict[str, Any]:
        """What a JSON file holds; nothing, and a note, if it is damaged."""
        try:
            return _read_json(path)
        except UserError as error:
            self.notes.append("%s What it holds is left out." % error)
            return {}

    def _lines(self, metrics: Dict[str, Any], key: str, names: Sequence[str]) -> Dict[str, List[float]]:
        """name -> its values in those lines in which all are such as they can be; nothing without lines. A note on the others."""
        lines = metrics.get(key, [])
        lines = lines if isinstance(lines, list) else [lines]
        whole = [line for line in lines if isinstance(line, dict) and all(_can_be(name, line.get(name)) for name in names)]
        if len(whole) < len(lines):
            self.notes.append("Left out of metrics.json: %d of %d lines of %s, which are damaged."
                              % (len(lines) - len(whole), len(lines), key))
        return {name: [float(line[name]) for line in whole] for name in names} if whole else {}

    def epochs(self, steps: Any) -> np.ndarray:
        return np.asarray(steps, np.float64) / self.steps_per_epoch

    def state(self) -> str:
        """How far it has come, in a sentence."""
        return "It has trained for %d of %d epochs (%d steps)%s." % (
            len(self.losses) // self.steps_per_epoch, self.num_epochs, len(self.losses), "" if self.result else " and is not finished")

    def comparable(self) -> bool:
        """Whether the published losses are of such a run, by ModelZoo's recipe."""
        settings = dict(recipes.MODELZOO, **self.config)  # early versions had no other recipe
        return all(settings.get(name) == value for name, value in dict(
            recipes.MODELZOO, encoder="resnet18", width_multiplier=1.0, batch_size=512, dataset="cifar10",
            encoder_weights=None).items())

    def began_with(self) -> Optional[str]:
        """The weights that its encoder began with, by their name; None: random ones."""
        path = self.config.get("encoder_weights")
        return None if path is None else os.path.basename(short(path))

    def even_spread(self) -> float:
        """The spread that its projections would have if they were spread evenly."""
        outputs = self.config.get("head_features")
        return reading.even_spread(outputs if type(outputs) is int and 0 < outputs < HUGE else OUTPUTS)

    def weights(self) -> Optional[str]:
        """The newest of the encoder's weight files."""
        return newest_weights(self.folder, self.steps_per_epoch)

    def _readings(self) -> Dict[str, reading.Reading]:
        told, log, knn = {}, self.log, self.knn
        if log:
            told["spread"] = reading.spread(log["step"], log["spread"], self.even_spread())
            told["learning_rate"] = reading.learning_rate(log["learning_rate"])
            told["speed"] = reading.speed(log["images_per_second"])
        if knn:
            told["knn"] = reading.knn(knn["step"], knn["accuracy"], len(self.losses), self.began_with() or "random weights")
        told["loss"] = reading.loss(self.losses, "spread" in told and told["spread"].kind == "collapsed")
        told["first_batches"] = reading.first_batches(self.losses, self.comparable())
        return told

    def _accuracies(self) -> Dict[str, Dict[bool, Accuracy]]:
        """Those of metrics.json, then those of result_*.json here and in folders in here that hold no run of their own.

        An encoder that comes with the program, which has a name instead of a file, gets rows of its own.
        """
        found, named = {}, {}  # type: Dict[str, Dict[bool, Accuracy]], Dict[str, Dict[str, Accuracy]]
        for step, value in zip(self.knn.get("step", []), self.knn.get("accuracy", [])):
            found.setdefault("k-NN", {})[step > 0 or self.began_with() is not None] = Accuracy(value, "epoch %.4g" % self.epochs(step))
        here = os.path.join(glob.escape(self.folder))
        for path in _newest_last(os.path.join(here, "result_*.json"), os.path.join(here, "*", "result_*.json")):
            folder, name = os.path.split(path)
            inner = folder != os.path.dirname(self.path(name))
            if inner and os.path.exists(os.path.join(folder, "config.json")):
                continue
            result = self._json(path)
            known = result.get("config")
            settings = known if isinstance(known, dict) else {}  # type: Dict[str, Any]
            measure = _measure(name[len("result_"):-len(".json")], settings)
            on = "" if settings.get("dataset") in (None, self.config.get("dataset")) else ", on %s" % short(settings["dataset"], 40)
            trained = settings.get("encoder_weights") != "none"
            of = os.path.basename(short(settings.get("encoder_weights", ""))) if trained else ""
            for figure, what in (("test_accuracy", measure), ("knn", "k-NN")):
                if _can_be("accuracy", result.get(figure)):
                    if of and "." not in of:
                        named.setdefault(what + on, {})[of] = Accuracy(float(result[figure]), "")
                    elif figure == "test_accuracy" or trained not in found.get(what + on, {}):
                        found.setdefault(what + on, {})[trained] = Accuracy(float(result[figure]), of)
                elif figure in result or figure == "test_accuracy" and result and measure.startswith(MEASURES):
                    self.notes.append("Left out: %s of %s, which is %s." % (figure, path, short(result.get(figure, "missing"), 60)))
        for what, others in named.items():
            untrained = {trained: each for trained, each in found.get(what, {}).items() if not trained}  # type: Dict[bool, Accuracy]
            if untrained and found[what] == untrained:
                del found[what]
            for of, accuracy in others.items():
                found["%s, %s" % (what, of)] = {**untrained, True: accuracy}
        return {what: found[what] for start in MEASURES + ("",) for what in found
                if what.startswith(start) and (start or not what.startswith(MEASURES))}


def _measure(command: str, settings: Dict[str, Any]) -> str:
    """What an accuracy is of: only those measured in the same way are compared."""
    if command.startswith("linearevaluation"):
        return "linear" + (", cached features" if settings.get("cached_features") else "")
    if command.startswith("finetuning"):
        part = settings.get("label_fraction")  # type: Any
        return "fine-tuned" + (" on %g %% of the labels" % (100 * part) if _can_be("label_fraction", part) else "") + (
            ", encoder frozen" if settings.get("freeze") else "")
    return short(command, 60)


def newest_weights(folder: str, steps_per_epoch: int) -> Optional[str]:
    """Of the files of an encoder's weights in a run's folder the one after most steps; None if there is none."""
    names = re.findall(r"^(f_online_(step_)?(\d{1,18})\.h5)$", "\n".join(os.listdir(folder)), re.MULTILINE)
    steps = {name: int(number) * (1 if step else steps_per_epoch) for name, step, number in names}
    return os.path.join(folder, max(steps, key=lambda name: steps[name])) if steps else None


def _newest_last(*patterns: str) -> List[str]:
    """The files of these patterns."""
    return sorted(filter(os.path.isfile, sum(map(glob.glob, patterns), [])), key=os.path.getmtime)


def _read_json(path: str) -> Dict[str, Any]:
    """The dict in a JSON file; nothing if there is no file. UserError if it is damaged."""
    try:
        with open(path) as file:
            content = json.load(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError("%s is damaged (%s)." % (path, short(error, 100)))
    if not isinstance(content, dict):
        raise UserError("%s is damaged (it holds %s)." % (path, short(content, 60)))
    return content


def _can_be(name: str, value: Any) -> bool:
    """Whether what a file gives as this figure can be one."""
    low, high = BOUNDS.get(name, (-HUGE, HUGE))
    return type(value) in (int, float) and (low <= value <= high or name == "spread" and value != value)  # nan of an overflow


def short(value: Any, longest: int = 300) -> str:
    """Any value as text in one line that is not too long."""
    try:
        text = " ".join(str(value).split())
    except (RecursionError, ValueError):  # nested too deeply, or an integer of too many digits
        text = "too large to show"
    return text if len(text) <= longest else text[:longest] + "..."
