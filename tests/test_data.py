from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import ImageFolder

from leakaudit.data import PrivateBatch, control_photos, fit, load_batch, load_truth, read_image, save_truth
from leakaudit.errors import InputError
from leakaudit.formats.writing import save_tensors

RGB = (3, 8, 8)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def picture(path: Path, size: tuple[int, int] = (8, 8), mode: str = "RGB", seed: int = 0) -> np.ndarray:
    shape = (*size, 3) if mode == "RGB" else size
    array = noise(*shape, seed=seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array, mode).save(path)
    return array


@pytest.fixture
def shared_data() -> Path:
    folder = Path(__file__).parents[1].parent / "shared" / "data" / "images"
    if not folder.is_dir():
        pytest.skip("shared/data is not here")
    return folder


# ------------------------------------------------------------------------------ files and folders


def test_one_image_file_is_lossless(tmp_path: Path) -> None:
    array = picture(tmp_path / "a.png")
    batch = load_batch(tmp_path / "a.png", RGB, 1)
    assert batch.pixels.dtype == torch.float32
    assert batch.labels.dtype == torch.int64
    assert torch.equal(
        (batch.pixels[0] * 255).round().to(torch.uint8), torch.from_numpy(array).permute(2, 0, 1)
    )
    assert batch.names == ("a.png",)


def test_flat_folder_labels_are_positions_and_it_is_said(tmp_path: Path) -> None:
    for i in range(7):
        picture(tmp_path / f"{i}.png", seed=i)
    (tmp_path / "notes.txt").write_text("not an image")
    batch = load_batch(tmp_path, RGB, 4, start=2, classes=3)
    assert batch.names == ("2.png", "3.png", "4.png", "5.png")
    assert batch.labels.tolist() == [2, 0, 1, 2]
    assert batch.notes == (f"{tmp_path} has no labels; each image got its position modulo 3 as its label.",)
    assert batch.class_name(1) == "1"


def test_class_folders_agree_with_torchvision(tmp_path: Path) -> None:
    for i, name in enumerate(["zebra/1.png", "ant/b.png", "ant/a.png", "cow/3.png"]):
        picture(tmp_path / name, seed=i)
    batch = load_batch(tmp_path, RGB, 4)
    reference = ImageFolder(str(tmp_path))
    assert list(batch.names) == [Path(path).relative_to(tmp_path).as_posix() for path, _ in reference.samples]
    assert batch.labels.tolist() == reference.targets
    assert list(batch.class_names or ()) == reference.classes
    assert batch.label_name(3) == "zebra"
    assert batch.notes == ()


def test_labels_csv(tmp_path: Path) -> None:
    picture(tmp_path / "x/1.png")
    picture(tmp_path / "2.png", seed=1)
    (tmp_path / "labels.csv").write_text("file,label,class\nx/1.png,1,dog\n2.png,0,cat\n")
    batch = load_batch(tmp_path, RGB, 2)
    assert batch.labels.tolist() == [1, 0]
    assert batch.class_names == ("cat", "dog")
    (tmp_path / "labels.csv").write_text("file,label\nx/1.png,dog\n2.png,cat\n")
    assert load_batch(tmp_path, RGB, 2).label_name(0) == "dog"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,label\n1.png,0\n", "has columns name, label; accepted: file, label"),
        ("", "has columns none"),
        ("file,label\n1.png,0\nnone.png,1\n", "line 3: there is no file 'none.png'"),
        ("file,label\n1.png\n", "line 2: a file and a label are needed"),
        ("file,label\n" + "x" * 5000 + ",1\n", "there is no file"),
        ("file,label\n1.png,-1\n", "label -1; accepted: 0 to 9"),
        ("file,label\n1.png,10\n", "label 10; accepted: 0 to 9"),
        ("file,label\n1.png,99999999999999999999\n", "label 99999999999999999999; accepted"),
        ("file,label\n", "holds no images"),
    ],
)
def test_labels_csv_mistakes(tmp_path: Path, text: str, message: str) -> None:
    picture(tmp_path / "1.png")
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        load_batch(tmp_path, RGB, 1, classes=10)


