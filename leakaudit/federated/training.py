"""Training as a federation does it, simulated plainly: the server sends, clients update, the server applies.

    params <- params - learning_rate * (momentum * velocity + update)

One path for every protocol and defense.  An `Update` is a pseudo-gradient, so the learning rate is the one
of FedSGD, or the local one of FedAvg (McMahan et al. 2017, algorithm 1), whose server adds the mean of the
clients' differences as they are (a server learning rate of 1).  Momentum is the server's, as in
torch.optim.SGD (Hsu, Qi and Brown 2019 call it FedAvgM).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from leakaudit.models.spaces import NO_TOKEN
from leakaudit.models.victim import Params, Victim
from leakaudit.rounds import ClientUpdate, Round, client_update, mean_update
from leakaudit.update import Update

Buffers = dict[str, Tensor]


@dataclass(frozen=True)
class Examples:
    """Model inputs x (N, C, H, W) or token numbers (N, L), and labels y as the victim takes them."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def rows(self, rows: Tensor) -> Examples:
        """Those of the rows (B,) int64, sentences no wider than the longest of them."""
        rows = rows.to(self.x.device)
        x, y = self.x[rows], self.y[rows]
        if x.is_floating_point():
            return Examples(x, y)
        width = int((x != NO_TOKEN).sum(1).max()) if len(x) else 0
        return Examples(x[:, :width], y if y.dim() == 1 else y[:, :width])


def split(labels: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows (int64) to train on and rows held out, round(share * N) of them, drawn at random.

    Args:
        labels: (N,) classes, of which every one has its share held out, rounded up or down; (N, L) token
            numbers are not stratified.
        share: in (0, 1).

    Systematic sampling: examples in random order, sorted by class, of which every 1/share-th is taken.
    """
    count = len(labels)
    order = torch.randperm(count, generator=generator)
    if labels.dim() == 1:
        order = order[labels.cpu()[order].argsort(stable=True)]
    held_out = round(share * count)
    start = float(torch.rand((), generator=generator, dtype=torch.float64))
    taken = torch.zeros(count, dtype=torch.bool)
    taken[((torch.arange(held_out, dtype=torch.float64) + start) * (count / max(held_out, 1))).long()] = True
    return order[~taken].sort().values, order[taken].sort().values


def shuffled(available: int, needed: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of `needed` row numbers out of `available`, without replacement within an epoch.

    An epoch that does not fill its last batch is continued by the next one.
    """
    left = torch.empty(0, dtype=torch.int64)
    while True:
        while len(left) < needed:
            left = torch.cat([left, torch.randperm(available, generator=generator)])
        yield left[:needed]
        left = left[needed:]


class TrackedClient:
    """`client_update` that also moves the running statistics of BatchNorm, as a client in train mode does.

    Every client starts from the server's buffers; `collect` gives what the server makes of theirs.
    """

    def __init__(self) -> None:
        self._shared: list[Buffers] = []

    def __call__(self, victim: Victim, params: Params, round: Round, x: Tensor, y: Tensor) -> Update:
        if round.clients > 1:
            return mean_update(self, victim, params, round, x, y)
        # a transform would write tensors that do not outlive it
        if torch._C._are_functorch_transforms_active():
            return client_update(victim, params, round, x, y)
        moving = _copied(victim)
        with _moving_statistics(victim.module):
            update = client_update(moving, params, round, x, y)
        self._shared.append(moving.buffers)
        return update

    def collect(self, victim: Victim, params: Params, examples: Examples) -> Buffers:
        """The mean of what the clients shared since the last call (of a count, the first one's).

        A defense that makes its update without this client leaves nothing: then one forward pass of the
        examples moves the statistics.
        """
        shared, self._shared = self._shared, []
        if not shared:
            moving = _copied(victim)
            with torch.no_grad(), _moving_statistics(victim.module):
                moving.logits(params, examples.x)
            return moving.buffers
        return {
            name: torch.stack([buffers[name] for buffers in shared]).mean(0)
            if first.is_floating_point()
            else first
            for name, first in shared[0].items()
        }


def train(
    victim: Victim,
    client: ClientUpdate,
    tracked: TrackedClient,
    round: Round,
    examples: Examples,
    batches: Iterable[Tensor],
    momentum: float = 0.0,
) -> Iterator[tuple[Params, Buffers]]:
    """Parameters and buffers after every step of the server, one step for each of the batches.

    Args:
        victim: the model to begin with, in train mode.  Clients are given the same object at every step unless
            it has BatchNorm, whose buffers change, so they may keep what they make of it.
        client: the defended client, made of `tracked` where the victim has BatchNorm.
        round: what the clients of one step do, all of them together on `round.num_examples` examples.
        batches: row numbers of the examples of every step, client after client.
        momentum: of the server, in [0, 1).
    """
    params: Params = victim.params
    velocity: Update | None = None
    before: Tensor | None = None
    normalised = bool(victim.batch_norms())
    for rows in batches:
        if rows is not before:
            batch, before = examples.rows(rows), rows
        update = client(victim, params, round, batch.x, batch.y).detach()
        if normalised:
            victim = replace(victim, buffers=tracked.collect(victim, params, batch))
        velocity = update if velocity is None or not momentum else momentum * velocity + update
        moved = {name: params[name] - round.learning_rate * step for name, step in velocity.items()}
        params = {**params, **moved}
        yield params, victim.buffers


def accuracy(victim: Victim, examples: Examples, chunk: int = 256) -> float:
    """Share of the labels that the model, in eval mode, finds the likeliest, in [0, 1].

    Of a language model on tokens: of the masked words, or of the next ones.
    """
    hits = labels = 0
    causal = getattr(victim, "task", None) == "causal-lm"
    with torch.no_grad():
        for rows in torch.split(torch.arange(len(examples)), chunk):
            part = examples.rows(rows)
            logits, y = victim.logits(victim.params, part.x), part.y
            if causal:
                logits, y = logits[:, :-1], y[:, 1:]
            asked = y >= 0
            hits += int((logits.argmax(-1) == y)[asked].sum())
            labels += int(asked.sum())
    return hits / max(labels, 1)


def _copied(victim: Victim) -> Victim:
    return replace(victim, buffers={name: tensor.clone() for name, tensor in victim.buffers.items()})


@contextmanager
def _moving_statistics(module: nn.Module) -> Iterator[None]:
    """Forward passes in train mode write the running statistics, which `Victim` otherwise keeps still."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    before = [norm.track_running_stats for norm in norms]
    try:
        for norm in norms:
            norm.track_running_stats = True
        yield
    finally:
        for norm, tracking in zip(norms, before, strict=True):
            norm.track_running_stats = tracking
