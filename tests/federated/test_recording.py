"""Recorded views are ordinary shared-update files: what is read back is what the party saw."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from picture_worlds import CLASSES, MODEL, SHAPE, pictures, task
from tiny_text import GPT2, text_victim
from torch import Tensor

from leakaudit.api import attack
from leakaudit.data import load_truth
from leakaudit.errors import InputError
from leakaudit.federated.cost import Device
from leakaudit.federated.options import SYSTEMS, SynchronousSGD
from leakaudit.federated.population import Client
from leakaudit.federated.recording import ViewWriter, cohort, stated_exactly
from leakaudit.federated.seen import Member, Observation, Seen
from leakaudit.federated.simulation import Limits, Simulation
from leakaudit.federated.task import Task
from leakaudit.federated.trainer import Trainer
from leakaudit.federated.training import Examples
from leakaudit.federated.views import ViewRecord, read_index
from leakaudit.formats.reading import read_file
from leakaudit.rounds import Round, client_update
from leakaudit.subject import Opened, Sources, open_update
from leakaudit.text_data import load_truth as load_sentences
from leakaudit.text_data import private_text
from leakaudit.update import Update


def recorded(
    folder: Path, topology: str, world: Task, batch_size: int = 1, steps: int = 2
) -> list[ViewRecord]:
    """What a run of synchronous SGD writes."""
    writer = ViewWriter(folder, world, MODEL, "ssgd")
    seen = Seen(lambda step: True, writer.write)
    options = SynchronousSGD(learning_rate=0.5, batch_size=batch_size, topology=topology)  # type: ignore[arg-type]
    Simulation(world, Trainer(world), seen, Limits(steps=steps, every=100), seed=1).run(options)
    assert list(writer.records()) == read_index(folder).views
    return list(writer.records())


def written(folder: Path, world: Task, observation: Observation) -> ViewRecord:
    writer = ViewWriter(folder, world, MODEL, "test")
    writer.write(observation)
    return writer.records()[0]


def opened(folder: Path, record: ViewRecord) -> Opened:
    assert record.update is not None
    return open_update(Sources(folder / record.update, device="cpu"))


def explained(folder: Path, record: ViewRecord) -> float:
    """How far the update that the private examples give in the adversary's view is from the one observed."""
    assert record.truth is not None
    view, truth = opened(folder, record).view, load_truth(folder / record.truth)
    return view.residual(view.victim.space.encode(truth.pixels), truth.labels)


def member(world: Task, client: int, round: Round, **facts: object) -> Member:
    rows = world.clients[client].rows[: round.num_examples]
    return Member(client, round, rows, **facts)  # type: ignore[arg-type]


def seen_of(world: Task, base: dict[str, Tensor], *members: Member) -> Update:
    """What an independent loop over the members makes of them."""
    total: dict[str, Tensor] = {}
    for one in members:
        batch = world.train.rows(one.rows)
        own = client_update(world.victim, one.base or base, one.round, batch.x, batch.y)
        for name, tensor in own.items():
            total[name] = total.get(name, 0) + one.weight * tensor.detach()
    return Update(total)


def test_every_view_of_a_run_opens_as_what_the_party_saw(tmp_path: Path) -> None:
    world = task()
    for topology, names in (
        ("server", {"round-0001", "round-0001-client-002", "round-0000-client-000"}),
        ("all-reduce", {"round-0001-peer-0"}),
    ):
        records = recorded(tmp_path / topology, topology, world, batch_size=2)
        assert names <= {record.name for record in records}
        for record in records:
            assert explained(tmp_path / topology, record) < 1e-5
            view = opened(tmp_path / topology, record).view
            assert view.round.num_examples == record.examples
            assert view.round.clients == record.clients
    assert len(list((tmp_path / "server" / "models").iterdir())) == 2, "one model a step, not one a view"
    manifest = read_file(tmp_path / "all-reduce/views/round-0001-peer-0.safetensors").manifest
    assert (manifest.role, manifest.system, manifest.step, manifest.clients) == ("peer", "ssgd", 1, 2)
    assert manifest.staleness == (0, 0)
    assert manifest.bases is None


@pytest.mark.parametrize("name", SYSTEMS)
def test_what_a_view_calls_exact_is_explained_by_its_truth(name: str, tmp_path: Path) -> None:
    """Contract: every recorded view of every system opens, and the private examples give what an exact one holds."""
    world = task(clients=6, each=40, size_spread=0.3, speed_spread=0.3)
    writer = ViewWriter(tmp_path, world, MODEL, name)
    seen = Seen(lambda step: step in (0, 5), writer.write)
    Simulation(world, Trainer(world), seen, Limits(steps=6, every=100), seed=1).run(SYSTEMS[name])
    assert writer.records()
    for record in writer.records():
        assert record.truth is not None
        warned = {f.name for f in opened(tmp_path, record).findings if f.severity == "warning"}
        assert ("round" in warned) == (not record.exact)
        assert not record.exact or explained(tmp_path, record) < 1e-3, record.name


