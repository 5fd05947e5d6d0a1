"""Low-rank adapters as PEFT trains and names them (Hu et al. 2022, LoRA).

The adapted layer computes  W x + b + (alpha / r) B A x  with A (r, in) and B (out, r) trained, W and b
frozen.  Freshly, A is uniform (Kaiming, a = sqrt 5) and B zero.  Names are those of a saved adapter without
its wrapper: `...query.lora_A.weight`, `...query.lora_B.weight`.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leakaudit.errors import InputError
from leakaudit.formats.checkpoint import read_state_dict
from leakaudit.formats.phrases import first_line, listing, quoted
from leakaudit.models.architectures import is_conv1d
from leakaudit.spec import parse

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
ALL_LINEAR = "all-linear"
"""In place of targets: every linear layer but those of the head, as PEFT takes it."""
UNKNOWN_OPTIONS = (
    "alpha_pattern", "rank_pattern", "use_dora", "layers_to_transform", "layers_pattern", "exclude_modules",
    "target_parameters", "layer_replication", "lora_bias",
)  # fmt: skip
"""Options of PEFT under which the adapted layer computes something else."""


@dataclass(frozen=True)
class Lora:
    """What is adapted, and how.

    Attributes:
        rank, alpha: r and alpha; the product B A is scaled by alpha / r (by alpha / sqrt r with `rslora`).
        targets: last parts of the names of adapted modules, with + between, or `ALL_LINEAR`.
        folder: where trained adapters are; None for fresh ones.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str = "query+value"
    rslora: bool = False
    folder: str | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")

    @property
    def options(self) -> str:
        """What `parse` makes the same adapters of, weights apart, without naming a folder."""
        return (
            f"rank={self.rank},alpha={self.alpha:g},targets={self.targets},rslora={str(self.rslora).lower()}"
        )

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @classmethod
    def parse(cls, text: str) -> Lora:
        """A folder that PEFT's `save_pretrained` wrote, or options such as `rank=8,alpha=16,targets=query+value`.

        Raises `InputError` for anything else.
        """
        folder = Path(text)
        if not os.path.isdir(text):
            return parse(f"lora:{text}", {"lora": cls()}, "adapter")
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            targets = config["target_modules"]
            _refuse_unknown(config, targets)
            return cls(
                rank=int(config["r"]),
                alpha=float(config["lora_alpha"]),
                targets="+".join(targets) if isinstance(targets, list) else str(targets),
                rslora=bool(config.get("use_rslora", False)),
                folder=text,
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder} holds no LoRA adapter of PEFT: {first_line(error)}") from error


def _refuse_unknown(config: dict[str, Any], targets: object) -> None:
    """`ValueError` for what PEFT can do and this cannot."""
    kind, bias = config.get("peft_type", "LORA"), config.get("bias", "none")
    given = [name for name in UNKNOWN_OPTIONS if config.get(name)]
    if kind != "LORA" or bias != "none" or given:
        what = listing(given) or (f"bias {bias!r}" if kind == "LORA" else f"type {kind}")
        raise ValueError(f"{what} is not supported; accepted: plain LoRA, one rank and alpha for all layers")
    if isinstance(targets, str) and targets != ALL_LINEAR and not re.fullmatch(r"[\w.]+", targets):
        raise ValueError(f"target_modules {quoted(targets)} is a pattern; accepted: a list, or {ALL_LINEAR}")


class LoraLinear(nn.Module):
    """A frozen linear layer (`Linear`, or GPT-2's `Conv1D`) with a trained low-rank addition."""

    def __init__(self, base: nn.Module, rank: int, scale: float) -> None:
        super().__init__()
        weight: Tensor = base.weight  # type: ignore[assignment]
        outgoing, incoming = weight.shape[::-1] if is_conv1d(base) else weight.shape
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.Linear(incoming, rank, bias=False)
        self.lora_B = nn.Linear(rank, outgoing, bias=False)
        self.scale = scale
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.scale * F.linear(F.linear(x, self.lora_A.weight), self.lora_B.weight)


def attach(module: nn.Module, lora: Lora, head: tuple[str, ...] = ()) -> None:
    """Freeze `module` but for the parameters `head`, and put adapters on the targets, in place.

    Raises `InputError` when no layer has such a name, or the folder's weights do not fit.
    """
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in head)
    layers = _layers(module, lora.targets, head)
    if not layers:
        known = {name.rpartition(".")[2] for name in _linear_layers(module)}
        raise InputError(
            f"no layer of the model is called {lora.targets}; accepted as targets: {', '.join(sorted(known))}"
        )
    for name in layers:
        parent, _, child = name.rpartition(".")
        adapted = LoraLinear(module.get_submodule(name), lora.rank, lora.scale)
        setattr(module.get_submodule(parent), child, adapted)
    if lora.folder is not None:
        _load(module, Path(lora.folder) / WEIGHTS)


def _layers(module: nn.Module, targets: str, head: tuple[str, ...]) -> list[str]:
    """Names of the layers that end on a target, at a dot."""
    linear = _linear_layers(module)
    if targets != ALL_LINEAR:
        ends = tuple(f".{target}" for target in targets.split("+"))
        return [name for name in linear if f".{name}".endswith(ends)]
    model: Any = module
    scores = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [n for n, child in linear.items() if f"{n}.weight" not in head and child is not scores]


def _linear_layers(module: nn.Module) -> dict[str, nn.Module]:
    return {
        name: child
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear) or is_conv1d(child)
    }


def _load(module: nn.Module, path: Path) -> None:
    state = read_state_dict(path)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    misfits = [n for n in state if n not in trained or trained[n].shape != state[n].shape]
    misfits += [n for n in trained if "lora_" in n and n not in state]
    if misfits:
        raise InputError(f"{path} does not fit the model: {', '.join(sorted(misfits)[:3])}")
    with torch.no_grad():
        for name, tensor in state.items():
            trained[name].copy_(tensor)
