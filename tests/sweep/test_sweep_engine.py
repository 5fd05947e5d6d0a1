"""Engines: the same results wherever jobs run, processes that die, and sweeps that are killed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from importlib.util import find_spec
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch
from tiny_sweeps import config, timeless, values
from tiny_tasks import Note, Task

import leakaudit
from leakaudit.errors import InputError
from leakaudit.sweep import engine
from leakaudit.sweep.engine import InProcess, LocalPool, local_engine
from leakaudit.sweep.plan import plan_sweep
from leakaudit.sweep.ray_engine import RayEngine
from leakaudit.sweep.run import do_jobs, engine_of


def always() -> bool:
    return True


def test_workers_are_as_many_as_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "cores", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert local_engine(0, "cpu") == InProcess()
    assert local_engine(None, "cpu") == LocalPool(8, 1)
    assert local_engine(3, "cpu") == LocalPool(3, 2)
    assert local_engine(20, "cpu") == LocalPool(20, 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # as OMP_NUM_THREADS=1 makes it
    assert local_engine(3, "cpu") == LocalPool(3, 1)


def test_in_process_stops_when_told(tmp_path: Path) -> None:
    tasks = [Task(str(number)) for number in range(5)]
    answers = iter([True, True, False])
    done = list(InProcess().run(tasks, tmp_path, lambda: next(answers)))
    assert [task.key for task, _ in done] == ["0", "1"]


@pytest.mark.slow
def test_a_pool_outlives_its_processes(tmp_path: Path) -> None:
    """One task kills its process once, another always; all others are done, each with its share of the cores.

    One worker, because every process takes seconds to start.
    """
    tasks = [Task("once", deaths=1), Task("always", deaths=99), Task("task0"), Task("task1")]
    results = {task.key: value for task, value in LocalPool(1, 3).run(tasks, tmp_path, always)}
    done = {key for key in results if results[key] == Note(text=key, threads=3)}
    assert done == {"once", "task0", "task1"}
    assert results["always"] == Note(text=f"always failed: {engine.DIED}, 2 times")
    assert len(list(tmp_path.glob("always-*"))) == 2
    assert len(list(tmp_path.glob("once-*"))) == 2


@pytest.mark.slow
def test_closing_a_pool_kills_what_is_in_progress(tmp_path: Path) -> None:
    """As Ctrl-C does: the task that would take minutes is gone, and so is its process."""
    tasks = [Task("long", seconds=300), Task("short")]
    before = set(active_children())
    running = LocalPool(2, 1).run(tasks, tmp_path, always)
    assert next(running)[0].key == "short"
    began = time.monotonic()
    running.close()
    assert time.monotonic() - began < 20
    assert set(active_children()) <= before


@pytest.mark.slow
def test_a_sweep_that_was_killed_and_resumed_equals_one_left_alone(tmp_path: Path) -> None:
    """Killed with SIGKILL at a random moment, with its pool; nothing goes on writing; the rest is done here."""
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    expected = leakaudit.defend(config(_made(alone)))
    script = (
        "import json, sys, leakaudit\n"
        "from leakaudit.sweep.config import build_config\n"
        "if __name__ == '__main__':\n"
        "    leakaudit.defend(build_config(json.loads(sys.argv[1])))\n"
    )
    given = json.dumps(values(_made(killed), workers=1))
    (tmp_path / "sweep.py").write_text(script)
    log = (tmp_path / "log").open("wb")
    process = subprocess.Popen([sys.executable, tmp_path / "sweep.py", given], stdout=log, stderr=log)
    finished = random.Random().randint(1, 6)
    while len(list(killed.glob("out/runs/*/run.json"))) < finished:
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.02)
    process.kill()
    process.wait()
    time.sleep(0.5)
    there = sorted(killed.glob("out/runs/*/run.json"))
    time.sleep(0.5)
    assert sorted(killed.glob("out/runs/*/run.json")) == there, "a worker went on without its sweep"
    assert len(there) < 10
    assert not (killed / "out" / "sweep.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in there}
    resumed = leakaudit.defend(config(killed), resume=True)
    assert timeless(resumed.model_dump(mode="json")) == timeless(expected.model_dump(mode="json"))
    assert {path: path.stat().st_mtime_ns for path in there} == kept
    assert not list(killed.glob("out/runs/*/attempts"))


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_ray_is_asked_for_before_anything_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leakaudit.sweep.ray_engine.find_spec", lambda _: None)
    with pytest.raises(InputError, match="install leakaudit\\[ray\\]"):
        leakaudit.defend(config(tmp_path, engine="ray"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
def test_ray_gives_the_same_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs of a sweep, and beside them, under the one cluster, a task that always kills its process."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    runs = plan_sweep(config(tmp_path, images=1, adversaries=["oblivious"], defenses=["clip"])).runs
    here, _ = do_jobs(runs, InProcess(), _made(tmp_path / "here"), None, None)
    jobs = [*runs, Task("always", deaths=99), Task("fine")]
    there, interrupted = do_jobs(jobs, RayEngine(workers=1), _made(tmp_path / "there"), None, None)
    assert not interrupted
    for run in runs:
        assert timeless(there[run.key].model_dump()) == timeless(here[run.key].model_dump())
    assert there["fine"] == Note(text="fine", threads=1)
    assert "the process died" in str(there["always"])


def test_a_configuration_says_which_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leakaudit.sweep.ray_engine.find_spec", lambda _: True)
    assert engine_of(config(tmp_path)) == InProcess()
    asked = config(tmp_path, engine="ray", workers=3, address="cluster:6379")
    assert engine_of(asked) == RayEngine("cluster:6379", 3)
    assert engine_of(config(tmp_path, engine="ray", device="cuda", workers=None)) == RayEngine(gpu=True)
