"""Arrays -> PNG files: single pictures, contact sheets of a batch, differences.  numpy and PIL only."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from leakaudit.atomic import write_atomically
from leakaudit.errors import InputError

Pixels = NDArray[np.floating]

DIFFERENCE_GAIN = 5.0


def write_png(pixels: Pixels, path: Path) -> None:
    """Write one picture as an 8-bit PNG, atomically.

    Args:
        pixels: (H, W), (H, W, 1) or (H, W, 3), floating, [0, 1].  Values outside are clipped,
            NaN becomes mid-grey, so a diverged reconstruction can still be looked at.
        path: where to; the folder is made when missing.

    Raises:
        InputError: another shape, or the file cannot be written.
    """
    buffer = io.BytesIO()
    Image.fromarray(_to_bytes(pixels)).save(buffer, format="PNG", optimize=True)
    write_atomically(path, buffer.getvalue(), make_folder=True)


def _to_bytes(pixels: Pixels) -> NDArray[np.uint8]:
    array = np.asarray(pixels, dtype=np.float64)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)) or 0 in array.shape:
        raise InputError(f"a picture is (H, W), (H, W, 1) or (H, W, 3), got shape {tuple(np.shape(pixels))}")
    finite = np.nan_to_num(array, nan=0.5, posinf=1.0, neginf=0.0)
    return np.rint(np.clip(finite, 0.0, 1.0) * 255).astype(np.uint8)


def contact_sheet(batch: Pixels, columns: int | None = None, gap: int = 2, background: float = 0.0) -> Pixels:
    """A whole batch as one picture, in reading order; one example comes back as it is.

    Args:
        batch: (N, H, W) or (N, H, W, C), floating, N >= 1.
        columns: pictures a row; by default the smallest square that holds all.
        gap: pixels between neighbours.
        background: value of the gaps and of empty places.

    Returns:
        (rows*H + (rows-1)*gap, columns*W + (columns-1)*gap[, C]).

    Raises:
        InputError: another shape, or an empty batch.
    """
    batch = np.asarray(batch)
    if batch.ndim not in (3, 4) or batch.shape[0] == 0:
        raise InputError(f"a batch of pictures is (N, H, W) or (N, H, W, C), N >= 1, got shape {batch.shape}")
    count, height, width = batch.shape[:3]
    columns = math.ceil(math.sqrt(count)) if columns is None else columns
    rows = math.ceil(count / columns)
    shape = (rows * (height + gap) - gap, columns * (width + gap) - gap, *batch.shape[3:])
    sheet = np.full(shape, background, dtype=batch.dtype)
    for place, picture in enumerate(batch):
        top, left = (place // columns) * (height + gap), (place % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    return sheet


def difference(original: Pixels, reconstruction: Pixels, gain: float = DIFFERENCE_GAIN) -> Pixels:
    """`gain` times the absolute difference, clipped to [0, 1]: black where both agree.

    Raises `InputError` when the shapes differ.
    """
    if np.shape(original) != np.shape(reconstruction):
        raise InputError(f"pictures of shapes {np.shape(original)} and {np.shape(reconstruction)} differ")
    return np.clip(gain * np.abs(np.asarray(original) - np.asarray(reconstruction)), 0.0, 1.0)
