"""From `capture --defense` to an adversary who reads it in the file, and adapts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_audits import victim_of, view_of

from leakaudit import api
from leakaudit.attacks.base import Monitor
from leakaudit.attacks.registry import ATTACKS
from leakaudit.attempts import AttemptStore
from leakaudit.defenses.naming import adapted, parse_defense
from leakaudit.errors import InputError
from leakaudit.formats.manifest import build_manifest
from leakaudit.formats.reading import read_file
from leakaudit.randomness import fork
from leakaudit.rounds import client_update
from leakaudit.subject import Opened, Sources, open_update
from leakaudit.threat import View

PHOTOS = Path(__file__).parents[1] / "examples" / "photos"
Opener = Callable[..., Opened]


@pytest.fixture
def opened(tmp_path: Path) -> Opener:
    """`opened("clip+top-k")`: capture behind these defenses, then open; other facts win over the file's."""

    def make(*defenses: str, **facts: object) -> Opened:
        model = tmp_path / "model.safetensors"
        api.capture_update(
            "lenet:init=uniform", PHOTOS, tmp_path / "u.safetensors", save_model=model, defenses=defenses
        )
        stated = build_manifest(facts) if facts else None
        return open_update(
            Sources(tmp_path / "u.safetensors", checkpoint=model, manifest=stated, device="cpu")
        )

    return make


def names(opened: Opened) -> list[str]:
    return [finding.name for finding in opened.findings]


def test_the_adversary_reads_the_defenses_and_adapts(opened: Opener) -> None:
    found = opened("top-k:keep=0.2+gaussian-noise:std=1e-3", "clip:max_grad_norm=100")
    facts = found.view.knowledge
    assert facts.defense.value == ("top-k:keep=0.2", "gaussian-noise:std=0.001", "clip:max_grad_norm=100.0")
    assert facts.noise_std.value == pytest.approx(1e-3)
    assert "defense" not in names(found)
    pruned = opened("top-k:keep=0.2").view
    assert pruned.client is not client_update
    assert opened("quantise").view.slack is not None
    clipped = opened("clip:max_grad_norm=0.1")
    assert clipped.view.scale_free
    assert clipped.view.knowledge.labels.value is not None


def test_relative_noise_is_not_stated_but_estimated(opened: Opener, tmp_path: Path) -> None:
    view = opened("laplace-noise:relative=0.1").view
    assert read_file(tmp_path / "u.safetensors").manifest.noise_std is None
    rms = float(view.observed.flat().square().mean().sqrt())
    assert view.knowledge.noise_std.value == pytest.approx(0.1 * rms, rel=0.01)
    assert view.knowledge.noise_std.status == "inferred"


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ("tarnkappe:level=9", "unknown defense 'tarnkappe'"),
        ("clip:max_grad_norm=-1", "max_grad_norm must be positive"),
    ],
)
def test_a_defense_we_do_not_know_is_a_note(opened: Opener, stated: str, message: str) -> None:
    found = opened("clip:max_grad_norm=0.1", defenses=(stated, "clip:max_grad_norm=0.1"))
    (note,) = [finding for finding in found.findings if finding.name == "defense"]
    assert note.severity == "info"
    assert message in note.text
    assert found.view.scale_free, "the other one is still allowed for"
    assert found.view.knowledge.defense.value == (stated, "clip:max_grad_norm=0.1")


def test_a_file_that_says_nothing_of_defenses(opened: Opener) -> None:
    view = opened(defenses=()).view
    assert view.client is client_update
    assert view.knowledge.defense.value == ()


def test_rounds_of_compression_take_as_many_examples(tmp_path: Path) -> None:
    out, truth = tmp_path / "u.safetensors", tmp_path / "t.safetensors"
    api.capture_update(
        "lenet",
        PHOTOS,
        out,
        truth=truth,
        batch_size=2,
        defenses=["dgc:rounds=2"],
        save_model=tmp_path / "m.safetensors",
    )
    manifest = read_file(out).manifest
    assert (manifest.num_examples, manifest.local_batch_size) == (4, None)
    assert manifest.defenses == ("dgc:keep=0.01,rounds=2",)
    with pytest.raises(InputError, match=r"defense 'dgc:keep=0.01,rounds=2': .* local_batch_size=2"):
        api.capture_update(
            "lenet",
            PHOTOS,
            tmp_path / "v.safetensors",
            batch_size=2,
            num_examples=4,
            epochs=1,
            learning_rate=0.1,
            defenses=["dgc:rounds=2"],
        )


def variants(view: View) -> dict[str, View]:
    chain = {spec: parse_defense(spec) for spec in ("top-k:keep=0.2", "quantise", "gaussian-noise")}
    unnamed = {
        spec: dataclasses.replace(adapted(view, parts), knowledge=view.knowledge)
        for spec, parts in chain.items()
    }
    return {"itself": view, **unnamed, "decode": dataclasses.replace(view, decode=lambda x, y: (x, y))}


def test_an_adaptive_attempt_is_not_an_oblivious_one(tmp_path: Path) -> None:
    """Even where nobody wrote the defense into what is known."""
    view = view_of(victim_of("smooth"))
    ((_, pruning),) = parse_defense("top-k:keep=0.2")
    client = pruning.wrap(client_update, fork(0, "d"))
    x = view.victim.sample(1, fork(0, "x"))
    observed = client(view.victim, view.victim.params, view.round, x, view.victim.probe_labels(1))
    stores = [
        AttemptStore(tmp_path, variant, "dlg", 0)
        for variant in variants(dataclasses.replace(view, observed=observed)).values()
    ]
    found = ATTACKS["idlg"].__class__(iterations=1, restarts=1).run(view, fork(0, "a"), Monitor())  # type: ignore[call-arg]
    stores[0].put(0, found, 1.0)
    assert [store.get(0) is not None for store in stores] == [True, False, False, False, False]
