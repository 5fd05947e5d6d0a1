"""`AuditResult` -> one self-contained HTML page.

Everything from a result is data: jinja2 escapes it, pictures are inlined as PNG
data URIs, and a content security policy forbids the page any request and any
script or style but its own.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from leakaudit.report import words
from leakaudit.report.charts import loss_chart
from leakaudit.report.folder import read_picture
from leakaudit.report.pages import asset, environment, json_text, policy_hash
from leakaudit.report.redact import redact as redact_result
from leakaudit.report.tokens import Sentence, sentence, tally
from leakaudit.report.wording import WORDINGS, Wording
from leakaudit.results import AuditResult, ExampleScores, Finding, Frame, Score, Token, Trial

PIXELATED_BELOW = 200
MAX_DATA_CHARACTERS = 4000
MAX_SCORE_COLUMNS = 3
MAX_STRIP_SENTENCES = 4
MAX_STRIP_TOKENS = 64
SEVERITY_ORDER = ("leak", "warning", "hint", "info")
NOTEBOOK_HEIGHT = 900


@dataclass(frozen=True)
class Picture:
    """A PNG as a data URI, with its size in pixels."""

    source: str
    width: int
    height: int

    @property
    def pixelated(self) -> bool:
        return max(self.width, self.height) < PIXELATED_BELOW


@dataclass(frozen=True)
class Tile:
    """One key figure."""

    name: str
    value: str
    unit: str = ""
    note: str = ""
    muted: bool = False


@dataclass(frozen=True)
class ExampleCard:
    example: ExampleScores
    original: Picture | None
    reconstruction: Picture | None
    difference: Picture | None
    original_text: Sentence | None
    recovered_text: Sentence | None
    scores: list[tuple[str, str]]
    label_matches: bool | None


@dataclass(frozen=True)
class StripFrame:
    """One iteration: a picture of the batch, or its first sentences with `more` left out."""

    frame: Frame
    picture: Picture | None
    sentences: list[Sentence]
    more: int
    note: str


@dataclass(frozen=True)
class TrialView:
    """One trial with everything the template shows of it."""

    trial: Trial
    is_best: bool
    strip: list[StripFrame]
    cells: list[str]
    details: str


def render_html(result: AuditResult, folder: Path | None, redact: bool = False) -> str:
    """The report as one HTML document without remote requests.

    Args:
        result: the audit.
        folder: the run folder its pictures are in; None leaves the pictures out.
        redact: leave out originals, difference pictures, marks on tokens and true labels; also
            done for a result that is marked redacted.

    Raises:
        InputError: a picture's path leaves the folder, or the file is not a PNG.
    """
    result = redact_result(result) if redact or result.redacted else result
    pictures = Pictures(folder)
    say = WORDINGS[result.medium]
    columns = _score_columns(result.trials, say)
    trials = [_trial_view(result, index, columns, pictures) for index in ranked(result)]
    best = trials[0] if result.best is not None else None
    css, script = asset("audit.css"), asset("copy.js", "audit.js")
    return (
        environment()
        .get_template("audit.html.j2")
        .render(
            result=result,
            best=best,
            trials=trials,
            tiles=_tiles(result, say),
            examples=[] if best is None else _examples(best.trial, pictures),
            columns=[words.metric_name(name) for name in columns],
            charts=[(view, chart) for view in trials if (chart := loss_chart(view.trial)) is not None],
            findings=[(finding, _finding_data(finding)) for finding in sorted_findings(result.findings)],
            css=css,
            script=script,
            css_hash=policy_hash(css),
            script_hash=policy_hash(script),
            words=words,
            say=say,
        )
    )


def render_notebook(result: AuditResult, folder: Path | None) -> str:
    """The report in a sandboxed frame, so that its styles and the notebook's stay apart."""
    page = html.escape(render_html(result, folder), quote=True)
    return (
        f'<iframe title="leakaudit report" sandbox="allow-scripts" srcdoc="{page}" '
        f'style="width:100%;height:{NOTEBOOK_HEIGHT}px;border:1px solid #8886;border-radius:8px"></iframe>'
    )


def sorted_findings(findings: Sequence[Finding]) -> list[Finding]:
    """By severity, leaks first; otherwise in the order found."""
    return sorted(findings, key=lambda finding: SEVERITY_ORDER.index(finding.severity))


def ranked(result: AuditResult) -> list[int]:
    """Indices of the trials, the best first and the others by residual, unknown ones last."""

    def rank(index: int) -> tuple[bool, float]:
        residual = result.trials[index].residual
        return index != result.best, math.inf if residual is None or math.isnan(residual) else residual

    return sorted(range(len(result.trials)), key=rank)


