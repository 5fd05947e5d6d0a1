"""Every attack by name.  A preset is an instance; its citation stands where it is defined."""

from __future__ import annotations

import dataclasses
from typing import Literal

from leakaudit.attacks.base import Attack
from leakaudit.attacks.embedding_matching import EMBEDDING_ATTACKS, EMBEDDING_DESCRIPTIONS
from leakaudit.attacks.gradient_matching import (
    DLG,
    IDLG,
    INVERTING_GRADIENTS,
    TUNED_INVERTING_GRADIENTS,
    TV_PATH,
)
from leakaudit.attacks.levenberg_marquardt import LevenbergMarquardt
from leakaudit.attacks.linear import Linear, PatchEmbeddingInverse
from leakaudit.attacks.recursive import Recursive
from leakaudit.attacks.text_recovery import EXACT_TEXT_ATTACKS, EXACT_TEXT_DESCRIPTIONS
from leakaudit.plugins import Registry, instance

IMAGE_ATTACKS: dict[str, Attack] = {
    "linear": Linear(),
    "patch-embedding": PatchEmbeddingInverse(),
    "recursive": Recursive(),
    "levenberg-marquardt": LevenbergMarquardt(),
    "tv-path": TV_PATH,
    "dlg": DLG,
    "idlg": IDLG,
    "inverting-gradients": INVERTING_GRADIENTS,
    "tuned-inverting-gradients": TUNED_INVERTING_GRADIENTS,
}

TEXT_ATTACKS: dict[str, Attack] = EXACT_TEXT_ATTACKS | EMBEDDING_ATTACKS


def _preset(name: str, loaded: object) -> Attack:
    """What an installed package offers as the attack `name`; `ValueError` unless it is one."""
    found = instance(loaded)
    needed = ("restarts", "applies", "run")
    if not dataclasses.is_dataclass(found) or not all(hasattr(found, part) for part in needed):
        raise ValueError(
            f"it is a {type(found).__name__}; accepted: a frozen dataclass with restarts, applies and run, as"
            " leakaudit.attacks.base.Attack says"
        )
    return found  # type: ignore[return-value]


ATTACKS: Registry[Attack] = Registry("leakaudit.attacks", "attack", _preset, IMAGE_ATTACKS | TEXT_ATTACKS)
"""Ours, and those of installed packages; one for text says so by an attribute `medium` of "text"."""

DESCRIPTIONS: dict[str, str] = {
    "linear": "closed form through the first fully connected layer (Phong et al. 2017, Boenisch et al. 2021)",
    "patch-embedding": "closed form through a vision transformer's position embedding (after Lu et al. 2022)",
    "recursive": "layer by layer in least squares, the rest by a prior (after Zhu and Blaschko 2021, R-GAP)",
    "levenberg-marquardt": "damped Gauss-Newton with the explicit Jacobian; machine precision on smooth networks",
    "tv-path": "L-BFGS with a prior on images weakened in stages; for batches of smooth networks and known noise",
    "dlg": "L-BFGS on squared distance with joint soft labels (Zhu et al. 2019)",
    "idlg": "as dlg, labels inferred first (Zhao et al. 2020)",
    "inverting-gradients": "cosine distance, signed Adam, total variation (Geiping et al. 2020)",
    "tuned-inverting-gradients": "the same, the weight of the prior chosen by the matching loss",
    **EXACT_TEXT_DESCRIPTIONS,
    **EMBEDDING_DESCRIPTIONS,
}

AUTO = (
    "linear",
    "patch-embedding",
    "recursive",
    "levenberg-marquardt",
    "tv-path",
    "idlg",
    "tuned-inverting-gradients",
)
"""What `auto` tries on images, from cheap to dear."""

TEXT_AUTO = ("bag-of-tokens", "position-rows", "span-check", "tiger", "lamp")
"""What `auto` tries on text, from cheap to dear."""

EXACT = ("linear", "patch-embedding", "levenberg-marquardt", "dlg", "idlg", *TEXT_ATTACKS)
"""Attacks without a prior on images, or as `auto` runs them on texts: once the update is matched, another
match tells nothing new, while a prior can still choose among the inputs that share the update."""

MAXIMUM_A_POSTERIORI = ("tv-path",)
"""Attacks that weigh the match against a prior on photographs when errors of known size disturb the update."""


def medium_of_attack(name: str) -> Literal["images", "text"]:
    """What the attack reconstructs."""
    if name in TEXT_ATTACKS or name in IMAGE_ATTACKS:
        return "text" if name in TEXT_ATTACKS else "images"
    return "text" if getattr(ATTACKS[name], "medium", "images") == "text" else "images"


def describe_attack(name: str) -> str:
    """One line: what the attack does."""
    return DESCRIPTIONS.get(name) or (type(ATTACKS[name]).__doc__ or "").strip().partition("\n")[0]
