"""`leakaudit report` takes the folder of any run."""

from __future__ import annotations

from pathlib import Path

import pytest

from leakaudit.errors import InputError
from leakaudit.report.finished import WRITERS, write_report


def test_every_kind_of_result_is_looked_for(tmp_path: Path) -> None:
    for name in WRITERS:
        folder = tmp_path / name.removesuffix(".json")
        folder.mkdir()
        (folder / name).write_text('{"schema_version": 0}')
        with pytest.raises(InputError, match=name):
            write_report(folder, tmp_path / "page.html")
    with pytest.raises(InputError, match="is not a run folder"):
        write_report(tmp_path, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
