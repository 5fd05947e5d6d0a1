"""Finished attempts on disk, so that an interrupted audit can be resumed.

An attempt is filed under a key of everything that determines it: the observed update, the
checkpoint, what the adversary knows, the attack's spec, the seed and the restart.  An
interrupted attempt is not kept: it starts again from its seed, so a resumed audit ends with
the same result as one that was left alone.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from leakaudit.attacks.base import Reconstruction
from leakaudit.errors import InputError
from leakaudit.formats.reading import read_safetensors
from leakaudit.formats.writing import save_tensors
from leakaudit.threat import View


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
            frames = tensors["strip"].float()
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
        frames = [x.cpu().to(torch.float32) for _, _, x in found.strip]
        tensors = {"x": found.x.cpu(), "y": found.y.cpu(), "strip": torch.stack(frames)}
        self._folder.mkdir(parents=True, exist_ok=True)
        save_tensors(self._path(restart), tensors, {"attempt": json.dumps(facts)})


def _fingerprint(view: View, spec: str, seed: int) -> str:
    digest = hashlib.sha256(repr((spec, seed, view.round, view.victim.mode, str(view.victim.dtype))).encode())
    digest.update(repr([(name, str(fact.value), fact.status) for name, fact in view.knowledge]).encode())
    for tensors in (view.observed, view.victim.params, view.victim.frozen, view.victim.buffers):
        for name, tensor in tensors.items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
