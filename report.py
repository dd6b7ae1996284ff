"""A page that tells what runs did: curves, pictures, figures, flags, in one file that needs no network.

    python report.py RUN [RUN ...] [--output report.html]

RUN is the --output_dir of a pretraining, finished or still going on; several are compared side by side. Writes
report.html (by default into the first RUN) and its curves beside it, as report_<name>.png. What other commands left
in a RUN is shown too: result_*.json, projection.png of embed.py, confusion_matrix.png of finetuning.py. For a few test
images the page shows the training images that the newest f_online_*.h5 takes for the most similar.
"""
import argparse
import base64
import glob
import html
import json
import logging
import os
import re
import sys
from typing import Any, Dict, List, Optional, Sequence, Tuple

import commands

# isort: split

import numpy as np

import charts
import progress
from commands import UserError

QUERIES, NEIGHBOURS = 8, 5
SEARCHED = 5000  # training images at most among which neighbours are looked for: seconds, not minutes, on a CPU
RIGHT, WRONG, NEUTRAL = (60, 160, 60), (210, 60, 50), (120, 120, 120)
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: auto; padding: 0 16px 48px; color: #222; }
h1 { font-size: 1.7em; } h2 { margin: 1.6em 0 .4em; } p { margin: .4em 0; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 16px; }
figure { margin: 0; } img { max-width: 100%; height: auto; display: block; }
figcaption { font-size: .9em; color: #555; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .92em; }
td, th { border-bottom: 1px solid #ddd; padding: .25em .8em .25em 0; text-align: left; vertical-align: top;
  overflow-wrap: anywhere; min-width: 6em; }
tr.differs td { background: #fff3d0; } summary { cursor: pointer; margin: .6em 0; }
"""


class Run:
    """What a run's folder holds. UserError if it holds no run, or one that cannot be read.

    losses (steps,), by step; log, knn: as in metrics.json; results: by command; epochs(step): steps in epochs.
    """

    def __init__(self, folder: str) -> None:
        if not os.path.isdir(folder):
            raise UserError("There is no folder %s; give the --output_dir of a pretraining." % folder)
        self.folder = folder
        self.name = os.path.basename(os.path.abspath(folder))
        self.config = self._json("config.json")
        if "encoder" not in self.config or "batch_size" not in self.config:
            raise UserError("%s holds no run: it has no config.json of pretraining.py; give the --output_dir of a pretraining."
                            % folder)
        try:
            with open(self.path("losses.txt")) as file:
                self.losses = np.array([float(line) for line in file])
        except FileNotFoundError:
            self.losses = np.array([])
        except ValueError as error:
            raise UserError("%s is damaged (%s)." % (self.path("losses.txt"), error))
        if not len(self.losses):
            raise UserError("The run in %s has no losses yet: they are written with its first checkpoint, at the latest at the "
                            "end of its first epoch." % folder)
        metrics = self._json("metrics.json")
        self.log = metrics.get("log", [])  # type: List[Dict[str, float]]
        self.knn = metrics.get("knn", [])  # type: List[Dict[str, float]]
        self.results = {"pretraining": self._json("result.json")}
        for path in sorted(glob.glob(os.path.join(glob.escape(folder), "result_*.json"))):
            self.results[os.path.basename(path)[len("result_"):-len(".json")]] = self._json(os.path.basename(path))
        self.steps_per_epoch = max(1, self.config.get("train_images", 50000) // self.config["batch_size"])

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def _json(self, name: str) -> Dict[str, Any]:
        """The content of a JSON file; nothing if there is none."""
        try:
            with open(self.path(name)) as file:
                content = json.load(file)
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise UserError("%s is damaged (%s)." % (self.path(name), error))
        return content if isinstance(content, dict) else {}

    def epochs(self, steps: Any) -> np.ndarray:
        return np.asarray(steps) / self.steps_per_epoch

    def logged(self, name: str) -> Tuple[np.ndarray, np.ndarray]:
        """(epochs, values) of a figure of the log lines."""
        lines = [line for line in self.log if line.get(name) is not None]
        return self.epochs([line["step"] for line in lines]), np.array([line[name] for line in lines])

    def comparable(self) -> bool:
        """Whether the published losses are of such a run."""
        return all(self.config.get(name) == value for name, value in (
            ("encoder", "resnet18"), ("width_multiplier", 1.0), ("batch_size", 512), ("dataset", "cifar10")))

    def weights(self) -> Optional[str]:
        """The newest of the encoder's weight files."""
        paths = glob.glob(os.path.join(glob.escape(self.folder), "f_online_*.h5"))
        return max(paths, key=os.path.getmtime) if paths else None


def neighbours(run: Run, searched: int) -> np.ndarray:
    """A picture: test images, and below each the training images with the most similar features.

    UserError if weights or data are not to be had.
    """
    import datasets
    import evaluation
    import models
    import npu_config
    import weights

    path, config = run.weights(), run.config
    if path is None:
        raise UserError("the run has saved no weights yet.")
    npu_config.open_device(npu_config.Options(device="cpu"), alone=True)
    data = datasets.load(config["dataset"], config["data_dir"], image_size=config["image_size"],
                         test_fraction=config["test_fraction"])
    if not len(data.test_images):
        raise UserError("the data set has no test images.")
    encoder = models.ENCODERS[config["encoder"]](config["width_multiplier"])
    weights.load_weights(encoder, path)
    keys = np.arange(min(searched, len(data.train_images))) * len(data.train_images) // min(searched, len(data.train_images))
    asked = np.unique(np.arange(QUERIES) * len(data.test_images) // QUERIES)
    images, queries = data.train_images[keys], data.test_images[asked]
    known, wanted = (evaluation.features(encoder, part) for part in (images, queries))
    known, wanted = (part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12) for part in (known, wanted))
    nearest = np.argsort(-wanted @ known.T, axis=1)[:, :NEIGHBOURS].T
    frames = np.full((len(nearest) + 1, len(asked), 3), NEUTRAL, np.uint8)
    if data.train_labels is not None and data.test_labels is not None:
        same = data.train_labels[keys][nearest] == data.test_labels[asked]
        frames[1:] = np.where(same[..., None], RIGHT, WRONG)
    return progress.sheet([queries] + [images[row] for row in nearest], list(frames))


# The page

def figures(run: Run) -> Dict[str, str]:
    """What is worth telling of a run, in words: the columns of the table of results."""
    last = run.losses[-run.steps_per_epoch:]
    done = run.results["pretraining"]
    table = {"trained": "%d of %d epochs (%d steps)" % (len(run.losses) // run.steps_per_epoch, run.config["num_epochs"],
                                                     len(run.losses)),
             "loss, mean of the last epoch": "%.4f" % last.mean()}
    if run.knn:
        table["k-NN accuracy, last"] = "%.2f %% (epoch %d)" % (100 * run.knn[-1]["accuracy"], run.knn[-1]["epoch"])
    if run.log:
        table["spread, last"] = "%.4f (evenly spread: %.4f)" % (run.log[-1]["spread"], charts.EVEN_SPREAD)
        table["speed, median"] = "%.0f images/s" % np.median(run.logged("images_per_second")[1])
    for name, result in run.results.items():
        if "test_accuracy" in result:
            table["test accuracy, %s" % name] = "%.2f %%" % (100 * result["test_accuracy"])
    if done:
        table["time of the last start"] = "%.0f s" % done.get("seconds", 0)
        table["device"] = "%s, %s, %s processors" % (done.get("device"), done.get("machine"), done.get("cpus"))
        table["versions"] = ", ".join("%s %s" % item for item in sorted(done.get("versions", {}).items()))
    else:
        table["state"] = "not finished"
    return table


def _table(columns: Sequence[str], rows: Dict[str, List[str]], mark: bool = False) -> str:
    """An HTML table with a row for each key; mark: colour the rows whose values differ."""
    lines = ["<tr><th></th>%s</tr>" % "".join("<th>%s</th>" % html.escape(column) for column in columns)]
    for name, values in rows.items():
        lines.append("<tr%s><td>%s</td>%s</tr>" % (
            ' class="differs"' if mark and len(set(values)) > 1 else "", html.escape(name),
            "".join("<td>%s</td>" % html.escape(value) for value in values)))
    return '<div class="wide"><table>%s</table></div>' % "".join(lines)


def _rows(tables: Sequence[Dict[str, str]]) -> Dict[str, List[str]]:
    """One dict for each run -> for each name its values in all of them."""
    names = list(dict.fromkeys(name for table in tables for name in table))
    return {name: [table.get(name, "-") for table in tables] for name in names}


def _picture(png: bytes, title: str, caption: str = "") -> str:
    return '<figure><img alt="%s" src="data:image/png;base64,%s"><figcaption>%s</figcaption></figure>' % (
        html.escape(title, quote=True), base64.b64encode(png).decode(), html.escape(caption))


def page(runs: Sequence[Run], charts: Dict[str, Tuple[bytes, str]], pictures: Sequence[Tuple[str, List[Tuple[str, Any]]]]) -> str:
    """The HTML. pictures: (heading, [(a run's name and caption, PNG or the reason why there is none)])."""
    names = [run.name for run in runs]
    parts = ["<h1>%s</h1>" % html.escape("BYOL pretraining: " + ", ".join(names)), "<h2>Results</h2>",
             _table(names, _rows([figures(run) for run in runs])), "<h2>Curves</h2>",
             '<div class="grid">%s</div>' % "".join(_picture(png, name, caption) for name, (png, caption) in charts.items())]
    for heading, shown in pictures:
        parts.append("<h2>%s</h2>" % html.escape(heading))
        parts.append('<div class="grid">%s</div>' % "".join(
            _picture(content, heading, text) if isinstance(content, bytes)
            else "<p>%s</p>" % html.escape("%s Not drawn: %s" % (text, content)) for text, content in shown))
    flags = _rows([{name: str(value) for name, value in sorted(run.config.items())} for run in runs])
    parts.append("<h2>Flags</h2>")
    if len(runs) > 1:
        differing = {name: values for name, values in flags.items() if len(set(values)) > 1 and name != "output_dir"}
        parts.append("<p>Where the runs differ:</p>" + _table(names, differing) if differing else "<p>The same.</p>")
    parts.append("<details%s><summary>All flags</summary>%s</details>" % (" open" if len(runs) == 1 else "",
                                                                        _table(names, flags, mark=True)))
    return ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
            'initial-scale=1"><title>%s</title><style>%s</style></head><body>\n%s\n</body></html>\n'
            % (html.escape(", ".join(names)), STYLE, "\n".join(parts)))


def _found(runs: Sequence[Run], name: str) -> List[Tuple[str, Any]]:
    """The picture of this name in the folders of those runs that have it."""
    found = []  # type: List[Tuple[str, Any]]
    for run in runs:
        if os.path.isfile(run.path(name)):
            with open(run.path(name), "rb") as file:
                found.append((run.name, file.read()))
    return found


def write(folders: Sequence[str], output: Optional[str] = None, searched: int = SEARCHED) -> str:
    """Write the report of the runs in `folders` and give its path. searched: 0 leaves the neighbours out."""
    runs = [Run(folder) for folder in folders]
    if len({run.name for run in runs}) < len(runs):
        for run in runs:
            run.name = run.folder
    output = output or os.path.join(folders[0], "report.html")
    folder = commands.make_folder(os.path.dirname(os.path.abspath(output)))
    similar = []  # type: List[Tuple[str, Any]]
    for run in runs if searched else []:
        try:
            png = progress.encode_png(neighbours(run, searched))
            similar.append(("%s, by %s" % (run.name, os.path.basename(run.weights() or "")), png))
        except UserError as error:
            similar.append((run.name + ":", str(error)))
    pictures = [("Images (top) and their two views", _found(runs, "views.png")),
                ("Test images (top) and the training images most similar to them; green: of the same class", similar),
                ("Map of the features", _found(runs, "projection.png")),
                ("Which class was taken for which, after fine-tuning", _found(runs, "confusion_matrix.png"))]
    drawn = charts.curves(runs)
    stem = re.sub(r"\.html?$", "", os.path.basename(output))
    for name, (png, _) in drawn.items():
        commands.write_atomically(os.path.join(folder, "%s_%s.png" % (stem, name)), png)
    for i, (_, content) in enumerate(similar):
        if isinstance(content, bytes):
            commands.write_atomically(os.path.join(folder, "%s_neighbours%s.png" % (stem, "_%d" % i if i else "")), content)
    commands.write_atomically(output, page(runs, drawn, [(heading, shown) for heading, shown in pictures if shown]))
    return output


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="the --output_dir of a pretraining")
    parser.add_argument("--output", help="the page to write (default: report.html in the first RUN)")
    parser.add_argument("--searched", type=int, default=SEARCHED, metavar="N",
                        help="training images to look for neighbours among, 0: none (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.searched < 0:
        raise UserError("--searched is %d; it must be at least 0." % options.searched)
    print("Wrote %s." % write(options.runs, options.output, options.searched))


if __name__ == "__main__":
    logging.basicConfig(format=commands.LOG_FORMAT)  # absl's own handler would want flags
    with commands.one_line_errors("report.py"):
        main(sys.argv[1:])
