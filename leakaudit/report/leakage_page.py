"""`LeakageResult` -> one self-contained HTML page: system x role, pictures side by side, theory.

Everything from a result is data, as in `leakaudit.report.html`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from leakaudit.atomic import write_atomically
from leakaudit.leakage_results import LeakageResult, LeakageRow
from leakaudit.report import words
from leakaudit.report.folder import REPORT_NAME
from leakaudit.report.html import Picture, Pictures
from leakaudit.report.leakage_summary import (
    EXIT_MEANINGS,
    State,
    headline,
    scores_of,
    seen,
    state_of,
    what_happened,
)
from leakaudit.report.pages import asset, environment, policy_hash
from leakaudit.report.redact import without_labels
from leakaudit.report.sweep_redact import blind_example
from leakaudit.report.tokens import Sentence, sentence


@dataclass(frozen=True)
class RowView:
    """A row with everything the template shows of it; `link` is the report of its audit."""

    row: LeakageRow
    state: State
    seen: str
    scores: list[tuple[str, str]]
    said: list[str]
    original: Picture | None
    reconstruction: Picture | None
    original_text: Sentence | None
    recovered_text: Sentence | None
    link: str | None


def write_leakage_page(
    result: LeakageResult, folder: Path | None, path: Path, *, redact: bool = False
) -> None:
    """Write the page to `path`, with the pictures in the result's `folder`.

    Raises `InputError` when it cannot be written, or a picture's path leaves the folder.
    """
    page = render_leakage(result, folder, redact=redact, beside=folder == path.parent)
    write_atomically(path, page.encode("utf-8", "replace"), make_folder=True)


def render_leakage(
    result: LeakageResult, folder: Path | None, *, redact: bool = False, beside: bool = True
) -> str:
    """The page as one document without remote requests.

    Args:
        folder: the result's, which the pictures are in; None leaves them out.
        redact: leave the originals out; also done for a result that is marked redacted.
        beside: whether the page lies in the folder, so that it can link to the audits.
    """
    result = redact_leakage(result) if redact or result.redacted else result
    pictures = Pictures(folder)
    css, script = asset("audit.css", "leakage.css"), asset("copy.js")
    return (
        environment()
        .get_template("leakage.html.j2")
        .render(
            result=result,
            rows=[_row_view(row, pictures, beside) for row in result.rows],
            headline=headline(result),
            meaning=EXIT_MEANINGS[result.exit_code],
            css=css,
            script=script,
            css_hash=policy_hash(css),
            script_hash=policy_hash(script),
            words=words,
        )
    )


def redact_leakage(result: LeakageResult) -> LeakageResult:
    """The result without original pictures and sentences, labels, and marks on tokens; see `redact_sweep`."""
    rows = [
        row if row.example is None else row.model_copy(update={"example": blind_example(row.example)})
        for row in result.rows
    ]
    return result.model_copy(
        update={"redacted": True, "rows": rows, "command": without_labels(result.command)}
    )


def _row_view(row: LeakageRow, pictures: Pictures, beside: bool) -> RowView:
    example = row.example
    original = None if example is None else example.original_tokens
    recovered = None if example is None else example.recovered_tokens
    return RowView(
        row=row,
        state=state_of(row),
        seen=seen(row),
        scores=[(words.metric_name(s.metric), words.quantity(s.value, s.unit)) for s in scores_of(row)],
        said=what_happened(row),
        original=None if example is None else pictures(example.original),
        reconstruction=None if example is None else pictures(example.reconstruction),
        original_text=None if original is None else sentence(original),
        recovered_text=None if recovered is None else sentence(recovered),
        link=f"{row.audit}/{REPORT_NAME}" if beside and row.audit else None,
    )
