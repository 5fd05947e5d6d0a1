"""The claims of the talks on distributed training: accuracy with delay, scaling, and tolerance of latency.

    python benchmarks/distributed.py --data cifar10_train_first2000.npz cifar10_test_first2000.npz --out claims.json
    python benchmarks/distributed.py --out scaling.json --plot scaling.svg

(a) Held-out accuracy of the same number of steps, with --data TRAIN TEST: mean over the seeds and its 95 % interval
    (Student's t), and the mean paired difference to the first system, in percentage points.  Equal seeds mean
    equal starts, shares of the data and batches.  A run's accuracy is the mean of its last two measurements, after
    five sixths of the steps and after all.  The table is printed and saved after every seed.
(b) Scaling, speed-up over one worker divided by the workers, from the cost model alone (no training).
(c) Seconds a step of ResNet-50 at 300 ms a step, against the seconds that an exchange takes.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import Template
from scipy.stats import t as student

from leakaudit.atomic import write_atomically
from leakaudit.data import PrivateBatch, load_batch
from leakaudit.federated.cost import Device
from leakaudit.federated.options import SYSTEMS, SystemOptions
from leakaudit.federated.population import PopulationOptions, draw_population
from leakaudit.federated.scaling import Cluster, Cost, step_seconds
from leakaudit.federated.seen import Seen
from leakaudit.federated.simulation import Limits, Simulation
from leakaudit.federated.task import Task
from leakaudit.federated.trainer import Trainer
from leakaudit.federated.training import Examples
from leakaudit.media import medium_of
from leakaudit.models.zoo import NORMALISATIONS, load_victim
from leakaudit.report.charts import Tick
from leakaudit.report.sweep_plots import Axis, Plot, Stroke, log_axis
from leakaudit.spec import parse

ACCURACY = (
    "ssgd:learning_rate=0.1",
    "dssgd:learning_rate=0.1,delay=4",
    "dssgd:learning_rate=0.1,delay=20",
    *(
        f"dts:learning_rate=0.1,keep=1,delay={delay},period={period}"
        for delay, period in ((4, 4), (8, 8), (12, 8), (20, 12))
    ),
    "dgc:learning_rate=0.02,keep=0.01,warmup=100",
    "dts:learning_rate=0.02,keep=0.01,warmup=100,delay=4,period=4",
    "dts:learning_rate=0.02,keep=0.01,warmup=100,delay=20,period=12",
)
RESNET50 = 25_557_032
LATENCIES = (0.001, 0.01, 0.1, 0.24, 0.48, 1.0, 2.0)
WORKERS = (1, 2, 4, 8, 16, 32, 64)
EXCHANGES = (0.0, 0.5, 1.0, 2.0, 4.0, 6.0, 8.0, 12.0)


@dataclass(frozen=True)
class Line:
    """One way to train: a step's seconds come from `Cluster.step(delay, period, keep)`."""

    name: str
    topology: str
    delay: int = 0
    period: int = 1
    keep: float = 1.0


LINES = (
    Line("ssgd, ring", "all-reduce"),
    Line("ssgd, server", "server"),
    Line("dssgd d20, ring", "all-reduce", 20),
    Line("dssgd d20, server", "server", 20),
    Line("dts d20T12, ring", "all-reduce", 20, 12),
    Line("dts d20T12 1 %, server", "server", 20, 12, 0.01),
)


# ------------------------------------------------------------------ (a) accuracy


def world(train: PrivateBatch, test: PrivateBatch, model: str, workers: int, seed: int) -> Task:
    """Fresh parameters and fresh shares of the data from `seed`."""
    victim = load_victim(
        model, num_classes=10, normalisation=NORMALISATIONS["cifar10"], seed=seed, mode="train"
    )
    x, y = medium_of(victim).tensors(victim, train)
    clients = draw_population(PopulationOptions(clients=workers), y, seed)
    return Task(victim, Examples(x, y), clients, Examples(*medium_of(victim).tensors(victim, test)))


