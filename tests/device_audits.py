"""Attacks, defenses and whole commands, on the CPU and on the pretended accelerator of `simulated_device`.

Run as a script, in a process of its own, it prints a line of JSON for each case: its name and seconds, and what went
wrong: an exception on the device, or numbers that differ from the CPU's.  `tests/test_devices.py` starts it.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ["LEAKAUDIT_COMPILE"] = "never"

sys.path.append(str(Path(__file__).parent / "sweep"))

import numpy as np
import pytest
import simulated_device
import text_rounds
import tiny_audits
import torch
from scipy.optimize import linear_sum_assignment
from test_contracts import ATTACKS, DEFENSES, IMAGE_ATTACKS, MODELS, SHORT, TEXT_ATTACKS, small, suitable
from test_defense_contract import SPECS
from tiny_sweeps import values
from tiny_text import BERT, TEXTS
from torch import Tensor, nn

import leakaudit
from leakaudit import verification
from leakaudit.attacks import graphs, krylov, racing
from leakaudit.attacks.base import Attack, Monitor
from leakaudit.attacks.compiling import Compiler
from leakaudit.attacks.graphs import Compiled, Recorded
from leakaudit.attacks.optimise import Matching
from leakaudit.attacks.single_backward import central_difference, forward_over_reverse
from leakaudit.bundled import sentences
from leakaudit.capture import capture
from leakaudit.data import PrivateBatch, photo_folder
from leakaudit.defenses import apply, dp_sgd
from leakaudit.defenses.naming import adapted, parse_defense
from leakaudit.federated.leakage import audit_runs
from leakaudit.federated.options import SYSTEMS
from leakaudit.inference import INFERENCES
from leakaudit.inference.running import infer
from leakaudit.models.victim import Victim
from leakaudit.randomness import fork
from leakaudit.rounds import Round, client_update
from leakaudit.scenario import Scenario
from leakaudit.spec import parse
from leakaudit.subject import Sources, look
from leakaudit.sweep.config import build_config
from leakaudit.threat import View, known

Case = Callable[[torch.device], Any]
"""What it finds on a device, as plain values and tensors."""

# ------------------------------------------------------------------ attacks


def short(spec: str, iterations: int = 4) -> Attack:
    """The attack with few iterations, and one of what is itself an optimisation."""
    attack = parse(spec, ATTACKS)
    options = {field.name for field in fields(attack) if field.init}  # type: ignore[arg-type]
    changes = {
        **SHORT,
        "iterations": iterations,
        "tuning": 2,
        "warm_start": 2,
        "starts": 2,
        "every": 1,
        "stages": 2,
    }
    given = {part.partition("=")[0] for part in spec.partition(":")[2].split(",")}
    return replace(
        attack,
        **{name: value for name, value in changes.items() if name in options - given},  # type: ignore[type-var]
    )


def attacked(spec: str, view: View, iterations: int = 4) -> dict[str, Any]:
    """What a short run of it finds, every tensor of it checked to be where callers expect it."""
    device = view.victim.device
    attack = short(spec, iterations)
    reason = attack.applies(view)
    assert reason is None, reason
    found = attack.run(view, fork(0, "test", device), Monitor())
    assert found.x.device == found.y.device == device
    assert {frame.device.type for _, _, frame in found.strip} == {"cpu"}
    return {
        "x": found.x,
        "y": found.y,
        "loss": found.loss,
        "details": found.details,
        "strip": [frame for _, _, frame in found.strip],
        "residual": view.residual(found.x, found.y),
        "decoded": view.decode(found.x, found.y),
    }


def told(view: View, labels: Tensor) -> View:
    return replace(view, knowledge=replace(view.knowledge, labels=known(labels.to(view.victim.device), "t")))


def on_contract(name: str, labels: str, iterations: int) -> Case:
    def case(device: torch.device) -> Any:
        view = suitable(name).to(device)
        if labels == "known":
            victim: Any = view.victim
            y = tiny_batch(victim) if name in TEXT_ATTACKS else tiny_audits.private_batch()[1]
            view = told(view, y)
        return attacked(name, view, iterations)

    return case


def tiny_batch(victim: Any) -> Tensor:
    x = text_rounds.tokens_of(victim, 0)
    return torch.ones(len(x), dtype=torch.int64)


def on_images(
    spec: str,
    model: str = "smooth",
    mode: str = "eval",
    round: Round | None = None,
    noise: float = 0.0,
    **facts: Any,
) -> Case:
    def case(device: torch.device) -> Any:
        victim = OWN[model]() if model in OWN else tiny_audits.victim_of(model, mode)  # type: ignore[arg-type]
        view = tiny_audits.view_of(victim, round, **facts)
        if noise:
            torch.manual_seed(0)
            noisy = view.observed.map(lambda tensor: tensor + noise * torch.randn_like(tensor))
            view = replace(view, observed=noisy, spread=dict.fromkeys(noisy, noise))
        return attacked(spec, view.to(device))

    return case


def on_text(spec: str, model: str, task: str, *numbers: int, noise: float = 0.0) -> Case:
    def case(device: torch.device) -> Any:
        victim = text_rounds.tiny_victim(model, task)  # type: ignore[arg-type]
        x = text_rounds.tokens_of(victim, *numbers)
        y = text_rounds.labels_of(victim, x)
        view = text_rounds.view_of(victim, text_rounds.masked(victim, x, y), y, noise=noise)
        return attacked(spec, view.to(device), iterations=1)

    return case


def recorded(spec: str, model: str = "smooth", mode: str = "eval") -> Case:
    """With its step recorded as a graph, as for a compiler, but run as recorded."""

    def interpreted(graph: Recorded, arguments: Sequence[Tensor]) -> Compiled:
        return Compiled(graph.graph, 0.0)

    def case(device: torch.device) -> Any:
        view = tiny_audits.view_of(tiny_audits.victim_of(model, mode)).to(device)  # type: ignore[arg-type]
        compiler = Compiler("always")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(graphs, "compile_graph", interpreted)
            found = short(spec, 3).run(view, fork(0, "test", device), Monitor(compiler=compiler))
        assert compiler.step == "compiled", compiler.step
        return {"x": found.x, "y": found.y, "loss": found.loss}

    return case


def ended(case: Case) -> Case:
    """Whatever it finds: a long way over kinks ends elsewhere after another rounding."""
    return lambda device: case(device) and None


def pooled() -> Victim:
    """Convolutions behind ReLUs, and a maximum of them."""
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 24, 3, padding=1),
        nn.ReLU(),
    )
    return Victim.of(nn.Sequential(*layers, nn.Flatten(), nn.Linear(384, 5)), tiny_audits.SPACE, 5)


def leaky() -> Victim:
    """Whose layers can be undone one by one."""
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 16, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(16, 16, 3, 2, padding=1),
        nn.LeakyReLU(0.2),
    )
    return Victim.of(nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 5)), tiny_audits.SPACE, 5)


OWN = {"pooled": pooled, "leaky": leaky}


def without_double_backward(way: Callable[..., Any]) -> Case:
    """The gradient of the distance by one of the ways that do without."""

    def case(device: torch.device) -> Any:
        view = tiny_audits.view_of(tiny_audits.victim_of("smooth"), Round(2)).to(device)
        x = view.victim.space.sample(2, fork(0, "x", device))
        return way(Matching(view, "cosine"), False)(x, torch.tensor([1, 2], device=device))

    return case


def updated(name: str) -> Case:
    """A model's update, and its length differentiated."""

    def case(device: torch.device) -> Any:
        victim = small(name).to(device)
        x = victim.probe(2).requires_grad_()
        update = client_update(victim, victim.params, Round(2), x, torch.tensor([0, 1], device=device))
        return {**update.detach()}, torch.autograd.grad(update.norm(), x)[0]

    return case


