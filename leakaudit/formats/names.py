"""Parameter names as wrappers change them: `module.conv.weight` is `conv.weight` to the model."""

from __future__ import annotations

from collections.abc import Iterable

PREFIXES = ("module.", "_orig_mod.", "_module.")
"""DataParallel and DistributedDataParallel, torch.compile, Opacus' GradSampleModule."""


def strip_prefix(name: str) -> str:
    """`name` without what wrappers put in front, however many are stacked.

    `_orig_mod.` goes wherever it stands, because submodules are compiled by themselves too.
    """
    while True:
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            return name.replace("._orig_mod.", ".")
        name = name[len(prefix) :]


def strip_prefixes(names: Iterable[str]) -> dict[str, str]:
    """{name as found: name without wrapper prefixes}, in order.

    Names are left as they are when stripping would make two of them equal or leave one empty.
    """
    found = list(dict.fromkeys(names))
    stripped = [strip_prefix(name) for name in found]
    clear = len(set(stripped)) == len(found) and all(stripped)
    return dict(zip(found, stripped if clear else found, strict=True))
