"""From a run to the table of what each party learns: ssgd end to end, and every row's theory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import small_worlds
from picture_worlds import task
from test_recording import recorded

from leakaudit.errors import InputError
from leakaudit.federated.leakage import audit_runs, plan, worst_first
from leakaudit.federated.network import Message, Speeds, infer, read_network
from leakaudit.federated.options import SYSTEMS
from leakaudit.federated.theory import THEORY, UNWRITTEN, theory_of
from leakaudit.federated.views import read_index
from leakaudit.leakage_results import LeakageResult, LeakageRow, read_leakage


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LeakageResult]:
    """Synchronous SGD with a server, between 2 peers and between 4, attacked by the closed form."""
    folder = tmp_path_factory.mktemp("runs")
    recorded(folder / "server", "server", task(clients=2), steps=1)
    recorded(folder / "pair", "all-reduce", task(clients=2), steps=1)
    recorded(folder / "four", "all-reduce", task(clients=4), steps=1)
    result = audit_runs(
        [folder / name for name in ("server", "pair", "four")],
        attacks=("linear",),
        seed=0,
        device="cpu",
        out=folder / "leakage",
    )
    return folder / "leakage", result


def row_of(result: LeakageResult, run: str) -> LeakageRow:
    return next(row for row in result.rows if row.run == run)


def test_a_peer_of_two_gets_the_others_picture_exactly(audited: tuple[Path, LeakageResult]) -> None:
    folder, result = audited
    for run, role in (("server", "server"), ("pair", "peer")):
        row = row_of(result, run)
        assert (row.role, row.clients, row.examples) == (role, 1, 1)
        assert row.verdict == "leaks"
        score = row.score("psnr")
        assert score is not None
        assert score.value is not None
        assert score.value > 60
        assert row.example is not None
        assert row.example.original is not None
        assert row.example.reconstruction is not None
        assert (folder / row.example.original).is_file()
        assert (folder / row.example.reconstruction).is_file()
    assert result.exit_code == 1


def test_a_larger_cohort_is_a_larger_batch_and_never_called_safe(audited: tuple[Path, LeakageResult]) -> None:
    _, result = audited
    pair, four = row_of(result, "pair"), row_of(result, "four")
    assert (four.clients, four.examples) == (3, 3)
    assert four.examples > pair.examples
    assert "mean of the other n - 1" in four.theory
    assert four.source
    assert four.verdict in ("leaks", "not-recovered", "inconclusive")
    if four.verdict == "not-recovered":
        assert four.control is True, "a failed attack counts only where it works on an easier update"


def test_the_result_is_read_back_and_other_views_are_not_overwritten(
    audited: tuple[Path, LeakageResult],
) -> None:
    folder, result = audited
    assert read_leakage(folder) == result
    assert json.loads((folder / "leakage.json").read_text())["schema_version"] == 1
    with pytest.raises(InputError, match="holds the result of other views"):
        audit_runs([folder.parent / "pair"], out=folder, attacks=("linear",))


def test_the_page_of_a_run_is_not_overwritten(tmp_path: Path) -> None:
    recorded(tmp_path / "run", "server", task(clients=2), steps=1)
    (tmp_path / "run" / "report.html").write_text("the page of the run")
    with pytest.raises(InputError, match="run holds another report; accepted: --force, or another folder"):
        audit_runs([tmp_path / "run"], out=tmp_path / "run")
    assert (tmp_path / "run" / "report.html").read_text() == "the page of the run"


def test_a_view_that_cannot_be_attacked_is_a_row_that_says_why(tmp_path: Path) -> None:
    recorded(tmp_path / "run", "server", task(clients=2), steps=1)
    view = worst_first(read_index(tmp_path / "run").views)[0]
    (tmp_path / "run" / str(view.update)).write_bytes(b"not a file of tensors")
    result = audit_runs([tmp_path / "run"], attacks=("linear",), device="cpu", out=tmp_path / "out")
    assert [row.status for row in result.rows] == ["failed"]
    assert "not a safetensors file" in result.rows[0].error
    assert result.exit_code == 3


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    for above in ("a", "b"):
        recorded(tmp_path / above / "run", "server", task(clients=2), steps=1)
    rows = plan([tmp_path / "a" / "run", tmp_path / "b" / "run"], per_role=1)
    assert [row.run for row in rows] == [str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run")]
    assert [row.run for row in plan([tmp_path / "a" / "run"], per_role=1)] == ["run"]
    with pytest.raises(InputError, match="was given twice"):
        plan([tmp_path / "a" / "run", tmp_path / "b" / ".." / "a" / "run"], per_role=1)


def test_redacted_rows_hold_no_original(tmp_path: Path) -> None:
    recorded(tmp_path / "run", "server", task(clients=2), steps=1)
    result = audit_runs(
        [tmp_path / "run"], attacks=("linear",), device="cpu", out=tmp_path / "out", redact=True
    )
    example = result.rows[0].example
    assert example is not None
    assert example.original is None
    assert example.true_label is None
    assert example.reconstruction is not None
    assert not list((tmp_path / "out").rglob("original-*.png"))


@pytest.mark.parametrize(
    "wrong", [{"per_role": 0}, {"budget": 0.0}, {"attacks": ("magic",)}, {"policy": "psnr>>2"}]
)
def test_what_cannot_be_used_is_said_before_anything_runs(tmp_path: Path, wrong: dict[str, object]) -> None:
    recorded(tmp_path / "run", "server", task(clients=2), steps=1)
    with pytest.raises(InputError):
        audit_runs([tmp_path / "run"], out=tmp_path / "out", **wrong)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="holds no recorded views"):
        audit_runs([tmp_path])
    with pytest.raises(InputError, match="no run folder"):
        audit_runs([])


# ------------------------------------------------------------------ theory


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_role_of_every_system_has_its_theory(name: str) -> None:
    run = small_worlds.simulation(small_worlds.task(clients=6, each=40), steps=4, every=4)
    run.run(SYSTEMS[name])
    for role in {seen.role for seen in run.seen.kept} | {"network"}:
        assert theory_of(name, role) is not UNWRITTEN, f"{name}: {role}"  # type: ignore[arg-type]


def test_theories_are_sentences_with_a_source() -> None:
    assert {system for system, _ in THEORY} == {
        *(
            "ssgd",
            "asgd",
            "dssgd",
            "dts",
            "dgc",
            "fedavg",
            "sync",
            "timeout",
            "fedbuff",
            "secagg",
            "async-secagg",
        )
    }
    for (system, _), theory in THEORY.items():
        assert theory.text.endswith("."), system
        assert theory.source, system
    assert theory_of("elsewhere", "server") is UNWRITTEN


# ------------------------------------------------------------------ the network


def crossing(steps: dict[str, int], step_seconds: float, size: int, rounds: int = 3) -> list[Message]:
    """Clients that compute so many steps between a download and an upload."""
    found = []
    for index in range(rounds):
        for client, count in steps.items():
            begin = 100.0 * index
            found.append(Message(begin, begin + 1, "server", client, "model", 4000))
            done = begin + 1 + count * step_seconds
            found.append(Message(done, done + 1, client, "server", "update", size))
            found.append(Message(done, done + 1, client, "server", "keys", 64))
    return found


def test_sizes_and_times_give_away_steps_and_sparsity() -> None:
    said = " ".join(infer(crossing({"a": 3, "b": 12}, 0.5, 80), Speeds(0.5, alike=True)))
    assert "2 clients took part, with 3 uploads each" in said
    assert "about 1.00% of its numbers" in said, "80 bytes are 10 of 1000 numbers"
    assert "3 to 12 local steps a client." in said
    assert "longest: b" in said
    alike = " ".join(infer(crossing({"a": 4, "b": 4}, 0.5, 4000)))
    assert "dense" in alike
    assert "nothing tells them apart" in alike
    assert "local step" not in alike, "without their speed nobody can say"
    unsure = " ".join(infer(crossing({"a": 3, "b": 12}, 0.5, 80), Speeds(0.5, alike=False)))
    assert "which they are not" in unsure
    known = " ".join(infer(crossing({"a": 4, "b": 4}, 0.5, 80), parameters=10_000))
    assert "Uploads are 0.20% of the model's size: about 0.10% of its numbers" in known
    assert infer([]) == []


def test_the_network_of_a_run_is_a_row_without_a_reconstruction(tmp_path: Path) -> None:
    world = task(clients=2, step_seconds=0.25)
    recorded(tmp_path / "run", "server", world, steps=1)
    (tmp_path / "run" / "network.csv").write_text(
        "sent,received,sender,receiver,kind,bytes\n"
        "0.0,0.1,server,client-000,model,1000\n0.6,0.7,client-000,server,update,1000\n"
    )
    (tmp_path / "run" / "run.json").write_text(
        json.dumps({"system": "ssgd", "scenario": {"step_seconds": 0.25, "speed_spread": 0.0}})
    )
    result = audit_runs([tmp_path / "run"], attacks=("linear",), device="cpu", out=tmp_path / "out")
    network = next(row for row in result.rows if row.role == "network")
    assert network.status == "no-update"
    assert network.verdict is None
    assert any("2 local steps" in sentence for sentence in network.inferred)
    assert "sizes and times" in network.theory
    assert result.exit_code == 1, "of the server's row"


@pytest.mark.parametrize(
    "text", ["when,who\n1,a\n", "sent,received,sender,receiver,kind,bytes\nnan,1,a,b,update,3\n"]
)
def test_a_table_of_messages_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "network.csv").write_text(text)
    with pytest.raises(InputError, match=r"network\.csv"):
        read_network(tmp_path)
    assert read_network(tmp_path / "elsewhere") is None


def test_the_results_and_the_theory_import_no_torch() -> None:
    code = (
        "import sys, leakaudit.leakage_results, leakaudit.federated.theory, leakaudit.federated.network,"
        " leakaudit.federated.views; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
