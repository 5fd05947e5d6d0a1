"""Clipped gradients of single examples, and DP-SGD, by Opacus.

The client's SGD itself changes, so these replace the client rather than decorate it: they must come first
in a chain.  Opacus computes the gradient of every example (`GradSampleModule`), clips each, adds them up,
adds noise and divides by the batch size asked for (`DPOptimizer`).
"""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor, nn

from leakaudit.defenses.accounting import epsilon_spent
from leakaudit.defenses.base import Defense
from leakaudit.errors import InputError
from leakaudit.formats.phrases import first_line
from leakaudit.models.language import LanguageVictim
from leakaudit.models.victim import Params, Victim, cross_entropy_sum
from leakaudit.rounds import (
    ClientUpdate,
    Round,
    client_update,
    local_sum,
    mean_update,
    parameter_gradient,
)
from leakaudit.threat import View, known
from leakaudit.update import Update

STABILITY = 1e-6
"""Opacus clips by bound / (length + this)."""
AGREES = 1e-3
"""Relative difference allowed between the mean of Opacus' per-example gradients and the gradient itself."""
ACTIVE = 1 - 1e-3
"""Share of the bound from which on a single example's gradient counts as clipped."""


@dataclass(frozen=True)
class ClipExamples(Defense):
    """Every example's gradient is scaled down to `max_grad_norm` when it is longer, over all tensors together
    (flat clipping; Abadi et al. 2016, algorithm 1 without its noise).  It guarantees nothing by itself.

    The mean is over the batch size of the round, also for the short last batch of a pass (as in Opacus).

    Attributes:
        max_grad_norm: > 0, in units of the gradient of one example's loss.
    """

    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        _require_bound(self.max_grad_norm)

    def wrap(self, client: ClientUpdate, generator: torch.Generator) -> ClientUpdate:
        _require_first(client, "clip-examples")
        return private_client(DPSGD(noise_multiplier=0.0, max_grad_norm=self.max_grad_norm), generator)

    def adapt(self, view: View) -> View:
        return _adapt(view, self.max_grad_norm, 0.0, "clip-examples")


@dataclass(frozen=True)
class DPSGD(Defense):
    """DP-SGD (Abadi et al. 2016, algorithm 1) for one local step, or for every step of several (DP-FedAvg
    with example-level noise): the update is the sum of the noisy mean gradients.

    Noise of standard deviation noise_multiplier * max_grad_norm is added to the sum of clipped gradients,
    which is then divided by the expected batch size B (for a loss that sums over the batch it is not).

    With `poisson`, every local step draws each of the client's own examples independently with probability
    `sample_rate`, by Opacus' `UniformWithReplacementSampler`, and B is sample_rate times their number.  So which of
    the examples took part in one captured update is random, and it may be none: then it is noise only.
    The truth of a capture lists all of them.  Without, batches follow one after the other as the round says.

    Attributes:
        noise_multiplier: >= 0; standard deviation of the noise in units of max_grad_norm.
        max_grad_norm: > 0, in units of the gradient of one example's loss.
        poisson: sample each local batch at random.
        sample_rate: in (0, 1], for `poisson` only; None for batch size / own examples of the round.
    """

    noise_multiplier: float = 1.0
    max_grad_norm: float = 1.0
    poisson: bool = False
    sample_rate: float | None = None

    def __post_init__(self) -> None:
        _require_bound(self.max_grad_norm)
        if not 0 <= self.noise_multiplier < math.inf:
            raise ValueError(f"noise_multiplier must be at least 0 and finite, got {self.noise_multiplier}")
        if self.sample_rate is not None and not self.poisson:
            raise ValueError(f"sample_rate needs poisson=true, got {self.sample_rate}")
        if self.sample_rate is not None and not 0 < self.sample_rate <= 1:
            raise ValueError(f"sample_rate must be in (0, 1], got {self.sample_rate}")

    def poisson_rate(self, round: Round) -> float | None:
        return self.rate(round) if self.poisson else None

    def rate(self, round: Round) -> float:
        """With `poisson`, the probability of an example to take part in a local step; else the share of one.

        Of several clients the largest, that of the one with fewest examples.
        """
        return self.sample_rate or max(own.batch_size / own.num_examples for own in round.each())

    def expected_batch(self, round: Round) -> float:
        return self.rate(round) * round.own_examples

    def noise_std(self, round: Round, victim: Victim) -> float:
        """Standard deviation of the noise on each number of the update: of all steps, after the sum over clients."""
        mean = _reduction(victim) == "mean"
        variance = sum(
            weight**2 * own.local_steps / (self.expected_batch(own) if mean else 1.0) ** 2
            for weight, own in zip(round.each_weight(), round.each(), strict=True)
        )
        return self.noise_multiplier * self.max_grad_norm * math.sqrt(variance)

    def wrap(self, client: ClientUpdate, generator: torch.Generator) -> ClientUpdate:
        _require_first(client, "dp-sgd")
        return private_client(self, generator)

    def adapt(self, view: View) -> View:
        return _adapt(view, self.max_grad_norm, self.noise_std(view.round, view.victim), "dp-sgd")

    def epsilon(self, *, sample_rate: float, steps: int, delta: float) -> float | None:
        """As `Defense.epsilon`, by `epsilon_spent`; `steps` counts noisy steps, so local ones each by itself."""
        if self.noise_multiplier == 0:
            return None
        return epsilon_spent(self.noise_multiplier, sample_rate, steps, delta)[0]


