"""Everything the commands do, as functions.

leakaudit.save_update("shared.safetensors", model, batch_size=8)      # in a training loop
result = leakaudit.attack("shared.safetensors", "resnet20", checkpoint="model.pt")
result = leakaudit.audit("lenet", "photos/", num_examples=4)
result = leakaudit.audit("hf:prajjwal1/bert-tiny", text="notes.txt", task="classification")
result = leakaudit.defend("audit.toml")
result = leakaudit.simulate("fedbuff:buffer=10", leakaudit.Scenario("resnet20", data="cifar10.npz"))
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from leakaudit.atomic import sha256_of, writable_folder, write_atomically
from leakaudit.attacks.compiling import Compiler
from leakaudit.auditing import Settings, Subject
from leakaudit.auditing import audit as run_audit
from leakaudit.capture import Captured, capture, round_of, write_captured
from leakaudit.data import PrivateBatch
from leakaudit.defenses.naming import defended, parse_all
from leakaudit.errors import InputError
from leakaudit.execution import OnProgress, Plan, choose
from leakaudit.formats.checkpoint import save_checkpoint
from leakaudit.formats.manifest import Manifest, build_manifest
from leakaudit.formats.phrases import counted
from leakaudit.media import medium_of
from leakaudit.media.base import metrics_of, policy_of
from leakaudit.metrics import METRICS
from leakaudit.models.victim import Mode, Victim
from leakaudit.models.zoo import load_victim, parse_normalisation
from leakaudit.policy import MEDIUM_METRICS, parse_policy
from leakaudit.report.folder import RESULT_NAME, read_run, write_run
from leakaudit.results import AuditResult
from leakaudit.rounds import Round
from leakaudit.spec import suggest
from leakaudit.subject import Sources, open_update, private_source

if TYPE_CHECKING:
    from leakaudit.progress import OnStep, OnSweep
    from leakaudit.scenario import Scenario
    from leakaudit.simulating import System
    from leakaudit.simulation_results import Comparison, SimulationResult
    from leakaudit.sweep.config import SweepConfig
    from leakaudit.sweep_results import SweepResult
    from leakaudit.text_data import PrivateText


def attack(
    update: str | Path,
    model: str | nn.Module | None = None,
    *,
    checkpoint: str | Path | None = None,
    before: str | Path | None = None,
    manifest: Manifest | None = None,
    labels: Sequence[int] | None = None,
    truth: str | Path | None = None,
    pool: str | Path | None = None,
    task: str | None = None,
    lora: str | None = None,
    attacks: Sequence[str] = ("auto",),
    seed: int = 0,
    budget: float | None = None,
    restarts: int | None = None,
    policy: str | None = None,
    metrics: Sequence[str] | None = None,
    controls: bool = True,
    redact: bool = False,
    device: str = "auto",
    compile: str | None = None,
    out: str | Path | None = None,
    force: bool = False,
    on_progress: OnProgress | None = None,
    command: str = "",
    title: str = "Gradient-inversion audit",
) -> AuditResult:
    """Attack a saved update, and write result.json, report.html and pictures to `out`.

    Args:
        update: the file the client shared; model, checkpoint, before, manifest, labels, truth,
            pool, device: see `leakaudit.subject.Sources`.
        task, lora: of a language model, over what the file says; see `leakaudit.models.language`.
        attacks, seed, budget (seconds), restarts: see `leakaudit.execution.Plan`.
        policy: thresholds that count as leakage, such as "psnr>20,ssim>0.5", or "never"; None for
            `leakaudit.policy.DEFAULT_POLICIES`.
        metrics: names of `leakaudit.policy.MEDIUM_METRICS`; None for mse, psnr, ssim and lpips, or all of text.
        controls: run the positive control when nothing was recovered.
        redact: leave the originals out of everything written.
        compile: "auto", "always" or "never"; see `leakaudit.attacks.compiling.Compiler`.
        out: the run folder; None for a new temporary one (`result.folder` says where).  A folder with
            the finished run of another update is refused without `force`.

    Returns the same result that the command writes.  Raises `InputError` for anything that cannot be used.
    """
    list(choose(tuple(attacks)))  # an unknown attack is an error now, not after reading everything
    if pool is not None and truth is None:
        raise InputError(f"pool {pool} is compared with the private batch; accepted only with a truth file")
    _check_names(policy, metrics)
    budget = _positive(budget, "budget")
    compiler = Compiler.of(compile)
    downloaded = checkpoint or before
    manifest = _stated(manifest, task, lora)
    sources = Sources(update, model, checkpoint, before, manifest, labels, truth, pool, device)
    opened = open_update(sources, seed)
    medium = medium_of(opened.view.victim)
    thresholds = policy_of(policy, medium)
    settings = Settings(
        plan=Plan(attacks=tuple(attacks), seed=seed, budget=budget, restarts=restarts),
        policy=thresholds,
        metrics=metrics_of(metrics, thresholds, medium),
        compiler=compiler,
        controls=controls,
        redact=redact,
        command=command,
        title=title,
    )
    subject = Subject(
        view=opened.view,
        inspection=opened.inspection,
        truth=None if truth is None else medium.read_truth(truth, opened.view),
        pool=None if truth is None else medium.read_pool(pool, opened.view),
        files=opened.files,
        findings=opened.findings,
        checkpoint=None if downloaded is None else Path(downloaded).name,
    )
    folder = _run_folder(out, opened.files, force)
    return write_run(run_audit(subject, settings, folder, on_progress), folder)


def audit(
    model: str,
    data: str | Path | None = None,
    *,
    text: str | Path | None = None,
    task: str | None = None,
    lora: str | None = None,
    max_length: int | None = None,
    checkpoint: str | Path | None = None,
    num_examples: int = 1,
    batch_size: int | None = None,
    local_steps: int = 1,
    learning_rate: float | None = None,
    mode: Mode = "eval",
    normalisation: str = "none",
    input_shape: tuple[int, int, int] | None = None,
    num_classes: int | None = None,
    defenses: Sequence[str] = (),
    attacks: Sequence[str] = ("auto",),
    seed: int = 0,
    budget: float | None = None,
    out: str | Path | None = None,
    force: bool = False,
    on_progress: OnProgress | None = None,
    command: str = "",
    title: str = "Gradient-inversion audit",
) -> AuditResult:
    """Capture an update from your own data and attack it, truth at hand: `capture_update`, then `attack`.

    The files of the capture are kept in `out`, beside the result.  Nothing is written where `out` holds
    another capture or run, without `force`.  Arguments as for those two.
    """
    list(choose(tuple(attacks)))  # as in `attack`, but before anything is captured
    _positive(budget, "budget")
    with tempfile.TemporaryDirectory(prefix="leakaudit-") as scratch:
        shared, truth, saved = (
            Path(scratch) / f"{name}.safetensors" for name in ("shared", "truth", "model")
        )
        capture_update(
            model,
            data,
            shared,
            text=text,
            task=task,
            lora=lora,
            max_length=max_length,
            truth=truth,
            checkpoint=checkpoint,
            save_model=saved,
            batch_size=batch_size or num_examples,
            num_examples=num_examples,
            local_steps=local_steps,
            learning_rate=learning_rate,
            mode=mode,
            normalisation=normalisation,
            input_shape=input_shape,
            num_classes=num_classes,
            defenses=defenses,
            seed=seed,
        )
        folder = _run_folder(out, {path.name: sha256_of(path) for path in (shared, saved)}, force)
        _keep((shared, truth, saved), folder, force)
    return attack(
        folder / shared.name,
        model,
        checkpoint=folder / saved.name,
        truth=folder / truth.name,
        lora=lora,
        attacks=attacks,
        seed=seed,
        budget=budget,
        out=folder,
        force=force,
        on_progress=on_progress,
        command=command,
        title=title,
    )


def defend(
    config: SweepConfig | str | Path,
    *,
    resume: bool = False,
    force: bool = False,
    on_progress: OnSweep | None = None,
    command: str = "",
) -> SweepResult:
    """Sweep protocols, defenses, attacks and adversaries; see `leakaudit.sweep.config.SweepConfig`.

    The result, the page, and everything the runs found are written to `config.out`.  With worker processes a
    script must call this under `if __name__ == "__main__":`, as multiprocessing asks; `workers=0` needs none.

    Args:
        config: the sweep, or the TOML file that says what it is.
        resume: finish a sweep that was ended; force: start anew where the folder holds one.

    Ctrl-C ends the sweep with what is finished, and the result says so.
    Raises `InputError` for anything that cannot be used, before anything is computed or written.
    """
    from leakaudit.sweep.config import SweepConfig, build_config, read_config  # sweeps stand above audits
    from leakaudit.sweep.run import run_sweep

    sweep = config if isinstance(config, SweepConfig) else build_config(read_config(config))
    return run_sweep(sweep, resume=resume, force=force, on_progress=on_progress, command=command)


def simulate(
    system: str | System,
    scenario: Scenario,
    *,
    out: str | Path | None = None,
    force: bool = False,
    on_step: OnStep | None = None,
    command: str = "",
) -> SimulationResult:
    """Train with a whole system on a virtual clock, and record what each party sees.

    Args:
        system: a name of `leakaudit.federated.options.SYSTEMS` with options, such as "fedbuff:buffer=10".
        scenario: model, data, clients, limits.
        out: the run folder, see `leakaudit.simulating`; None for a new temporary one.
        force: start anew in a folder that holds another run.
        on_step: called with (steps done, steps at most, held-out loss).

    Ctrl-C ends the run with what it has come to, and the result says so.
    Raises `InputError` for anything that cannot be used, before anything is written.
    """
    from leakaudit import simulating  # stands above audits

    chosen = simulating.System.parse(system) if isinstance(system, str) else system
    return simulating.simulate(chosen, scenario, _folder(out), force=force, on_step=on_step, command=command)


def compare(
    systems: Sequence[str],
    scenario: Scenario,
    *,
    seeds: int = 1,
    out: str | Path | None = None,
    force: bool = False,
    on_run: Callable[[str], OnStep] | None = None,
    command: str = "",
) -> Comparison:
    """Run several systems on the same model, data, clients and seeds.

    Args:
        systems: specs as for `simulate`, at least one, no two the same.
        scenario: as for `simulate`; seeds: how many, from its seed on.
        out: a folder with one below for every run; None for a new temporary one.  Finished runs of the same
            comparison are kept; `force` begins all anew.
        on_run: called with a run's label before it begins, gives its `on_step`.

    Raises `InputError` as `simulate` does.
    """
    from leakaudit.comparing import compare as run_all

    return run_all(systems, scenario, _folder(out), seeds=seeds, force=force, on_run=on_run, command=command)


def _folder(out: str | Path | None) -> Path:
    return Path(tempfile.mkdtemp(prefix="leakaudit-")) if out is None else Path(out)


def capture_update(
    model: str,
    data: str | Path | None,
    out: str | Path,
    *,
    text: str | Path | None = None,
    task: str | None = None,
    lora: str | None = None,
    max_length: int | None = None,
    truth: str | Path | None = None,
    checkpoint: str | Path | None = None,
    save_model: str | Path | None = None,
    batch_size: int = 1,
    num_examples: int | None = None,
    start: int = 0,
    local_steps: int | None = None,
    epochs: int | None = None,
    learning_rate: float | None = None,
    mode: Mode = "eval",
    normalisation: str = "none",
    input_shape: tuple[int, int, int] | None = None,
    num_classes: int | None = None,
    reduction: str = "mean",
    buffers: bool = False,
    defenses: Sequence[str] = (),
    seed: int = 0,
) -> list[str]:
    """Run one client's round on real images or sentences and save what it would share.

    Args:
        model, checkpoint: see `leakaudit.models.zoo`; without a checkpoint what `hf:` does not hold, and any
            other model, is fresh from `seed`.
        data, start, num_examples: see `leakaudit.data.load_batch`; num_examples is batch_size by default.
        text: instead of `data` for a language model, with its `task`, `lora` and `max_length`; see
            `leakaudit.text_data.load_text` and `leakaudit.models.pretrained.load_language_victim`.
        out, truth, save_model: files to write, all .safetensors.
        batch_size, local_steps or epochs, learning_rate: the round; several steps need a learning rate.
            Some defenses change it: more examples, more steps, more clients.
        normalisation: see `parse_normalisation`.
        defenses: specs of `leakaudit.defenses.naming.parse_defense`, in order; several in one with "+" between.

    Returns what was written and assumed, in sentences.  Raises `InputError` for anything that does not fit.
    """
    if mode not in ("train", "eval"):
        raise InputError(f"mode {mode!r}{suggest(mode, ('train', 'eval'))}; accepted: train, eval")
    source = private_source(model, data, text, max_length)
    _check_targets(out, truth, save_model)
    parts = parse_all(defenses)
    asked = round_of(batch_size, num_examples, local_steps, epochs, learning_rate)
    round = defended(asked, parts)
    victim = load_victim(
        model,
        checkpoint=checkpoint,
        num_classes=num_classes,
        input_shape=input_shape,
        normalisation=parse_normalisation(normalisation),
        mode=mode,
        reduction=reduction,
        seed=seed,
        task=task,
        lora=lora,
    )
    batch = medium_of(victim).load(
        source, victim, round.num_examples, start=start, max_length=max_length, seed=seed
    )
    captured = capture(victim, batch, round, defenses=parts, include_buffers=buffers, seed=seed)
    changed = [] if round == asked else [f"Round: the defenses make it {_in_words(round)}"]
    return [*changed, *_write(captured, victim, batch, Path(out), truth, save_model)]


def _check_targets(*paths: str | Path | None) -> None:
    """Fail before anything is written: another suffix, one file for two things, a folder that is read-only."""
    files = [Path(path) for path in paths if path is not None]
    for position, path in enumerate(files):
        if path.suffix.lower() != ".safetensors":
            raise InputError(f"captures are saved as .safetensors, got {path.name!r}")
        if path.resolve() in [other.resolve() for other in files[:position]]:
            raise InputError(f"{path} was given for two different things; accepted: a file for each")
        if not path.parent.is_dir():
            raise InputError(f"cannot write {path}: there is no folder {path.parent}")
        writable_folder(path.parent)


def _write(
    captured: Captured,
    victim: Victim,
    batch: PrivateBatch | PrivateText,
    out: Path,
    truth: str | Path | None,
    save_model: str | Path | None,
) -> list[str]:
    lines = list(batch.notes)
    write_captured(out, captured)
    manifest = captured.manifest
    lines.append(
        f"Update: {out} ({manifest.kind} of {counted(manifest.num_examples or 0, 'example')}, "
        f"{counted(manifest.local_steps or 0, 'local step')}, "
        f"{manifest.mode} mode, {captured.update.numel():,} numbers)"
    )
    if save_model is not None:
        save_checkpoint(victim.module, save_model)
        lines.append(f"Model: {save_model}")
    lines += medium_of(victim).advice(victim, saved=save_model is not None)
    if truth is not None:
        medium_of(victim).save_truth(truth, batch)
        lines.append(f"Truth: {truth} (keep it to yourself)")
    return lines


def _in_words(round: Round) -> str:
    text = f"{counted(round.num_examples, 'example')}, {counted(round.local_steps, 'local step')}"
    if round.clients > 1:
        text += f", {round.clients} clients of {counted(round.own_examples, 'example')} each"
    return text if round.local_steps == 1 else f"{text}, learning rate {round.learning_rate:g}"


def _stated(manifest: Manifest | None, task: str | None, lora: str | None) -> Manifest | None:
    """The manifest with the task and the adapters of a language model, where they are given."""
    if task is None and lora is None:
        return manifest
    stated = build_manifest({"task": task, "lora": lora})
    return stated if manifest is None else manifest.merged(stated)


def _check_names(policy: str | None, metrics: Sequence[str] | None) -> None:
    """Find a typing error before everything is read; whether the names fit the medium shows later."""
    if policy is not None:
        parse_policy(policy)
    known = [*METRICS, *MEDIUM_METRICS["text"]]
    for name in metrics or ():
        if name not in known:
            raise InputError(f"unknown metric {name!r}{suggest(name, known)}; known: {', '.join(known)}")


def _positive(value: float | None, what: str) -> float | None:
    if value is not None and not value > 0:
        raise InputError(f"{what} {value:g} is not positive")
    return value


def _run_folder(out: str | Path | None, files: dict[str, str], force: bool) -> Path:
    """The folder to write to; `InputError` when it holds the run of another update."""
    folder = Path(tempfile.mkdtemp(prefix="leakaudit-")) if out is None else writable_folder(out)
    if (folder / RESULT_NAME).exists() and not force:
        before = read_run(folder).files.values()
        if not set(files.values()) <= set(before):
            raise InputError(
                f"{folder} holds the run of another update; accepted: --force, or another folder"
            )
    return folder


def _keep(files: Sequence[Path], folder: Path, force: bool) -> None:
    """Copy the files into the folder; `InputError`, and no copy, where one of them would replace another."""
    for path in files:
        target = folder / path.name
        if target.exists() and not force and sha256_of(target) != sha256_of(path):
            raise InputError(f"{target} holds something else; accepted: --force, or another folder")
    for path in files:
        write_atomically(folder / path.name, path.read_bytes())