def test_a_cohort_of_unequal_clients_and_weights_comes_back(tmp_path: Path) -> None:
    world = task()
    base = dict(world.victim.params)
    members = (
        member(world, 0, Round(4, 4, 2, 0.1), weight=0.6),
        member(world, 1, Round(3, 2, 2, 0.1), weight=0.3),
        member(world, 2, Round(1, 1, None, 0.1), weight=0.1),
    )
    seen = Observation("server", 7, 1.5, seen_of(world, base, *members), base, members, note="a weighted sum")
    record = written(tmp_path, world, seen)
    view = opened(tmp_path, record).view
    assert view.round == Round(
        8, 4, 2, 0.1, 3, sizes=(4, 3, 1), weights=(0.6, 0.3, 0.1), client_steps=(4, 2, 1)
    )
    torch.testing.assert_close(dict(view.observed), dict(seen.update), rtol=1e-4, atol=1e-6)
    assert explained(tmp_path, record) < 1e-4
    assert record.staleness == 0
    assert record.time == 1.5


def test_weights_that_do_not_come_to_one_leave_a_mean(tmp_path: Path) -> None:
    """Else labels would be counted on an update that is shorter than the mean of its examples (FedBuff's weights)."""
    world = task()
    base = dict(world.victim.params)
    members = tuple(member(world, index, Round(2), weight=0.25) for index in range(2))
    record = written(
        tmp_path, world, Observation("server", 0, 0.0, seen_of(world, base, *members), base, members)
    )
    view = opened(tmp_path, record).view
    assert view.round == Round(4, clients=2)
    assert [member.weight for member in record.members] == [0.25, 0.25]
    torch.testing.assert_close(dict(view.observed), dict(seen_of(world, base, *members) * 2))
    assert explained(tmp_path, record) < 1e-5


def test_members_of_no_weight_are_not_in_the_update(tmp_path: Path) -> None:
    """A staleness weight may come to 0: what is left of nobody is not taken for a round of theirs."""
    world = task()
    base = dict(world.victim.params)
    for count in (1, 2):
        members = tuple(member(world, index, Round(2), weight=0.0) for index in range(count))
        record = written(
            tmp_path, world, Observation("server", count, 0.0, seen_of(world, base, *members), base, members)
        )
        assert not record.exact
        assert read_file(tmp_path / str(record.update)).manifest.num_examples is None


