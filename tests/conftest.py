"""One thread, no global random state shared between tests, and LPIPS weights from shared data when present."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
TORCH_HOME = SHARED / "torch_home"

if TORCH_HOME.is_dir():
    os.environ.setdefault("TORCH_HOME", str(TORCH_HOME))
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    if not os.environ.get("LEAKAUDIT_ONLINE"):
        for item in items:
            if item.get_closest_marker("online"):
                item.add_marker(pytest.mark.skip(reason="set LEAKAUDIT_ONLINE=1 to use the network"))


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)


@pytest.fixture
def shared_data() -> Path:
    """Real data beside the repository; tests that need it are skipped without."""
    if not SHARED.is_dir():
        pytest.skip("no shared data beside the repository")
    return SHARED
