"""Quantities as people write them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leakaudit.errors import InputError
from leakaudit.units import (
    SECONDS,
    bandwidth_text,
    parse_bandwidth,
    parse_numbers,
    parse_seconds,
    parse_shape,
    seconds_text,
)

NUMBERS = st.floats(0, 1e12, allow_nan=False).map(lambda number: f"{number:.6g}")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("480ms", 0.48), ("6s", 6.0), ("2min", 120.0), ("1.5 h", 5400.0), ("1d", 86400.0), ("0.3", 0.3),
     ("0", 0.0), ("1e-3", 0.001), (" 20 ms ", 0.02), (".5s", 0.5), ("250us", 0.00025)],
)  # fmt: skip
def test_durations(text: str, seconds: float) -> None:
    assert parse_seconds(text, "latency") == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "rate"),
    [("100Mbps", 12.5e6), ("1Gbps", 125e6), ("12.5MB/s", 12.5e6), ("56kbps", 7e3), ("8bps", 1.0), ("100mbps", 12.5e6),
     ("100 Mbit/s", 12.5e6), ("12.5MBps", 12.5e6), ("2e6", 2e6), ("inf", math.inf), ("3KB/s", 3e3)],
)  # fmt: skip
def test_bandwidths(text: str, rate: float) -> None:
    assert parse_bandwidth(text, "bandwidth") == pytest.approx(rate)


def test_a_byte_is_eight_bits() -> None:
    assert parse_bandwidth("1MB/s", "bandwidth") == 8 * parse_bandwidth("1Mb/s", "bandwidth")


@pytest.mark.parametrize(
    ("text", "says"),
    [("-5ms", "latency must be at least 0 seconds and finite, got -5ms"),
     ("inf", "latency must be at least 0 seconds and finite, got inf"),
     ("5 parsecs", "latency '5 parsecs' has no unit of time; accepted: us, ms, s, sec, min, h, d"),
     ("soon", "latency 'soon' is not a quantity; accepted: 480ms, 6s"),
     ("", "latency '' is not a quantity"), ("nan", "latency 'nan' is not a quantity"),
     ("1 2s", "latency '1 2s' is not a quantity")],
)  # fmt: skip
def test_no_durations(text: str, says: str) -> None:
    with pytest.raises(InputError, match=f"^{says}"):
        parse_seconds(text, "latency")


@pytest.mark.parametrize(
    ("text", "says"),
    [("0", "bandwidth must be positive, got 0"), ("-1Mbps", "bandwidth must be positive, got -1Mbps"),
     ("10Tbps", "bandwidth '10Tbps' has no unit of bandwidth; accepted: kbps, Mbps"),
     ("fast", "bandwidth 'fast' is not a quantity")],
)  # fmt: skip
def test_no_bandwidths(text: str, says: str) -> None:
    with pytest.raises(InputError, match=f"^{says}"):
        parse_bandwidth(text, "bandwidth")


@given(number=NUMBERS, unit=st.sampled_from(sorted(SECONDS)))
def test_a_duration_is_its_number_times_its_unit(number: str, unit: str) -> None:
    assert parse_seconds(number + unit, "x") == float(number) * SECONDS[unit]
    assert parse_seconds(number, "x") == float(number)


@given(seconds=st.floats(1e-6, 1e9))
def test_a_written_duration_reads_back(seconds: float) -> None:
    assert parse_seconds(seconds_text(seconds), "x") == pytest.approx(seconds, rel=1e-4)


@given(rate=st.floats(1e-3, 1e15))
def test_a_written_bandwidth_reads_back(rate: float) -> None:
    assert parse_bandwidth(bandwidth_text(rate), "x") == pytest.approx(rate, rel=1e-4)


@given(text=st.text(max_size=12))
def test_any_text_is_a_duration_or_refused_in_one_line(text: str) -> None:
    try:
        seconds = parse_seconds(text, "x")
    except InputError as error:
        said = str(error)
        assert "\n" not in said
        return
    assert 0 <= seconds < math.inf


def test_defaults_read_well() -> None:
    assert [seconds_text(s) for s in (0.05, 0.3, 6.0, 120.0, 0.0, 7200.0)] == \
        ["50ms", "300ms", "6s", "2min", "0s", "2h"]  # fmt: skip
    assert [bandwidth_text(b) for b in (12.5e6, 125e6, 7e3, math.inf)] == [
        "100Mbps",
        "1Gbps",
        "56kbps",
        "inf",
    ]


def test_shapes_and_numbers() -> None:
    assert parse_shape("3,32,32") == (3, 32, 32)
    assert parse_numbers("1, 2", "steps") == [1, 2]
    for text in ("3,32", "3,0,32", "a,b,c"):
        with pytest.raises(InputError, match="input shape"):
            parse_shape(text)
