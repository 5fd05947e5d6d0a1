"""One round as a pure, differentiable function of the clients' private batches.

    observed = sum_k  a_k * client_update(params, batch_k)

Run forwards it captures what the server sees; run backwards it is the attack.
Sources: McMahan et al. 2017, algorithm 1 (FederatedSGD, FederatedAveraging);
unrolled local steps as in Geiping et al. 2020, section 6, and Dimitrov et al. 2022.
Deviation: a client passes over its examples in the order given, without
shuffling, so step s sees examples s*B .. (s+1)*B - 1 modulo their number.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor
from torch.func import grad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from leakaudit.models.victim import Params, Victim
from leakaudit.update import Update, mean_of

ClientUpdate = Callable[[Victim, Params, "Round", Tensor, Tensor], Update]


@dataclass(frozen=True)
class Round:
    """What a client, or a cohort of them, does between download and upload.

    Attributes:
        num_examples: private examples of all clients together, N.
        local_steps: SGD steps of every client, or the most of any of them; 1 with a full batch is FedSGD.
        local_batch_size: examples a step, B; None for all that a client has, which is also what a client with
            fewer than B takes.
        learning_rate: of the local SGD (no momentum), > 0.  It scales nothing in
            one step, because updates are pseudo-gradients.
        clients: how many hold the examples, one after the other; what is seen is the weighted sum of their updates.
        sizes: examples of each client; None for equally many each.
        weights: of each client's update in the sum, finite; None for 1 / clients, the mean.  FedAvg's are the
            clients' shares of the examples (McMahan et al. 2017).
        client_steps: local steps of each client, of which `local_steps` is the most; None where all do as many.
    """

    num_examples: int
    local_steps: int = 1
    local_batch_size: int | None = None
    learning_rate: float = 1.0
    clients: int = 1
    sizes: tuple[int, ...] | None = None
    weights: tuple[float, ...] | None = None
    client_steps: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.num_examples < 1:
            raise ValueError(f"num_examples must be at least 1, got {self.num_examples}")
        if self.clients < 1 or (self.sizes is None and self.num_examples % self.clients):
            raise ValueError(
                f"clients must be at least 1 and share num_examples evenly, got {self.clients} of {self.num_examples}"
            )
        self._check_shares()
        if self.local_steps < 1:
            raise ValueError(f"local_steps must be at least 1, got {self.local_steps}")
        own = self.own_examples
        if self.local_batch_size is not None and not 1 <= self.local_batch_size <= own:
            raise ValueError(f"local_batch_size must be between 1 and {own}, got {self.local_batch_size}")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be positive and finite, got {self.learning_rate}")

    def _check_shares(self) -> None:
        """One entry a client in whatever differs between them."""
        for name in ("sizes", "weights", "client_steps"):
            stated = getattr(self, name)
            if stated is not None and (self.clients == 1 or len(stated) != self.clients):
                raise ValueError(f"{name} must be one number for each of several clients, got {stated}")
        if self.sizes is not None and (min(self.sizes) < 1 or sum(self.sizes) != self.num_examples):
            raise ValueError(f"sizes must be at least 1 and come to {self.num_examples}, got {self.sizes}")
        if self.weights is not None and not (
            all(map(math.isfinite, self.weights)) and any(weight != 0 for weight in self.weights)
        ):
            raise ValueError(f"weights must be finite and not all zero, got {self.weights}")
        steps = self.client_steps
        if steps is not None and not (min(steps) >= 1 and max(steps) == self.local_steps):
            raise ValueError(
                f"client_steps must be at least 1 and local_steps={self.local_steps} at most, got {steps}"
            )

    @property
    def own_examples(self) -> int:
        """Private examples of each client, or of the one with most."""
        return self.num_examples // self.clients if self.sizes is None else max(self.sizes)

    @property
    def batch_size(self) -> int:
        return self.local_batch_size or self.own_examples

    @property
    def examples_used(self) -> int:
        """How many of the examples at least one local step sees."""
        return sum(min(own.num_examples, own.local_steps * own.batch_size) for own in self.each())

    @property
    def passes(self) -> int:
        """Examples times the steps that use them, at most: as many outer products as a layer's gradient is made of."""
        return sum(own.local_steps * own.batch_size for own in self.each())

    @property
    def uneven(self) -> bool:
        """Whether some client's examples weigh more in the sum than another's."""
        shares = zip(self.each_weight(), self.each(), strict=True)
        densities = [weight * own.local_steps / own.num_examples for weight, own in shares]
        return max(densities) - min(densities) > 1e-6 * max(map(abs, densities))

    def batch(self, step: int) -> list[int]:
        """Which of a client's own examples local step `step` uses; the last batch of a pass may be short."""
        batches = -(-self.own_examples // self.batch_size)
        start = (step % batches) * self.batch_size
        return list(range(start, min(start + self.batch_size, self.own_examples)))

    def each(self) -> tuple[Round, ...]:
        """What every client does by itself, in order."""
        sizes = self.sizes or (self.num_examples // self.clients,) * self.clients
        steps = self.client_steps or (self.local_steps,) * self.clients
        size = self.local_batch_size
        return tuple(
            Round(n, count, size if size is None or size <= n else None, self.learning_rate)
            for n, count in zip(sizes, steps, strict=True)
        )

    def each_weight(self) -> tuple[float, ...]:
        """The weight of every client's update, in order."""
        return self.weights or (1 / self.clients,) * self.clients

    def of(self, num_examples: int, local_batch_size: int | None = None) -> Round:
        """The same of a single client with so many examples."""
        return Round(num_examples, self.local_steps, local_batch_size, self.learning_rate)


def parameter_gradient(victim: Victim, params: Params, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Gradient of the loss for every parameter, differentiable in x, y and params.

    Plain autograd, which is about 1.6 times faster on a LeNet, unless a `torch.func`
    transform is active, where only `torch.func.grad` composes.  Where it is to be differentiated again, attention
    runs in the only kernel whose backward pass has derivatives.
    """
    if torch._C._are_functorch_transforms_active():
        with sdpa_kernel(SDPBackend.MATH):
            return grad(victim.loss)(params, x, y)
    leaves = {name: p if p.grad_fn is not None else p.detach().requires_grad_() for name, p in params.items()}
    differentiable = x.requires_grad or y.requires_grad or any(p.grad_fn for p in leaves.values())
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH) if differentiable else nullcontext():
        loss = victim.loss(leaves, x, y)
        gradients = torch.autograd.grad(
            loss, list(leaves.values()), create_graph=differentiable, materialize_grads=True
        )
    return dict(zip(leaves, gradients, strict=True))


Gradient = Callable[[Victim, Params, Tensor, Tensor], Mapping[str, Tensor]]


def local_steps(
    victim: Victim,
    params: Params,
    round: Round,
    x: Tensor,
    y: Tensor,
    gradient: Gradient = parameter_gradient,
) -> Iterator[tuple[Params, Tensor, Params]]:
    """(parameters before the step, the step's examples, its gradient) for every local step."""
    current: Params = dict(params)
    for step in range(round.local_steps):
        rows = round.batch(step)
        examples = x[rows[0] : rows[-1] + 1]
        step_gradient = gradient(victim, current, examples, y[rows[0] : rows[-1] + 1])
        yield current, examples, step_gradient
        if step + 1 < round.local_steps:
            current = {name: current[name] - round.learning_rate * g for name, g in step_gradient.items()}


def client_update(victim: Victim, params: Params, round: Round, x: Tensor, y: Tensor) -> Update:
    """The pseudo-gradient of one client: (before - after) / learning_rate over its local SGD steps.

    Of several clients, their weighted sum (McMahan et al. 2017, algorithm 1), by default the mean.

    Args:
        params: the model the client downloaded; every entry is trained.
        x: model inputs (N, C, H, W); y: (N,) integers or (N, K) probabilities.

    Differentiable in x and in floating point y, and usable under `torch.func` transforms.
    The sum of the local gradients equals (before - after) / learning_rate exactly,
    without the cancellation of a subtraction.
    """
    if round.clients > 1:
        return mean_update(client_update, victim, params, round, x, y)
    return local_sum(victim, params, round, x, y)


def local_sum(
    victim: Victim,
    params: Params,
    round: Round,
    x: Tensor,
    y: Tensor,
    gradient: Gradient = parameter_gradient,
) -> Update:
    """The sum of the gradients of one client's local steps."""
    steps = local_steps(victim, params, round, x, y, gradient)
    return reduce(Update.__add__, (Update(step) for _, _, step in steps))


def mean_update(
    client: ClientUpdate, victim: Victim, params: Params, round: Round, x: Tensor, y: Tensor
) -> Update:
    """The weighted sum, by default the mean, of what `client` makes of every client's own examples, in order."""
    return weighted_update(client, victim, [params] * round.clients, round, x, y)


def weighted_update(
    client: ClientUpdate, victim: Victim, bases: Sequence[Params], round: Round, x: Tensor, y: Tensor
) -> Update:
    """As `mean_update`, of clients that each start from their own of the `bases`."""
    rounds = round.each()
    sizes = [own.num_examples for own in rounds]
    parts = zip(bases, rounds, torch.split(x, sizes), torch.split(y, sizes), strict=True)
    updates = [client(victim, params, own, part, labels) for params, own, part, labels in parts]
    if round.weights is None:
        return mean_of(updates)
    weighted = (update * weight for update, weight in zip(updates, round.weights, strict=True))
    return reduce(Update.__add__, weighted)


def from_own_bases(client: ClientUpdate, bases: Sequence[Params]) -> ClientUpdate:
    """A cohort whose clients downloaded different models, as in asynchronous training.

    Args:
        client: of each by itself.
        bases: the parameters each of them downloaded, in order.

    A round of another number of clients (one example alone, a control) starts from the model it is given.
    """

    def cohort(victim: Victim, params: Params, round: Round, x: Tensor, y: Tensor) -> Update:
        if round.clients != len(bases):
            return client(victim, params, round, x, y)
        alike = [{name: base[name].to(tensor) for name, tensor in params.items()} for base in bases]
        return weighted_update(client, victim, alike, round, x, y)

    return cohort


def trained_buffers(victim: Victim, round: Round, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """All buffers (running means and variances, `num_batches_tracked`) as a train-mode client shares them."""
    tracking = copy.deepcopy(victim.module).train()
    buffers = {name: tensor.clone() for name, tensor in victim.buffers.items()}
    for module in tracking.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            module.track_running_stats = True
        if isinstance(module, _DropoutNd):
            module.eval()
    trained = replace(victim, module=tracking, buffers=buffers)
    for params, examples, _ in local_steps(victim, victim.params, round, x, y):
        with torch.no_grad():
            trained.logits(params, examples)
    return buffers
