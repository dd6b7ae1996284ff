"""A page that tells what runs are worth and how they went, in one file that needs no network.

    python report.py RUN [RUN ...] [--output report.html] [--beside WEIGHTS]

RUN is the --output_dir of a pretraining, finished or still going on; several are compared. Writes report.html (by default
into the first RUN) and its curves beside it, as report_<name>.png. First come the accuracies with random and with trained
weights: the k-NN accuracies of the run, and what linearevaluation.py and finetuning.py have written into RUN or into a folder
in it, such as RUN/random with --encoder_weights none. Then curves, each with a line on how to read it; the pictures of
embed.py and finetuning.py; and for a few test images the training images that the newest f_online_*.h5 takes for the most
similar; with --beside also those that another encoder does: a file's, a shipped one's (cifar10), or random weights' (none).
"""
import argparse
import base64
import dataclasses
import functools
import html
import logging
import os
import re
import sys
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import commands

# isort: split

import numpy as np

import charts
import progress
import reading
from commands import UserError
from runfiles import Run, short

QUERIES, NEIGHBOURS = 8, 5
SEARCHED = 5000  # training images at most among which neighbours are looked for: seconds, not minutes, on a CPU
RIGHT, WRONG, NEUTRAL = (60, 160, 60), (210, 60, 50), (120, 120, 120)
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: auto; padding: 0 16px 48px; color: #222;
  overflow-wrap: anywhere; }
