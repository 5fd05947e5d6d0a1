"""The run folder: round trip, and what is refused when it comes from a stranger."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_audits import SAMPLES, hostile_audit, photo_audit

from leakaudit.atomic import write_atomically
from leakaudit.errors import InputError
from leakaudit.report.folder import locate_picture, picture_names, read_run, write_run


@pytest.mark.parametrize("name", SAMPLES)
def test_round_trip(tmp_path: Path, name: str) -> None:
    written = write_run(SAMPLES[name](tmp_path), tmp_path)
    read = read_run(tmp_path)
    assert read.to_json() == written.to_json()
    assert read.folder == tmp_path
    assert not list(tmp_path.rglob("*.tmp"))


def test_nan_and_infinity_survive(tmp_path: Path) -> None:
    write_run(hostile_audit(tmp_path), tmp_path)
    trials = read_run(tmp_path).trials
    assert math.isnan(trials[0].residual or 0)
    assert trials[1].residual == math.inf
    assert trials[0].scores[1].value == -math.inf


def test_every_named_picture_exists(tmp_path: Path) -> None:
    result = photo_audit(tmp_path, 2)
    names = list(picture_names(result))
    assert len(names) == 2 * 3 * 2 + 12 + 5
    assert all((tmp_path / name).is_file() for name in names)


def edit(folder: Path, change: dict[str, object]) -> None:
    path = folder / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema_version 2; this leakaudit reads 1"),
        ({"schema_version": None}, "schema_version None"),
        ({"best": 17}, "best is 17, but there are 3 trials"),
        ({"best": -1}, "best is -1"),
        ({"surprise": 1}, "surprise: Extra inputs"),
        ({"trials": "none"}, "trials: "),
    ],
)
def test_another_schema_is_one_line(tmp_path: Path, change: dict[str, object], message: str) -> None:
    write_run(photo_audit(tmp_path), tmp_path)
    edit(tmp_path, change)
    with pytest.raises(InputError) as caught:
        read_run(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"null", b"[" * 100_000])
def test_not_a_result(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(InputError):
        read_run(tmp_path)


@given(
    content=st.binary(max_size=200) | st.text(alphabet='{}[]":,schema_version1', max_size=80).map(str.encode)
)
def test_arbitrary_bytes_are_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "result.json").write_bytes(content)
    with pytest.raises(InputError):
        read_run(folder)


def test_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a run folder"):
        read_run(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name",
    [
        "../x.png",
        "images/../../x.png",
        "/etc/x.png",
        "C:\\x.png",
        "C:x.png",
        "\\\\host\\share\\x.png",
        "..\\x.png",
        "images\\..\\..\\x.png",
        "x.svg",
        "result.json",
        "",
        ".",
        "x.png\0.png",
        "link/x.png",
    ],
)
def test_pictures_outside_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(InputError, match="picture path"):
        locate_picture(folder, name)


def test_a_strangers_folder_with_traversal_is_refused(tmp_path: Path) -> None:
    write_run(photo_audit(tmp_path), tmp_path)
    path = tmp_path / "result.json"
    path.write_text(path.read_text().replace("images/original-0.png", "../../original-0.png"))
    with pytest.raises(InputError, match="must stay inside"):
        read_run(tmp_path)


def test_a_picture_that_is_no_png_is_refused(tmp_path: Path) -> None:
    result = photo_audit(tmp_path)
    (tmp_path / "images/best-0.png").write_text("<svg onload=alert(1)>")
    with pytest.raises(InputError, match="is not a PNG"):
        write_run(result, tmp_path)
    assert not (tmp_path / "result.json").exists()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot write"):
        write_atomically(tmp_path / "file" / "result.json", b"{}", make_folder=True)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "a", b"old")

    def fail(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(InputError, match="No space left"):
        write_atomically(tmp_path / "a", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"
