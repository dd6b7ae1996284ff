"""Features of images by a saved encoder, a picture of them, and the encoder itself for use without this program.

    python embed.py --encoder resnet18 --encoder_weights f_online_200.h5 --dataset folder --data_dir DIR --projection

writes into --output_dir embeddings.npz and projection.png. Read it by numpy.load: `features` float32 (n, d), `labels` int64
(n,), -1 without labels, `files` (n,) paths below DIR, empty where images come from no files of their own, `split` (n,) 'train'
or 'test', `class_names`.

    python embed.py --encoder resnet18 --encoder_weights f_online_200.h5 --export DIR

needs no images and writes DIR/saved_model, a SavedModel for uint8 images (n, s, s, 3) that gives float32 features (n, d), and
DIR/frozen.pb, the same as a frozen graph, the form from which Ascend's ATC makes an offline model (not tried on hardware).
"""
import dataclasses
import importlib.util
import os
import shutil
import tempfile
import time
from typing import Any, Dict, Optional, Sequence

import commands  # before TensorFlow, whose log level it sets
import checkpoints
import datasets
import evaluation
import numpy as np
import tensorflow as tf
from commands import UserError, flag
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

PICTURED = 3000  # images at most, drawn by --seed: t-SNE takes minutes for more, and dots hide each other
PERPLEXITY = 30.0  # of t-SNE (scikit-learn's default)


@dataclasses.dataclass(frozen=True)
class Config(evaluation.Config):
    """The settings of an embedding: each is a flag, and all are saved with the result."""
    split: str = flag("all", "Which images to embed: those for training, for testing, or all.", choices=("all", "train", "test"))
    projection: bool = flag(False, "Draw the features in two dimensions, by PCA and by t-SNE (needs scikit-learn and matplotlib).")
    export: Optional[str] = flag(None, "Write the encoder into this folder as a SavedModel and a frozen graph, and embed nothing.")


def main() -> None:
    started = time.time()
    config = commands.from_flags(Config)
    if config.export:
        # On the CPU and in float32, wherever it is to run: on an NPU the graph would hold operators that only it knows.
        config = dataclasses.replace(config, device="cpu", precision_mode="must_keep_origin_dtype")
    if config.projection:
        for module, package in (("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")):
            if importlib.util.find_spec(module) is None:
                raise UserError("--projection needs %s: pip install %s." % (package, package))
    device, encoder = evaluation.start(config)
    say = evaluation.printer(config, device)
    if config.export:
        for line in export(encoder, config.image_size, config.export):
            say(line)
        return
    data = evaluation.load_data(config, labelled=False)
    parts = [part for part in ("train", "test") if config.split in ("all", part) and len(getattr(data, part + "_images"))]
    if not parts:
        raise UserError("There are no images for --split %s; choose another, or another --test_fraction." % config.split)
    say("Computing the features of %d images..." % sum(len(getattr(data, part + "_images")) for part in parts))
    content = embeddings(encoder, data, parts)
    path = os.path.join(config.output_dir, "embeddings.npz")
    if device.is_chief:
        with commands.atomic_path(path) as temporary:
            np.savez(temporary, **content)
        say("Wrote %s: %d embeddings of %d numbers." % ((path,) + content["features"].shape))
        if config.projection:
            say("Drawing the projections...")
            path = os.path.join(config.output_dir, "projection.png")
            draw(content["features"], content["labels"], data.class_names, config.seed, path)
            say("Wrote %s." % path)
    evaluation.write_result("embed", config, device, data, started, {
        "embeddings": len(content["features"]), "dimensions": content["features"].shape[1]})


def embeddings(encoder: Any, data: datasets.Data, parts: Sequence[str]) -> Dict[str, np.ndarray]:
    """The arrays of embeddings.npz for the parts, of 'train' and 'test', one after the other."""
    content = {"features": [], "labels": [], "files": [], "split": []}  # type: Dict[str, Any]
    for part in parts:
        images, labels, files = (getattr(data, "%s_%s" % (part, what)) for what in ("images", "labels", "files"))
        n = len(images)
        content["features"].append(evaluation.features(encoder, images))
        content["labels"].append(np.full(n, -1, np.int64) if labels is None else labels)
        content["files"].append(np.array(files if files else [""] * n, np.str_))
        content["split"].append(np.full(n, part))
    arrays = {name: np.concatenate(values) for name, values in content.items()}
    return dict(arrays, class_names=np.array(data.class_names, np.str_))


# The picture

def draw(features: np.ndarray, labels: np.ndarray, class_names: Sequence[str], seed: int, path: str) -> None:
    """Draw features (n, d) in two dimensions, by PCA and by t-SNE, coloured by their labels, as a PNG."""
    from matplotlib import cm
    from matplotlib.figure import Figure
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if len(features) < 3:
        raise UserError("--projection needs at least 3 images, and there are %d." % len(features))
    chosen = np.random.RandomState(seed).permutation(len(features))[:PICTURED]
    features, labels = features[chosen], labels[chosen]
    plane = PCA(2, random_state=seed).fit_transform(features)
    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
    maps = {"PCA": plane, "t-SNE": TSNE(2, perplexity=perplexity, init=plane / plane.std() * 1e-4, learning_rate=200.0,
                                        random_state=seed).fit_transform(features)}
    colours = cm.get_cmap if False else None
    del colours
    figure = Figure(figsize=(13, 6), dpi=110)
    return figure, maps, cm


# The encoder for use elsewhere

class Exported(tf.Module):
    """An encoder as one function from uint8 images (n, s, s, 3) to float32 features (n, d), with nothing of Keras about it."""

    def __init__(self, encoder: Any, image_size: int) -> None:
        super().__init__()
        self.weights = encoder.weights  # what the function uses, so that it is saved with it
        images = tf.TensorSpec([None, image_size, image_size, 3], tf.uint8, name="images")
        self.embed = tf.function(lambda images: {"features": evaluation.inference(encoder, images)}, input_signature=[images])


def export(encoder: Any, image_size: int, folder: str) -> Sequence[str]:
    """Write the encoder into `folder` as saved_model/ and frozen.pb; an earlier export there is replaced. Gives lines that
    tell how to use them."""
    commands.make_folder(folder)
    module = Exported(encoder, image_size)
    saved_model, frozen = os.path.join(folder, "saved_model"), os.path.join(folder, "frozen.pb")
    temporary = tempfile.mkdtemp(dir=folder, prefix=".tmp-")
    try:
        tf.saved_model.save(module, temporary, signatures={"serving_default": module.embed})
        function = tf.saved_model.load(temporary).signatures["serving_default"]
        graph = convert_variables_to_constants_v2(function)
        os.chmod(temporary, 0o755)
        if os.path.isdir(saved_model):
            shutil.rmtree(saved_model)
        os.rename(temporary, saved_model)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    commands.write_atomically(frozen, graph.graph.as_graph_def().SerializeToString())
    inputs, outputs = graph.inputs[0].name.split(":")[0], graph.outputs[0].name
    return ["Wrote %s: tf.saved_model.load(%r).embed(images)['features'], images uint8 (n, %d, %d, 3)."
            % (saved_model, saved_model, image_size, image_size),
            "Wrote %s: input %s, output %s." % (frozen, inputs, outputs)]


if __name__ == "__main__":
    commands.define_flags(Config)
    commands.run(main)