class Pictures:
    """Reads pictures of one run folder."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def __call__(self, name: str | None) -> Picture | None:
        if name is None or self._folder is None:
            return None
        found = read_picture(self._folder, name)
        if found is None:
            return None
        data, width, height = found
        return Picture("data:image/png;base64," + base64.b64encode(data).decode(), width, height)


def _tiles(result: AuditResult, say: Wording) -> list[Tile]:
    tiles: list[Tile] = []
    trial = result.best_trial
    if trial is not None:
        tiles += [_score_tile(score) for score in trial.scores]
        tiles.append(_residual_tile(trial))
        if trial.success is not None:
            rate = trial.success
            interval = (
                f"95{words.NARROW_SPACE}% interval {words.percent(rate.low)} to {words.percent(rate.high)}"
            )
            tiles.append(
                Tile("Restarts that succeeded", f"{rate.successes} of {rate.restarts}", note=interval)
            )
    steps = words.plural(result.round.local_steps, "local step")
    tiles.append(Tile(say.many_private, f"{result.round.num_examples:,}", note=f"in {steps}"))
    tried = words.plural(len(result.trials), "attack")
    attempts = words.plural(sum(len(trial.attempts) for trial in result.trials), "attempt")
    tiles.append(Tile("Time", words.duration(result.seconds), note=f"{tried}, {attempts}"))
    return tiles


def _score_tile(score: Score) -> Tile:
    name = words.metric_name(score.metric)
    if score.value is None:
        return Tile(name, "not measured", note=score.reason or "no reason given", muted=True)
    return Tile(name, words.number(score.value), score.unit, words.chance(score))


def _residual_tile(trial: Trial) -> Tile:
    note = "of the observed update's length"
    if trial.verification is not None:
        note = f"floor {words.number(trial.verification.floor)}"
    return Tile("Update residual", words.number(trial.residual), note=note, muted=trial.residual is None)


def _trial_view(result: AuditResult, index: int, columns: list[str], pictures: Pictures) -> TrialView:
    trial = result.trials[index]
    scores = {score.metric: score for score in trial.scores}
    return TrialView(
        trial=trial,
        is_best=index == result.best,
        strip=[_strip_frame(frame, pictures) for frame in trial.strip],
        cells=[_cell(scores.get(name)) for name in columns],
        details=json_text(trial.details, MAX_DATA_CHARACTERS, "result.json"),
    )


def _strip_frame(frame: Frame, pictures: Pictures) -> StripFrame:
    shown = [sentence(tokens, MAX_STRIP_TOKENS) for tokens in frame.sentences[:MAX_STRIP_SENTENCES]]
    more = len(frame.sentences) - len(shown)
    return StripFrame(frame, pictures(frame.image), shown, more, tally(frame.sentences))


def _cell(score: Score | None) -> str:
    return words.MISSING if score is None else words.quantity(score.value, score.unit)


def _score_columns(trials: list[Trial], say: Wording) -> list[str]:
    """The metrics most worth a column: those the medium prefers, or measured ones in the order reported."""
    measured = dict.fromkeys(
        score.metric for trial in trials for score in trial.scores if score.value is not None
    )
    preferred = [name for name in say.score_columns if name in measured]
    return preferred or list(measured)[:MAX_SCORE_COLUMNS]


def _examples(trial: Trial, pictures: Pictures) -> list[ExampleCard]:
    units = {score.metric: score.unit for score in trial.scores}
    return [_example_card(example, units, pictures) for example in trial.examples]


def _example_card(example: ExampleScores, units: dict[str, str], pictures: Pictures) -> ExampleCard:
    known = example.true_label is not None and example.recovered_label is not None
    return ExampleCard(
        example=example,
        original=pictures(example.original),
        reconstruction=pictures(example.reconstruction),
        difference=pictures(example.difference),
        original_text=_sentence(example.original_tokens),
        recovered_text=_sentence(example.recovered_tokens),
        scores=[
            (words.metric_name(name), words.quantity(value, units.get(name, "")))
            for name, value in example.scores.items()
            if value is not None
        ],
        label_matches=example.true_label == example.recovered_label if known else None,
    )


def _sentence(tokens: list[Token] | None) -> Sentence | None:
    return None if tokens is None else sentence(tokens)


def _finding_data(finding: Finding) -> str:
    return json_text(finding.data, MAX_DATA_CHARACTERS, "result.json")
