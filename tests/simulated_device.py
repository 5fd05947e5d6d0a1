"""A pretended accelerator, "sim:0", whose arithmetic is the CPU's: it finds what only breaks off the CPU.

`installed()` registers it for the whole process and for good, so that no other test may share this process.  As CUDA
does, it refuses tensors of two devices in one operation (a CPU number may join pointwise ones, CPU indices may index),
generators of another device, `.numpy()`, and operations that CUDA has no kernel for.  Its tensors are plain
`torch.Tensor`s on PyTorch's key for backends from outside, "PrivateUse1": autograd, double backward, vmap and make_fx
run above it as they do above CUDA.

Its memory is the host's, lent through DLPack, so that views share memory as they should.  Every operation with a kernel
of its own gets one here: the arguments as CPU tensors on the same memory, the CPU's operation, the results lent back.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import _pytree as pytree

NAME = "sim"
HOST = torch.device("cpu")

# ------------------------------------------------------------------ memory, lent through DLPack

AS_STRIDED = torch.ops.aten.as_strided.default
EXTENSION, CPU = 12, 1
"""DLPack's numbers for the device that PyTorch calls PrivateUse1, and for the CPU."""


class _Loan(ctypes.Structure):
    """The beginning of `DLManagedTensor`, as DLPack's header has it."""

    _fields_ = (("data", ctypes.c_void_p), ("device_type", ctypes.c_int32))


_content = ctypes.pythonapi.PyCapsule_GetPointer
_content.restype, _content.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


def _moved(tensor: Tensor, device_type: int) -> Tensor:
    """A tensor on the memory of another, which lives as long as it does, and said to be elsewhere."""
    capsule = torch._C._to_dlpack(tensor)
    _Loan.from_address(_content(capsule, b"dltensor")).device_type = device_type
    moved = torch._C._from_dlpack(capsule)
    if moved.stride() == tensor.stride():
        return moved
    return _view(AS_STRIDED)(moved, tensor.shape, tensor.stride())  # DLPack makes strides of one element 1


def lent(tensor: Tensor) -> Tensor:
    """A tensor of the device on the memory of one on the CPU."""
    return _moved(tensor, EXTENSION)


def on_host(tensor: Tensor) -> Tensor:
    """A CPU tensor on the memory of one of the device; an empty one is new, so that it may grow."""
    if not tensor.numel():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    alias = _view(AS_STRIDED)(
        tensor, tensor.shape, tensor.stride()
    )  # it keeps the memory when `tensor.data` is set
    return _moved(alias, CPU)


# ------------------------------------------------------------------ operations

