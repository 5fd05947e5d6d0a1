"""What the page of a sweep and its summary in the terminal both say: worst cases, states, rows, sentences."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from leakaudit.gate import policy_of
from leakaudit.policy import Policy, Threshold
from leakaudit.report import words
from leakaudit.results import NEVER
from leakaudit.sweep_results import Adversary, Bound, Cell, Example, Run, SweepResult, Utility

State: TypeAlias = Literal["leaks", "not-recovered", "inconclusive", "failed", "pending"]
STATES: tuple[State, ...] = ("leaks", "inconclusive", "failed", "pending", "not-recovered")

SMALLER_IS_STRONGER = frozenset({"keep", "bits", "levels", "max_norm", "max_grad_norm", "norm", "bound"})
"""Options of defenses that protect more the smaller they are."""
SCALES = {"psnr": (5.0, 45.0), "mse": (1.0, 1e-6), "lpips": (1.0, 0.0), "lpips-alex": (1.0, 0.0)}
"""From "nothing to see" to "as good as the original"; other metrics run from 0 to 1."""
LOGARITHMIC = frozenset({"mse"})
UNITS = {"psnr": "dB"}
NORMAL_95 = 1.959963984540054


@dataclass(frozen=True)
class Yardstick:
    """A threshold of the policy as what scores of its metric are compared by."""

    threshold: Threshold

    @property
    def metric(self) -> str:
        return self.threshold.metric

    @property
    def higher_leaks(self) -> bool:
        return self.threshold.operator == ">"

    @property
    def name(self) -> str:
        return words.metric_name(self.metric)

    @property
    def unit(self) -> str:
        return UNITS.get(self.metric, "")

    def write(self, score: float | None) -> str:
        return words.quantity(score, self.unit)

    def leakage(self, score: float) -> float:
        """A number that grows with leakage."""
        return score if self.higher_leaks else -score

    def worst(self, scores: Iterable[float]) -> float | None:
        """The score that leaks most; None without any that is a number."""
        numbers = [score for score in scores if not math.isnan(score)]
        return max(numbers, key=self.leakage) if numbers else None

    def share(self, score: float) -> float:
        """Where a score lies between nothing (0) and everything (1), on a scale fixed for the metric."""
        low, high = SCALES.get(self.metric, (0.0, 1.0))
        if self.metric in LOGARITHMIC:
            low, high, score = (math.log10(max(value, 1e-300)) for value in (low, high, score))
        return min(1.0, max(0.0, (score - low) / (high - low)))


@dataclass(frozen=True)
class Worst:
    """The reconstruction of a cell that leaks most; `score` is None when nothing was measured."""

    run: Run
    example: Example
    score: float | None


@dataclass(frozen=True)
class Pair:
    """One target under one attack: both adversaries, as indices into the sweep's cells."""

    label: str
    oblivious: int | None = None
    adaptive: int | None = None

    def chief(self, cells: Sequence[Cell]) -> int:
        """The cell that says what the target is worth: the one that leaks, the adaptive one first, as who knows a
        defense may ignore it; where neither does, the adaptive one, if it was tried."""
        there = [index for index in (self.adaptive, self.oblivious) if index is not None]
        return next((index for index in there if cells[index].verdict == "leaks"), there[0])


@dataclass(frozen=True)
class Row:
    """One family of defenses under one attack of one protocol, weak to strong."""

    protocol: str
    attack: str
    family: str
    defense: str
    option: str | None
    pairs: list[Pair]


@dataclass(frozen=True)
class Rate:
    """Examples that crossed the policy, of all measured, with the 95 % Wilson interval."""

    successes: int
    trials: int
    low: float
    high: float

    @property
    def share(self) -> float:
        return self.successes / self.trials


def yardstick(result: SweepResult) -> Yardstick:
    """Of the policy's first metric that any cell was measured with, or else of its first."""
    thresholds = policy_of(result).thresholds
    measured = (
        item for item in thresholds if any(True for cell in result.cells for _ in cell.scores(item.metric))
    )
    return Yardstick(next(measured, thresholds[0]))


def state_of(cell: Cell) -> State:
    """The verdict; failed or pending cells, which are inconclusive too, are told apart."""
    statuses = {run.status for run in cell.runs}
    if cell.verdict == "inconclusive" and statuses <= {"pending"}:
        return "pending"
    if cell.verdict == "inconclusive" and statuses == {"failed"}:
        return "failed"
    return cell.verdict


