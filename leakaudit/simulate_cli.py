"""`leakaudit simulate`: a command for every system, made of its options and of a scenario's.

Every field of the dataclasses becomes an option, with the line of help in its metadata, so a new entry of `SYSTEMS`
is a new command.  Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import dataclasses
import inspect
import shlex
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
from rich.console import Console

from leakaudit.errors import InputError
from leakaudit.federated.options import SYSTEMS, SystemOptions
from leakaudit.progress import simulation_bar
from leakaudit.scenario import Scenario
from leakaudit.spec import described
from leakaudit.units import bandwidth_text, parse_bandwidth, parse_seconds, parse_shape, seconds_text

T = TypeVar("T")

simulate_app = typer.Typer(
    name="simulate",
    help="Train with a whole system on a virtual clock, and record what each party sees.",
    epilog="Times: 480ms, 6s, 2min, or seconds.  Bandwidths: 100Mbps, 12.5MB/s, or bytes a second.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_READERS: dict[str, Callable[[str, str], Any]] = {
    "seconds": parse_seconds,
    "bandwidth": parse_bandwidth,
    "shape": lambda text, what: parse_shape(text),
}
_WRITERS: dict[str, Callable[[Any], str]] = {
    "seconds": seconds_text,
    "bandwidth": bandwidth_text,
    "shape": str,
}

_FORCE = typer.Option("--force", help="Start anew where another run is.")


# ------------------------------------------------------------------ from dataclasses to options and back


def parameters_of(kind: type, preset: object | None, taken: Mapping[str, str]) -> list[inspect.Parameter]:
    """What Typer reads: a keyword for every field that can be given.

    Args:
        preset: has the defaults; None for those of the class.
        taken: field -> name of its keyword, where the field's own name is another option's.
    """
    hints = typing.get_type_hints(kind)
    return [
        _parameter(field, hints[field.name], _default(field, preset), taken.get(field.name, field.name))
        for field in dataclasses.fields(kind)
        if field.init
    ]


def _default(field: dataclasses.Field[Any], preset: object | None) -> Any:
    value = field.default if preset is None else getattr(preset, field.name)
    return inspect.Parameter.empty if value is dataclasses.MISSING else value


def _parameter(field: dataclasses.Field[Any], hint: Any, default: Any, name: str) -> inspect.Parameter:
    quantity = field.metadata.get("quantity")
    kind, choices = _kind(hint)
    if quantity is not None:
        kind = str
        default = _WRITERS[quantity](default) if isinstance(default, (int, float)) else default
    option = typer.Option(
        *_flags(field, name, kind),
        help=field.metadata.get("help"),
        metavar="|".join(choices) or None,
    )
    several = typing.get_origin(kind) is list
    annotation = Annotated[kind | None if default is None or several else kind, option]  # type: ignore[valid-type]
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=list(default) if several else default,
        annotation=annotation,
    )


def _kind(hint: Any) -> tuple[Any, tuple[str, ...]]:
    """The type of one value as Typer takes it, and the choices of a `Literal`, which its dataclass checks."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = [choice for choice in typing.get_args(hint) if choice is not type(None)]
    if typing.get_origin(hint) is Literal:
        return str, typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return list[typing.get_args(hint)[0]], ()  # type: ignore[misc]
    return hint, ()


def _flags(field: dataclasses.Field[Any], name: str, kind: Any) -> tuple[str, ...]:
    given: tuple[str, ...] = field.metadata.get("flags", ())
    if given:
        return given
    flag = name.replace("_", "-")
    return (f"--{flag}/--no-{flag}",) if kind is bool else (f"--{flag}",)


def read(kind: type[T], given: Mapping[str, Any], taken: Mapping[str, str]) -> T:
    """The dataclass of the options given, units and all; `InputError` for what it does not accept."""
    values = {}
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        value = given[taken.get(field.name, field.name)] if field.init else None
        quantity = field.metadata.get("quantity")
        if quantity is not None and isinstance(value, str):
            value = _READERS[quantity](value, _called(field))
        elif typing.get_origin(_kind(hints[field.name])[0]) is list:
            value = tuple(value or ())
        if field.init:
            values[field.name] = value
    try:
        return kind(**values)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from error