LONG = ("dlg-text", "lamp")
"""Attacks on text of which one iteration takes seconds; they share their module with `tag`."""


def attack_cases() -> Iterator[tuple[str, Case]]:
    """Every attack but the long ones, and what only some settings reach."""
    for name in IMAGE_ATTACKS:
        yield f"attack {name}", on_contract(name, "inferred", 2)
    for name in TEXT_ATTACKS:
        if name not in LONG:
            yield f"attack {name}", on_contract(name, "inferred", 1)
    two = Round(2)
    yield "attack linear, two images", on_images("linear", "mlp", round=two)
    yield (
        "attack inverting-gradients, batch statistics",
        on_images("inverting-gradients", "norm", "train", two),
    )
    yield (
        "attack inverting-gradients, without a scale",
        on_images("inverting-gradients", scale=known(False, "test")),
    )
    yield "attack recursive, leaky", on_images("recursive", "leaky")
    yield "attack levenberg-marquardt, too few equations", on_images("levenberg-marquardt", "narrow")
    yield "gradient forward over reverse", without_double_backward(forward_over_reverse)
    yield "gradient by differences", without_double_backward(central_difference)
    yield "attack inverting-gradients, raced starts", on_images("inverting-gradients:starts=4")
    yield "attack inverting-gradients, recorded", recorded("inverting-gradients")
    for model, task in (("bert", "mlm"), ("gpt2", "causal-lm")):
        for name in ("bag-of-tokens", "span-check"):
            yield f"attack {name}, {model} {task}", on_text(name, model, task, 0)
    for name in ("bag-of-tokens", "span-check"):
        yield f"attack {name}, two sentences", on_text(name, "bert", "classification", 0, 1)
    yield "attack span-check, three sentences", on_text("span-check", "bert", "classification", 0, 1, 2)
    for name in ("position-rows", "span-check"):
        yield f"attack {name}, noise", on_text(name, "bert", "classification", 0, noise=1e-3)


