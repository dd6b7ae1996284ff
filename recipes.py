"""How is trained: the settings of views, networks, optimiser and schedules, and recipes that set them all.

    python pretraining.py --recipe reference ...

A flag that is given wins over the recipe. config.json of a run holds what resulted.
"""
import dataclasses

import optimizers
import schedules
from augmentation import Views
from commands import UserError, flag
from models import INITIALIZERS, NORMALISATIONS

# ModelZoo's README: the reference's settings, but for the cosine schedule and the weight decay.
MODELZOO = {
    "crop": "reference", "min_area": 0.08, "flip_probability": 0.25, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1,
    "brightness_multiplies": False, "grey_probability": 0.2, "solarize_probability": 0.0, "blur_probability": 0.0,
    "blur_probability_second": 0.0, "color_order": "fixed", "num_views": 2,
    "kernel_initializer": "glorot", "target_start": "own", "normalise": "none", "head_hidden": 256, "head_features": 128,
    "optimizer": "adam", "learning_rate": 1e-3, "lr_schedule": "cosine", "warmup_epochs": 0, "momentum": 0.9, "weight_decay": 1e-4,
    "trust_coefficient": 1e-3, "target_momentum": 0.99, "target_momentum_schedule": "constant"}  # type: Dict[str, Any]
# Views and heads of Lightly's CIFAR-10 benchmark, four times the reference's rate: the best of docs/recipes.md's ladder with Adam.
CIFAR_ADAM = dict(MODELZOO, crop="area", flip_probability=0.5, saturation=0.2, solarize_probability=0.2, normalise="cifar10",
                  head_hidden=1024, head_features=256, learning_rate=4e-3, warmup_epochs=1)
