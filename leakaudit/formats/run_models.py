"""Models that lie beside a recorded update, each filed under the hash of its parameters.

RUN/views/round-0012.safetensors      the update, whose manifest names the hash
RUN/models/0123456789abcdef.safetensors
"""

from __future__ import annotations

import re
from pathlib import Path

VIEWS, MODELS, TRUTH = "views", "models", "truth"
"""Folders of a run."""

_HASH = re.compile(r"[0-9a-f]{64}")


def model_file(sha256: str) -> str:
    """The name of the file of a model, by `leakaudit.formats.checkpoint.parameters_sha256`."""
    return f"{sha256[:16]}.safetensors"


def model_beside(update: str | Path, sha256: str) -> Path | None:
    """The file of the model in the run folder that the update lies in; None where there is none.

    The hash may be a stranger's: what is not one names no file.  Whoever loads the file checks its hash.
    """
    if not _HASH.fullmatch(sha256):
        return None
    path = Path(update).parent.parent / MODELS / model_file(sha256)
    return path if path.is_file() else None
