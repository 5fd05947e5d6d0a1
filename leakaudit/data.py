"""Private batches: images from folders, .npz archives and torchvision data sets, and truth files."""

from __future__ import annotations

import csv
import io
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from leakaudit.class_labels import numbered
from leakaudit.errors import InputError
from leakaudit.formats.phrases import counted, first_line, listing, quoted
from leakaudit.formats.reading import read_safetensors
from leakaudit.formats.writing import save_tensors
from leakaudit.resampling import centre, grey, pixels_of, resized

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
LABELS_FILE = "labels.csv"
TRUTH_KEY = "leakaudit_truth"

_MOST_CLASSES = 1 << 31

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class PrivateBatch:
    """What a client keeps to itself.

    Attributes:
        pixels: (N, C, H, W) float32 in [0, 1].
        labels: (N,) int64.
        names: where each example comes from, such as "cat/00000.png".
        class_names: by label, where known.
        notes: what was assumed while loading, in sentences.
    """

    pixels: Tensor
    labels: Tensor
    names: tuple[str, ...]
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> PrivateBatch:
        """The first `count` examples."""
        return self.part(0, count)

    def part(self, start: int, count: int) -> PrivateBatch:
        """`count` examples from `start` on."""
        rows = slice(start, start + count)
        return replace(self, pixels=self.pixels[rows], labels=self.labels[rows], names=self.names[rows])

    def rows(self, rows: Sequence[int]) -> PrivateBatch:
        """The examples at these positions, in this order."""
        index = list(rows)
        names = tuple(self.names[row] for row in index)
        return replace(self, pixels=self.pixels[index], labels=self.labels[index], names=names)

    def class_name(self, label: int) -> str:
        """The name of a class, or its number where it has none."""
        known = self.class_names is not None and 0 <= label < len(self.class_names)
        return self.class_names[label] if known and self.class_names else str(label)

    def label_name(self, index: int) -> str:
        """The name of the class of example `index`."""
        return self.class_name(int(self.labels[index]))


def load_batch(
    source: str | Path, shape: Shape, count: int | None, *, start: int = 0, classes: int | None = None
) -> PrivateBatch:
    """`count` examples (None: all) from `start` on, centre-cropped to the shape's proportions and resized.

    Args:
        source: an image file; a folder of images, flat, with a labels.csv (columns file, label and
            perhaps class), or with a sub-folder for each class (sorted, as torchvision's
            ImageFolder); an .npz with images (N, H, W, C) or (N, H, W), uint8 or floats in [0, 1],
            and labels, under images/labels, x/y, x_test/y_test or MedMNIST's test_images and so on;
            or torchvision:NAME,root=FOLDER,split=test,download=false.
        shape: (C, H, W) with C of 1 or 3; colour becomes grey (ITU-R 601) and grey is repeated.
        classes: number of classes that labels must stay below; None for no limit.

    Examples without labels get their position modulo `classes`, which a note says.
    Raises `InputError` when there are no images, fewer than asked for, one that cannot be
    read, or a label out of range.
    """
    if (count is not None and count < 1) or start < 0:
        raise InputError(f"count={count} and start={start}: accepted are count >= 1 and start >= 0")
    if shape[0] not in (1, 3) or min(shape) < 1:
        raise InputError(f"images have 1 or 3 channels, the model takes inputs of shape {shape}")
    images = _open(source, shape, classes)
    if images.count == 0:
        raise InputError(f"{source} holds no images")
    count = max(1, images.count - start) if count is None else count
    if start + count > images.count:
        raise InputError(
            f"{source} holds {counted(images.count, 'image')}, {count} from {start} on were asked for"
        )
    rows = range(start, start + count)
    pixels = torch.stack([fit(images.image(row), shape) for row in rows])
    labels = [images.label(row) if images.label else row % (classes or images.count) for row in rows]
    notes = () if images.label else (_no_labels(source, classes),)
    for label, row in zip(labels, rows, strict=True):
        if not 0 <= label < (classes or _MOST_CLASSES):
            limit = (classes or _MOST_CLASSES) - 1
            raise InputError(f"{source}: {images.name(row)} has label {label}; accepted: 0 to {limit}")
    return PrivateBatch(
        pixels=pixels,
        labels=torch.tensor(labels, dtype=torch.int64),
        names=tuple(images.name(row) for row in rows),
        class_names=images.class_names,
        notes=notes,
    )


def _no_labels(source: str | Path, classes: int | None) -> str:
    modulo = "" if classes is None else f" modulo {classes}"
    return f"{source} has no labels; each image got its position{modulo} as its label."


def photo_folder() -> Path:
    """The photos inside the installed package, or examples/photos of a checkout."""
    package = Path(__file__).parent
    installed = package / "photos"
    return installed if installed.is_dir() else package.parent / "examples" / "photos"


def control_photos(shape: Shape) -> PrivateBatch:
    """The four photos shipped with leakaudit, unrelated to anybody's data, labelled 0 to 3."""
    return load_batch(photo_folder(), shape, 4)


