from __future__ import annotations

import dataclasses
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leakaudit.defenses import DEFENSES, Clip, GaussianNoise, Quantise, TopK
from leakaudit.defenses.naming import expand, family, format_defense, parse_all, parse_defense, strength
from leakaudit.errors import InputError

POSITIVE = st.floats(1e-30, 1e30, allow_nan=False, allow_infinity=False)
SHARE = st.floats(1e-6, 1.0)
PARTS = st.one_of(
    st.builds(GaussianNoise, std=POSITIVE, relative=st.none() | POSITIVE).map(
        lambda d: ("gaussian-noise", d)
    ),
    st.builds(TopK, keep=SHARE, scope=st.sampled_from(["tensor", "global"])).map(lambda d: ("top-k", d)),
    st.builds(Clip, max_grad_norm=POSITIVE).map(lambda d: ("clip", d)),
    st.builds(Quantise, bits=st.integers(2, 16), scope=st.sampled_from(["tensor", "row"])).map(
        lambda d: ("quantise", d)
    ),
)


def long_spec(name: str, defense: object) -> str:
    """Every option spelt out."""
    options = [f"{f.name}={getattr(defense, f.name)}" for f in dataclasses.fields(defense)]  # type: ignore[arg-type]
    return f"{name}:{','.join(options)}"


@settings(max_examples=100, deadline=None)
@given(st.lists(PARTS, max_size=4))
def test_what_is_written_is_read_back(chain: list) -> None:
    text = "+".join(long_spec(name, defense) for name, defense in chain) or "none"
    parts = parse_defense(text)
    assert [defense for _, defense in parts] == [defense for _, defense in chain]
    canonical = format_defense(parts)
    assert parse_defense(canonical) == parts
    assert format_defense(parse_defense(canonical)) == canonical
    assert expand(canonical) == [canonical]
    assert family(canonical) == ("+".join(name for name, _ in chain) or "none")


@settings(max_examples=50, deadline=None)
@given(
    st.lists(POSITIVE, min_size=1, max_size=4, unique=True),
    st.lists(SHARE, min_size=1, max_size=3, unique=True),
    st.lists(st.sampled_from(["tensor", "global"]), min_size=1, max_size=2, unique=True),
)
def test_lists_expand_to_every_combination(
    bounds: list[float], shares: list[float], scopes: list[str]
) -> None:
    text = f"clip:max_grad_norm={','.join(map(str, bounds))}+top-k:keep={','.join(map(str, shares))}"
    found = expand(text + f",scope={','.join(scopes)}")
    wanted = [
        (Clip(bound), TopK(share, scope))  # type: ignore[arg-type]
        for bound, share, scope in product(bounds, shares, scopes)
    ]
    assert [tuple(defense for _, defense in parse_defense(spec)) for spec in found] == wanted
    if len(shares) > 1:
        assert all(strength(spec, among=found[: len(shares) * len(scopes)]) is not None for spec in found)


def test_examples() -> None:
    assert parse_defense("clip:max_grad_norm=1e+3 + gaussian-noise:std=1e+2") == (
        ("clip:max_grad_norm=1000.0", Clip(1000.0)),
        ("gaussian-noise:std=100.0", GaussianNoise(100.0)),
    )
    assert parse_defense("none") == parse_defense("") == parse_defense(" none ") == ()
    assert expand("none") == ["none"]
    assert expand("gaussian-noise:std=1e-4,1e-3,1e-2") == [
        "gaussian-noise:std=0.0001",
        "gaussian-noise:std=0.001",
        "gaussian-noise:std=0.01",
    ]
    assert expand("quantise:to=fp16,int8") == ["quantise:to=fp16", "quantise:to=int8"]
    assert expand("top-k:keep=0.5,0.50,0.5") == ["top-k:keep=0.5"]
    assert expand("clip:max_grad_norm=1e+20,2e+20+top-k") == [
        "clip:max_grad_norm=1e+20+top-k:keep=0.1",
        "clip:max_grad_norm=2e+20+top-k:keep=0.1",
    ]
    assert expand("gaussian-noise:relative=0.1,0.2")[0] == "gaussian-noise:relative=0.1", (
        "std says nothing then"
    )
    assert expand("dp-sgd:max_grad_norm=0.1") == ["dp-sgd:noise_multiplier=1.0,max_grad_norm=0.1"]
    assert len(parse_all(["clip+top-k", "none", "quantise"])) == 3


def test_strength_is_the_option_that_varies() -> None:
    sweep = expand("clip:max_grad_norm=0.5+gaussian-noise:std=1e-4,1e-3")
    assert [strength(spec, sweep) for spec in sweep] == [("std", 1e-4), ("std", 1e-3)]
    assert strength("clip+gaussian-noise:std=1e-2") == ("std", 1e-2)
    assert strength("gaussian-noise") == ("std", 1e-3)
    assert strength("gaussian-noise:relative=0.1") == ("relative", 0.1)
    assert strength("random-k:unbiased=true,keep=0.3") == ("keep", 0.3)
    assert strength("none") is None
    assert strength("quantise:to=fp16") is None, "bits mean nothing there"
    shares = expand("gaussian-noise:relative=0.1,0.2")
    assert [strength(spec, shares) for spec in shares] == [("relative", 0.1), ("relative", 0.2)]
    assert strength("top-k:keep=0.3", ["clip:max_grad_norm=2"]) == ("keep", 0.3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gausian-noise", "unknown defense 'gausian-noise', did you mean 'gaussian-noise'"),
        ("clip+top-kk:keep=0.1", "unknown defense 'top-kk', did you mean 'top-k'"),
        ("clip++top-k", "unknown defense 'clip\\+', did you mean 'clip'"),
        ("none+clip", "unknown defense 'none'"),
        ("gaussian-noise:sdt=1", "no option 'sdt', did you mean 'std'"),
        ("gaussian-noise:std=loud", "std='loud' is not of type float"),
        ("gaussian-noise:std=-1", "std must be at least 0 and finite, got -1.0"),
        ("gaussian-noise:relative=inf", "relative must be at least 0 and finite, got inf"),
        ("laplace-noise:std=nan", "std must be at least 0 and finite, got nan"),
        ("top-k:keep=1.5", "keep must be in \\(0, 1\\], got 1.5"),
        ("random-k:keep=0", "keep must be in \\(0, 1\\], got 0.0"),
        ("top-k:scope=row", "scope='row'.*accepted: tensor, global"),
        ("dgc:momentum=1", "momentum must be in \\[0, 1\\), got 1.0"),
        ("dgc:rounds=0", "must be at least 1, got 1 and 0"),
        ("dgc:clip=0", "clip must be positive and finite, got 0.0"),
        ("quantise:bits=1", "bits must be between 2 and 16, got 1"),
        ("quantise:to=fp16,bits=4", "are of to=int8, got to=fp16"),
        ("quantise:to=sign,rounding=stochastic", "are of to=int8, got to=sign"),
        ("quantise:to=bf16,scope=row", "scope=row is of to=int8 and to=sign, got to=bf16"),
        ("clip:max_grad_norm=0,1", "max_grad_norm must be positive and finite, got 0.0"),
        ("clip:5", "'5' is not key=value"),
    ],
)
def test_mistakes_are_one_line(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        expand(text)
    assert "\n" not in str(refused.value)


def test_every_default_has_a_name() -> None:
    for name in DEFENSES:
        ((spec, defense),) = parse_defense(name)
        assert defense == DEFENSES[name]
        assert parse_defense(spec) == ((spec, defense),)
        assert family(name) == name