def worst_of(cell: Cell, yard: Yardstick) -> Worst | None:
    """The worst case; without any score the first reconstruction; None without examples."""
    found = [
        Worst(run, example, example.scores.get(yard.metric)) for run in cell.runs for example in run.examples
    ]

    def rank(item: Worst) -> tuple[bool, float]:
        unknown = item.score is None or math.isnan(item.score)
        return not unknown, 0.0 if unknown or item.score is None else yard.leakage(item.score)

    return max(found, key=rank) if found else None


def worst_score(cell: Cell, yard: Yardstick) -> float | None:
    return yard.worst(cell.scores(yard.metric))


def rows_of(cells: Sequence[Cell]) -> list[Row]:
    """Cells side by side: families in the order they came, and in each the weakest strength first."""
    groups: dict[tuple[str, str, str, str], dict[str, list[int]]] = {}
    for index, cell in enumerate(cells):
        key = (cell.protocol, cell.attack, cell.family, base_of(cell))
        groups.setdefault(key, {}).setdefault(cell.defense, []).append(index)
    rows = []
    for (protocol, attack, family, base), targets in groups.items():
        ordered = sorted(targets.values(), key=lambda indices: _strength_rank(cells[indices[0]]))
        strength = strength_of(cells[ordered[0][0]])
        rows.append(
            Row(
                protocol=protocol,
                attack=attack,
                family=family,
                defense=base,
                option=strength[0] if strength else None,
                pairs=[_pair(cells, indices) for indices in ordered],
            )
        )
    return rows


def _pair(cells: Sequence[Cell], indices: list[int]) -> Pair:
    def first(adversary: Adversary) -> int | None:
        return next((index for index in indices if cells[index].adversary == adversary), None)

    return Pair(label_of(cells[indices[0]]), first("oblivious"), first("adaptive"))


def strength_of(cell: Cell) -> tuple[str, float] | None:
    """The option that is swept and its value; None also for a value that is no number to draw."""
    return cell.strength if cell.strength is not None and math.isfinite(cell.strength[1]) else None


def base_of(cell: Cell) -> str:
    """The defense's spec without the option that is swept."""
    strength = strength_of(cell)
    if strength is None:
        return cell.defense
    option = rf"(?<=[:,]){re.escape(strength[0])}\s*=[^,+]*,?"
    return re.sub(r"[:,](?=\+|$)", "", re.sub(option, "", cell.defense))


def label_of(cell: Cell) -> str:
    """The strength, or the whole spec where there is none."""
    strength = strength_of(cell)
    if strength is None:
        return cell.defense
    name, value = strength
    return f"{name.replace('_', ' ')} {words.number(value)}"


def _strength_rank(cell: Cell) -> float:
    strength = strength_of(cell)
    if strength is None:
        return 0.0
    name, value = strength
    return -value if name in SMALLER_IS_STRONGER else value


def utility_of(result: SweepResult, cell: Cell) -> Utility | None:
    targets = ((item, item.protocol, item.defense) for item in result.utilities)
    return next((u for u, protocol, defense in targets if (protocol, defense) == _target(cell)), None)


def bounds_of(result: SweepResult, cell: Cell) -> list[Bound]:
    return [bound for bound in result.bounds if (bound.protocol, bound.defense) == _target(cell)]


def epsilon_of(result: SweepResult, cell: Cell) -> float | None:
    """By the training, or else by the bounds; None where the defense gives no differential privacy."""
    utility = utility_of(result, cell)
    if utility is not None and utility.epsilon is not None:
        return utility.epsilon
    return next((bound.value for bound in bounds_of(result, cell) if bound.quantity == "epsilon"), None)


def chief_bound(result: SweepResult, cell: Cell) -> Bound | None:
    """The one worth a column: what holds for every adversary first, epsilon left to its own column; of two errors
    the smaller, as an adversary with a prior is below what binds the unbiased one."""
    found = [
        item for item in bounds_of(result, cell) if item.value is not None and item.quantity != "epsilon"
    ]
    wanted = ("probability", "mse")

    def rank(bound: Bound) -> tuple[bool, int, float]:
        place = wanted.index(bound.quantity) if bound.quantity in wanted else len(wanted)
        return bound.kind != "bound", place, bound.value or 0.0

    return min(found, key=rank, default=None)


