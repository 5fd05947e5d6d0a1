"""What is publicly known of other software: told where it applies, checked by behaviour before version."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from leakaudit.formats.manifest import Carried, Manifest
from leakaudit.formats.masked import Masked
from leakaudit.integrations import advisories
from leakaudit.integrations.advisories import ADVISORIES, flower_masks_hold_32_bits, notices
from leakaudit.messages import message_findings

MASKED = Masked(modulus=1 << 32, stated=True, numbers=1000, p_value=0.5)


def folding(seed: bytes, limit: int, shapes: list[tuple[int, ...]]) -> list[Any]:
    """The published behaviour: eight words folded into one."""
    word = int(np.bitwise_xor.reduce(np.frombuffer(seed, dtype="<u4")))
    return [np.random.RandomState(word).randint(0, limit - 1, shape, dtype=np.int64) for shape in shapes]


def whole(seed: bytes, limit: int, shapes: list[tuple[int, ...]]) -> list[Any]:
    """One that uses every bit of the seed."""
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(seed[:16], "little")))
    return [generator.integers(0, limit, shape) for shape in shapes]


def install(monkeypatch: pytest.MonkeyPatch, version: str | None, expand: Any = None) -> None:
    def imported(name: str) -> Any:
        if expand is None:
            raise ImportError(name)
        return SimpleNamespace(pseudo_rand_gen=expand)

    monkeypatch.setattr(advisories, "importlib", SimpleNamespace(import_module=imported))
    monkeypatch.setattr(advisories, "installed_version", lambda package: version)


@pytest.mark.parametrize(("expand", "shows"), [(folding, True), (whole, False), (None, None)])
def test_the_check_asks_the_function(
    monkeypatch: pytest.MonkeyPatch, expand: Any, shows: bool | None
) -> None:
    install(monkeypatch, "9.9.9", expand)
    assert flower_masks_hold_32_bits() is shows


def test_a_fixed_version_is_not_accused(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "1.50.0", whole)
    assert notices("flwr 1.50.0", "secagg+") == []
    install(monkeypatch, "1.41.0", whole)  # patched without a new number: behaviour goes first
    assert notices("flwr 1.41.0", "secagg+") == []


@pytest.mark.parametrize(
    ("recorded", "here", "confirmed", "how"),
    [
        ("1.60.0", "1.60.0", True, "installed here"),
        ("1.41.0", None, True, "published source"),
        ("1.35.0", "1.60.0", False, "was not checked"),
        ("", None, False, "was not checked"),
    ],
)
def test_how_sure_it_is(
    monkeypatch: pytest.MonkeyPatch, recorded: str, here: str | None, confirmed: bool, how: str
) -> None:
    install(monkeypatch, here, folding if here else None)
    (notice,) = notices(f"flwr {recorded}".strip(), "secagg+")
    assert notice.confirmed is confirmed
    assert how in notice.text
    assert "https://github.com/flwrlabs/flower/issues/7522" in notice.text


def test_only_what_it_concerns() -> None:
    assert notices("nvflare 2.9.0", "secagg+") == []
    assert notices("flwr 1.41.0", "something else") == []
    assert notices(None, "secagg+") == []
    assert all(reference.startswith("https://") for entry in ADVISORIES for reference in entry.references)


def test_the_installed_flower_is_asked() -> None:
    flwr = pytest.importorskip("flwr")
    shows = flower_masks_hold_32_bits()
    assert shows is not None
    found = [f for f in message_findings(of(f"flwr {flwr.__version__}"), MASKED) if f.name == "advisory"]
    assert len(found) == int(shows)
    assert flwr.__version__ != "1.41.0" or shows


def of(software: str) -> Manifest:
    return Manifest(num_examples=4, message=Carried(software=software, sender="7", round=1, modulus=1 << 32))


def test_an_advisory_goes_with_masks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "1.41.0", folding)
    assert "advisory" in {finding.name for finding in message_findings(of("flwr 1.41.0"), MASKED)}
    assert "advisory" not in {finding.name for finding in message_findings(of("flwr 1.41.0"))}
