"""What theory still allows of a target, beside what attacks achieve; the mathematics is in docs/bounds.md.

A *bound* holds for every adversary under the assumptions it names.  An *indicator* says what to expect near
this example and binds nobody: a biased adversary, or one with a better prior, may go below it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from scipy import stats
from torch import Tensor

from leakaudit.attacks.jacobian import Spectrum, System, plan
from leakaudit.attacks.levenberg_marquardt import smoothness_matrix
from leakaudit.attacks.spans import attention_span
from leakaudit.defenses import DPSGD, Defense
from leakaudit.defenses.accounting import check_mechanism, epsilon_spent
from leakaudit.errors import InputError
from leakaudit.formats.phrases import counted, first_line
from leakaudit.models.language import LanguageVictim
from leakaudit.models.spaces import NO_TOKEN
from leakaudit.rounds import Round
from leakaudit.sweep_results import Bound
from leakaudit.threat import UNKNOWN, View

PRIOR = 0.1
"""Probability of the likeliest candidate before anything was seen: one of ten, where nothing better is known."""
CONFIDENCE = 0.99
DRAWS = 100_000
"""Of a Monte Carlo bound, where the number of steps allows; fewer above `WORK` / `DRAWS` steps."""
FEWEST_DRAWS = 2_000
WORK = 20_000_000
MOST_STEPS = 10_000
SMOOTHNESS = 0.1
"""Standard deviation of the difference between neighbours, in pixels of [0, 1], as Levenberg-Marquardt's prior."""
WIDEST = 0.5
"""The largest standard deviation a number in [0, 1] can have (Popoviciu 1935); here of the mean of a channel."""
NOISELESS = 1e-4
"""Noise taken for a tensor without any, as a share of the largest; it keeps the equations finite."""

HAYES = "Hayes, Mahloujifar and Balle 2023, theorem 2 and section 3"
BALLE = "Balle, Cherubin and Hayes 2022"


@dataclass(frozen=True)
class Limits:
    """How much an indicator may cost; beyond, its value is None with the reason.

    Attributes:
        unknowns: pixels of all examples together.
        memory_gb: of the Jacobian and its Gram matrix.
        seconds: for the Jacobian, estimated from its first columns.
    """

    unknowns: int = 4000
    memory_gb: float = 2.0
    seconds: float = 300.0


@dataclass(frozen=True)
class Target:
    """Specs of the protocol and the defense that a bound is about."""

    protocol: str
    defense: str

    def bound(
        self,
        name: str,
        kind: Literal["bound", "indicator"],
        quantity: str,
        value: float | None,
        text: str,
        source: str,
        assumptions: Sequence[str] = (),
        data: Mapping[str, Any] | None = None,
    ) -> Bound:
        """A value that is not finite becomes None."""
        if value is not None and not math.isfinite(value):
            value = None
        return Bound(
            protocol=self.protocol,
            defense=self.defense,
            name=name,
            kind=kind,
            quantity=quantity,
            value=value,
            text=text,
            source=source,
            assumptions=list(assumptions),
            data=dict(data or {}),
        )


def target_bounds(
    view: View,
    x: Tensor,
    y: Tensor,
    defenses: Sequence[tuple[str, Defense]],
    *,
    protocol: str,
    defense: str,
    generator: torch.Generator,
    sample_rate: float = 1.0,
    steps: int = 1,
    delta: float = 1e-5,
    prior: float = PRIOR,
    limits: Limits | None = None,
) -> list[Bound]:
    """All that applies to a target.

    Args:
        view: of an adversary who knows the defenses (`leakaudit.defenses.adapt`).
        x, y: the true model inputs and labels behind the update, at which indicators are evaluated: images
            (N, C, H, W), or token numbers (N, L) for language models, as `View.simulate` takes them.
        defenses: (spec, defense) in the order they are applied.
        protocol, defense: specs, for the labels of the bounds.
        generator: of Monte Carlo and of random probes; on the CPU.
        sample_rate: share of the client's data behind each update of a training, in (0, 1].
        steps: updates of that training.
        delta: of differential privacy.
        prior: probability of the likeliest candidate before anything was seen, in (0, 1).

    DP-SGD gives epsilon and reconstruction robustness, of the one update and of the training; images give
    Cramer-Rao figures where noise is known, rank and condition; language models give rank conditions.
    Raises `InputError` for a value out of range.
    """
    target = Target(protocol, defense)
    private = next((d for _, d in defenses if isinstance(d, DPSGD) and d.noise_multiplier > 0), None)
    found: list[Bound] = []
    if private is not None:
        found += privacy(target, private, view.round, sample_rate, steps, delta, prior, generator)
    if isinstance(view.victim, LanguageVictim):
        return [*found, token_rank(target, view, x, y)]
    return found + local_information(target, view, x, y, generator, limits or Limits())


