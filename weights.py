"""Weight files that travel: written in the layout of Keras 2's `save_weights`, and read whichever program wrote them.

A file is taken for damaged or hostile until it has shown otherwise: nothing is read before its shape and type are those of
the network, nothing that lies in another file, and no number that is not finite. Behind the end of the HDF5, where its
readers do not look, stands the SHA-256 of all that comes before.
"""
import collections
import contextlib
import hashlib
import io
import os
from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple

import h5py
import numpy as np
import tensorflow as tf

import commands
import models
from commands import UserError
from models import NORMALISATIONS, keras

# Encoders that come with the program, as weights/<name>.h5 with a card beside it, and what they are made for.
SHIPPED = {"cifar10": {"encoder": "resnet18", "width_multiplier": 1.0},
           "cifar10-narrow": {"encoder": "resnet18", "width_multiplier": 0.25}}
NORMALISATION = "byol_normalisation"  # the attribute of the file that keeps the name, where there is one
SEAL = b"\nsha256 %s sha256\n"
SEAL_BYTES = len(SEAL % (b"0" * 64))
LARGEST_ATTRIBUTE = 1 << 20  # bytes; HDF5's own limit for those that Keras writes is 64 kB
BOTTLENECKS = 53  # BatchNorms of ResNet-50
LARGEST_CHUNK = 1 << 22  # numbers of a compressed dataset that are unpacked at once; the largest kernel here has 2.4 million


def save_weights(network: Any, path: str, kernels: str = "float32") -> None:
    """Write a network's weights in the layout of Keras 2's `save_weights`, all of it or nothing.

    kernels: the type in which kernels of convolutions are stored; "float16" makes half the file. What else there is, BatchNorm's
    small variances among it, stays float32. UserError if a kernel has numbers that the type cannot hold.

    The file is made in memory: HDF5 that writes to a full disk itself crashes the process (h5py 3, TensorFlow 2.21).
    """
    memory = io.BytesIO()
    with h5py.File(memory, "w") as file:
        file.attrs.update(layer_names=[layer.name.encode() for layer in network.layers], backend=b"tensorflow",
                          keras_version=getattr(keras, "__version__", tf.__version__).encode())
        if getattr(network, "normalisation", "none") != "none":
            file.attrs[NORMALISATION] = [network.normalisation.encode()]
        for layer in network.layers:
            weights = layer.trainable_weights + layer.non_trainable_weights
            group = file.create_group(layer.name)
            group.attrs["weight_names"] = [weight.name.encode() for weight in weights]
            for weight, value in zip(weights, keras.backend.batch_get_value(weights)):
                with np.errstate(over="ignore"):
                    stored = value.astype(kernels, copy=False) if value.ndim > 1 else value
                if stored is not value and np.isinf(stored).any() and np.isfinite(value).all():
                    raise UserError("%s is not written: numbers of %s are too large for %s." % (path, weight.name, stored.dtype))
                group.create_dataset(weight.name, data=stored)
    content = memory.getvalue()
    commands.write_atomically(path, content + SEAL % hashlib.sha256(content).hexdigest().encode())


def load_weights(network: Any, path: str) -> None:
    """Read the weights of an encoder from a Keras 2 HDF5 file into `network`: float16, float32 or float64.

    Layers are matched by their order and shape, not by name or nesting, so that files fit which another program's
    ResNet of the same architecture saved. The encoder then normalises images as that of the file did. UserError, and
    `network` untouched, if the file is not whole, not of this architecture and width, or holds numbers that are not finite.
    """
    wanted = _variables(network)
    with _reading(path) as file:
        normalisation = _normalisation(file)
        pairs = list(_match(wanted, _layers(_datasets(file))))
        found = [(weight, name, _array(dataset)) for weight, name, dataset in pairs]
    for _, name, array in found:
        if not np.isfinite(array).all():
            raise UserError("%s is of no use: its weight %s is not finite; take an earlier one." % (path, _one_line(name)))
    for weight, _, array in found:
        weight.assign(array)
    network.normalisation = normalisation


