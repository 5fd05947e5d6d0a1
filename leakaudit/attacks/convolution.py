"""What a convolution with known output says about its input, as normal equations in closed form.

Both what is known of the output z = W * a and the gradient of the kernel,

    z[o, p] = sum_{c, k} W[o, c, k] a[c, at(k, p)],        dW[o, c, k] = sum_p delta[o, p] a[c, at(k, p)],

are linear in the input a.  Number k of the patch at p is the input's number at(k, p), so an equation holds few of the
unknowns, the second kind those of one channel c, with the same coefficients for each channel.  The normal matrix
is added up from that, patch by patch and once for all channels, in place of a product of dense matrices of
(equations, unknowns): on DLG's LeNet 0.05 s in place of 5 s (docs/performance/time_to_quality.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad

from leakaudit.attacks.chain import Link


@dataclass(frozen=True)
class Convolution:
    """A two-dimensional convolution with zero padding and without groups, as a link of a chain.

    Attributes:
        name: of its kernel among the victim's tensors.
        kernel: (O, C, kh, kw).
        stride, padding, dilation: (down, across).
        incoming: (C, H, W).
    """

    name: str
    kernel: Tensor
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    incoming: torch.Size

    @classmethod
    def of(cls, link: Link, tensors: dict[str, Tensor]) -> Convolution | None:
        """The convolution that is all of a link; None when the link is something else."""
        calls = [node for node in link.module.graph.nodes if node.op not in ("placeholder", "output")]
        if len(calls) != 1 or calls[0].op != "call_module":
            return None
        name = f"{calls[0].target}.weight"
        module = link.module.get_submodule(str(calls[0].target))
        if type(module) is not nn.Conv2d or module.groups != 1 or module.padding_mode != "zeros":
            return None
        if isinstance(module.padding, str) or name not in tensors or len(link.incoming) != 3:
            return None
        (down, across), (high, wide), (far, broad) = module.stride, module.padding, module.dilation
        return cls(name, tensors[name], (down, across), (high, wide), (far, broad), link.incoming)

    def __call__(self, a: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, O, h, w), without the bias."""
        return F.conv2d(a, self.kernel, None, self.stride, self.padding, self.dilation)

    def backward(self, kernel: Tensor, delta: Tensor) -> Tensor:
        """(N, O, h, w) -> (N, C, H, W): what `kernel`, of this one's shape, hands down of a gradient."""

        def paired(a: Tensor) -> Tensor:
            return (F.conv2d(a, kernel, None, self.stride, self.padding, self.dilation) * delta).sum()

        found: Tensor = grad(paired)(delta.new_zeros(len(delta), *self.incoming))
        return found

    def kernel_gradient(self, a: Tensor, delta: Tensor) -> Tensor:
        """Of sum(delta * convolution(a)), (O, C, kh, kw)."""

        def paired(kernel: Tensor) -> Tensor:
            return (F.conv2d(a, kernel, None, self.stride, self.padding, self.dilation) * delta).sum()

        found: Tensor = grad(paired)(self.kernel)
        return found

    def places(self, channels: int) -> Tensor:
        """at(k, p), (channels * kh * kw, h * w) int64: flat positions in (channels, H, W), -1 in the padding."""
        height, width = self.incoming[1:]
        plane = torch.arange(1, channels * height * width + 1, dtype=torch.float64, device=self.kernel.device)
        image = plane.reshape(1, channels, height, width)
        size = (self.kernel.shape[2], self.kernel.shape[3])
        return F.unfold(image, size, self.dilation, self.padding, self.stride)[0].long() - 1


@dataclass(frozen=True)
class ConvolutionEquations:
    """All that is known of a convolution's input (N, C, H, W), flattened to (U,).

    Attributes:
        output: (N, O, h, w), what the convolution gives without its bias; any number where it is not known.
        weight: (N, O, h, w), one over the standard error of each of these; 0 where it is not known.
        delta: (N, O, h, w), the gradient of the loss there.
        gradient: (O, C, kh, kw), the kernel's; None where it was not shared.
        gradient_weight: one over its numbers' standard error.
    """

    convolution: Convolution
    output: Tensor
    weight: Tensor
    delta: Tensor
    gradient: Tensor | None
    gradient_weight: float

    def add_to(self, normal: Tensor) -> None:
        """Add J^T J of these equations to (U, U)."""
        size = self.convolution.incoming.numel()
        for n, weight in enumerate(self.weight.flatten(2)):
            start = n * size
            self._add_outputs(normal[start : start + size, start : start + size], weight)
        if self.gradient is not None:
            self._add_gradients(normal)

    def _add_outputs(self, normal: Tensor, weight: Tensor) -> None:
        """The equations of one example's output, `weight` (O, h * w), patch by patch, to (C H W, C H W)."""
        kernel = self.convolution.kernel.flatten(1)
        for places, weights in zip(
            self.convolution.places(self.convolution.incoming[0]).T, weight.T, strict=True
        ):
            there = places >= 0
            rows, index = kernel[:, there] * weights[:, None], places[there]
            normal[index[:, None], index] += rows.T @ rows

    def _add_gradients(self, normal: Tensor) -> None:
        """The equations of the kernel's gradient: the same for each channel, none between two of them."""
        count, out = self.delta.shape[:2]
        channels, height, width = self.convolution.incoming
        places = self.convolution.places(1)
        rows = normal.new_zeros(out, len(places), count, height * width + 1)  # the last for the padding
        k = torch.arange(len(places), device=places.device)[:, None].expand_as(places)
        delta = self.delta.flatten(2).transpose(0, 1) * self.gradient_weight
        rows[:, k, :, places] = delta.permute(2, 0, 1).expand(len(places), -1, -1, -1)
        rows = rows[..., :-1].reshape(out * len(places), count * height * width)
        gram = (rows.T @ rows).reshape(count, height * width, count, height * width)
        blocks = normal.view(count, channels, height * width, count, channels, height * width)
        for channel in range(channels):
            blocks[:, channel, :, :, channel] += gram

    def pull(self, value: Tensor) -> Tensor:
        """J^T (t - J a) at a = `value`, (U,) -> (U,)."""
        convolution = self.convolution
        a = value.reshape(-1, *convolution.incoming)
        known = self.weight > 0
        misfit = torch.where(known, self.output - convolution(a), 0.0) * self.weight.square()
        found = convolution.backward(convolution.kernel, misfit)
        if self.gradient is not None:
            departure = self.gradient - convolution.kernel_gradient(a, self.delta)
            found = found + convolution.backward(departure * self.gradient_weight**2, self.delta)
        return found.reshape(-1)
