"""`SweepResult` -> one self-contained HTML page.

As with a single audit's report, everything from a result is data: jinja2 escapes it, pictures are
embedded as data URIs, each once, and a content security policy forbids the page any request and any
script or style but its own.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from leakaudit.atomic import write_atomically
from leakaudit.gate import policy_of
from leakaudit.policy import Policy
from leakaudit.report import sweep_summary, words
from leakaudit.report.folder import REPORT_NAME
from leakaudit.report.pages import asset, environment, json_text, policy_hash
from leakaudit.report.sweep_album import Album, Shot
from leakaudit.report.sweep_charts import gap_plots, utility_plots
from leakaudit.report.sweep_redact import redact_sweep
from leakaudit.report.sweep_summary import (
    STATES,
    Pair,
    Rate,
    Row,
    State,
    Worst,
    Yardstick,
    accuracy_text,
    bound_text,
    bounds_of,
    chief_bound,
    epsilon_of,
    rows_of,
    state_of,
    success_rate,
    utility_of,
    worst_of,
    yardstick,
)
from leakaudit.report.sweep_theory_charts import error_plots, privacy_plots
from leakaudit.report.tokens import Sentence, sentence
from leakaudit.results import Token
from leakaudit.sweep_results import RUNS, Bound, Cell, Example, Run, SweepResult, Utility

LEVELS = 20
"""Steps of the heat table's colours."""
MAX_SHOWN = 8
"""Reconstructions of a cell that are shown, worst first."""
MAX_LISTED = 96
"""Examples of a cell whose scores are listed."""
MAX_FRAMES = 8
MAX_COLUMNS = 3
SHORT_SENTENCE = 12
LONG_SENTENCE = 64
MAX_CONFIG_CHARACTERS = 8000


@dataclass(frozen=True)
class Half:
    """One adversary of one target in the heat table; `level` is None without a score."""

    index: int
    cell: Cell
    state: State
    level: int | None
    score: str
    original: Shot | None
    reconstruction: Shot | None
    recovered: Sentence | None


@dataclass(frozen=True)
class HeatPair:
    label: str
    defense: str
    halves: list[Half]


@dataclass(frozen=True)
class HeatRow:
    row: Row
    pairs: list[HeatPair]


@dataclass(frozen=True)
class HeatTable:
    protocol: str
    attack: str
    rows: list[HeatRow]
    columns: int


@dataclass(frozen=True)
class ExampleView:
    """One private example of one run."""

    run: Run
    example: Example
    original: Shot | None
    reconstruction: Shot | None
    original_text: Sentence | None
    recovered_text: Sentence | None
    score: str


@dataclass(frozen=True)
class FrameView:
    iteration: int
    loss: float
    picture: Shot | None


@dataclass(frozen=True)
class RunView:
    """One run; `link` leads to its own report, where there is one."""

    run: Run
    link: str
    scores: list[str]
    noise: str
    relative_noise: str


@dataclass(frozen=True)
class Amount:
    """A table's entry, and the number it is sorted by."""

    text: str
    order: float | None

    @property
    def sort(self) -> str:
        return "" if self.order is None or math.isnan(self.order) else repr(float(self.order))


@dataclass(frozen=True)
class CellView:
    """One cell in the table of all cells and opened up."""

    index: int
    cell: Cell
    state: State
    scores: list[Amount]
    accuracy: Amount
    accuracy_interval: str
    epsilon: Amount
    bound: Amount
    success: Rate | None
    runs: list[RunView]
    shown: list[ExampleView]
    listed: list[tuple[Run, Example, list[str]]]
    unlisted: int
    strip: list[FrameView]
    strip_run: Run | None
    bounds: list[Bound]


@dataclass(frozen=True)
class Named:
    """A cell of the gate's lists; `index` is None when the sweep has no such cell."""

    name: str
    index: int | None
    note: str = ""


@dataclass(frozen=True)
class UtilityView:
    utility: Utility
    accuracy: str
    curves: list[str]


