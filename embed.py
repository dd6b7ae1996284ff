"""Features of images by a saved encoder, a picture of them, and the encoder itself for use elsewhere.

    python embed.py --encoder_weights f_online_200.h5 --dataset folder --data_dir DIR --projection

writes into --output_dir embeddings.npz and projection.png. numpy.load reads `features` float32 (n, d), `labels` int64 (n,), -1 without
labels, `files` (n,) paths below DIR, empty where an image has no file of its own, `split` (n,) 'train' or 'test', and `class_names`.

    python embed.py --encoder_weights f_online_200.h5 --export DIR

needs no images and writes DIR/saved_model, a SavedModel for uint8 images (n, s, s, 3) that gives float32 features (n, d), and
DIR/frozen.pb, the same as a frozen graph, the form from which Ascend's ATC makes an offline model (not tried on hardware).
"""
import dataclasses
import importlib.util
import json
import os
import shutil
import tempfile
import time
from typing import Any, Dict, Optional, Sequence

import commands

# isort: split

import numpy as np
import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

import charts
import checkpoints
import datasets
import evaluation
from commands import UserError, flag

PICTURED = 2000  # images at most, drawn by --seed: t-SNE would take minutes for more, and dots would overlap
MARK = "about-this-folder.txt"
PERPLEXITY = 30.0  # of t-SNE (scikit-learn's default)

# scikit-learn's OpenMP reads this when it is loaded: threads that wait let others work. Else, where other programs are busy, t-SNE of
# 68 points took 43 s instead of 0.2 s.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@dataclasses.dataclass(frozen=True)
class Config(evaluation.Config):
    """The settings of an embedding: each is a flag, saved with the result."""
    split: str = flag("all", "Which images to embed: those for training, for testing, or all.", choices=("all", "train", "test"))
    projection: bool = flag(False, "Draw the features in two dimensions, by PCA and by t-SNE (needs "
                            "scikit-learn and matplotlib).")
    export: Optional[str] = flag(None, "Write the encoder into this folder as a SavedModel and a frozen "
                                 "graph, and embed nothing.")


def embed(config: Config) -> Dict[str, Any]:
    """Compute the features of a data set: all that the command does. Gives the arrays of embeddings.npz, or with config.export the
    names of the frozen graph's input and output. UserError for what the user can mend.
    """
    started = time.monotonic()
    if config.export:
        return _export(config, started)
    if config.projection:
        for module, package in (("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")):
            if importlib.util.find_spec(module) is None:
                raise UserError("--projection needs %s: pip install %s." % (package, package))
    device, encoder, say = evaluation.start(config)
    data = evaluation.load_data(config, device, say, labelled=False)
    parts = [part for part in ("train", "test") if config.split in ("all", part)]
    number = sum(len(getattr(data, part + "_images")) for part in parts)
    fewest = 3 if config.projection else 1
    if number < fewest:
        raise UserError("There are %d images for --split %s, and %d are needed; choose another, or another "
                        "--test_fraction." % (number, config.split, fewest))
    say("Computing the features of %d images..." % number)
    content = embeddings(encoder, data, parts, config.image_size)
    if device.is_chief:
        path = os.path.join(config.output_dir, "embeddings.npz")
        with commands.atomic_path(path) as temporary:
            np.savez(temporary, **content)
        say("Wrote %s: %d embeddings of %d numbers." % (path, number, content["features"].shape[1]))
        if config.projection:
            say("Drawing the projections...")
            path = os.path.join(config.output_dir, "projection.png")
            chosen = np.random.RandomState(config.seed).permutation(number)[:PICTURED]
            maps = project(content["features"][chosen], config.seed)
            draw(maps, content["labels"][chosen], data.class_names, path)
            say("Wrote %s." % path)
    evaluation.write_result("embed", config, device, data, started, {"embeddings": number, "dimensions": content["features"].shape[1]})
    return content


def embeddings(encoder: Any, data: datasets.Data, parts: Sequence[str], size: Optional[int] = None) -> Dict[str, Any]:
    """The arrays of embeddings.npz for the parts, of 'train' and 'test', one after the other. size: as for `evaluation.features`."""
    content = {"features": [], "labels": [], "files": [], "split": []}  # type: Dict[str, Any]
    for part in parts:
        images, labels, files = (getattr(data, part + what) for what in ("_images", "_labels", "_files"))
        if len(images):
            content["features"].append(evaluation.features(encoder, images, size=size))
            content["labels"].append(np.full(len(images), -1, np.int64) if labels is None else labels)
            content["files"].append(np.array(files or [""] * len(images), np.str_))
            content["split"].append(np.full(len(images), part))
    arrays = {name: np.concatenate(values) for name, values in content.items()}
    return dict(arrays, class_names=np.array(data.class_names, np.str_))


# The picture

