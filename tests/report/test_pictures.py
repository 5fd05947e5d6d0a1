"""PNG files, contact sheets and difference pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from leakaudit.errors import InputError
from leakaudit.report.pictures import contact_sheet, difference, write_png


@pytest.mark.parametrize("shape", [(5, 7, 3), (5, 7, 1), (5, 7)])
def test_every_level_survives_a_png(tmp_path: Path, shape: tuple[int, ...]) -> None:
    levels = np.random.default_rng(0).integers(0, 256, shape)
    write_png(levels / 255.0, tmp_path / "deep" / "a.png")
    read = np.asarray(Image.open(tmp_path / "deep" / "a.png"))
    assert np.array_equal(read, levels.reshape(shape[:2] if shape[-1] == 1 else shape))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.png"]


def test_values_outside_are_clipped_and_nan_is_grey(tmp_path: Path) -> None:
    write_png(np.array([[-1.0, 2.0, np.nan, np.inf, -np.inf]]), tmp_path / "a.png")
    assert np.asarray(Image.open(tmp_path / "a.png")).tolist() == [[0, 255, 128, 255, 0]]


@pytest.mark.parametrize("shape", [(3, 5, 5), (4,), (2, 2, 2, 3), (0, 4), (0, 4, 3)])
def test_what_is_no_picture_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="a picture is"):
        write_png(np.zeros(shape), tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


@given(
    count=st.integers(1, 20),
    columns=st.none() | st.integers(1, 6),
    gap=st.integers(0, 3),
    channels=st.sampled_from([(), (1,), (3,)]),
)
def test_a_contact_sheet_holds_every_picture(
    count: int, columns: int | None, gap: int, channels: tuple[int, ...]
) -> None:
    batch = np.random.default_rng(count).uniform(0.1, 1, (count, 3, 4, *channels))
    sheet = contact_sheet(batch, columns=columns, gap=gap)
    wide = columns or int(np.ceil(np.sqrt(count)))
    for index in range(count):
        row, column = divmod(index, wide)
        top, left = row * (3 + gap), column * (4 + gap)
        assert np.array_equal(sheet[top : top + 3, left : left + 4], batch[index])
    assert np.isclose(sheet.sum(), batch.sum())


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(InputError, match="N >= 1"):
        contact_sheet(np.zeros((0, 3, 3)))


@given(arrays(np.float64, (2, 4, 4, 3), elements=st.floats(0, 1)))
def test_a_difference_is_symmetric_and_black_where_equal(pair: np.ndarray) -> None:
    found = difference(pair[0], pair[1])
    assert np.array_equal(found, difference(pair[1], pair[0]))
    assert np.array_equal(found == 0, np.isclose(pair[0], pair[1], rtol=0, atol=0))
    assert np.allclose(found, np.minimum(1, 5 * abs(pair[0] - pair[1])))


def test_pictures_of_other_shapes_have_no_difference() -> None:
    with pytest.raises(InputError, match="differ"):
        difference(np.zeros((2, 2)), np.zeros((2, 3)))
