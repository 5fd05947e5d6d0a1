"""How numbers, times and names are written in reports."""

from __future__ import annotations

import math

from leakaudit.results import Score

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_METRICS = {
    "mse": "MSE",
    "psnr": "PSNR",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "bag-f1": "Bag F1",
    "words-f1": "Words F1",
    "rouge-1": "ROUGE-1",
    "rouge-2": "ROUGE-2",
    "rouge-l": "ROUGE-L",
}
MISSING = "–"
NARROW_SPACE = "\N{NARROW NO-BREAK SPACE}"


def number(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits, powers of ten where that reads better: 23.5, 0.0012, 1.3×10⁻⁹, ∞, NaN."""
    if value is None:
        return MISSING
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    if 1 - 0.5 * 10.0**-digits <= value < 1:
        return _just_below_one(value)
    text = f"{value:.{digits - 1}e}"
    exponent = int(text.split("e")[1])
    if -4 < exponent < 6:
        plain = f"{float(text):,.{max(0, digits - 1 - exponent)}f}"
        return _trim(plain).replace("-", "−")
    mantissa = _trim(f"{float(text.split('e')[0]):.{min(digits - 1, 1)}f}").replace("-", "−")
    return f"{mantissa}×{power_of_ten(exponent)}"


def _just_below_one(value: float) -> str:
    """0.99998 must not read 1."""
    digits = -math.floor(math.log10(1 - value))
    return f"{value:.{digits}f}" if digits <= 6 else ">0.999999"


def _trim(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text


def power_of_ten(exponent: int) -> str:
    return "10" + str(exponent).translate(_SUPERSCRIPT)


def plain_number(value: float | None) -> str:
    """For terminals: 23.5, 0.99998, 1.3e-09, inf, nan."""
    if value is None:
        return MISSING
    return _just_below_one(value) if 0.9995 <= value < 1 else f"{value:.3g}"


def quantity(value: float | None, unit: str) -> str:
    return number(value) + (f"{NARROW_SPACE}{unit}" if unit and value is not None else "")


def duration(seconds: float) -> str:
    """0.4 s, 12 s, 4 min 05 s, 2 h 10 min."""
    if not math.isfinite(seconds) or seconds < 0:
        return MISSING
    if seconds < 0.1:
        return "under 0.1 s"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count: float) -> str:
    """Bytes in powers of 1000: 512 B, 1.2 MB, 3.4 TB."""
    scaled, unit = size_unit(count)
    return f"{number(count / scaled)}{NARROW_SPACE}{unit}"


def size_unit(count: float) -> tuple[float, str]:
    """The unit that `count` bytes are best told in: its bytes, and its name."""
    units = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    return next(((scaled, name) for scaled, name in units if count >= scaled), (1.0, "B"))


def time_unit(seconds: float) -> tuple[float, str]:
    """The unit that so many seconds are best told in: its seconds, and its name."""
    units = ((172800.0, 86400.0, "days"), (7200.0, 3600.0, "hours"), (120.0, 60.0, "minutes"))
    return next(((unit, name) for least, unit, name in units if seconds >= least), (1.0, "seconds"))


def percent(share: float) -> str:
    return f"{100 * share:.0f}{NARROW_SPACE}%" if math.isfinite(share) else number(share)


def metric_name(name: str) -> str:
    spaced = name.replace("_", " ").replace("-", " ")
    return _METRICS.get(name.lower(), spaced[:1].upper() + spaced[1:])


def chance(score: Score) -> str:
    """What unrelated input scores, and which way is better."""
    direction = "higher is closer" if score.higher_is_better else "lower is closer"
    if score.chance is None:
        return direction
    return f"chance {quantity(score.chance, score.unit)} · {direction}"


def plural(count: int, singular: str, many: str | None = None) -> str:
    return f"{count:,} {singular if count == 1 else many or singular + 's'}"
