"""`leakaudit simulate` on small real trainings: the folder, the table of systems, and bad input."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from typer.testing import CliRunner

from leakaudit import simulate_cli, simulating
from leakaudit.cli import app
from leakaudit.comparing import estimate
from leakaudit.data import load_truth
from leakaudit.defenses.pruning import DeepGradientCompression
from leakaudit.errors import InputError
from leakaudit.federated.options import SYSTEMS, SynchronousSGD, SystemOptions
from leakaudit.federated.seen import Observation
from leakaudit.federated.views import read_index
from leakaudit.scenario import Scenario, recorded_steps
from leakaudit.simulating import System, load_world
from leakaudit.simulation_results import read_comparison, read_simulation
from leakaudit.subject import Sources, open_update

WRITER = simulating._writer
MODEL = """
from torch import nn

def mlp(num_classes=4, input_shape=(3, 4, 4)):
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.Tanh(), nn.Linear(8, num_classes))

def norm(num_classes=4, input_shape=(3, 4, 4)):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, num_classes))
"""
GIVEN = (
    "--model",
    "models.py:mlp",
    "--data",
    "data.npz",
    "--input-shape",
    "3,4,4",
    "--num-classes",
    "4",
    "--device",
    "cpu",
)
SHORT = ("--steps", "8", "--every", "4", "--clients", "4", "--batch-size", "5")


@dataclass(frozen=True)
class Record:
    name: str
    note: str
    update: str
    model: str
    truth: str | None = None
    exact: bool = True


@dataclass
class Notebook:
    """Stands in for the writer of views: remembers what it was given."""

    seen: list[Observation] = field(default_factory=list)

    def write(self, observation: Observation) -> None:
        self.seen.append(observation)

    def records(self) -> Sequence[Record]:
        return [
            Record(o.name, o.note, f"views/{o.name}.safetensors", "models/m.safetensors") for o in self.seen
        ]


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


@dataclass
class Simulate:
    notebook: Notebook

    def __call__(self, *arguments: object) -> Ran:
        done = CliRunner().invoke(app, ["simulate", *map(str, arguments)])
        if isinstance(done.exception, InputError):
            return Ran(2, done.stdout, f"leakaudit: {done.exception}")
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return Ran(done.exit_code, done.stdout, done.stderr)


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Simulate:
    """In a folder with 120 images of four blurred classes and two models."""
    draw = np.random.default_rng(0)
    labels = np.arange(120) % 4
    images = draw.uniform(60, 195, (4, 4, 4, 3))[labels] + draw.normal(0, 40, (120, 4, 4, 3))
    np.savez(tmp_path / "data.npz", images=np.clip(images, 0, 255).astype(np.uint8), labels=labels)
    (tmp_path / "models.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["leakaudit", "simulate", "ssgd"])
    notebook = Notebook()
    monkeypatch.setattr(simulating, "_writer", lambda folder, world, system: notebook)
    return Simulate(notebook)


def rows(path: str) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------ one run


def test_a_run_writes_its_folder(simulate: Simulate) -> None:
    done = simulate(
        "ssgd", *GIVEN, *SHORT, "--latency", "100ms", "--bandwidth", "8kbps", "--out", "out", "--seed", 3
    )
    assert done.code == 0, done.err
    assert "Report: out/report.html" in done.out
    result = read_simulation(Path("out"))
    assert [point.step for point in result.curve] == [0, 4, 8]
    assert result.spec == "ssgd:batch_size=5"
    size = 4 * sum(p.numel() for p in load_world(scenario()).task.victim.params.values())
    assert result.last.uploaded == result.last.downloaded == 8 * 4 * size
    assert result.last.time == pytest.approx(8 * (0.3 + 2 * (0.1 + size / 1000)))
    assert result.last.quality["all"].accuracy > result.curve[0].quality["all"].accuracy
    assert result.population.examples + result.population.held_out == 120
    assert result.files == {"data.npz": result.files["data.npz"]}
    assert result.command == "leakaudit simulate ssgd"
    curve, network = rows("out/curve.csv"), rows("out/network.csv")
    assert [float(row["accuracy"]) for row in curve] == [p.quality["all"].accuracy for p in result.curve]
    assert sum(int(row["bytes"]) for row in network) == result.last.uploaded + result.last.downloaded
    assert {row["kind"] for row in network} == {"model", "update"}
    final = load_file("out/models/final.safetensors")
    start = load_world(scenario(seed=3)).task.victim.params
    assert final.keys() == start.keys()
    assert any(not torch.equal(final[name], start[name]) for name in start)


def scenario(**changes: Any) -> Scenario:
    return Scenario(
        "models.py:mlp", data="data.npz", input_shape=(3, 4, 4), num_classes=4, device="cpu", **changes
    )


def test_the_same_command_gives_the_same_run(simulate: Simulate) -> None:
    for out in ("one", "two"):
        assert simulate("ssgd", *GIVEN, *SHORT, "--out", out, "--speed-spread", 0.5).code == 0
    one, two = read_simulation(Path("one")), read_simulation(Path("two"))
    assert one.curve == two.curve
    assert Path("one/network.csv").read_text() == Path("two/network.csv").read_text()


def test_a_target_or_the_clock_ends_a_run(simulate: Simulate) -> None:
    assert simulate("ssgd", *GIVEN, *SHORT, "--out", "a", "--target-accuracy", 0.0).code == 0
    assert read_simulation(Path("a")).last.step == 0
    assert simulate("ssgd", *GIVEN, *SHORT, "--out", "b", "--seconds", "1s", "--step-time", "400ms").code == 0
    clocked = read_simulation(Path("b"))
    assert (clocked.last.step, clocked.last.time) == (1, 1.0)
    assert clocked.reached is None


def test_views_of_a_few_single_clients_a_step(simulate: Simulate) -> None:
    options = ("--record", "0,last", "--record-clients", 2, "--defense", "clip:max_grad_norm=0.5")
    assert simulate("ssgd", *GIVEN, *SHORT, *options, "--out", "out").code == 0
    assert [seen.name for seen in simulate.notebook.seen] == [
        "round-0000", "round-0000-client-000", "round-0000-client-001",
        "round-0007", "round-0007-client-000", "round-0007-client-001",
    ]  # fmt: skip
    for seen in simulate.notebook.seen:
        assert seen.defenses == ("clip:max_grad_norm=0.5",)
        norm = sum(float((tensor**2).sum()) for tensor in seen.update.values()) ** 0.5
        assert norm <= 0.5 + 1e-5
    result = read_simulation(Path("out"))
    assert result.views_left_out == 4
    mean, single = result.views[:2]
    assert (mean.clients, mean.examples, single.clients, single.examples) == ([0, 1, 2, 3], 20, [0], 5)
    assert single.command.startswith(
        "leakaudit attack out/views/round-0000-client-000.safetensors --model models.py:mlp"
    )


def test_nothing_is_recorded_unless_wanted(simulate: Simulate) -> None:
    assert simulate("ssgd", *GIVEN, *SHORT, "--record", "none", "--out", "out").code == 0
    assert not simulate.notebook.seen
    assert "says nothing about what the updates give away" in Path("out/report.html").read_text()


def test_a_folder_of_another_run_is_not_overwritten(simulate: Simulate) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("all there is")
    refused = simulate("ssgd", *GIVEN, *SHORT, "--out", "mine")
    assert (refused.code, refused.err) == (
        2, "leakaudit: mine is not empty (thesis.txt is there); accepted: --force, or another folder"
    )  # fmt: skip
    assert simulate("ssgd", *GIVEN, *SHORT, "--out", "mine", "--force").code == 0
    again = simulate("ssgd", *GIVEN, *SHORT, "--out", "mine")
    assert again.code == 0, "the same run may be written anew"
    other = simulate("ssgd", *GIVEN, *SHORT, "--out", "mine", "--seed", 9)
    assert other.code == 2
    assert "mine holds another run" in other.err
    Path("mine/views").mkdir()
    Path("mine/views/round-0000.safetensors").write_text("of the earlier run")
    assert simulate("ssgd", *GIVEN, *SHORT, "--out", "mine", "--seed", 9, "--force").code == 0
    assert not Path("mine/views").exists()
    assert Path("mine/thesis.txt").read_text() == "all there is"


def test_bad_folders_are_refused_before_anything_is_written(simulate: Simulate) -> None:
    Path("file").write_text("")
    assert (
        simulate("ssgd", *GIVEN, *SHORT, "--out", "file").err
        == "leakaudit: file is a file; accepted: a folder"
    )


def test_batch_norm_is_a_deviation_and_its_statistics_are_kept(simulate: Simulate) -> None:
    assert simulate("ssgd", *GIVEN, *SHORT, "--model", "models.py:norm", "--out", "out").code == 0
    result = read_simulation(Path("out"))
    assert any(note.startswith("BatchNorm: ") for note in result.notes)
    final = load_file("out/models/final.safetensors")
    assert not torch.equal(final["1.running_mean"], torch.zeros(4))


def test_a_residual_is_the_clients_own(simulate: Simulate) -> None:
    """Deep Gradient Compression keeps what it did not send; were it shared, a client would send what is another's."""
    world = load_world(scenario(clients=2, defense=("dgc:keep=0.1,clip=none",)))
    trainer = world.trainer()
    task, round = world.task, simulating.Round(num_examples=5)
    alone = DeepGradientCompression(keep=0.1, clip=None).training(simulating.client_update, torch.Generator())
    for client in (0, 1, 0):
        rows = task.clients[client].rows[:5]
        sent = trainer.submit(task.victim.params, round, rows).result()
        if client == 0:
            batch = task.train.rows(rows)
            expected = alone(task.victim, task.victim.params, round, batch.x, batch.y)
            torch.testing.assert_close(dict(sent), dict(expected))


