from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leakaudit.errors import InputError
from leakaudit.spec import format_spec, parse, suggest


@dataclass(frozen=True)
class Options:
    count: int = 3
    rate: float = 0.5
    fast: bool = False
    kind: Literal["one", "two"] = "one"
    limit: int | None = None
    shares: tuple[float, ...] | None = None
    secret: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"count must not be negative, got {self.count}")


REGISTRY = {"plain": Options(), "quick": Options(fast=True)}


def test_values_are_typed() -> None:
    found = parse("plain:count=7, rate=1e-3,fast=TRUE,kind=two,limit=4", REGISTRY)
    assert found == Options(7, 1e-3, True, "two", 4)
    assert parse("plain:limit=none", {"plain": Options(limit=2)}).limit is None
    assert parse(" quick ", REGISTRY) is not None
    assert parse("quick:count=1", REGISTRY).fast


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("plian", "unknown attack 'plian', did you mean 'plain'.; known: plain, quick"),
        ("plain:cuont=1", "has no option 'cuont', did you mean 'count'"),
        ("plain:count", "'count' is not key=value"),
        ("plain:count=many", "count='many' is not of type int"),
        ("plain:fast=yes", "fast='yes' is not true or false"),
        ("plain:shares=1+x", "shares='x' is not of type float"),
        ("plain:kind=three", "kind='three'.*accepted: one, two"),
        ("plain:count=-1", "count must not be negative"),
        ("plain:secret=2", "has no option 'secret'"),
        ("", "unknown attack ''"),
    ],
)
def test_mistakes_say_what_is_accepted(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(text, REGISTRY, "attack")


@given(
    st.builds(
        Options,
        count=st.integers(0, 9999),
        rate=st.floats(allow_nan=False),
        fast=st.booleans(),
        kind=st.sampled_from(["one", "two"]),
        limit=st.none() | st.integers(),
        shares=st.none() | st.lists(st.floats(allow_nan=False), min_size=1, max_size=4).map(tuple),
    )
)
def test_format_is_the_inverse_of_parse(value: Options) -> None:
    text = format_spec("plain", value, REGISTRY["plain"])
    assert parse(text, REGISTRY) == value
    assert text != "plain" or value == REGISTRY["plain"]


def test_suggestions() -> None:
    assert suggest("trian", ["train", "eval"]) == ", did you mean 'train'?"
    assert suggest("xyz", ["train", "eval"]) == ""