def thorough_attack_cases() -> Iterator[tuple[str, Case]]:
    two, steps = Round(2), Round(2, 3, learning_rate=0.1)
    for name in LONG:
        yield f"attack {name}", on_contract(name, "inferred", 1)
    yield "attack recursive, maxima", ended(on_images("recursive", "pooled"))
    yield "attack tv-path, noise", on_images("tv-path:iterations=3", noise=1e-3)
    yield "attack idlg, noise", on_images("idlg", noise=1e-2)
    for name in (*IMAGE_ATTACKS, *TEXT_ATTACKS):
        yield f"attack {name}, labels known", on_contract(name, "known", 4 if name in IMAGE_ATTACKS else 1)
    for name in ("recursive", "levenberg-marquardt", "tv-path", "idlg", "dlg", "inverting-gradients"):
        yield f"attack {name}, two images", on_images(name, round=two)
    for name in ("levenberg-marquardt", "idlg", "inverting-gradients", "tuned-inverting-gradients"):
        yield f"attack {name}, local steps", on_images(name, round=steps)
    for name in ("levenberg-marquardt", "idlg", "inverting-gradients:starts=4"):
        yield f"attack {name}, batch statistics", on_images(name, "norm", "train", two)
    for name in ("idlg", "dlg", "tuned-inverting-gradients", "inverting-gradients:starts=4"):
        yield f"attack {name}, recorded", recorded(name)
    for model, task in (("bert", "mlm"), ("gpt2", "causal-lm"), ("gpt2", "classification")):
        for name in ("lamp", "tag"):
            yield f"attack {name}, {model} {task}", on_text(name, model, task, 0)
    for name in ("bag-of-tokens", "span-check"):
        yield f"attack {name}, two sentences of gpt2", on_text(name, "gpt2", "causal-lm", 0, 1)


# ------------------------------------------------------------------ defenses


def defended(spec: str) -> Case:
    """A client on the device, and an adversary who knows the defense."""

    def case(device: torch.device) -> Any:
        chain = [defense for _, defense in parse_defense(spec)]
        victim, round = tiny_audits.victim_of("smooth").to(device), Round(2)
        trained = victim
        for defense in chain:
            trained, round = defense.victim(trained), defense.round(round)
        x, y = (tensor.to(device) for tensor in tiny_audits.private_batch(round.num_examples))
        observed = apply(client_update, chain, fork(0, "defense"))(trained, trained.params, round, x, y)
        assert all(tensor.device == device for tensor in observed.values())
        oblivious = replace(tiny_audits.view_of(tiny_audits.victim_of("smooth"), round), victim=victim)
        view = adapted(replace(oblivious, observed=observed.detach()), parse_defense(spec))
        x.requires_grad_()
        soft = torch.softmax(torch.ones(round.num_examples, 5, device=device), 1)
        simulated = view.simulate(x, y if view.soft is None else soft)
        gradient = torch.autograd.grad(simulated.norm(), x)[0]
        found = attacked("inverting-gradients:iterations=2", view)
        return {**observed}, {**simulated.detach()}, gradient, found

    return case


