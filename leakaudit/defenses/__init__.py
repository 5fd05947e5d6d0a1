"""Defenses: one family a file, each a decorator of the client's update.

A defense is a frozen dataclass with `wrap(client, generator) -> client`: it takes the function
that makes an update and returns one that makes the defended update.
"""

from leakaudit.defenses.base import Defense, adapt, apply
from leakaudit.defenses.batch import LargerBatch, LocalSteps
from leakaudit.defenses.clipping import Clip
from leakaudit.defenses.freezing import Freeze
from leakaudit.defenses.input_noise import InputNoise
from leakaudit.defenses.mixup import MixUp
from leakaudit.defenses.noise import GaussianNoise
from leakaudit.defenses.pruning import TopK
from leakaudit.defenses.quantisation import Quantise
from leakaudit.defenses.secure_aggregation import SecureAggregation
from leakaudit.defenses.soteria import Soteria

DEFENSES: dict[str, Defense] = {
    "gaussian-noise": GaussianNoise(),
    "top-k": TopK(),
    "quantise": Quantise(),
    "clip": Clip(),
    "batch": LargerBatch(),
    "local-steps": LocalSteps(),
    "secure-aggregation": SecureAggregation(),
    "freeze": Freeze(),
    "mixup": MixUp(),
    "input-noise": InputNoise(),
    "soteria": Soteria(),
}

__all__ = [
    "DEFENSES",
    "Clip",
    "Defense",
    "Freeze",
    "GaussianNoise",
    "InputNoise",
    "LargerBatch",
    "LocalSteps",
    "MixUp",
    "Quantise",
    "SecureAggregation",
    "Soteria",
    "TopK",
    "adapt",
    "apply",
]