h1 { font-size: 1.5em; line-height: 1.25; } h2 { margin: 1.6em 0 .4em; } p { margin: .4em 0; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 24px 16px; }
figure { margin: 0; } img { max-width: 100%; height: auto; display: block; } code { font-size: .85em; }
figcaption, .note { font-size: .9em; color: #555; } .good { color: #176b17; } .bad { color: #b3261e; } .unsure { color: #8a5a00; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .92em; }
td, th { border-bottom: 1px solid #ddd; padding: .25em .8em .25em 0; text-align: left; vertical-align: top; min-width: 5em; }
th { overflow-wrap: normal; } tr.differs td { background: #fff3d0; } summary { cursor: pointer; margin: .6em 0; }
"""
COLOURS = {"healthy": "good", "too early to tell": "unsure", "contracted": "unsure", "uneven": "unsure"}  # of the others: bad
MEASURE = ("linearevaluation.py measures the linear accuracy; it is shown here when --output_dir is the folder of the run, and that "
           "of random weights (--encoder_weights none) when it is a folder in there.")
SIMILAR = "Top: test images. Below each the training images most similar to it by %s; green: of the same class."
Shown = Tuple[str, Union[bytes, str]]  # a caption, and a PNG or the reason why there is none


@functools.lru_cache(maxsize=None)
def _encoder(name: str, width: float, stem: str) -> Any:
    """One for all runs that have such a one: it takes TensorFlow seconds to trace each, and it warns of many."""
    import models

    return models.ENCODERS[name](width, stem=stem)


def neighbours(run: Run, searched: int, other: Optional[str] = None) -> np.ndarray:
    """A picture: test images, and below each the training images with the most similar features.

    other: encoder_weights to be used on the run's images instead of the run's own. UserError if weights or data are not to be had.
    """
    import evaluation
    import npu_config
    import weights
    from neighbours import nearest_to

    path = other or run.weights()
    if path is None:
        raise UserError("the run has saved no weights yet.")
    names = ("encoder", "width_multiplier", "dataset", "data_dir", "image_size", "test_fraction")
    config = evaluation.Config(device="cpu", cache_dir=run.config.get("cache_dir"), store_size=run.config.get("store_size"),
                               **{name: run.config[name] for name in names})
    commands.check(config)
    npu_config.open_device(config, alone=True)
    data = evaluation.load_data(config, labelled=False)
    if not len(data.test_images):
        raise UserError("the data set has no test images.")
    if other:
        _, encoder, _ = evaluation.start(dataclasses.replace(config, encoder_weights=other, output_dir=run.folder, quiet=True))
    else:
        encoder = _encoder(config.encoder, config.width_multiplier, weights.settings_of(path)["stem"])
        weights.load_weights(encoder, path)
    keys = np.arange(min(searched, len(data.train_images))) * len(data.train_images) // min(searched, len(data.train_images))
    asked = np.unique(np.arange(QUERIES) * len(data.test_images) // QUERIES)
    images, queries = (evaluation.middle(x, config.image_size) for x in (data.train_images[keys], data.test_images[asked]))
    vectors = evaluation.features(encoder, np.concatenate([queries, images]))
    nearest = nearest_to(vectors[:len(asked)], vectors[len(asked):], min(NEIGHBOURS, len(keys)))[1].T
    frames = np.full((len(nearest) + 1, len(asked), 3), NEUTRAL, np.uint8)
    if data.train_labels is not None and data.test_labels is not None:
        same = data.train_labels[keys][nearest] == data.test_labels[asked]
        frames[1:] = np.where(same[..., None], RIGHT, WRONG)
    return progress.sheet([queries] + [images[row] for row in nearest], list(frames))


def similar(run: Run, searched: int, other: Optional[str] = None) -> Shown:
    """The picture of the neighbours, or why there is none: whatever it is, the rest of the page is worth having."""
    try:
        whose = "random weights" if other == "none" else os.path.basename(other or run.weights() or "")
        return SIMILAR % whose, progress.encode_png(neighbours(run, searched, other))
    except UserError as error:
        return "", str(error)
    except Exception as error:  # settings of wrong types or missing, a network or images too large for the memory
        return "", "%s (%s)." % (short(error, 150).rstrip("."), type(error).__name__)


def found(run: Run, name: str) -> Iterator[Shown]:
    """The picture of this name in the folder of the run, if there is one."""
    if os.path.isfile(run.path(name)):
        with open(run.path(name), "rb") as file:
            content = file.read()
        yield "", content if content.startswith(b"\x89PNG\r\n\x1a\n") else "%s is no PNG." % run.path(name)


# The page

def accuracies(runs: Sequence[Run]) -> Dict[str, List[str]]:
    """The rows of the table that comes first: what was measured, with random and with trained weights."""
    rows = {}
    for what in dict.fromkeys(what for run in runs for what in run.accuracies):
        for run in runs:
            pair = run.accuracies.get(what)
            if pair:
                cells = [("%.2f %% %s" % (100 * pair[trained].value, "(%s)" % pair[trained].of if trained and pair[trained].of else "")
                          ).rstrip() if trained in pair else "-" for trained in (False, True)]
                gain = "%+.2f" % (100 * (pair[True].value - pair[False].value)) if len(pair) == 2 else "-"
                rows[what if len(runs) == 1 else "%s: %s" % (what, run.name)] = cells + [gain]
    return rows


def about(run: Run) -> Dict[str, str]:
    """The rest that is worth telling of a run, in words."""
    table = {"loss, mean of the last epoch": "%.4f" % run.losses[-run.steps_per_epoch:].mean()}
    done = {name: short(value) for name, value in run.result.items()}
    if done:
        table["device"] = "%s, %s, %s processors" % tuple(done.get(name, "-") for name in ("device", "machine", "cpus"))
        table["seconds of the last start"] = done.get("seconds", "-").split(".")[0]
    versions = run.result.get("versions")
    if isinstance(versions, dict):
        table["versions"] = ", ".join("%s %s" % (name, short(version, 40)) for name, version in sorted(versions.items()))
    return table


def _table(columns: Sequence[str], rows: Dict[str, List[str]], mark: bool = False) -> str:
    """An HTML table with a row for each key; mark: colour the rows whose values differ."""
    lines = ["<tr><th></th>%s</tr>" % "".join("<th>%s</th>" % html.escape(column) for column in columns)]
    for name, values in rows.items():
        lines.append("<tr%s><td>%s</td>%s</tr>" % (
            ' class="differs"' if mark and len(set(values)) > 1 else "", html.escape(short(name)),
            "".join("<td>%s</td>" % html.escape(value) for value in values)))
    return '<div class="wide"><table>%s</table></div>' % "".join(lines)


def _rows(tables: Sequence[Dict[str, str]]) -> Dict[str, List[str]]:
    """One dict for each run -> for each name its values in all of them."""
    names = list(dict.fromkeys(name for table in tables for name in table))
    return {name: [table.get(name, "-") for table in tables] for name in names}


def _told(told: reading.Reading) -> str:
    """A reading as HTML."""
    kind = '<b class="%s">%s.</b> ' % (COLOURS.get(told.kind, "bad"), told.kind.capitalize()) if told.kind else ""
    return kind + html.escape(told.text)


def _read(runs: Sequence[Run], name: str) -> str:
    """How to read a curve of each of the runs, as HTML; once for those of which the same is to be told."""
    told = {}  # type: Dict[str, List[str]]
    for run in runs:
        if name in run.readings:
            told.setdefault(_told(run.readings[name]), []).append(run.name)
    return "<br>".join((html.escape(", ".join(names)) + ": " if len(runs) > 1 else "") + text for text, names in told.items())


def _figure(title: str, content: Union[bytes, str], caption: str) -> str:
    """A picture as HTML, or the reason why there is none. caption: HTML."""
    if isinstance(content, str):
        return "<p>%sNot drawn: %s</p>" % (caption and caption + ". ", html.escape(content))
    return '<figure><img alt="%s" src="data:image/png;base64,%s"><figcaption>%s</figcaption></figure>' % (
        html.escape(title), base64.b64encode(content).decode(), caption)


def page(runs: Sequence[Run], drawn: Dict[str, bytes], pictures: Sequence[Tuple[str, List[Tuple[Run, Shown]]]]) -> str:
    """The HTML. pictures: (heading, what is shown of which run)."""
    names, several = [run.name for run in runs], len(runs) > 1
    parts = ["<h1>%s</h1>" % html.escape("BYOL pretraining: " + ", ".join(names))]
    for run in runs:
        worst = reading.worst([run.readings[name] for name in ("knn", "spread", "loss") if name in run.readings])
        parts.append("<p>%s%s %s</p>" % (html.escape(run.name + ": ") if several else "", _told(worst), html.escape(run.state())))
        parts += ['<p class="note">%s</p>' % html.escape(note) for note in run.notes]
    rows = accuracies(runs)
    parts += ["<h2>Accuracy</h2>", _table(["random weights", "pretrained", "difference"], rows) if rows else "<p>None is known.</p>"]
    if not any(what.startswith("linear") for what in rows):
        parts.append('<p class="note">%s</p>' % MEASURE)
    parts += ["<h2>Curves</h2>", '<div class="grid">%s</div>' % "".join(
        _figure(title, drawn[name], _read(runs, name)) for name, title, _, _ in charts.CURVES if name in drawn)]
    for heading, shown in pictures:
        parts += ["<h2>%s</h2>" % html.escape(heading), '<div class="grid">%s</div>' % "".join(
            _figure(heading, content, html.escape(". ".join(filter(None, (run.name if several else "", caption)))))
            for run, (caption, content) in shown)]
    parts += ["<h2>About the run%s</h2>" % ("s" if several else ""), _table(names, _rows([about(run) for run in runs])),
              "<h2>Flags</h2>"]
    flags = _rows([{name: short(value) for name, value in sorted(run.config.items())} for run in runs])
    if several:
        differing = {name: values for name, values in flags.items() if len(set(values)) > 1 and name != "output_dir"}
        parts.append("<p>Where the runs differ:</p>" + _table(names, differing) if differing else "<p>The same.</p>")
    parts.append("<details><summary>All flags</summary>%s</details>" % _table(names, flags, mark=True))
    return ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
            'initial-scale=1"><title>%s</title><style>%s</style></head><body>\n%s\n</body></html>\n'
            % (html.escape(", ".join(names)), STYLE, "\n".join(parts)))


def write(folders: Sequence[str], output: Optional[str] = None, searched: int = SEARCHED, beside: Sequence[str] = ()) -> str:
    """Write the report of the runs in `folders` and give its path.

    searched: 0 leaves the neighbours out. beside: encoder_weights of others whose neighbours are shown, too.
    """
    return _write(_runs(folders), output, searched, beside)


def _runs(folders: Sequence[str]) -> List[Run]:
    """The runs in the folders; those of one name are told apart by their folders."""
    runs = [Run(folder) for folder in folders]
    if len({run.name for run in runs}) < len(runs):
        for run in runs:
            run.name = run.folder
    return runs


def _write(runs: Sequence[Run], output: Optional[str], searched: int, beside: Sequence[str]) -> str:
    output = output or os.path.join(runs[0].folder, "report.html")
    folder = commands.make_folder(os.path.dirname(os.path.abspath(output)))
    alike = [(run, similar(run, searched, other)) for run in runs if searched for other in (None, *beside)]
    pictures = [("Most similar images", alike)]
    for name, heading in (("projection.png", "Map of the features"),
                          ("confusion_matrix.png", "Which class was taken for which, after fine-tuning"),
                          ("views.png", "Images (top) and their two views")):
        pictures.append((heading, [(run, shown) for run in runs for shown in found(run, name)]))
    drawn = charts.curves(runs)
    stem = os.path.join(folder, re.sub(r"\.html?$", "", os.path.basename(output)))
    files = {"%s_%s.png" % (stem, name): png for name, png in drawn.items()}
    files.update({"%s_neighbours%s.png" % (stem, "_%d" % i if i else ""): content for i, (_, (_, content)) in enumerate(alike)
                  if isinstance(content, bytes)})
    for path, png in files.items():
        commands.write_atomically(path, png)
    text = page(runs, drawn, [(heading, shown) for heading, shown in pictures if shown])
    commands.write_atomically(output, text.encode("utf-8", "replace"))  # names of files need not be UTF-8
    return output


def _printable(text: str) -> str:
    """One line of it, whatever bytes a name had."""
    return short(text.encode("utf-8", "replace").decode(), 1000)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="the --output_dir of a pretraining")
    parser.add_argument("--output", help="the page to write (default: report.html in the first RUN)")
    parser.add_argument("--searched", type=int, default=SEARCHED, metavar="N",
                        help="training images to look for neighbours among, 0: none (default: %(default)s)")
    parser.add_argument("--beside", metavar="WEIGHTS", action="append", default=[],
                        help="show the most similar images by these weights, too: a file, cifar10, cifar10-narrow, or none (random)")
    options = parser.parse_args(arguments)
    if options.searched < 0:
        raise UserError("--searched is %d; it must be at least 0." % options.searched)
    runs = _runs(options.runs)
    path = _write(runs, options.output, options.searched, options.beside)
    for what, (random, trained, gain) in accuracies(runs).items():
        print(_printable("%s: random weights %s, pretrained %s, difference %s" % (what, random, trained, gain)))
    print("Wrote %s." % _printable(path))


if __name__ == "__main__":
    logging.basicConfig(format=commands.LOG_FORMAT)  # absl's own handler would want flags
    with commands.one_line_errors("report.py"):
        main(sys.argv[1:])
