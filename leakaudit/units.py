"""Quantities as people write them: `480ms`, `2min`, `100Mbps`, `12.5MB/s`, `3,32,32`.  Imports nothing heavy."""

from __future__ import annotations

import math
import re

from leakaudit.errors import InputError

SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "sec": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
"""Unit of time -> seconds."""

_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}
_RATES = {"bps": 0.125, "bit/s": 0.125, "b/s": 0.125, "Bps": 1.0, "B/s": 1.0}
"""Unit of bandwidth without its prefix -> bytes a second; a small b is a bit, a large B a byte."""

_QUANTITY = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?inf)\s*([A-Za-z/]*)\s*")
_RATE = re.compile(r"([kKmMgG]?)(bps|bit/s|b/s|Bps|B/s)")


def parse_seconds(text: str, what: str) -> float:
    """Seconds, >= 0 and finite, of `480ms`, `6s`, `2min`, `1.5h`, `1d`, or a plain number of seconds.

    Args:
        what: the quantity, as the message of the `InputError` names it.
    """
    number, unit = _split(text, what, "480ms, 6s, 2min, 1h or a number of seconds")
    if unit and unit not in SECONDS:
        raise InputError(f"{what} {text!r} has no unit of time; accepted: {', '.join(SECONDS)}")
    seconds = number * SECONDS.get(unit, 1.0)
    if not 0 <= seconds < math.inf:
        raise InputError(f"{what} must be at least 0 seconds and finite, got {text}")
    return seconds


def parse_bandwidth(text: str, what: str) -> float:
    """Bytes a second, > 0, of `100Mbps`, `1Gbps` (bits), `12.5MB/s`, a plain number of bytes a second, or `inf`.

    k, M and G are powers of 1000, in either case; a small b is a bit and a large B a byte.

    Args:
        what: the quantity, as the message of the `InputError` names it.
    """
    number, unit = _split(text, what, "100Mbps, 1Gbps, 12.5MB/s, inf or a number of bytes a second")
    rate = _RATE.fullmatch(unit)
    if unit and rate is None:
        raise InputError(
            f"{what} {text!r} has no unit of bandwidth; accepted: kbps, Mbps, Gbps, kB/s, MB/s, GB/s"
        )
    factor = 1.0 if rate is None else _PREFIXES[rate[1].lower()] * _RATES[rate[2]]
    if not number * factor > 0:
        raise InputError(f"{what} must be positive, got {text}")
    return number * factor


def seconds_text(seconds: float) -> str:
    """The shortest text that `parse_seconds` reads back as very nearly the same: `50ms`, `6s`, `2min`."""
    unit = next((u for u in ("d", "h", "min", "s", "ms") if _even(seconds / SECONDS[u])), "s")
    return f"{seconds / SECONDS[unit]:g}{unit}" if seconds else "0s"


def bandwidth_text(rate: float) -> str:
    """In bits, as networks are sold: `100Mbps`; `inf` for a link without limit."""
    if math.isinf(rate):
        return "inf"
    prefix = next((p for p in ("g", "m", "k") if 8 * rate >= _PREFIXES[p]), "")
    return f"{8 * rate / _PREFIXES[prefix]:g}{prefix.upper() if prefix != 'k' else 'k'}bps"


def parse_numbers(text: str, what: str) -> list[int]:
    """Whole numbers with commas between."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{what} {text!r} is not whole numbers with commas between") from None


def parse_shape(text: str) -> tuple[int, int, int]:
    """(C, H, W), all positive."""
    numbers = parse_numbers(text, "input shape")
    if len(numbers) != 3 or min(numbers) < 1:
        raise InputError(f"input shape {text!r} is not C,H,W with positive numbers, such as 3,32,32")
    return numbers[0], numbers[1], numbers[2]


def _split(text: str, what: str, accepted: str) -> tuple[float, str]:
    found = _QUANTITY.fullmatch(text)
    if found is None:
        raise InputError(f"{what} {text!r} is not a quantity; accepted: {accepted}")
    return float(found[1]), found[2]


def _even(value: float) -> bool:
    """Whether so many of a unit read well: at least one, and in a few digits."""
    return value >= 1 and math.isclose(float(f"{value:.4g}"), value)