@pytest.mark.parametrize("mode", ["L", "1", "RGBA", "P", "LA", "CMYK"])
def test_every_mode_of_a_grey_image_is_the_same_grey(tmp_path: Path, mode: str) -> None:
    grey = Image.fromarray(np.repeat(np.uint8([[0, 255, 255, 0]]), 4, axis=0), "L")
    grey.convert("RGB").convert(mode).save(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
    pixels = load_batch(tmp_path, (3, 4, 4), 1).pixels[0]
    assert torch.equal(pixels, torch.tensor([0.0, 1.0, 1.0, 0.0]).expand(3, 4, 4))


def test_sixteen_bits(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 32768, dtype=np.uint16)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").unique().tolist() == [pytest.approx(32768 / 65535)]


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", (4, 6))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter
    Image.open(tmp_path / "a.png").save(tmp_path / "b.png", exif=exif)
    assert read_image(tmp_path / "a.png").shape == (3, 4, 6)
    assert torch.equal(read_image(tmp_path / "b.png"), read_image(tmp_path / "a.png").rot90(-1, (1, 2)))


def test_colour_becomes_grey_by_luma(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "red.png")
    assert load_batch(tmp_path, (1, 8, 8), 1).pixels.mean().item() == pytest.approx(0.2989, abs=1e-4)


@pytest.mark.parametrize("size", [(16, 16), (20, 10), (3, 90), (90, 3), (1, 1), (7, 9), (1, 4000)])
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 12, 5), (3, 1, 1)])
def test_every_size_fits(size: tuple[int, int], shape: tuple[int, int, int]) -> None:
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    out = fit(image, shape)
    assert out.shape == shape
    assert 0 <= float(out.min()) <= float(out.max()) <= 1
    assert torch.allclose(fit(torch.full((3, *size), 0.25), (3, *shape[1:])), torch.tensor(0.25))


def test_the_crop_is_the_centre() -> None:
    image = torch.zeros(3, 4, 10)
    image[:, :, 3:7] = 1
    assert torch.equal(fit(image, (3, 4, 4)), torch.ones(3, 4, 4))


def test_downscaling_agrees_with_pillow(tmp_path: Path) -> None:
    array = picture(tmp_path / "a.png", (64, 64))
    ours = load_batch(tmp_path, (3, 16, 16), 1).pixels[0]
    pillow = (
        np.asarray(Image.fromarray(array).resize((16, 16), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    )
    assert float((ours - torch.from_numpy(pillow).permute(2, 0, 1)).abs().max()) < 1.5 / 255


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 6), start=st.integers(0, 6), classes=st.none() | st.integers(1, 8))
def test_counts_and_starts(
    tmp_path_factory: pytest.TempPathFactory, count: int, start: int, classes: int | None
) -> None:
    folder = tmp_path_factory.getbasetemp() / "six"
    if not folder.is_dir():
        for i in range(6):
            picture(folder / f"{i}.png", (2, 2), seed=i)
    if start + count > 6:
        with pytest.raises(InputError, match=f"holds 6 images, {count} from {start} on"):
            load_batch(folder, (3, 2, 2), count, start=start, classes=classes)
        return
    batch = load_batch(folder, (3, 2, 2), count, start=start, classes=classes)
    assert len(batch) == count
    assert torch.equal(batch.pixels, load_batch(folder, (3, 2, 2), None).pixels[start : start + count])


@pytest.mark.parametrize("name", ["broken.png", "text.jpg", "half.png"])
def test_files_that_are_not_images(tmp_path: Path, name: str) -> None:
    picture(tmp_path / "whole.png", (64, 64))
    whole = (tmp_path / "whole.png").read_bytes()
    content = {
        "broken.png": b"\x89PNG\r\n\x1a\n",
        "text.jpg": b"hello",
        "half.png": whole[: len(whole) // 2],
    }[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name} is not an image that can be read"):
        load_batch(tmp_path / name, RGB, 1)


def test_huge_images_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "a.png", (20, 20))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    with pytest.raises(InputError, match="not an image that can be read: Image size"):
        load_batch(tmp_path / "a.png", RGB, 1)


def test_sources_without_images(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no images"):
        load_batch(tmp_path, RGB, 1)
    (tmp_path / "class").mkdir()
    with pytest.raises(InputError, match="holds no images"):
        load_batch(tmp_path, RGB, None)
    with pytest.raises(InputError, match="there is no image, folder or data set"):
        load_batch(tmp_path / "none", RGB, 1)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match="is no image; accepted: a folder"):
        load_batch(tmp_path / "a.txt", RGB, 1)
    with pytest.raises(InputError, match="count=0"):
        load_batch(tmp_path, RGB, 0)
    with pytest.raises(InputError, match="1 or 3 channels"):
        load_batch(tmp_path, (2, 8, 8), 1)


