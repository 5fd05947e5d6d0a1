"""examples/flower: one client's message through the app as it stands, and the recorded file through inspection."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.app.metadata import Metadata

from leakaudit.data import load_truth
from leakaudit.subject import Sources, look, open_update

EXAMPLE = Path(__file__).parents[2] / "examples" / "flower"


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The example's modules, recording to tmp_path."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    monkeypatch.setenv("LEAKAUDIT_FOLDER", str(tmp_path))
    names = ("task", "client_app", "server_app")
    yield SimpleNamespace(**{name: importlib.import_module(f"flower_photos.{name}") for name in names})
    for name in [name for name in sys.modules if name.startswith("flower_photos")]:
        del sys.modules[name]


def answer(app: SimpleNamespace, images: int) -> Message:
    config = ConfigRecord({"learning-rate": 0.05, "server-round": 1})
    content = RecordDict({"arrays": ArrayRecord(app.task.fresh_net().state_dict()), "config": config})
    metadata = Metadata(1, "m", 0, 5, "", "", 0.0, 3600.0, "train")
    context = Context(
        run_id=1,
        node_id=5,
        node_config={"partition-id": 0, "num-partitions": 4},
        state=RecordDict(),
        run_config={"local-epochs": 1, "batch-size": images, "images-per-client": images},
    )
    return app.client_app.app(Message(content=content, metadata=metadata), context)


def test_one_round_of_one_client(app: SimpleNamespace, tmp_path: Path) -> None:
    reply = answer(app, images=2)
    assert reply.content["metrics"]["num-examples"] == 2
    sources = Sources(
        tmp_path / "round-0001-client-0.safetensors",
        f"{EXAMPLE / 'flower_photos' / 'task.py'}:net",
        tmp_path / "round-0001-client-0-model.safetensors",
    )
    names = {finding.name: finding for finding in look(sources)}
    assert "train_loss" in names["metrics in clear"].text
    assert "2 examples" in names["number of examples"].text
    opened = open_update(sources)
    truth = private(app, tmp_path)
    simulated = opened.view.simulate(*truth)
    assert float((simulated - opened.view.observed).norm() / opened.view.observed.norm()) < 1e-4
    assert opened.view.round.local_steps == 1


def private(app: SimpleNamespace, folder: Path) -> Any:
    images, labels = app.task.private_images(0, 4, 2)
    assert images.shape == (2, 3, 32, 32)
    assert torch.isfinite(images).all()
    return images, labels


def test_the_truth_for_the_score(
    app: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["task", "1", "4", str(tmp_path / "truth.safetensors")])
    app.task.main()
    batch = load_truth(tmp_path / "truth.safetensors")
    images, labels = app.task.private_images(1, 4, 1)
    assert torch.equal(batch.pixels, images)
    assert torch.equal(batch.labels, labels)


def test_clients_share_no_image(app: SimpleNamespace) -> None:
    batches = [app.task.private_images(client, 4, 16)[0].flatten(1) for client in range(4)]
    assert len(torch.unique(torch.cat(batches), dim=0)) == 64
