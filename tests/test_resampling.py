"""The pixels that commands see are those of torchvision's transforms, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as reference

from leakaudit.resampling import centre, grey, pixels_of, resized

SIDES = st.integers(3, 40)
MODES = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}


def image(channels: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(channels, height, width, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(height=SIDES, width=SIDES, tall=SIDES, wide=SIDES, channels=st.sampled_from([1, 3]))
@pytest.mark.parametrize("mode", MODES)
def test_resizing(mode: str, height: int, width: int, tall: int, wide: int, channels: int) -> None:
    pixels = image(channels, height, width)
    expected = reference.resize(pixels, [tall, wide], interpolation=MODES[mode], antialias=True)
    assert torch.equal(resized(pixels, tall, wide, mode), expected)  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(height=SIDES, width=SIDES, data=st.data())
def test_cropping(height: int, width: int, data: st.DataObject) -> None:
    tall, wide = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    pixels = image(3, height, width)
    assert torch.equal(centre(pixels, tall, wide), reference.center_crop(pixels, [tall, wide]))


def test_greying() -> None:
    pixels = image(3, 9, 7)
    assert torch.equal(grey(pixels), reference.rgb_to_grayscale(pixels, num_output_channels=1))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_pictures(mode: str) -> None:
    values = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    picture = Image.fromarray(values).convert(mode)
    assert torch.equal(pixels_of(picture), reference.pil_to_tensor(picture))
