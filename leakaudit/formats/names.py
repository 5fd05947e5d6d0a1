"""Parameter names as wrappers change them: `module.conv.weight` is `conv.weight` to the model."""

from __future__ import annotations

from collections.abc import Iterable

PREFIXES = ("module.", "_orig_mod.", "_module.")
"""DataParallel and DistributedDataParallel, torch.compile, Opacus' GradSampleModule."""


def strip_prefix(name: str) -> str:
    """`name` without the prefixes that wrappers put in front, however many are stacked."""
    while True:
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            return name
        name = name[len(prefix) :]


def strip_prefixes(names: Iterable[str]) -> dict[str, str]:
    """{name as found: name without wrapper prefixes}, in order.

    Names are left as they are when stripping would make two of them equal.
    """
    found = list(names)
    stripped = [strip_prefix(name) for name in found]
    return dict(zip(found, stripped if len(set(stripped)) == len(set(found)) else found, strict=True))
