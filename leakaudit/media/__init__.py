"""What differs between auditing images and auditing text; chosen once, by the victim's input space."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from leakaudit.media.base import Exhibit, Medium
from leakaudit.models.spaces import Pixels, Tokens
from leakaudit.models.victim import Victim
from leakaudit.policy import Medium as MediumName

__all__ = ["Exhibit", "Medium", "MediumName", "medium_of"]

_HOMES: dict[type, tuple[str, str]] = {
    Pixels: ("leakaudit.media.images", "IMAGES"),
    Tokens: ("leakaudit.media.text", "TEXT"),
}


def medium_of(victim: Victim) -> Medium[Any, Any]:
    """The medium of the victim's inputs; transformers is imported for text only."""
    module, name = _HOMES[type(victim.space)]
    return getattr(import_module(module), name)
