"""Whatever bytes a file holds, reading it succeeds or is an `InputError`: nothing else."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_victims import SHAPE, network, victim_of

from leakaudit.data import load_batch, load_truth
from leakaudit.errors import InputError
from leakaudit.formats.loading import load_update
from leakaudit.formats.manifest import Manifest, parse_manifest
from leakaudit.models.victim import Victim

FUZZ = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@functools.cache
def victim() -> Victim:
    return victim_of(network())


def tensors() -> dict[str, torch.Tensor]:
    return {name: torch.full_like(p, 0.5) for name, p in victim().params.items()}


@functools.cache
def valid(kind: str) -> bytes:
    buffer = io.BytesIO()
    manifest = Manifest(kind="gradient", parameter_order=tuple(victim().params))
    writers: dict[str, Callable[[], object]] = {
        "safetensors": lambda: buffer.write(
            safetensors.torch.save(tensors(), {"leakaudit": manifest.to_json()})
        ),
        "npz": lambda: np.savez(buffer, **{name: t.numpy() for name, t in tensors().items()}),
        "pt": lambda: torch.save({"gradients": tensors()}, buffer),
        "th": lambda: torch.save(list(tensors().values()), buffer, _use_new_zipfile_serialization=False),
    }
    writers[kind]()
    return buffer.getvalue()


KINDS = ["safetensors", "npz", "pt", "th"]


def read(folder: Path, kind: str, data: bytes) -> None:
    path = folder / f"fuzz.{kind}"
    path.write_bytes(data)
    with contextlib.suppress(InputError):
        shared = load_update(path, victim())
        assert shared.update.is_finite()
        assert set(shared.update) <= set(victim().params)


@pytest.mark.parametrize("kind", KINDS)
def test_the_seeds_of_the_fuzzer_are_valid(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"valid.{kind}"
    path.write_bytes(valid(kind))
    assert len(load_update(path, victim()).update) == len(victim().params)


@pytest.mark.parametrize("kind", KINDS)
@FUZZ
@given(data=st.binary(max_size=300))
def test_arbitrary_bytes(tmp_path: Path, kind: str, data: bytes) -> None:
    read(tmp_path, kind, data)


@pytest.mark.parametrize("kind", KINDS)
@FUZZ
@given(data=st.data())
def test_truncations(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    whole = valid(kind)
    read(tmp_path, kind, whole[: data.draw(st.integers(0, len(whole) - 1))])


@pytest.mark.parametrize("kind", KINDS)
@FUZZ
@given(data=st.data())
def test_changed_bytes(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    """Near the two ends, where the structure is, as often as in the numbers."""
    changed = bytearray(valid(kind))
    near = st.one_of(
        st.integers(0, min(600, len(changed) - 1)),
        st.integers(max(0, len(changed) - 900), len(changed) - 1),
        st.integers(0, len(changed) - 1),
    )
    for position in data.draw(st.lists(near, min_size=1, max_size=4)):
        changed[position] = data.draw(st.integers(0, 255))
    read(tmp_path, kind, bytes(changed))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
MANIFESTS = st.dictionaries(st.sampled_from(sorted(Manifest.model_fields)), JSON, max_size=4)


@FUZZ
@given(content=MANIFESTS | JSON)
def test_arbitrary_manifests(tmp_path: Path, content: object) -> None:
    import json

    text = json.dumps(content)
    with contextlib.suppress(InputError):
        parse_manifest(text, "shared.pt")
    data = safetensors.torch.save(tensors(), {"leakaudit": text})
    read(tmp_path, "safetensors", data)


@FUZZ
@given(text=st.binary(max_size=60) | st.text(max_size=60).map(lambda t: t.encode("utf-8", "surrogatepass")))
def test_manifests_that_are_not_json(text: bytes) -> None:
    with contextlib.suppress(InputError):
        parse_manifest(text, "shared.pt")


PLAUSIBLE = st.fixed_dictionaries(
    {},
    optional={
        "kind": st.sampled_from(["gradient", "delta"]),
        "sign": st.sampled_from(["before-minus-after", "after-minus-before"]),
        "learning_rate": st.floats(min_value=0, exclude_min=True, allow_infinity=False),
        "local_steps": st.integers(1, 3),
        "parameter_order": st.lists(st.text(max_size=3), max_size=3).map(tuple),
        "buffers": st.just(()),
    },
)


@FUZZ
@given(fields=PLAUSIBLE)
def test_every_plausible_manifest_is_read_or_refused(tmp_path: Path, fields: dict) -> None:
    read(
        tmp_path,
        "safetensors",
        safetensors.torch.save(tensors(), {"leakaudit": Manifest(**fields).to_json()}),
    )


@FUZZ
@given(data=st.data())
def test_names_and_shapes_at_random(tmp_path: Path, data: st.DataObject) -> None:
    names = st.sampled_from([*victim().params, *victim().buffers, "module.0.weight", "x", "0.weight.y"])
    shapes = st.sampled_from([(), (4,), (5,), (0,), (4, 2, 3, 3), (5, 144), (144, 5), (3, 3)])
    types = st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool, torch.uint8])
    chosen = data.draw(st.dictionaries(names, st.tuples(shapes, types), max_size=5))
    value = {name: torch.ones(shape, dtype=dtype) for name, (shape, dtype) in chosen.items()}
    buffer = io.BytesIO()
    torch.save(value if data.draw(st.booleans()) else list(value.values()), buffer)
    read(tmp_path, "pt", buffer.getvalue())


@FUZZ
@given(data=st.binary(max_size=200))
@pytest.mark.parametrize("suffix", ["png", "jpg", "npz"])
def test_images_of_arbitrary_bytes(tmp_path: Path, suffix: str, data: bytes) -> None:
    (tmp_path / f"a.{suffix}").write_bytes(data)
    with contextlib.suppress(InputError):
        load_batch(tmp_path / f"a.{suffix}", (3, *SHAPE[1:]), 1)


@FUZZ
@given(data=st.binary(max_size=200))
def test_truth_of_arbitrary_bytes(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "truth.safetensors").write_bytes(data)
    with contextlib.suppress(InputError):
        load_truth(tmp_path / "truth.safetensors")
