"""`AuditResult`: everything an audit found, as plain values with a versioned JSON form.

No torch here.  Pictures live beside the JSON as PNG files and are named by paths
relative to the run folder; tensors live in `reconstruction.safetensors`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError
from pydantic_core import from_json

from leakaudit.errors import EXIT_INCONCLUSIVE, EXIT_LEAKAGE, EXIT_WITHIN_POLICY, InputError

SCHEMA_VERSION = 1

VerdictStatus = Literal["leaks", "not-recovered", "inconclusive"]
EXIT_CODES: dict[VerdictStatus, int] = {
    "leaks": EXIT_LEAKAGE,
    "not-recovered": EXIT_WITHIN_POLICY,
    "inconclusive": EXIT_INCONCLUSIVE,
}

NEVER = "never"
"""The policy under which leakage is reported and fails nothing."""
NO_CONTROL = "The positive control did not run"
"""How an audit begins the sentence that says so; in a sweep, which has a control of its own, it is void."""


class Value(BaseModel):
    """Base of all results: immutable, unknown keys refused, NaN and infinity kept in JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


Read = TypeVar("Read", bound=Value)


def parse_versioned(
    text: bytes, kind: type[Read], schema: int, path: Path, *, called: str, noun: str
) -> Read:
    """The value in a JSON file of a stated `schema_version`.

    Args:
        called: the file, as the messages name it; noun: what should be in it, with its article.

    Raises:
        InputError: not JSON, another schema, or not a `kind`.
    """
    try:
        content = from_json(text)
    except ValueError as error:
        raise InputError(f"{called} is not JSON: {error}") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != schema:
        raise InputError(f"{called} has schema_version {version!r}; this leakaudit reads {schema}")
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path} is not {noun}: {where}: {first['msg']}") from error


