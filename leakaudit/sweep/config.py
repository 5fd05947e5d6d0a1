"""`SweepConfig`: everything that says what a sweep is, from a TOML file and from options that override it.

The file's keys are the fields below; the names of the options (`protocol`, `defense`, `attack`,
`adversary`, `metric`, `examples`) are read too.  Relative paths in a file are relative to that file.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from leakaudit.errors import InputError
from leakaudit.formats.manifest import explain
from leakaudit.spec import suggest
from leakaudit.sweep_results import Adversary

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

AtLeastOne = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, lt=1)]

ALIASES = {
    "protocol": "protocols",
    "defense": "defenses",
    "attack": "attacks",
    "adversary": "adversaries",
    "metric": "metrics",
    "examples": "images",
}
FILES = ("checkpoint", "data", "text", "baseline", "out", "html", "junit", "sarif", "summary", "curves")
"""Keys that hold a path, of the sweep or of its tables."""
TABLES = ("utility", "bounds")


class Options(BaseModel):
    """Immutable, unknown keys refused, no number that is not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class UtilityOptions(Options):
    """How the accuracy of a target is found out: by training with its defense, or from a file.

    Attributes:
        on: False leaves utility out.
        steps, batch_size, learning_rate, momentum, holdout, seeds: as for `leakaudit.sweep.utility.Training`.
        examples: of the data, from its first on, to train on and hold out; None for all there are.
        curves: JSON or CSV of curves already trained, instead; see `leakaudit.sweep.curves.read_curves`.
    """

    on: bool = True
    steps: AtLeastOne = 300
    batch_size: AtLeastOne = 32
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    holdout: Share = 0.2
    seeds: AtLeastOne = 3
    examples: AtLeastOne | None = None
    curves: Path | None = None


class BoundOptions(Options):
    """What the bounds assume.

    Attributes:
        on: False leaves bounds out.
        prior: probability that the adversary's best guess without the update is right (Hayes et al. 2023).
        delta: of (epsilon, delta) differential privacy, here and beside utility.
        sample_rate: share of a client's data in each update; 1 for all.
        steps: updates the client shares.
    """

    on: bool = True
    prior: Share = 0.1
    delta: Share = 1e-5
    sample_rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    steps: AtLeastOne = 1


class SweepConfig(Options):
    """What to audit, against what, how often, and where to.

    Attributes:
        model, checkpoint, data, text, task, lora, max_length, normalisation, mode, input_shape,
            num_classes, start: as for `leakaudit.api.capture_update`; without a checkpoint a fresh model
            from `seed`.
        protocols: specs of `leakaudit.sweep.protocols.PROTOCOLS`.
        defenses: specs, with lists of strengths; "none" always runs, and counts for the gate where it is
            listed, or is all there is.
        attacks: specs; adversaries: against a defense, see `leakaudit.sweep_results.Adversary`.
        labels: whether the adversary is given the labels.
        images: private examples (sentences of a text) in all; a run takes as many as one update holds.
        seeds: how many; seed: the first, and of a fresh model.
        budget: seconds for the attacks of one run; total_budget: no run begins after so many.
        fail_on: policy; None for that of the medium.
        quantile: of an example's scores that the policy looks at; 1 for the worst.
        metrics: None for the medium's own.
        redact: leave the originals out of everything written.
        workers: processes; None for one a core, or one a GPU; 0 runs in this process.
        engine: "local", or "ray" on the cluster at `address` (None starts one here).
        out: the sweep's folder; baseline: accepted leakage; html, junit, sarif, summary: written besides.
    """

    model: str
    checkpoint: Path | None = None
    data: str | None = None
    text: Path | None = None
    task: str | None = None
    lora: str | None = None
    max_length: AtLeastOne | None = None
    normalisation: str = "none"
    mode: Literal["eval", "train"] = "eval"
    input_shape: tuple[AtLeastOne, AtLeastOne, AtLeastOne] | None = None
    num_classes: AtLeastOne | None = None
    start: Annotated[int, Field(ge=0)] = 0
    protocols: tuple[str, ...] = ("fedsgd",)
    defenses: tuple[str, ...] = ()
    attacks: tuple[str, ...] = ("auto",)
    adversaries: tuple[Adversary, ...] = ("oblivious", "adaptive")
    labels: bool = False
    images: AtLeastOne = 4
    seeds: AtLeastOne = 1
    seed: int = 0
    budget: Seconds | None = 120.0
    total_budget: Seconds | None = None
    fail_on: str | None = None
    quantile: Annotated[float, Field(gt=0, le=1)] = 1.0
    metrics: tuple[str, ...] | None = None
    redact: bool = False
    utility: UtilityOptions = UtilityOptions()
    bounds: BoundOptions = BoundOptions()
    workers: Annotated[int, Field(ge=0)] | None = None
    engine: Literal["local", "ray"] = "local"
    address: str | None = None
    device: str = "auto"
    out: Path = Path("runs/sweep")
    baseline: Path | None = None
    html: Path | None = None
    junit: Path | None = None
    sarif: Path | None = None
    summary: Path | None = None

    @property
    def seed_numbers(self) -> range:
        return range(self.seed, self.seed + self.seeds)


