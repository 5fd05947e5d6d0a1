"""Papaya's claim on a small scale: time to a target and perplexity of data-rich clients, by system.

    python benchmarks/papaya.py --text ../shared/data/text --seeds 0 1 2

A next-character model on real text: clients with little data write film reviews and the example sentences of
linguists (--text, .tsv files with a column `sentence`), those with much data write Python's documentation
(`pydoc_data.topics` of this Python).  The share of documentation in a client's text grows with its rank r by data,
max(0, 2 r - 1): none up to the median client, all of it for the largest.  Clients with much data are slow: the
logarithms of data and of seconds a step are correlated by --correlation.

The model is Bengio et al. 2003 on characters: the embeddings of the last 8, one hidden layer, the next one.
Every run goes on until the server has applied --updates clients' updates, whatever the system.  One JSON line
a run, then a Markdown table: means over seeds with 95 % intervals (Student's t).
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import platform
import re
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data import topics

import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

from leakaudit.federated.federated_averaging import asked
from leakaudit.federated.options import CutOff, FedBuff, FederatedAveraging, LocalTraining, OverSelection
from leakaudit.federated.population import Client, PopulationOptions, draw_population
from leakaudit.federated.seen import Observation, Seen
from leakaudit.federated.simulation import Limits, Simulation
from leakaudit.federated.task import Task
from leakaudit.federated.trainer import Trainer
from leakaudit.federated.training import Examples
from leakaudit.models.spaces import Tokens
from leakaudit.models.victim import Victim
from leakaudit.randomness import fork

LENGTH, CONTEXT, EMBEDDING, HIDDEN = 32, 8, 16, 96
ALPHABET = " abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"()[]{}<>=+-*/_&%#@\n"
HELD_OUT = 0.2
TITLES = {
    "fedavg": "fedavg, waits for all",
    "sync": "sync, over-selection",
    "timeout": "timeout, cut-off",
    "fedbuff": "fedbuff",
}
GROUPS = {"top 25 %": 0.25, "top 1 %": 0.01}


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    reviews, documentation = windows(sentences(options.text)), windows(manual())
    print(json.dumps(surroundings(options, len(reviews), len(documentation))), flush=True)
    runs = []
    for correlation in options.correlation:
        for seed in options.seeds:
            world = make_world(reviews, documentation, options, correlation, seed)
            for name, system in systems(options).items():
                run = trained(world, system, options, seed)
                run = {"system": name, "correlation": correlation, "seed": seed, **run}
                print(json.dumps(run), flush=True)
                runs.append(run)
    for correlation in options.correlation:
        print(table([run for run in runs if run["correlation"] == correlation], correlation, options))


def systems(options: argparse.Namespace) -> dict[str, LocalTraining]:
    """The same clients' code and rates; the concurrency of FedBuff is the number asked by over-selection."""
    local = {
        "local_steps": options.local_steps,
        "batch_size": 8,
        "local_learning_rate": options.local_rate,
        "server_learning_rate": options.server_rate,
        "weighting": "examples",
    }
    over = OverSelection(cohort=options.cohort, **local)
    made: dict[str, LocalTraining] = {
        "fedavg": FederatedAveraging(cohort=options.cohort, **local),
        "sync": over,
        "timeout": CutOff(cohort=options.cohort, cut_off=options.cut_off, **local),
        "fedbuff": FedBuff(
            buffer=options.buffer,
            concurrency=asked(over),
            **{**local, "server_learning_rate": options.buffer_rate},
        ),
    }
    return {name: made[name] for name in options.systems}


# --- text ---