def read_versioned(path: Path, kind: type[Read], schema: int, *, noun: str, lacking: str) -> Read:
    """As `parse_versioned`, of a file; `lacking` begins the message of the `InputError` where it cannot be read."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputError(f"{lacking}: cannot read {path.name}: {error.strerror}") from error
    return parse_versioned(text, kind, schema, path, called=str(path), noun=noun)


class KnowledgeRow(Value):
    """One fact the adversary had; `text` is ready to print."""

    name: str
    status: Literal["known", "inferred", "unknown"]
    text: str
    source: str = ""
    upper_bound: bool = False


class Finding(Value):
    """Something the file gives away by itself, without optimisation.

    `severity`: "leak" reveals private data, "hint" narrows it down, "info" is context,
    "warning" bears on whether the audit can be trusted.
    """

    name: str
    severity: Literal["leak", "hint", "info", "warning"]
    text: str
    data: dict[str, Any] = Field(default_factory=dict)


class Score(Value):
    """One metric, averaged over the batch; `value` is None when not measured, with the reason."""

    metric: str
    value: float | None
    unit: str = ""
    higher_is_better: bool = True
    chance: float | None = None
    reason: str = ""


class Token(Value):
    """One token as text; `right` says whether it stands where the truth has it, None without the truth.

    `special` tokens are those the tokenizer adds by itself.
    """

    text: str
    right: bool | None = None
    special: bool = False


class ExampleScores(Value):
    """One private example and the reconstruction matched to it.

    Images have paths of pictures, sentences have tokens.
    """

    index: int
    matched: int
    true_label: str | None = None
    recovered_label: str | None = None
    scores: dict[str, float | None] = Field(default_factory=dict)
    original: str | None = None
    reconstruction: str | None = None
    difference: str | None = None
    original_tokens: list[Token] | None = None
    recovered_tokens: list[Token] | None = None


class Frame(Value):
    """The whole batch at one iteration: one picture of the film strip, or its sentences."""

    iteration: int
    loss: float
    image: str | None = None
    sentences: list[list[Token]] = Field(default_factory=list)


class Verification(Value):
    """What re-simulation proves without the truth.

    `status`:
      verified: the residual is at its floor and the Jacobian has full rank; every
        nearby solution lies within `distance` (RMS per pixel, units of [0, 1]).
      consistent: the residual is at its floor, but the Jacobian is rank deficient or
        was not computed: other inputs may share this update.
      not-matched: the residual is above its floor.

    `cramer_rao` is the least error (RMS per pixel, units of [0, 1]) that an unbiased attack on the
    equations counted here makes when the update carries Gaussian noise as large as the floor's; where
    `distance` bounds the worst case, this is the typical one.
    `left_open`, in [0, 1], is the share of the variance of unrelated pixels that remains, with errors as large
    as the floor's, to one who knows the update (linear, Gaussian): 1 when a match tells nothing.
    """

    status: Literal["verified", "consistent", "not-matched"]
    text: str
    residual: float
    floor: float
    distance: float | None = None
    cramer_rao: float | None = None
    left_open: float | None = None
    smallest_singular_value: float | None = None
    largest_singular_value: float | None = None
    rank: int | None = None
    unknowns: int | None = None
    equations: int | None = None
    reason: str = ""


class Attempt(Value):
    """One restart."""

    restart: int
    loss: float
    residual: float
    iterations: int
    seconds: float
    stopped: str
    success: bool | None = None
    history: list[tuple[int, float]] = Field(default_factory=list)


class SuccessRate(Value):
    """Share of restarts that succeeded, with its 95 % Wilson interval."""

    successes: int
    restarts: int
    low: float
    high: float
    criterion: str


class Trial(Value):
    """One attack, all its restarts, and the best of them by residual."""

    attack: str
    spec: str
    status: Literal["done", "interrupted", "failed"]
    reason: str = ""
    best: int | None = None
    residual: float | None = None
    seconds: float = 0.0
    attempts: list[Attempt] = Field(default_factory=list)
    success: SuccessRate | None = None
    label_source: str = ""
    scores: list[Score] = Field(default_factory=list)
    examples: list[ExampleScores] = Field(default_factory=list)
    verification: Verification | None = None
    strip: list[Frame] = Field(default_factory=list)
    details: dict[str, Any] = Field(default_factory=dict)


class Skipped(Value):
    """An attack that did not run, and why."""

    attack: str
    reason: str


class Control(Value):
    """`positive`: the same attack on an undefended one-example update must succeed.
    `floor`: what unrelated images score against the truth.  `passed` is None when it did not run."""

    name: Literal["positive", "floor"]
    passed: bool | None
    text: str
    scores: list[Score] = Field(default_factory=list)


class Verdict(Value):
    status: VerdictStatus
    headline: str
    reasons: list[str] = Field(default_factory=list)
    policy: str = ""

    @property
    def exit_code(self) -> int:
        if self.status == "leaks" and self.policy == NEVER:
            return EXIT_WITHIN_POLICY
        return EXIT_CODES[self.status]


class ModelSummary(Value):
    """`task` is that of a language model: classification, mlm or causal-lm."""

    name: str
    parameters: int
    num_classes: int
    input_shape: list[int]
    mode: str
    checkpoint: str | None = None
    task: str | None = None


class RoundSummary(Value):
    num_examples: int
    local_steps: int
    local_batch_size: int
    learning_rate: float | None = None


class AuditResult(Value):
    """The whole audit.  `best` is the index in `trials` of the one with the smallest residual; `compiling` is how
    many of its `seconds` went into compiling attacks."""

    schema_version: Literal[1] = 1
    created: str
    medium: Literal["images", "text"] = "images"
    command: str
    seed: int
    model: ModelSummary
    round: RoundSummary
    setting: Literal["realistic", "upper bound"]
    knowledge: list[KnowledgeRow]
    findings: list[Finding]
    trials: list[Trial]
    skipped: list[Skipped]
    controls: list[Control]
    best: int | None
    verdict: Verdict
    truth_known: bool
    seconds: float
    compiling: float = 0.0
    environment: dict[str, str]
    files: dict[str, str] = Field(default_factory=dict)
    interrupted: bool = False
    redacted: bool = False
    title: str = "Gradient-inversion audit"
    _folder: Path | None = PrivateAttr(default=None)

    @property
    def folder(self) -> Path | None:
        """The run folder the result was written to or read from, when known."""
        return self._folder

    def in_folder(self, folder: Path | None) -> AuditResult:
        """The same result, knowing the run folder its pictures lie in; never part of the JSON."""
        copy = self.model_copy()
        copy._folder = folder
        return copy

    def _repr_html_(self) -> str:
        """The whole report, framed for a notebook; with pictures when the run folder is known."""
        from leakaudit.report.html import render_notebook  # the report renders results, so only when asked

        return render_notebook(self, self._folder)

    @property
    def exit_code(self) -> int:
        return self.verdict.exit_code

    @property
    def best_trial(self) -> Trial | None:
        return None if self.best is None else self.trials[self.best]

    def to_json(self) -> str:
        return self.model_dump_json(indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> AuditResult:
        """Raises `pydantic.ValidationError` for another schema."""
        return cls.model_validate_json(text)