# ------------------------------------------------------------------ whole commands


@contextmanager
def working_folder() -> Iterator[Path]:
    """A new folder with the models of `tiny_audits`, and inside it: results name the files they are made of."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        Path("models.py").write_text(tiny_audits.FACTORIES)
        Path("words.txt").write_text("\n".join(TEXTS))
        try:
            yield Path()
        finally:
            os.chdir(before)


def files(folder: Path, text: bool) -> dict[str, Any]:
    """One update of two examples on disk, and what `attack` and `look` need besides."""
    update, truth, model = (folder / f"{name}.safetensors" for name in ("update", "truth", "model"))
    spec = BERT if text else "models.py:smooth"
    shape = {} if text else {"input_shape": tiny_audits.SHAPE, "num_classes": 5, "normalisation": "cifar10"}
    source = {"text": folder / "words.txt", "task": "mlm"} if text else {}
    leakaudit.capture_update(
        spec, None if text else photo_folder(), update, truth=truth, save_model=model, **source, **shape
    )  # fmt: skip
    return {"update": update, "model": spec, "checkpoint": model, "truth": truth}


def pictures(path: Path, count: int) -> None:
    """Smooth pictures of four classes in a file."""
    x, _ = tiny_audits.private_batch(count)
    pixels = (255 * tiny_audits.SPACE.decode(x).clamp(0, 1)).byte().permute(0, 2, 3, 1).numpy()
    np.savez(path, x=pixels, y=np.arange(count) % 4)


def audited(text: bool, attacks: Sequence[str], **options: Any) -> Case:
    """From the file to the report: scores, LPIPS, controls, pictures."""

    def case(device: torch.device) -> Any:
        with working_folder() as folder:
            given = files(folder, text)
            update, model = given.pop("update"), given.pop("model")
            result = leakaudit.attack(
                update, model, attacks=attacks, device=str(device), out=folder / "out", **given, **options
            )
            assert not [trial for trial in result.trials if trial.status == "failed"], result.trials
            assert (folder / "out" / "report.html").stat().st_size
            return plain(result)

    return case


def overheard(*attacks: str) -> Case:
    """A client that uploads its BatchNorm's averages too."""

    def case(device: torch.device) -> Any:
        with working_folder():
            leakaudit.capture_update(
                "models.py:norm", photo_folder(), "update.safetensors", save_model="model.safetensors", mode="train",
                buffers=True, batch_size=2, input_shape=tiny_audits.SHAPE, num_classes=5, normalisation="cifar10",
            )  # fmt: skip
            result = leakaudit.attack(
                "update.safetensors", "models.py:norm", checkpoint="model.safetensors", attacks=attacks,
                device=str(device), out="out", controls=False,
            )  # fmt: skip
            assert not [trial for trial in result.trials if trial.status == "failed"], result.trials
            return plain(result)

    return case


def looked(text: bool) -> Case:
    def case(device: torch.device) -> Any:
        with working_folder() as folder:
            given = files(folder, text)
            sources = Sources(given["update"], given["model"], given["checkpoint"], device=str(device))
            return [finding.model_dump() for finding in look(sources, 0)]

    return case


def captured(spec: str, mode: str) -> Case:
    """A victim on the device and a batch as it is read from a file."""

    def case(device: torch.device) -> Any:
        x, y = tiny_audits.private_batch(2)
        batch = PrivateBatch(tiny_audits.SPACE.decode(x), y, ("a", "b"))
        victim = tiny_audits.victim_of("norm", mode).to(device)  # type: ignore[arg-type]
        found = capture(victim, batch, Round(2), defenses=parse_defense(spec), include_buffers=True)
        return {**found.update}, found.buffers

    return case


def swept(**changes: Any) -> Case:
    def case(device: torch.device) -> Any:
        with working_folder() as folder:
            pictures(folder / "data.npz", 24)
            data = None if "text" in changes else "data.npz"
            config = build_config({**values(folder, data=data, **changes), "device": str(device)})
            return plain(leakaudit.defend(config))

    return case