def read_config(path: str | Path) -> dict[str, Any]:
    """The values of a TOML file, by field, paths made relative to the working directory's view of the file.

    Raises `InputError` for a file that cannot be read, is not TOML, or has unknown keys.
    """
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:  # not UTF-8, or not TOML
        raise InputError(f"{path} is not TOML: {error}") from error
    values = _named(content, str(path))
    return {key: _beside(key, value, path.parent) for key, value in values.items()}


def build_config(values: Mapping[str, Any], *, over: Mapping[str, Any] | None = None) -> SweepConfig:
    """The configuration of `values` with those in `over` put in their place, tables key by key.

    Raises `InputError` for an unknown key, a value that is not accepted, or a missing one.
    """
    merged: dict[str, Any] = {**_named(values, "the configuration")}
    for key, value in _named(over or {}, "the options").items():
        below = merged.get(key)
        merged[key] = {**below, **value} if isinstance(below, dict) and isinstance(value, dict) else value
    if "model" not in merged:
        raise InputError("no model given; pass --model, or name it in the file of --config")
    try:
        return SweepConfig.model_validate(merged)
    except ValidationError as error:
        raise InputError(f"the sweep's configuration is not valid: {explain(error)}") from error


def _named(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The content under the names of the fields; false for a table turns it off."""
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = ALIASES.get(key, key)
        if name in values:
            raise InputError(f"{where} says {name} twice, as {key!r} too")
        values[name] = value
    _refuse_unknown(values, [*SweepConfig.model_fields, *ALIASES], where)
    for table in TABLES:
        if isinstance(values.get(table), bool):
            values[table] = {"on": values[table]}
        fields = SweepConfig.model_fields[table].annotation
        if isinstance(values.get(table), dict) and isinstance(fields, type) and issubclass(fields, Options):
            _refuse_unknown(values[table], fields.model_fields, f"{where}, table {table}")
    for name in ("protocols", "defenses", "attacks", "adversaries", "metrics"):
        if isinstance(values.get(name), str):
            values[name] = [values[name]]
    return values


def _refuse_unknown(values: Mapping[str, Any], known: Any, where: str) -> None:
    for key in values:
        if key not in known:
            raise InputError(
                f"{where} has an unknown key {key!r}{suggest(key, known)}; known: {', '.join(known)}"
            )


def _beside(key: str, value: Any, folder: Path) -> Any:
    """The value, a relative path in it taken from `folder`."""
    if key in TABLES and isinstance(value, dict):
        return {name: _beside(name, item, folder) for name, item in value.items()}
    if not isinstance(value, str) or key not in (*FILES, "model", "lora"):
        return value
    if key == "data" and value.startswith("torchvision:"):
        return value
    if key == "model":
        return _model_beside(value, folder)
    if key == "lora" and not (folder / value).is_dir():
        return value
    return str(folder / value)


def _model_beside(spec: str, folder: Path) -> str:
    """A factory's file, or a folder of `hf:`, from `folder`; other models are names."""
    target, colon, function = spec.rpartition(":")
    if target.endswith(".py"):
        return f"{folder / target}{colon}{function}"
    name = spec.removeprefix("hf:")
    return f"hf:{folder / name}" if name != spec and (folder / name).is_dir() else spec