def render_sweep(result: SweepResult, folder: Path | None, redact: bool = False, *, links: str = "") -> str:
    """The page as one HTML document without remote requests.

    Args:
        result: the sweep.
        folder: the sweep's folder, with its pictures and runs; None leaves pictures and links out.
        redact: leave out originals, marks on tokens, labels, and links to the runs' own reports;
            also done for a result that is marked redacted.
        links: where the folder lies as seen from the page, relative and with "/"; empty when beside it.

    Raises:
        InputError: a picture's path leaves the folder, or the file is not a PNG.
    """
    result = redact_sweep(result) if redact or result.redacted else result
    yard = yardstick(result)
    policy = policy_of(result)
    album = Album(folder)
    columns = _columns(policy, yard)
    tables = _heat_tables(result, yard, album)
    strips = [_strip(cell, yard, album) for cell in result.cells]
    shown = _shown(result, yard, album)
    reports = _Reports(None if result.redacted else folder, links)
    cells = [
        _cell_view(result, index, columns, shown[index], strips[index], reports)
        for index in range(len(shown))
    ]
    css, script = asset("audit.css", "sweep.css"), asset("copy.js", "sweep.js")
    return (
        environment()
        .get_template("sweep.html.j2")
        .render(
            result=result,
            yard=yard,
            tables=tables,
            cells=cells,
            metrics=[column.name for column in columns],
            counts={state: sum(view.state == state for view in cells) for state in STATES},
            gate=_gate(result),
            headline=sweep_summary.headline(result),
            meaning=sweep_summary.EXIT_MEANINGS[result.exit_code],
            blind_only=sweep_summary.only_oblivious(result),
            utility_plots=utility_plots(result, yard),
            gap_plots=gap_plots(result, yard),
            error_plots=error_plots(result),
            privacy_plots=privacy_plots(result, policy),
            utilities=[_utility_view(item) for item in result.utilities],
            plates=album.plates,
            left_out=album.left_out,
            levels=LEVELS,
            choices=_choices(result, cells),
            config=json_text(result.config, MAX_CONFIG_CHARACTERS, "the sweep's JSON"),
            css=css,
            script=script,
            css_hash=policy_hash(css),
            script_hash=policy_hash(script),
            words=words,
        )
    )


def write_sweep_page(result: SweepResult, folder: Path | None, path: Path, *, redact: bool = False) -> None:
    """Write the page of a sweep to `path`, atomically.

    Raises `InputError` when it cannot be written, and as `render_sweep`.
    """
    links = "" if folder is None else _relative(folder, path.parent)
    page = render_sweep(result, folder, redact, links=links)
    write_atomically(path, page.encode("utf-8", "replace"), make_folder=True)


def _relative(folder: Path, page_folder: Path) -> str:
    """Empty also when there is no way from one to the other, as between drives."""
    try:
        way = os.path.relpath(folder, page_folder)
    except ValueError:
        return ""
    return "" if way == "." else PurePath(way).as_posix() + "/"


class _Reports:
    """Links to the reports that runs wrote for themselves."""

    def __init__(self, folder: Path | None, links: str) -> None:
        self._folder, self._links = folder, links

    def __call__(self, run: Run) -> str:
        """Empty when there is no report, or the key could not be a folder's name."""
        if self._folder is None or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", run.key):
            return ""
        there = (self._folder / RUNS / run.key / REPORT_NAME).is_file()
        plain = re.fullmatch(r"(?:[A-Za-z0-9._ -]+/)*", self._links) is not None
        return f"{self._links}{RUNS}/{run.key}/{REPORT_NAME}" if there and plain else ""


def _columns(policy: Policy, yard: Yardstick) -> list[Yardstick]:
    """The metrics of the policy that are worth a column, `yard` first."""
    found = {yard.metric: yard}
    for threshold in policy.thresholds:
        found.setdefault(threshold.metric, Yardstick(threshold))
    return list(found.values())[:MAX_COLUMNS]


# heat table


def _heat_tables(result: SweepResult, yard: Yardstick, album: Album) -> list[HeatTable]:
    groups: dict[tuple[str, str], list[HeatRow]] = {}
    for row in rows_of(result.cells):
        pairs = [_heat_pair(result, pair, yard, album) for pair in row.pairs]
        groups.setdefault((row.protocol, row.attack), []).append(HeatRow(row, pairs))
    return [
        HeatTable(protocol, attack, rows, max(len(row.pairs) for row in rows))
        for (protocol, attack), rows in groups.items()
    ]