def sentences(folder: Path) -> str:
    """The column `sentence` of every .tsv file, a line each, in the order of their names."""
    lines = []
    for path in sorted(folder.glob("*.tsv")):
        with path.open(encoding="utf-8", newline="") as file:
            lines += [row["sentence"] for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
    if not lines:
        raise SystemExit(f"{folder} holds no .tsv file; give --text a folder of them with a column sentence")
    return "\n".join(lines)


def manual() -> str:
    """Python's documentation of its topics, with runs of spaces and of lines made one."""
    text = "\n".join(text for _, text in sorted(topics.topics.items()))
    return re.sub(r"\s*\n\s*", "\n", re.sub(r"[ \t]+", " ", text))


def windows(text: str) -> Tensor:
    """(N, LENGTH + 1) int64 character numbers; what is not in ALPHABET is left out, letters in lower case."""
    number = {character: index for index, character in enumerate(ALPHABET)}
    numbers = [number[c] for c in text.lower() if c in number]
    count = len(numbers) // (LENGTH + 1)
    return torch.tensor(numbers[: count * (LENGTH + 1)]).view(count, LENGTH + 1)


# --- clients ---


def make_world(
    reviews: Tensor, documentation: Tensor, options: argparse.Namespace, correlation: float, seed: int
) -> Task:
    population = PopulationOptions(
        clients=options.clients,
        size_spread=options.size_spread,
        step_seconds=options.step_seconds,
        speed_spread=options.speed_spread,
        slow_with_data=correlation,
        latency=0.1,
        bandwidth=1e6,
    )
    drawn = draw_population(population, torch.zeros(options.windows, LENGTH), seed)
    by_data = sorted(drawn, key=lambda client: client.examples)
    draw = fork(seed, "text")
    piles = [pile[torch.randperm(len(pile), generator=draw)] for pile in (reviews, documentation)]
    train, test, clients, owners = [], [], [], []
    start = 0
    for rank, client in enumerate(by_data):
        share = max(0.0, 2 * (rank + 1) / len(by_data) - 1)
        formal = round(share * client.examples)
        own, piles = taken(piles, (client.examples - formal, formal))
        own = own[torch.randperm(len(own), generator=draw)]
        held = min(len(own) - 1, max(1, round(HELD_OUT * len(own))))
        test.append(own[:held])
        train.append(own[held:])
        rows = torch.arange(start, start + len(own) - held)
        start += len(rows)
        clients.append(replace(client, rows=rows))
        owners += [rank] * held
    owner = torch.tensor(owners)
    first = {name: len(by_data) - max(1, round(part * len(by_data))) for name, part in GROUPS.items()}
    groups = {name: (owner >= rank).nonzero().flatten() for name, rank in first.items()}
    ordered = tuple(sorted(clients, key=lambda client: client.index))
    return Task(model(seed), examples(train), ordered, examples(test), groups=groups)


def taken(piles: Sequence[Tensor], counts: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """So many windows off the top of each pile, and what is left."""
    for pile, count in zip(piles, counts, strict=True):
        if len(pile) < count:
            raise SystemExit("not enough text; give fewer --windows or more --text")
    own = torch.cat([pile[:count] for pile, count in zip(piles, counts, strict=True)])
    return own, [pile[count:] for pile, count in zip(piles, counts, strict=True)]


def examples(parts: Iterable[Tensor]) -> Examples:
    text = torch.cat(list(parts))
    return Examples(text[:, :-1].contiguous(), text[:, 1:].contiguous())


# --- model ---


class NextCharacter(nn.Module):
    """(N, L) characters to (N, L, V) scores of the next ones."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(ALPHABET), EMBEDDING)
        self.hidden = nn.Linear(CONTEXT * EMBEDDING, HIDDEN)
        self.output = nn.Linear(HIDDEN, len(ALPHABET))

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(self.embedding(x), (0, 0, CONTEXT - 1, 0))
        before = torch.cat([padded[:, shift : shift + x.shape[1]] for shift in range(CONTEXT)], dim=-1)
        return self.output(torch.tanh(self.hidden(before)))


def next_character_loss(scores: Tensor, following: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, 1), following.flatten())


def model(seed: int) -> Victim:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fork(seed, "model").initial_seed())
        module = NextCharacter()
    return Victim(
        module=module,
        params={name: p.detach() for name, p in module.named_parameters()},
        frozen={},
        buffers={},
        space=Tokens(len(ALPHABET), LENGTH, None),  # type: ignore[arg-type]  # as LanguageVictim's
        num_classes=len(ALPHABET),
        mode="train",
        loss_function=next_character_loss,
    )


# --- runs ---


@dataclass
class Contributions:
    """Counts whose updates the server applies, and how stale they are."""

    who: Counter[int]
    staleness: list[int]

    def __call__(self, seen: Observation) -> None:
        if seen.observer is None:
            self.who.update(member.client for member in seen.members)
            self.staleness += [member.staleness for member in seen.members]

    def share(self, clients: Iterable[Client]) -> float:
        return sum(self.who[client.index] for client in clients) / self.who.total()


def trained(world: Task, system: LocalTraining, options: argparse.Namespace, seed: int) -> dict[str, object]:
    contributions = Contributions(Counter(), [])
    step_size = system.buffer if isinstance(system, FedBuff) else options.cohort
    simulation = Simulation(
        world,
        Trainer(world),
        Seen(lambda step: True, contributions),
        Limits(steps=options.updates, every=max(1, round(options.measure_every / step_size))),
        seed,
        log=0,
    )

    def enough(*_: object) -> None:
        simulation.done = simulation.updates >= options.updates

    simulation.on_step = enough
    began = time.perf_counter()
    simulation.run(system)
    reached = next(
        (point for point in simulation.curve if point.quality["all"].perplexity <= options.target), None
    )
    last = simulation.curve[-1]
    rich = sorted(world.clients, key=lambda client: -client.examples)
    return {
        "perplexity": {name: round(quality.perplexity, 4) for name, quality in last.quality.items()},
        "hours": round(last.time / 3600, 4),
        "updates": last.updates,
        "steps": last.step,
        "hours to target": None if reached is None else round(reached.time / 3600, 4),
        "updates to target": None if reached is None else reached.updates,
        "share of the top 25 %": round(contributions.share(rich[: len(rich) // 4]), 4),
        "staleness": round(statistics.mean(contributions.staleness), 2),
        "counters": simulation.counters,
        "curve": [
            {
                "updates": point.updates,
                "hours": round(point.time / 3600, 4),
                **{name: round(quality.perplexity, 4) for name, quality in point.quality.items()},
            }
            for point in simulation.curve
        ],
        "seconds": round(time.perf_counter() - began, 1),
    }


def table(runs: list[dict], correlation: float, options: argparse.Namespace) -> str:
    """Two tables: after the same number of clients' updates, and after the same virtual time."""
    groups = ("all", *GROUPS)
    shortest = {run["seed"]: min(r["hours"] for r in runs if r["seed"] == run["seed"]) for run in runs}
    after = [f"perplexity, {group}" for group in groups]
    equal_updates = [
        "hours to target",
        "updates to target",
        "hours",
        *after,
        "share of updates of the top 25 %",
    ]
    lines = [f"\ncorrelation {correlation}; after {options.updates} updates; target {options.target}\n"]
    lines += header("system", *equal_updates)
    for name, own in by_system(runs).items():
        cells = [interval(run[key] for run in own) for key in equal_updates[:3]]
        cells += [interval(run["perplexity"][group] for run in own) for group in groups]
        lines.append(row(TITLES[name], *cells, interval(run["share of the top 25 %"] for run in own)))
    hours = interval(shortest.values())
    lines += [f"\ncorrelation {correlation}; after {hours} hours, in which the fastest system is done\n"]
    lines += header("system", "updates", *after)
    for name, own in by_system(runs).items():
        points = [
            [point for point in run["curve"] if point["hours"] <= shortest[run["seed"]]][-1] for run in own
        ]
        lines.append(
            row(TITLES[name], *(interval(point[key] for point in points) for key in ("updates", *groups)))
        )
    return "\n".join(lines)


def by_system(runs: list[dict]) -> dict[str, list[dict]]:
    return {
        name: [run for run in runs if run["system"] == name] for name in {run["system"]: 0 for run in runs}
    }


def header(*cells: str) -> list[str]:
    return [row(*cells), "|---" * len(cells) + "|"]


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def interval(values: Iterable[float | None]) -> str:
    """Mean and half of the 95 % interval; how many runs never got there."""
    given = list(values)
    found = [value for value in given if value is not None]
    if len(found) < len(given):
        return f"never in {len(given) - len(found)} of {len(given)}"
    mean = statistics.mean(found)
    if len(found) == 1:
        return f"{mean:.4g}"
    half = stats.t.ppf(0.975, len(found) - 1) * statistics.stdev(found) / math.sqrt(len(found))
    return f"{mean:.4g} ± {half:.2g}"


def surroundings(options: argparse.Namespace, reviews: int, documentation: int) -> dict[str, object]:
    return {
        "options": {key: str(value) for key, value in vars(options).items() if key != "text"},
        "windows of reviews": reviews,
        "windows of documentation": documentation,
        "parameters": sum(p.numel() for p in NextCharacter().parameters()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--text", type=Path, required=True, help="folder of .tsv files with a column sentence"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--correlation", type=float, nargs="+", default=[0.9])
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument(
        "--windows", type=int, default=9000, help="of all clients together, held-out ones too"
    )
    parser.add_argument("--size-spread", type=float, default=1.0)
    parser.add_argument("--speed-spread", type=float, default=1.0)
    parser.add_argument("--step-seconds", type=float, default=5.0, help="of the median client")
    parser.add_argument("--local-steps", type=int, default=8)
    parser.add_argument("--local-rate", type=float, default=2.0)
    parser.add_argument("--server-rate", type=float, default=1.0)
    parser.add_argument("--buffer-rate", type=float, default=1.0, help="server rate of fedbuff")
    parser.add_argument("--systems", nargs="+", default=list(TITLES), choices=list(TITLES))
    parser.add_argument("--cohort", type=int, default=20)
    parser.add_argument("--cut-off", type=float, default=80.0, help="seconds")
    parser.add_argument("--buffer", type=int, default=10)
    parser.add_argument("--updates", type=int, default=1600, help="of clients, after which a run ends")
    parser.add_argument("--measure-every", type=int, default=100, help="updates")
    parser.add_argument("--target", type=float, default=9.5, help="perplexity of all clients' held-out text")
    return parser.parse_args()


if __name__ == "__main__":
    main()
