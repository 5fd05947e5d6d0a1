"""What simulations come to, in words: shared by the pages and the terminal."""

from __future__ import annotations

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
            f"{result.system} reached an {target_text(result.limits)}".replace(
                "an perplexity", "a perplexity"
            )
            + f" after {words.duration(reached.time)} of virtual time"
        )
    missed = f", short of the {target_text(result.limits)}" if result.limits.has_target else ""
    return (
        f"{result.system} came to {quality_text(result, last.quality[ALL])} in {words.duration(last.time)} of virtual"
        f" time, {words.plural(last.step, 'step')}{missed}"
    )


def comparison_headline(found: Comparison) -> str:
    """Which system was first, or ended best; what differs by less than its intervals is not told apart here."""
    seeds = len(found.seeds)
    if found.limits.has_target:
        arrived = sorted((s for s in found.systems if s.reached == seeds), key=lambda s: s.time.mean)
        if not arrived:
            return f"No system reached the {target_text(found.limits)} with every seed"
        first, *others = arrived
        slower = [
            f"{s.spec} takes {words.number(s.time.mean / first.time.mean)} times as long" for s in others
        ]
        text = f"{first.spec} is first at the {target_text(found.limits)}, after {words.duration(first.time.mean)}"
        return "; ".join([text, *slower[:3]])
    if found.first.by_perplexity:
        best = min(found.systems, key=lambda s: s.perplexity[ALL].mean)
        return f"{best.spec} ends at the lowest perplexity, {words.number(best.perplexity[ALL].mean)}"
    best = max(found.systems, key=lambda s: s.accuracy[ALL].mean)
    return f"{best.spec} ends at the highest accuracy, {words.number(100 * best.accuracy[ALL].mean)} %"


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


def _half(estimate: Estimate, write: object) -> str:
    if estimate.low is None or estimate.high is None or estimate.high == estimate.low or not callable(write):
        return ""
    return f" ± {write((estimate.high - estimate.low) / 2)}"
