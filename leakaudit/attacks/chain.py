"""A network cut into links: wherever a single tensor carries all that the rest of the network sees.

`links` follows the traced graph (`torch.fx`), so that it works for any module whose control flow
does not depend on the input.  What a link does is found by trying it, not by its type: affine (a
convolution, BatchNorm in eval mode, pooling by averages, a reshape), elementwise (an activation),
or neither (max-pooling, a residual block).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from leakaudit.models.victim import Victim

Kind = Literal["affine", "elementwise", "neither"]
SAME = 1e-9


@dataclass(frozen=True)
class Link:
    """A piece of the network between two cuts, as a function of its input and of all tensors by name.

    Attributes:
        module: the network it is a piece of.
        nodes: what it computes, in order, from the value of `source`.
        kind: what it does to its input.
        incoming, outgoing: shapes of one example, without the batch dimension.
    """

    module: nn.Module
    nodes: tuple[fx.Node, ...]
    source: fx.Node
    kind: Kind
    incoming: torch.Size
    outgoing: torch.Size

    def __call__(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The link's output for a batch x (B, *incoming); parameters and buffers come from `tensors`."""
        values: dict[fx.Node, Any] = {self.source: x}

        def value(node: fx.Node) -> Any:
            return tensors[str(node.target)] if node.op == "get_attr" else values[node]

        for node in self.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
            values[node] = self._call(node, tensors, args, kwargs)
        result: Tensor = values[self.nodes[-1]]
        return result

    def parameters(self, names: Mapping[str, Tensor]) -> list[str]:
        """Those of `names` that the link uses."""
        modules = tuple(f"{node.target}." for node in self.nodes if node.op == "call_module")
        direct = {str(used.target) for node in self.nodes for used in node.all_input_nodes}
        return [name for name in names if name.startswith(modules) or name in direct]

    def _call(
        self, node: fx.Node, tensors: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if node.op == "call_module":
            prefix = f"{node.target}."
            own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            return functional_call(self.module.get_submodule(str(node.target)), own, args, kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)


def tensors_of(victim: Victim) -> dict[str, Tensor]:
    """Parameters and buffers of a victim, all by name."""
    return {**victim.frozen, **victim.buffers, **victim.params}


def links(victim: Victim) -> list[Link]:
    """The network from its input to the input of its classifier layer (`Victim.classifier`).

    Raises `ValueError` with the reason when the network cannot be traced, has no classifier
    layer, or does not lead to it in one line.
    """
    head = victim.classifier()
    if head is None:
        raise ValueError("the model does not end in a fully connected layer")
    try:
        graph = fx.Tracer().trace(victim.module)
    except Exception as error:  # tracing runs the model's own code, which may fail in any way
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the model cannot be traced: {reason}") from error
    source, groups = _cut(graph)
    found: list[Link] = []
    tensors, value = tensors_of(victim), victim.probe()
    for nodes in groups:
        if len(nodes) == 1 and nodes[0].op == "call_module" and nodes[0].target == head.module:
            return found
        link = Link(victim.module, nodes, source, "neither", value.shape[1:], value.shape[1:])
        with torch.no_grad():
            output = link(tensors, value)
            kind = _kind(link, tensors, value, output)
        found.append(Link(victim.module, nodes, source, kind, value.shape[1:], output.shape[1:]))
        source, value = nodes[-1], output
    raise ValueError("the model's last fully connected layer is not reached in one line")


def _cut(graph: fx.Graph) -> tuple[fx.Node, list[tuple[fx.Node, ...]]]:
    """The input node, and the groups of nodes between the places where one value alone is still needed."""
    order = [node for node in graph.nodes if node.op not in ("get_attr", "output")]
    position = {node: index for index, node in enumerate(graph.nodes)}
    inputs = [node for node in order if node.op == "placeholder"]
    needed_until = {
        node: max((position[user] for user in node.users), default=position[node]) for node in order
    }
    groups: list[tuple[fx.Node, ...]] = []
    pending: list[fx.Node] = []
    open_until = needed_until[inputs[0]]
    for node in order:
        if node.op == "placeholder":
            continue
        pending.append(node)
        if open_until <= position[node]:
            groups.append(tuple(pending))
            pending, open_until = [], needed_until[node]
        else:
            open_until = max(open_until, needed_until[node])
    return inputs[0], groups


def _kind(link: Link, tensors: Mapping[str, Tensor], value: Tensor, output: Tensor) -> Kind:
    generator = torch.Generator().manual_seed(0)
    shape = (3, *value.shape[1:])
    first, second = (
        4 * torch.randn(shape, generator=generator, dtype=torch.float64).to(value) for _ in range(2)
    )
    if _same(
        link(tensors, first) + link(tensors, second) - link(tensors, 0 * first), link(tensors, first + second)
    ):
        return "affine"
    if output.shape != value.shape:
        return "neither"
    order = torch.randperm(first[0].numel(), generator=generator).to(value.device)
    mixed = link(tensors, first.flatten(1)[:, order].reshape(shape)).flatten(1)
    half = torch.where(torch.rand(shape, generator=generator).to(value.device) < 0.5, first, second)
    kept = torch.where(half == first, link(tensors, first), link(tensors, second))
    equivariant = _same(mixed, link(tensors, first).flatten(1)[:, order])
    return "elementwise" if equivariant and _same(link(tensors, half), kept) else "neither"


def _same(found: Tensor, expected: Tensor) -> bool:
    tolerance = SAME if found.dtype == torch.float64 else 1e-4
    return bool((found - expected).abs().max() <= tolerance * (1e-30 + float(expected.abs().max())))
