"""What the HTML pages share: templates, their styles and scripts, and the policy that allows just these."""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


@cache
def environment() -> Environment:
    """Templates that escape everything and fail on names they do not know."""
    return Environment(
        loader=PackageLoader("leakaudit", "report/templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def asset(*names: str) -> str:
    """Styles or scripts beside the templates, one after the other."""
    folder = Path(__file__).parent / "templates"
    return "".join((folder / name).read_text(encoding="utf-8") for name in names)


def policy_hash(text: str) -> str:
    """What a content security policy calls an inline style or script by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def json_text(data: dict[str, Any], most: int, rest: str) -> str:
    """`data` to be read by people, cut after `most` characters, noting that `rest` has all of it."""
    if not data:
        return ""
    text = json.dumps(data, indent=1, ensure_ascii=False, default=str)
    return text if len(text) <= most else f"{text[:most]}\n… (the rest is in {rest})"
