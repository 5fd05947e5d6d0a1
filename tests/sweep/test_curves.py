"""Accuracy curves trained elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from leakaudit.errors import InputError
from leakaudit.sweep.curves import read_curves, summary

ROWS = [
    {"protocol": "fedsgd", "defense": "none", "seed": seed, "step": step, "accuracy": accuracy}
    for seed, finals in ((0, (0.1, 0.6)), (1, (0.1, 0.7)))
    for step, accuracy in zip((0, 100), finals, strict=True)
]
PRIVATE = {
    "protocol": "fedsgd",
    "defense": "dp-sgd:noise_multiplier=1.0",
    "seed": 0,
    "step": 100,
    "accuracy": 0.3,
    "epsilon": 2.5,
    "delta": 1e-5,
}


def as_json(folder: Path, rows: object) -> Path:
    path = folder / "curves.json"
    path.write_text(json.dumps(rows))
    return path


def as_csv(folder: Path, text: str) -> Path:
    path = folder / "curves.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_json_and_csv_say_the_same(tmp_path: Path) -> None:
    header = list(PRIVATE)
    lines = [",".join(f'"{row[name]}"' if name in row else "" for name in header) for row in [*ROWS, PRIVATE]]
    written = read_curves(as_csv(tmp_path, "\ufeff" + "\n".join([",".join(header), "", *lines]) + "\n"))
    assert written == read_curves(as_json(tmp_path, [*ROWS, PRIVATE]))
    plain, private = written
    assert (plain.protocol, plain.defense, plain.steps, plain.supplied) == ("fedsgd", "none", 100, True)
    assert plain.accuracy == pytest.approx(0.65)
    assert [curve.points for curve in plain.curves] == [[(0, 0.1), (100, 0.6)], [(0, 0.1), (100, 0.7)]]
    assert (plain.epsilon, private.epsilon, private.delta) == (None, 2.5, 1e-5)
    assert (private.accuracy, private.low, private.high) == (0.3, None, None)


def test_points_may_come_in_any_order(tmp_path: Path) -> None:
    assert read_curves(as_json(tmp_path, ROWS[::-1])) == read_curves(as_json(tmp_path, ROWS))


def test_the_interval_is_students_and_stays_within_0_and_1() -> None:
    found = summary([0.6, 0.7, 0.8])
    half = 4.302652729749462 * 0.1 / 3**0.5  # t(0.975, 2), tables
    assert found == {
        "accuracy": pytest.approx(0.7),
        "low": pytest.approx(0.7 - half),
        "high": pytest.approx(0.7 + half),
    }
    assert summary([0.9, 1.0])["high"] == 1.0
    assert summary([0.0, 0.2])["low"] == 0.0
    assert summary([]) == {"accuracy": None, "low": None, "high": None}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"accuracy": 43.2}, "accuracy=43.2"),
        ({"accuracy": float("nan")}, "accuracy=nan"),
        ({"accuracy": "much"}, "accuracy='much'"),
        ({"accuracy": None}, "accuracy=None"),
        ({"step": -1}, "step=-1"),
        ({"step": 1.5}, "step=1.5"),
        ({"defense": " "}, "defense=' '"),
        ({"epsilon": -1}, "epsilon=-1"),
        ({"epsilon": float("inf")}, "epsilon=inf"),
        ({"delta": 1}, "delta=1"),
        ({"accurracy": 0.5}, "did you mean 'accuracy'"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(tmp_path: Path, change: dict[str, object], said: str) -> None:
    with pytest.raises(InputError) as caught:
        read_curves(as_json(tmp_path, [*ROWS, {**PRIVATE, **change}]))
    message = str(caught.value)
    assert said in message
    assert "curves.json, entry 5" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "no accuracies"),
        ({}, "not a list of objects"),
        ([1], "not a list of objects"),
        ([{"protocol": "fedsgd"}], "entry 1: defense is missing"),
        ([*ROWS, ROWS[0]], "step 0 of seed 0 is there twice"),
        (ROWS[:3], "seeds end at steps 0 and 100"),
        ([PRIVATE, {**PRIVATE, "step": 200, "epsilon": 3}], "epsilon is both 2.5 and 3"),
    ],
)
def test_files_that_make_no_sense(tmp_path: Path, rows: object, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_curves(as_json(tmp_path, rows))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "columns 'none'"),
        ("protocol,defense,seed,step\n", "columns 'protocol, defense, seed, step'"),
        ("protocol,defense,seed,step,accuracy\n", "no accuracies"),
        ("protocol,defense,seed,step,accuracy\nfedsgd,none,0,1\n", "line 2 has 4 cells, the header 5"),
        ("protocol,defense,seed,step,accuracy\n\nfedsgd,none,0,1,\n", "line 3: accuracy is missing"),
        ("protocol,defense,seed,step,accuracy\nfedsgd,none,x,1,0.5\n", "line 2: seed='x'"),
        ("protocol,defense,seed,step,accuracy,accuracy\n", "columns"),
        ("protocol,defense,seed,step,accuracy,lr\na,b,0,1,0.5,3\n", "unknown field 'lr'"),
        ('protocol,defense,seed,step,accuracy\n"a,b', "cannot read"),
    ],
)
def test_tables_that_make_no_sense(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_curves(as_csv(tmp_path, text))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"read from \.csv or \.json"):
        read_curves(tmp_path / "curves.txt")
    with pytest.raises(InputError, match="cannot read"):
        read_curves(tmp_path / "none.csv")
    path = as_json(tmp_path, [])
    for content in (b"[", b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"not JSON|cannot read"):
            read_curves(path)
