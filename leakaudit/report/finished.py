"""The page of a finished run, whatever wrote its folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from leakaudit.gate import read_sweep
from leakaudit.leakage_results import LEAKAGE_NAME, read_leakage
from leakaudit.report.folder import RESULT_NAME, read_run, write_page
from leakaudit.report.leakage_page import write_leakage_page
from leakaudit.report.simulation_page import write_comparison_page, write_simulation_page
from leakaudit.report.sweep_page import write_sweep_page
from leakaudit.simulation_results import COMPARISON_NAME, SIMULATION_NAME, read_comparison, read_simulation
from leakaudit.sweep_results import SWEEP_NAME

Write = Callable[[Path, Path, bool], None]


def write_report(folder: Path, html: Path, *, redact: bool = False) -> None:
    """Write the page of what attack, audit, defend, simulate, compare or leakage left in `folder`.

    Args:
        redact: leave the originals out.  Simulations and comparisons show none.

    Raises `InputError` where there is no result, it cannot be read, or the page cannot be written.
    """
    found = next((write for name, write in WRITERS.items() if (folder / name).is_file()), _audit)
    found(folder, html, redact)


def _audit(folder: Path, html: Path, redact: bool) -> None:
    write_page(read_run(folder), html, redact=redact)


def _sweep(folder: Path, html: Path, redact: bool) -> None:
    result = read_sweep(folder)
    write_sweep_page(result, folder, html, redact=redact or result.redacted)


def _leakage(folder: Path, html: Path, redact: bool) -> None:
    write_leakage_page(read_leakage(folder), folder, html, redact=redact)


def _simulation(folder: Path, html: Path, redact: bool) -> None:
    write_simulation_page(read_simulation(folder), html)


def _comparison(folder: Path, html: Path, redact: bool) -> None:
    write_comparison_page(read_comparison(folder), html)


WRITERS: dict[str, Write] = {
    RESULT_NAME: _audit,
    SWEEP_NAME: _sweep,
    LEAKAGE_NAME: _leakage,
    COMPARISON_NAME: _comparison,
    SIMULATION_NAME: _simulation,
}
"""The file that a folder's result is in, the most telling first."""
