"""The closed formulas of time a step: against a recurrence, and against the virtual time of the systems."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_worlds import simulation, task

from leakaudit.federated.cost import Device, dense_bytes
from leakaudit.federated.options import AcrossTheWorld, DelayedSGD, SynchronousSGD, SystemOptions
from leakaudit.federated.scaling import (
    Cluster,
    Cost,
    all_gather,
    ring,
    speed_up,
    step_seconds,
    through_server,
    tolerated_seconds,
)

RESNET50 = 25_557_032
TALK = Device(step_seconds=0.3, latency=0.48, bandwidth=125e6)


def recurrence(
    steps: int, compute: float, delay: int, period: int, latency: float, busy: float
) -> list[float]:
    """When each step ends: computing, then a wait for the mean; exchanges queue for the link."""
    ends, arrivals, free, now = [], [], 0.0, 0.0
    for step in range(steps):
        now += compute
        if (step + 1) % period == 0:
            begin = max(now, free)
            free = begin + busy
            arrivals.append(free + latency)
        ended = step - delay + 1
        if ended > 0 and ended % period == 0:
            now = max(now, arrivals[ended // period - 1])
        ends.append(now)
    return ends


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 30),
    st.integers(1, 13),
    st.floats(0.05, 1.0),
    st.floats(0.0, 20.0),
    st.floats(0.0, 5.0),
)
def test_the_formula_is_the_long_run_of_the_recurrence(
    delay: int, period: int, compute: float, latency: float, busy: float
) -> None:
    found = step_seconds(compute, Cost(latency + busy, busy), delay, period)
    half = 40 * math.ceil((delay + 1) / period) * period
    ends = recurrence(2 * half + 1, compute, delay, period, latency, busy)
    assert (ends[2 * half] - ends[half]) / half == pytest.approx(found, rel=0.01)


CASES = [
    SynchronousSGD(batch_size=2),
    SynchronousSGD(batch_size=2, topology="all-reduce"),
    DelayedSGD(0, batch_size=2),
    DelayedSGD(3, batch_size=2),
    DelayedSGD(3, batch_size=2, topology="all-reduce"),
    AcrossTheWorld(2, 3, 1.0, batch_size=2),
    AcrossTheWorld(5, 4, 1.0, batch_size=2, topology="all-reduce"),
    AcrossTheWorld(0, 4, 1.0, batch_size=2),
]
LINKS = [Device(0.3, 0.05, 1e6), Device(0.3, 1.7, 1e6), Device(0.3, 0.1, 1.5e3), Device(0.3, 0.9, 8e3)]


@pytest.mark.parametrize("device", LINKS, ids=lambda d: f"{d.latency:g}s-{d.bandwidth:g}B")
@pytest.mark.parametrize("options", CASES, ids=repr)
def test_the_formula_is_the_virtual_time_of_the_systems(options: SystemOptions, device: Device) -> None:
    world = task(clients=3, latency=device.latency, bandwidth=device.bandwidth)
    parameters = dense_bytes(world.victim.params) // 4
    delay, period = getattr(options, "delay", 0), getattr(options, "period", 1)
    cluster = Cluster(parameters, 3, device, getattr(options, "topology", "server"))
    run = simulation(world, steps=84, every=84)
    run.seen.wants = lambda step: False
    times = []
    run.on_step = lambda *_: times.append(run.env.now)
    run.run(options)
    cycle = 2 * period * (delay + 1)
    assert (times[-1] - times[-1 - cycle]) / cycle == pytest.approx(cluster.step(delay, period), rel=1e-6)


@pytest.mark.parametrize("topology", ["server", "all-reduce"])
def test_sparse_messages_take_what_the_formula_says(topology: str) -> None:
    """With one large tensor, of which every worker sends the same share; a mean holds at most all of them."""
    device = Device(0.3, 0.4, 2e3)
    world = task(clients=3, latency=device.latency, bandwidth=device.bandwidth)
    run = simulation(world, steps=60, every=60)
    times = []
    run.on_step = lambda *_: times.append(run.env.now)
    run.run(AcrossTheWorld(0, 2, 0.2, batch_size=2, topology=topology))  # type: ignore[arg-type]
    # float64 here: 8 bytes a number and 4 for its position
    sent = sum(-(-p.numel() // 5) for p in world.victim.params.values()) * 12
    means = [m.size for m in run.messages if m.kind == "mean"]
    if topology == "all-reduce":
        exchange = all_gather(sent, 3, device)
        assert times[-1] / 60 == pytest.approx(step_seconds(0.3, exchange, 0, 2))
        assert exchange == Cost(pytest.approx(2 * (0.4 + sent / 2e3)), pytest.approx(2 * sent / 2e3))
        return
    assert {m.size for m in run.messages if m.kind == "update"} == {sent}
    assert sent <= max(means) <= 3 * sent
    least, most = (step_seconds(0.3, through_server(sent, down, device), 0, 2) for down in (sent, 3 * sent))
    assert least <= times[-1] / 60 <= most


def test_twenty_steps_of_delay_tolerate_six_seconds() -> None:
    assert tolerated_seconds(0.3, 20) == pytest.approx(6.0)
    for period in (1, 12):
        assert step_seconds(0.3, Cost(6.0, 0.0), 20, period) == pytest.approx(0.3)
        assert step_seconds(0.3, Cost(6.1, 0.0), 20, period) > 0.3
    assert step_seconds(0.3, Cost(12.0, 0.0), 20) == pytest.approx((0.3 + 12.0) / 21)
    assert step_seconds(0.3, Cost(12.0, 0.0), 0) == pytest.approx(12.3)
    assert step_seconds(0.3, Cost(1.0, 0.9), 20, 12) == pytest.approx(0.3)
    assert step_seconds(0.3, Cost(4.0, 3.9), 20, 12) == pytest.approx(3.9 / 12), "bytes are not hidden"


def test_the_setting_of_the_talk() -> None:
    """ResNet-50 on 8 workers 480 ms apart, 300 ms a step, links of 1 Gbit/s."""
    size = RESNET50 * 4
    assert size / 2**20 == pytest.approx(97.5, abs=0.05), "MiB in fp32"
    naive = Cluster(RESNET50, 8, TALK, "all-reduce")
    seconds = 14 * (0.48 + size / 8 / 125e6)
    assert naive.step() == pytest.approx(0.3 + seconds)
    assert naive.speed_up() / 8 == pytest.approx(0.0355, abs=5e-5)
    server = replace(naive, topology="server")
    assert server.speed_up() / 8 == pytest.approx(0.3 / (0.3 + 2 * (0.48 + size / 125e6)))
    assert server.speed_up(20, 12, 0.01) == 8.0
    assert server.speed_up(20) / 8 == pytest.approx(0.3 / (size / 125e6)), "bound by bandwidth"
    assert replace(naive, workers=1).speed_up() == 1.0
    assert speed_up(8, 0.3, 0.6) == 4.0
    assert ring(8.0, 4, Device(0, 0.5, 1.0)) == Cost(6 * (0.5 + 2.0), 12.0)


def test_the_formulas_need_no_torch() -> None:
    script = "import sys, leakaudit.federated.scaling\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
