"""Small real models and one private batch, for the tests of files."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leakaudit.models.spaces import Pixels
from leakaudit.models.victim import Mode, Victim
from leakaudit.rounds import Round, client_update
from leakaudit.update import Update

SHAPE = (2, 6, 6)
CLASSES = 5


def network(seed: int = 0) -> nn.Sequential:
    """Two convolutions with BatchNorm and a linear layer; several tensors share a shape."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Sigmoid(),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Sigmoid(),
            nn.Flatten(),
            nn.Linear(4 * 36, CLASSES),
        )


def plain_network(seed: int = 0) -> nn.Sequential:
    """No buffers, and every parameter has a shape of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(48, 7), nn.Tanh(), nn.Linear(7, CLASSES)
        )


def victim_of(module: nn.Module, mode: Mode = "train") -> Victim:
    return Victim.of(module, Pixels(SHAPE, (0.5,) * 2, (0.25,) * 2), CLASSES, mode, name="small")


def private_batch(count: int = 3, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *SHAPE, generator=generator), torch.arange(count) % CLASSES


def gradient_of(victim: Victim, count: int = 3) -> Update:
    x, y = private_batch(count)
    return client_update(victim, victim.params, Round(count), x, y).detach()


def backward(module: nn.Module, count: int = 3) -> None:
    """What a training loop does: fill p.grad."""
    x, y = private_batch(count)
    nn.functional.cross_entropy(module(x), y).backward()


def assert_same(left: Update, right: Update, tolerance: float = 0.0) -> None:
    assert list(left) == list(right)
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=tolerance, atol=tolerance, msg=name)
