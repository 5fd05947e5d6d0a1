"""Defenses: one family a file, each a decorator of the client's update.

A defense is a frozen dataclass with `wrap(client, generator) -> client`: it takes the function
that makes an update and returns one that makes the defended update.
"""

from leakaudit.defenses.base import Defense, adapt, apply
from leakaudit.defenses.clipping import Clip
from leakaudit.defenses.dp_sgd import DPSGD, ClipExamples
from leakaudit.defenses.noise import GaussianNoise
from leakaudit.defenses.pruning import TopK
from leakaudit.defenses.quantisation import Quantise

DEFENSES: dict[str, Defense] = {
    "gaussian-noise": GaussianNoise(),
    "top-k": TopK(),
    "quantise": Quantise(),
    "clip": Clip(),
    "clip-examples": ClipExamples(),
    "dp-sgd": DPSGD(),
}

__all__ = [
    "DEFENSES",
    "DPSGD",
    "Clip",
    "ClipExamples",
    "Defense",
    "GaussianNoise",
    "Quantise",
    "TopK",
    "adapt",
    "apply",
]
