"""The table of `leakaudit infer` on a terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from leakaudit.inference_results import INFERENCE_NAME, RATE_WORDS, InferenceOutcome, InferenceResult, Rate


def print_inference(result: InferenceResult, console: Console, folder: Path | None = None) -> None:
    """Print the rates of every inference with their intervals and chance, and what broke the policy."""
    console.print(_heading(result), soft_wrap=True, highlight=False, markup=False, emoji=False)
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("inference", overflow="fold")
    table.add_column("yes / no", justify="right")
    for word in RATE_WORDS.values():
        table.add_column(word, justify="right")
    for outcome in result.outcomes:
        cells = [_cell(outcome.rate(name)) for name in RATE_WORDS]
        table.add_row(Text(_name(outcome)), f"{outcome.positives:,} / {outcome.negatives:,}", *cells)
    table.add_row(
        Text("chance", style="dim"), "", *(Text(str(c), style="dim") for c in ("0.5", "0.01", "0.001"))
    )
    console.print(table)
    for outcome in result.outcomes:
        for reason in _reasons(outcome):
            console.print(
                f"{outcome.attack}: {reason}", soft_wrap=True, highlight=False, markup=False, emoji=False
            )
    policy = [f"Above the policy: {text}" for text in result.broken]
    policy += [f"Not shown to be within the policy: {text}" for text in result.undecided]
    for line in [*result.notes, *policy]:
        console.print(line, soft_wrap=True, highlight=False, markup=False, emoji=False)
    if folder is not None:
        console.print(
            f"Result: {folder / INFERENCE_NAME}", soft_wrap=True, highlight=False, markup=False, emoji=False
        )


def _heading(result: InferenceResult) -> str:
    round, defenses = result.round, "+".join(result.defenses) or "no defense"
    steps = f", {round.local_steps} local steps" if round.local_steps > 1 else ""
    return (
        f"{result.model.name}: {result.trials} updates of {round.num_examples} records{steps}, {defenses};"
        f" {result.candidates} candidates, {result.reference} reference records"
    )


def _name(outcome: InferenceOutcome) -> str:
    return outcome.spec if outcome.property is None else f"{outcome.spec} ({outcome.property})"


def _cell(rate: Rate | None) -> str:
    if rate is None or rate.value is None:
        return "not measured"
    return f"{rate.value:.3f} [{rate.low:.3f}, {rate.high:.3f}]"


def _reasons(outcome: InferenceOutcome) -> list[str]:
    """Why it did not run, or why a rate is missing."""
    if outcome.skipped:
        return [f"not run: {outcome.skipped}"]
    return [f"{RATE_WORDS[rate.name]} {rate.reason}" for rate in outcome.rates if rate.reason]