def _called(field: dataclasses.Field[Any]) -> str:
    flags = field.metadata.get("flags", ())
    return flags[0].removeprefix("--").replace("-", " ") if flags else field.name.replace("_", " ")


def _taken(system: str, kind: type) -> dict[str, str]:
    """Fields of a system that a scenario has too get the system's name before theirs: --fedavg-steps."""
    common = {field.name for field in dataclasses.fields(Scenario)}
    prefix = system.replace("-", "_")
    return {f.name: f"{prefix}_{f.name}" for f in dataclasses.fields(kind) if f.name in common}


# ------------------------------------------------------------------ the commands


def _signed(command: Callable[..., None], *parameters: inspect.Parameter) -> Callable[..., None]:
    """The command with the options that it has, besides those it is written with; what must be given first."""
    own = [
        p
        for p in inspect.signature(command, eval_str=True).parameters.values()
        if p.kind is not p.VAR_KEYWORD
    ]
    listed = [*parameters, *(p.replace(kind=p.KEYWORD_ONLY) for p in own)]
    command.__signature__ = inspect.Signature(listed)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in listed}
    return command


def _system_command(name: str, preset: SystemOptions) -> Callable[..., None]:
    kind = type(preset)
    taken = _taken(name, kind)

    def run(
        out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs") / name,
        force: Annotated[bool, _FORCE] = False,
        **given: Any,
    ) -> None:
        scenario, options = read(Scenario, given, {}), read(kind, given, taken)
        from leakaudit import api
        from leakaudit.report.simulation_terminal import print_simulation
        from leakaudit.simulating import System

        with simulation_bar(Console(stderr=True)) as begin:
            result = api.simulate(
                System(name, options), scenario, out=out, force=force, on_step=begin(name), command=_command()
            )
        print_simulation(result, Console(), out)
        if result.interrupted:
            raise typer.Exit(130)

    return _signed(run, *parameters_of(kind, preset, taken), *parameters_of(Scenario, None, {}))


def _compare(
    system: Annotated[
        list[str] | None, typer.Option(help="NAME:key=value, such as fedbuff:buffer=10; may be repeated.")
    ] = None,
    systems: Annotated[
        str | None, typer.Option(help="Several at once: sync,timeout:cutoff=20,fedbuff.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of every system, from --seed on.", min=1)] = 1,
    out: Annotated[Path, typer.Option(help="Folder, with one below for every run.")] = Path("runs/compare"),
    force: Annotated[bool, _FORCE] = False,
    **given: Any,
) -> None:
    """Run several systems on the same model, data, clients and seeds, and put them side by side."""
    scenario = read(Scenario, given, {})
    from leakaudit import api
    from leakaudit.report.simulation_terminal import print_comparison

    with simulation_bar(Console(stderr=True)) as begin:
        found = api.compare(
            [*(system or ()), *split_systems(systems or "")],
            scenario,
            seeds=seeds,
            out=out,
            force=force,
            on_run=begin,
            command=_command(),
        )
    print_comparison(found, Console(), out)


def split_systems(text: str) -> list[str]:
    """`sync,timeout:cutoff=20,every=5;fedbuff` -> three specs: key=value belongs to the system before it."""
    specs: list[str] = []
    for block in text.split(";"):
        begun = False
        for part in filter(None, (part.strip() for part in block.split(","))):
            if begun and "=" in part.partition(":")[0]:
                specs[-1] += f",{part}"
            else:
                specs.append(part)
            begun = True
    return specs


def _command() -> str:
    return shlex.join(["leakaudit", *sys.argv[1:]])


def _register(systems: Mapping[str, SystemOptions], scenario: Sequence[inspect.Parameter]) -> None:
    for name, preset in systems.items():
        simulate_app.command(name, help=described(preset))(_system_command(name, preset))
    simulate_app.command("compare")(_signed(_compare, *scenario))


_register(SYSTEMS, parameters_of(Scenario, None, {}))
