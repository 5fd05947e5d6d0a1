"""What is trained: a model, the data of every client, and the data held out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from leakaudit.data import PrivateBatch
from leakaudit.federated.population import Client
from leakaudit.federated.training import Examples, accuracy
from leakaudit.models.victim import Params, Victim

if TYPE_CHECKING:
    from leakaudit.text_data import PrivateText


@dataclass(frozen=True)
class Quality:
    """Of a model on held-out data.

    Attributes:
        accuracy: in [0, 1], see `leakaudit.federated.training.accuracy`.
        loss: mean of the examples' (or labelled positions') losses, in nats.
    """

    accuracy: float
    loss: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


@dataclass(frozen=True)
class Task:
    """Attributes:
    victim: the model to begin with, in train mode.
    data: the private examples of all clients, as loaded; None where only tensors are known (tests).
    train: the same as model inputs and labels.
    clients: who holds which rows of `train`.
    test: held-out examples.
    groups: name -> rows of `test`, for quality by group; "all" need not be in it.
    """

    victim: Victim
    train: Examples
    clients: tuple[Client, ...]
    test: Examples
    data: PrivateBatch | PrivateText | None = None
    groups: Mapping[str, Tensor] = field(default_factory=dict)

    def quality(self, params: Params) -> dict[str, Quality]:
        """Of the model with these parameters on the held-out data: "all", and each group.

        BatchNorm's running statistics are estimated anew from up to 512 training examples with these parameters
        (as torch.optim.swa_utils.update_bn does), so no system has to say what becomes of buffers.
        """
        victim = self.evaluated(params)
        rows = {"all": torch.arange(len(self.test)), **self.groups}
        return {name: _quality(victim, self.test.rows(part)) for name, part in rows.items()}

    def evaluated(self, params: Params) -> Victim:
        """The model with these parameters in eval mode, BatchNorm's statistics estimated as `quality` says."""
        victim = replace(self.victim, params=dict(params))
        if not victim.batch_norms():
            return victim.with_mode("eval")
        seen = victim.batch_statistics(params, self.train.x[:512])
        buffers = dict(victim.buffers)
        for name, (mean, variance) in seen.items():
            buffers[f"{name}.running_mean"] = mean.detach()
            buffers[f"{name}.running_var"] = variance.detach()
        return replace(victim, buffers=buffers).with_mode("eval")


def _quality(victim: Victim, examples: Examples, chunk: int = 256) -> Quality:
    total = weight = 0.0
    with torch.no_grad():
        for rows in torch.split(torch.arange(len(examples)), chunk):
            part = examples.rows(rows)
            # a language model's mean is over its labelled positions; of equal chunks that is close to exact
            total += float(victim.loss(victim.params, part.x, part.y)) * len(rows)
            weight += len(rows)
    return Quality(accuracy(victim, examples), total / max(weight, 1.0))
