from __future__ import annotations

from typing import Any

import pytest

from leakaudit.judgement import floor_control, judge
from leakaudit.policy import parse_policy
from leakaudit.results import Attempt, Control, ExampleScores, Finding, Score, Trial, Verdict, Verification

POLICY = parse_policy("psnr>20,ssim>0.5")
PASSED = Control(name="positive", passed=True, text="Positive control: it succeeded.")
FAILED = Control(name="positive", passed=False, text="Positive control: it failed too.")


def trial(
    psnr: float | None = 10.0, verified: str | None = None, stopped: str = "plateau", **fields: Any
) -> Trial:
    check = None
    if verified:
        check = Verification(status=verified, text=f"it is {verified}", residual=1e-8, floor=1e-7)  # type: ignore[arg-type]
    defaults: dict[str, Any] = {
        "attack": "dlg",
        "spec": "dlg",
        "status": "done",
        "best": 0,
        "residual": 0.2,
        "attempts": [Attempt(restart=0, loss=1, residual=0.2, iterations=5, seconds=1, stopped=stopped)],
        "examples": [ExampleScores(index=0, matched=0, scores={"psnr": psnr, "ssim": 0.1})],
        "verification": check,
    }
    return Trial(**{**defaults, **fields})


def verdict(*trials: Trial, truth: bool = True, best: int | None = 0, **options: Any) -> Verdict:
    controls = options.pop("controls", (PASSED,))
    return judge(trials, best, controls, options.pop("policy", POLICY), truth_known=truth, **options)


def test_a_broken_policy_is_a_leak() -> None:
    found = verdict(trial(31.0))
    assert (found.status, found.exit_code) == ("leaks", 1)
    assert found.reasons == ["dlg: 1 of 1 examples cross psnr>20 (worst psnr 31)"]
    assert found.policy == "psnr>20,ssim>0.5"


def test_any_trial_may_break_it_not_only_the_best() -> None:
    assert verdict(trial(12.0), trial(25.0)).status == "leaks"


def test_without_truth_a_match_is_a_leak_unless_other_inputs_share_the_update() -> None:
    found = verdict(trial(None, "verified"), truth=False)
    assert (found.status, found.reasons) == ("leaks", ["dlg: it is verified"])
    matched = trial(None, "consistent")
    assert matched.verification is not None
    found = verdict(matched, truth=False)
    assert (found.status, found.headline) == ("leaks", "An input that explains the shared update was found.")
    deficient = matched.verification.model_copy(update={"rank": 5, "unknowns": 9})
    for check in (deficient, deficient.model_copy(update={"status": "not-matched"})):
        found = verdict(matched.model_copy(update={"verification": check}), truth=False)
        assert (found.status, found.exit_code) == ("inconclusive", 3)
        assert found.reasons[-1] == "Without the originals a failed attack says nothing about safety."


@pytest.mark.parametrize("left_open", [0.1, 0.9])
def test_a_match_that_leaves_the_pixels_open_is_no_leak(left_open: float) -> None:
    matched = trial(None, "consistent")
    assert matched.verification is not None
    check = matched.verification.model_copy(update={"left_open": left_open})
    found = verdict(matched.model_copy(update={"verification": check}), truth=False)
    assert found.status == ("leaks" if left_open < 0.5 else "inconclusive")


def test_not_recovered_needs_the_truth_and_the_positive_control() -> None:
    found = verdict(trial(12.0))
    assert (found.status, found.exit_code) == ("not-recovered", 0)
    assert "safe" not in " ".join([found.headline, *found.reasons])
    for controls in ((FAILED,), (), (Control(name="positive", passed=None, text="It did not run."),)):
        found = verdict(trial(12.0), controls=controls)
        assert (found.status, found.exit_code) == ("inconclusive", 3)
    assert verdict(trial(12.0), truth=False).status == "inconclusive"


