"""What defenses cost on CIFAR-10: held-out accuracy of a LeNet trained with each of them, and CPU time.

    python benchmarks/utility.py --data cifar10_train_first2000.npz cifar10_test_first2000.npz
    python benchmarks/utility.py --data ... --models resnet20 --steps 100 --defenses none top-k:keep=0.01
    python benchmarks/utility.py --data ... --clients 4 --local-steps 5 --local-learning-rate 0.1

All images of --data together are split by every seed, one part in five held out.  One JSON line for
each model and defense, then a table: mean over seeds and its 95 % interval (Student's t).  Seeds, and so
splits, starts and batches, are the same for every defense; "change" is the mean paired difference
from the first defense in the list, with its interval.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial

import torch

from leakaudit.data import PrivateBatch, load_batch
from leakaudit.defenses import DEFENSES
from leakaudit.models.victim import Victim
from leakaudit.models.zoo import NORMALISATIONS, load_victim
from leakaudit.rounds import Round
from leakaudit.spec import parse
from leakaudit.sweep.curves import summary
from leakaudit.sweep.utility import Training, measure_utility
from leakaudit.sweep_results import Utility

MODELS = ("lenet:init=uniform", "lenet", "lenet:activation=relu")
TABLE = (
    "none",
    *(f"gaussian-noise:std={std}" for std in (1e-4, 1e-3, 1e-2, 1e-1)),
    *(f"top-k:keep={keep}" for keep in (0.3, 0.1, 0.01)),
    *(f"quantise:to={to}" for to in ("fp16", "int8")),
)


def load(paths: list[str]) -> PrivateBatch:
    """All the images of the files, one after the other."""
    parts = [load_batch(path, (3, 32, 32), None, classes=10) for path in paths]
    names = tuple(name for part in parts for name in part.names)
    pixels, labels = (
        torch.cat(tensors) for tensors in zip(*[(p.pixels, p.labels) for p in parts], strict=True)
    )
    return PrivateBatch(pixels, labels, names, parts[0].class_names)


def fresh(spec: str, seed: int) -> Victim:
    return load_victim(spec, num_classes=10, normalisation=NORMALISATIONS["cifar10"], seed=seed)


def change(found: Utility, baseline: Utility) -> str:
    """Paired difference of the final accuracies, in percentage points."""
    finals = ([curve.points[-1][1] for curve in each.curves] for each in (found, baseline))
    differences = [100 * (ours - theirs) for ours, theirs in zip(*finals, strict=True)]
    shifted = summary([0.5 + difference / 1000 for difference in differences])  # an interval not cut off at 0
    if shifted["accuracy"] is None or shifted["high"] is None:
        return ""
    return f"{1000 * (shifted['accuracy'] - 0.5):+.1f} ± {1000 * (shifted['high'] - shifted['accuracy']):.1f}"


def main() -> None:
    standard = Training()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", required=True, nargs="+")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--defenses", nargs="+", default=TABLE)
    parser.add_argument("--steps", type=int, default=standard.steps)
    parser.add_argument("--batch", type=int, default=standard.batch_size)
    parser.add_argument("--learning-rate", type=float, default=standard.learning_rate)
    parser.add_argument("--momentum", type=float, default=standard.momentum)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--local-steps", type=int, default=1)
    parser.add_argument("--local-learning-rate", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = load(options.data)
    round = Round(options.clients, options.local_steps, None, options.local_learning_rate, options.clients)
    training = Training(
        steps=options.steps,
        batch_size=options.batch,
        learning_rate=options.learning_rate,
        momentum=options.momentum,
        seeds=options.seeds,
    )
    protocol = "fedsgd" if options.local_steps == 1 else f"fedavg:steps={options.local_steps}"
    table = [
        "| model | defense | accuracy | 95 % interval | change | CPU s a seed |",
        "|---|---|---|---|---|---|",
    ]
    for model in options.models:
        baseline: Utility | None = None
        for spec in options.defenses:
            named = [] if spec == "none" else [(spec, parse(spec, DEFENSES, "defense"))]
            began = time.process_time()
            found = measure_utility(
                fresh(model, 0), data, named, round, training,
                protocol=protocol, defense=spec, seed=0, fresh=partial(fresh, model),
            )  # fmt: skip
            seconds = (time.process_time() - began) / training.seeds
            baseline = baseline or found
            print(json.dumps({"model": model, "cpu_seconds": seconds, **found.model_dump()}), flush=True)
            if found.accuracy is None:
                table.append(f"| {model} | {spec} | {found.reason} | | | |")
                continue
            interval = "" if found.low is None else f"{100 * found.low:.1f} to {100 * (found.high or 0):.1f}"
            row = (
                model,
                spec,
                f"{100 * found.accuracy:.1f}",
                interval,
                change(found, baseline),
                f"{seconds:.1f}",
            )
            table.append(f"| {' | '.join(row)} |")
    print("\n".join(table))


if __name__ == "__main__":
    main()