def _require_bound(bound: float) -> None:
    if not 0 < bound < math.inf:
        raise ValueError(f"max_grad_norm must be positive and finite, got {bound}")


def _require_first(client: ClientUpdate, name: str) -> None:
    if client is not client_update:
        raise InputError(
            f"{name} clips inside the client's training and must be the first defense of a chain, such as"
            f" {name}+top-k; another one comes before it"
        )


# ------------------------------------------------------------------ the client, by Opacus


@dataclass(frozen=True)
class Private:
    """A real module with the victim's structure whose parameters have per-example gradients.

    Attributes:
        source: the victim it was made of.
        victim: the same functions over the module's own parameters, so that Opacus' hooks see them.
        chunk: examples of one forward pass; None for all.
    """

    source: Victim
    victim: Victim
    hooks: Any
    chunk: int | None

    @classmethod
    def of(cls, victim: Victim) -> Private:
        """Raises `InputError` for a module that Opacus does not take."""
        from opacus import GradSampleModule

        module = copy.deepcopy(victim.module)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in victim.params)
        _refuse_unsupported(module, victim)
        for child in module.modules():  # Opacus' hooks look at this flag; without dropout it changes nothing
            if any(p.requires_grad for p in child.parameters(recurse=False)):
                child.training = True
        try:
            hooks = GradSampleModule(module, loss_reduction=_reduction(victim), strict=True)
        except (NotImplementedError, ValueError) as error:
            raise InputError(f"Opacus cannot clip the examples of this model: {first_line(error)}") from error
        own: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if p.requires_grad}
        # One sentence at a time: position rows are looked up once for a whole batch, which hides whose
        # gradient is whose, and the mean over labelled places must be over an example's own.
        chunk = 1 if isinstance(victim, LanguageVictim) else None
        return cls(victim, replace(victim, module=module, params=own), hooks, chunk)

    def load(self, params: Params) -> None:
        with torch.no_grad():
            for name, parameter in self.victim.params.items():
                parameter.copy_(params[name])

    def differentiate(self, x: Tensor, y: Tensor) -> None:
        """Leave the gradient of every example, (B, *shape), in each parameter's `grad_sample`."""
        parameters = self.victim.params
        for parameter in parameters.values():
            parameter.grad = None
            parameter.grad_sample = None  # type: ignore[attr-defined]
        if len(x):
            self._backward(x, y)
        for name, parameter in parameters.items():
            parameter.grad_sample = self._checked(name, parameter, len(x))  # type: ignore[attr-defined]

    def _backward(self, x: Tensor, y: Tensor) -> None:
        size = self.chunk or len(x)
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
            for part, labels in zip(torch.split(x, size), torch.split(y, size), strict=True):
                try:
                    torch.autograd.backward(self.victim.loss(self.victim.params, part, labels))
                except (
                    RuntimeError,
                    AttributeError,
                ) as error:  # from its hooks, for layers it has no rule of
                    raise InputError(
                        f"Opacus cannot clip the examples of this model: {first_line(error)}; accepted: ordinary"
                        " layers of torch.nn, each with parameters of its own"
                    ) from error

    def _checked(self, name: str, parameter: Tensor, count: int) -> Tensor:
        """The per-example gradients; `InputError` where they do not add up to the gradient."""
        found = parameter.grad_sample  # type: ignore[attr-defined]
        if parameter.grad is None or count == 0:
            return parameter.new_zeros(count, *parameter.shape)
        if isinstance(found, list):
            found = torch.cat(found)
        total = None if found is None or len(found) != count else found.sum(0)
        if total is not None and self.chunk is None and _reduction(self.source) == "mean":
            total = total / count
        if total is None or float((total - parameter.grad).norm()) > AGREES * float(parameter.grad.norm()):
            raise InputError(
                f"Opacus' gradients of single examples do not add up to the gradient of {name}: it does not"
                " support the layer, or the layer mixes examples; accepted: ordinary layers of torch.nn"
            )
        return found


