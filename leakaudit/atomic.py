"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from leakaudit.errors import InputError


def write_atomically(
    path: str | Path, content: bytes | Callable[[BinaryIO], object], *, make_folder: bool = False
) -> None:
    """Write `content`, or what `content(file)` writes, to `path` in one step.

    The bytes go to a temporary file in the same folder, reach the disk, and then take
    the name `path`; an old file of that name stays intact until then.

    Raises `InputError` when the folder is missing (unless `make_folder`) or read-only, the disk is
    full, or `path` is something else than a regular file.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.tmp")
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"cannot write {path}: it exists and is not a regular file")
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        if not path.parent.is_dir():
            raise InputError(f"cannot write {path}: there is no folder {path.parent}")
        _write_through(temporary, content)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _write_through(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    with open(path, "xb") as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            content(file)
        file.flush()
        os.fsync(file.fileno())


def sha256_of(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file; `InputError` when it cannot be read."""
    try:
        with open(path, "rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
            return digest.hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


def writable_folder(path: str | Path) -> Path:
    """The folder, made when it is missing.  `InputError` when nothing can be written there."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"cannot write to the folder {folder}: {error.strerror}") from error
    return folder
