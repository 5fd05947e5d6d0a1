"""The model of the example audit: put yours here, a function without arguments that returns a torch module."""

from __future__ import annotations

from torch import nn


def small_mlp() -> nn.Module:
    """Logits (n, 10) of images (n, 3, 16, 16): a fully connected first layer, which gives its input away."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 48), nn.ReLU(), nn.Linear(48, 10))