def project(features: np.ndarray, seed: int) -> Dict[str, np.ndarray]:
    """Features (n, d), n at least 3, in two dimensions: 'PCA' and 't-SNE', each (n, 2)."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    plane = PCA(2, random_state=seed).fit_transform(features)
    # Started from the PCA, scaled as is the custom, so that the map's rough layout means something.
    start = plane / max(plane[:, 0].std(), 1e-12) * 1e-4
    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
    return {"PCA": plane, "t-SNE": TSNE(2, perplexity=perplexity, init=start, learning_rate=200.0,
                                        random_state=seed).fit_transform(features)}


def draw(maps: Dict[str, np.ndarray], labels: np.ndarray, class_names: Sequence[str], path: str) -> None:
    """Draw maps of the same images side by side as a PNG, coloured by their labels (n,), -1 for none."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    few = len(class_names) <= 20  # more could not be told apart
    colours = colormaps["tab20" if few and len(class_names) > 10 else "tab10" if few else "gist_rainbow"]
    figure = Figure(figsize=(13, 6), dpi=110)
    for place, (title, points) in enumerate(maps.items()):
        axes = figure.add_subplot(1, len(maps), place + 1)
        for label in np.unique(labels):
            mine = points[labels == label]
            name, colour = None, "grey"
            if label >= 0:
                name, colour = charts.plain(class_names[label], 18), colours(label if few else label / len(class_names))
            axes.scatter(mine[:, 0], mine[:, 1], s=7, linewidths=0, alpha=0.8, color=[colour], label=name)
        axes.set_title("%s of %d images" % (title, len(points)))
        axes.set_xticks([])
        axes.set_yticks([])
    if few and class_names:
        figure.legend(*axes.get_legend_handles_labels(), loc="center right", markerscale=3, frameon=False)
    figure.subplots_adjust(left=0.01, right=0.88, wspace=0.03, bottom=0.02, top=0.93)
    with commands.atomic_path(path) as temporary:
        figure.savefig(temporary)


# The encoder for use elsewhere

class Exported(tf.Module):
    """An encoder as a function of uint8 images (n, s, s, 3) that gives {"features": float32 (n, d)}."""

    def __init__(self, encoder: Any, image_size: int) -> None:
        super().__init__()
        self.weights = encoder.weights  # what the function uses, so that it is saved with it
        images = tf.TensorSpec([None, image_size, image_size, 3], tf.uint8, name="images")
        self.embed = tf.function(lambda images: {"features": evaluation.inference(encoder, images)}, input_signature=[images])


def export(encoder: Any, image_size: int, folder: str) -> Dict[str, str]:
    """Write the encoder into `folder`, as saved_model/ and frozen.pb; an earlier export there is replaced.

    Gives the names of the frozen graph's input and output. UserError for files of these names that are of another program.
    """
    commands.make_folder(folder)
    saved_model = os.path.join(folder, "saved_model")
    there = [name for name in ("saved_model", "frozen.pb") if os.path.exists(os.path.join(folder, name))]
    if there and not os.path.isfile(os.path.join(saved_model, MARK)) and not _exported_before(folder):
        raise UserError("%s holds a %s that embed.py did not write; choose another folder for --export." % (folder, there[0]))
    module = Exported(encoder, image_size)
    temporary = tempfile.mkdtemp(dir=folder, prefix=".tmp-")
    try:
        with checkpoints.for_tensorflow(temporary) as path:
            tf.saved_model.save(module, path, signatures={"serving_default": module.embed})
            loaded = tf.saved_model.load(path)  # has to stay: the graph does not keep its variables
        graph = convert_variables_to_constants_v2(loaded.signatures["serving_default"])
        commands.write_atomically(os.path.join(temporary, MARK), "Written by embed.py (BYOL), which replaces this folder.\n")
        os.chmod(temporary, 0o755)  # mkdtemp makes folders that only their owner may read
        if os.path.isdir(saved_model):
            shutil.rmtree(saved_model)
        os.rename(temporary, saved_model)
    except tf.errors.OpError as error:  # a full disk, say; its message is long and names what is gone by now
        raise UserError("Could not write %s (%s); make room, or choose another folder for --export."
                        % (saved_model, type(error).__name__))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    frozen = graph.graph.as_graph_def().SerializeToString()
    commands.write_atomically(os.path.join(folder, "frozen.pb"), frozen)
    return {"input": graph.inputs[0].name, "output": graph.outputs[0].name}


def _exported_before(folder: str) -> bool:
    """Whether an export without MARK is in the folder, as the first version wrote it."""
    try:
        with open(os.path.join(folder, "result_export.json")) as file:
            return "encoder_weights" in json.load(file)["config"]
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _export(config: Config, started: float) -> Dict[str, str]:
    # On the CPU in float32, wherever it is to run: made on an NPU, it would hold the NPU's own operators.
    config = dataclasses.replace(config, device="cpu", precision_mode="must_keep_origin_dtype")
    assert config.export
    _, encoder, say = evaluation.start(config)
    names = export(encoder, config.image_size, config.export)
    commands.write_result(os.path.join(config.export, "result_export.json"), dict(
        names, config=dataclasses.asdict(config), dimensions=encoder.features, seconds=time.monotonic() - started))
    saved_model, size = os.path.join(config.export, "saved_model"), config.image_size
    say("Wrote %s: tf.saved_model.load(%r).embed(images)['features'], images uint8 (n, %d, %d, 3)."
        % (saved_model, saved_model, size, size))
    say("Wrote %s: input %s, output %s." % (os.path.join(config.export, "frozen.pb"), names["input"], names["output"]))
    return names


if __name__ == "__main__":
    commands.define_flags(Config)
    commands.run(lambda: embed(commands.from_flags(Config)))
