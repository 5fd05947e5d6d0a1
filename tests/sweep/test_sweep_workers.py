"""Workers: where they begin, what they know of the sweep's surroundings, and what they build once."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import lpips
import pytest
import torch
from tiny_sweeps import config

import leakaudit
from leakaudit import data, perceptual
from leakaudit.media import images
from leakaudit.sweep import setup, workers
from leakaudit.sweep.workers import begin_importing, new_executor


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What servers are asked to import; none is started."""
    asked: list[list[str]] = []
    monkeypatch.setattr("multiprocessing.forkserver.set_forkserver_preload", asked.append)
    monkeypatch.setattr("multiprocessing.forkserver.ensure_running", lambda: None)
    monkeypatch.setattr(workers, "GPU_DRIVERS", ())
    return asked


@pytest.mark.skipif(not workers.FORKS, reason="workers are spawned here")
def test_a_server_is_begun_for_workers_that_will_be_forked(tmp_path: Path, begun: list[list[str]]) -> None:
    begin_importing(config(tmp_path, workers=2))
    begin_importing(config(tmp_path, workers=None, device="auto"))
    assert begun == [list(workers.IMAGES)] * 2
    begin_importing(config(tmp_path, workers=2, data=None, text=str(tmp_path / "notes.txt")))
    assert begun[2:] == [list(workers.TEXT)]


def test_no_server_is_begun_for_other_workers(
    tmp_path: Path, begun: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_importing(config(tmp_path, workers=0))
    begin_importing(config(tmp_path, workers=2, device="cuda"))
    begin_importing(config(tmp_path, workers=2, engine="ray"))
    monkeypatch.setattr(workers, "GPU_DRIVERS", (os.devnull,))
    begin_importing(config(tmp_path, workers=2, device="auto"))
    assert begun == []


@pytest.mark.slow
def test_a_worker_has_the_environment_of_now_and_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also from a server that was begun before."""
    for value in ("one", "two"):
        monkeypatch.setenv("LEAKAUDIT_TEST", value)
        with new_executor(3, None) as executor:
            assert executor.submit(os.getenv, "LEAKAUDIT_TEST").result() == value
            assert executor.submit(torch.get_num_threads).result() == 3


def test_a_worker_builds_models_data_and_lpips_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten runs in one process, as a worker does them."""
    for cached in (setup.load_model, setup.load_examples, setup.load_pool, perceptual.lpips_model):
        cached.cache_clear()  # type: ignore[attr-defined]
    built: Counter[str] = Counter()

    def count(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            built[name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    count(setup, "load_victim")
    count(images, "load_batch")
    count(data, "load_batch")
    count(lpips, "LPIPS")
    result = leakaudit.defend(config(tmp_path, metrics=["psnr", "lpips"]))
    assert sum(len(cell.runs) for cell in result.cells) == 10
    assert built == {"load_victim": 1, "load_batch": 2, "LPIPS": 1}
