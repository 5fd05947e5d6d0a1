"""Writing a file so that a reader sees either the old one or the whole new one."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from leakaudit.errors import InputError


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` through a temporary file in the same folder, making the folder if needed.

    Raises `InputError` when the folder cannot be made or written to; nothing is left half-written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