def bound_text(bound: Bound | None) -> str:
    """Such as "MSE ≥ 2.7×10⁻³" or "success ≤ 12 %"."""
    if bound is None or bound.value is None:
        return words.MISSING
    if bound.quantity == "mse":
        return f"MSE ≥ {words.number(bound.value, 2)}"
    if bound.quantity == "probability":
        return f"success ≤ {words.number(100 * bound.value, 2)}{words.NARROW_SPACE}%"
    return f"{bound.quantity.replace('-', ' ')} {words.number(bound.value)}"


def accuracy_text(utility: Utility | None) -> str:
    """Such as "81.2 % (79.0 to 83.4)"."""
    if utility is None or utility.accuracy is None:
        return words.MISSING
    text = f"{100 * utility.accuracy:.1f}{words.NARROW_SPACE}%"
    if utility.low is None or utility.high is None:
        return text
    return f"{text} ({100 * utility.low:.1f} to {100 * utility.high:.1f})"


def has_accuracy(utility: Utility) -> bool:
    """Whether there are numbers to draw: the accuracy and, where there are any, the ends of its interval."""
    ends = (utility.low or 0.0, utility.high or 0.0)
    return utility.accuracy is not None and all(map(math.isfinite, (utility.accuracy, *ends)))


def success_rate(cell: Cell, policy: Policy) -> Rate | None:
    """How many of the cell's examples cross some threshold; None when none was measured."""
    rows = [example.scores for run in cell.runs for example in run.examples]
    measured = [row for row in rows if any(row.get(metric) is not None for metric in policy.metrics)]
    crossed = sum(any(item.crossed(row.get(item.metric)) for item in policy.thresholds) for row in measured)
    return rate(crossed, len(measured)) if measured else None


def rate(successes: int, trials: int) -> Rate:
    """With the interval of Wilson (1927) at 95 %; `trials` is at least 1."""
    share, square = successes / trials, NORMAL_95**2
    centre = (share + square / (2 * trials)) / (1 + square / trials)
    half = NORMAL_95 / (1 + square / trials)
    half *= math.sqrt(share * (1 - share) / trials + square / (4 * trials**2))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == trials else min(1.0, centre + half)
    return Rate(successes, trials, low, high)


def only_oblivious(result: SweepResult) -> list[str]:
    """Targets that stop the adversary who does not know the defense, and leak to the one who does."""
    found = []
    for row in rows_of(result.cells):
        for pair in row.pairs:
            if pair.oblivious is None or pair.adaptive is None:
                continue
            blind, aware = result.cells[pair.oblivious], result.cells[pair.adaptive]
            if blind.verdict == "not-recovered" and aware.verdict == "leaks":
                found.append(f"{blind.defense} under {blind.protocol}")
    return list(dict.fromkeys(found))


def headline(result: SweepResult) -> str:
    """The sweep in one sentence."""
    gate, total = result.gate, len(result.cells)
    if not total:
        return "The sweep has no cells."
    if gate.broken:
        return f"{len(gate.broken)} of {words.plural(total, 'cell')} {_verb(gate.broken)} beyond the policy."
    if gate.inconclusive:
        return (
            f"{len(gate.inconclusive)} of {words.plural(total, 'cell')} {_proves(gate.inconclusive)} nothing."
        )
    if gate.accepted:
        count = len(gate.accepted)
        return f"{count} of {words.plural(total, 'cell')} {_verb(gate.accepted)}, which somebody accepted."
    leaking = [cell.name for cell in result.cells if cell.verdict == "leaks"]
    if leaking and gate.policy.strip() == NEVER:
        return (
            f"{len(leaking)} of {words.plural(total, 'cell')} {_verb(leaking)}, which the policy reports and does"
            " not fail."
        )
    defended = sum(cell.defense != "none" for cell in result.cells) if leaking else total
    kind = "defended cell" if leaking else "cell"
    return f"No attack that ran recovered private data in any of {words.plural(defended, kind)}."


def _verb(names: Sequence[object]) -> str:
    return "leaks" if len(names) == 1 else "leak"


def _proves(names: Sequence[str]) -> str:
    return "proves" if len(names) == 1 else "prove"


EXIT_MEANINGS = {
    0: "within the policy: no new leakage, and every cell proves something",
    1: "leakage: at least one cell breaks the policy and nobody accepted it",
    3: "inconclusive: some cells prove nothing, so the sweep cannot be called green",
}


def _target(cell: Cell) -> tuple[str, str]:
    return cell.protocol, cell.defense