def _refuse_unsupported(module: nn.Module, victim: Victim) -> None:
    from opacus.validators import ModuleValidator

    norms = victim.batch_norms()
    if norms:
        raise InputError(
            f"examples cannot be clipped one by one where BatchNorm mixes them (layer {norms[0][0]}); accepted:"
            " a model with GroupNorm instead, such as opacus.validators.ModuleValidator.fix makes"
        )
    modes = [child.training for child in module.modules()]
    errors = ModuleValidator.validate(module.train(), strict=False)
    for child, mode in zip(module.modules(), modes, strict=True):
        child.training = mode
    if errors:
        raise InputError(f"Opacus cannot clip the examples of this model: {first_line(errors[0])}")


def _reduction(victim: Victim) -> Literal["mean", "sum"]:
    return "sum" if victim.loss_function is cross_entropy_sum else "mean"


def private_client(options: DPSGD, generator: torch.Generator) -> ClientUpdate:
    """The client that trains by Opacus; it keeps the module it made from one round to the next."""
    kept: list[Private] = []
    noise: dict[torch.device, torch.Generator] = {}

    def train(victim: Victim, params: Params, round: Round, x: Tensor, y: Tensor) -> Update:
        if round.clients > 1:
            return mean_update(train, victim, params, round, x, y)
        if not kept or kept[0].source is not victim:
            kept[:] = [Private.of(victim)]
        device = victim.device
        if device not in noise:
            noise[device] = _on(device, generator)
        kept[0].load(params)
        return _train(kept[0], options, round, x.detach(), y.detach(), generator, noise[device])

    return train


def _on(device: torch.device, generator: torch.Generator) -> torch.Generator:
    """`generator` itself, or one on `device` seeded from it."""
    if generator.device.type == device.type:
        return generator
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return torch.Generator(device).manual_seed(seed)


