"""Updates as integers modulo 2^b: exact sums, the rounding of `SecureAggregation`, and what is refused."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from leakaudit.defenses.naming import parse_defense
from leakaudit.defenses.secure_aggregation import SecureAggregation
from leakaudit.errors import InputError
from leakaudit.federated.secure.fixed_point import FixedPoint
from leakaudit.update import Update


def update(*numbers: float) -> Update:
    return Update({"w": torch.tensor(numbers, dtype=torch.float64)})


@settings(deadline=None)
@given(
    st.integers(2, 24),
    st.lists(
        st.lists(st.floats(-20, 20), min_size=3, max_size=3),
        min_size=1,
        max_size=9,
    ),
)
def test_the_decoded_sum_is_the_sum_of_the_rounded_numbers(bits: int, clients: list[list[float]]) -> None:
    """Exactly, by fractions: the step is a power of two here."""
    numbers = FixedPoint(len(clients), bits, limit=8.0, modulus_bits=32)
    like = update(0, 0, 0)
    ring = numbers.ring(like)
    total = ring.zeros()
    for client in clients:
        total = ring.reduce(total + numbers.encode(update(*client), like))
    step, most = Fraction(16, 2**bits), Fraction(8)
    expected = [
        sum(min(max(round(Fraction(client[i]) / step) * step, -most), most) for client in clients)
        for i in range(3)
    ]
    decoded = numbers.decode(total, like)["w"]
    assert [Fraction(float(number)) for number in decoded] == expected


@pytest.mark.parametrize(("clients", "bits"), [(1, 30), (3, 30), (100, 22), (1000, 48), (2**14, 48)])
def test_the_largest_sums_do_not_wrap(clients: int, bits: int) -> None:
    modulus = bits + clients.bit_length()
    numbers, like = FixedPoint(clients, bits, 8.0, modulus), update(0, 0)
    ring = numbers.ring(like)
    one = numbers.encode(update(-100.0, 100.0), like)
    total = ring.reduce(one * one.dtype.type(clients))
    assert ring.signed(total).tolist() == [-clients * numbers.largest, clients * numbers.largest]
    assert numbers.decode(total, like)["w"].tolist() == [-8.0 * clients, 8.0 * clients]
    with pytest.raises(ValueError, match=f"wraps around modulo 2.{modulus - 1}; accepted: .* {modulus} bits"):
        FixedPoint(clients, bits, 8.0, modulus - 1)


def test_one_client_is_rounded_as_the_defense_rounds() -> None:
    draw = torch.Generator().manual_seed(0)
    like = Update({"a": torch.zeros(20, 3), "b": torch.zeros(7), "c": torch.zeros(())})
    given = Update({name: 5 * torch.randn(t.shape, generator=draw) for name, t in like.items()})
    for bits, limit in ((22, 8.0), (4, 1.5), (16, 3.3)):
        numbers = FixedPoint(3, bits, limit)
        decoded = numbers.decode(numbers.encode(given, like), like)
        defense = SecureAggregation(clients=1, bits=bits, limit=limit)
        assert_close(dict(decoded), dict(given.map(defense._fixed_point)), rtol=0, atol=0)
        [(spec, parsed)] = parse_defense(numbers.spec)
        assert parsed == defense
        assert spec == numbers.spec
    assert FixedPoint(3).spec == "secure-aggregation:clients=1"
    assert numbers.clamped(given) == int((given.flat().abs() > 3.3).sum()) > 0


def test_random_rounding_keeps_the_mean_and_stays_beside_the_number() -> None:
    numbers, count = FixedPoint(1, bits=4, limit=8.0), 40_000
    like = Update({"w": torch.zeros(count)})
    given = Update({"w": torch.full((count,), 0.3)})
    vector = numbers.encode(given, like, torch.Generator().manual_seed(0))
    decoded = numbers.decode(vector, like)["w"].double()
    assert set(decoded.tolist()) == {0.0, 1.0}
    assert float(decoded.mean()) == pytest.approx(0.3, abs=4 * (0.21 / count) ** 0.5)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (update(1.0, float("nan")), "not finite, which has no fixed-point value"),
        (update(1.0, float("inf")), "not finite"),
        (
            update(1.0, 2.0, 3.0),
            r"tensor w has shape \(3\); agreed on: \(2\)|shape \(3,\); agreed on: \(2,\)",
        ),
        (Update({"v": torch.zeros(2)}), "does not hold the tensors that were agreed on"),
        (Update({}), "does not hold the tensors that were agreed on"),
    ],
)
def test_updates_that_have_no_vector(wrong: Update, match: str) -> None:
    with pytest.raises(InputError, match=match):
        FixedPoint(2).encode(wrong, update(0, 0))


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"clients": 0}, "clients must be at least 1, got 0"),
        ({"clients": 2, "bits": 1}, "bits must be between 2 and 48, got 1"),
        ({"clients": 2, "limit": 0.0}, "limit must be positive"),
        ({"clients": 2, "modulus_bits": 64}, "8 to 63 bits, got 64"),
        ({"clients": 2, "bits": 31}, "of 2 clients' numbers of 31 bits .* accepted: a modulus of 33 bits"),
    ],
)
def test_fixed_points_that_cannot_be(wrong: dict[str, float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        FixedPoint(**wrong)  # type: ignore[arg-type]
