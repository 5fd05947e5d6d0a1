"""A network cut into links: wherever a single tensor carries all that the rest of the network sees.

`pieces` follows the traced graph (`torch.fx`), so that it works for any module whose control flow
does not depend on the input.  What a piece does `links` finds by trying it, not by its type: affine (a
convolution, BatchNorm in eval mode, pooling by averages, a reshape), elementwise (an activation),
or neither (max-pooling, a residual block).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from leakaudit.formats.phrases import first_line
from leakaudit.models.victim import Victim

Kind = Literal["affine", "elementwise", "neither"]
SAME = 1e-9


@dataclass(frozen=True)
class Link:
    """A piece of the network between two cuts, as a function of its input and of all tensors by name.

    Attributes:
        module: the piece; its parameters and buffers have the names they have in the whole network.
        names: those of the victim's tensors that it uses.
        kind: what it does to its input.
        incoming, outgoing: shapes of one example, without the batch dimension.
    """

    module: fx.GraphModule
    names: frozenset[str]
    kind: Kind
    incoming: torch.Size
    outgoing: torch.Size

    def __call__(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The link's output for a batch x (B, *incoming); parameters and buffers come from `tensors`."""
        return functional_call(self.module, {name: tensors[name] for name in self.names}, (x,))

    def parameters(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that the link uses."""
        return [name for name in names if name in self.names]


def tensors_of(victim: Victim) -> dict[str, Tensor]:
    """Parameters and buffers of a victim, all by name."""
    return {**victim.frozen, **victim.buffers, **victim.params}


def links(victim: Victim) -> list[Link]:
    """The `pieces` of a network, each tried to see what it does.

    Raises `ValueError` as `pieces` does.
    """
    tensors, value = tensors_of(victim), victim.probe()
    found: list[Link] = []
    with torch.no_grad():
        for piece in pieces(victim):
            names = _names(piece) & tensors.keys()
            link = Link(piece, names, "neither", value.shape[1:], value.shape[1:])
            output = link(tensors, value)
            kind = _kind(link, tensors, value, output)
            found.append(replace(link, kind=kind, outgoing=output.shape[1:]))
            value = output
    return found


def pieces(victim: Victim) -> list[fx.GraphModule]:
    """The network from its input to the input of its classifier layer (`Victim.classifier`), in pieces.

    Each takes one tensor, what the one before it returns; all that they compute is traced, not run.
    Raises `ValueError` with the reason when the network cannot be traced, has no classifier
    layer, or does not lead to it in one line.
    """
    head = victim.classifier()
    if head is None:
        raise ValueError("the model does not end in a fully connected layer")
    try:
        source, groups = _cut(fx.Tracer().trace(victim.module))
        sources = [source, *(nodes[-1] for nodes in groups)]
        found = [_piece(victim.module, *each) for each in zip(sources, groups, strict=False)]
    except Exception as error:  # tracing runs the model's own code, which may fail in any way
        raise ValueError(f"the model cannot be traced: {first_line(error)}") from error
    for index, nodes in enumerate(groups):
        if len(nodes) == 1 and nodes[0].op == "call_module" and nodes[0].target == head.module:
            return found[:index]
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


def _piece(module: nn.Module, source: fx.Node, nodes: tuple[fx.Node, ...]) -> fx.GraphModule:
    """What `nodes` make of the value of `source`; shares its layers with `module`."""
    graph = fx.Graph()
    copies = {source: graph.placeholder("x")}

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:  # a tensor of the module, which no group holds
            copies[node] = graph.node_copy(node)
        return copies[node]

    for node in nodes:
        copies[node] = graph.node_copy(node, copied)
    graph.output(copies[nodes[-1]])
    return fx.GraphModule(module, graph)


def _names(module: nn.Module) -> frozenset[str]:
    """Of parameters and buffers, all the names of those that have several."""
    parameters = module.named_parameters(remove_duplicate=False)
    buffers = module.named_buffers(remove_duplicate=False)
    return frozenset(name for name, _ in (*parameters, *buffers))


def _kind(link: Link, tensors: Mapping[str, Tensor], value: Tensor, output: Tensor) -> Kind:
    generator = torch.Generator().manual_seed(0)
    shape = (3, *value.shape[1:])
    first, second = (
        4 * torch.randn(shape, generator=generator, dtype=torch.float64).to(value) for _ in range(2)
    )
    of_first, of_second = link(tensors, first), link(tensors, second)
    if _same(of_first + of_second - link(tensors, 0 * first), link(tensors, first + second)):
        return "affine"
    if output.shape != value.shape:
        return "neither"
    order = torch.randperm(first[0].numel(), generator=generator).to(value.device)
    mixed = link(tensors, first.flatten(1)[:, order].reshape(shape)).flatten(1)
    half = torch.where(torch.rand(shape, generator=generator).to(value.device) < 0.5, first, second)
    kept = torch.where(half == first, of_first, of_second)
    equivariant = _same(mixed, of_first.flatten(1)[:, order])
    return "elementwise" if equivariant and _same(link(tensors, half), kept) else "neither"


def _same(found: Tensor, expected: Tensor) -> bool:
    tolerance = SAME if found.dtype == torch.float64 else 1e-4
    return bool((found - expected).abs().max() <= tolerance * (1e-30 + float(expected.abs().max())))
