"""What a reconstruction proves without the truth.

The update of the reconstruction x is simulated again and compared with the
observed one.  With residual r = g(x) - g*, where g* = g(x_true) + e and |e| is at most the
floor, first-order expansion gives J (x_true - x) = -(r + e), so every nearby solution lies within

    |x_true - x| <= (|r| + floor) / s,    s the smallest singular value of J.

This is a local, first-order bound: it says nothing about solutions far away, the
Jacobian of a ReLU network holds only while no activation changes sign, and an
update does not tell the order of the batch, so "the" solution is one up to permutation.
The bound is dropped when the update along the weakest direction departs from its
linear prediction at that distance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from leakaudit.attacks.disturbance import errors_of
from leakaudit.attacks.head import rms, storage_precision
from leakaudit.attacks.jacobian import Spectrum, System
from leakaudit.formats.phrases import first_line
from leakaudit.randomness import fork
from leakaudit.results import Verification
from leakaudit.threat import View
from leakaudit.update import Update

ROUNDING_SLACK = 4.0
OWN_PRECISION = 1e-12
INFORMATIVE = 0.05
UNRELATED = 0.25
"""Standard deviation of a pixel of [0, 1] over unrelated photographs."""
LINEAR = 0.5
LEVELS = 4096
FLOPS = {"cpu": 1e10}
FLOPS_ELSEWHERE = 5e11


@dataclass(frozen=True)
class Budget:
    """What a verification may cost.

    Attributes:
        unknowns: largest number of unknowns for which the Jacobian is formed.
        gigabytes: largest Jacobian with its Gram matrix.
        seconds: longest estimated time, judged by timing a few columns.
    """

    unknowns: int = 13_000
    gigabytes: float = 4.0
    seconds: float = 120.0


@dataclass(frozen=True)
class Floor:
    """The error that an honest update carries.

    Attributes:
        rms: error of one number of each tensor, root mean square.
        norm: bound on the error's length over all tensors, in units of the update.
        source: where it comes from, for the reader.
    """

    rms: dict[str, float]
    norm: float
    source: str


def verify(view: View, x: Tensor, y: Tensor, budget: Budget | None = None) -> Verification:
    """Compare the update of (x, y) with the observed one, and bound how far a true solution can be.

    Args:
        x: (N, C, H, W) model inputs.
        y: (N,) integers or (N, K) probabilities, taken as given.
        budget: when to leave the Jacobian out; the reason is in the result.

    In the result `residual` and `floor` are relative to the norm of the observed update; singular
    values are those of the Jacobian with every equation divided by its expected error, per pixel in
    units of [0, 1]; `distance` is the root mean square over all pixels in the same units (of
    model inputs when the normalisation is unknown).
    """
    exact = view.to(dtype=torch.float64)
    x = x.detach().to(exact.victim.device, torch.float64)
    y = y.detach().to(exact.victim.device, torch.float64 if y.is_floating_point() else None)
    found, floor = compare(view, exact, x, y, view.unknowns)
    if not found.residual <= found.floor:
        return found
    if _explained_by_grey(exact, y, found.floor):
        reason = "a plain grey picture explains it as well, so a match tells nothing"
        return _consistent(found.model_copy(update={"left_open": 1.0}), floor, reason)
    budget = budget or Budget()
    if view.unknowns > budget.unknowns:
        reason = f"{view.unknowns:,} unknowns, more than the limit of {budget.unknowns:,} for a Jacobian"
        return _consistent(found, floor, reason)
    system, dear = _affordable(exact, x, y, floor, budget)
    return _consistent(found, floor, dear) if dear else _bound(found, system, system.point(x), floor)


def compare(view: View, exact: View, x: Tensor, y: Tensor, unknowns: int) -> tuple[Verification, Floor]:
    """Residual and floor of (x, y), both relative, as what is not matched yet; `exact` is the view in float64."""
    residual = exact.residual(x, y)
    floor = expected_error(view, x, y)
    relative = floor.norm / float(exact.observed.norm())
    found = Verification(
        status="not-matched",
        text=f"its update differs from the observed one by {residual:.1e} of its norm; "
        f"{floor.source} explains {relative:.1e}",
        residual=residual,
        floor=relative,
        unknowns=unknowns,
    )
    return found, floor


def expected_error(view: View, x: Tensor, y: Tensor) -> Floor:
    """How far the observed update may be from the exact one of the true data.

    Known noise, or known rounding taken for noise; else visible quantisation; else rounding: the
    difference between float32 and float64 simulations at (x, y), scaled to the precision the numbers are
    stored in, and what the file's own rounding (`View.rounding`, of a difference of checkpoints) adds;
    times 4, since the client rounded differently.
    """
    known = errors_of(view)
    if known:
        norm, fourth = (
            sum(error**power * view.observed[name].numel() for name, error in known.items()) ** (1 / power)
            for power in (2, 4)
        )
        spread = (
            1 + 3 / math.sqrt(2) * (fourth / norm) ** 2
        )  # |noise| concentrates: three standard deviations
        return Floor(known, spread * norm, "known rounding" if _only_rounded(view) else "known noise")
    steps = {name: quantisation_step(tensor) for name, tensor in view.observed.items()}
    rounding = _rounding(view, x, y)
    errors = {name: max(rounding[name], steps[name] / 2) for name in rounding}
    norm, coarse = (
        math.sqrt(sum(value**2 * view.observed[name].numel() for name, value in part.items()))
        for part in (errors, {name: step / 2 for name, step in steps.items()})
    )
    return Floor(errors, norm, "quantisation" if coarse > 0.7 * norm else "rounding")


def _only_rounded(view: View) -> bool:
    return view.slack is not None and not view.knowledge.noise_std.value


def _explained_by_grey(exact: View, y: Tensor, floor: float) -> bool:
    """Whether a grey picture of the same labels has an update within the floor too: then anything has."""
    space = exact.victim.space
    grey = space.encode(torch.full((exact.round.num_examples, *space.shape), 0.5, dtype=torch.float64))
    return exact.residual(grey.to(exact.victim.device), y) <= floor


def quantisation_step(tensor: Tensor) -> float:
    """Distance of the levels when the numbers lie on few, evenly spaced ones; else 0."""
    flat = tensor.detach().reshape(-1)
    few = flat[flat != 0][: 8 * LEVELS]
    if len(torch.unique(few)) > LEVELS:  # spares sorting the millions of numbers of a large tensor
        return 0.0
    levels: Tensor = torch.unique(tensor.detach().double())
    if not 3 <= len(levels) <= min(LEVELS, tensor.numel() // 4):
        return 0.0
    step = float(levels.diff().min())
    position = (levels - levels[0]) / step
    return step if float((position - position.round()).abs().max()) < 1e-2 else 0.0


def _rounding(view: View, x: Tensor, y: Tensor) -> dict[str, float]:
    single, double = (
        _simulate(view.to(dtype=dtype), x, y, dtype) for dtype in (torch.float32, torch.float64)
    )
    eps32 = torch.finfo(torch.float32).eps
    errors: dict[str, float] = {}
    for name, observed in view.observed.items():
        eps = storage_precision(observed)
        size = rms(double[name])
        measured = rms(single[name].double() - double[name])
        coarse = eps * size if eps > eps32 else 0.0
        errors[name] = ROUNDING_SLACK * max(measured * min(1.0, eps / eps32), coarse, OWN_PRECISION * size)
    stored_as_weights = ROUNDING_SLACK * view.rounding * rms(view.observed.flat())
    least = max(stored_as_weights, max(errors.values()) * 1e-6)
    return {name: max(value, least) for name, value in errors.items()}


def _simulate(view: View, x: Tensor, y: Tensor, dtype: torch.dtype) -> Update:
    x, y = (tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in (x, y))
    update = view.simulate(x, y).detach()
    if not view.scale_free:
        return update
    return update * (float(view.observed.norm()) / float(update.norm()))


def _affordable(view: View, x: Tensor, y: Tensor, floor: Floor, budget: Budget) -> tuple[System, str]:
    """The equations to bound the distance with, and why not even those can be, or an empty string.

    Under known noise all of them, where that can be afforded, since each one counts.
    """
    weights = {name: 1 / error for name, error in floor.rms.items()}
    noisy = bool(errors_of(view))
    for limit in (view.observed.numel(), None) if noisy else (None,):
        system = System.of(view, y, fork(0, "verification"), limit, weights)
        dear = _too_dear(system, system.point(x), budget)
        if not dear:
            break
    return system, dear


def _too_dear(system: System, point: Tensor, budget: Budget) -> str:
    """Why the Jacobian is not formed, or an empty string."""
    if system.bytes > budget.gigabytes * 1e9:
        return (
            f"the Jacobian takes {system.bytes / 1e9:.1f} GB, more than the limit of {budget.gigabytes:g} GB"
        )
    try:
        seconds = _seconds(system, point)
    except RuntimeError as error:
        return f"the Jacobian cannot be computed: {first_line(error)}"
    if seconds > budget.seconds:
        return f"the Jacobian takes about {seconds:.0f} s, more than the limit of {budget.seconds:g} s"
    return ""


def _seconds(system: System, point: Tensor) -> float:
    """Estimate from the time of one chunk of columns and the operation count of what follows."""
    short, long = sorted((system.unknowns, len(system.target)))
    operations = 2 * short * short * long + 4 * short**3
    return system.seconds(point) + operations / FLOPS.get(system.target.device.type, FLOPS_ELSEWHERE)


def _bound(found: Verification, system: System, point: Tensor, floor: Floor) -> Verification:
    """Singular values at `point`, the Cramer-Rao figure and the distance they allow."""
    std = system.pixel_scale
    columns = system.jacobian(point) / std
    spectrum = Spectrum.of(columns)
    error = math.sqrt(system.view.observed.numel()) / system.unit
    length = (
        (float(system.residual(point).norm()) + error) / spectrum.smallest if spectrum.smallest else math.inf
    )
    distance = length / math.sqrt(spectrum.unknowns)
    found = found.model_copy(
        update={
            "smallest_singular_value": spectrum.smallest,
            "largest_singular_value": spectrum.largest,
            "rank": spectrum.rank,
            "equations": spectrum.equations,
            "distance": distance if spectrum.full_rank else None,
            "cramer_rao": system.cramer_rao(spectrum) if spectrum.full_rank else None,
            "left_open": spectrum.left_open(UNRELATED * system.unit),
        }
    )
    if spectrum.weakest is None:
        return _consistent(
            found,
            floor,
            f"the Jacobian has rank {spectrum.rank:,} of {spectrum.unknowns:,}, so "
            f"{spectrum.unknowns - spectrum.rank:,} directions can change without changing the update",
        )
    if distance > INFORMATIVE:
        reason = f"{floor.source} allows a distance of {distance:.1e} of the pixel range"
        return _consistent(found, floor, f"condition {spectrum.condition:.1e}: {reason}")
    step = length * spectrum.weakest
    departure = _departure(system, point, (step / std).view(point.shape), columns @ step)
    if departure > LINEAR:
        reason = f"over a distance of {distance:.1e} the update is not linear (off by {departure:.0%})"
        return _consistent(found, floor, reason)
    unit = "pixel" if system.view.victim.space.std is not None else "input number (normalisation unknown)"
    text = (
        f"{matches(found, floor)}, and the Jacobian has full rank ({spectrum.unknowns:,}, "
        f"condition {spectrum.condition:.1e}): every nearby input with this update and these labels "
        f"lies within {distance:.1e} RMS per {unit} (first order, up to the order of the batch)"
    )
    return found.model_copy(update={"status": "verified", "text": text})


def _departure(system: System, point: Tensor, step: Tensor, predicted: Tensor) -> float:
    """Relative departure of the update from its linear prediction at `point` plus and minus `step`."""
    with torch.no_grad():
        here = system.predict(point)
        errors = [(system.predict(point + sign * step) - here - sign * predicted).norm() for sign in (1, -1)]
    return float(max(errors) / predicted.norm())


def _consistent(found: Verification, floor: Floor, reason: str) -> Verification:
    text = f"{matches(found, floor)}, but other inputs may share it: {reason}"
    return found.model_copy(update={"status": "consistent", "text": text, "reason": reason})


def matches(found: Verification, floor: Floor) -> str:
    return (
        f"its update equals the observed one up to {found.residual:.1e} of its norm, "
        f"within the {found.floor:.1e} that {floor.source} explains"
    )
