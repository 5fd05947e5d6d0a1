"""`Victim`: the model under audit as a pure function of parameters and inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from leakaudit.errors import InputError
from leakaudit.formats.phrases import first_line
from leakaudit.models.spaces import Pixels

Mode = Literal["train", "eval"]
Params = Mapping[str, Tensor]
LossFunction = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of (B, K) logits; labels are (B,) integers or (B, K) probabilities."""
    return F.cross_entropy(logits, labels)


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """As `cross_entropy`, summed over the batch."""
    return F.cross_entropy(logits, labels, reduction="sum")


LOSSES: dict[tuple[str, str], LossFunction] = {
    ("cross-entropy", "mean"): cross_entropy,
    ("cross-entropy", "sum"): cross_entropy_sum,
}


def loss_named(loss: str, reduction: str) -> LossFunction:
    """The loss of `LOSSES`; `InputError` for an unknown one."""
    if (loss, reduction) not in LOSSES:
        known = ", ".join("/".join(key) for key in LOSSES)
        raise InputError(f"loss {loss}/{reduction} is not supported; accepted: {known}")
    return LOSSES[loss, reduction]


@dataclass(frozen=True)
class Classifier:
    """The fully connected layer that makes the logits: names of its weight (K, F) and bias (K,)."""

    weight: str
    bias: str | None
    module: str


