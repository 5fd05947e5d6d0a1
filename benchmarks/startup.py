"""What each command costs before it does anything: seconds, modules, and which of the heavy packages it imports.

    python benchmarks/startup.py --data cifar10_test_first2000.npz --json startup.json

Every command runs in a process of its own, on as little work as it takes (one photo, one iteration), `--repeats` times
in turn with the others; medians.  CPU seconds are those of the process and of the children it waited for.  Another
version of leakaudit is measured with PYTHONPATH set to it.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import measuring

from leakaudit.data import photo_folder

HEAVY = (
    "torch",
    "torch._dynamo",
    "torchvision",
    "transformers",
    "torchmetrics",
    "lpips",
    "opacus",
    "scipy.stats",
)
COLUMNS = {"torch": "torch", "torch._dynamo": "compiler", "torchvision": "vision", "transformers": "transf.",
           "torchmetrics": "t.metrics", "lpips": "lpips", "opacus": "opacus", "scipy.stats": "stats"}  # fmt: skip
RUNNER = """
import atexit, json, os, runpy, sys
target, heavy = sys.argv[1], sys.argv[2].split(",")
def tell():
    found = {"modules": len(sys.modules), "heavy": [name for name in heavy if name in sys.modules]}
    with open(target, "w") as file:
        json.dump(found, file)
atexit.register(tell)
sys.argv = ["leakaudit", *sys.argv[3:]]
runpy.run_module("leakaudit", run_name="__main__")
"""
TINY_BERT = Path(__file__).parents[1] / "examples" / "tiny_models" / "bert"
SENTENCES = Path(__file__).parents[1] / "examples" / "sentences"


@dataclass
class Measured:
    """The repetitions of one command, and what it imported the last time."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    modules: int = 0
    heavy: tuple[str, ...] = ()


def commands(photos: Path, records: Path | None, work: Path) -> dict[str, list[str]]:
    """Name -> arguments; each may use the files of those before it."""
    update, model, truth, run = (
        work / name for name in ("update.safetensors", "model.safetensors", "truth", "run")
    )
    words, bert = work / "text.safetensors", f"hf:{TINY_BERT}"
    attack = f"attack {update} --model lenet --checkpoint {model} --out {run} --force"
    once = "--attack idlg:iterations=1,restarts=1"
    found = {
        "--help": "--help",
        "attack --help": "attack --help",
        "defend --help": "defend --help",
        "simulate --help": "simulate --help",
        "list systems": "list systems",
        "list models": "list models",
        "list attacks": "list attacks",
        "list metrics": "list metrics",
        "capture": f"capture --model lenet:init=uniform --data {photos} --out {update} --save-model {model}"
                   f" --truth {truth}.safetensors --force",
        "inspect": f"inspect {update} --model lenet --checkpoint {model}",
        "attack, closed form": f"{attack} --attack linear --no-controls",
        "attack, no truth": f"{attack} {once} --no-controls",
        "attack": f"{attack} {once} --truth {truth}.safetensors",
        "report": f"report {run} --html {work / 'report.html'}",
        "capture, text": f"capture --model {bert} --task classification --text {_sentences()} --out {words} --force",
        "inspect, text": f"inspect {words} --model {bert} --task classification",
    }  # fmt: skip
    if records is not None:
        found |= {
            "simulate": f"simulate fedavg --model lenet:init=uniform --data {records} --examples 40 --steps 1"
                        f" --local-steps 1 --out {work / 'simulation'} --force",
            "infer": f"infer --model lenet --data {records} --trials 2 --candidates 16 --reference 16"
                     f" --batch-size 2 --attack membership-loss --out {work / 'inference'} --force",
            "defend": f"defend --model lenet:init=uniform --data {records} --defense none {once} --images 1"
                      f" --no-utility --no-bounds --workers 1 --out {work / 'sweep'} --force",
        }  # fmt: skip
    return {name: shlex.split(line) for name, line in found.items()}


def _sentences() -> Path:
    return next(path for path in sorted(SENTENCES.rglob("*")) if path.suffix in (".txt", ".tsv", ".csv"))


def measure(arguments: list[str], into: Measured, work: Path) -> None:
    """Run the command once; `RuntimeError` for one that could not be used."""
    told = work / "told.json"
    command = [sys.executable, "-c", RUNNER, str(told), ",".join(HEAVY), *arguments]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=work)
    assert process.stderr is not None
    errors = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    into.wall.append(time.perf_counter() - began)
    into.cpu.append(usage.ru_utime + usage.ru_stime)
    if os.waitstatus_to_exitcode(status) == 2:
        raise RuntimeError(f"{shlex.join(arguments)}: {errors}")
    found = json.loads(told.read_text())
    into.modules, into.heavy = found["modules"], tuple(found["heavy"])


def row(name: str, measured: Measured) -> dict[str, Any]:
    return {
        "command": name,
        "seconds": statistics.median(measured.wall),
        "CPU seconds": statistics.median(measured.cpu),
        "modules": measured.modules,
        **{COLUMNS[package]: "x" if package in measured.heavy else None for package in HEAVY},
    }


def main() -> None:
    parser = measuring.options(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--data", type=Path, help="an .npz for simulate, infer and defend, left out without")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        records = None if options.data is None else options.data.resolve()
        found: dict[str, Measured] = defaultdict(Measured)
        for repeat in range(options.repeats):
            folder = work / str(repeat)  # a run folder that is there already would be taken up
            folder.mkdir()
            for name, arguments in commands(photo_folder().resolve(), records, folder).items():
                measure(arguments, found[name], folder)
    measuring.show("Start-up", [row(name, measured) for name, measured in found.items()], options.json)


if __name__ == "__main__":
    main()
