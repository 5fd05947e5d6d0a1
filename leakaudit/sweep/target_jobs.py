"""Jobs for a whole target, a protocol with a defense: what it costs in accuracy."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from leakaudit.atomic import write_atomically
from leakaudit.defenses.naming import parse_defense
from leakaudit.formats.phrases import first_line
from leakaudit.models.victim import Victim
from leakaudit.sweep.protocols import round_of
from leakaudit.sweep.setup import Setup, fresh_model, load_all, load_model
from leakaudit.sweep.utility import Training, measure_utility
from leakaudit.sweep_results import Utility

TARGETS = "targets"


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
        try:
            return Utility.model_validate_json(self._path(root).read_bytes())
        except (OSError, ValidationError):
            return None

    def execute(self, root: Path) -> Utility:
        try:
            found = self._measured()
        except Exception as error:  # one failed training is not the end of the sweep
            write_atomically(
                self._path(root).with_suffix(".error.txt"), traceback.format_exc().encode(), make_folder=True
            )
            found = self.failed(first_line(error))
        write_atomically(
            self._path(root), (found.model_dump_json(indent=1) + "\n").encode(), make_folder=True
        )
        return found

    def failed(self, error: str) -> Utility:
        return Utility(protocol=self.protocol, defense=self.defense, accuracy=None, reason=error)

    def _path(self, root: Path) -> Path:
        return root / TARGETS / f"{self.key}.json"

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
