"""The command line: parse, call, print, exit code.  Nothing heavy is imported before a command runs."""

from __future__ import annotations

import shlex
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console

from leakaudit import __version__
from leakaudit.errors import EXIT_INCONCLUSIVE, InputError, LeakauditError
from leakaudit.inference_cli import infer
from leakaudit.leakage_cli import leakage
from leakaudit.progress import progress_bar, sweep_bar
from leakaudit.simulate_cli import simulate_app
from leakaudit.units import parse_numbers, parse_shape

if TYPE_CHECKING:
    from leakaudit.formats.manifest import Manifest
    from leakaudit.results import AuditResult

app = typer.Typer(
    name="leakaudit",
    help="What do the updates of federated learning give away?  Reconstructs private images and text.",
    epilog="Exit codes: 0 within policy, 1 leakage above the policy, 2 usage or input error, 3 inconclusive.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

BATCH_SIZE = typer.Option(help="Private examples a local step.")
REDUCTION = typer.Option(help="mean or sum over the batch.")
SEED = typer.Option(help="The one seed of the run.")
DEVICE = typer.Option(help="cpu, cuda or auto.")
MAX_LENGTH = typer.Option(help="Cut sentences off after so many tokens, instead of refusing them.")
START = typer.Option(help="First example of the data.")
REDACT = typer.Option("--redact", help="Leave the originals out of everything written.")

UpdateFile = Annotated[
    Path, typer.Argument(help="The file a client shared: .safetensors, .npz, .pt.", show_default=False)
]
Model = Annotated[
    str | None,
    typer.Option(
        help="Name, torchvision:NAME, file.py:factory, package.module:factory, or hf:NAME_OR_FOLDER for text."
    ),
]
Task = Annotated[
    str | None, typer.Option(help="Of a language model (hf:): classification, mlm or causal-lm.")
]
Lora = Annotated[
    str | None,
    typer.Option(
        help="Adapters of a language model: rank=8,alpha=16,targets=query+value, or a folder of PEFT's."
    ),
]
Checkpoint = Annotated[Path | None, typer.Option(help="The model as the client downloaded it.")]
Before = Annotated[
    Path | None,
    typer.Option(
        help="Checkpoint before local training, when the file is the one after; replaces --checkpoint."
    ),
]
Kind = Annotated[
    str | None, typer.Option(help="gradient, delta (a difference of weights) or weights (after training).")
]
Sign = Annotated[str | None, typer.Option(help="Of a delta: before-minus-after or after-minus-before.")]
LearningRate = Annotated[float | None, typer.Option("--learning-rate", "--lr", help="Of the client's SGD.")]
LocalSteps = Annotated[int | None, typer.Option(help="SGD steps between download and upload.")]
BatchSize = Annotated[int | None, BATCH_SIZE]
Examples = Annotated[int | None, typer.Option(help="Private examples in all; the batch size by default.")]
Mode = Annotated[str | None, typer.Option(help="train or eval: the client's BatchNorm and dropout.")]
Loss = Annotated[str | None, typer.Option(help="cross-entropy.")]
Reduction = Annotated[str | None, REDUCTION]
Normalisation = Annotated[
    str | None, typer.Option(help="none, cifar10, cifar100, imagenet, mnist, or MEAN/STD as m,m,m/s,s,s.")
]
InputShape = Annotated[str | None, typer.Option(help="C,H,W.")]
Classes = Annotated[int | None, typer.Option("--num-classes", help="Number of classes.")]
NoiseStd = Annotated[
    float | None, typer.Option(help="Standard deviation of noise the adversary knows was added.")
]
Seed = Annotated[int, SEED]
Device = Annotated[str, DEVICE]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what is there.")]


def _version(value: bool) -> None:
    if value:
        typer.echo(f"leakaudit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/demo"),
    seed: Seed = 1,
    text: Annotated[bool, typer.Option("--text", help="Sentences instead of photos.")] = False,
) -> None:
    """Reconstruct bundled photos, or sentences, from gradients of small models, and write an HTML report."""
    from leakaudit.demo import run_demo

    console = Console()
    with progress_bar(Console(stderr=True)) as on_progress:
        reports = run_demo(out, seed, console, on_progress, text=text)
    for report in reports:
        console.print(f"Report: {report}", soft_wrap=True, highlight=False, markup=False, emoji=False)


