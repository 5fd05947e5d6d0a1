from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import BinaryIO

import pytest

from leakaudit import atomic
from leakaudit.atomic import sha256_of, write_atomically
from leakaudit.errors import InputError


def test_bytes_and_writers_reach_the_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", b"one")
    write_atomically(str(tmp_path / "b"), lambda file: file.write(b"two"))
    assert (tmp_path / "a").read_bytes() + (tmp_path / "b").read_bytes() == b"onetwo"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", b"one")
    (tmp_path / "b").write_bytes(b"two")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_full_disk_is_an_input_error(tmp_path: Path) -> None:
    def fill(file: BinaryIO) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(InputError, match="No space left on device"):
        write_atomically(tmp_path / "a", fill)
    assert not list(tmp_path.iterdir())


def test_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "fixed"
    folder.mkdir()
    folder.chmod(0o555)
    if os.access(folder, os.W_OK):  # root may write anywhere, so the system call is made to refuse

        def refuse(*_: object) -> None:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr(atomic, "open", refuse, raising=False)
    with pytest.raises(InputError, match=r"cannot write .*shared.*: Permission denied"):
        write_atomically(folder / "shared.safetensors", b"x")
    assert not list(folder.iterdir())


@pytest.mark.parametrize("name", ["missing/a", "file/a", "folder", "x" * 400])
def test_paths_that_cannot_be_files(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"1")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot write"):
        write_atomically(tmp_path / name, b"x")


def test_devices_are_not_replaced() -> None:
    with pytest.raises(InputError, match="not a regular file"):
        write_atomically(os.devnull, b"x")


def test_sha256(tmp_path: Path) -> None:
    content = os.urandom(3_000_000)
    (tmp_path / "a").write_bytes(content)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(content).hexdigest()
    with pytest.raises(InputError, match="cannot read"):
        sha256_of(tmp_path / "none")
