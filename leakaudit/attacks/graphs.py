"""An objective's value and gradient as one compiled graph, for descents of thousands of steps.

`make_fx` records forward pass, parameter gradients, distance, prior and the backward pass to the candidate as one
graph of tensor operations.  What does not depend on the candidate is computed once; every tensor that is left
becomes an input, so that one compiled graph serves all models, updates and labels of the same shapes; TorchInductor
fuses the rest, and on a GPU a CUDA graph replays it with a single launch.

Convolutions of few numbers are written as matrix products over unfolded patches (Chellapilla, Puri and Simard 2006):
the derivatives of a convolution's weight gradient are convolutions of odd shapes, for which libraries have no fast
kernel, while those of a product are products.
"""

from __future__ import annotations

import hashlib
import logging
import operator
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import flop_registry

from leakaudit.attacks.compiling import Function

Values = tuple[Tensor, ...]

UNFOLDED = 2**21
"""Most numbers of a convolution's patches for which a product is formed instead, of one image."""
UNFOLDED_BATCH = 2**17
"""The same of several images, for which libraries have fast kernels (docs/performance/maths.md): a LeNet's
convolutions are products up to batch 4, a ResNet-18's only at batch 1."""
STRIDED = 2**16
"""Most of them for which patches are strided views: they fuse better than F.unfold on a LeNet (a step of 0.52 against
0.65 ms at batch 1), worse on a ResNet-18 (176 against 170 ms)."""


class Untraceable(RuntimeError):
    """Why a function cannot be recorded or compiled, in one line."""


# ------------------------------------------------------------------ recording


class Unfolding(TorchFunctionMode):
    """Replaces two-dimensional convolutions by products with unfolded patches where these are small."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.conv2d, F.conv2d):
            return _convolve(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    strides, dilations = _pair(stride), _pair(dilation)
    if isinstance(padding, str) or groups != 1 or x.dim() != 4:
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    pads, kernel = _pair(padding), _pair(weight.shape[2:])
    height, width = (
        (x.shape[2 + i] + 2 * pads[i] - dilations[i] * (kernel[i] - 1) - 1) // strides[i] + 1 for i in (0, 1)
    )
    count, places = len(x), len(x) * height * width
    if weight[0].numel() * places > (UNFOLDED if count == 1 else UNFOLDED_BATCH):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    patches = _patches(x, kernel, strides, pads, dilations, weight[0].numel() * places).reshape(-1, places)
    products = weight.reshape(len(weight), -1) @ patches
    out = products.reshape(len(weight), count, height, width).permute(1, 0, 2, 3)
    return out if bias is None else out + bias.reshape(-1, 1, 1)


Pair = tuple[int, int]


def _patches(x: Tensor, kernel: Pair, strides: Pair, pads: Pair, dilations: Pair, count: int) -> Tensor:
    """The `count` numbers of all patches: those of one patch along the first dimensions, places along the last.

    Few of them are a view of the padded input, whose derivative vmap would take one candidate at a time.
    """
    if count > STRIDED or torch._C._are_functorch_transforms_active():
        return F.unfold(x, kernel, dilations, pads, strides).permute(1, 0, 2)
    padded = F.pad(x, (pads[1], pads[1], pads[0], pads[0])) if any(pads) else x
    for i in (0, 1):
        padded = padded.unfold(2 + i, dilations[i] * (kernel[i] - 1) + 1, strides[i])
    return padded[..., :: dilations[0], :: dilations[1]].permute(1, 4, 5, 0, 2, 3)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


@dataclass(frozen=True)
class Recorded:
    """A graph of tensor operations with the tensors it needs besides the function's own arguments.

    Attributes:
        graph: takes (*arguments, *constants) and returns a tuple of tensors.
        constants: what was computed once, or captured.
        key: the same for graphs that compile to the same code.
        operations: how many it runs.
        flops: of its products and convolutions.
        device: type of the device it runs on.
    """

    graph: fx.GraphModule
    constants: tuple[Tensor, ...]
    key: str
    operations: int
    flops: int
    device: str


def record(function: Function, arguments: Sequence[Tensor]) -> Recorded:
    """The graph of `function` at arguments of these shapes.

    Raises `Untraceable` when it branches on numbers, draws random ones, or does what cannot be recorded.
    """
    try:
        with Unfolding():
            module = make_fx(function)(
                *(tensor.clone() for tensor in arguments)
            )  # one given twice would be one input
    except Exception as error:  # anything that user code or an unsupported operation may raise
        raise Untraceable(_line(error)) from error
    module.graph.eliminate_dead_code()
    for node in module.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise Untraceable(f"it draws random numbers ({node.target})")
    lifted, constants = _lift(module, len(arguments))
    flops = sum(_flops(node) for node in lifted.graph.nodes)
    for node in lifted.graph.nodes:
        node.meta = {}  # the fake tensors of this recording, which another compilation would refuse
    operations = sum(node.op == "call_function" for node in lifted.graph.nodes)
    shapes = [(t.shape, t.stride(), t.dtype, t.device) for t in (*arguments, *constants)]
    key = hashlib.sha256(repr((lifted.code, shapes)).encode()).hexdigest()
    return Recorded(lifted, constants, key, operations, flops, arguments[0].device.type)


def _lift(module: fx.GraphModule, arguments: int) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """The part of a recorded graph that depends on its arguments, and the values it needs of the rest."""
    values: dict[fx.Node, Any] = {}
    graph, copies = fx.Graph(), {}
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    assert len(inputs) == arguments
    for node in inputs:
        copies[node] = graph.node_copy(node)
    needed: dict[fx.Node, None] = {}
    with torch.no_grad():
        for node in module.graph.nodes:
            if node.op == "get_attr":
                values[node] = operator.attrgetter(node.target)(module)
            elif node.op == "call_function" and all(source in values for source in node.all_input_nodes):
                arguments_of = fx.node.map_arg((node.args, node.kwargs), lambda source: values[source])
                values[node] = node.target(*arguments_of[0], **arguments_of[1])
            elif node.op in ("call_function", "output"):
                needed.update((source, None) for source in node.all_input_nodes if source in values)
    for source in needed:
        copies[source] = graph.placeholder(f"constant_{len(copies) - len(inputs)}")
        copies[source].meta["val"] = values[source]
    for node in module.graph.nodes:
        if node not in values and node not in copies:
            copies[node] = graph.node_copy(node, lambda source: copies[source])
    return fx.GraphModule(module, graph), tuple(values[source].detach() for source in needed)


def _flops(node: fx.Node) -> int:
    """Of one product or convolution; 0 for everything else."""
    packet = getattr(node.target, "overloadpacket", None)
    count = flop_registry.get(packet)
    if count is None:
        return 0

    def value(argument: Any) -> Any:
        return fx.node.map_arg(argument, lambda source: source.meta["val"])

    return int(count(*value(node.args), **value(node.kwargs), out_val=node.meta["val"]))


# ------------------------------------------------------------------ compiling


@dataclass(frozen=True)
class Compiled:
    """A graph compiled for one shape: takes what `Recorded.graph` takes; `seconds` is what compiling took."""

    function: Function
    seconds: float


def compile_graph(recorded: Recorded, arguments: Sequence[Tensor]) -> Compiled:
    """TorchInductor's code for a recorded graph.  Raises `Untraceable` with the reason, such as a missing compiler."""
    import torch._inductor as inductor

    began = time.monotonic()
    options: dict[str, Any] = {"compile_threads": 1}
    if recorded.device == "cpu":
        options["cpp_wrapper"] = True  # no Python between its kernels: 10 to 20 % of a LeNet's step
    inputs = [*(argument.detach() for argument in arguments), *recorded.constants]
    try:
        with torch.no_grad(), _without_warnings_of_cuda():
            function = inductor.compile(recorded.graph, list(inputs), options=options)
            function(*inputs)
    except Exception as error:
        raise Untraceable(_line(error)) from error

    def run(*inputs: Tensor) -> Values:
        with torch.no_grad():
            return tuple(function(*inputs))

    return Compiled(run, time.monotonic() - began)


