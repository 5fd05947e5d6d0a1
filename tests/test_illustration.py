from __future__ import annotations

from pathlib import Path

import pytest
import torch

from leakaudit.attacks.base import Reconstruction
from leakaudit.media.images import Album
from leakaudit.models.spaces import Pixels


@pytest.mark.parametrize(("kept", "shown"), [(1, 1), (16, 16), (17, 16), (81, 16)])
def test_a_film_strip_has_two_rows_at_most_with_its_first_and_last_frame(
    tmp_path: Path, kept: int, shown: int
) -> None:
    x = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    strip = [(iteration, 1.0 / (1 + iteration), x) for iteration in range(kept)]
    found = Reconstruction(
        x=x, y=torch.tensor([0]), loss=0.0, iterations=kept, stopped="finished", history=[], strip=strip
    )
    frames = Album(tmp_path, "a").strip(Pixels((3, 4, 4), (0.0,) * 3, (1.0,) * 3), found)
    iterations = [frame.iteration for frame in frames]
    assert (len(frames), iterations[0], iterations[-1]) == (shown, 0, kept - 1)
    assert iterations == sorted(set(iterations))
    assert len(list((tmp_path / "images").iterdir())) == shown