def _heat_pair(result: SweepResult, pair: Pair, yard: Yardstick, album: Album) -> HeatPair:
    there = [index for index in (pair.oblivious, pair.adaptive) if index is not None]
    halves = [_half(result.cells[index], index, yard, album) for index in there]
    return HeatPair(pair.label, result.cells[there[0]].defense, halves)


def _half(cell: Cell, index: int, yard: Yardstick, album: Album) -> Half:
    worst = worst_of(cell, yard)
    score = None if worst is None else worst.score
    known = score is not None and not math.isnan(score)
    return Half(
        index=index,
        cell=cell,
        state=state_of(cell),
        level=round(LEVELS * yard.share(score)) if known and score is not None else None,
        score=yard.write(score),
        reconstruction=album.picture(worst.example.reconstruction) if worst else None,
        original=album.picture(worst.example.original) if worst else None,
        recovered=_sentence(worst.example.recovered_tokens, SHORT_SENTENCE) if worst else None,
    )


def _sentence(tokens: list[Token] | None, most: int) -> Sentence | None:
    return None if tokens is None else sentence(tokens, most)


# one cell


def _strip(cell: Cell, yard: Yardstick, album: Album) -> tuple[Run | None, list[FrameView]]:
    """The film of the run with the worst case, or of the first run that kept one."""
    worst = worst_of(cell, yard)
    runs = [*([worst.run] if worst else []), *cell.runs]
    run = next((run for run in runs if run.strip), None)
    if run is None:
        return None, []
    last = len(run.strip) - 1
    places = sorted({round(last * place / (MAX_FRAMES - 1)) for place in range(MAX_FRAMES)})
    frames = [run.strip[place] for place in places]
    pictures = album.film([frame.image for frame in frames])
    views = [
        FrameView(frame.iteration, frame.loss, picture)
        for frame, picture in zip(frames, pictures, strict=True)
    ]
    return run, views


def _shown(result: SweepResult, yard: Yardstick, album: Album) -> list[list[ExampleView]]:
    """The reconstructions of every cell that leak most; the worst of all cells take their place first."""
    chosen = [_by_leakage(cell, yard)[:MAX_SHOWN] for cell in result.cells]
    views: list[list[ExampleView]] = [[] for _ in chosen]
    for place in range(MAX_SHOWN):
        for index, examples in enumerate(chosen):
            if place < len(examples):
                views[index].append(_example_view(examples[place], yard, album))
    return views


def _by_leakage(cell: Cell, yard: Yardstick) -> list[Worst]:
    found = [Worst(run, example, example.scores.get(yard.metric)) for run, example in _examples(cell)]

    def rank(item: Worst) -> float:
        unknown = item.score is None or math.isnan(item.score)
        return math.inf if unknown or item.score is None else -yard.leakage(item.score)

    return sorted(found, key=rank)


def _examples(cell: Cell) -> Iterator[tuple[Run, Example]]:
    for run in cell.runs:
        for example in run.examples:
            yield run, example


def _example_view(worst: Worst, yard: Yardstick, album: Album) -> ExampleView:
    example = worst.example
    return ExampleView(
        run=worst.run,
        example=example,
        reconstruction=album.picture(example.reconstruction),
        original=album.picture(example.original),
        original_text=_sentence(example.original_tokens, LONG_SENTENCE),
        recovered_text=_sentence(example.recovered_tokens, LONG_SENTENCE),
        score=yard.write(worst.score),
    )


