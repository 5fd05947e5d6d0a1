"""Which files count as masked by secure aggregation, and how uniform their numbers are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from leakaudit.errors import InputError
from leakaudit.formats.manifest import Carried, Manifest
from leakaudit.formats.masked import masked, refuse_masked
from leakaudit.formats.reading import RawFile, read_file
from leakaudit.formats.writing import write_update
from leakaudit.messages import message_findings

STATED = Manifest(message=Carried(software="a framework", modulus=1 << 32))


def uniform(bits: int, count: int = 4000, seed: int = 0) -> Tensor:
    return torch.randint(0, 1 << bits, (count,), generator=torch.Generator().manual_seed(seed))


def file(folder: Path, tensors: dict[str, Tensor], manifest: Manifest | None = None) -> RawFile:
    write_update(folder / "shared.safetensors", tensors, manifest or Manifest())
    return read_file(folder / "shared.safetensors")


def test_a_stated_mask(tmp_path: Path) -> None:
    raw = file(tmp_path, {"a": uniform(32), "b": uniform(32, seed=1).reshape(40, 100)}, STATED)
    found = masked(raw)
    assert found is not None
    assert (found.modulus, found.stated, found.numbers, found.uniform) == (1 << 32, True, 8000, True)
    with pytest.raises(InputError, match="nothing to reconstruct from this message alone"):
        refuse_masked(raw)


@pytest.mark.parametrize("bits", [16, 20, 32, 62])
def test_a_mask_that_nobody_stated(tmp_path: Path, bits: int) -> None:
    found = masked(file(tmp_path, {"a": uniform(bits)}))
    assert found is not None
    assert (found.modulus, found.stated) == (1 << bits, False)


@pytest.mark.parametrize(
    "tensor",
    [
        uniform(32, 100),  # too few to tell
        uniform(8),  # quantised to 8 bits
        uniform(32) - (1 << 31),  # signed
        (torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 1e6 + 1e7).long(),  # not uniform
        torch.rand(4000, generator=torch.Generator().manual_seed(0)),
    ],
)
def test_what_is_not_masked(tmp_path: Path, tensor: Tensor) -> None:
    assert masked(file(tmp_path, {"a": tensor})) is None


def test_floats_beside_integers_are_no_mask(tmp_path: Path) -> None:
    assert masked(file(tmp_path, {"a": uniform(32), "b": torch.rand(3)})) is None


def test_a_mask_worn_thin_is_a_warning(tmp_path: Path) -> None:
    quantised = (torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 1e5 + (1 << 21)).long()
    raw = file(tmp_path, {"a": quantised}, STATED)
    found = masked(raw)
    assert found is not None
    assert not found.uniform
    findings = {finding.name: finding for finding in message_findings(raw.manifest, found)}
    assert findings["masked"].severity == "warning"
    assert "nothing to reconstruct" not in findings["masked"].text


def test_the_sum_of_an_input_and_a_mask_is_uniform_whatever_the_input(tmp_path: Path) -> None:
    shifted = (torch.arange(4000) * 1000 + uniform(32)) % (1 << 32)
    found = masked(file(tmp_path, {"a": shifted}, STATED))
    assert found is not None
    assert found.uniform
