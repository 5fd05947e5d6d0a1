"""What a page and a terminal say of a `LeakageResult`, in words and numbers."""

from __future__ import annotations

from typing import Literal

from leakaudit.leakage_results import LeakageResult, LeakageRow
from leakaudit.report import words
from leakaudit.results import Score

State = Literal["leaks", "not-recovered", "inconclusive", "failed", "interrupted", "pending", "no-update"]

EXIT_MEANINGS = {
    0: "nothing above the policy",
    1: "a party can reconstruct private data above the policy",
    3: "inconclusive: at least one view was not judged",
}
FIRST_SCORES = ("psnr", "ssim", "token-accuracy", "rouge-l")
MOST_SCORES = 2


def state_of(row: LeakageRow) -> State:
    """How a row ended: the verdict of its audit, or why there is none."""
    if row.status == "done" and row.verdict is not None:
        return row.verdict
    return "leaks" if row.verdict == "leaks" else row.status if row.status != "done" else "inconclusive"


def headline(result: LeakageResult) -> str:
    """One sentence on all rows."""
    attacked = [row for row in result.rows if row.attacked]
    if not attacked:
        return "No view holds an update to attack."
    leaking = sum(row.verdict == "leaks" for row in attacked)
    many = words.plural(len(attacked), "attacked view")
    if not leaking:
        judged = sum(row.verdict == "not-recovered" for row in attacked)
        if judged < len(attacked):
            return (
                f"{len(attacked) - judged} of {many} could not be judged: whether private data leaks is open."
            )
        return (
            f"None of {many} was reconstructed."
            if len(attacked) > 1
            else "The attacked view was not reconstructed."
        )
    return f"{leaking} of {many} {'gives' if leaking == 1 else 'give'} private data away."


def seen(row: LeakageRow) -> str:
    """What the view is made of: `3 clients, 12 examples, 2 steps stale`."""
    if row.view is None:
        return "sizes and times"
    if not row.clients:
        return "no client's update"
    parts = [words.plural(row.clients, "client"), words.plural(row.examples, "example")]
    parts += [f"{words.plural(row.staleness, 'step')} stale"] if row.staleness else []
    return ", ".join([*parts, *([] if row.exact else ["and more"])])


def scores_of(row: LeakageRow) -> list[Score]:
    """The measured scores most worth showing."""
    measured = [score for score in row.scores if score.value is not None]
    preferred = [score for name in FIRST_SCORES for score in measured if score.metric == name]
    return (preferred or measured)[:MOST_SCORES]


def what_happened(row: LeakageRow) -> list[str]:
    """What came of the row, in sentences."""
    said = [row.headline] if row.headline else []
    said += row.reasons + row.inferred
    return [*said, f"{row.error}."] if row.error else said
