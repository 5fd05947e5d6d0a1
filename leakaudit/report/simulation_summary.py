"""What simulations come to, in words: shared by the pages and the terminal."""

from __future__ import annotations

from collections.abc import Callable

from leakaudit.report import words
from leakaudit.report.simulation_charts import target_text
from leakaudit.simulation_results import (
    ALL,
    ComparedSystem,
    Comparison,
    Estimate,
    QualityValue,
    SimulationResult,
)


def quality_text(result: SimulationResult, quality: QualityValue) -> str:
    """Perplexity where words are predicted, else accuracy."""
    if result.by_perplexity:
        return f"perplexity {words.number(quality.perplexity)}"
    return f"{words.number(100 * quality.accuracy)} % accuracy"


def run_headline(result: SimulationResult) -> str:
    """What the run came to, in one line."""
    reached, last = result.reached, result.last
    if reached is not None:
        return (
            f"{result.system} reached the {target_text(result.limits)} after {words.duration(reached.time)} of"
            " virtual time"
        )
    missed = f", short of the {target_text(result.limits)}" if result.limits.has_target else ""
    return (
        f"{result.system} came to {quality_text(result, last.quality[ALL])} in {words.duration(last.time)} of virtual"
        f" time, {words.plural(last.step, 'step')}{missed}"
    )


def comparison_headline(found: Comparison) -> str:
    """Which system was first, or ended best, and whether the seeds tell it from the next."""
    if found.limits.has_target:
        return _fastest(found)
    if found.first.by_perplexity:
        best, *others = sorted(found.systems, key=lambda s: s.perplexity[ALL].mean)
        text = f"{best.spec} ends at the lowest perplexity, {words.number(best.perplexity[ALL].mean)}"
        return text + _doubt(best.perplexity[ALL], [s.perplexity[ALL] for s in others])
    best, *others = sorted(found.systems, key=lambda s: -s.accuracy[ALL].mean)
    text = f"{best.spec} ends at the highest accuracy, {words.number(100 * best.accuracy[ALL].mean)} %"
    return text + _doubt(best.accuracy[ALL], [s.accuracy[ALL] for s in others])


def _fastest(found: Comparison) -> str:
    arrived = sorted((s for s in found.systems if s.reached == len(found.seeds)), key=lambda s: s.time.mean)
    if not arrived:
        every = " with every seed" if len(found.seeds) > 1 else ""
        return f"No system reached the {target_text(found.limits)}{every}"
    first, *others = arrived
    text = (
        f"{first.spec} is first at the {target_text(found.limits)}, after {words.duration(first.time.mean)}"
    )
    slower = [f"{s.spec} takes {words.number(s.time.mean / first.time.mean)} times as long" for s in others]
    doubt = _doubt(first.time, [other.time for other in others])
    return "; ".join([text, *slower[:3]]) + doubt


def _doubt(best: Estimate, others: list[Estimate]) -> str:
    """A word where the interval of the best meets that of another."""
    return " (the intervals of the seeds overlap)" if any(_meet(best, other) for other in others) else ""


def _meet(one: Estimate, other: Estimate) -> bool:
    """Whether two intervals have a number in common; False where one of them is not known."""
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return False
    return max(one.low, other.low) <= min(one.high, other.high)


def time_text(system: ComparedSystem, seeds: int) -> str:
    """To the target where all seeds reached it, else at the end."""
    text = words.duration(system.time.mean) + _half(system.time, words.duration)
    if system.reached is None or system.reached == seeds:
        return text
    return f"{text}, not reached" if seeds == 1 else f"{text}, reached by {system.reached} of {seeds}"


def number_text(estimate: Estimate, scale: float = 1.0) -> str:
    """With half of its interval."""
    return words.number(scale * estimate.mean) + _half(estimate, lambda half: words.number(scale * half, 2))


def size_text(estimate: Estimate) -> str:
    return words.size(estimate.mean) + _half(estimate, words.size)


def _half(estimate: Estimate, write: Callable[[float], str]) -> str:
    if estimate.low is None or estimate.high is None or estimate.high == estimate.low:
        return ""
    return f" ± {write((estimate.high - estimate.low) / 2)}"
