"""Jobs for a whole target, a protocol with a defense: what it costs in accuracy, and what theory says."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from leakaudit.atomic import write_atomically
from leakaudit.bounds import target_bounds
from leakaudit.defenses.naming import parse_defense
from leakaudit.media import medium_of
from leakaudit.models.victim import Victim
from leakaudit.numerics import faithful
from leakaudit.randomness import fork
from leakaudit.results import Value
from leakaudit.subject import pick_device
from leakaudit.sweep.config import BoundOptions
from leakaudit.sweep.jobs import look, shared_update
from leakaudit.sweep.protocols import round_of
from leakaudit.sweep.setup import Setup, fresh_model, load_all, load_examples, load_model
from leakaudit.sweep.utility import Training, measure_utility
from leakaudit.sweep.work import one_line
from leakaudit.sweep_results import Bound, Utility

TARGETS = "targets"

Found = TypeVar("Found", bound=Value)


@dataclass(frozen=True)
class UtilityJob:
    """Accuracy of one target; see `leakaudit.sweep.utility.measure_utility`.

    Without a checkpoint every seed trains a fresh model; a checkpoint, or a pretrained language model, is trained
    further.  `examples`: of the data, from the first on; None for all.
    """

    key: str
    setup: Setup
    protocol: str
    defense: str
    training: Training
    examples: int | None
    seed: int

    def stored(self, root: Path) -> Utility | None:
        return _stored(root, self.key, Utility)

    def execute(self, root: Path) -> Utility:
        with faithful(pick_device(self.setup.device)):
            return _keep(root, self.key, self._measured, self.failed)

    def failed(self, error: str) -> Utility:
        return Utility(protocol=self.protocol, defense=self.defense, accuracy=None, failed=True, reason=error)

    def _measured(self) -> Utility:
        return measure_utility(
            load_model(self.setup),
            load_all(self.setup, self.examples),
            parse_defense(self.defense),
            round_of(self.protocol),
            self.training,
            protocol=self.protocol,
            defense=self.defense,
            seed=self.seed,
            fresh=self._fresh(),
        )

    def _fresh(self) -> Callable[[int], Victim] | None:
        if self.setup.checkpoint is not None or self.setup.language:
            return None
        return lambda seed: fresh_model(self.setup, seed)


class Bounds(Value):
    """All bounds of one target; `failed` where an error left none."""

    bounds: list[Bound]
    failed: bool = False


@dataclass(frozen=True)
class BoundJob:
    """What theory says of one target, at the first update that the sweep attacks; see `leakaudit.bounds`."""

    key: str
    setup: Setup
    protocol: str
    defense: str
    count: int
    seed: int
    options: BoundOptions

    def stored(self, root: Path) -> Bounds | None:
        return _stored(root, self.key, Bounds)

    def execute(self, root: Path) -> Bounds:
        with faithful(pick_device(self.setup.device)):
            return _keep(root, self.key, self._computed, self.failed)

    def failed(self, error: str) -> Bounds:
        failure = Bound(
            protocol=self.protocol,
            defense=self.defense,
            name="bounds",
            kind="indicator",
            quantity="none",
            value=None,
            text=f"No bound could be computed: {error}",
            source="",
        )
        return Bounds(bounds=[failure], failed=True)

    def _computed(self) -> Bounds:
        victim, defenses = load_model(self.setup), parse_defense(self.defense)
        batch: Any = load_examples(self.setup).part(0, self.count)
        captured = shared_update(victim, batch, self.protocol, self.defense, 0, self.seed)
        x, y = medium_of(victim).tensors(victim, batch)
        seen = victim.with_mode("eval") if self.setup.language else victim
        view, _ = look(seen, captured, defenses, "adaptive", labels=None, seed=self.seed)
        found = target_bounds(
            view,
            x,
            y,
            defenses,
            protocol=self.protocol,
            defense=self.defense,
            generator=fork(self.seed, f"bounds/{self.protocol}/{self.defense}"),
            sample_rate=self.options.sample_rate,
            steps=self.options.steps,
            delta=self.options.delta,
            prior=self.options.prior,
        )
        return Bounds(bounds=found)


# ------------------------------------------------------------------ files


def _path(root: Path, key: str) -> Path:
    return root / TARGETS / f"{key}.json"


def _stored(root: Path, key: str, kind: type[Found]) -> Found | None:
    try:
        return kind.model_validate_json(_path(root, key).read_bytes())
    except (OSError, ValidationError):
        return None


def _keep(root: Path, key: str, find: Callable[[], Found], failed: Callable[[str], Found]) -> Found:
    """What `find` finds, or what `failed` makes of its error, which is kept beside."""
    path = _path(root, key)
    try:
        found = find()
    except Exception as error:  # one failed target is not the end of the sweep
        text = traceback.format_exc().encode("utf-8", "replace")
        write_atomically(path.with_suffix(".error.txt"), text, make_folder=True)
        found = failed(one_line(error))
    write_atomically(path, (found.model_dump_json(indent=1) + "\n").encode(), make_folder=True)
    return found
