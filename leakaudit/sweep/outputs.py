"""The files a sweep leaves: its result, its page, and what other tools read."""

from __future__ import annotations

import json
from pathlib import Path

from leakaudit.atomic import writable_folder, write_atomically
from leakaudit.report.folder import REPORT_NAME
from leakaudit.report.junit import junit_xml
from leakaudit.report.sarif import sarif
from leakaudit.report.summary import append_summary, markdown
from leakaudit.report.sweep_page import write_sweep_page
from leakaudit.sweep.config import SweepConfig
from leakaudit.sweep_results import SWEEP_NAME, SweepResult


def check_outputs(config: SweepConfig) -> None:
    """`InputError`, before anything is computed, when one of the files could not be written."""
    for path in (config.html, config.junit, config.sarif, config.summary):
        if path is not None:
            writable_folder(path.parent)


def write_outputs(result: SweepResult, config: SweepConfig, folder: Path) -> None:
    """Write the result and all that the configuration asks for, each in one step.

    Raises `InputError` when a file cannot be written.
    """
    write_atomically(folder / SWEEP_NAME, result.to_json().encode())
    for page in filter(None, (folder / REPORT_NAME, config.html)):
        write_sweep_page(result, folder, page, redact=result.redacted)
    if config.junit is not None:
        write_atomically(config.junit, junit_xml(result).encode())
    if config.sarif is not None:
        write_atomically(config.sarif, (json.dumps(sarif(result), indent=1) + "\n").encode())
    if config.summary is not None:
        append_summary(config.summary, markdown(result))
