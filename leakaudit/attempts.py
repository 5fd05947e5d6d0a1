"""Finished attempts on disk, so that an interrupted audit can be resumed.

An attempt is filed under a key of everything that determines it: the observed update, the model and
its checkpoint, what the adversary knows, the attack's spec, the seed, the restart and our version.  An
interrupted attempt is not kept: it starts again from its seed, so a resumed audit ends with
the same result as one that was left alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from leakaudit import __version__
from leakaudit.attacks.base import Reconstruction
from leakaudit.errors import InputError
from leakaudit.formats.reading import read_safetensors
from leakaudit.formats.writing import save_tensors
from leakaudit.rounds import client_update
from leakaudit.threat import View, as_it_is


class AttemptStore:
    """Attempts of one attack on one view, as `folder`/KEY.safetensors."""

    def __init__(self, folder: Path, view: View, spec: str, seed: int) -> None:
        self._folder = folder
        self._device = view.victim.device
        self._key = _fingerprint(view, spec, seed)

    def _path(self, restart: int) -> Path:
        return self._folder / f"{self._key}-{restart}.safetensors"

    def get(self, restart: int) -> tuple[Reconstruction, float] | None:
        """The finished attempt and its seconds; None when there is none, or it cannot be read."""
        path = self._path(restart)
        if not path.exists():
            return None
        try:
            tensors, metadata = read_safetensors(path)
            facts = json.loads(metadata["attempt"])
            frames = [tensors[f"strip-{position:03d}"] for position in range(len(facts["strip"]))]
            found = Reconstruction(
                x=tensors["x"].to(self._device),
                y=tensors["y"].to(self._device),
                loss=facts["loss"],
                iterations=facts["iterations"],
                stopped=facts["stopped"],
                history=[(int(i), float(loss)) for i, loss in facts["history"]],
                strip=[(int(i), float(loss), x) for (i, loss), x in zip(facts["strip"], frames, strict=True)],
                details=facts["details"],
            )
            return found, float(facts["seconds"])
        except (InputError, KeyError, ValueError, TypeError):
            return None

    def put(self, restart: int, found: Reconstruction, seconds: float) -> None:
        """Write the attempt atomically."""
        facts = {
            "loss": found.loss,
            "iterations": found.iterations,
            "stopped": found.stopped,
            "history": found.history,
            "strip": [(iteration, loss) for iteration, loss, _ in found.strip],
            "details": found.details,
            "seconds": seconds,
        }
        frames = [x.cpu().to(torch.float32 if x.is_floating_point() else None) for _, _, x in found.strip]
        tensors = {f"strip-{position:03d}": frame for position, frame in enumerate(frames)}
        tensors |= {"x": found.x.cpu(), "y": found.y.cpu()}
        self._folder.mkdir(parents=True, exist_ok=True)
        save_tensors(self._path(restart), tensors, {"attempt": json.dumps(facts)})


def _fingerprint(view: View, spec: str, seed: int) -> str:
    victim = view.victim
    model = (victim.name, repr(victim.module), victim.mode, victim.loss_function.__name__, victim.space)
    digest = hashlib.sha256(repr((__version__, spec, seed, view.round, model, victim.dtype)).encode())
    facts = {name: (fact.value, fact.status) for name, fact in view.knowledge}
    simulated = (view.client is client_update, view.decode is as_it_is, dict(view.spread), view.slack or ())
    for content in (facts, simulated, view.observed, victim.params, victim.frozen, victim.buffers):
        _digest(content, digest)
    return digest.hexdigest()[:16]


def _digest(content: object, digest: hashlib._Hash) -> None:
    """Every number of every tensor counts; `repr` shows a tensor's first digits only."""
    if isinstance(content, Tensor):
        digest.update(repr((content.dtype, content.shape)).encode())
        digest.update(content.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(content, Mapping):
        for name, value in content.items():
            digest.update(repr(name).encode())
            _digest(value, digest)
    elif isinstance(content, tuple):
        for value in content:
            _digest(value, digest)
    else:
        digest.update(repr(content).encode())