def _train(
    private: Private,
    options: DPSGD,
    round: Round,
    x: Tensor,
    y: Tensor,
    sampling: torch.Generator,
    noise: torch.Generator,
) -> Update:
    """The local steps, from the parameters loaded; the sum of their gradients."""
    from opacus.optimizers import DPOptimizer

    parameters = private.victim.params
    optimizer = DPOptimizer(
        torch.optim.SGD(parameters.values(), lr=round.learning_rate),
        noise_multiplier=options.noise_multiplier,
        max_grad_norm=options.max_grad_norm,
        expected_batch_size=options.expected_batch(round),
        loss_reduction=_reduction(private.source),
        generator=noise,
    )
    total: Update | None = None
    for rows in _batches(options, round, sampling):
        index = torch.tensor(rows, dtype=torch.int64, device=x.device)
        optimizer.zero_grad(set_to_none=True)
        private.differentiate(x[index], y[index])
        optimizer.step()
        step = Update({name: p.grad.clone() for name, p in parameters.items() if p.grad is not None})
        total = step if total is None else total + step
    optimizer.zero_grad(set_to_none=True)
    assert total is not None  # a round has at least one step
    return total


def _batches(options: DPSGD, round: Round, generator: torch.Generator) -> Iterator[list[int]]:
    """The client's own examples that each local step uses."""
    if not options.poisson:
        return (round.batch(step) for step in range(round.local_steps))
    from opacus.utils.uniform_sampler import UniformWithReplacementSampler

    return iter(
        UniformWithReplacementSampler(
            num_samples=round.own_examples,
            sample_rate=options.rate(round),
            generator=generator,
            steps=round.local_steps,
        )
    )


# ------------------------------------------------------------------ the adversary's simulation


@functools.cache
def clipping_client(max_grad_norm: float) -> ClientUpdate:
    """The noiseless client with clipped examples, differentiable in x and floating point y, and usable under
    `torch.func` transforms; without noise it gives what Opacus does.

    For Poisson sampling it is the expected update: all examples take part.
    """

    def train(victim: Victim, params: Params, round: Round, x: Tensor, y: Tensor) -> Update:
        if round.clients > 1:
            return mean_update(train, victim, params, round, x, y)
        divisor = round.batch_size if _reduction(victim) == "mean" else 1

        def clipped_mean(victim: Victim, params: Params, x: Tensor, y: Tensor) -> Update:
            rows = zip(torch.split(x, 1), torch.split(y, 1), strict=True)
            examples = (Update(parameter_gradient(victim, params, *row)) for row in rows)
            return reduce(Update.__add__, (clip(example, max_grad_norm) for example in examples)) / divisor

        return local_sum(victim, params, round, x, y, clipped_mean)

    return train


def clip(gradient: Update, max_grad_norm: float) -> Update:
    """`gradient`, scaled down when longer than the bound, as Opacus does it."""
    squares = torch.stack([tensor.square().sum() for tensor in gradient.values()]).sum()
    length = squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()  # differentiable at zero too
    factor = (max_grad_norm / (length + STABILITY)).clamp(max=1.0)
    return gradient.map(lambda tensor: tensor * factor)


def _adapt(view: View, max_grad_norm: float, noise_std: float, name: str) -> View:
    """Clipping is simulated and the noise known.

    The length of one clipped example's gradient is the bound and says nothing.  Without noise that view is
    made scale-free, so that attacks in closed form do not take the length for the gradient's; under noise the
    length stays, because the likelihood of the simulated, clipped update is in units of that noise.
    """
    _require_first(view.client, name)
    knowledge = view.knowledge
    spread = dict(view.spread)
    if noise_std > 0:
        knowledge = replace(knowledge, noise_std=known(noise_std, f"{name}, whose options are known"))
        spread = dict.fromkeys(view.observed, noise_std)
    elif view.round.num_examples == 1 and _clipped(view, max_grad_norm):
        knowledge = replace(knowledge, scale=known(False, f"{name}: the length is the bound"))
    return replace(view, client=clipping_client(max_grad_norm), knowledge=knowledge, spread=spread)


def _clipped(view: View, max_grad_norm: float) -> bool:
    return float(view.observed.norm()) >= ACTIVE * max_grad_norm * view.round.local_steps
