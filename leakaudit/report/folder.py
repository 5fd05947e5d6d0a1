"""The run folder: result.json, report.html, and the pictures both of them name.

A run folder may come from a stranger.  Every picture it names must be a PNG inside it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

from leakaudit.atomic import write_atomically
from leakaudit.errors import InputError
from leakaudit.report.redact import redact
from leakaudit.results import SCHEMA_VERSION, AuditResult, read_versioned

RESULT_NAME = "result.json"
REPORT_NAME = "report.html"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def write_run(result: AuditResult, folder: Path) -> AuditResult:
    """Write result.json and report.html into `folder`, each atomically.

    The pictures named by the result must already be there.  A result marked `redacted`
    is stripped of the truth first, and pictures of it that an earlier run left are deleted.

    Returns:
        What was written, knowing its folder.

    Raises:
        InputError: the folder cannot be written to, or a picture's path is not acceptable.
    """
    from leakaudit.report.html import render_html

    if result.redacted:
        _forget_originals(folder)
    written = (redact(result) if result.redacted else result).in_folder(folder)
    page = render_html(written, folder)
    write_atomically(folder / RESULT_NAME, written.to_json().encode(), make_folder=True)
    write_atomically(folder / REPORT_NAME, page.encode("utf-8", "replace"))
    return written


def _forget_originals(folder: Path) -> None:
    """Delete what an earlier run in the same folder showed of the truth."""
    try:
        before = read_run(folder)
    except InputError:
        return
    for trial in before.trials:
        for example in trial.examples:
            for name in filter(None, (example.original, example.difference)):
                locate_picture(folder, name).unlink(missing_ok=True)


def write_page(result: AuditResult, path: Path, *, redact: bool = False) -> None:
    """Write the HTML report alone to `path`, with the pictures of the result's run folder.

    Raises `InputError` when it cannot be written.
    """
    from leakaudit.report.html import render_html

    page = render_html(result, result.folder, redact=redact)
    write_atomically(path, page.encode("utf-8", "replace"), make_folder=True)


def read_run(folder: Path) -> AuditResult:
    """The result in `folder`, knowing its folder.

    Raises:
        InputError: no result.json, not JSON, another schema, an index that points nowhere,
            or a picture named outside the folder.
    """
    path = folder / RESULT_NAME
    result = read_versioned(
        path, AuditResult, SCHEMA_VERSION, noun="an audit result", lacking=f"{folder} is not a run folder"
    )
    if result.best is not None and not 0 <= result.best < len(result.trials):
        raise InputError(f"{path}: best is {result.best}, but there are {len(result.trials)} trials")
    for name in picture_names(result):
        locate_picture(folder, name)
    return result.in_folder(folder)


def picture_names(result: AuditResult) -> Iterator[str]:
    """Every picture the result names, as written there."""
    for trial in result.trials:
        for frame in trial.strip:
            yield from filter(None, (frame.image,))
        for example in trial.examples:
            yield from filter(None, (example.original, example.reconstruction, example.difference))


def locate_picture(folder: Path, name: str) -> Path:
    """The file a picture's name stands for; it need not exist.

    Raises `InputError` for an absolute path, one that leaves the folder (also through a
    symbolic link), or one that is not a .png.
    """
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    absolute = posix.is_absolute() or bool(windows.drive) or bool(windows.root)
    if absolute or ".." in windows.parts or "\0" in name:
        raise InputError(f"picture path {name!r} must stay inside the run folder")
    if posix.suffix.lower() != ".png":
        raise InputError(f"picture path {name!r} must end in .png")
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"picture path {name!r} leads out of the run folder")
    return path


def read_picture(folder: Path, name: str) -> tuple[bytes, int, int] | None:
    """The bytes of a PNG in the folder with its width and height; None when the file is missing.

    Raises `InputError` when the path is not acceptable or the file is not a PNG.
    """
    path = locate_picture(folder, name)
    if not path.is_file():
        return None
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if len(data) < 24 or not data.startswith(PNG_SIGNATURE):
        raise InputError(f"picture {name!r} in the run folder is not a PNG")
    width, height = struct.unpack(">II", data[16:24])
    return data, width, height