def start_from(network: Any, path: str) -> None:
    """Read an encoder's weights for a training to start from: as `load_weights`, but brought to the scale of `network`.

    path: a file, or a name in SHIPPED. What a step of an optimiser does depends on how large the kernels are, which differs tenfold
    between files, while BatchNorm takes that out of the features. So each kernel is brought to the deviation that the network's own
    has, and bias and statistics with it; gamma makes up for BatchNorm's epsilon, so that the features in inference mode stay the
    file's. UserError as `load_weights`.
    """
    layers = _variables(network)
    drawn = [np.std(convolution["kernel"][1].numpy()) for convolution in layers[0]]
    epsilon = next(layer.epsilon for layer in network.submodules if isinstance(layer, keras.layers.BatchNormalization))
    load_weights(network, shipped(path).get("encoder_weights", path))
    for deviation, *pair in zip(drawn, *layers):
        own = {kind: variable for layer in pair for kind, (_, variable) in layer.items()}
        before, variance = np.std(own["kernel"].numpy()), own["moving_variance"].numpy().astype(np.float64)
        factor = deviation / before if before else 1.0
        after = factor ** 2 * variance
        own["gamma"].assign(own["gamma"].numpy() * np.sqrt((after + epsilon) / (variance + epsilon)) / factor)
        own["moving_variance"].assign(after)
        for kind in {"kernel", "bias", "moving_mean"} & set(own):
            own[kind].assign(factor * own[kind].numpy())


def shipped(name: str) -> Dict[str, Any]:
    """For the name of an encoder that comes with the program: its file, as encoder_weights, encoder and width_multiplier.

    For anything else, nothing; a file of the user's own that has such a name goes before.
    """
    if name not in SHIPPED or os.path.exists(name):
        return {}
    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "weights")
    return dict(SHIPPED[name], encoder_weights=os.path.join(folder, name + ".h5"))


def load_encoder(path: str, encoder: str = "resnet18", width_multiplier: float = 1.0, stem: Optional[str] = None,
                 **layers: Any) -> Any:
    """The encoder of a weights file, as a Keras 2 model: images (n, s, s, 3) float32 in [0, 1] to features float32 (n, d).

    path: a file, or a name in SHIPPED, whose architecture and width are known. Else encoder: a name in models.ENCODERS, and
    width_multiplier: as in pretraining. stem: by default the file's. layers: as models.ResNet takes them. UserError as `load_weights`.
    """
    known = shipped(path)
    path, encoder, width_multiplier = (known.get(name, value) for name, value in (
        ("encoder_weights", path), ("encoder", encoder), ("width_multiplier", width_multiplier)))
    network = models.ENCODERS[encoder](width_multiplier, stem=stem or settings_of(path)["stem"], **layers)
    load_weights(network, path)
    return network


def settings_of(path: str) -> Dict[str, Any]:
    """What an encoder's file was made with, as far as that is known here: encoder, width_multiplier, stem and normalise.

    path: a file, or a name in SHIPPED. The values are as pretraining's flags have them. UserError if the file is not whole.
    """
    with _reading(shipped(path).get("encoder_weights", path)) as file:
        return dict(_architecture(_layers(_datasets(file))), normalise=_normalisation(file))


class _Misfit(Exception):
    """The file is whole, but its weights are not those of the network."""


def _one_line(error: Any) -> str:
    return " ".join(str(error).split())[:300].strip("'\"")


# The file