@contextmanager
def _without_warnings_of_cuda() -> Iterator[None]:
    """TorchInductor warns on every machine that has CUDA's compilers but no device."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def bind(compiled: Compiled, constants: Values, arguments: Sequence[Tensor]) -> Function:
    """The compiled graph as a function of its arguments alone; on a GPU as a CUDA graph."""

    def function(*inputs: Tensor) -> Values:
        return compiled.function(*inputs, *constants)

    return Replayed(function, arguments) if arguments[0].is_cuda else function


class Replayed:
    """A function of fixed shapes on a GPU as one CUDA graph, launched at once instead of kernel by kernel.

    Raises `Untraceable` where it cannot be captured.
    """

    def __init__(self, function: Function, arguments: Sequence[Tensor]) -> None:
        self._function = function  # the graph reads its constants where they lie, so they must not be freed
        self._inputs = [argument.detach().clone() for argument in arguments]
        try:
            with torch.cuda.device(arguments[0].device):  # else the streams are the first GPU's
                self._graph = torch.cuda.CUDAGraph()
                aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
                aside.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(aside):
                    for _ in range(3):  # lets libraries choose and allocate before anything is captured
                        function(*self._inputs)
                torch.cuda.current_stream().wait_stream(aside)
                with torch.cuda.graph(self._graph):
                    self._outputs = function(*self._inputs)
        except RuntimeError as error:
            raise Untraceable(_line(error)) from error

    def __call__(self, *arguments: Tensor) -> Values:
        with torch.no_grad(), torch.cuda.device(self._inputs[0].device):
            for own, given in zip(self._inputs, arguments, strict=True):
                own.copy_(given)
            self._graph.replay()
            return tuple(output.clone() for output in self._outputs)


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
