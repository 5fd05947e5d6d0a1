"""What the speed benchmarks share: paired timings, peak memory, the machine, and a table beside its JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import leakaudit


def options(description: str | None) -> argparse.ArgumentParser:
    """A parser with the two options that every speed benchmark has, --threads and --json."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch; all cores")
    parser.add_argument("--json", type=Path, help="write rows and surroundings there too")
    return parser


def surroundings() -> dict[str, Any]:
    """Machine and versions, as they belong beside every figure."""
    cuda = torch.cuda.is_available()
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "leakaudit": leakaudit.__version__,
        "command": " ".join(["python", *sys.argv]),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def finish() -> None:
    """Wait for the GPU, where there is one; without it a timing would only count launches."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(function: Callable[[], object]) -> float:
    """Wall seconds of one call, the GPU's work included."""
    finish()
    began = time.perf_counter()
    function()
    finish()
    return time.perf_counter() - began


def paired(functions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median wall seconds of each function over `rounds` in which all of them take turns.

    Each is called twice beforehand, so that compiling and first allocations are not counted.  Turns make a ratio
    fair on a machine whose speed varies.
    """
    for function in functions.values():
        function()
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(seconds(function))
    return {name: statistics.median(found) for name, found in times.items()}


def peak_memory() -> dict[str, float]:
    """Largest resident set of this process so far and largest allocation on the GPU, in MiB."""
    found = {"cpu_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if torch.cuda.is_available():
        found["gpu_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return found


def rounded(value: Any) -> Any:
    """Floats to three digits, as far as a benchmark's noise leaves any."""
    return float(f"{value:.3g}") if isinstance(value, float) else value


def show(title: str, rows: Sequence[Mapping[str, Any]], target: Path | None) -> None:
    """The rows as a table on stdout, whose columns are the keys of all of them; with `target`, JSON there as well."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*("" if row.get(key) is None else str(rounded(row[key])) for key in columns))
    machine = surroundings()
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    console.print(
        ", ".join(f"{key} {value}" for key, value in machine.items() if value is not None), soft_wrap=True
    )
    if target is not None:
        found = {"title": title, "surroundings": machine, "memory": peak_memory(), "rows": list(rows)}
        target.write_text(json.dumps(found, indent=2) + "\n")