def trained(task: Task, options: SystemOptions, steps: int, seed: int) -> dict[str, Any]:
    run = Simulation(
        task,
        Trainer(task, together=1),
        Seen(lambda step: False),
        Limits(steps=steps, every=max(1, steps // 6)),
        seed,
    )
    began = time.process_time()
    run.run(options)
    curve = [(point.step, point.quality["all"].accuracy, point.quality["all"].loss) for point in run.curve]
    return {
        "seed": seed,
        "accuracy": statistics.fmean(point[1] for point in curve[-2:]),
        "curve": curve,
        "virtual_seconds": run.env.now,
        "uploaded": run.uploaded,
        "cpu_seconds": time.process_time() - began,
    }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval; nan for one value."""
    if len(values) == 1:
        return values[0], math.nan
    quantile = float(student.ppf(0.975, len(values) - 1))
    return statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(len(values))


def accuracy(options: argparse.Namespace) -> Iterator[dict[str, list[dict[str, Any]]]]:
    """All runs so far by system, after every seed."""
    train, test = (load_batch(path, (3, 32, 32), None, classes=10) for path in options.data)
    runs: dict[str, list[dict[str, Any]]] = {spec: [] for spec in options.systems}
    for seed in range(options.seeds):
        for spec in options.systems:
            task = world(train, test, options.model, options.workers, seed)
            run = trained(task, parse(spec, SYSTEMS, "system"), options.steps, seed)
            runs[spec].append(run)
            print(json.dumps({"system": spec, **run}), flush=True)
        yield runs


def summaries(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Means and intervals by system; differences to the first."""
    found: list[dict[str, Any]] = []
    first = [100 * run["accuracy"] for run in next(iter(runs.values()))]
    for spec, own in runs.items():
        shares = [100 * run["accuracy"] for run in own]
        mean, half = interval(shares)
        shift, around = interval([ours - theirs for ours, theirs in zip(shares, first, strict=True)])
        found.append(
            {
                "system": spec,
                "accuracy": mean,
                "accuracy_half": half,
                "difference": shift,
                "difference_half": around,
                "loss": statistics.fmean(run["curve"][-1][2] for run in own),
                "megabytes": statistics.fmean(run["uploaded"] for run in own) / 1e6,
                "cpu_seconds": statistics.fmean(run["cpu_seconds"] for run in own),
                "runs": own,
            }
        )
    return found


def accuracy_rows(found: Sequence[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    yield "system", "accuracy, %", "difference, points", "held-out loss", "sent, MB", "CPU s a run"
    for each in found:
        yield (
            f"`{each['system']}`",
            f"{each['accuracy']:.1f} ± {each['accuracy_half']:.1f}",
            f"{each['difference']:+.1f} ± {each['difference_half']:.1f}",
            f"{each['loss']:.2f}",
            f"{each['megabytes']:.0f}",
            f"{each['cpu_seconds']:.0f}",
        )


# ------------------------------------------------------------------ (b) scaling and (c) latency


def scaling(line: Line, workers: int, latency: float, bandwidth: float) -> float:
    """Speed-up divided by the workers, in (0, 1]."""
    cluster = Cluster(RESNET50, workers, Device(0.3, latency, bandwidth), line.topology)  # type: ignore[arg-type]
    return cluster.speed_up(line.delay, line.period, line.keep) / workers


def figure(share: float) -> str:
    return f"{share:.3f}" if share >= 0.0995 else f"{share:.4f}"


def scaling_rows(
    heads: Sequence[str], cells: Sequence[tuple[int, float]], bandwidth: float
) -> Iterator[tuple[str, ...]]:
    """One row a line; `cells` are (workers, latency)."""
    yield "system", *heads
    for line in LINES:
        yield line.name, *(figure(scaling(line, workers, latency, bandwidth)) for workers, latency in cells)


def naive_rows(workers: int = 8, latency: float = 0.48) -> Iterator[tuple[str, ...]]:
    """What synchronous training scales to at other bandwidths."""
    yield "bandwidth", "ring", "server"
    for bandwidth in (math.inf, 1.25e9, 125e6, 12.5e6, slow_enough(0.008, workers, latency)):
        mbit = "no limit" if bandwidth == math.inf else f"{bandwidth * 8 / 1e6:.0f} Mbit/s"
        yield mbit, *(figure(scaling(line, workers, latency, bandwidth)) for line in LINES[:2])


def slow_enough(share: float, workers: int, latency: float) -> float:
    """Bytes a second at which a ring of synchronous workers scales to `share`."""
    seconds = 0.3 / share - 0.3 - 2 * (workers - 1) * latency
    return 2 * (workers - 1) * RESNET50 * 4 / workers / seconds


def latency_rows(delays: Sequence[int] = (0, 4, 20)) -> Iterator[tuple[str, ...]]:
    yield "exchange, s", *("ssgd" if delay == 0 else f"dssgd d{delay}" for delay in delays), "dts d20T12"
    for seconds in EXCHANGES:
        cost = Cost(seconds, 0.0)
        steps = [*(step_seconds(0.3, cost, delay) for delay in delays), step_seconds(0.3, cost, 20, 12)]
        yield f"{seconds:g}", *(f"{step:.3f}" for step in steps)


# ------------------------------------------------------------------ plot

HUES = ("#0072b2", "#b34700", "#00795b", "#a3447c", "#7a6400", "#5b4bb5")
DASHES = ("", "7 4", "2 3", "10 3 2 3", "1 5", "12 5")

SVG = Template(
    """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {{ p.width + 190 }} {{ p.height }}" role="img"
 aria-label="{{ p.description }}" font-family="sans-serif" font-size="11" fill="#333">
<rect width="100%" height="100%" fill="#fff"/>
<text x="{{ p.left }}" y="15" font-size="13" font-weight="bold">{{ p.title }}</text>
{% for tick in p.y_ticks -%}
<line x1="{{ p.left }}" x2="{{ p.right }}" y1="{{ tick.place }}" y2="{{ tick.place }}" stroke="#ddd"/>
<text x="{{ p.left - 8 }}" y="{{ tick.place + 4 }}" text-anchor="end">{{ tick.text }}</text>
{% endfor %}
{%- for tick in p.x_ticks -%}
<text x="{{ tick.place }}" y="{{ p.bottom + 17 }}" text-anchor="middle">{{ tick.text }}</text>
{% endfor -%}
<text x="{{ (p.left + p.right) / 2 }}" y="{{ p.bottom + 36 }}" text-anchor="middle">{{ p.x_label }}</text>
{% for stroke in p.strokes -%}
<polyline points="{{ stroke.points }}" {{ stroke.look }} fill="none" stroke-width="2"/>
<path d="M{{ p.right + 14 }},{{ 50 + 22 * loop.index }}h30" {{ stroke.look }} stroke-width="2"/>
<text x="{{ p.right + 50 }}" y="{{ 54 + 22 * loop.index }}">{{ stroke.text }}</text>
{% endfor -%}
</svg>
"""
)


def plot(bandwidth: float) -> str:
    """Scaling of 8 workers against the latency one way, as an SVG document."""
    latencies = [10 ** (-3 + 3.5 * i / 70) for i in range(71)]
    left, right, top, bottom = 54, 424, 30, 256
    x, y = log_axis((1e-3, 10**0.5), left, right, margin=0), Axis(0.0, 1.05, bottom, top)
    strokes = []
    for line, hue, dash in zip(LINES, HUES, DASHES, strict=True):
        shares = [scaling(line, 8, latency, bandwidth) for latency in latencies]
        points = " ".join(f"{x.at(t)},{y.at(share)}" for t, share in zip(latencies, shares, strict=True))
        strokes.append(Stroke(points, f'stroke="{hue}" stroke-dasharray="{dash}"', line.name))
    ticks = [Tick(x.at(t), f"{1000 * t:g} ms") for t in (1e-3, 1e-2, 0.1, 0.48, 2.0)]
    drawing = Plot(
        f"Scaling of 8 workers, ResNet-50, 300 ms a step, {bandwidth * 8 / 1e9:g} Gbit/s",
        "Speed-up divided by the number of workers, against latency, for synchronous, delayed and sparse training",
        ticks,
        y.ticks(),
        "latency one way",
        strokes=strokes,
        top=top,
    )
    return SVG.render(p=drawing)


# ------------------------------------------------------------------ output


def table(title: str, rows: Iterator[tuple[str, ...]]) -> str:
    head, *rest = rows
    lines = [head, tuple("---" for _ in head), *rest]
    return "\n".join([f"\n**{title}**\n", *(f"| {' | '.join(line)} |" for line in lines)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", nargs=2, metavar=("TRAIN", "TEST"))
    parser.add_argument("--model", default="lenet:activation=relu")
    parser.add_argument("--systems", nargs="+", default=ACCURACY)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--bandwidth", type=float, default=125e6, help="bytes a second, of (b)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path, help="SVG of (b)")
    options = parser.parse_args()
    torch.set_num_threads(1)

    bandwidth = options.bandwidth
    by_latency = [f"{1000 * latency:g} ms" for latency in LATENCIES], [(8, latency) for latency in LATENCIES]
    by_workers = [f"{workers}" for workers in WORKERS], [(workers, 0.48) for workers in WORKERS]
    link = f"ResNet-50, 300 ms a step, {bandwidth * 8 / 1e6:.0f} Mbit/s"
    print(
        table(
            f"(b) scaling of 8 workers against latency one way; {link}", scaling_rows(*by_latency, bandwidth)
        )
    )
    print(table(f"(b) scaling against workers, 480 ms one way; {link}", scaling_rows(*by_workers, bandwidth)))
    print(table("(b) scaling of synchronous SGD, 8 workers, 480 ms one way", naive_rows()))
    print(table("(c) seconds a step at 300 ms of computing", latency_rows()), flush=True)

    if options.plot:
        write_atomically(options.plot, plot(bandwidth).encode())

    found: list[dict[str, Any]] = []
    for runs in accuracy(options) if options.data else ():
        found = summaries(runs)
        seeds = len(found[0]["runs"])
        title = f"(a) accuracy, {options.workers} workers, {options.steps} steps, {seeds} seeds"
        print(table(title, accuracy_rows(found)), flush=True)
        save(options, found)
    save(options, found)


def save(options: argparse.Namespace, found: Sequence[dict[str, Any]]) -> None:
    if options.out:
        write_atomically(options.out, (json.dumps(document(options, found), indent=1) + "\n").encode())


def document(options: argparse.Namespace, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "plot", "data")}
    cells = [*((8, latency) for latency in LATENCIES), *((workers, 0.48) for workers in WORKERS)]
    shares = [
        {
            **asdict(line),
            "workers": workers,
            "latency": latency,
            "scaling": scaling(line, workers, latency, options.bandwidth),
        }
        for line in LINES
        for workers, latency in cells
    ]
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return {"settings": settings, "versions": versions, "accuracy": list(found), "scaling": shares}


if __name__ == "__main__":
    main()
