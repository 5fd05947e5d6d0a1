"""`LeakageResult`: what each party of simulated systems could learn, as plain values with a versioned JSON form.

No torch here.  A *row* is one recorded view of one role in one run, with the best attack on it and what theory
says; every audited view has a folder of its own with the `result.json` and the report of a single audit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from leakaudit.errors import EXIT_INCONCLUSIVE, EXIT_LEAKAGE, EXIT_WITHIN_POLICY
from leakaudit.results import NEVER, Score, Value, VerdictStatus, read_versioned
from leakaudit.sweep_results import Example

LEAKAGE_SCHEMA_VERSION = 1
LEAKAGE_NAME = "leakage.json"
"""The result's file in its folder."""
AUDITS = "audits"
"""The folder below it that holds the audits."""

Role = Literal["server", "peer", "network", "enclave-host"]
RowStatus = Literal["done", "interrupted", "failed", "pending", "no-update"]


class LeakageRow(Value):
    """One view of one role.

    Attributes:
        run: name of the run's folder, or its path where two have the same name; system: of the training system.
        view: name of the recorded view; None for what crosses the network, where no update is seen.
        step, time: of the server, and seconds of the virtual clock.
        clients, examples: behind the view; staleness: of the oldest of them, in server steps.
        exact: False where the view holds more than its clients' rounds; note: how the party comes by it.
        status: "no-update" where the party sees no client's update, so that there is nothing to invert.
        verdict, headline, reasons: of the audit; attack: that came nearest to an original where it leaks,
            else the one with the smallest residual; residual: of it, relative.
        scores: of that attack, averaged over the examples; example: the one it reconstructed best.
        control: whether the same attack succeeded where it must; None where it did not run or was not needed.
        setting: whether the adversary was given more than a real one has.
        audit: folder of the audit, relative to the result's.
        inferred: what can be told without an update, in sentences.
        theory, source: what theory says of this role in this system, and who says it.
        error: one line, where the audit failed.
    """

    run: str
    system: str
    role: Role
    view: str | None = None
    step: int | None = None
    time: float | None = None
    clients: int = 0
    examples: int = 0
    staleness: int = 0
    exact: bool = True
    note: str = ""
    status: RowStatus
    verdict: VerdictStatus | None = None
    headline: str = ""
    reasons: list[str] = Field(default_factory=list)
    attack: str | None = None
    residual: float | None = None
    scores: list[Score] = Field(default_factory=list)
    example: Example | None = None
    control: bool | None = None
    setting: Literal["realistic", "upper bound"] | None = None
    audit: str | None = None
    inferred: list[str] = Field(default_factory=list)
    theory: str = ""
    source: str = ""
    seconds: float = 0.0
    error: str = ""

    @property
    def attacked(self) -> bool:
        """Whether there was an update to attack, even if that failed."""
        return self.status != "no-update"

    def score(self, metric: str) -> Score | None:
        return next((score for score in self.scores if score.metric == metric), None)


class LeakageResult(Value):
    """All rows; `policy` as in an audit, `budget` in seconds for the attacks on one view."""

    schema_version: Literal[1] = 1
    created: str
    command: str = ""
    title: str = "What each party learns"
    medium: Literal["images", "text"] = "images"
    seed: int
    attacks: list[str]
    policy: str
    budget: float | None = None
    rows: list[LeakageRow]
    environment: dict[str, str] = Field(default_factory=dict)
    seconds: float = 0.0
    interrupted: bool = False
    redacted: bool = False

    @property
    def unattacked(self) -> list[str]:
        """Runs of which no view was attacked: nothing is known of them."""
        attacked = {row.run for row in self.rows if row.attacked}
        return list(dict.fromkeys(row.run for row in self.rows if row.run not in attacked))

    @property
    def exit_code(self) -> int:
        """1 for a leak that the policy counts, 3 where anything is open, also that nothing of a run was attacked."""
        attacked = [row for row in self.rows if row.attacked]
        if any(row.verdict == "leaks" for row in attacked):
            return EXIT_WITHIN_POLICY if self.policy == NEVER else EXIT_LEAKAGE
        open_rows = any(row.verdict != "not-recovered" for row in attacked)
        if open_rows or not attacked or self.unattacked or self.interrupted:
            return EXIT_INCONCLUSIVE
        return EXIT_WITHIN_POLICY

    def to_json(self) -> str:
        return self.model_dump_json(indent=1) + "\n"


def read_leakage(folder: Path) -> LeakageResult:
    """The result in `folder`; `InputError` where there is none, or it is not one."""
    return read_versioned(
        folder / LEAKAGE_NAME,
        LeakageResult,
        LEAKAGE_SCHEMA_VERSION,
        noun="a leakage result",
        lacking=f"{folder} is not the folder of simulate leakage",
    )