# ---------------------------------------------------------------------------------------- archives


@pytest.mark.parametrize(
    ("images", "labels"),
    [("images", "labels"), ("x_test", "y_test"), ("val_images", "val_labels"), ("x", "y")],
)
def test_npz_keys(tmp_path: Path, images: str, labels: str) -> None:
    array = noise(5, 8, 8, 3)
    np.savez(tmp_path / "a.npz", **{images: array, labels: np.arange(5)[:, None]})
    batch = load_batch(tmp_path / "a.npz", RGB, 2, start=3)
    assert batch.labels.tolist() == [3, 4]
    assert batch.names == (f"{images}[3]", f"{images}[4]")
    assert torch.equal((batch.pixels * 255).round(), torch.from_numpy(array[3:]).permute(0, 3, 1, 2).float())


def test_npz_test_images_come_before_train_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", train_images=noise(1, 8, 8), test_images=noise(2, 8, 8))
    assert load_batch(tmp_path / "a.npz", RGB, None).names == ("test_images[0]", "test_images[1]")


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 8, 8, 1), (4, 1, 8, 8), (4, 3, 8, 8), (4, 8, 8, 3)])
def test_npz_layouts_of_the_same_grey(tmp_path: Path, shape: tuple[int, ...]) -> None:
    grey = noise(4, 8, 8).astype(np.float64) / 255
    axis = 1 if len(shape) == 4 and shape[1] in (1, 3) else -1
    array = grey if len(shape) == 3 else np.broadcast_to(np.expand_dims(grey, axis), shape)
    np.savez(tmp_path / "a.npz", images=array)
    pixels = load_batch(tmp_path / "a.npz", RGB, 4).pixels
    assert torch.allclose(pixels, torch.from_numpy(grey).float()[:, None].expand(-1, 3, -1, -1))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": noise(2, 8, 8)}, "holds pictures; accepted keys: images, x"),
        ({}, "holds nothing"),
        ({"images": noise(2, 8)}, "of shape \\(2, 8\\)"),
        ({"images": noise(2, 8, 8, 5)}, "1 or 3 channels"),
        ({"images": noise(2, 8, 8).astype(np.int64)}, "int64"),
        ({"images": noise(2, 8, 8).astype(np.uint16)}, "uint16"),
        (
            {"images": noise(2, 8, 8).astype(np.float32)},
            "holds floats from .* accepted: pixels in \\[0, 1\\]",
        ),
        ({"images": np.full((2, 8, 8), np.nan)}, "holds floats from nan"),
        ({"images": noise(2, 8, 8), "labels": np.arange(3)}, "accepted: 2 integers"),
        ({"images": noise(2, 8, 8), "labels": np.eye(2, dtype=int)}, "accepted: 2 integers"),
        ({"images": noise(2, 8, 8), "labels": np.float32([0, 1])}, "accepted: 2 integers"),
        ({"images": noise(2, 8, 8), "labels": np.array([0, 1], dtype=object)}, "not a whole .npz"),
        ({"images": noise(0, 8, 8)}, "holds no images"),
    ],
)
def test_npz_mistakes(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=message):
        load_batch(tmp_path / "a.npz", RGB, 2)


# ------------------------------------------------------------------------------------- torchvision