COPIES = {"copy_", "_copy_from", "_copy_from_and_resize", "_to_copy", "copy"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
"""Operations whose second argument, the indices, may stay on the CPU."""
NUMBERS = {
    "fill_",
    "fill",
    "masked_fill",
    "masked_fill_",
    "index_fill",
    "index_fill_",
    "index_put",
    "index_put_",
}
"""Operations that are not pointwise and take a CPU number beside tensors of the device."""
UNTOUCHED = {"is_pinned", "_pin_memory", "record_stream", "set_data", "_has_compatible_shallow_copy_type"}
UNTOUCHED |= {
    "_new_zeros_with_same_feature_meta",
    "_has_same_storage_numel",
}  # of the storage, not of the tensor


def simulated(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == NAME


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _view(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """A view's kernel only writes down a geometry, so that the CPU's serves every device."""
    return lambda *arguments, **named: op._op_dk(DispatchKey.CPU, *arguments, **named)


def _is_view(op: torch._ops.OpOverload) -> bool:
    returned = [value.alias_info for value in op._schema.returns]
    return any(alias is not None and not alias.is_write for alias in returned)


def _zeros(size: Any, **options: Any) -> Tensor:
    """PyTorch's zeros without memory cannot be lent; plain ones do."""
    return torch.zeros(size, **{**options, "device": torch.device(NAME, 0)})


PLAIN = {"_efficientzerotensor": _zeros}


RANK_DEFICIENT = {"linalg_lstsq"}
"""CUDA takes matrices of full rank only, as the CPU does not by default."""


def _lacks(name: str) -> bool:
    """Whether CUDA can do less than the CPU; all that a PyTorch without CUDA's kernels knows is the list above."""
    built = _has_kernel("aten::add.Tensor", "CUDA")
    mine = _has_kernel(name, "CPU") and not any(
        _has_kernel(name, key) for key in ("CUDA", "CompositeExplicitAutograd", "CompositeImplicitAutograd")
    )
    return (built and mine) or name.removeprefix("aten::").partition(".")[0] in RANK_DEFICIENT


class Refusal:
    """In place of an operation that CUDA lacks."""

    def __init__(self, op: torch._ops.OpOverload) -> None:
        self._op = op

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"CUDA cannot do all of what the CPU does in {self._op}")


def _is_geometry(op: torch._ops.OpOverload) -> bool:
    return _is_view(op) or torch.Tag.inplace_view in op.tags


class Kernel:
    """The CPU's operation on memory of the device, where CUDA would accept its arguments."""

    def __init__(self, op: torch._ops.OpOverload) -> None:
        name = op._schema.name.removeprefix("aten::")
        self._op = op
        self._copies, self._indexed = name in COPIES, name in INDEXED
        self._numbers = torch.Tag.pointwise in op.tags or name in NUMBERS
        self._written = [
            (i, argument.name)
            for i, argument in enumerate(op._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        given = [*_tensors((*arguments, *named.values()))]
        written = [*_tensors(arguments[i] if i < len(arguments) else named.get(n) for i, n in self._written)]
        if not self._copies:
            self._refuse_mixed(arguments, given, written)
        place = named.get("device")
        lends = any(map(simulated, given)) if place is None else torch.device(place).type == NAME
        loans: dict[int, tuple[Tensor, Tensor]] = {}

        def host(value: Any) -> Any:
            if isinstance(value, Tensor):
                if value.device.type != NAME:
                    return value
                if id(value) not in loans:
                    loans[id(value)] = (value, on_host(value))
                return loans[id(value)][1]
            if isinstance(value, (list, tuple)):
                return type(value)([host(item) for item in value])
            return HOST if isinstance(value, torch.device) else value

        with torch._C._AutoDispatchBelowAutograd():
            results = self._op(*map(host, arguments), **{name: host(value) for name, value in named.items()})
            for tensor in filter(simulated, written):
                copy = loans[id(tensor)][1]
                if tensor.data_ptr() != copy.data_ptr() or tensor.stride() != copy.stride():
                    tensor.data = lent(copy)  # `out=` and `resize_` let it grow
            mine = {id(copy): tensor for tensor, copy in loans.values()}

            def back(value: Any) -> Any:
                if isinstance(value, Tensor):
                    return mine[id(value)] if id(value) in mine else lent(value) if lends else value
                if isinstance(value, (list, tuple)):
                    return type(value)([back(item) for item in value])
                return value

            return back(results)

    def _refuse_mixed(self, arguments: tuple[Any, ...], given: list[Tensor], written: list[Tensor]) -> None:
        """As CUDA does: only numbers and indices may stay on the CPU."""
        strangers = [
            tensor for tensor in given if not simulated(tensor) and not (self._numbers and tensor.dim() == 0)
        ]
        if self._indexed and simulated(arguments[0]):
            indices = {id(tensor) for tensor in _tensors(arguments[1:2])}
            strangers = [tensor for tensor in strangers if id(tensor) not in indices]
        strangers += [tensor for tensor in written if not simulated(tensor)]
        if strangers and any(map(simulated, given)):
            shapes = ", ".join(f"{tuple(tensor.shape)} on {tensor.device}" for tensor in given)
            raise RuntimeError(
                f"Expected all tensors to be on the same device: {self._op} was given {shapes}"
            )


# ------------------------------------------------------------------ random numbers


class Generator(torch.Generator):
    """`torch.Generator`, which may also be the device's; it then draws the CPU's numbers."""

    def __new__(cls, device: torch.device | str = "cpu") -> Generator:
        made = super().__new__(cls, "cpu")
        made.place = torch.device(NAME, 0) if torch.device(device).type == NAME else HOST
        return made

    def __init__(self, device: torch.device | str = "cpu") -> None:
        pass

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.place

    def clone_state(self) -> Generator:
        return Generator(self.place).set_state(self.get_state())


class Generators(TorchFunctionMode):
    """Refuses a generator of one device for numbers on another."""

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        named = named or {}
        drawn = named.get("generator")
        if drawn is not None:
            tensors = [t for t in pytree.tree_leaves((arguments, named.get("out"))) if isinstance(t, Tensor)]
            place = torch.device(named.get("device") or (tensors[0].device if tensors else "cpu"))
            if place.type != drawn.device.type:
                raise RuntimeError(
                    f"Expected a '{place.type}' device type for generator but found '{drawn.device.type}':"
                    f" {resolve_name(function)}"
                )
        return function(*arguments, **named)


# ------------------------------------------------------------------ registration

_library: list[torch.library.Library] = []


def available() -> bool:
    """Whether this PyTorch lets Python register a backend."""
    from torch.utils import backend_registration

    return hasattr(backend_registration, "_setup_privateuseone_for_python_backend")


@contextmanager
def installed() -> Iterator[torch.device]:
    """Registers the device; leaving only ends the watch over generators."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("aten", "IMPL")
    _library.append(library)
    for name in torch._C._dispatch_get_all_op_names():
        base, _, overload = name.removeprefix("aten::").partition(".")
        if (
            not name.startswith("aten::")
            or base in UNTOUCHED
            or _has_kernel(name, "CompositeImplicitAutograd")
        ):
            continue
        op = getattr(getattr(torch.ops.aten, base), overload or "default", None)
        if op is None or (_is_geometry(op) and _has_kernel(name, "CompositeExplicitAutograd")):
            continue
        kernel = PLAIN.get(base) or (
            _view(op) if _is_view(op) else Refusal(op) if _lacks(name) else Kernel(op)
        )
        library.impl(op, kernel, "PrivateUse1")
    torch.nn.Module._apply = _apply  # type: ignore[method-assign]
    torch.Generator = Generator  # type: ignore[misc]
    Tensor.__deepcopy__ = _deepcopy  # type: ignore[method-assign]
    with Generators():
        yield torch.device(NAME, 0)


_apply_at_host = torch.nn.Module._apply


def _apply(module: torch.nn.Module, *arguments: Any) -> torch.nn.Module:
    """Between the CPU and CUDA PyTorch moves a parameter in place, and what is tied stays so; here it replaces it."""
    places: dict[Tensor, list[tuple[torch.nn.Module, str]]] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                places.setdefault(parameter, []).append((part, name))
    _apply_at_host(module, *arguments)
    for (first, own), *tied in places.values():
        for part, name in tied:
            part._parameters[name] = first._parameters[own]
    return module


_deepcopy_at_host = Tensor.__deepcopy__


def _deepcopy(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """PyTorch's own asks the storage for memory, which Python cannot lend it."""
    if not simulated(tensor):
        return _deepcopy_at_host(tensor, memo)
    if id(tensor) not in memo:
        memo[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
    return memo[id(tensor)]


def _has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
