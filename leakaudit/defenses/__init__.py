"""Defenses: one family a file, each a decorator of the client's update.

A defense is a frozen dataclass with `wrap(client, generator) -> client`: it takes the function
that makes an update and returns one that makes the defended update.
"""

from leakaudit.defenses.base import Defense, adapt, apply, preset
from leakaudit.defenses.batch import LargerBatch, LocalSteps
from leakaudit.defenses.clipping import Clip
from leakaudit.defenses.dp_sgd import DPSGD, ClipExamples
from leakaudit.defenses.freezing import Freeze
from leakaudit.defenses.input_noise import InputNoise
from leakaudit.defenses.mixup import MixUp
from leakaudit.defenses.noise import GaussianNoise, LaplaceNoise
from leakaudit.defenses.pruning import DeepGradientCompression, RandomK, TopK
from leakaudit.defenses.quantisation import Quantise
from leakaudit.defenses.secure_aggregation import SecureAggregation
from leakaudit.defenses.soteria import Soteria
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
        "batch": LargerBatch(),
        "local-steps": LocalSteps(),
        "secure-aggregation": SecureAggregation(),
        "freeze": Freeze(),
        "mixup": MixUp(),
        "input-noise": InputNoise(),
        "soteria": Soteria(),
    },
)

__all__ = [
    "DEFENSES",
    "DPSGD",
    "Clip",
    "ClipExamples",
    "DeepGradientCompression",
    "Defense",
    "Freeze",
    "GaussianNoise",
    "InputNoise",
    "LaplaceNoise",
    "LargerBatch",
    "LocalSteps",
    "MixUp",
    "Quantise",
    "RandomK",
    "SecureAggregation",
    "Soteria",
    "TopK",
    "adapt",
    "apply",
]
