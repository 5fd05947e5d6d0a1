"""Everything on a device that is not the CPU: no GPU is needed for it, see `simulated_device`.

One subprocess runs every case, because a backend is registered for a whole process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import simulated_device
from device_audits import quick, thorough

SCRIPT = Path(__file__).with_name("device_audits.py")

pytestmark = pytest.mark.skipif(
    not simulated_device.available(), reason="this PyTorch lets Python register no backend"
)


@cache
def outcomes(which: str) -> dict[str, str]:
    """What went wrong in each case, by its name; empty where nothing did."""
    command = [sys.executable, "-W", "ignore", str(SCRIPT), which]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
    return {row["case"]: row["wrong"] for row in rows}


def test_the_device_refuses_what_cuda_refuses() -> None:
    refusals = {name: wrong for name, wrong in outcomes("quick").items() if name.startswith("refuses ")}
    assert len(refusals) > 10
    assert not any(refusals.values()), refusals


@pytest.mark.parametrize("name", quick())
def test_a_device_finds_what_the_cpu_finds(name: str) -> None:
    assert not outcomes("quick")[name], outcomes("quick")[name]


@pytest.mark.thorough
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", thorough())
def test_a_device_finds_what_the_cpu_finds_in_rarer_settings(name: str) -> None:
    assert not outcomes("thorough")[name], outcomes("thorough")[name]