def simulated(system: str, *defenses: str, model: str = "mlp") -> Case:
    """A training of three steps, the views it records, and the closed form against them."""

    def case(device: torch.device) -> Any:
        batch = ":batch_size=2" if hasattr(SYSTEMS[system], "batch_size") else ""
        with working_folder() as folder:
            pictures(folder / "data.npz", 40)
            scenario = Scenario(
                model=f"models.py:{model}",
                data="data.npz",
                input_shape=tiny_audits.SHAPE,
                num_classes=5,
                clients=8,
                steps=6 if system == "dts" else 3,
                every=1,
                defense=defenses,
                record="all",
                device=str(device),
            )
            training = leakaudit.simulate(system + batch, scenario, out=folder / "run")
            audit = audit_runs(
                [folder / "run"],
                attacks=("linear",),
                device=str(device),
                model=f"models.py:{model}",
                out=folder / "leakage",
            )
            assert not [row.error for row in audit.rows if row.error]
            return plain(training), plain(audit)

    return case


def inferred(text: bool, trials: int = 1) -> Case:
    def case(device: torch.device) -> Any:
        with working_folder() as folder:
            pictures(folder / "data.npz", 16)
            (folder / "words.txt").write_text("\n".join(sentences()))
            own = {"data": folder / "data.npz", "input_shape": tiny_audits.SHAPE, "num_classes": 5}
            spec = BERT if text else "models.py:smooth"
            result = infer(
                spec,
                **({"text": folder / "words.txt", "task": "mlm"} if text else own),
                batch_size=2,
                defenses=("gaussian-noise:std=1e-4",),
                attacks=[f"{name}:updates=4" if name == "property" else name for name in INFERENCES],
                trait="long" if text else "bright",
                candidates=8,
                reference=8,
                trials=trials,
                device=str(device),
            )
            return plain(result)

    return case


# ------------------------------------------------------------------ running them


VOLATILE = ("created", "seconds", "command", "environment", "files", "config", "device", "folder")


def plain(value: Any) -> Any:
    """JSON values without what two runs may differ in."""
    value = value.model_dump(mode="json") if hasattr(value, "model_dump") else value
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key not in VOLATILE}
    return [plain(item) for item in value] if isinstance(value, list) else value


