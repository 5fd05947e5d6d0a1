"""Membership and property inference: what an update tells of its records when they cannot be reconstructed."""

from leakaudit.inference.alignment import Alignment, LossDrop
from leakaudit.inference.base import Evidence, Inference, Question, Records
from leakaudit.inference.likelihood import LikelihoodRatio
from leakaudit.inference.properties import PropertyClassifier
from leakaudit.inference.words import Words

INFERENCES: dict[str, Inference] = {
    "membership-likelihood": LikelihoodRatio(),
    "membership-gradient": Alignment(),
    "membership-loss": LossDrop(),
    "membership-words": Words(),
    "property": PropertyClassifier(),
}

DESCRIPTIONS: dict[str, str] = {
    "membership-likelihood": "likelihood ratio, the rest of the batch as coloured noise (after Carlini et al. 2022)",
    "membership-gradient": "cosine with the record's own gradient (Nasr et al. 2019, Li et al. 2022)",
    "membership-loss": "how much the update lowers the record's loss (Yeom et al. 2018)",
    "membership-words": "rows of the word embedding that moved (Melis et al. 2019)",
    "property": "classifier of simulated updates with and without a property (Melis et al. 2019)",
}

__all__ = [
    "DESCRIPTIONS",
    "INFERENCES",
    "Alignment",
    "Evidence",
    "Inference",
    "LikelihoodRatio",
    "LossDrop",
    "PropertyClassifier",
    "Question",
    "Records",
    "Words",
]