def test_a_single_weighted_client_is_its_own_update(tmp_path: Path) -> None:
    """A server knows the weight it gave a stale update, so the file holds the update before weighting."""
    world = task()
    base = dict(world.victim.params)
    stale = {name: p * 0.8 for name, p in base.items()}
    one = member(world, 1, Round(2), weight=0.25, base=stale, staleness=3)
    record = written(
        tmp_path, world, Observation("server", 4, 0.0, seen_of(world, base, one), base, (one,), 1)
    )
    view = opened(tmp_path, record).view
    alone = replace(one, weight=1.0)
    torch.testing.assert_close(dict(view.observed), dict(seen_of(world, base, alone)), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(view.victim.params, stale)  # the model it downloaded, not the server's
    assert explained(tmp_path, record) < 1e-5
    assert record.staleness == 3


def test_members_of_different_models_are_simulated_each_from_its_own(tmp_path: Path) -> None:
    world = task()
    base = dict(world.victim.params)
    stale = {name: p * 0.5 for name, p in base.items()}
    members = (
        member(world, 0, Round(2, 2, 1, 0.1), weight=0.7),
        member(world, 1, Round(2, 2, 1, 0.1), weight=0.3, base=stale, staleness=2),
    )
    seen = Observation("server", 3, 0.0, seen_of(world, base, *members), base, members)
    record = written(tmp_path, world, seen)
    assert explained(tmp_path, record) < 1e-4
    found = {finding.name: finding.severity for finding in opened(tmp_path, record).findings}
    assert found["models"] == "info"
    assert found["view"] == "info"
    manifest = read_file(tmp_path / str(record.update)).manifest
    assert manifest.staleness == (0, 2)
    assert manifest.bases is not None
    (tmp_path / "models" / f"{manifest.bases[1][:16]}.safetensors").unlink()
    lacking = [finding for finding in opened(tmp_path, record).findings if finding.name == "models"]
    assert [finding.severity for finding in lacking] == ["warning"]
    assert "1 are not in the run folder" in lacking[0].text
    assert explained(tmp_path, record) > 1e-2, "taken for one model, the private examples do not explain it"


def test_a_model_beside_that_was_changed_is_refused(tmp_path: Path) -> None:
    world = task()
    record = recorded(tmp_path, "server", world, steps=1)[0]
    first = tmp_path / str(record.model)
    other = recorded(tmp_path / "other", "server", task(model=MODEL.replace("24", "23")), steps=1)[0]
    first.write_bytes((tmp_path / "other" / str(other.model)).read_bytes())
    with pytest.raises(InputError, match="does not fit the model"):
        opened(tmp_path, record)


def test_what_the_round_does_not_say_is_a_warning(tmp_path: Path) -> None:
    world = task()
    base = dict(world.victim.params)
    one = member(world, 0, Round(2))
    update = seen_of(world, base, one) * 1.5
    record = written(
        tmp_path,
        world,
        Observation("server", 0, 0.0, update, base, (one,), 0, ("top-k:keep=0.5",), exact=False),
    )
    found = opened(tmp_path, record)
    assert {"round"} == {f.name for f in found.findings if f.severity == "warning"}
    assert found.view.knowledge.defense.value == ("top-k:keep=0.5",)
    pair = (member(world, 0, Round(2), weight=0.5), member(world, 1, Round(2), weight=0.5))
    both = Observation("server", 1, 0.0, update, base, pair, defenses=("gaussian-noise:std=0.1",))
    summed = replace(both, defenses=("clip", "secure-aggregation:clients=2"))
    assert not stated_exactly(both), "whose noise?"
    assert stated_exactly(summed)
    record = written(tmp_path / "pair", world, both)
    assert not record.exact
    assert read_file(tmp_path / "pair" / str(record.update)).manifest.noise_std is None
    different = (member(world, 0, Round(2, 2, 1, 0.1)), member(world, 1, Round(2, 2, 1, 0.2)))
    assert cohort(different) is None
    assert cohort(()) is None


def test_updates_that_are_not_finite_or_come_twice(tmp_path: Path) -> None:
    world = task()
    base = dict(world.victim.params)
    one = member(world, 0, Round(1))
    good = Observation("server", 0, 0.0, seen_of(world, base, one), base, (one,), 0)
    writer = ViewWriter(tmp_path, world, MODEL)
    writer.write(good)
    writer.write(good)
    writer.write(replace(good, step=1, update=good.update * float("nan")))
    names = [(record.name, record.update is None) for record in writer.records()]
    assert names == [
        ("round-0000-client-000", False),
        ("round-0000-client-000-2", False),
        ("round-0001-client-000", True),
    ]
    assert "not finite" in writer.records()[2].note


def test_an_index_that_names_a_file_elsewhere_is_refused(tmp_path: Path) -> None:
    recorded(tmp_path, "server", task(), steps=1)
    index = tmp_path / "views" / "index.json"
    index.write_text(index.read_text().replace("truth/round", "../truth/round"))
    with pytest.raises(InputError, match="not an index of views"):
        read_index(tmp_path)
    with pytest.raises(InputError, match="holds no recorded views"):
        read_index(tmp_path / "views")


def test_the_servers_view_of_a_single_worker_gives_its_picture(tmp_path: Path) -> None:
    """The command of the issue: `leakaudit attack RUN/views/round-0000-client-000.safetensors --truth ...`."""
    world = task()
    record = next(r for r in recorded(tmp_path, "server", world, steps=1) if r.observer == 0)
    result = attack(
        tmp_path / str(record.update),
        truth=tmp_path / str(record.truth),
        attacks=("auto",),
        budget=20,
        device="cpu",
        out=tmp_path / "attack",
    )
    assert result.verdict.status == "leaks"
    assert result.best_trial is not None
    psnr = next(score.value for score in result.best_trial.scores if score.metric == "psnr")
    assert psnr is not None
    assert psnr > 40
    assert any("lies beside the update" in finding.text for finding in result.findings)
    assert pictures(1).pixels.shape[1:] == SHAPE
    assert result.model.num_classes == CLASSES


def test_sentences_of_tied_language_models_are_recorded_too(tmp_path: Path) -> None:
    """Sentences of different lengths, tied embeddings, buffers that no state dict holds."""
    victim = text_victim("gpt2", "causal-lm")
    data = private_text(
        ("One short line.", "Another line that is rather longer than it."), victim.space, victim.task
    )
    train = Examples(data.tokens, data.labels)
    clients = tuple(Client(index, torch.tensor([index]), Device()) for index in range(2))
    world = Task(victim, train, clients, train, data)
    base = dict(victim.params)
    pair = tuple(member(world, index, Round(1), weight=0.5) for index in range(2))
    for members in (pair, (member(world, 0, Round(1)),)):
        seen = Observation("server", 0, 0.0, seen_of(world, base, *members), base, members)
        writer = ViewWriter(tmp_path, world, GPT2)
        writer.write(seen)
        record = writer.records()[0]
        found = open_update(Sources(tmp_path / str(record.update), GPT2, device="cpu"))
        truth = load_sentences(tmp_path / str(record.truth))
        assert truth.texts == data.texts[: len(members)]
        assert found.view.round.clients == len(members)
        assert found.view.residual(truth.tokens, truth.labels) < 1e-4
    assert truth.tokens.shape[1] < data.tokens.shape[1], "no wider than its own sentence"