# ------------------------------------------------------------------ differential privacy


@dataclass(frozen=True)
class Mechanism:
    """Poisson-subsampled Gaussian noise, `steps` times.

    Attributes:
        noise_multiplier: standard deviation of the noise over an example's largest contribution, > 0.
        sample_rate: probability of an example to take part, in (0, 1].
        assumption: how it stands for what the client does.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int
    assumption: str = "every example takes part with the stated probability, independently (Poisson sampling)"


def mechanism(private: DPSGD, round: Round, sample_rate: float, steps: int) -> Mechanism:
    """`steps` updates, each of a share `sample_rate` of the data, as one mechanism.

    Of E noisy local steps that use the same example, each may depend on those before; together they tell at most
    what one Gaussian with the noise divided by sqrt(E) does (Dong, Roth and Su 2022, corollary 3.3, exact for
    Gaussians).  A single Poisson-sampled local step multiplies the two rates; for several, sampling within the update
    is not counted, which only makes the bound weaker.
    """
    if private.poisson and round.local_steps == 1:
        return Mechanism(private.noise_multiplier, sample_rate * private.rate(round), steps)
    uses = max(
        own.local_steps if private.poisson else -(-own.local_steps // -(-own.num_examples // own.batch_size))
        for own in round.each()
    )
    said = f"an example enters {counted(uses, 'noisy step')} of an update at most"
    if sample_rate < 1:
        said += "; the examples of an update are drawn independently at the sample rate (Poisson sampling)"
    return Mechanism(private.noise_multiplier / math.sqrt(uses), sample_rate, steps, said)


def privacy(
    target: Target,
    private: DPSGD,
    round: Round,
    sample_rate: float,
    steps: int,
    delta: float,
    prior: float,
    generator: torch.Generator,
) -> list[Bound]:
    """Epsilon of the training, and reconstruction robustness of one update and of the training."""
    one, whole = mechanism(private, round, 1.0, 1), mechanism(private, round, sample_rate, steps)
    found = [
        dp_epsilon(target, whole, delta),
        reconstruction_robustness(target, one, prior, generator),
    ]
    if whole != one:
        found.append(reconstruction_robustness(target, whole, prior, generator, scope="training"))
    return found


NEIGHBOURS = (
    "neighbouring data differ by one example added or removed, and the divisor of the mean is fixed; replacing an"
    " example is twice as far"
)


def dp_epsilon(target: Target, mechanism: Mechanism, delta: float) -> Bound:
    """Epsilon at `delta`, by `leakaudit.defenses.accounting.epsilon_spent`."""
    epsilon, accountant = epsilon_spent(
        mechanism.noise_multiplier, mechanism.sample_rate, mechanism.steps, delta
    )
    source = {
        "prv": "Gopi, Lee and Wutschitz 2021, by Opacus' PRV accountant",
        "rdp": "Mironov, Talwar and Zhang 2019, by Opacus' RDP accountant",
    }[accountant]
    return target.bound(
        "epsilon",
        "bound",
        "epsilon",
        epsilon,
        f"{counted(mechanism.steps, 'update')} at a sample rate of {mechanism.sample_rate:g} cost an epsilon of"
        f" {epsilon:.3g} at delta {delta:g}.",
        source,
        [mechanism.assumption, NEIGHBOURS],
        {
            "accountant": accountant,
            "delta": delta,
            "steps": mechanism.steps,
            "sample_rate": mechanism.sample_rate,
            "noise_multiplier": mechanism.noise_multiplier,
        },
    )


def reconstruction_robustness(
    target: Target,
    mechanism: Mechanism,
    prior: float,
    generator: torch.Generator,
    scope: Literal["update", "training"] = "update",
) -> Bound:
    """The greatest probability with which any adversary finds the example, by `greatest_success`."""
    success = greatest_success(
        mechanism.noise_multiplier, mechanism.sample_rate, mechanism.steps, prior, generator
    )
    seen = "the update" if scope == "update" else f"all {mechanism.steps:,} updates of a training"
    return target.bound(
        "reconstruction-robustness" if scope == "update" else "reconstruction-robustness-training",
        "bound",
        "probability",
        success.value,
        f"Whoever guesses the example right with probability {prior:g} before does so with probability"
        f" {success.value:.3g} at most after seeing {seen}, knowing all other examples.",
        f"{HAYES}; {BALLE}" + ("" if success.method == "closed form" else f"; {success.method}"),
        [
            mechanism.assumption,
            NEIGHBOURS,
            f"the likeliest candidate, up to what counts as found, has probability {prior:g}",
        ],
        {
            "scope": scope,
            "prior": prior,
            "estimate": success.estimate,
            "confidence": success.confidence,
            "method": success.method,
            "steps": mechanism.steps,
            "sample_rate": mechanism.sample_rate,
            "noise_multiplier": mechanism.noise_multiplier,
        },
    )


@dataclass(frozen=True)
class Success:
    """Attributes:
    value: upper limit of the probability, in [prior, 1].
    estimate: the probability itself, as well as it is known.
    confidence: with which `value` is one; 1 for a closed form.
    """

    value: float
    estimate: float
    confidence: float
    method: str


def greatest_success(
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    prior: float,
    generator: torch.Generator,
    *,
    draws: int | None = None,
    confidence: float = CONFIDENCE,
) -> Success:
    """sup { nu(E) : mu(E) <= prior } of the outputs nu with the example and mu without it (Hayes, Mahloujifar and
    Balle 2023, theorem 2; the blow-up function at the prior).

    mu is N(0, sigma^2) and nu is (1 - q) N(0, sigma^2) + q N(1, sigma^2), in each of `steps` dimensions.  At
    q = 1 it is Phi(Phi^-1(prior) + sqrt(steps) / sigma).  Else the best E is a likelihood-ratio test (Neyman
    and Pearson 1933), found by Monte Carlo.  Deviation from the paper's estimate, for a limit instead of an
    estimate: the threshold is an order statistic of draws from mu, low enough that mu(E) >= prior but for half of
    1 - confidence, and nu(E) is the Clopper-Pearson upper limit (1934) of fresh draws from nu, with the other half.

    Args:
        noise_multiplier: sigma > 0.
        sample_rate: q in (0, 1].
        steps: >= 1.
        prior: in (0, 1).
        draws: of each kind; None for as many as the steps allow, `DRAWS` at most.

    Where there are more than `MOST_STEPS` steps, or where it is smaller, the closed form stands: sampling only helps.
    Raises `InputError` for a value out of range.
    """
    check_mechanism(noise_multiplier, sample_rate, steps)
    if not 0 < prior < 1:
        raise InputError(f"prior={prior}: accepted are probabilities between 0 and 1")
    shift = math.sqrt(steps) / noise_multiplier
    closed = float(stats.norm.cdf(stats.norm.ppf(prior) + shift))
    without = Success(closed, closed, 1.0, "closed form")
    if sample_rate == 1 or (draws is None and steps > MOST_STEPS):
        return without
    draws = draws or min(DRAWS, max(FEWEST_DRAWS, WORK // steps))
    miss = (1 - confidence) / 2
    setting = (noise_multiplier, sample_rate, steps, draws, generator)
    outside = _log_ratios(*setting, present=False).sort(descending=True).values
    inside = _log_ratios(*setting, present=True)
    rank = int(stats.binom.isf(miss, draws, prior)) + 1
    estimate = float((inside >= outside[max(0, math.ceil(prior * draws) - 1)]).double().mean())
    if rank > draws:
        return replace(without, estimate=estimate)
    hits = int((inside >= outside[rank - 1]).sum())
    limit = 1.0 if hits == draws else float(stats.beta.ppf(1 - miss, hits + 1, draws - hits))
    if closed <= limit:
        return replace(without, estimate=min(estimate, closed))
    method = f"Monte Carlo of {draws:,} draws, {confidence:.0%} Clopper-Pearson limit"
    return Success(max(limit, prior), estimate, confidence, method)


def _log_ratios(
    sigma: float, rate: float, steps: int, draws: int, generator: torch.Generator, *, present: bool
) -> Tensor:
    """log nu / mu, (draws,) float64, of outputs drawn from nu when the example is `present`, else from mu."""
    total = torch.zeros(draws, dtype=torch.float64)
    kept = torch.tensor(math.log1p(-rate), dtype=torch.float64)
    for _ in range(steps):
        output = sigma * torch.randn(draws, generator=generator, dtype=torch.float64)
        if present:
            output += torch.rand(draws, generator=generator, dtype=torch.float64) < rate
        total += torch.logaddexp(kept, math.log(rate) + (2 * output - 1) / (2 * sigma**2))
    return total


# ------------------------------------------------------------------ images: what the Jacobian says at the truth

KNOWN = "evaluated at the true input, to first order; the adversary knows the labels and the defense"
CRAMER_RAO = "Hannun, Guo and van der Maaten 2021; Guo et al. 2022; Kay 1993, section 3.8"
VAN_TREES = "van Trees 1968, section 2.4.3; Guo et al. 2022"
RANK = "inverse function theorem; Fan et al. 2020"


class Unaffordable(Exception):
    """The Jacobian would cost too much, or cannot be had; the message says why."""


@dataclass(frozen=True)
class Equations:
    """The system at the truth.

    Attributes:
        columns: weighted Jacobian, (m, n) float64, in model-input units.
        noisy: whether it is divided by the noise's standard deviation, else by the rms of each tensor.
    """

    system: System
    columns: Tensor
    noisy: bool

    @classmethod
    def of(cls, view: View, x: Tensor, y: Tensor, generator: torch.Generator, limits: Limits) -> Equations:
        """Raises `Unaffordable`."""
        if view.unknowns > limits.unknowns:
            raise Unaffordable(f"{view.unknowns:,} unknowns are more than the limit of {limits.unknowns:,}")
        spread = noise_of(view)
        view = replace(view.to(dtype=torch.float64), knowledge=replace(view.knowledge, scale=UNKNOWN))
        x = x.to(view.victim.device, torch.float64)
        y = y.to(view.victim.device, torch.float64 if y.is_floating_point() else None)
        # around the undisturbed update the compression of fully connected layers loses nothing, to first order
        view = replace(view, observed=view.simulate(x, y).detach())
        limit = view.observed.numel() if spread else 4 * view.unknowns
        planned = plan(view, limit)
        size = planned.gigabytes(view.unknowns)
        if size > limits.memory_gb:
            raise Unaffordable(
                f"a Jacobian of {planned.equations:,} equations in {view.unknowns:,} unknowns takes {size:.1f} GB,"
                f" more than {limits.memory_gb:g}"
            )
        weights = {name: 1 / spread[name] for name in view.observed} if spread else None
        system = System.of(view, y, generator, limit, weights)
        point = system.point(x)
        expected = system.seconds(point)
        if expected > limits.seconds:
            raise Unaffordable(
                f"its Jacobian would take about {expected:.0f} s, more than {limits.seconds:g}"
            )
        return cls(system, system.jacobian(point), bool(spread))

    def spectrum(self) -> Spectrum:
        """Per pixel of [0, 1]."""
        return Spectrum.of(self.columns / self.system.pixel_scale)

    def bayesian_error(self) -> float:
        """Mean over pixels of the posterior variance, in pixels of [0, 1], under the prior of `docs/bounds.md`."""
        count = self.system.view.round.num_examples
        channels, height, width = self.system.view.victim.space.shape
        one = smoothness_matrix(self.system, SMOOTHNESS)
        scale = self.system.pixel_scale
        means = torch.kron(torch.eye(count * channels).to(one), one.new_full((1, height * width), 1.0))
        means = means * scale / (height * width * WIDEST)
        prior = torch.kron(torch.eye(count).to(one), one) + means.T @ means
        information = self.columns.T @ self.columns + prior
        covariance = torch.cholesky_inverse(torch.linalg.cholesky(information))
        return float((covariance.diagonal() * scale.square()).mean())


def noise_of(view: View) -> dict[str, float]:
    """Standard deviation of the noise on every shared tensor, all above 0; empty where none is known.

    Tensors without noise among noisy ones get `NOISELESS` times the largest.
    """
    spread = dict(view.spread) or dict.fromkeys(view.observed, float(view.knowledge.noise_std.value or 0.0))
    largest = max((float(spread.get(name, 0.0)) for name in view.observed), default=0.0)
    if largest <= 0 or view.slack is not None:
        return {}
    return {name: max(float(spread.get(name, 0.0)), NOISELESS * largest) for name in view.observed}


def local_information(
    target: Target, view: View, x: Tensor, y: Tensor, generator: torch.Generator, limits: Limits
) -> list[Bound]:
    """Cramer-Rao figures where noise is known, rank and condition of the Jacobian; all indicators."""
    noisy = bool(noise_of(view))
    try:
        equations = Equations.of(view, x, y, generator, limits)
        spectrum = equations.spectrum()
        error = equations.bayesian_error() if noisy else None
    except (Unaffordable, RuntimeError, NotImplementedError) as failure:  # a defense may have no derivative
        return _unknown(target, view, first_line(failure), noisy)
    found = []
    if error is not None:
        found += [cramer_rao(target, spectrum), bayesian(target, error)]
    return [*found, rank(target, spectrum, view), condition(target, spectrum, noisy)]


def _unknown(target: Target, view: View, reason: str, noisy: bool) -> list[Bound]:
    text = f"Not computed: {reason}."
    found = [rank(target, None, view, text)]
    if noisy:
        found.append(target.bound("cramer-rao", "indicator", "mse", None, text, CRAMER_RAO))
        found.append(target.bound("bayesian-cramer-rao", "indicator", "mse", None, text, VAN_TREES))
    return found


def decibels(mse: float) -> float:
    """Peak signal-to-noise ratio of pixels in [0, 1], dB."""
    return -10 * math.log10(mse)


def cramer_rao(target: Target, spectrum: Spectrum) -> Bound:
    """tr((J^T S^-1 J)^-1) / n, from the spectrum of the Jacobian whose rows are divided by the noise."""
    if not spectrum.full_rank:
        value, text = (
            None,
            (
                f"The update leaves {spectrum.unknowns - spectrum.rank:,} of {spectrum.unknowns:,} dimensions open, in"
                " which no unbiased adversary has a finite error."
            ),
        )
    else:
        value = spectrum.inverse_squares / spectrum.unknowns
        text = (
            f"Near this picture no unbiased adversary has a mean squared error below {value:.2g} a pixel"
            f" ({decibels(value):.1f} dB) on average over the noise."
        )
    return target.bound(
        "cramer-rao",
        "indicator",
        "mse",
        value,
        text,
        CRAMER_RAO,
        [KNOWN, "unbiased adversaries only: one with a prior may be better", GAUSSIAN],
        {"rank": spectrum.rank, "unknowns": spectrum.unknowns, "equations": spectrum.equations},
    )


GAUSSIAN = "the noise is Gaussian and independent; of Laplace noise of this deviation the figure is half"


def bayesian(target: Target, error: float) -> Bound:
    """tr((J^T S^-1 J + P)^-1) / n of a Gaussian prior with precision P."""
    return target.bound(
        "bayesian-cramer-rao",
        "indicator",
        "mse",
        error,
        f"An adversary who expects smooth pictures comes to a mean squared error of about {error:.2g} a pixel"
        f" ({decibels(error):.1f} dB) at best, on average over the noise.",
        VAN_TREES,
        [
            KNOWN,
            GAUSSIAN,
            f"Gaussian prior: neighbouring pixels differ by {SMOOTHNESS:g}, the mean of a channel from grey by"
            f" {WIDEST:g} (standard deviations); an adversary with a better prior may be better",
            "the information at the true input stands for its mean over the prior",
        ],
        {"smoothness": SMOOTHNESS, "deviation": WIDEST, "psnr": decibels(error)},
    )


def rank(target: Target, spectrum: Spectrum | None, view: View, reason: str = "") -> Bound:
    """How many dimensions the update leaves open; counted where the Jacobian is not at hand."""
    unknowns, numbers = view.unknowns, view.observed.numel()
    data: dict[str, Any] = {"unknowns": unknowns, "numbers": numbers}
    if spectrum is not None:
        left: int | None = unknowns - spectrum.rank
        data |= {"rank": spectrum.rank, "equations": spectrum.equations}
        text = f"The update of {numbers:,} numbers fixes {spectrum.rank:,} of {unknowns:,} unknowns" + (
            " to first order: locally nothing is hidden." if left == 0 else f" and leaves {left:,} open."
        )
    else:
        left = max(unknowns - numbers, 0) or None
        text = (
            reason
            if left is None
            else f"{numbers:,} numbers leave at least {left:,} of {unknowns:,} open. {reason}"
        )
    return target.bound("rank", "indicator", "unknowns-left", left, text, RANK, [KNOWN, "noise aside"], data)


def condition(target: Target, spectrum: Spectrum, noisy: bool) -> Bound:
    """Largest over smallest singular value per pixel."""
    units = "its noise" if noisy else "the rms of its tensor"
    value = spectrum.condition if spectrum.full_rank else None
    said = "is infinite: some directions leave no trace" if value is None else f"is {value:.2g}"
    return target.bound(
        "condition",
        "indicator",
        "condition",
        value,
        f"The condition number of the map from pixels to the update, each number in units of {units}, {said}.",
        "Golub and Van Loan 2013, section 2.6",
        [KNOWN],
        {"largest": spectrum.largest, "smallest": spectrum.smallest},
    )


# ------------------------------------------------------------------ text


def token_rank(target: Target, view: View, x: Tensor, y: Tensor) -> Bound:
    """Dimensions of the first attention layer that its inputs leave free, without noise: above 0, every token can
    be tested for membership (DAGER)."""
    victim = view.victim
    assert isinstance(victim, LanguageVictim)
    tokens = int((x != NO_TOKEN).sum())
    span = None
    if victim.architecture is not None:
        span = attention_span(victim, view.simulate(x, y).detach(), 0)
    value, data = None, {"tokens": tokens}
    if span is None:
        text = "Not computed: the first attention layer was not shared, or the architecture is not known."
    else:
        value = span.width - span.rank
        data |= {"rank": span.rank, "width": span.width}
        text = (
            f"{counted(tokens, 'token')} give the first attention layer's gradient a rank of {span.rank} of"
            + (
                f" {span.width}: {value} dimensions are free, so any token can be tested for membership."
                if value
                else f" {span.width}: no dimension is free, and nothing can be tested by spans."
            )
        )
    return target.bound(
        "token-rank",
        "indicator",
        "free-dimensions",
        value,
        text,
        "Petrov et al. 2024 (DAGER), section 4",
        ["noise aside, which hides the smallest directions first"],
        data,
    )
