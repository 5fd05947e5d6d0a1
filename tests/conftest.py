"""One thread, no global random state shared between tests, and LPIPS weights from shared data when present."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_tensor

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
TORCH_HOME = SHARED / "torch_home"

if TORCH_HOME.is_dir():
    os.environ.setdefault("TORCH_HOME", str(TORCH_HOME))
os.environ["LEAKAUDIT_COMPILE"] = (
    "never"  # compiling a step takes 10 s; tests/attacks/test_compiling.py does it
)
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    for marker, variable, what in (
        ("online", "LEAKAUDIT_ONLINE", "to use the network"),
        ("thorough", "LEAKAUDIT_THOROUGH", "to wait for some minutes more"),
    ):
        if not os.environ.get(variable):
            for item in items:
                if item.get_closest_marker(marker):
                    item.add_marker(pytest.mark.skip(reason=f"set {variable}=1 {what}"))


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def photo_crops() -> Tensor:
    """64 crops of the bundled photos, (64, 3, 32, 32) in [0, 1]."""
    folder = Path(__file__).parents[1] / "examples" / "photos"
    images = [Image.open(path).convert("RGB").resize((128, 128)) for path in sorted(folder.glob("*.png"))]
    crops = torch.stack([to_tensor(image) for image in images]).unfold(2, 32, 32).unfold(3, 32, 32)
    return crops.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 32, 32)


@pytest.fixture
def shared_data() -> Path:
    """Real data beside the repository; tests that need it are skipped without."""
    if not SHARED.is_dir():
        pytest.skip("no shared data beside the repository")
    return SHARED
