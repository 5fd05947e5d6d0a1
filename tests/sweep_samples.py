"""Synthetic sweeps: made-up scores for the tests of the gate and of what is written for CI.  No audit was run."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from typing import Any

from leakaudit.gate import Baseline, gate, judge_cell
from leakaudit.policy import parse_policy
from leakaudit.results import VerdictStatus
from leakaudit.sweep_results import (
    Adversary,
    Bound,
    Cell,
    Example,
    Run,
    RunStatus,
    SweepResult,
    Utility,
)

TODAY = date(2026, 3, 1)
POLICY = "ssim>0.5,psnr>20"
SAFE = {"ssim": 0.1, "psnr": 9.0}
LEAKING = {"ssim": 0.93, "psnr": 31.0}


def sample_run(
    scores: Sequence[dict[str, float | None]] = (SAFE, SAFE),
    *,
    group: int = 0,
    seed: int = 0,
    status: RunStatus = "done",
    verdict: VerdictStatus | None = None,
    reasons: Sequence[str] = ("The positive control did not run.",),
    error: str = "",
    headline: str = "",
) -> Run:
    """By default as the engine leaves it: the verdict by the scores, inconclusive for want of a control."""
    broken = parse_policy("ssim>0.5,psnr>20").broken_by(scores)
    judged: VerdictStatus | None = ("leaks" if broken else "inconclusive") if status == "done" else None
    return Run(
        key=f"synthetic-{group}-{seed}",
        group=group,
        seed=seed,
        status=status,
        error=error,
        verdict=verdict or judged,
        headline=headline,
        reasons=list(reasons),
        attack="synthetic",
        residual=0.02,
        seconds=1.5,
        examples=[Example(index=index, scores=row) for index, row in enumerate(scores)],
    )


def sample_cell(
    defense: str = "gaussian-noise:std=0.01",
    scores: dict[str, float | None] = SAFE,
    *,
    protocol: str = "fedsgd",
    attack: str = "dlg",
    adversary: Adversary = "oblivious",
    control: bool | None = True,
    runs: Sequence[Run] | None = None,
    policy: str = POLICY,
    quantile: float = 1.0,
) -> Cell:
    """A judged cell of two runs with two examples each, all with the same scores unless runs are given."""
    runs = [sample_run([scores, scores], seed=seed) for seed in range(2)] if runs is None else list(runs)
    verdict, reasons = judge_cell(runs, parse_policy(policy), quantile, control)
    return Cell(
        protocol=protocol,
        defense=defense,
        attack=attack,
        adversary=adversary,
        family=defense.partition(":")[0],
        runs=list(runs),
        verdict=verdict,
        reasons=reasons,
        control=control,
    )


def sample_cells() -> list[Cell]:
    """One of each kind: leaks to both adversaries, leaks to the adaptive one only, holds, fails, doubtful."""
    fedavg = "fedavg:steps=5,learning_rate=0.1"
    failed = [sample_run(seed=0), sample_run((), seed=1, status="failed", error="out of memory")]
    return [
        sample_cell("none", LEAKING),
        sample_cell("gaussian-noise:std=0.01", SAFE),
        sample_cell("gaussian-noise:std=0.01", {"ssim": 0.61, "psnr": 19.0}, adversary="adaptive"),
        sample_cell("gaussian-noise:std=0.1", SAFE),
        sample_cell("gaussian-noise:std=0.1", SAFE, adversary="adaptive"),
        sample_cell("dp-sgd:noise_multiplier=1.0,max_grad_norm=1.0", SAFE, protocol=fedavg),
        sample_cell("top-k:keep=0.1", SAFE, protocol=fedavg, runs=failed),
        sample_cell("sign", SAFE, protocol=fedavg, control=False),
    ]


def sample_sweep(
    cells: Sequence[Cell] | None = None,
    *,
    policy: str = POLICY,
    quantile: float = 1.0,
    baseline: Baseline | None = None,
    today: date = TODAY,
    **changes: Any,
) -> SweepResult:
    """A sweep over the cells (those of `sample_cells` unless given), gated; `changes` are other fields."""
    cells = sample_cells() if cells is None else list(cells)
    noisy, dp = "gaussian-noise:std=0.01", "dp-sgd:noise_multiplier=1.0,max_grad_norm=1.0"
    fedavg = "fedavg:steps=5,learning_rate=0.1"
    fields: dict[str, Any] = {
        "created": "2026-03-01T12:00:00+00:00",
        "command": "leakaudit defend --config audit.toml --fail-on 'ssim>0.5,psnr>20'",
        "model": "synthetic-cnn",
        "parameters": 1234,
        "examples": 4,
        "seeds": 2,
        "seed": 0,
        "metrics": ["ssim", "psnr"],
        "cells": cells,
        "utilities": [
            Utility(protocol="fedsgd", defense=noisy, accuracy=0.712, low=0.69, high=0.734),
            Utility(protocol=fedavg, defense=dp, accuracy=0.65, epsilon=3.2, delta=1e-5),
        ],
        "bounds": [
            Bound(protocol=fedavg, defense=dp, name="epsilon", kind="bound", quantity="epsilon", value=3.2,
                  text="synthetic", source="synthetic"),
            Bound(protocol=fedavg, defense=dp, name="reconstruction-robustness", kind="bound",
                  quantity="probability", value=0.12, text="synthetic", source="synthetic"),
            Bound(protocol="fedsgd", defense=noisy, name="bayesian-cramer-rao", kind="indicator", quantity="mse",
                  value=0.021, text="synthetic", source="synthetic"),
        ],
        "gate": gate(cells, parse_policy(policy), quantile, baseline, today),
        "files": {"audit.toml": "0" * 64},
        **changes,
    }  # fmt: skip
    return SweepResult(**fields)
