"""Defenses: one family a file, each a decorator of the client's update.

A defense is a frozen dataclass with `wrap(client, generator) -> client`: it takes the function
that makes an update and returns one that makes the defended update.
"""

from leakaudit.defenses.base import Defense, adapt, apply, preset
from leakaudit.defenses.clipping import Clip
from leakaudit.defenses.dp_sgd import DPSGD, ClipExamples
from leakaudit.defenses.noise import GaussianNoise, LaplaceNoise
from leakaudit.defenses.pruning import DeepGradientCompression, RandomK, TopK
from leakaudit.defenses.quantisation import Quantise
from leakaudit.plugins import Registry

DEFENSES: Registry[Defense] = Registry(
    "leakaudit.defenses",
    "defense",
    preset,
    {
        "gaussian-noise": GaussianNoise(),
        "laplace-noise": LaplaceNoise(),
        "top-k": TopK(),
        "random-k": RandomK(),
        "dgc": DeepGradientCompression(),
        "quantise": Quantise(),
        "clip": Clip(),
        "clip-examples": ClipExamples(),
        "dp-sgd": DPSGD(),
    },
)

__all__ = [
    "DEFENSES",
    "DPSGD",
    "Clip",
    "ClipExamples",
    "DeepGradientCompression",
    "Defense",
    "GaussianNoise",
    "LaplaceNoise",
    "Quantise",
    "RandomK",
    "TopK",
    "adapt",
    "apply",
]