def fit(image: Tensor, shape: Shape) -> Tensor:
    """Crop (C', H', W') pixels in [0, 1] to the proportions of `shape` at the centre, resize (bicubic,
    antialiased), and turn grey into colour or colour into grey.  An image of that shape is unchanged."""
    channels, height, width = shape
    image = _with_channels(image, channels)
    tall, wide = image.shape[-2:]
    crop = [
        max(1, min(tall, round(wide * height / width))),
        max(1, min(wide, round(tall * width / height))),
    ]
    return resized(centre(image, *crop), height, width, "bicubic").clamp(0, 1).contiguous()


def _with_channels(image: Tensor, channels: int) -> Tensor:
    if image.shape[0] == channels:
        return image
    if channels == 1:
        return grey(image)
    return image.expand(channels, -1, -1)


@dataclass(frozen=True)
class ImageSource:
    """A source opened but not read: everything by position."""

    count: int
    image: Callable[[int], Tensor]
    name: Callable[[int], str]
    label: Callable[[int], int] | None
    class_names: tuple[str, ...] | None = None


def _open(source: str | Path, shape: Shape, classes: int | None) -> ImageSource:
    text = str(source)
    if text.startswith("torchvision:"):
        from leakaudit.data_sets import torchvision_set  # seconds, which files do without

        return torchvision_set(text.removeprefix("torchvision:"), shape, classes)
    path = Path(source)
    if os.path.isdir(path):
        return _folder(path)
    if not os.path.isfile(path):
        raise InputError(f"there is no image, folder or data set {quoted(text)}")
    if path.suffix.lower() == ".npz":
        return _npz(path)
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise InputError(f"{path} is no image; accepted: a folder, .npz, {', '.join(IMAGE_SUFFIXES)}")
    return _files([path], path.parent, None, None)


# ------------------------------------------------------------------------------ files and folders


def _folder(folder: Path) -> ImageSource:
    try:
        return _listed(folder)
    except OSError as error:
        raise InputError(f"cannot read {folder}: {error.strerror or error}") from error


def _listed(folder: Path) -> ImageSource:
    if (folder / LABELS_FILE).is_file():
        return _labelled_folder(folder)
    flat = _images_in(folder)
    if flat:
        return _files(flat, folder, None, None)
    groups = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    files = [(path, label) for label, group in enumerate(groups) for path in _images_in(group)]
    names = tuple(group.name for group in groups)
    return _files([path for path, _ in files], folder, [label for _, label in files], names)


def _images_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())


def _files(
    paths: Sequence[Path], root: Path, labels: Sequence[int] | None, class_names: tuple[str, ...] | None
) -> ImageSource:
    return ImageSource(
        count=len(paths),
        image=lambda row: read_image(paths[row]),
        name=lambda row: paths[row].relative_to(root).as_posix(),
        label=None if labels is None else labels.__getitem__,
        class_names=class_names,
    )


def _labelled_folder(folder: Path) -> ImageSource:
    """Files and labels as labels.csv lists them; labels that are words are numbered in sorted order."""
    path = folder / LABELS_FILE
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read {path}: {first_line(error)}") from error
    if not {"file", "label"} <= set(columns):
        raise InputError(f"{path} has columns {', '.join(columns) or 'none'}; accepted: file, label[, class]")
    for number, row in enumerate(rows, start=2):
        if not row["file"] or not row["label"]:
            raise InputError(f"{path}, line {number}: a file and a label are needed")
        if not os.path.isfile(folder / row["file"]):
            raise InputError(f"{path}, line {number}: there is no file {quoted(row['file'])}")
    labels, classes = numbered([row["label"].strip() for row in rows])
    if classes is None:
        named = {label: row["class"] for label, row in zip(labels, rows, strict=True) if row.get("class")}
        complete = bool(named) and sorted(named) == list(range(len(named)))
        classes = tuple(named[label] for label in sorted(named)) if complete else None
    return _files([folder / row["file"] for row in rows], folder, labels, classes)