def test_views_that_hold_a_residual_are_not_exact(
    simulate: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The truth explains the first messages of clients that keep a residual, and not the later ones: 0.9 off."""
    monkeypatch.setattr(simulating, "_writer", WRITER)
    given = scenario(clients=2, defense=("dgc:keep=0.1",), steps=3, record="0,2", record_clients=1)
    result = simulating.simulate(System.parse("ssgd:batch_size=5,learning_rate=0.5"), given, Path("out"))
    assert {(view.step, view.exact) for view in result.views if view.observer is not None} == {
        (0, True),
        (2, False),
    }
    assert [view.exact for view in result.views] == [record.exact for record in read_index(Path("out")).views]
    for record in read_index(Path("out")).views:
        if record.observer is not None:
            update = open_update(Sources(Path("out") / str(record.update), given.model, device="cpu"))
            truth = load_truth(Path("out") / str(record.truth))
            residual = update.view.residual(update.view.victim.space.encode(truth.pixels), truth.labels)
            assert (residual < 1e-3) == record.exact


def test_clients_that_differ_in_classes_have_groups(simulate: Simulate) -> None:
    world = load_world(scenario(clients=6, label_skew=0.3, size_spread=1.0))
    assert set(world.task.groups) == {"top 25 %", "top 1 %"}
    largest = max(world.task.clients, key=lambda client: client.examples)
    classes = set(world.task.train.y[largest.rows].tolist())
    assert set(world.task.test.y[world.task.groups["top 1 %"]].tolist()) <= classes
    covered = torch.cat([client.rows for client in world.task.clients])
    assert sorted(covered.tolist()) == list(range(len(world.task.train)))
    assert len(world.task.train) + len(world.task.test) == 120
    assert not load_world(scenario(clients=6, size_spread=1.0)).task.groups, "clients whose data are alike"


def test_the_hold_out_does_not_depend_on_the_clients(simulate: Simulate) -> None:
    few, many = (load_world(scenario(clients=count)).task.test.x for count in (2, 9))
    assert torch.equal(few, many)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--latency", "-5ms"), "latency must be at least 0 seconds and finite, got -5ms"),
        (("--step-time", "fast"), "step time 'fast' is not a quantity; accepted: 480ms"),
        (("--bandwidth", "0"), "bandwidth must be positive, got 0"),
        (("--clients", "200"), "96 examples cannot be shared by 200 clients, one each at least"),
        (("--batch-size", "25"), "client 0 holds 24 examples, fewer than a batch of 25"),
        (("--batch-size", "0"), "batch_size must be at least 1, got 0"),
        (("--clients", "0"), "clients must be at least 1, got 0"),
        (("--steps", "0"), "steps must be at least 1, got 0"),
        (("--dropout", "1"), "dropout must be in [0, 1), got 1.0"),
        (("--availability", "0"), "availability must be in (0, 1], got 0.0"),
        (("--label-skew", "-1"), "label_skew must be positive, got -1.0"),
        (("--slow-with-data", "2"), "slow_with_data must be between -1 and 1, got 2.0"),
        (("--holdout", "1"), "holdout must be between 0 and 1, got 1.0"),
        (("--holdout", "0.001"), "holdout 0.001 of 120 examples leaves none to measure"),
        (("--target-accuracy", "70"), "target accuracy must be between 0 and 1, got 70.0"),
        (("--examples", "500"), "data.npz holds 120 images, 500 from 0 on were asked for"),
        (("--record", "sometimes"), "record 'sometimes' is no step; accepted: first, middle, last"),
        (("--defense", "clp"), "unknown defense 'clp', did you mean 'clip'?"),
        (("--defense", "batch:size=9"), "defense 'batch:size=9' changes what a client trains on"),
        (("--learning-rate", "1e300", "--steps", "20"), "the model is not finite after step"),
        (("--model", "nosuch"), "nosuch"),
        (("--data", "missing.npz"), "missing.npz"),
        (("--text", "notes.txt"), "images data.npz and sentences notes.txt given; accepted: one of"),
        (("--device", "abacus"), "device 'abacus' cannot be used"),
        (("--seconds", "0"), "seconds must be positive, got 0"),
        (("--record", "first,8"), "record '8' is beyond the last step; accepted: 0 to 7"),
        (("--record-clients", "0"), "record clients must be at least 1, got 0"),
        (("--dropout", "0.5"), "system 'ssgd': its workers stay from beginning to end, got dropout 0.5;"),
        (("--availability", "0.5"), "system 'ssgd': its workers stay from beginning to end, got availability 0.5"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(simulate: Simulate, options: tuple[str, ...], says: str) -> None:
    done = simulate("ssgd", *GIVEN, *SHORT, *options, "--out", "out")
    assert done.code == 2
    assert says in done.err
    assert "\n" not in done.err.strip()
    assert not Path("out").exists(), "another try needs no --force"


def test_usage_errors(simulate: Simulate) -> None:
    assert simulate("ssgd", *GIVEN, "--topology", "ring").code == 2
    assert simulate("sgd", *GIVEN).code == 2
    assert simulate("ssgd", "--data", "data.npz").code == 2


def test_a_folder_below_a_file_is_one_line(simulate: Simulate) -> None:
    Path("file").touch()
    for options in ((), ("--force",)):
        for out in ("file", "file/below"):
            done = simulate("ssgd", *GIVEN, *SHORT, "--out", out, *options)
            assert done.code == 2
            assert "file" in done.err
            assert "\n" not in done.err.strip()


@given(steps=st.integers(1, 50), number=st.integers(0, 49), period=st.integers(1, 9))
def test_recorded_steps(steps: int, number: int, period: int) -> None:
    number %= steps
    wanted = {step for step in range(60) if recorded_steps(f"first, last,{number}", steps)(step)}
    assert wanted == {0, steps - 1, number} & set(range(60))
    every = recorded_steps(f"every:{period}", steps)
    assert [step for step in range(60) if every(step)] == list(range(0, 60, period))
    assert not any(map(recorded_steps("none", steps), range(60)))
    assert all(map(recorded_steps("all", steps), range(60)))


# ------------------------------------------------------------------ comparisons


def test_a_comparison_is_fair_and_says_what_it_found(simulate: Simulate) -> None:
    done = simulate(
        "compare", *GIVEN, *SHORT[:-2], "--systems", "ssgd:batch_size=5,ssgd:batch_size=5,topology=all-reduce",
        "--seeds", 2, "--out", "cmp", "--record", "none",
    )  # fmt: skip
    assert done.code == 0, done.err
    found = read_comparison(Path("cmp"))
    assert [system.spec for system in found.systems] == [
        "ssgd:batch_size=5",
        "ssgd:batch_size=5,topology=all-reduce",
    ]
    server, peers = found.systems
    for one, other in zip(server.runs, peers.runs, strict=True):
        assert one.result.population == other.result.population
        assert [p.quality for p in one.result.curve] == [p.quality for p in other.result.curve], (
            "the same numbers"
        )
        assert (Path("cmp") / one.folder / "run.json").is_file()
    assert server.runs[0].result.curve != server.runs[1].result.curve
    assert (server.time.count, server.reached) == (2, None)
    assert "± is half of the 95 % interval" in done.out
    page = Path("cmp/report.html").read_text()
    assert page.count("<figure") >= 2
    assert "ssgd-batch-size-5-seed-1/report.html" in page


def test_a_comparison_that_was_ended_goes_on(simulate: Simulate, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = (
        "compare",
        *GIVEN,
        *SHORT[:-2],
        "--system",
        "ssgd:batch_size=5",
        "--system",
        "ssgd:batch_size=6",
        "--out",
        "cmp",
    )
    assert simulate(*asked).code == 0
    before = Path("cmp/ssgd-batch-size-5/run.json").stat().st_mtime_ns
    Path("cmp/ssgd-batch-size-6/run.json").unlink()
    assert simulate(*asked).code == 0
    assert Path("cmp/ssgd-batch-size-5/run.json").stat().st_mtime_ns == before
    assert Path("cmp/ssgd-batch-size-6/run.json").is_file()
    assert simulate(*asked, "--force").code == 0
    assert Path("cmp/ssgd-batch-size-5/run.json").stat().st_mtime_ns != before
    assert "holds another run" in simulate(*asked, "--seed", 4).err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--systems", "ssgd,sgdd"), "unknown system 'sgdd', did you mean 'ssgd'?"),
        (("--systems", "ssgd:batchsize=3"), "system 'ssgd' has no option 'batchsize', did you mean 'batch_size'?"),
        (("--systems", "ssgd", "--system", "ssgd"), "system 'ssgd' was given twice"),
        ((), "no systems given; accepted: --systems sync,fedbuff or --system fedbuff:buffer=10"),
        (("--systems", "ssgd", "--latency", "-1"), "latency must be at least 0 seconds"),
        (("--systems", "fedavg:local_learning_rate=1e38,patience=2"), "2 rounds in a row had fewer than 1 report"),
        (("--systems", "ssgd", "--seconds", "0"), "seconds must be positive, got 0"),
        (("--systems", "fedavg,ssgd", "--dropout", "0.1"), "system 'ssgd': its workers stay from beginning to end"),
        (("--systems", "fedbuff:exponent=inf"), "exponent must be at least 0 and finite, got inf"),
        (("--systems", "fedbuff:slope=inf"), "slope must be at least 0 and finite, got inf"),
    ],
)  # fmt: skip
def test_bad_comparisons(simulate: Simulate, options: tuple[str, ...], says: str) -> None:
    done = simulate("compare", *GIVEN, *options, "--out", "cmp")
    assert done.code == 2
    assert says in done.err
    assert not Path("cmp").exists()


def test_how_systems_are_written() -> None:
    assert simulate_cli.split_systems("sync,timeout:cutoff=20,every=5,fedbuff") == \
        ["sync", "timeout:cutoff=20,every=5", "fedbuff"]  # fmt: skip
    assert simulate_cli.split_systems("a:x=1 ; b;") == ["a:x=1", "b"]
    assert simulate_cli.split_systems("") == []


def test_an_interval_by_students_t() -> None:
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert (found.low, found.high) == (
        pytest.approx(2 - 4.302653 / 3**0.5),
        pytest.approx(2 + 4.302653 / 3**0.5),
    )
    assert estimate([5.0]).low is None


# ------------------------------------------------------------------ commands are made of dataclasses


@dataclass(frozen=True)
class Odd(SystemOptions):
    """An odd system: options of every kind.

    More that no help shows.
    """

    module = "leakaudit.federated.synchronous"
    steps: int = field(default=3, metadata={"help": "Local steps."})
    eager: bool = field(default=True, metadata={"help": "Whether it hurries."})
    cutoff: float | None = field(default=None, metadata={"help": "Seconds.", "quantity": "seconds"})
    warm: tuple[float, ...] = field(default=(0.75, 0.9), metadata={"help": "Warm-up."})


def test_options_of_every_kind() -> None:
    taken = simulate_cli._taken("odd-one", Odd)
    assert taken == {"steps": "odd_one_steps"}, "a scenario has steps too"
    parameters = {p.name: p for p in simulate_cli.parameters_of(Odd, Odd(), taken)}
    assert list(parameters) == ["odd_one_steps", "eager", "cutoff", "warm"]
    given = {"odd_one_steps": 4, "eager": False, "cutoff": "1.5s", "warm": [0.5]}
    assert simulate_cli.read(Odd, given, taken) == Odd(4, False, 1.5, (0.5,))
    assert simulate_cli.read(Odd, {**given, "cutoff": None}, taken).cutoff is None


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_has_a_command(simulate: Simulate, name: str) -> None:
    shown = " ".join(simulate(name, "--help").out.split())
    for option in fields(SYSTEMS[name]):  # type: ignore[arg-type]
        assert option.metadata["help"][:20] in shown
    for flag in ("--model", "--clients", "--workers", "--latency", "--record", "--force"):
        assert flag in shown


def test_systems_by_name() -> None:
    assert System.parse("ssgd:momentum=0.9").options == SynchronousSGD(momentum=0.9)
    assert System("ssgd", SynchronousSGD(momentum=0.9)).spec == "ssgd:momentum=0.9"


def test_results_from_elsewhere(simulate: Simulate) -> None:
    assert simulate("ssgd", *GIVEN, *SHORT, "--out", "out").code == 0
    content = json.loads(Path("out/run.json").read_text())
    for changed, says in (
        ({"schema_version": 2}, "schema_version 2"),
        ({"curve": []}, "the curve has no quality"),
    ):
        Path("out/run.json").write_text(json.dumps({**content, **changed}))
        with pytest.raises(InputError, match=says):
            read_simulation(Path("out"))
    with pytest.raises(InputError, match="is not the folder of a comparison"):
        read_comparison(Path("out"))
