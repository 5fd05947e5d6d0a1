from __future__ import annotations

import pytest

from leakaudit.errors import InputError
from leakaudit.formats.manifest import Manifest, build_manifest, parse_manifest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "should be an object"),
        ('{"learning_rate": -1}', "learning_rate=-1: input should be greater than 0"),
        ('{"kind": "logits"}', "kind='logits': input should be 'gradient', 'delta' or 'weights'"),
        ('{"mode": "x", "kind": "y"}', "and 1 more"),
        ('{"normalisation": {"mean": [0.5], "std": [0]}}', r"normalisation.std.0=0"),
        ('{"normalisation": {"mean": [0.5, 0.5], "std": [1]}}', "mean has 2 channels and std 1"),
        ('{"normalisation": {"mean": [0.5, 0.5], "std": [1, 1]}, "input_shape": [3, 8, 8]}', "2 channels"),
        ('{"num_examples": 2, "local_batch_size": 3}', "local_batch_size 3 exceeds num_examples 2"),
        ('{"local_steps": 0}', "local_steps=0"),
        ('{"num_examples": 1e30}', "num_examples"),
        ('{"learning_rate": NaN}', "learning_rate"),
        ('{"format_version": 2}', "format_version=2"),
    ],
)
def test_invalid_manifests_name_field_value_and_what_is_accepted(text: str, message: str) -> None:
    with pytest.raises(InputError, match=f"the manifest of shared.pt is not valid: .*{message}"):
        parse_manifest(text, "shared.pt")


def test_round_trip_keeps_only_what_is_said() -> None:
    manifest = build_manifest({"kind": "delta", "learning_rate": 0.1, "mode": None})
    assert manifest.to_json() == '{"format_version":1,"kind":"delta","learning_rate":0.1}'
    assert parse_manifest(manifest.to_json(), "x") == manifest


def test_overrides_win_and_leave_the_rest() -> None:
    merged = Manifest(kind="delta", learning_rate=0.1).merged(Manifest(learning_rate=0.5, mode=None))
    assert merged == Manifest(kind="delta", learning_rate=0.5)


def test_overrides_that_contradict_the_file_are_refused() -> None:
    with pytest.raises(InputError, match="local_batch_size 8 exceeds num_examples 4"):
        Manifest(num_examples=4).merged(Manifest(local_batch_size=8))


def test_unknown_fields_of_later_versions_are_ignored() -> None:
    assert parse_manifest('{"colour": "blue", "kind": "gradient"}', "x") == Manifest(kind="gradient")