RECIPES = {
    "modelzoo": MODELZOO,
    "reference": dict(MODELZOO, lr_schedule="constant", weight_decay=0.0),  # byol-tensorflow2
    # Lightly's SGD at twice its rate, its initial weights, and larger crops: the best of the whole ladder.
    "cifar": dict(CIFAR_ADAM, min_area=0.2, optimizer="sgd", learning_rate=0.24, weight_decay=1e-3, warmup_epochs=0,
                  kernel_initializer="torch", target_start="online"),
    "cifar-adam": CIFAR_ADAM,
    # arXiv:2006.07733, its appendices on implementation and augmentations, for 1,000 epochs; the rate is 0.2 for a batch of 256.
    "paper": dict(MODELZOO, crop="area", flip_probability=0.5, saturation=0.2, color_order="random", blur_probability=1.0,
                  blur_probability_second=0.1, solarize_probability=0.2, normalise="imagenet", head_hidden=4096, head_features=256,
                  optimizer="lars", learning_rate=0.4, warmup_epochs=10, weight_decay=1.5e-6, target_momentum=0.996,
                  target_momentum_schedule="cosine"),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The settings that a recipe fixes: those that are None are taken from the recipe when the object is made."""
    recipe: str = flag("modelzoo", "Sets the defaults of the flags for views, heads, optimiser and schedules. modelzoo: as "
                       "ModelZoo's README; reference: as byol-tensorflow2, constant rate, no decay; "
                       "cifar: what did best on CIFAR-10 here; cifar-adam: its first version, with Adam; "
                       "paper: BYOL as published.", choices=sorted(RECIPES))
    crop: str = flag(None, "Rectangles of a view: reference (sides of 13 to 32 of 32 pixels, byol-tensorflow2), or area (part of the "
                     "image and aspect ratio, as the paper and torchvision).", choices=("reference", "area"))
    min_area: float = flag(None, "The smallest part of the image with --crop area (paper: 0.08).", low=0.001, high=1)
    flip_probability: float = flag(None, "Of a horizontal flip (byol-tensorflow2: 0.25; paper: 0.5).", low=0, high=1)
    brightness: float = flag(None, "Strength of the change of brightness (all: 0.4).", low=0, high=1)
    contrast: float = flag(None, "Strength of the change of contrast (all: 0.4).", low=0, high=1)
    saturation: float = flag(None, "Strength of the change of saturation (byol-tensorflow2: 0.4; paper: 0.2).", low=0, high=1)
    hue: float = flag(None, "Strength of the change of hue, in turns of the colour circle (all: 0.1).", low=0, high=0.5)
    brightness_multiplies: bool = flag(None, "Multiply by the change of brightness, as torchvision, instead of adding it.")
    grey_probability: float = flag(None, "Of turning a view grey (all: 0.2).", low=0, high=1)
    solarize_probability: float = flag(None, "Of inverting what is brighter than a half, in the second view (paper: 0.2).", low=0,
                                       high=1)
    blur_probability: float = flag(None, "Of a Gaussian blur in the first view (paper: 1).", low=0, high=1)
    blur_probability_second: float = flag(None, "Of a Gaussian blur in the second view (paper: 0.1).", low=0, high=1)
    color_order: str = flag(None, "Of brightness, contrast, saturation and hue: fixed (byol-tensorflow2), or random for each image, "
                            "with a clip after each (paper).", choices=("fixed", "random"))
    num_views: int = flag(None, "Views of each image in a step. BYOL: 2; with more, the target of each is the mean of the others "
                          "(FastSiam: 4).", low=2, high=16)
    normalise: str = flag(None, "Subtract this data set's mean from the images and divide by its deviation, in the encoder; its "
                          "weight files keep that (paper: imagenet; Lightly, solo-learn: cifar10).", choices=sorted(NORMALISATIONS))
    kernel_initializer: str = flag(None, "How the kernels of all networks are drawn at first: glorot (byol-tensorflow2, Keras), or "
                                   "torch, uniform within 1 / sqrt(fan in) (Lightly).", choices=sorted(INITIALIZERS))
    target_start: str = flag(None, "Weights that the target networks start from: own, drawn for them (byol-tensorflow2, DeepMind), or "
                             "online, copies of the online networks' (Lightly, solo-learn).", choices=("own", "online"))
    head_hidden: int = flag(None, "Hidden size of projector and predictor (byol-tensorflow2: 256; Lightly: 1024; paper: 4096).", low=1,
                            high=65536)
    head_features: int = flag(None, "Output size of projector and predictor (byol-tensorflow2: 128; paper: 256).", low=1, high=65536)
    optimizer: str = flag(None, "adam (byol-tensorflow2), sgd (Lightly) or lars (paper, solo-learn).", choices=optimizers.NAMES)
    learning_rate: float = flag(None, "For a batch of 512; scaled by batch_size / 512 (reference: 0.001).", low=0)
    lr_schedule: str = flag(None, "cosine to 0 over the run (ModelZoo README), or constant (reference).",
                            choices=sorted(schedules.LEARNING_RATES))
    warmup_epochs: int = flag(None, "Epochs in which the rate rises linearly from 0 (paper and solo-learn: 10).", low=0)
    momentum: float = flag(None, "Adam's beta_1, or the momentum of SGD and LARS (ModelZoo README: 0.9).", low=0, high=0.9999)
    weight_decay: float = flag(None, "On kernels only. With Adam decoupled, times the learning rate (ModelZoo README: 1e-4; "
                               "reference: 0); with SGD and LARS added to the gradient.", low=0)
    trust_coefficient: float = flag(None, "Of LARS: a kernel's step is this times its norm over its gradient's (paper: 0.001; "
                                    "solo-learn: 0.02).", low=0)
    target_momentum: float = flag(None, "Momentum tau of the target's exponential moving average (reference: 0.99); with the cosine "
                                  "schedule, that of the first step.", low=0, high=1)
    target_momentum_schedule: str = flag(None, "constant (reference), or cosine: from --target_momentum to 1 over the run (paper).",
                                         choices=("constant", "cosine"))

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise UserError("--recipe is %r; give one of %s." % (self.recipe, ", ".join(sorted(RECIPES))))
        for name, value in RECIPES[self.recipe].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def views(self) -> Views:
        """How views are made."""
        return Views(crop=self.crop, min_area=self.min_area, flip=self.flip_probability, brightness=self.brightness,
                     contrast=self.contrast, saturation=self.saturation, hue=self.hue,
                     brightness_multiplies=self.brightness_multiplies, grey=self.grey_probability,
                     solarise=(0.0, self.solarize_probability),
                     blur=(self.blur_probability, self.blur_probability_second), colour_order=self.color_order)
