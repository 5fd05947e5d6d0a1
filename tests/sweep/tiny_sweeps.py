"""Sweeps of a tiny network over the bundled photos, in this process, for the tests of sweeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_audits import FACTORIES

from leakaudit.data import photo_folder
from leakaudit.sweep.config import SweepConfig, build_config

VOLATILE = ("created", "seconds", "command", "environment", "config", "model")
"""What two runs of the same sweep may differ in."""


def values(folder: Path, **changes: Any) -> dict[str, Any]:
    """A sweep of 2 photos: closed form against two defenses, 1 + 2 x 2 cells of 2 runs."""
    (folder / "models.py").write_text(FACTORIES)
    own = {
        "model": f"{folder}/models.py:mlp",
        "data": str(photo_folder()),
        "input_shape": (3, 8, 8),
        "num_classes": 5,
        "images": 2,
        "attacks": ["linear"],
        "defenses": ["gaussian-noise:std=1e-4,10"],
        "metrics": ["psnr"],
        "fail_on": "psnr>20",
        "budget": 60,
        "workers": 0,
        "device": "cpu",
        "utility": False,
        "bounds": False,
        "out": str(folder / "out"),
    }
    return {**own, **changes}


def config(folder: Path, **changes: Any) -> SweepConfig:
    return build_config(values(folder, **changes))


def timeless(value: Any) -> Any:
    """JSON values without what two runs of the same sweep may differ in."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in VOLATILE}
    return [timeless(item) for item in value] if isinstance(value, list) else value