@pytest.mark.parametrize(
    ("what", "options", "reason"),
    [
        (trial(residual=0.99), {}, "The matching loss did not fall (relative residual 0.99)"),
        (trial(status="interrupted"), {}, "The audit was interrupted."),
        (trial(stopped="budget"), {}, "The time budget ended the best attack early."),
        (
            trial(),
            {"findings": [Finding(name="x", severity="warning", text="Something is wrong.")]},
            "Something is wrong.",
        ),
        (trial(None), {}, "The policy asks for psnr, which was not measured."),
        (
            trial(),
            {"policy": parse_policy("lpips<0.1")},
            "The policy asks for lpips, which was not measured.",
        ),
    ],
)
def test_doubts_make_it_inconclusive(what: Trial, options: dict[str, Any], reason: str) -> None:
    found = verdict(what, **options)
    assert found.status == "inconclusive"
    assert any(text.startswith(reason) for text in found.reasons), found.reasons


def test_time_that_ended_what_came_nearest_makes_it_inconclusive() -> None:
    """The smallest residual may be another attack's, which stood still and is further from the originals."""
    stuck, cut = trial(5.0, residual=0.14), trial(7.0, residual=0.16, stopped="budget")
    found = judge([stuck, cut], 0, [PASSED], POLICY, truth_known=True)
    assert found.status == "inconclusive"
    assert found.reasons[0] == "The time budget ended dlg early, which came nearest."
    further = trial(4.0, residual=0.16, stopped="budget")
    found = judge([stuck, further], 0, [PASSED], POLICY, truth_known=True)
    assert found.status == "not-recovered"
    assert found.reasons[-1] == "The time budget ended dlg early: more may recover more."
    found = judge([stuck], 0, [PASSED], POLICY, truth_known=True, not_begun=["tv-path"])
    assert found.status == "inconclusive"
    assert found.reasons[0] == "The time budget left none for tv-path."


def test_no_reconstruction_at_all() -> None:
    failed = trial(status="failed", best=None, examples=[], attempts=[])
    for truth in (True, False):
        found = verdict(failed, best=None, truth=truth, controls=())
        assert found.status == "inconclusive"
        assert found.reasons[0] == "No attack produced a reconstruction."


def test_never_says_what_happened_and_exits_with_zero() -> None:
    never = parse_policy("never")
    leak = verdict(trial(31.0), policy=never)
    assert (leak.status, leak.exit_code, leak.policy) == ("leaks", 0, "never")
    failed = verdict(trial(12.0), policy=never, controls=(FAILED,))
    assert failed.exit_code == 3, "an audit that failed is not within any policy"


def test_the_floor_is_what_unrelated_images_score() -> None:
    scores = [
        Score(metric="psnr", value=30, unit="dB", chance=9.5),
        Score(metric="lpips", value=None, reason="no weights"),
    ]
    control = floor_control(scores)
    assert control.text == "Unrelated images score: psnr 9.5 dB."
    assert [(score.metric, score.value) for score in control.scores] == [("psnr", 9.5)]


@pytest.mark.parametrize("scores", [{"psnr": 12.0}, {"psnr": None, "mse": 0.06}])
def test_proof_against_the_originals_is_no_failed_attack(scores: dict[str, float | None]) -> None:
    """Another truth file, or another normalisation: the attack did not fail, the comparison did."""
    policy = parse_policy("psnr>20" if scores["psnr"] else "mse<0.001")
    check = Verification(status="verified", text="", residual=1e-8, floor=1e-7, distance=1e-3)
    what = trial(verification=check, examples=[ExampleScores(index=0, matched=0, scores=scores)])
    found = verdict(what, policy=policy)
    assert found.status == "inconclusive"
    assert "provably lies within 1.0e-03" in found.reasons[0]
    loose = what.model_copy(update={"verification": check.model_copy(update={"distance": 0.2})})
    assert verdict(loose, policy=policy).status == "not-recovered"


def test_text_that_is_proven_is_a_leak_whatever_the_truth_file_holds() -> None:
    other = [ExampleScores(index=0, matched=0, scores={"rouge-l": 0.1})]
    options: dict[str, Any] = {"policy": parse_policy("rouge-l>0.5"), "medium": "text"}
    found = verdict(trial(verified="verified", examples=other), **options)
    assert (found.status, found.exit_code) == ("leaks", 1)
    assert "does not belong to this update" in found.reasons[-1]
    words = Finding(name="bag of tokens", severity="leak", text="these tokens", data={"proven": True})
    found = verdict(trial(examples=other), findings=[words], **options)
    assert (found.status, found.reasons) == ("leaks", ["these tokens"])
