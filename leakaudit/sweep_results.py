"""`SweepResult`: everything a sweep found, as plain values with a versioned JSON form.

No torch here.  A *target* is a protocol with a defense; a *cell* is a target under one attack of one
adversary; a *run* is one capture and one audit of a cell, for one group of private examples and one
seed.  Every run has a folder of its own below the sweep's, with the `result.json` and the pictures
of `leakaudit.results.AuditResult`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from leakaudit.errors import EXIT_INCONCLUSIVE, EXIT_LEAKAGE, EXIT_WITHIN_POLICY
from leakaudit.results import Token, Value, VerdictStatus

SWEEP_SCHEMA_VERSION = 1
SWEEP_NAME = "sweep.json"
"""The result's file in the sweep's folder."""
RUNS = "runs"
"""The folder below it that holds the runs, each under its key."""
NO_DEFENSE = "none"
"""The spec, and the family, of a target without a defense."""

Adversary = Literal["oblivious", "adaptive"]
"""Whether the adversary knows the defense.  Without a defense there is only the oblivious one."""

RunStatus = Literal["done", "interrupted", "failed", "pending"]


class Example(Value):
    """One private example of a run and what was made of it.

    `original` and `reconstruction` are pictures, as paths relative to the sweep's folder; sentences
    have tokens.  None where there is nothing, or where the originals are redacted.
    """

    index: int
    scores: dict[str, float | None] = Field(default_factory=dict)
    true_label: str | None = None
    recovered_label: str | None = None
    original: str | None = None
    reconstruction: str | None = None
    original_tokens: list[Token] | None = None
    recovered_tokens: list[Token] | None = None


class Frame(Value):
    """One frame of a run's film strip; `image` is relative to the sweep's folder."""

    iteration: int
    loss: float
    image: str | None = None


class Run(Value):
    """One capture and one audit.

    Attributes:
        key: of its full specification; names its folder `runs/KEY`, relative to the sweep's.
        group: which private examples: `group * examples` is the first.
        verdict: of the audit by itself, without the sweep's control.
        attack: the attack with the best reconstruction, where several were run (auto).
        residual: relative, of that attack; None when nothing ran.
        examples: of that attack's reconstruction, but each with the best scores any attack reached.
        cut: attacks that the time budget ended early.
        unmeasured: metrics of the policy that were not measured.
        reasons: of the verdict, and warnings that bear on it.
        noise_std, update_rms: of the noise added (standard deviation a number; 0 without noise) and of
            the undefended update, so that noise can be given absolute and relative.
        error: one line, when `status` is "failed".
    """

    key: str
    group: int
    seed: int
    status: RunStatus
    error: str = ""
    verdict: VerdictStatus | None = None
    headline: str = ""
    reasons: list[str] = Field(default_factory=list)
    attack: str | None = None
    residual: float | None = None
    seconds: float = 0.0
    examples: list[Example] = Field(default_factory=list)
    cut: list[str] = Field(default_factory=list)
    unmeasured: list[str] = Field(default_factory=list)
    strip: list[Frame] = Field(default_factory=list)
    noise_std: float | None = None
    update_rms: float | None = None


class Cell(Value):
    """One protocol x defense x attack x adversary.

    Attributes:
        protocol, defense, attack: specs; defense is "none" without one.
        family: name of the defense without its options, "+" between those of a chain.
        strength: the option that a sweep varies and its value, such as ("std", 1e-3); None when
            the family has one strength only.
        verdict: "leaks" when the worst case, or the quantile of the policy, crosses it;
            "not-recovered" only when every run finished, was measured, and the control passed.
        reasons: why, in sentences.
        control: whether the same attack, undefended, broke the policy on the same examples (fedsgd, one
            example an update); None when it did not run.
    """

    protocol: str
    defense: str
    attack: str
    adversary: Adversary
    family: str = NO_DEFENSE
    strength: tuple[str, float] | None = None
    runs: list[Run] = Field(default_factory=list)
    verdict: VerdictStatus = "inconclusive"
    reasons: list[str] = Field(default_factory=list)
    control: bool | None = None

    @property
    def name(self) -> str:
        """Unique within a sweep, and stable between sweeps: what baselines and test cases are called by."""
        return " | ".join((self.protocol, self.defense, self.attack, self.adversary))

    def scores(self, metric: str) -> list[float]:
        """The metric for every private example of every run, measured ones only."""
        found = (example.scores.get(metric) for run in self.runs for example in run.examples)
        return [score for score in found if score is not None]


class Curve(Value):
    """Held-out accuracy while training with a defense, in one seed: (step, accuracy in [0, 1])."""

    seed: int
    points: list[tuple[int, float]]


class Utility(Value):
    """What a target costs: accuracy on held-out data after training with the defense.

    Attributes:
        accuracy: mean over seeds of the final accuracy, in [0, 1]; None when not measured, with `reason`.
        low, high: 95 % interval of the mean (Student's t over seeds), None for one seed.
        epsilon, delta: what training so long costs in differential privacy, where the defense gives it.
        supplied: read from the user's file instead of trained here.
        failed: not measured because of an error, which is the reason.
    """

    protocol: str
    defense: str
    accuracy: float | None
    low: float | None = None
    high: float | None = None
    curves: list[Curve] = Field(default_factory=list)
    steps: int | None = None
    epsilon: float | None = None
    delta: float | None = None
    supplied: bool = False
    failed: bool = False
    reason: str = ""
    seconds: float = 0.0


class Bound(Value):
    """What theory says about a target.

    Attributes:
        name: "epsilon", "reconstruction-robustness", "cramer-rao", "bayesian-cramer-rao", "rank", ...
        kind: "bound" holds for every adversary under the assumptions; "indicator" does not.
        quantity: what `value` is: "epsilon", "probability" (of success), "mse" (per pixel of [0, 1]; no adversary
            is below), "unknowns-left" (dimensions the update leaves open), "condition", ...
        value: None when it could not be computed, with `text` saying why.
        source: author, year, equation.
    """

    protocol: str
    defense: str
    name: str
    kind: Literal["bound", "indicator"]
    quantity: str
    value: float | None
    text: str
    source: str
    assumptions: list[str] = Field(default_factory=list)
    data: dict[str, Any] = Field(default_factory=dict)


class Acceptance(Value):
    """A cell of the baseline: known leakage that somebody accepted.

    Attributes:
        expires: last day of the acceptance, YYYY-MM-DD.
        scores: that decided when it was accepted, by the threshold they crossed.
    """

    cell: str
    owner: str
    expires: str
    reason: str = ""
    scores: dict[str, float] = Field(default_factory=dict)


class Gate(Value):
    """What the sweep means for a build.

    Attributes:
        policy: thresholds; quantile: 1 for the worst case, 0.9 for the value that 10 % of examples exceed.
        broken: names of leaking cells that nobody accepted; accepted: those that the baseline covers;
            expired: leaking cells whose acceptance ran out, worse: those that leak clearly more than was
            accepted (both are in `broken` too).
        inconclusive: names of cells that prove nothing.
        notes: sentences on the baseline: what expired, got worse, or is not needed any more.
    """

    policy: str
    quantile: float = 1.0
    broken: list[str] = Field(default_factory=list)
    accepted: list[Acceptance] = Field(default_factory=list)
    expired: list[str] = Field(default_factory=list)
    worse: list[str] = Field(default_factory=list)
    inconclusive: list[str] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)

    @property
    def exit_code(self) -> int:
        if self.broken:
            return EXIT_LEAKAGE
        return EXIT_INCONCLUSIVE if self.inconclusive else EXIT_WITHIN_POLICY


class SweepResult(Value):
    """The whole sweep.

    Attributes:
        config: the configuration as it ran, JSON values.
        examples: private examples asked for; a run of a target uses as many of them as it takes.
    """

    schema_version: Literal[1] = 1
    created: str
    title: str = "Defense sweep"
    command: str = ""
    medium: Literal["images", "text"] = "images"
    config: dict[str, Any] = Field(default_factory=dict)
    model: str
    parameters: int
    examples: int
    seeds: int
    seed: int
    metrics: list[str]
    cells: list[Cell]
    utilities: list[Utility] = Field(default_factory=list)
    bounds: list[Bound] = Field(default_factory=list)
    gate: Gate
    notes: list[str] = Field(default_factory=list)
    seconds: float = 0.0
    environment: dict[str, str] = Field(default_factory=dict)
    files: dict[str, str] = Field(default_factory=dict)
    interrupted: bool = False
    redacted: bool = False

    @property
    def exit_code(self) -> int:
        return self.gate.exit_code

    def to_json(self) -> str:
        return self.model_dump_json(indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> SweepResult:
        """Raises `pydantic.ValidationError` for another schema."""
        return cls.model_validate_json(text)
