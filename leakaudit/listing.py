"""Tables of what there is, for `leakaudit list`; each imports what it lists, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from leakaudit.spec import described


def tables() -> dict[str, Callable[[Console], None]]:
    """What can be listed -> a function that prints it."""
    return {
        "attacks": _attacks,
        "defenses": _defenses,
        "protocols": _protocols,
        "systems": _systems,
        "inferences": _inferences,
        "models": _models,
        "metrics": _metrics,
    }


def _print(console: Console, heading: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    table = Table(*heading, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def _notes(console: Console, lines: Iterable[str]) -> None:
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def _options(preset: object) -> str:
    fields = dataclasses.fields(preset)  # type: ignore[arg-type]
    return " ".join(f"{field.name}={getattr(preset, field.name)}" for field in fields if field.init)


def _attacks(console: Console) -> None:
    from leakaudit.attacks.registry import ATTACKS, describe_attack, medium_of_attack

    attacks, broken = ATTACKS.usable()
    rows = (
        (name, medium_of_attack(name), f"{describe_attack(name)}\n{_options(attack)}")
        for name, attack in attacks.items()
    )
    _print(console, ("attack", "of", "what it does, and its options"), rows)
    _notes(console, broken)


def _inferences(console: Console) -> None:
    from leakaudit.inference import DESCRIPTIONS, INFERENCES

    rows = ((name, f"{DESCRIPTIONS[name]}\n{_options(inference)}") for name, inference in INFERENCES.items())
    _print(console, ("inference", "what it does, and its options"), rows)


def _defenses(console: Console) -> None:
    from leakaudit.defenses import DEFENSES

    defenses, broken = DEFENSES.usable()
    rows = ((name, f"{described(defense)}\n{_options(defense)}") for name, defense in defenses.items())
    _print(console, ("defense", "what it does, and its options"), rows)
    _notes(console, broken)


def _protocols(console: Console) -> None:
    from leakaudit.sweep.protocols import PROTOCOLS

    rows = ((name, f"{described(protocol)}\n{_options(protocol)}") for name, protocol in PROTOCOLS.items())
    _print(console, ("protocol", "what it does, and its options"), rows)


def _systems(console: Console) -> None:
    from leakaudit.federated.options import SYSTEMS

    rows = ((name, f"{described(system)}\n{_options(system)}") for name, system in SYSTEMS.items())
    _print(console, ("system", "what it is, and its options"), rows)


def _models(console: Console) -> None:
    from leakaudit.models.zoo import LANGUAGE, MODEL_PLUGINS, MODELS

    rows = [
        (
            name,
            "x".join(map(str, entry.info.input_shape)),
            str(entry.info.num_classes),
            entry.info.description,
        )
        for name, entry in MODELS.items()
    ]
    plugins, broken = MODEL_PLUGINS.usable()
    rows += [
        (
            name,
            "x".join(map(str, source.info.input_shape)),
            str(source.info.num_classes or "any"),
            source.info.description,
        )
        for name, source in plugins.items()
    ]
    language = "a language model of transformers with its tokenizer, by --task, from the hub or a folder"
    rows.append((f"{LANGUAGE}NAME_OR_FOLDER", "text", "any", language))
    _print(console, ("model", "input", "classes", "what it is"), rows)
    _notes(console, broken)


def _metrics(console: Console) -> None:
    from leakaudit.metrics import METRICS
    from leakaudit.text_metrics import TEXT_METRICS

    rows = [
        (
            name,
            "images",
            metric.unit or "-",
            "higher" if metric.higher_is_better else "lower",
            metric.description,
        )
        for name, metric in METRICS.items()
    ]
    rows += [(name, "text", "-", "higher", metric.description) for name, metric in TEXT_METRICS.items()]
    _print(console, ("metric", "of", "unit", "closer is", "what it measures"), rows)
