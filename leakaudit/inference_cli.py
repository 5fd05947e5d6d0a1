"""`leakaudit infer`, and its table.  Nothing heavy is imported before it runs."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from leakaudit.errors import InputError
from leakaudit.inference_results import INFERENCE_NAME, RATE_WORDS, InferenceOutcome, InferenceResult, Rate
from leakaudit.spec import suggest

if TYPE_CHECKING:
    from leakaudit.inference.experiment import OnTrial


def infer(
    model: Annotated[
        str, typer.Option(help="Name, torchvision:NAME, file.py:factory, or hf:NAME_OR_FOLDER for text.")
    ],
    data: Annotated[
        str | None, typer.Option(help="Records: a folder of images, .npz, or torchvision:NAME.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Sentences instead: .txt, .tsv, .csv or .jsonl, for a language model.")
    ] = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(
            help="membership-likelihood, membership-gradient, membership-loss, membership-words or property, as"
            " NAME:key=value; may be repeated.  All memberships that fit the data unless given."
        ),
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="The model as the client downloaded it.")] = None,
    task: Annotated[
        str | None, typer.Option(help="Of a language model: classification, mlm or causal-lm.")
    ] = None,
    lora: Annotated[str | None, typer.Option(help="Adapters of a language model, as for attack.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Cut sentences off after so many tokens.")] = None,
    batch_size: Annotated[int, typer.Option(help="Records a local step.")] = 8,
    examples: Annotated[
        int | None, typer.Option(help="Records behind an update in all; the batch size by default.")
    ] = None,
    local_steps: Annotated[int | None, typer.Option(help="SGD steps between download and upload.")] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the records, instead of --local-steps.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", "--lr", help="Of the client's SGD.")
    ] = None,
    mode: Annotated[str, typer.Option(help="train or eval: the client's BatchNorm and dropout.")] = "eval",
    normalisation: Annotated[str, typer.Option(help="As for attack; none feeds pixels in [0, 1].")] = "none",
    input_shape: Annotated[str | None, typer.Option(help="C,H,W.")] = None,
    num_classes: Annotated[int | None, typer.Option(help="Number of classes.")] = None,
    defense: Annotated[
        list[str] | None,
        typer.Option(help="NAME:key=value, applied in order; see list defenses.  The adversary knows them."),
    ] = None,
    candidates: Annotated[
        int | None,
        typer.Option(
            help="Records that batches are drawn from, the first of the data; half of them by default."
        ),
    ] = None,
    reference: Annotated[
        int | None, typer.Option(help="Records of the adversary's own, the next; the rest by default.")
    ] = None,
    start: Annotated[int, typer.Option(help="First record of the data.")] = 0,
    trials: Annotated[int, typer.Option(help="Updates to judge, each of another batch.")] = 20,
    property_name: Annotated[
        str | None,
        typer.Option(
            "--property",
            help="bright or colourful images, long sentences; above the median of the own class.",
        ),
    ] = None,
    fail_on: Annotated[
        str | None, typer.Option(help="Policy: auc>0.6,tpr01>0.05,tpr001>0.01; without one nothing fails.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The one seed of the run.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for inference.json.")] = Path("runs/infer"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
) -> None:
    """Membership and property inference: what an update tells even where nothing can be reconstructed."""
    from leakaudit.inference.running import infer as run

    if mode not in ("train", "eval"):
        raise InputError(f"mode {mode!r}{suggest(mode, ('train', 'eval'))}; accepted: train, eval")
    with trial_bar(Console(stderr=True)) as on_trial:
        result = run(
            model,
            data,
            text=text,
            task=task,
            lora=lora,
            max_length=max_length,
            checkpoint=checkpoint,
            attacks=attack or (),
            batch_size=batch_size,
            num_examples=examples,
            local_steps=local_steps,
            epochs=epochs,
            learning_rate=learning_rate,
            mode=cast(Any, mode),
            normalisation=normalisation,
            input_shape=_shape(input_shape),
            num_classes=num_classes,
            defenses=defense or (),
            candidates=candidates,
            reference=reference,
            start=start,
            trials=trials,
            trait=property_name,
            policy=fail_on or "",
            seed=seed,
            device=device,
            out=out,
            force=force,
            on_trial=on_trial,
            command=shlex.join(["leakaudit", *sys.argv[1:]]),
        )
    print_inference(result, Console(), out)
    raise typer.Exit(result.exit_code)


@contextmanager
def trial_bar(console: Console) -> Iterator[OnTrial]:
    """Yields the callback that counts updates, with the time left; shown on a terminal only."""
    columns = (TextColumn("updates"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("updates", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


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


def _shape(text: str | None) -> tuple[int, int, int] | None:
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 3 or min(numbers) < 1:
        raise InputError(f"input shape {text!r} is not C,H,W with positive numbers, such as 3,32,32")
    return numbers[0], numbers[1], numbers[2]
