"""The pictures of a sweep's page: each once, small, and together within a budget of bytes.

A page of 200 cells could name ten thousand pictures.  Small ones are kept as they are, larger ones are
scaled down; equal ones (the originals, which all cells share) are embedded once and shown by reference.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from leakaudit.report.folder import read_picture

MAX_BYTES = 12_000_000
"""Of embedded pictures, as base64."""
AS_IT_IS = 64
"""Pictures of at most so many pixels a side are embedded unchanged."""
SMALL_FILE = 24_000
THUMBNAIL = 96
FRAME = 80
MAX_PIXELS = 40_000_000
QUALITY = 85


@dataclass(frozen=True)
class Shot:
    """A place in an embedded picture, in its pixels; `id` names the picture on the page."""

    id: str
    left: int
    top: int
    width: int
    height: int

    @property
    def view(self) -> str:
        return f"{self.left} {self.top} {self.width} {self.height}"

    @property
    def pixelated(self) -> bool:
        return max(self.width, self.height) <= AS_IT_IS


@dataclass(frozen=True)
class Plate:
    """One embedded picture."""

    id: str
    source: str
    width: int
    height: int


class Album:
    """Collects pictures of one sweep's folder until the budget is used up.

    Ask for what matters most first.  A picture that was embedded before costs nothing.
    """

    def __init__(self, folder: Path | None, budget: int = MAX_BYTES) -> None:
        self._folder = folder
        self._left = budget
        self._by_content: dict[str, Plate] = {}
        self._by_name: dict[str, Shot | None] = {}
        self.left_out = 0

    @property
    def plates(self) -> list[Plate]:
        return list(self._by_content.values())

    def picture(self, name: str | None) -> Shot | None:
        """None when there is no such picture, it cannot be read, or the budget is used up.

        Raises `InputError` for a path that leaves the folder, and for a file that is not a PNG.
        """
        if name is None or self._folder is None:
            return None
        if name not in self._by_name:
            found = self._read(name)
            self._by_name[name] = None if found is None else self._embed(*found)
        return self._by_name[name]

    def film(self, names: Sequence[str | None]) -> list[Shot | None]:
        """Frames side by side in one embedded sheet; one place a name."""
        frames = [None if name is None else self._frame(name) for name in names]
        shown = [frame for frame in frames if frame is not None]
        if not shown:
            return [None] * len(frames)
        sheet = Image.new("RGB", (sum(frame.width for frame in shown), max(frame.height for frame in shown)))
        places, left = [], 0
        for frame in shown:
            sheet.paste(frame, (left, 0))
            places.append((left, 0, frame.width, frame.height))
            left += frame.width
        whole = self._embed(*_jpeg(sheet))
        shots = iter([None if whole is None else Shot(whole.id, *place) for place in places])
        return [None if frame is None else next(shots) for frame in frames]

    def _read(self, name: str) -> tuple[bytes, str, int, int] | None:
        assert self._folder is not None
        found = read_picture(self._folder, name)
        if found is None:
            return None
        data, width, height = found
        if max(width, height) <= AS_IT_IS and len(data) <= SMALL_FILE:
            return data, "image/png", width, height
        picture = _open(data, width, height)
        if picture is None:
            return None
        picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        return _jpeg(picture)

    def _frame(self, name: str) -> Image.Image | None:
        found = None if self._folder is None else read_picture(self._folder, name)
        picture = None if found is None else _open(*found)
        if picture is not None and max(picture.size) > FRAME:
            picture.thumbnail((FRAME, FRAME), Image.Resampling.LANCZOS)
        return picture

    def _embed(self, data: bytes, kind: str, width: int, height: int) -> Shot | None:
        content = hashlib.sha256(data).hexdigest()
        if content not in self._by_content:
            source = f"data:{kind};base64,{base64.b64encode(data).decode()}"
            if len(source) > self._left:
                self.left_out += 1
                return None
            self._left -= len(source)
            self._by_content[content] = Plate(f"p{len(self._by_content)}", source, width, height)
        return Shot(self._by_content[content].id, 0, 0, width, height)


def _open(data: bytes, width: int, height: int) -> Image.Image | None:
    """Decoded, in RGB; None for a damaged picture and for one too large to open."""
    if not 0 < width * height <= MAX_PIXELS:
        return None
    try:
        return Image.open(io.BytesIO(data), formats=("PNG",)).convert("RGB")
    except (OSError, SyntaxError, ValueError):
        return None


def _jpeg(picture: Image.Image) -> tuple[bytes, str, int, int]:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=QUALITY, subsampling=0, optimize=True)
    return buffer.getvalue(), "image/jpeg", picture.width, picture.height
