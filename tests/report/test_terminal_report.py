"""The terminal report at 80 columns, and plain numbers and words."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
from rich.console import Console
from sample_audits import FINDINGS, SAMPLES, photo_audit

from leakaudit.report import words
from leakaudit.report.folder import write_run
from leakaudit.report.terminal import print_findings, print_result


def printed(width: int = 80) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=False, legacy_windows=False)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("width", [60, 80, 160])
def test_lines_fit(tmp_path: Path, name: str, width: int) -> None:
    console = printed(width)
    print_result(SAMPLES[name](tmp_path), console)
    lines = text_of(console).splitlines()
    assert len(lines) > 10
    assert max(map(len, lines)) <= width


def test_what_it_says(tmp_path: Path) -> None:
    console = printed()
    print_result(write_run(photo_audit(tmp_path), tmp_path), console)
    text = text_of(console)
    assert text.index("LEAKS") < text.index("* dlg") < text.index("  inverting-gradients")
    for said in (
        "One shared update gives the private photo back",
        "4.1e-08",
        "86.8 dB  chance 10.3 dB",
        "0.99998",
        "not measured: the weights of lpips' AlexNet",
        "failed idlg: the matching loss was never finite",
        "skipped linear: ",
        "3 of 4 succeeded (95% interval 30 to 95%)",
        "What the adversary knew: upper bound",
        "eval (manifest) upper bound",
        "positive passed: ",
        str(tmp_path / "report.html"),
    ):
        assert said in text.replace("\n", " ") or said in text


def test_control_characters_and_markup_are_inert(tmp_path: Path) -> None:
    console = printed()
    print_result(SAMPLES["hostile"](tmp_path), console)
    text = text_of(console)
    assert "\x1b" not in text
    assert "[red]" in text


def test_findings_alone() -> None:
    console = printed()
    print_findings(FINDINGS, console)
    first_words = [line.split()[0] for line in text_of(console).splitlines() if line[:1].isalpha()]
    assert first_words == ["Side", "leak", "warning", "hint", "info"]
    empty = printed()
    print_findings([], empty)
    assert "none found" in text_of(empty)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "–"),
        (0.0, "0"),
        (math.nan, "NaN"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
        (1.0, "1"),
        (23.456, "23.5"),
        (0.001234, "0.00123"),
        (0.0001, "1×10⁻⁴"),
        (1.34e-9, "1.3×10⁻⁹"),
        (-0.5, "−0.5"),
        (12345.0, "12,300"),
        (999.9, "1,000"),
        (0.99998, "0.99998"),
        (0.9994, "0.999"),
        (1 - 1e-9, ">0.999999"),
        (5e-324, "4.9×10⁻³²⁴"),
        (1e300, "1×10³⁰⁰"),
    ],
)
def test_numbers(value: float | None, expected: str) -> None:
    assert words.number(value) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.01, "under 0.1 s"),
        (9.96, "10.0 s"),
        (12.4, "12 s"),
        (59.7, "1 min 00 s"),
        (245, "4 min 05 s"),
        (7800, "2 h 10 min"),
        (math.inf, "–"),
    ],
)
def test_durations(seconds: float, expected: str) -> None:
    assert words.duration(seconds) == expected
