"""Noise added to the private inputs before training on them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from leakaudit.defenses.base import Defense
from leakaudit.defenses.pixels import require_images, slopes
from leakaudit.models.spaces import Pixels
from leakaudit.models.victim import Params, Victim
from leakaudit.rounds import ClientUpdate, Round
from leakaudit.threat import View
from leakaudit.update import Update

SLOPE = 0.06
"""Mean of `slopes` that the prior assumes, in pixels of [0, 1].  CIFAR-10 training images have 0.15, but denoise best
with 0.03 (noise of 0.02) to 0.08 (noise of 0.1), because their slopes are rarer and larger than exponential."""
STEPS = 60


@dataclass(frozen=True)
class InputNoise(Defense):
    """Independent N(0, std^2) on every pixel, once a round (Bishop 1995, training with noise).

    Pixels may leave [0, 1]: clamping would make the noise depend on the image.  In a chain the last defense on
    the inputs changes them first.

    Attributes:
        std: >= 0, in pixels of [0, 1].
    """

    std: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.std < float("inf"):
            raise ValueError(f"std must be at least 0 and finite, got {self.std}")

    def wrap(self, client: ClientUpdate, generator: torch.Generator) -> ClientUpdate:
        def defended(victim: Victim, params: Params, round: Round, x: Tensor, y: Tensor) -> Update:
            require_images(victim, "input-noise")
            drawn = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=generator.device)
            space, noise = victim.space, drawn.to(x.device)
            return client(victim, params, round, space.encode(space.decode(x) + self.std * noise), y)

        return defended

    def adapt(self, view: View) -> View:
        """Removes the noise from the inputs that an attack finds."""
        require_images(view.victim, "input-noise")
        space, before = view.victim.space, view.decode

        def decode(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            x, y = before(x, y)
            return denoised(x, space, self.std), y

        return replace(view, decode=decode)


def denoised(x: Tensor, space: Pixels, std: float) -> Tensor:
    """The likeliest images behind model inputs (N, C, H, W) with noise of `std` in pixels of [0, 1].

    Maximum a posteriori for Gaussian noise and slopes that are exponentially distributed with mean `SLOPE`
    (total variation; Rudin, Osher and Fatemi 1992), by L-BFGS; clamped to the box where there is one.
    """
    if std == 0:
        return x
    seen = space.decode(x.detach()).double().contiguous()
    pixels = seen.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([pixels], max_iter=STEPS, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (pixels - seen).square().sum() / (2 * std**2) + slopes(pixels).sum() / SLOPE
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        cast(Any, optimizer).step(closure)
    return space.project(space.encode(pixels.detach()).to(x.dtype))