def read_image(path: str | Path) -> Tensor:
    """Pixels of an image file, (1 or 3, H, W) float32 in [0, 1], upright; transparency is dropped.

    Raises `InputError` for a file that is not a whole image, or a huge one.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(Path(path).read_bytes())) as image:
                return pixels_in(ImageOps.exif_transpose(image))
    except InputError:
        raise
    except Exception as error:  # a stranger's bytes: the decoders may fail in any way
        raise InputError(f"{path} is not an image that can be read: {first_line(error)}") from error


def pixels_in(image: Image.Image) -> Tensor:
    if image.mode.startswith("I"):  # 16 bits a pixel
        deep = torch.from_numpy(np.asarray(image).astype(np.float32))[None]
        return (deep / 65535).clamp(0, 1)
    dull = image.mode in ("1", "L", "LA", "F")
    return pixels_of(image.convert("L" if dull else "RGB")).float() / 255


# ---------------------------------------------------------------------------------------- archives

_NPZ_KEYS = [
    ("images", "labels"),
    ("x", "y"),
    ("data", "labels"),
    *((f"{split}_images", f"{split}_labels") for split in ("test", "val", "train")),
    *((f"x_{split}", f"y_{split}") for split in ("test", "train")),
]


def _npz(path: Path) -> ImageSource:
    arrays = _npz_arrays(path)
    pair = next((pair for pair in _NPZ_KEYS if pair[0] in arrays), None)
    if pair is None:
        accepted = ", ".join(images for images, _ in _NPZ_KEYS)
        raise InputError(f"{path} holds {listing(arrays) or 'nothing'}; accepted keys: {accepted}")
    images = arrays[pair[0]]
    convert = _npz_converter(images, f"{path}: {pair[0]}")
    labels = _npz_labels(arrays.get(pair[1]), len(images), f"{path}: {pair[1]}")
    names = arrays.get("classes")
    return ImageSource(
        count=len(images),
        image=lambda row: convert(images[row]),
        name=lambda row: f"{pair[0]}[{row}]",
        label=None if labels is None else labels.__getitem__,
        class_names=tuple(str(name) for name in names) if names is not None and names.ndim == 1 else None,
    )


def _npz_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # a stranger's bytes: the parser may fail in any way
        raise InputError(f"{path} is not a whole .npz archive of arrays: {first_line(error)}") from error


def _npz_converter(images: Any, what: str) -> Callable[[np.ndarray], Tensor]:
    """(H, W), (H, W, C) or (C, H, W) arrays -> (C, H, W) pixels."""
    shape = tuple(getattr(images, "shape", ()))
    if len(shape) not in (3, 4) or images.dtype.kind not in "uf" or 0 in shape[1:]:
        kind = getattr(images, "dtype", "bytes")
        raise InputError(f"{what} is {kind} of shape {shape}; accepted: (N, H, W[, C]), uint8 or floats")
    if images.dtype.kind == "u" and images.dtype != np.uint8:
        raise InputError(f"{what} is {images.dtype}; accepted: uint8, or floats in [0, 1]")
    channels_last = len(shape) == 3 or shape[3] in (1, 3)
    if not channels_last and shape[1] not in (1, 3):
        raise InputError(f"{what} has shape {shape}; accepted: 1 or 3 channels")
    return partial(_from_array, what=what, channels_last=channels_last)


def _from_array(array: np.ndarray, what: str, channels_last: bool) -> Tensor:
    image = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    image = image[None] if image.dim() == 2 else image
    image = image.permute(2, 0, 1) if array.ndim == 3 and channels_last else image
    if array.dtype == np.uint8:
        return image / 255
    if not bool(((image >= 0) & (image <= 1)).all()):
        found = f"{float(image.min()):.3g} to {float(image.max()):.3g}"
        raise InputError(f"{what} holds floats from {found}; accepted: pixels in [0, 1]")
    return image


def _npz_labels(labels: Any, count: int, what: str) -> list[int] | None:
    if labels is None:
        return None
    shape = tuple(getattr(labels, "shape", ()))
    if shape not in ((count,), (count, 1)) or labels.dtype.kind not in "iub":
        raise InputError(
            f"{what} is {getattr(labels, 'dtype', 'bytes')} of shape {shape}; accepted: {count} integers"
        )
    return [int(label) for label in labels.reshape(-1)]


# ------------------------------------------------------------------------------------- truth files


class _TruthNames(BaseModel):
    model_config = ConfigDict(extra="forbid")

    names: tuple[str, ...]
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


def save_truth(path: str | Path, batch: PrivateBatch) -> None:
    """Write a batch to its own .safetensors file, never beside the update; `InputError` when it cannot be."""
    names = _TruthNames(names=batch.names, class_names=batch.class_names, notes=batch.notes)
    save_tensors(path, {"pixels": batch.pixels, "labels": batch.labels}, {TRUTH_KEY: names.model_dump_json()})


def load_truth(path: str | Path) -> PrivateBatch:
    """Read what `save_truth` wrote; `InputError` for anything else."""
    tensors, metadata = read_safetensors(path)
    if TRUTH_KEY not in metadata or tensors.keys() != {"pixels", "labels"}:
        raise InputError(f"{path} is not a truth file; accepted: what `leakaudit capture --truth` writes")
    pixels, labels = tensors["pixels"], tensors["labels"]
    try:
        names = _TruthNames.model_validate_json(metadata[TRUTH_KEY])
    except ValidationError as error:
        raise InputError(f"the names in {path} are not valid") from error
    count = len(names.names)
    if pixels.dim() != 4 or labels.shape != (count,) or len(pixels) != count:
        raise InputError(
            f"{path} holds {count} names for pixels {tuple(pixels.shape)}, labels {tuple(labels.shape)}"
        )
    if pixels.dtype != torch.float32 or labels.dtype != torch.int64:
        raise InputError(
            f"{path} holds {pixels.dtype} pixels and {labels.dtype} labels; accepted: float32, int64"
        )
    if not bool(((pixels >= 0) & (pixels <= 1)).all()) or bool((labels < 0).any()):
        raise InputError(f"{path} holds pixels outside [0, 1] or negative labels")
    return PrivateBatch(pixels, labels, names.names, names.class_names, names.notes)
