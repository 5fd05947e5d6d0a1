from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leakaudit.errors import InputError
from leakaudit.metrics import METRICS
from leakaudit.policy import (
    DEFAULT_POLICIES,
    DEFAULT_POLICY,
    MEDIUM_METRICS,
    POLICY_METRICS,
    Medium,
    Policy,
    Threshold,
    check_medium,
    parse_policy,
)
from leakaudit.text_metrics import TEXT_METRICS

MEDIA: tuple[Medium, ...] = ("images", "text")


def test_every_policy_metric_is_a_metric_that_is_measured() -> None:
    assert set(MEDIUM_METRICS["images"]) <= set(METRICS)
    assert set(MEDIUM_METRICS["text"]) <= set(TEXT_METRICS)
    assert set(POLICY_METRICS) == {name for names in MEDIUM_METRICS.values() for name in names}


@given(
    st.lists(
        st.builds(
            Threshold,
            metric=st.sampled_from(POLICY_METRICS),
            operator=st.sampled_from(["<", ">"]),
            value=st.integers(-100, 100).map(lambda i: i / 8),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_text_and_policy_go_both_ways(thresholds: list[Threshold]) -> None:
    policy = Policy(tuple(thresholds))
    assert parse_policy(str(policy)) == policy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("psrn>20", "unknown metric 'psrn', did you mean 'psnr'"),
        ("psnr=20", "not METRIC>NUMBER"),
        ("psnr>", "not METRIC>NUMBER"),
        ("psnr>1e", "'1e' is not a number"),
        ("psnr>20,", "policy '' is not"),
        ("", "policy '' is not"),
        ("label-accuracy>0.5", "unknown metric"),
        ("rouge1>0.5", "unknown metric 'rouge1', did you mean 'rouge-1'"),
        ("2rouge>0.5", "not METRIC>NUMBER"),
    ],
)
def test_mistakes(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_policy(text)


def test_one_example_over_one_threshold_breaks_it() -> None:
    policy = parse_policy("psnr > 20, lpips<0.3")
    rows = [{"psnr": 12.0, "lpips": 0.9}, {"psnr": 31.0, "lpips": None}, {"psnr": 25.0}]
    assert policy.broken_by(rows) == ["2 of 3 examples cross psnr>20 (worst psnr 31)"]
    assert policy.broken_by([{"psnr": 20.0, "lpips": 0.3}]) == []
    assert policy.broken_by([{"psnr": math.inf}]) == ["1 of 1 examples cross psnr>20 (worst psnr inf)"]
    assert policy.broken_by([{"psnr": math.nan, "lpips": 0.1}])[0].startswith(
        "1 of 1 examples cross lpips<0.3"
    )


def test_what_was_not_measured_is_known() -> None:
    policy = parse_policy("lpips<0.3,psnr>20,lpips<0.1")
    assert policy.metrics == ("lpips", "psnr")
    assert policy.unmeasured([{"psnr": 3.0, "lpips": None}, {"psnr": None}]) == ["lpips"]
    assert policy.unmeasured([]) == ["lpips", "psnr"]


def test_never_still_measures() -> None:
    never = parse_policy("never")
    assert str(never) == "never"
    assert never.thresholds == parse_policy(DEFAULT_POLICY).thresholds
    assert never.broken_by([{"psnr": 40.0}])


@pytest.mark.parametrize("medium", MEDIA)
@pytest.mark.parametrize("text", ["default", "never"])
def test_the_default_policies_fit_their_medium(medium: Medium, text: str) -> None:
    policy = parse_policy(DEFAULT_POLICIES[medium] if text == "default" else text, medium)
    check_medium(policy, medium)
    assert policy.enforced == (text == "default")
    assert str(policy) == (DEFAULT_POLICIES[medium] if text == "default" else "never")


@pytest.mark.parametrize(
    ("text", "medium", "message"),
    [
        ("psnr>20", "text", "policy 'psnr>20': psnr does not measure text; known for text: token-accuracy,"),
        (
            "rouge-2>0.5",
            "images",
            "policy 'rouge-2>0.5': rouge-2 does not measure images; known for images: psnr",
        ),
        ("exact-match>1", "text", "policy 'exact-match>1' cannot be broken: scores of text lie in 0 to 1"),
        ("bag-f1>0.5,rouge-l<0", "text", "policy 'rouge-l<0' cannot be broken"),
        ("bag-f1>0.5,ssim>0.5", "text", "policy 'ssim>0.5': ssim does not measure text"),
    ],
)
def test_a_policy_for_the_other_medium_is_refused_in_one_line(
    text: str, medium: Medium, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        check_medium(parse_policy(text), medium)
    assert "\n" not in str(caught.value)