def test_torchvision_fake_data() -> None:
    batch = load_batch("torchvision:FakeData", (1, 6, 9), 3, start=1, classes=4)
    assert batch.pixels.shape == (3, 1, 6, 9)
    assert batch.names == ("FakeData[1]", "FakeData[2]", "FakeData[3]")
    assert torch.equal(
        batch.pixels, load_batch("torchvision:FakeData", (1, 6, 9), 3, start=1, classes=4).pixels
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("torchvision:CIFAR11", "unknown torchvision data set 'CIFAR11', did you mean 'CIFAR10'"),
        ("torchvision:CIFAR10,rot=x", "no option 'rot', did you mean 'root'"),
        ("torchvision:CIFAR10,root={tmp}", "cannot be opened: Dataset not found"),
        ("torchvision:VOCDetection,root={tmp}", "cannot be opened"),
        ("torchvision:", "unknown torchvision data set"),
    ],
)
def test_torchvision_mistakes_and_nothing_is_downloaded(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_batch(source.format(tmp=tmp_path), RGB, 1)
    assert not list(tmp_path.iterdir())


def test_torchvision_reads_a_real_layout(tmp_path: Path) -> None:
    """MNIST's own files, written by hand."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images, labels = noise(3, 28, 28), bytes([7, 2, 1])
    for name, header, content in [
        (
            "images-idx3",
            b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (3, 28, 28)),
            images.tobytes(),
        ),
        ("labels-idx1", b"\0\0\x08\x01" + (3).to_bytes(4, "big"), labels),
    ]:
        for part in ("t10k", "train"):
            (raw / f"{part}-{name}-ubyte").write_bytes(header + content)
    batch = load_batch(f"torchvision:MNIST,root={tmp_path}", (1, 28, 28), 3, classes=10)
    assert batch.labels.tolist() == [7, 2, 1]
    assert torch.equal((batch.pixels[:, 0] * 255).round(), torch.from_numpy(images).float())
    assert batch.class_names is not None
    assert batch.label_name(0) == "7 - seven"


# ------------------------------------------------------------------------------------- real data


def test_cifar10_files_equal_the_archive(shared_data: Path) -> None:
    files = load_batch(shared_data / "cifar10" / "png", (3, 32, 32), 20, classes=10)
    archive = load_batch(
        shared_data / "cifar10" / "cifar10_test_first2000.npz", (3, 32, 32), None, classes=10
    )
    with (shared_data / "cifar10" / "png" / "labels.csv").open() as file:
        rows = [int(Path(row["file"]).stem) for row in csv.DictReader(file)][:20]
    assert torch.equal(files.pixels, archive.pixels[rows])
    assert torch.equal(files.labels, archive.labels[rows])
    assert files.class_names == archive.class_names


def test_cifar100_medmnist_and_unlabelled_faces(shared_data: Path) -> None:
    cifar100 = load_batch(shared_data / "cifar100", (3, 32, 32), None, classes=100)
    assert [int(Path(name).stem.split("_")[-1]) for name in cifar100.names] == cifar100.labels.tolist()
    xray = load_batch(
        shared_data / "pneumoniamnist" / "pneumoniamnist_val_test.npz", (1, 28, 28), None, classes=2
    )
    assert len(xray) == 624
    assert int(xray.labels.sum()) == 390
    faces = load_batch(shared_data / "faces_lfw_subset" / "lfw_subset.npz", (3, 32, 32), 4, classes=2)
    assert faces.labels.tolist() == [0, 1, 0, 1]
    assert faces.notes


def test_control_photos() -> None:
    photos = control_photos((3, 32, 32))
    assert photos.pixels.shape == (4, 3, 32, 32)
    assert float(photos.pixels.std()) > 0.1
    assert photos.names == ("astronaut.png", "chelsea.png", "coffee.png", "rocket.png")


# ------------------------------------------------------------------------------------- truth files


def example_batch() -> PrivateBatch:
    pixels = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return PrivateBatch(pixels, torch.tensor([1, 0]), ("a", "ü"), ("cat", "dog"), ("A note.",))


def test_truth_round_trip(tmp_path: Path) -> None:
    batch = example_batch()
    save_truth(tmp_path / "truth.safetensors", batch)
    loaded = load_truth(tmp_path / "truth.safetensors")
    assert torch.equal(loaded.pixels, batch.pixels)
    assert torch.equal(loaded.labels, batch.labels)
    assert (loaded.names, loaded.class_names, loaded.notes) == (batch.names, batch.class_names, batch.notes)


def test_truth_mistakes(tmp_path: Path) -> None:
    path, batch = tmp_path / "truth.safetensors", example_batch()
    pixels, labels = batch.pixels, batch.labels
    good = {"leakaudit_truth": '{"names": ["a", "b"]}'}
    for tensors, metadata, message in [
        ({"pixels": pixels, "labels": labels}, {}, "is not a truth file"),
        ({"pixels": pixels}, good, "is not a truth file"),
        ({"pixels": pixels, "labels": labels}, {"leakaudit_truth": "{"}, "names in .* not valid"),
        ({"pixels": pixels, "labels": labels}, {"leakaudit_truth": '{"names": ["a"]}'}, "holds 1 names"),
        ({"pixels": pixels.double(), "labels": labels}, good, "float64 pixels"),
        ({"pixels": pixels * float("nan"), "labels": labels}, good, r"outside \[0, 1\]"),
        ({"pixels": pixels, "labels": labels - 1}, good, "negative labels"),
    ]:
        save_tensors(path, tensors, metadata)
        with pytest.raises(InputError, match=message):
            load_truth(path)
