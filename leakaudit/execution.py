"""Running attacks: one after the other, restart by restart, within a budget.  No truth here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from leakaudit.attacks.base import Monitor, OnStep, Reconstruction
from leakaudit.attacks.compiling import EAGER, Compiler
from leakaudit.attacks.disturbance import errors_of
from leakaudit.attacks.registry import ATTACKS, AUTO, EXACT, MAXIMUM_A_POSTERIORI, medium_of_attack
from leakaudit.attempts import AttemptStore
from leakaudit.errors import InputError
from leakaudit.formats.phrases import first_line
from leakaudit.media import MediumName, medium_of
from leakaudit.outcomes import MATCHED, Chosen, Measured, Outcome
from leakaudit.randomness import fork
from leakaudit.results import Skipped
from leakaudit.spec import format_spec, parse
from leakaudit.threat import View

OnProgress = Callable[[str, int, int, float], None]
"""Called with (what is running, iteration, total, loss)."""


OUT_OF_TIME = "the time budget was used up"
"""Why an attack that applies was not begun."""


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        attacks: specs, or "auto": everything that applies, from cheap to dear, until the update is explained.
        seed: of every random start.
        budget: seconds for all attacks together, None for no limit.  Trying out what the manifest does
            not say gets at most a third of it, an attack at most half of what is left then, the
            last all of it.
        restarts: of every attack; None for its own number, ending at the first match.
    """

    attacks: tuple[str, ...] = ("auto",)
    seed: int = 0
    budget: float | None = None
    restarts: int | None = None


def choose(specs: tuple[str, ...], auto: Sequence[str] = AUTO) -> Iterator[Chosen]:
    """The attacks that `specs` name, in their order, "auto" spelt out.  `InputError` for an unknown one."""
    for spec in specs:
        if spec == "auto":
            for name in auto:
                yield Chosen(name, name, ATTACKS[name], automatic=True)
        else:
            attack = parse(spec, ATTACKS, "attack")
            name = spec.partition(":")[0].strip()
            yield Chosen(name, format_spec(name, attack, ATTACKS[name]), attack, automatic=False)


def run_attacks(
    view: View,
    plan: Plan,
    store_folder: Path,
    on_progress: OnProgress | None = None,
    compiler: Compiler | None = None,
) -> tuple[list[Outcome], list[Skipped]]:
    """Run the plan; Ctrl-C keeps the best candidate of the attack in progress and ends the run.

    `compiler` keeps what it compiles for the next runs; None for a new one.
    """
    compiler = compiler or Compiler.of()
    medium = medium_of(view.victim)
    chosen = list(choose(plan.attacks, medium.auto))
    deadline = None if plan.budget is None else time.monotonic() + plan.budget
    outcomes: list[Outcome] = []
    skipped: list[Skipped] = []
    for position, entry in enumerate(chosen):
        reason = (
            _foreign(entry, medium.name)
            or entry.attack.applies(view)
            or _needless(entry, outcomes, deadline, disturbed=bool(errors_of(view)))
        )
        if reason is not None:
            skipped.append(Skipped(attack=entry.name, reason=reason))
            continue
        store = AttemptStore(store_folder, view, entry.spec, plan.seed)
        end = _share(deadline, len(chosen) - position)
        outcomes.append(_run(entry, view, plan, store, end, on_progress, compiler))
        if outcomes[-1].status == "interrupted":
            rest = chosen[position + 1 :]
            skipped += [Skipped(attack=later.name, reason="interrupted before it began") for later in rest]
            break
    return outcomes, skipped


def _foreign(entry: Chosen, medium: MediumName) -> str | None:
    own = medium_of_attack(entry.name)
    return None if own == medium else f"it reconstructs {own}, this model takes {medium}"


def _needless(
    entry: Chosen, outcomes: list[Outcome], deadline: float | None, disturbed: bool = False
) -> str | None:
    """Why an attack that only `auto` asked for need not run, or None.

    Under errors of known size many inputs match, and the one that weighs them against a prior still gains.
    """
    if not entry.automatic or (disturbed and entry.name in MAXIMUM_A_POSTERIORI and not _late(deadline)):
        return None
    for outcome in outcomes:
        check = outcome.verification
        if outcome.proven:
            return (
                f"{outcome.chosen.name} already explains every row of the embeddings, which proves its text"
            )
        if check is not None and check.status == "verified":
            return f"{outcome.chosen.name} already explains the update to its floor, and uniquely"
        deficient = check is not None and check.rank is not None
        if check is not None and check.status == "consistent" and (entry.name in EXACT or not deficient):
            return f"{outcome.chosen.name} already explains the update to its floor"
    return OUT_OF_TIME if _late(deadline) else None


def _late(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() > deadline


def _share(deadline: float | None, left: int) -> float | None:
    if deadline is None:
        return None
    now = time.monotonic()
    return now + max(0.0, deadline - now) / min(left, 2)


def _run(
    entry: Chosen,
    view: View,
    plan: Plan,
    store: AttemptStore,
    deadline: float | None,
    on_progress: OnProgress | None,
    compiler: Compiler,
) -> Outcome:
    began = time.monotonic()
    attempts: list[Measured] = []
    reason, interrupted = "", False
    for restart in range(plan.restarts or entry.attack.restarts):
        label = f"{entry.name}, start {restart + 1}"
        try:
            kept = store.get(restart) or _attempt(
                entry, view, plan.seed, restart, deadline, progress(on_progress, label), compiler
            )
        except KeyboardInterrupt:
            interrupted = True
            break
        except (RuntimeError, ArithmeticError, InputError) as error:
            reason = first_line(error)
            continue
        found, seconds = kept
        interrupted = found.stopped == "interrupted"
        if found.stopped not in ("interrupted", "budget"):
            store.put(restart, found, seconds)
        attempts.append(Measured(restart, found, view.residual(found.x, found.y), seconds))
        late = deadline is not None and time.monotonic() > deadline
        if interrupted or late or (plan.restarts is None and attempts[-1].residual < MATCHED):
            break
    best = min(attempts, key=lambda attempt: attempt.residual, default=None)
    check = None
    try:
        check = None if best is None else medium_of(view.victim).verify(view, best.found.x, best.found.y)
    except KeyboardInterrupt:
        interrupted = True
    if interrupted:
        reason = (
            "interrupted; the best candidate so far is kept" if best else "interrupted before the first step"
        )
    return Outcome(
        chosen=entry,
        attempts=tuple(attempts),
        status="interrupted" if interrupted else "done" if best else "failed",
        reason=reason,
        seconds=time.monotonic() - began,
        verification=check,
    )


def _attempt(
    entry: Chosen,
    view: View,
    seed: int,
    restart: int,
    deadline: float | None,
    on_step: OnStep | None,
    compiler: Compiler,
) -> tuple[Reconstruction, float]:
    monitor = Monitor(on_step, deadline, compiler=compiler)
    compiler.begin()
    generator = fork(seed, f"{entry.name}/{restart}", view.victim.device)
    began = time.monotonic()
    try:
        found = entry.attack.run(view, generator, monitor)
    except KeyboardInterrupt:
        if monitor.best_x is None:
            raise
        found = monitor.result(stopped="interrupted")
    if compiler.step != EAGER:
        found = replace(found, details={**found.details, "step": compiler.step})
    return found, time.monotonic() - began


def progress(on_progress: OnProgress | None, label: str) -> OnStep | None:
    """A monitor's callback that reports under `label`."""
    if on_progress is None:
        return None
    return lambda iteration, total, loss: on_progress(label, iteration, total, loss)