@app.command()
def capture(
    model: Annotated[str, typer.Option(help="As for attack.")],
    out: Annotated[Path, typer.Option(help="Shared update to write (.safetensors).")],
    data: Annotated[
        str | None,
        typer.Option(help="Private images: a file, a folder, .npz, or torchvision:NAME."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Private sentences instead: .txt, .tsv, .csv or .jsonl, for a language model."),
    ] = None,
    task: Task = None,
    lora: Lora = None,
    max_length: Annotated[int | None, MAX_LENGTH] = None,
    truth: Annotated[Path | None, typer.Option(help="Also write the private batch here.")] = None,
    checkpoint: Checkpoint = None,
    save_model: Annotated[
        Path | None,
        typer.Option(
            help="Write the model the client downloaded; model.safetensors beside --out where a fresh one is made."
        ),
    ] = None,
    batch_size: Annotated[int, BATCH_SIZE] = 1,
    examples: Examples = None,
    start: Annotated[int, START] = 0,
    local_steps: LocalSteps = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the examples, instead of --local-steps.")
    ] = None,
    learning_rate: LearningRate = None,
    mode: Annotated[
        str, typer.Option(help="train or eval: BatchNorm and dropout while the gradient is taken.")
    ] = "eval",
    normalisation: Annotated[str, typer.Option(help="As for attack; none feeds pixels in [0, 1].")] = "none",
    input_shape: InputShape = None,
    num_classes: Classes = None,
    reduction: Annotated[str, REDUCTION] = "mean",
    buffers: Annotated[bool, typer.Option("--buffers", help="Share BatchNorm buffers too.")] = False,
    defense: Annotated[
        list[str] | None, typer.Option(help="NAME:key=value, applied in order; see list defenses.")
    ] = None,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Run the client's side on images or sentences and save the update it would share."""
    from leakaudit.api import capture_update

    fresh = checkpoint is None and not model.startswith("hf:")
    save_model = save_model or (out.parent / "model.safetensors" if fresh else None)
    _refuse_existing(force, out, truth, save_model)
    summary = capture_update(
        model,
        data,
        out,
        text=text,
        task=task,
        lora=lora,
        max_length=max_length,
        truth=truth,
        checkpoint=checkpoint,
        save_model=save_model,
        batch_size=batch_size,
        num_examples=examples,
        start=start,
        local_steps=local_steps,
        epochs=epochs,
        learning_rate=learning_rate,
        mode=cast(Any, mode),
        normalisation=normalisation,
        input_shape=_shape(input_shape),
        num_classes=num_classes,
        reduction=reduction,
        buffers=buffers,
        defenses=defense or (),
        seed=seed,
    )
    console = Console()
    for line in summary:
        console.print(line, soft_wrap=True, highlight=False, markup=False, emoji=False)


@app.command()
def inspect(
    update: UpdateFile,
    model: Model = None,
    checkpoint: Checkpoint = None,
    before: Before = None,
    kind: Kind = None,
    sign: Sign = None,
    learning_rate: LearningRate = None,
    local_steps: LocalSteps = None,
    batch_size: BatchSize = None,
    examples: Examples = None,
    mode: Mode = None,
    loss: Loss = None,
    reduction: Reduction = None,
    normalisation: Normalisation = None,
    input_shape: InputShape = None,
    num_classes: Classes = None,
    task: Task = None,
    lora: Lora = None,
    noise_std: NoiseStd = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    seed: Seed = 0,
) -> None:
    """Say in seconds what the file gives away by itself."""
    from leakaudit.report.terminal import print_findings
    from leakaudit.subject import Sources, look

    manifest = _manifest(
        kind, sign, learning_rate, local_steps, batch_size, examples, mode, loss, reduction,
        normalisation, input_shape, num_classes, task, lora, noise_std,
    )  # fmt: skip
    findings = look(Sources(update, model, checkpoint, before, manifest, device="cpu"), seed)
    if json_output:
        import json

        typer.echo(json.dumps([finding.model_dump() for finding in findings], indent=1))
    else:
        print_findings(findings, Console())


@app.command()
def attack(
    update: UpdateFile,
    model: Model = None,
    checkpoint: Checkpoint = None,
    truth: Annotated[Path | None, typer.Option(help="The private batch, to score against.")] = None,
    attack: Annotated[
        list[str] | None, typer.Option(help="auto, or NAME:key=value; may be repeated; see list attacks.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Run folder; a rerun resumes.")] = Path("runs/attack"),
    html: Annotated[Path | None, typer.Option(help="Write the HTML report here too.")] = None,
    budget: Annotated[
        float,
        typer.Option(
            help="Seconds for all attacks, at most a third of them to try what the file does not say."
        ),
    ] = 600,
    restarts: Annotated[int | None, typer.Option(help="Random starts of every attack.", min=1)] = None,
    fail_on: Annotated[
        str | None,
        typer.Option(
            help="Policy: thresholds that count as leakage, psnr>20,ssim>0.5 for images and"
            " token-accuracy>0.5,words-f1>0.5,rouge-l>0.5 for text unless given; never: exit 0 for it."
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="Scores to measure; unless given mse, psnr, ssim and lpips of images, all of text; see list metrics."
        ),
    ] = None,
    labels: Annotated[str | None, typer.Option(help="Labels given to the adversary: 3,8,8.")] = None,
    pool: Annotated[
        str | None, typer.Option(help="Images, or a file of sentences, to tell the private ones from.")
    ] = None,
    redact: Annotated[bool, REDACT] = False,
    controls: Annotated[
        bool, typer.Option(help="Run the positive control when nothing is recovered.")
    ] = True,
    before: Before = None,
    kind: Kind = None,
    sign: Sign = None,
    learning_rate: LearningRate = None,
    local_steps: LocalSteps = None,
    batch_size: BatchSize = None,
    examples: Examples = None,
    mode: Mode = None,
    loss: Loss = None,
    reduction: Reduction = None,
    normalisation: Normalisation = None,
    input_shape: InputShape = None,
    num_classes: Classes = None,
    task: Task = None,
    lora: Lora = None,
    noise_std: NoiseStd = None,
    device: Device = "auto",
    compile: Annotated[
        str | None,
        typer.Option(
            help="Compile the attack's step: auto (where it pays), always or never.",
            envvar="LEAKAUDIT_COMPILE",
            show_envvar=True,
        ),
    ] = None,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Reconstruct private images or text from a saved update, and report what it gives away."""
    from leakaudit import api
    from leakaudit.atomic import writable_folder

    manifest = _manifest(
        kind, sign, learning_rate, local_steps, batch_size, examples, mode, loss, reduction,
        normalisation, input_shape, num_classes, task, lora, noise_std,
    )  # fmt: skip
    if html is not None:
        writable_folder(html.parent)
    with progress_bar(Console(stderr=True)) as on_progress:
        result = api.attack(
            update,
            model,
            checkpoint=checkpoint,
            before=before,
            manifest=manifest,
            labels=_labels(labels),
            truth=truth,
            pool=pool,
            attacks=attack or ("auto",),
            seed=seed,
            budget=budget,
            restarts=restarts,
            policy=fail_on,
            metrics=metric,
            controls=controls,
            redact=redact,
            device=device,
            compile=compile,
            out=out,
            force=force,
            on_progress=on_progress,
            command=shlex.join(["leakaudit", *sys.argv[1:]]),
        )
    _finish(result, html)


@app.command()
def defend(
    config: Annotated[
        Path | None, typer.Option(help="TOML file of the sweep; options given here win over it.")
    ] = None,
    model: Model = None,
    checkpoint: Checkpoint = None,
    data: Annotated[
        str | None, typer.Option(help="Images to defend: a file, a folder, .npz, or torchvision:NAME.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Sentences to defend instead, with a language model.")
    ] = None,
    task: Task = None,
    lora: Lora = None,
    max_length: Annotated[int | None, MAX_LENGTH] = None,
    normalisation: Normalisation = None,
    mode: Mode = None,
    input_shape: InputShape = None,
    num_classes: Classes = None,
    start: Annotated[int | None, START] = None,
    protocol: Annotated[
        list[str] | None,
        typer.Option(
            help="fedsgd:batch_size=1, fedavg:steps=5,learning_rate=0.01,examples=1, or the file of a view of"
            " simulate; may be repeated."
        ),
    ] = None,
    defense: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME:key=value,value,..., one sweep a list of values; + chains them; none counts the control"
            " row; may be repeated."
        ),
    ] = None,
    attack: Annotated[
        list[str] | None, typer.Option(help="auto unless given, or NAME:key=value; may be repeated.")
    ] = None,
    adversary: Annotated[
        list[str] | None,
        typer.Option(
            help="oblivious (unaware of the defense) or adaptive; both unless given; may be repeated."
        ),
    ] = None,
    labels: Annotated[
        bool | None,
        typer.Option("--known-labels/--unknown-labels", help="Whether the adversary is given the labels."),
    ] = None,
    images: Annotated[
        int | None, typer.Option("--images", "--examples", help="Private images, or sentences, to attack.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="How many seeds every cell is run with.")] = None,
    seed: Annotated[int | None, SEED] = None,
    budget: Annotated[
        float | None, typer.Option(help="Seconds for the attacks of one run; 120 unless given.")
    ] = None,
    total_budget: Annotated[
        float | None, typer.Option(help="Seconds after which no run begins; --resume does the rest.")
    ] = None,
    fail_on: Annotated[
        str | None, typer.Option(help="The policy a cell must keep, such as ssim>0.5; never: report only.")
    ] = None,
    quantile: Annotated[
        float | None, typer.Option(help="Of the scores the policy looks at; 1, the worst case, unless given.")
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="Scores besides those of the policy; may be repeated.")
    ] = None,
    redact: Annotated[bool | None, REDACT] = None,
    utility: Annotated[
        bool | None, typer.Option(help="Train with every defense on the data, and report accuracy.")
    ] = None,
    utility_steps: Annotated[int | None, typer.Option(help="Steps of that training.")] = None,
    utility_batch_size: Annotated[int | None, typer.Option(help="Examples a step of it.")] = None,
    utility_learning_rate: Annotated[float | None, typer.Option(help="Its learning rate.")] = None,
    utility_seeds: Annotated[int | None, typer.Option(help="Trainings of every target.")] = None,
    holdout: Annotated[
        float | None, typer.Option(help="Share of the data that accuracy is measured on.")
    ] = None,
    curves: Annotated[
        Path | None, typer.Option(help="Curves already trained (JSON or CSV), instead of training.")
    ] = None,
    bounds: Annotated[bool | None, typer.Option(help="Put what theory says beside the attacks.")] = None,
    prior: Annotated[
        float | None, typer.Option(help="Probability that a guess without the update is right, for bounds.")
    ] = None,
    delta: Annotated[float | None, typer.Option(help="Of differential privacy.")] = None,
    sample_rate: Annotated[
        float | None, typer.Option(help="Share of a client's data in each update, for the accountant.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Updates a client shares, for the accountant.")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes; one a core, or a GPU, unless given; 0: this one.")
    ] = None,
    engine: Annotated[str | None, typer.Option(help="local, or ray for a cluster.")] = None,
    address: Annotated[
        str | None, typer.Option(help="Of the Ray cluster; without one it starts here.")
    ] = None,
    device: Annotated[str | None, DEVICE] = None,
    out: Annotated[Path | None, typer.Option(help="The sweep's folder; runs/sweep unless given.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Finish a sweep that was ended.")] = False,
    baseline: Annotated[Path | None, typer.Option(help="Leakage that was accepted, JSON.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the page of the sweep here too.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML, a case for each cell.")] = None,
    sarif: Annotated[
        Path | None, typer.Option(help="Write SARIF 2.1.0, a result for each leaking cell.")
    ] = None,
    summary: Annotated[
        Path | None, typer.Option(help="Append a Markdown summary, as to $GITHUB_STEP_SUMMARY.")
    ] = None,
    force: Force = False,
) -> None:
    """Attack every protocol with every defense: what each stops, what it costs, and whether the policy holds."""
    from leakaudit.sweep.config import build_config, read_config
    from leakaudit.sweep.workers import begin_importing

    training = {
        "on": utility, "steps": utility_steps, "batch_size": utility_batch_size, "seeds": utility_seeds,
        "learning_rate": utility_learning_rate, "holdout": holdout, "curves": curves,
    }  # fmt: skip
    theory = {"on": bounds, "prior": prior, "delta": delta, "sample_rate": sample_rate, "steps": rounds}
    options = {
        "model": model, "checkpoint": checkpoint, "data": data, "text": text, "task": task, "lora": lora,
        "max_length": max_length, "normalisation": normalisation, "mode": mode,
        "input_shape": _shape(input_shape), "num_classes": num_classes, "start": start, "protocols": protocol,
        "defenses": defense, "attacks": attack, "adversaries": adversary, "labels": labels, "images": images,
        "seeds": seeds, "seed": seed, "budget": budget, "total_budget": total_budget, "fail_on": fail_on,
        "quantile": quantile, "metrics": metric, "redact": redact, "utility": _given(training),
        "bounds": _given(theory), "workers": workers, "engine": engine, "address": address, "device": device,
        "out": out, "baseline": baseline, "html": html, "junit": junit, "sarif": sarif, "summary": summary,
    }  # fmt: skip
    sweep = build_config({} if config is None else read_config(config), over=_given(options))
    begin_importing(sweep)  # before this process imports torch, so that both import at the same time
    from leakaudit import api
    from leakaudit.report.sweep_terminal import print_sweep

    with sweep_bar(Console(stderr=True)) as on_progress:
        result = api.defend(
            sweep,
            resume=resume,
            force=force,
            on_progress=on_progress,
            command=shlex.join(["leakaudit", *sys.argv[1:]]),
        )
    print_sweep(result, Console(), sweep.out)
    raise typer.Exit(result.exit_code or (EXIT_INCONCLUSIVE if result.interrupted else 0))


@app.command()
def report(
    run: Annotated[
        Path, typer.Argument(help="Folder written by attack, audit, defend, or simulate.", show_default=False)
    ],
    html: Annotated[Path, typer.Option(help="Page to write.")] = Path("report.html"),
    redact: Annotated[bool, typer.Option("--redact", help="Leave the originals out.")] = False,
) -> None:
    """Write the HTML report of a finished run: one file, without remote requests."""
    from leakaudit.report.finished import write_report

    write_report(run, html, redact=redact)
    Console().print(f"Report: {html}", soft_wrap=True, highlight=False, markup=False, emoji=False)


@app.command()
def baseline(
    sweep: Annotated[Path, typer.Argument(help="Folder written by defend.", show_default=False)],
    owner: Annotated[str, typer.Option(help="Who answers for what is accepted.")],
    expires: Annotated[str, typer.Option(help="Last day of the acceptance, YYYY-MM-DD.")],
    reason: Annotated[str, typer.Option(help="Why, for whoever reads the baseline.")] = "",
    out: Annotated[Path, typer.Option(help="Baseline to write.")] = Path("baseline.json"),
    force: Force = False,
) -> None:
    """Accept the leakage that a sweep found, until a day, so that only new leakage fails the gate."""
    from leakaudit.gate import read_sweep, write_baseline

    written = write_baseline(read_sweep(sweep), out, owner, expires, reason=reason, force=force)
    console = Console()
    for entry in written.entries:
        line = f"{entry.cell}: {entry.owner}, until {entry.expires}"
        console.print(line, soft_wrap=True, highlight=False, markup=False, emoji=False)
    console.print(f"Baseline: {out}", soft_wrap=True, highlight=False, markup=False, emoji=False)


@app.command("list")
def list_names(
    what: Annotated[
        str,
        typer.Argument(
            help="attacks, defenses, protocols, systems, inferences, models or metrics.", show_default=False
        ),
    ],
) -> None:
    """Name what there is: attacks, defenses, protocols, systems, inferences, models or metrics."""
    from leakaudit.listing import tables

    known = tables()
    if what not in known:
        raise InputError(f"cannot list {what!r}; accepted: {', '.join(known)}")
    known[what](Console())


# ------------------------------------------------------------------ between options and functions


def _finish(result: AuditResult, html: Path | None) -> None:
    from leakaudit.report.folder import write_page
    from leakaudit.report.terminal import print_result

    if html is not None:
        write_page(result, html, redact=result.redacted)
    print_result(result, Console(), result.folder)
    for trial in result.trials:
        step = trial.details.get("step", "")
        if step.startswith("eager, "):
            typer.echo(f"{trial.attack} ran {step}", err=True)
    raise typer.Exit(result.exit_code)


def _manifest(
    kind: str | None,
    sign: str | None,
    learning_rate: float | None,
    local_steps: int | None,
    batch_size: int | None,
    examples: int | None,
    mode: str | None,
    loss: str | None,
    reduction: str | None,
    normalisation: str | None,
    input_shape: str | None,
    num_classes: int | None,
    task: str | None,
    lora: str | None,
    noise_std: float | None,
) -> Manifest | None:
    """What the options say about the file; None when they say nothing, so that nothing is overridden."""
    stated: dict[str, Any] = {
        "kind": kind,
        "sign": sign,
        "learning_rate": learning_rate,
        "local_steps": local_steps,
        "local_batch_size": batch_size,
        "num_examples": batch_size if examples is None else examples,
        "mode": mode,
        "loss": loss,
        "reduction": reduction,
        "input_shape": _shape(input_shape),
        "num_classes": num_classes,
        "task": task,
        "lora": lora,
        "noise_std": noise_std,
    }
    stated = {name: value for name, value in stated.items() if value is not None}
    if not stated and normalisation is None:
        return None
    from leakaudit.formats.manifest import build_manifest

    if normalisation is not None:
        from leakaudit.models.zoo import parse_normalisation

        stated["normalisation"] = parse_normalisation(normalisation).model_dump()
    return build_manifest(stated)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value not in (None, [], {})}


def _shape(text: str | None) -> tuple[int, int, int] | None:
    return None if text is None else parse_shape(text)


def _labels(text: str | None) -> list[int] | None:
    return None if text is None else parse_numbers(text, "labels")


def _refuse_existing(force: bool, *paths: Path | None) -> None:
    for path in paths:
        if path is not None and path.exists() and not force:
            raise InputError(f"{path} exists; pass --force to overwrite it, or choose another name")


app.command()(infer)
simulate_app.command()(leakage)
app.add_typer(simulate_app)


def main() -> None:
    """Entry point: errors of input become one line on stderr and exit code 2."""
    warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=FutureWarning)
    try:
        app()
    except LeakauditError as error:
        Console(stderr=True).print(
            f"leakaudit: {error}", markup=False, emoji=False, highlight=False, soft_wrap=True
        )
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
