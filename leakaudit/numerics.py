"""The arithmetic of an audit on a GPU: float32 that is float32, and what only the CPU can solve.

PyTorch lets cuDNN round what convolutions read to TF32, 10 bits of mantissa, unless told otherwise: the simulated
gradient would then miss the shared one by 1e-3, an exact attack would not find its solution, and what is provably in
the update would look as if it were not.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor


@contextmanager
def faithful(device: torch.device) -> Iterator[None]:
    """On CUDA, inside: no TF32 in products and convolutions, and deterministic algorithms where PyTorch has them.

    Put back afterwards.  Elsewhere nothing changes: arithmetic on the CPU is like that anyway.
    """
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    precision = torch.get_float32_matmul_precision()
    chosen = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    with (
        torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
        torch.set_float32_matmul_precision("highest")
        torch.use_deterministic_algorithms(True, warn_only=True)
        memory.fill_uninitialized_memory = False  # a kernel more for every new tensor
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
            torch.use_deterministic_algorithms(chosen, warn_only=warn_only)
            memory.fill_uninitialized_memory = filled


def least_squares(
    a: Tensor, b: Tensor, driver: Literal["gelsy", "gelsd"] = "gelsy", rcond: float | None = None
) -> Tensor:
    """The shortest X that minimises |a X - b|: (m, n) and (m, k) -> (n, k), by way of the CPU.

    On CUDA `torch.linalg.lstsq` takes matrices of full rank only.  For `driver` and `rcond` see there.
    """
    solution: Tensor = torch.linalg.lstsq(a.cpu(), b.cpu(), rcond=rcond, driver=driver).solution
    return solution.to(a.device)
