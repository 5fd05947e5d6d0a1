"""Parameter names as wrappers change them: `module.conv.weight` is `conv.weight` to the model."""

from __future__ import annotations

from collections.abc import Iterable

PREFIXES = ("module.", "_orig_mod.", "_module.", "base_model.model.")
"""DataParallel and DistributedDataParallel, torch.compile, Opacus' GradSampleModule, PEFT."""

INNER = {
    "._orig_mod.": ".",
    ".lora_A.default.": ".lora_A.",
    ".lora_B.default.": ".lora_B.",
    ".modules_to_save.default.": ".",
}
"""What wrappers put inside a name -> what stands there without them."""


def strip_prefix(name: str) -> str:
    """`name` without what wrappers put in front, however many are stacked.

    `_orig_mod.` goes wherever it stands, because submodules are compiled by themselves too, and so does
    the name `default` that PEFT gives an adapter, with the copy it trains of a head.
    """
    while True:
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            for inner, plain in INNER.items():
                name = name.replace(inner, plain)
            return name
        name = name[len(prefix) :]


def strip_prefixes(names: Iterable[str]) -> dict[str, str]:
    """{name as found: name without wrapper prefixes}, in order.

    Names are left as they are when stripping would make two of them equal or leave one empty.
    """
    found = list(dict.fromkeys(names))
    stripped = [strip_prefix(name) for name in found]
    clear = len(set(stripped)) == len(found) and all(stripped)
    return dict(zip(found, stripped if clear else found, strict=True))
