"""The model, the data and the training of one client: tell four photos apart by crops of 32 x 32 pixels.

Run as a script it writes the private crops of a client, which only the audit's score needs:

    python -m flower_photos.task CLIENT CLIENTS truth.safetensors [IMAGES]
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from leakaudit.data import PrivateBatch, control_photos, save_truth

SHAPE = (3, 32, 32)
CLASSES = 4


def net() -> nn.Module:
    """Three convolutions and one fully connected layer; logits (n, 4) of images (n, 3, 32, 32) in [0, 1]."""
    return nn.Sequential(
        nn.Conv2d(3, 12, 5, stride=2, padding=2),
        nn.Sigmoid(),
        nn.Conv2d(12, 12, 5, stride=2, padding=2),
        nn.Sigmoid(),
        nn.Conv2d(12, 12, 5, padding=2),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(768, CLASSES),
    )


def fresh_net() -> nn.Module:
    """`net` as the server starts it, the same in every run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return net()


def private_images(client: int, clients: int, count: int) -> tuple[Tensor, Tensor]:
    """Crops (n, 3, 32, 32) of the four photos that ship with leakaudit, n <= count, and which photo (n,)."""
    photos = control_photos((3, 128, 128))
    crops = photos.pixels.unfold(2, 32, 32).unfold(3, 32, 32).permute(0, 2, 3, 1, 4, 5)
    images, labels = crops.reshape(-1, *SHAPE), torch.arange(len(photos.pixels)).repeat_interleave(16)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    own = order[client::clients][:count]
    return images[own], labels[own]


def train(
    model: nn.Module, images: Tensor, labels: Tensor, epochs: int, batch_size: int, rate: float
) -> float:
    """Plain SGD, batches in order; the mean loss of the last epoch."""
    optimiser = torch.optim.SGD(model.parameters(), lr=rate)
    model.train()
    for _ in range(epochs):
        losses = []
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            loss = nn.functional.cross_entropy(model(x), y)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model.eval()(images).argmax(1) == labels).float().mean().item()


def main() -> None:
    client, clients, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    count = int(sys.argv[4]) if len(sys.argv) > 4 else 1
    images, labels = private_images(client, clients, count)
    names = tuple(f"client-{client}-image-{index}" for index in range(len(images)))
    save_truth(path, PrivateBatch(images, labels, names))


if __name__ == "__main__":
    main()
