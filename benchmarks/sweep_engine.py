"""A sweep of 50 cells (48 defended, 2 undefended) of LeNet: two processes against one, and one killed and resumed.

    python benchmarks/sweep_engine.py --config benchmarks/sweeps/efficiency.toml

Prints the wall time with one and with two workers and their ratio, and whether a sweep that was killed (SIGKILL to its
whole process group) five times at random and resumed gives the same result as the one left alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TIMES = {"created", "seconds", "environment", "command", "config", "history"}


def command(config: Path, out: Path, workers: int) -> list[str]:
    return [sys.executable, "-m", "leakaudit", "defend", "--config", str(config), "--out", str(out),
            "--workers", str(workers), "--resume"]  # fmt: skip


def timed(config: Path, out: Path, workers: int) -> float:
    began = time.monotonic()
    subprocess.run(command(config, out, workers), stdout=subprocess.DEVNULL, check=False)
    return time.monotonic() - began


def killed(config: Path, out: Path, times: int, longest: float, seed: int) -> list[float]:
    """Start, kill after a random while, and so on `times` times, then finish; the seconds before each kill."""
    generator, waits = random.Random(seed), []
    while len(waits) < times:
        process = subprocess.Popen(command(config, out, 2), stdout=subprocess.DEVNULL, start_new_session=True)
        wait = generator.uniform(0.3, 1.0) * longest
        try:
            process.wait(wait)
            break  # it finished before it could be killed
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            waits.append(wait)
    timed(config, out, 2)
    return waits


def timeless(value: Any) -> Any:
    """The result without what a clock or the folder's name decides."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in TIMES}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def result(out: Path) -> Any:
    return timeless(json.loads((out / "sweep.json").read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(
        f"{os.cpu_count()} cores, python {sys.version.split()[0]}, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')}"
    )
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        one, two = (timed(options.config, root / str(workers), workers) for workers in (1, 2))
        cells = len(result(root / "2")["cells"])
        print(
            f"{cells} cells: one process {one:.0f} s, two {two:.0f} s: {one / two:.2f} times as many cells an hour"
        )
        print(f"the same result: {result(root / '1') == result(root / '2')}")
        waits = killed(options.config, root / "killed", options.kills, two / options.kills, options.seed)
        print(f"killed {len(waits)} times, after {', '.join(f'{wait:.1f}' for wait in waits)} s, and resumed:"
              f" the same result: {result(root / 'killed') == result(root / '2')}")  # fmt: skip


if __name__ == "__main__":
    main()
