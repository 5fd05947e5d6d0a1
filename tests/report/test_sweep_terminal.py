"""A sweep in the terminal, at 80 columns."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from sweep_page_samples import SAMPLES, small_sweep

from leakaudit.report.sweep_terminal import print_sweep


def printed(name: str, width: int = 80) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=False, legacy_windows=False)
    print_sweep(SAMPLES[name](None), console, Path("runs/sweep"))
    return file.getvalue()


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("width", [60, 80, 160])
def test_lines_fit(name: str, width: int) -> None:
    lines = printed(name, width).splitlines()
    assert len(lines) > 5
    assert max(map(len, lines)) <= width


def test_what_it_says() -> None:
    lines = printed("photos").splitlines()

    def row(defense: str) -> list[str]:
        return next(line for line in lines if line.startswith(defense)).split()

    assert row("no defense")[2:] == ["!", "62.9", "leaks", "81.0±2.1", "–", "–"]
    noisy = row("gaussian-noise:std=0.01")
    assert [noisy[1], noisy[3], noisy[5]] == ["-", "!", "leaks"]
    assert noisy[-1] == "~≥2.5e-03"
    assert row("dp-sgd:noise_multiplier=1")[-2:] == ["6", "≤9%"]
    assert row("top-k:keep=0.3")[1:3] == ["x", "–"]
    text = "\n".join(lines)
    for said in (
        "12 of 27 cells leak beyond the policy.",
        "3 defenses only stop an adversary who does not know of them:",
        "• soteria:percentile=1 under fedsgd",
        "Exit code 1",
        "fedsgd under auto",
        "Break the policy (12)",
        "Prove nothing (3)",
        "top-k:keep=0.1 | auto | adaptive: 2 of 2 runs are pending.",
        "ml-platform, until 2027-03-01",
        "runs/sweep/report.html",
    ):
        assert said in text, said


def test_every_target_has_a_row() -> None:
    text = printed("photos", 160)
    for defense in {cell.defense for cell in small_sweep(None).cells} - {"none"}:
        assert sum(line.startswith(f"{defense} ") for line in text.splitlines()) == 1


def test_control_characters_and_markup_are_inert() -> None:
    text = printed("hostile")
    assert "\x1b" not in text
    assert "[red]" in text.replace("\n", "")