def differences(a: Any, b: Any, where: str = "") -> Iterator[str]:
    """Where two findings differ: the arithmetic is the same, the order of a sum may not be."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        try:
            torch.testing.assert_close(b.cpu(), a.cpu(), rtol=1e-3, atol=1e-4)
        except AssertionError as error:
            yield f"{where}: {error}"
    elif isinstance(a, dict) and isinstance(b, dict) and [*a] == [*b]:
        for key in a:
            yield from differences(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for i, pair in enumerate(zip(a, b, strict=True)):
            yield from differences(*pair, f"{where}[{i}]")
    elif isinstance(a, float) and isinstance(b, float):
        if not math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-4) and not (math.isnan(a) and math.isnan(b)):
            yield f"{where}: {a} on the CPU, {b} on the device"
    elif a != b:
        yield f"{where}: {a} on the CPU, {b} on the device"


def quick() -> dict[str, Case]:
    """Nearly every attack and command, and every defense, once, in half a minute."""
    found = dict(attack_cases())
    found |= {f"defense {name}": defended(name) for name in DEFENSES}
    found["audit images"] = audited(False, ["linear", "inverting-gradients:iterations=3"])
    found["audit text"] = audited(True, ["bag-of-tokens"])
    found["audit batch statistics"] = overheard("inverting-gradients:iterations=3")
    found["inspect images"] = looked(False)
    found["inspect text"] = looked(True)
    found["capture"] = captured("gaussian-noise:std=1e-3", "train")
    found["sweep images"] = swept(
        images=1, defenses=["quantise"], utility={"steps": 2, "seeds": 1, "batch_size": 2}
    )
    found["infer images"] = inferred(False)
    return found


def thorough() -> dict[str, Case]:
    """What takes minutes more."""
    found = dict(thorough_attack_cases())
    found |= {f"defense {spec}": defended(spec) for spec in SPECS if spec not in DEFENSES}
    found["audit text, two attacks"] = audited(True, ["bag-of-tokens", "span-check"])
    found["sweep protocols"] = swept(
        defenses=["clip-examples:max_grad_norm=0.1", "top-k"],
        protocols=["fedsgd", "fedavg", "cohort"],
        utility={"steps": 4, "batch_size": 4, "seeds": 1},
        bounds={},
    )
    found["sweep text"] = swept(
        model=BERT, text="words.txt", task="mlm", images=1, input_shape=None, num_classes=None,
        metrics=None, fail_on=None, attacks=["bag-of-tokens"], defenses=["top-k"],
        utility={"steps": 2, "batch_size": 1, "seeds": 1, "holdout": 0.5}, bounds={},
    )  # fmt: skip
    found["sweep privacy"] = swept(
        images=1, defenses=["dp-sgd", "clip+gaussian-noise:std=0.1", "mixup", "soteria", "input-noise"],
        protocols=["fedsgd:batch_size=2"], bounds={}, utility={"steps": 2, "batch_size": 4, "seeds": 1},
    )  # fmt: skip
    found |= {f"model {name}": updated(name) for name in MODELS}
    found |= {f"simulate {system}": simulated(system) for system in SYSTEMS}
    found["simulate with clipped examples"] = simulated("fedavg", "clip-examples:max_grad_norm=0.1")
    found["simulate batch statistics"] = simulated("sync", model="norm")
    found["infer text"] = inferred(True, trials=2)
    return found


def outcome(case: Case, device: torch.device) -> str:
    """What is wrong on the device; empty where nothing is."""
    try:
        expected, found = case(torch.device("cpu")), case(device)
    except Exception:
        return traceback.format_exc()
    return "\n".join(differences(expected, found))


def choose_as_on_a_gpu() -> None:
    """Let the CPU's runs take the choices of a GPU's: what is faster there, and noise from a generator of its own."""
    for costs in (krylov.UNKNOWNS_A_SOLVE, verification.FLOPS, racing.MEMORY, racing.LEAST):
        costs.pop("cpu")

    def its_own(device: torch.device, generator: torch.Generator) -> torch.Generator:
        return torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=generator)))

    dp_sgd._on = its_own


def refusals(device: torch.device) -> dict[str, Callable[[], Any]]:
    """What CUDA refuses, so that the device must too: else it would find nothing."""
    there, here = torch.rand(3, 4, device=device), torch.rand(3, 4)
    rows = torch.arange(2, device=device)
    return {
        "two devices": lambda: there + here,
        "a range without a device": lambda: there.index_select(0, torch.arange(2)),
        "labels on the CPU": lambda: torch.nn.functional.cross_entropy(there, torch.arange(3)),
        "a condition on the CPU": lambda: torch.where(here > 0.5, there, 0.0),
        "a list of both": lambda: torch.stack([there[0, 0], here[0, 0]]),
        "indices for the CPU": lambda: here[rows],
        "results on the CPU": lambda: torch.zeros(()).add_(there.sum()),
        "numbers of the device for the CPU": lambda: here * there.sum(),
        "numpy": lambda: there.numpy(),
        "scipy": lambda: linear_sum_assignment(there),
        "histograms": lambda: torch.histogram(there, 4),
        "matrices that lack rank": lambda: torch.linalg.lstsq(there, there),
        "a generator of the CPU": lambda: torch.randn(3, generator=torch.Generator(), device=device),
        "a generator of the device": lambda: torch.randn(3, generator=torch.Generator(device)),
        "a generator of the CPU in place": lambda: there.normal_(generator=torch.Generator()),
    }


def refused(attempt: Callable[[], Any]) -> str:
    """What is wrong: it was not refused."""
    try:
        attempt()
    except (RuntimeError, TypeError):  # the former includes NotImplementedError
        return ""
    return "the device let it pass"


def main(asked: str, *parts: str) -> None:
    """Run "quick", "thorough" or "all" cases whose name holds one of the parts, or all of them."""
    torch.set_num_threads(1)
    choose_as_on_a_gpu()
    chosen = {"quick": quick, "thorough": thorough, "all": lambda: quick() | thorough()}[asked]()
    with simulated_device.installed() as device:
        checks: dict[str, Callable[[], str]] = {
            f"refuses {name}": partial(refused, attempt) for name, attempt in refusals(device).items()
        }
        checks |= {name: partial(outcome, case, device) for name, case in chosen.items()}
        for name, check in checks.items():
            if not parts or any(part in name for part in parts):
                began = time.process_time()
                wrong = check()
                line = {"case": name, "seconds": time.process_time() - began, "wrong": wrong}
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
