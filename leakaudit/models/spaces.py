"""Where candidates live.

A *space* says how a model input is drawn at random, kept inside its box, and
shown to a person.  Attacks work on model inputs (normalised pixels); `decode`
turns them into pixels in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pixels:
    """Images, seen by the model as (pixel - mean) / std per channel.

    Attributes:
        shape: (channels, height, width).
        mean, std: one number a channel, in pixel units of [0, 1]; None when the
            normalisation is unknown, then candidates have no box to stay in.
    """

    shape: tuple[int, int, int]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise ValueError("normalisation needs both mean and std")
        for values in (self.mean, self.std):
            if values is not None and len(values) != self.shape[0]:
                raise ValueError(f"normalisation has {len(values)} channels, the input has {self.shape[0]}")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")

    @property
    def unknowns(self) -> int:
        """Numbers to find per example."""
        channels, height, width = self.shape
        return channels * height * width

    def _affine(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = self.mean or (0.0,) * self.shape[0], self.std or (1.0,) * self.shape[0]
        return (
            torch.tensor(mean, dtype=like.dtype, device=like.device).view(-1, 1, 1),
            torch.tensor(std, dtype=like.dtype, device=like.device).view(-1, 1, 1),
        )

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1] -> model input; (..., C, H, W), floating point."""
        mean, std = self._affine(pixels)
        return (pixels - mean) / std

    def decode(self, inputs: Tensor) -> Tensor:
        """Model input -> pixels; values may leave [0, 1] (`project` first, or clamp to show)."""
        mean, std = self._affine(inputs)
        return inputs * std + mean

    def project(self, inputs: Tensor) -> Tensor:
        """The nearest model input whose pixels lie in [0, 1]; unchanged without a normalisation."""
        if self.mean is None:
            return inputs
        mean, std = self._affine(inputs)
        return torch.minimum(torch.maximum(inputs, -mean / std), (1 - mean) / std)

    def sample(self, count: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal model inputs, (count, C, H, W), on the generator's device."""
        return torch.randn((count, *self.shape), generator=generator, dtype=dtype, device=generator.device)
