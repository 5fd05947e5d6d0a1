"""What `auto` leaves out once the update is explained."""

from __future__ import annotations

from dataclasses import replace

import pytest

from leakaudit.attacks.registry import ATTACKS, EXACT, TEXT_ATTACKS, TEXT_AUTO
from leakaudit.execution import _needless
from leakaudit.outcomes import Chosen, Outcome
from leakaudit.results import Verification


def chosen(name: str, automatic: bool = True) -> Chosen:
    return Chosen(name, name, ATTACKS[name], automatic)


def outcome(name: str, status: str, rank: int | None = None) -> Outcome:
    check = Verification(status=status, text="", residual=0.0, floor=0.0, rank=rank)  # type: ignore[arg-type]
    return Outcome(chosen(name), (), "done", "", 1.0, check)


@pytest.mark.parametrize("name", TEXT_AUTO)
@pytest.mark.parametrize("status", ["verified", "consistent"])
def test_a_text_that_explains_the_update_ends_auto(name: str, status: str) -> None:
    reason = _needless(
        chosen(name), [outcome("bag-of-tokens", "not-matched"), outcome("linear", status)], None
    )
    assert reason is not None
    assert reason.startswith("linear already explains the update to its floor")
    assert reason.endswith("uniquely") == (status == "verified")


@pytest.mark.parametrize("name", TEXT_ATTACKS)
def test_no_text_is_chosen_among_those_that_share_an_update(name: str) -> None:
    """Even where the check knows of a rank, which only those of images compute."""
    assert name in EXACT
    assert _needless(chosen(name), [outcome("linear", "consistent", rank=3)], None) is not None


@pytest.mark.parametrize("name", TEXT_AUTO)
def test_what_is_not_matched_or_was_asked_for_goes_on(name: str) -> None:
    assert _needless(chosen(name), [outcome("bag-of-tokens", "not-matched")], None) is None
    unchecked = replace(outcome("bag-of-tokens", "verified"), verification=None)
    assert _needless(chosen(name), [unchecked], None) is None
    assert _needless(chosen(name, automatic=False), [outcome("bag-of-tokens", "verified")], None) is None


def test_a_prior_on_images_still_chooses_among_inputs_that_share_the_update() -> None:
    matched = [outcome("linear", "consistent", rank=3)]
    assert _needless(chosen("tuned-inverting-gradients"), matched, None) is None
    assert _needless(chosen("idlg"), matched, None) is not None
