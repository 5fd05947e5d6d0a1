"""`AuditResult` -> the terminal, through rich; reads well at 80 columns.

Strings from files are shown as plain text: no rich markup, no control characters.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from leakaudit.report import words
from leakaudit.report.html import ranked, sorted_findings
from leakaudit.report.tokens import Piece, sentence
from leakaudit.results import AuditResult, ExampleScores, Finding, KnowledgeRow, Score, Trial, Verification

VERDICT_STYLES = {"leaks": "red", "not-recovered": "blue", "inconclusive": "yellow"}
VERDICT_WORDS = {"leaks": "! LEAKS", "not-recovered": "- NOT RECOVERED", "inconclusive": "? INCONCLUSIVE"}
SEVERITY_STYLES = {"leak": "bold red", "warning": "yellow", "hint": "cyan", "info": "dim"}
STATUS_STYLES = {"known": "cyan", "inferred": "green", "unknown": "dim"}
MATCH_STYLES = {"verified": "red", "consistent": "yellow", "not-matched": "dim"}
COLUMN_METRICS = ("psnr", "ssim", "mse", "token-accuracy", "rouge-l")
MAX_SENTENCES = 8
MAX_TOKENS = 100


def plain(text: str, style: str = "") -> Text:
    """Text without markup; control characters, which could drive the terminal, become `?`."""
    clean = "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
    return Text(clean, style=style, overflow="fold")


def print_result(result: AuditResult, console: Console, folder: Path | None = None) -> None:
    """Print the verdict, the attacks, the findings and what the adversary knew.

    Args:
        result: the audit.
        console: where to; any width from 60 columns.
        folder: where the report and the pictures lie; by default where the result was read from.
    """
    folder = folder or result.folder
    console.print(_verdict_panel(result))
    if result.trials:
        console.print(_attack_table(result))
    for trial in result.trials:
        if trial.status != "done":
            console.print(_remark(trial.status, "yellow", trial.attack, trial.reason))
    for item in result.skipped:
        console.print(_remark("skipped", "dim", item.attack, item.reason))
    if result.best_trial is not None:
        _print_scores(result.best_trial, console)
        _print_text(result.best_trial, console)
    print_findings(result.findings, console)
    _print_knowledge(result, console)
    _print_controls(result, console)
    if folder is not None:
        console.print(
            Text.assemble(("\nReport     ", "bold"), plain(str(folder / "report.html"))), soft_wrap=True
        )
        console.print(Text.assemble(("Run folder", "bold"), " ", plain(str(folder))), soft_wrap=True)


def print_findings(findings: Sequence[Finding], console: Console) -> None:
    """Print what a file gives away by itself, worst first."""
    console.print(Text("\nSide channels", style="bold"))
    if not findings:
        console.print(Text("none found", style="dim"))
        return
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column()
    for finding in sorted_findings(findings):
        text = Text.assemble(plain(finding.name.replace("_", " "), "bold"), ": ", plain(finding.text))
        grid.add_row(Text(finding.severity, style=SEVERITY_STYLES[finding.severity]), text)
    console.print(grid)


def _verdict_panel(result: AuditResult) -> Panel:
    verdict, style = result.verdict, VERDICT_STYLES[result.verdict.status]
    lines: list[RenderableType] = [plain(verdict.headline, "bold")]
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column()
    for reason in verdict.reasons:
        grid.add_row("•", plain(reason))
    lines.append(grid)
    if verdict.policy:
        lines.append(plain(f"Policy: {verdict.policy}", "dim"))
    if verdict.status == "not-recovered":
        lines.append(Text("The attacks tried here failed; that is not evidence of safety.", style="dim"))
    if result.interrupted:
        lines.append(Text("Interrupted: this is the best found until then.", style="yellow"))
    title = Text(VERDICT_WORDS[verdict.status], style=f"bold {style}")
    return Panel(Group(*lines), title=title, title_align="left", border_style=style, padding=(0, 1))


def _attack_table(result: AuditResult) -> Table:
    metrics = _column_metrics(result.trials)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("Attack", overflow="fold", ratio=1)
    table.add_column("Residual", justify="right", no_wrap=True)
    for metric in metrics:
        table.add_column(words.metric_name(metric), justify="right", no_wrap=True)
    table.add_column("Match", no_wrap=True)
    table.add_column("Time", justify="right", no_wrap=True)
    for index in ranked(result):
        trial = result.trials[index]
        scores = {score.metric: score for score in trial.scores}
        cells = [words.plain_number(score.value if (score := scores.get(name)) else None) for name in metrics]
        residual, time = words.plain_number(trial.residual), words.duration(trial.seconds)
        table.add_row(
            _attack_cell(trial, index == result.best), residual, *cells, _match(trial.verification), time
        )
    return table


def _remark(what: str, style: str, attack: str, reason: str) -> Text:
    return Text.assemble((what, style), " ", plain(attack, "bold"), ": ", plain(reason))


def _column_metrics(trials: Sequence[Trial]) -> list[str]:
    measured = {score.metric for trial in trials for score in trial.scores if score.value is not None}
    return [name for name in COLUMN_METRICS if name in measured][:2]


def _attack_cell(trial: Trial, is_best: bool) -> Text:
    return Text.assemble(("* " if is_best else "  "), plain(trial.attack, "bold" if is_best else ""))


def _match(check: Verification | None) -> Text:
    if check is None:
        return Text(words.MISSING, style="dim")
    return Text(check.status.replace("-", " "), style=MATCH_STYLES[check.status])


def _print_scores(trial: Trial, console: Console) -> None:
    """The best attack in full: all scores with their chance level, restarts, verification."""
    console.print(Text.assemble("\n", ("Best: ", "bold"), plain(trial.attack, "bold")))
    grid = Table.grid(padding=(0, 2))
    grid.add_column(overflow="fold", max_width=24)
    grid.add_column(overflow="fold")
    for score in trial.scores:
        grid.add_row(plain(words.metric_name(score.metric)), _score(score))
    if trial.success is not None:
        rate = trial.success
        interval = f"(95% interval {100 * rate.low:.0f} to {100 * rate.high:.0f}%)"
        grid.add_row(
            "Restarts", plain(f"{rate.successes} of {rate.restarts} succeeded {interval}: {rate.criterion}")
        )
    if trial.label_source:
        grid.add_row("Labels", plain(trial.label_source))
    if trial.verification is not None:
        check = trial.verification
        said = check.text.startswith(check.status)  # as that of text does
        status = Text() if said else Text.assemble(_match(check), ": ")
        grid.add_row("Without truth", Text.assemble(status, plain(check.text)))
    console.print(grid)


def _print_text(trial: Trial, console: Console) -> None:
    """The recovered sentences, wrong tokens in red and underlined; nothing for images."""
    examples = [example for example in trial.examples if example.recovered_tokens is not None]
    if not examples:
        return
    console.print(Text("\nRecovered text", style="bold"))
    grid = Table.grid(padding=(0, 2))
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(overflow="fold")
    for example in examples[:MAX_SENTENCES]:
        grid.add_row(Text(str(example.index), style="dim"), _recovered(example))
    console.print(grid)
    if len(examples) > MAX_SENTENCES:
        rest = words.plural(len(examples) - MAX_SENTENCES, "more sentence")
        console.print(Text(f"and {rest}, in the report", style="dim"))


def _recovered(example: ExampleScores) -> Text:
    shown = sentence(example.recovered_tokens or [], MAX_TOKENS)
    text = Text(overflow="fold")
    for index, piece in enumerate(shown.pieces):
        text.append("" if piece.joined or index == 0 else " ")
        text.append_text(plain(piece.text, _piece_style(piece)))
    if shown.more:
        text.append(f" and {words.plural(shown.more, 'more token')}", style="dim")
    if shown.note:
        text.append(f"  ({shown.note})", style="dim")
    return text


def _piece_style(piece: Piece) -> str:
    if piece.right is False:
        return "red underline"
    return "dim" if piece.special else ""


def _score(score: Score) -> Text:
    if score.value is None:
        return Text.assemble(("not measured", "dim"), ": ", plain(score.reason or "no reason given"))
    text = plain(f"{words.plain_number(score.value)} {score.unit}".rstrip(), "bold")
    if score.chance is not None:
        text.append_text(
            plain(f"  chance {words.plain_number(score.chance)} {score.unit}".rstrip(), "not bold dim")
        )
    return text


def _print_knowledge(result: AuditResult, console: Console) -> None:
    style = "yellow" if result.setting == "upper bound" else "cyan"
    console.print(
        Text.assemble("\n", ("What the adversary knew: ", "bold"), (result.setting, f"bold {style}"))
    )
    grid = Table.grid(padding=(0, 2))
    grid.add_column(overflow="fold", max_width=24)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for row in result.knowledge:
        grid.add_row(
            plain(row.name.replace("_", " ")), Text(row.status, style=STATUS_STYLES[row.status]), _fact(row)
        )
    console.print(grid)


def _fact(row: KnowledgeRow) -> Text:
    text = plain("" if row.text == row.status else row.text)
    if row.source:
        text.append_text(plain(f" ({row.source})", "dim"))
    if row.upper_bound:
        text.append(" upper bound", style="yellow")
    return text


def _print_controls(result: AuditResult, console: Console) -> None:
    if not result.controls:
        return
    console.print(Text("\nControls", style="bold"))
    outcomes = {None: ("did not run", "dim"), True: ("passed", "green"), False: ("failed", "bold red")}
    for control in result.controls:
        console.print(Text.assemble(f"{control.name} ", outcomes[control.passed], ": ", plain(control.text)))