@dataclass(frozen=True)
class Victim:
    """A module, its checkpoint and its loss, without hidden state.

    In train mode BatchNorm uses the batch's own statistics and leaves its running
    averages alone (`observe` in `leakaudit.rounds` reports those separately), and
    dropout is switched off, because its masks are unknown to everybody but the client.

    `params` are the parameters that train, in module order; `frozen` are those that do not.

    Build it with `Victim.of`, which copies the module; tensors are never written.
    """

    module: nn.Module
    params: dict[str, Tensor]
    frozen: dict[str, Tensor]
    buffers: dict[str, Tensor]
    space: Pixels
    num_classes: int
    mode: Mode = "eval"
    loss_function: LossFunction = cross_entropy
    name: str = "model"

    @classmethod
    def of(
        cls,
        module: nn.Module,
        space: Pixels,
        num_classes: int,
        mode: Mode = "eval",
        loss: str = "cross-entropy",
        reduction: str = "mean",
        name: str = "model",
    ) -> Victim:
        """Copy `module` and take its parameters and buffers as the checkpoint.

        Raises `InputError` for an unknown loss, or a module that does not map
        (B, *space.shape) to (B, num_classes).
        """
        function = loss_named(loss, reduction)
        module = _prepare(copy.deepcopy(module), mode)
        victim = cls(
            module=module,
            params={name: p.detach() for name, p in module.named_parameters() if p.requires_grad},
            frozen={name: p.detach() for name, p in module.named_parameters() if not p.requires_grad},
            buffers={name: b.detach() for name, b in module.named_buffers()},
            space=space,
            num_classes=num_classes,
            mode=mode,
            loss_function=function,
            name=name,
        )
        victim._check_shapes()
        return victim

    def with_mode(self, mode: Mode) -> Victim:
        """The same checkpoint in train or eval mode."""
        return replace(self, module=_prepare(copy.deepcopy(self.module), mode), mode=mode)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Victim:
        """The same victim on another device or in another precision; integer buffers keep their type."""
        module = copy.deepcopy(self.module).to(device=device, dtype=dtype)

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

        return replace(
            self,
            module=module,
            params={name: move(tensor) for name, tensor in self.params.items()},
            frozen={name: move(tensor) for name, tensor in self.frozen.items()},
            buffers={name: move(tensor) for name, tensor in self.buffers.items()},
        )

    @property
    def device(self) -> torch.device:
        return next(iter(self.params.values())).device

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.params.values())).dtype

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """(mean, std) a channel; None when it is unknown."""
        space = self.space
        return None if space.mean is None or space.std is None else (space.mean, space.std)

    @property
    def mode_matters(self) -> bool:
        """Whether train and eval mode give different gradients."""
        return bool(self.batch_norms())

    def logits(self, params: Params, x: Tensor) -> Tensor:
        """(B, K) outputs for model inputs (B, C, H, W)."""
        return functional_call(self.module, (dict(params), self.frozen, self.buffers), (x,))

    def loss(self, params: Params, x: Tensor, y: Tensor) -> Tensor:
        """Scalar loss; y is (B,) integers or (B, K) probabilities."""
        return self.loss_function(self.logits(params, x), y)

    def trainable(self) -> list[str]:
        """Names of parameters that receive gradients, in module order."""
        return list(self.params)

    def modules_in_order(self) -> list[tuple[str, nn.Module, Tensor, Tensor]]:
        """(name, module, input, output) of every leaf call in one forward pass of a random example."""
        calls: list[tuple[str, nn.Module, Tensor, Tensor]] = []
        handles = []

        def record(name: str, module: nn.Module) -> None:
            def hook(_: nn.Module, inputs: tuple, output: object) -> None:
                if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
                    calls.append((name, module, inputs[0], output))

            handles.append(module.register_forward_hook(hook))

        for name, module in self.module.named_modules():
            if not any(module.children()):
                record(name, module)
        try:
            with torch.no_grad():
                self.logits(self.params, self.probe())
        finally:
            for handle in handles:
                handle.remove()
        return calls

    def classifier(self) -> Classifier | None:
        """The `Linear` whose output is the logits, found by tracing; None when there is none."""
        outputs = self.modules_in_order()
        if not outputs:
            return None
        name, module, _, output = outputs[-1]
        if not isinstance(module, nn.Linear) or output.shape != (2, self.num_classes):
            return None
        return Classifier(
            weight=f"{name}.weight" if name else "weight",
            bias=(f"{name}.bias" if name else "bias") if module.bias is not None else None,
            module=name,
        )

    def features(self, x: Tensor) -> Tensor:
        """Input of the classifier layer, (B, F), differentiable in x.  Needs a `classifier()`."""
        head = self.classifier()
        if head is None:
            raise InputError(f"model {self.name} does not end in a fully connected layer")
        kept: list[Tensor] = []
        handle = self.module.get_submodule(head.module).register_forward_pre_hook(
            lambda _, inputs: kept.append(inputs[0])
        )
        try:
            self.logits(self.params, x)
        finally:
            handle.remove()
        return kept[0]

    def batch_norms(self) -> list[tuple[str, _BatchNorm]]:
        return [(name, m) for name, m in self.module.named_modules() if isinstance(m, _BatchNorm)]

    def batch_statistics(self, params: Params, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and biased variance (each (C,)) of what enters every BatchNorm, differentiable in x."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        handles = []
        for name, module in self.batch_norms():

            def hook(_: nn.Module, inputs: tuple, name: str = name) -> None:
                dims = [d for d in range(inputs[0].dim()) if d != 1]
                found[name] = (inputs[0].mean(dims), inputs[0].var(dims, unbiased=False))

            handles.append(module.register_forward_pre_hook(hook))
        try:
            self.logits(params, x)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def probe(self, count: int = 2) -> Tensor:
        """The same `count` random model inputs each time; `modules_in_order` runs on `probe()`."""
        return self.sample(count, torch.Generator().manual_seed(0))

    def probe_labels(self, count: int) -> Tensor:
        """Labels that go with `probe(count)`: every class in turn."""
        return torch.arange(count, device=self.device) % self.num_classes

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` random model inputs, on the victim's device."""
        return self.space.sample(count, generator).to(self.device, self.dtype)

    def _check_shapes(self) -> None:
        try:
            with torch.no_grad():
                shape = tuple(self.logits(self.params, self.probe()).shape)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError) as error:
            raise InputError(
                f"model {self.name} cannot take inputs of shape {self.space.shape}: {first_line(error)};"
                " state theirs by --input-shape"
            ) from error
        if shape != (2, self.num_classes):
            raise InputError(
                f"model {self.name} returns shape {shape[1:]} per example, expected ({self.num_classes},) class scores"
            )


def _prepare(module: nn.Module, mode: Mode) -> nn.Module:
    module.train(mode == "train")
    for child in module.modules():
        if isinstance(child, _BatchNorm):
            child.track_running_stats = mode == "eval" and child.running_mean is not None
        if isinstance(child, _DropoutNd):
            child.eval()
        if getattr(child, "inplace", False):
            cast(Any, child).inplace = False
    return module
