"""The table of what each party learns, in the terminal and on the page, from hand-made results."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from leakaudit.errors import InputError
from leakaudit.leakage_results import LeakageResult, LeakageRow
from leakaudit.report.leakage_page import render_leakage, write_leakage_page
from leakaudit.report.leakage_summary import headline, seen, state_of
from leakaudit.report.leakage_terminal import print_leakage
from leakaudit.report.pictures import write_png
from leakaudit.results import Score
from leakaudit.sweep_results import Example

LEAKING = LeakageRow(
    run="ssgd",
    system="ssgd",
    role="server",
    view="round-0000-client-000",
    step=0,
    time=1.5,
    clients=1,
    examples=2,
    staleness=1,
    status="done",
    verdict="leaks",
    headline="Private images were reconstructed.",
    reasons=["linear: psnr 55 is above 20"],
    attack="linear",
    residual=1e-7,
    scores=[Score(metric="psnr", value=55.0, unit="dB"), Score(metric="ssim", value=0.99)],
    example=Example(index=0, original="audits/a/o.png", reconstruction="audits/a/r.png", true_label="cat"),
    audit="audits/a",
    theory="Nothing <limits> what can be reconstructed.",
    source="Zhu, Liu and Han 2019",
)
NETWORK = LeakageRow(
    run="ssgd",
    system="ssgd",
    role="network",
    status="no-update",
    inferred=["All clients compute for 0.3 s.", "4 clients took part."],
    theory="Sizes and times.",
)
FAILED = LEAKING.model_copy(
    update={
        "role": "peer",
        "status": "failed",
        "verdict": None,
        "headline": "",
        "reasons": [],
        "error": "the update is zero everywhere",
        "attack": None,
        "scores": [],
        "example": None,
        "audit": None,
    }
)


ELSEWHERE = NETWORK.model_copy(update={"run": "elsewhere"})
"""All that there is of another run."""


def result_of(*rows: LeakageRow, **facts: object) -> LeakageResult:
    return LeakageResult(
        created="2026-01-01T00:00:00+00:00",
        seed=0,
        attacks=["auto"],
        policy=str(facts.pop("policy", "psnr>20")),
        rows=list(rows),
        **facts,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("rows", "policy", "code"),
    [
        ([LEAKING, NETWORK], "psnr>20", 1),
        ([LEAKING, FAILED], "psnr>20", 1),
        ([LEAKING], "never", 0),
        ([FAILED, NETWORK], "psnr>20", 3),
        ([NETWORK], "psnr>20", 3),
        ([LEAKING.model_copy(update={"verdict": "not-recovered"}), NETWORK], "psnr>20", 0),
        ([LEAKING.model_copy(update={"verdict": "inconclusive"})], "psnr>20", 3),
        ([LEAKING.model_copy(update={"verdict": "not-recovered"}), FAILED], "psnr>20", 3),
        ([LEAKING.model_copy(update={"verdict": "not-recovered"}), ELSEWHERE], "psnr>20", 3),
        ([LEAKING, ELSEWHERE], "psnr>20", 1),
    ],
)
def test_exit_codes(rows: list[LeakageRow], policy: str, code: int) -> None:
    assert result_of(*rows, policy=policy).exit_code == code


@pytest.mark.parametrize("width", [60, 80, 160])
def test_the_terminal_says_all_of_it(width: int) -> None:
    buffer = io.StringIO()
    evil = LEAKING.model_copy(update={"note": "a [bold]note\x1b[31m"})
    console = Console(file=buffer, width=width, force_terminal=False, color_system=None)
    print_leakage(result_of(evil, NETWORK, FAILED), console, Path("runs/leakage"))
    text = " ".join(buffer.getvalue().split())
    for part in ("ssgd", "linear", "! leaks", "x failed", "no update", "Zhu, Liu and Han 2019", "Theory:"):
        assert part in text, part
    assert "the update is zero everywhere." in text
    assert "[bold]note" in text
    assert "\x1b" not in text
    assert max(map(len, buffer.getvalue().splitlines())) <= max(width, len("Report runs/leakage/report.html"))


def test_the_page_shows_the_picture_beside_the_original(tmp_path: Path) -> None:
    for name in ("o", "r"):
        write_png(np.full((4, 4, 3), 0.5), tmp_path / "audits" / "a" / f"{name}.png")
    result = result_of(LEAKING, NETWORK, FAILED, command="leakaudit simulate leakage runs/ssgd")
    write_leakage_page(result, tmp_path, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 2
    assert "Nothing &lt;limits&gt; what can be reconstructed." in page
    assert 'href="audits/a/report.html"' in page
    assert "1 of 2 attacked views gives private data away." in page
    assert "4 clients took part." in page
    assert not re.search(r'(src|href)="https?:', page)
    elsewhere = tmp_path / "elsewhere" / "page.html"
    write_leakage_page(result, tmp_path, elsewhere)
    assert "audits/a/report.html" not in elsewhere.read_text(), "a link that would lead nowhere"


def test_a_redacted_page_holds_no_original(tmp_path: Path) -> None:
    for name, shade in (("o", 0.2), ("r", 0.8)):
        write_png(np.full((4, 4, 3), shade), tmp_path / "audits" / "a" / f"{name}.png")
    page = render_leakage(result_of(LEAKING), tmp_path, redact=True)
    assert page.count('src="data:image/png;base64,') == 1
    assert "withheld" in page
    original = (tmp_path / "audits" / "a" / "o.png").read_bytes()
    assert base64.b64encode(original).decode() not in page
    assert base64.b64encode(original).decode() in render_leakage(result_of(LEAKING), tmp_path)


def test_a_picture_outside_the_folder_is_refused(tmp_path: Path) -> None:
    stolen = LEAKING.model_copy(update={"example": Example(index=0, original="../secret.png")})
    with pytest.raises(InputError, match="must stay inside"):
        render_leakage(result_of(stolen), tmp_path)


def test_words_of_a_row() -> None:
    assert seen(LEAKING) == "1 client, 2 examples, 1 step stale"
    assert seen(NETWORK) == "sizes and times"
    assert seen(LEAKING.model_copy(update={"exact": False})) == "1 client, 2 examples, 1 step stale, and more"
    assert state_of(FAILED) == "failed"
    assert state_of(LEAKING.model_copy(update={"status": "interrupted"})) == "leaks"
    assert headline(result_of(NETWORK)) == "No view holds an update to attack."


def test_a_view_that_was_not_judged_is_never_called_not_reconstructed() -> None:
    held = LEAKING.model_copy(update={"verdict": "not-recovered"})
    assert headline(result_of(held)) == "The attacked view was not reconstructed."
    assert headline(result_of(held, held)) == "None of 2 attacked views was reconstructed."
    assert headline(result_of(held, FAILED)).startswith("1 of 2 attacked views could not be judged")


def test_a_run_of_which_nothing_was_attacked_is_named(tmp_path: Path) -> None:
    held = LEAKING.model_copy(update={"verdict": "not-recovered", "example": None})
    result, buffer = result_of(held, ELSEWHERE), io.StringIO()
    print_leakage(result, Console(file=buffer, width=80))
    assert "No update of elsewhere was attacked" in buffer.getvalue()
    assert "No update of elsewhere was attacked" in render_leakage(result, tmp_path)