def _cell_view(
    result: SweepResult,
    index: int,
    columns: Sequence[Yardstick],
    shown: list[ExampleView],
    strip: tuple[Run | None, list[FrameView]],
    reports: _Reports,
) -> CellView:
    cell = result.cells[index]
    utility, bound, epsilon = utility_of(result, cell), chief_bound(result, cell), epsilon_of(result, cell)
    listed = [
        (run, example, [words.number(example.scores.get(column.metric)) for column in columns])
        for run, example in _examples(cell)
    ]
    return CellView(
        index=index,
        cell=cell,
        state=state_of(cell),
        scores=[_worst_amount(cell.scores(column.metric), column) for column in columns],
        accuracy=_accuracy(utility),
        accuracy_interval=accuracy_text(utility),
        epsilon=Amount(words.number(epsilon), epsilon),
        bound=Amount(bound_text(bound), bound.value if bound else None),
        success=success_rate(cell, policy_of(result)),
        runs=[_run_view(run, columns, reports) for run in cell.runs],
        shown=shown,
        listed=listed[:MAX_LISTED],
        unlisted=max(0, len(listed) - MAX_LISTED),
        strip=strip[1],
        strip_run=strip[0],
        bounds=bounds_of(result, cell),
    )


def _accuracy(utility: Utility | None) -> Amount:
    known = None if utility is None else utility.accuracy
    return Amount(words.MISSING if known is None else words.percent(known), known)


def _worst_amount(scores: Sequence[float], yard: Yardstick) -> Amount:
    worst = yard.worst(scores)
    return Amount(yard.write(worst), worst)


def _run_view(run: Run, columns: Sequence[Yardstick], reports: _Reports) -> RunView:
    scores = []
    for column in columns:
        found = (example.scores.get(column.metric) for example in run.examples)
        scores.append(_worst_amount([score for score in found if score is not None], column).text)
    relative = run.noise_std / run.update_rms if run.noise_std is not None and run.update_rms else None
    return RunView(run, reports(run), scores, words.number(run.noise_std), words.number(relative))


# gate, utilities, the rest


def _gate(result: SweepResult) -> dict[str, list[Named]]:
    places = {cell.name: index for index, cell in enumerate(result.cells)}
    reasons = {cell.name: cell.reasons[0] for cell in result.cells if cell.reasons}
    gate = result.gate
    expired = set(gate.expired)

    def named(name: str, note: str) -> Named:
        return Named(name, places.get(name), note)

    broken = [
        named(
            name,
            " ".join(filter(None, ("Its acceptance ran out." if name in expired else "", reasons.get(name)))),
        )
        for name in gate.broken
    ]
    accepted = [
        named(item.cell, f"{item.owner}, until {item.expires}{': ' + item.reason if item.reason else ''}")
        for item in gate.accepted
    ]
    inconclusive = [named(name, reasons.get(name, "")) for name in gate.inconclusive]
    return {
        "broken": broken,
        "expired": [named(name, "") for name in gate.expired],
        "accepted": accepted,
        "inconclusive": inconclusive,
    }


def _utility_view(utility: Utility) -> UtilityView:
    return UtilityView(
        utility, accuracy_text(utility), [_sparkline(curve.points) for curve in utility.curves]
    )


def _sparkline(points: Sequence[tuple[int, float]]) -> str:
    """SVG points in a box of 100 x 24; accuracy 0 to 1 is its height.  Empty for fewer than two points."""
    finite = [(step, accuracy) for step, accuracy in points if math.isfinite(accuracy)]
    if len(finite) < 2 or finite[0][0] == finite[-1][0]:
        return ""
    first, last = finite[0][0], finite[-1][0]
    places = (
        (100 * (step - first) / (last - first), 24 - 24 * min(1.0, max(0.0, accuracy)))
        for step, accuracy in finite
    )
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _choices(result: SweepResult, cells: Sequence[CellView]) -> list[tuple[str, str, list[str]]]:
    """(name, what it says, values) of the filters with more than one value."""
    found: list[tuple[str, str, list[str]]] = [
        ("protocol", "Protocol", [cell.protocol for cell in result.cells]),
        ("family", "Defense", [cell.family for cell in result.cells]),
        ("attack", "Attack", [cell.attack for cell in result.cells]),
        ("adversary", "Adversary", [cell.adversary for cell in result.cells]),
        ("state", "Verdict", [view.state for view in cells]),
    ]
    unique = [(name, label, list(dict.fromkeys(values))) for name, label, values in found]
    return [choice for choice in unique if len(choice[2]) > 1]
