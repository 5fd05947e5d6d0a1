"""`leakaudit infer`: parse, call, print, exit code.  Nothing heavy is imported before it runs."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console

from leakaudit.errors import InputError
from leakaudit.progress import trial_bar
from leakaudit.spec import suggest
from leakaudit.units import parse_shape

if TYPE_CHECKING:
    pass


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
    from leakaudit.report.inference_terminal import print_inference

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
            input_shape=None if input_shape is None else parse_shape(input_shape),
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