@contextlib.contextmanager
def _reading(path: str) -> Iterator[Any]:
    """The file, opened; UserError with its name for what turns out to be wrong with it."""
    if not os.path.isfile(path):
        raise UserError("There is no weights file %s; pretraining.py writes f_online_<epoch>.h5 into its --output_dir, and with the "
                        "program comes %s." % (path, ", ".join(sorted(SHIPPED))))
    try:
        _check_seal(path)
        with h5py.File(path, "r") as file:
            yield file
    except _Misfit as error:
        raise UserError("%s %s" % (path, _one_line(error)))
    except (OSError, KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise UserError("%s is not a whole Keras weights file in HDF5 (%s); copy or save it again." % (path, _one_line(error)))


def _check_seal(path: str) -> None:
    """ValueError if the file ends with a checksum that is not that of what comes before. Other programs write none."""
    digest, left = hashlib.sha256(), os.path.getsize(path) - SEAL_BYTES
    with open(path, "rb") as file:
        file.seek(max(0, left))
        seal = file.read()
        if not (seal.startswith(SEAL[:8]) or seal.endswith(SEAL[-8:])):
            return
        file.seek(0)
        while left > 0:
            block = file.read(min(left, 1 << 20))
            digest.update(block)
            left -= len(block) or left
    if seal != SEAL % digest.hexdigest().encode():
        raise ValueError("it has changed since it was written")


def _datasets(file: Any) -> Iterable[Tuple[str, Tuple[str, Any]]]:
    """(layer/weight, (its name, its h5py.Dataset, of which nothing is read yet)) in the file's order."""
    root = _item(file, "model_weights", h5py.Group) if file.get("model_weights", getlink=True) else file
    for group_name in _names(root, "layer_names"):
        group = _item(root, group_name, h5py.Group)
        for name in _names(group, "weight_names"):
            dataset = _item(group, name, h5py.Dataset)
            _check(dataset)
            yield "%s|%s" % (group_name, name), (name, dataset)


def _item(group: Any, path: str, kind: Any) -> Any:
    """What is at `path` below `group`; ValueError if it is not of this kind, or if a link leads there, which may leave the file."""
    for part in path.split("/"):
        link = group.get(part, getlink=True) if part and isinstance(group, h5py.Group) else None
        if link is None:
            raise ValueError("it lacks %s" % path)
        if not isinstance(link, h5py.HardLink):
            raise ValueError("%s is a link to elsewhere" % path)
        group = group[part]
    if not isinstance(group, kind):
        raise ValueError("%s is not a %s" % (path, kind.__name__.lower()))
    return group


def _names(item: Any, attribute: str) -> List[str]:
    declared = item.attrs.get_id(attribute)
    if np.prod(declared.shape or (), dtype=float) * declared.dtype.itemsize > LARGEST_ATTRIBUTE:
        raise ValueError("its %s are too large" % attribute)
    names = item.attrs[attribute]
    if not isinstance(names, np.ndarray) or not all(isinstance(name, (bytes, str)) for name in names):
        raise ValueError("its %s are no list of names" % attribute)
    return [name.decode() if isinstance(name, bytes) else str(name) for name in names]


def _normalisation(file: Any) -> str:
    """The name in models.NORMALISATIONS of what the encoder does with images."""
    name, = _names(file, NORMALISATION) if NORMALISATION in file.attrs else ["none"]
    if name not in NORMALISATIONS:
        raise ValueError("it normalises images in a way that is not known here: %s" % name)
    return name


def _check(dataset: Any) -> None:
    """ValueError if it does not hold an array of numbers in the file itself, or one that takes much memory to unpack."""
    if dataset.is_virtual or dataset.external:
        raise ValueError("the numbers of %s lie in another file" % dataset.name)
    if not dataset.shape or dataset.dtype.kind != "f" or dataset.dtype.itemsize > 8:
        raise ValueError("%s is no array of float16, float32 or float64" % dataset.name)
    if np.prod(dataset.chunks or 1, dtype=float) > LARGEST_CHUNK:
        raise ValueError("%s is stored in chunks too large" % dataset.name)


def _array(dataset: Any) -> np.ndarray:
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, and so refused
        return np.asarray(dataset[()], np.float32)


# Which weight goes where

Layer = Dict[str, Tuple[str, Any]]  # from 'kernel' etc. to a weight's name, and the variable or the h5py.Dataset
Layers = Tuple[List[Layer], List[Layer]]


def _layers(weights: Iterable[Tuple[str, Tuple[str, Any]]]) -> Layers:
    """(layer/weight, what there is of it) in order -> convolutions in order, and the BatchNorm after each."""
    by_layer = collections.OrderedDict()  # type: Dict[str, Layer]
    for path, weight in weights:
        layer, _, kind = path.rpartition("/")
        by_layer.setdefault(layer, {})[kind.split(":")[0]] = weight
    norms = [layer for layer in by_layer.values() if {"gamma", "beta", "moving_mean", "moving_variance"} & set(layer)]
    return [layer for layer in by_layer.values() if "kernel" in layer or "bias" in layer], norms


def _variables(network: Any) -> Layers:
    """A network's own, as `_layers` orders them: (name, variable) of each weight."""
    return _layers((weight.name, (weight.name, weight)) for weight in network.trainable_weights + network.non_trainable_weights)


def _match(wanted: Layers, given: Layers) -> Iterable[Tuple[Any, str, Any]]:
    """(variable, name in the file, h5py.Dataset) of each weight. _Misfit if they do not fit.

    A block's shortcut may stand before its other convolutions: shapes tell it apart.
    """
    ours, theirs = _describe(wanted), _describe(given)
    if ours != theirs:
        raise _Misfit("holds the weights of %s, but they are to go into %s: give the --encoder, --width_multiplier and "
                      "--stem that it was made with." % (theirs, ours))
    for (first, *_), others in zip(wanted, given):
        for other in others:
            for kind in set(first) - set(other):
                some = next(iter(other.values()))[0]
                raise _Misfit("lacks the weight %s/%s; copy or save it again." % (some.rpartition("/")[0], kind))
    left = list(zip(*given))
    for layers in zip(*wanted):
        place = next((i for i, other in enumerate(left[:3]) if all(map(_same, layers, other))), None)
        if place is None:
            raise _Misfit("holds weights whose shapes, from %s on, are not those of %s." % (next(iter(left[0][0].values()))[0], ours))
        if place and len(wanted[1]) == BOTTLENECKS:  # in stage 1 a shortcut has the shape of a convolution beside it
            raise _Misfit("lists a shortcut before its block's convolutions, which for resnet50 does not tell which is which; save it "
                          "in the order of f_online_<epoch>.h5.")
        for layer, other in zip(layers, left.pop(place)):
            for kind, (_, variable) in layer.items():
                yield (variable,) + other[kind]


def _same(layer: Layer, other: Layer) -> bool:
    return {kind: tuple(item.shape) for kind, (_, item) in layer.items()} == {
        kind: tuple(item.shape) for kind, (_, item) in other.items()}


def _describe(layers: Layers) -> str:
    """For example: resnet18 with width_multiplier 0.25 and the stem cifar."""
    found = _architecture(layers)
    if "encoder" not in found:
        return "no encoder known here (%d convolutions or dense layers, %d BatchNorms)" % tuple(map(len, layers))
    return "%(encoder)s with width_multiplier %(width_multiplier)g and the stem %(stem)s" % found


def _architecture(layers: Layers) -> Dict[str, Any]:
    """The stem, and if they are an encoder's that is known here, encoder and width_multiplier."""
    convolutions, norms = layers
    first = convolutions[0] if convolutions else {}
    side = first["kernel"][1].shape[0] if "kernel" in first else 0
    found = {"stem": "imagenet" if side == models.STEMS["imagenet"][0] else "cifar"}  # type: Dict[str, Any]
    names = {20: "resnet18", 36: "resnet34", BOTTLENECKS: "resnet50"}
    if len(convolutions) == len(norms) and len(norms) in names:
        found.update(encoder=names[len(norms)], width_multiplier=next(iter(norms[0].values()))[1].shape[-1] / 64)
    return found
