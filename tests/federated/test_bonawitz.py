"""The protocol of Bonawitz et al. 2017: exact sums for every dropout, and messages that are refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_ciphers import BASE_POINT, chacha20, hkdf, x25519
from scipy.stats import chisquare

from leakaudit.errors import InputError
from leakaudit.federated.secure.bonawitz import (
    ROUNDS,
    Aborted,
    Client,
    Exchange,
    Server,
    Setup,
    Stage,
    secure_sum,
)
from leakaudit.federated.secure.messages import MaskedInput, RelayedShares, UnmaskRequest
from leakaudit.federated.secure.primitives import (
    KeyPair,
    ProtocolError,
    combine_shares,
    seal,
    simulated_randomness,
    split_secret,
    unseal,
)
from leakaudit.federated.secure.ring import Ring, Vector

SESSION = bytes(range(16))
STAYS = Stage.ENDED


def setup(count: int = 4, threshold: int = 3, bits: int = 32, length: int = 5) -> Setup:
    """Members 2, 5, 8, ..., so that a number is not a position."""
    members = tuple(3 * index + 2 for index in range(count))
    return Setup(members, threshold, Ring(bits, length), SESSION)


def vectors(of: Setup, seed: int = 0) -> dict[int, Vector]:
    draw = np.random.default_rng(seed)
    return {m: draw.integers(0, 1 << of.ring.bits, of.ring.length, dtype=np.uint64) for m in of.members}


def plain_sum(of: Setup, given: Mapping[int, Vector], who: tuple[int, ...]) -> list[int]:
    """By Python's own integers."""
    return [sum(int(given[m][i]) for m in who) % 2**of.ring.bits for i in range(of.ring.length)]


def left_after(leaving: Mapping[int, Stage], of: Setup) -> list[tuple[int, ...]]:
    """Who is left after every round."""
    return [tuple(m for m in of.members if leaving.get(m, STAYS) > stage) for stage in ROUNDS]


def check(of: Setup, leaving: Mapping[int, Stage], seed: int = 0) -> bool:
    """The sum is exactly that of the survivors, or the protocol aborts where it must; True where it summed."""
    given, left = vectors(of, seed), left_after(leaving, of)
    randomness = simulated_randomness(seed, "check")
    if min(map(len, left)) < of.threshold:
        with pytest.raises(Aborted, match="fewer than the threshold"):
            secure_sum(of, given, leaving, randomness)
        return False
    outcome = secure_sum(of, given, leaving, randomness)
    assert outcome.survivors == left[Stage.MASKED_INPUT]
    assert outcome.total.tolist() == plain_sum(of, given, outcome.survivors)
    return True


def test_every_pattern_of_dropouts_of_three() -> None:
    """Each of 3 clients stays, or leaves in one of 4 rounds: 5^3 patterns; at most one may leave with t = 2."""
    of = setup(3, 2, length=3)
    patterns = list(product((*ROUNDS, STAYS), repeat=3))
    summed = sum(check(of, dict(zip(of.members, pattern, strict=True))) for pattern in patterns)
    assert len(patterns) == 125
    assert summed == 1 + 3 * 4


def test_every_pattern_of_one_or_two_dropouts_of_four() -> None:
    """With t = 3 one may leave, in any round; two abort the protocol wherever they leave."""
    of = setup(4, 3, length=3)
    summed = 0
    for first, second in ((2, 5), (2, 11), (5, 8)):
        for stages in product(ROUNDS, repeat=2):
            assert not check(of, {first: stages[0], second: stages[1]})
    for member, stage in product(of.members, (*ROUNDS, STAYS)):
        summed += check(of, {member: stage})
    assert summed == 4 * 5


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_the_secure_sum_is_the_plain_sum(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 6), "clients")
    of = setup(
        count,
        data.draw(st.integers(count // 2 + 1, count), "threshold"),
        data.draw(st.sampled_from([8, 13, 16, 31, 32, 33, 48, 63]), "bits"),
        data.draw(st.integers(1, 40), "length"),
    )
    stages = st.sampled_from((STAYS, STAYS, STAYS, *ROUNDS))
    leaving = {member: data.draw(stages, f"client {member}") for member in of.members}
    check(of, leaving, seed=data.draw(st.integers(0, 2**32)))


def test_real_randomness_is_the_default() -> None:
    of = setup()
    first, second = (Client(of, 2).advertise() for _ in range(2))
    assert first != second
    assert secure_sum(of, vectors(of)).total.tolist() == plain_sum(of, vectors(of), of.members)


def recorded(of: Setup, name: str = "a") -> tuple[list[KeyPair], list[bytes], dict[int, Vector]]:
    """Mask keys, seeds and masked vectors of one session, from the same random bytes as its clients'."""
    source, given = simulated_randomness(0, name), vectors(of)
    made = [(source(32), source(32), source(32)) for _ in of.members]
    masked: dict[int, Vector] = {}

    class Listening(Server):
        def receive(self, message: Any) -> None:
            super().receive(message)
            if isinstance(message, MaskedInput):
                masked[message.sender] = of.ring.unpack(message.vector)

    source = simulated_randomness(0, name)
    clients = {member: Client(of, member, source) for member in of.members}
    for _ in Exchange(Listening(of), clients, given.__getitem__).run():
        pass
    return [KeyPair(mask) for _, mask, _ in made], [seed for _, _, seed in made], masked


def expanded(of: Setup, seed: bytes) -> list[int]:
    stream, width = chacha20(seed, of.ring.size), of.ring.width
    parts = (stream[i : i + width] for i in range(0, len(stream), width))
    return [int.from_bytes(part, "little") % 2**of.ring.bits for part in parts]


@pytest.mark.parametrize("bits", [13, 32, 48])
def test_masks_against_an_independent_computation(bits: int) -> None:
    """y_u = x_u + PRG(b_u) + sum_{v < u} PRG(s_uv) - sum_{v > u} PRG(s_uv), by the documents of the ciphers."""
    of = setup(3, 2, bits, length=40)
    keys, seeds, masked = recorded(of)
    given = vectors(of)
    for index, member in enumerate(of.members):
        expected = [int(x) + mask for x, mask in zip(given[member], expanded(of, seeds[index]), strict=True)]
        for other, peer in enumerate(of.members):
            if peer == member:
                continue
            shared = x25519(keys[index].private, x25519(keys[other].private, BASE_POINT))
            low, high = min(member, peer), max(member, peer)
            mask = expanded(of, hkdf(shared, SESSION, f"leakaudit/mask/{low}/{high}".encode()))
            sign = 1 if member > peer else -1
            expected = [value + sign * number for value, number in zip(expected, mask, strict=True)]
        assert masked[member].tolist() == [value % 2**bits for value in expected]


def test_the_references_by_the_vectors_of_their_documents() -> None:
    """RFC 7748, section 6.1; RFC 5869, A.1 (its first 32 bytes); RFC 8439, A.1."""
    bob = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    alice = bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
    public = "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    assert x25519(bob, BASE_POINT).hex() == KeyPair(bob).public.hex() == public
    shared = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    assert x25519(bob, alice).hex() == shared
    derived = hkdf(b"\x0b" * 22, bytes(range(13)), bytes(range(0xF0, 0xFA)))
    assert derived.hex() == "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"
    assert chacha20(bytes(32), 16).hex() == "76b8e0ada0f13d90405d6ae55386bd28"


def test_masked_vectors_look_uniform_and_masks_never_repeat() -> None:
    of = setup(3, 2, 32, length=20_000)
    zeros = {member: of.ring.zeros() for member in of.members}
    masks = []
    for session in (SESSION, bytes(16)):
        again = replace(of, session=session)
        source, sent = simulated_randomness(0, "the same keys in both sessions"), {}
        clients = {m: Client(again, m, source) for m in of.members}

        class Listening(Server):
            def receive(self, message: Any, sent: dict[int, Vector] = sent) -> None:
                super().receive(message)
                if isinstance(message, MaskedInput):
                    sent[message.sender] = of.ring.unpack(message.vector)

        for _ in Exchange(Listening(again), clients, zeros.__getitem__).run():
            pass
        masks += sent.values()
    for mask in masks:
        for digit in (mask >> np.uint64(24), mask & np.uint64(255)):
            assert chisquare(np.bincount(digit.astype(int), minlength=256)).pvalue > 1e-4
    for one, other in ((a, b) for i, a in enumerate(masks) for b in masks[:i]):
        assert np.count_nonzero(one == other) <= 2, "20,000 pairs of uniform 32-bit numbers"
        difference = of.ring.reduce(one - other) >> np.uint64(24)
        assert chisquare(np.bincount(difference.astype(int), minlength=256)).pvalue > 1e-4


# messages that are refused


@pytest.fixture
def parties() -> Parties:
    return Parties(setup(4, 3))


class Parties:
    """Four clients and a server, taken through the rounds by hand."""

    def __init__(self, of: Setup) -> None:
        self.setup, self.server = of, Server(of)
        source = simulated_randomness(0, "parties")
        self.clients = {member: Client(of, member, source) for member in of.members}
        self.vectors = vectors(of)

    def advertise(self) -> Any:
        for client in self.clients.values():
            self.server.receive(client.advertise())
        return self.server.announce_keys()

    def share(self) -> dict[int, RelayedShares]:
        keys = self.advertise()
        for client in self.clients.values():
            self.server.receive(client.share(keys))
        return self.server.relay_shares()

    def mask(self, *without: int) -> UnmaskRequest:
        relayed = self.share()
        for member in set(self.clients) - set(without):
            self.server.receive(self.clients[member].mask(relayed[member], self.vectors[member]))
        return self.server.request_unmasking()

    def finish(self, request: UnmaskRequest) -> list[int]:
        for member in sorted(request.survivors):
            self.server.receive(self.clients[member].unmask(request))
        return self.server.unmask().tolist()  # type: ignore[no-any-return]


def refused(match: str) -> Any:
    return pytest.raises(ProtocolError, match=match)


def test_a_client_never_reveals_both_shares(parties: Parties) -> None:
    request = parties.mask(2)
    client = parties.clients[5]
    both = replace(request, survivors=request.survivors | {2})
    with refused("asks for both shares of client 2, which would unmask it"):
        client.unmask(both)
    for fewer in (replace(request, dropouts=frozenset()), replace(request, survivors=frozenset({5, 8}))):
        with refused("other clients than those that shared"):
            client.unmask(fewer)
    with refused("takes client 5 for a dropout"):
        client.unmask(UnmaskRequest(SESSION, frozenset({2, 8, 11}), frozenset({5})))
    with refused("asks to unmask 2 clients; accepted: at least 3"):
        client.unmask(UnmaskRequest(SESSION, frozenset({5, 8}), frozenset({2, 11})))
    revealed = client.unmask(request)
    assert not set(revealed.seeds) & set(revealed.mask_keys)
    swapped = UnmaskRequest(SESSION, frozenset({2, 5, 8}), frozenset({11}))
    with refused("client 5 is at the end, not at round 3"):
        client.unmask(swapped)


def test_messages_out_of_order(parties: Parties) -> None:
    client = parties.clients[2]
    early = MaskedInput(SESSION, 2, bytes(20))
    with refused(r"a message of round 2 \(masked input\) of client 2, at round 0"):
        parties.server.receive(early)
    with refused("the server is at round 0 .*, not at round 1"):
        parties.server.relay_shares()
    with refused("client 2 is at round 0 .*, not at round 2"):
        client.mask(RelayedShares(SESSION, {}), parties.vectors[2])
    keys = parties.advertise()
    with refused("client 2 is at round 1"):
        client.advertise()
    client.share(keys)
    with refused("client 2 is at round 2"):
        client.share(keys)


def test_replayed_and_foreign_messages(parties: Parties) -> None:
    advertised = parties.clients[2].advertise()
    parties.server.receive(advertised)
    with refused("a second message of client 2 in round 0"):
        parties.server.receive(advertised)
    for client in (parties.clients[5], parties.clients[8], parties.clients[11]):
        message = client.advertise()
        with refused("of another session"):
            parties.server.receive(replace(message, session=bytes(16)))
        with refused("client 7, which is not a member"):
            parties.server.receive(replace(message, sender=7))
        parties.server.receive(message)
    keys = parties.server.announce_keys()
    with refused("another session than client 2"):
        parties.clients[2].share(replace(keys, session=bytes(16)))
    with refused("a message of round 0 .* of client 2, at round 1"):
        parties.server.receive(advertised)


def test_a_replayed_vector_is_not_summed_twice(parties: Parties) -> None:
    relayed = parties.share()
    for member, client in parties.clients.items():
        masked = client.mask(relayed[member], parties.vectors[member])
        parties.server.receive(masked)
        with refused("a second message"):
            parties.server.receive(masked)
    total = parties.finish(parties.server.request_unmasking())
    assert total == plain_sum(parties.setup, parties.vectors, parties.setup.members)


def test_a_dropout_that_comes_back_is_refused(parties: Parties) -> None:
    keys = parties.advertise()
    messages = {member: client.share(keys) for member, client in parties.clients.items()}
    for member in (5, 8, 11):
        parties.server.receive(messages[member])
    relayed = parties.server.relay_shares()
    with refused("client 2, which has dropped out"):
        parties.server.receive(MaskedInput(SESSION, 2, bytes(20)))
    for member in (5, 8, 11):
        parties.server.receive(parties.clients[member].mask(relayed[member], parties.vectors[member]))
    assert parties.finish(parties.server.request_unmasking()) == plain_sum(
        parties.setup, parties.vectors, (5, 8, 11)
    )


def test_a_tampered_share_costs_its_receiver_and_nobody_else(parties: Parties) -> None:
    relayed = parties.share()
    sealed = bytearray(relayed[2].sealed[5])
    sealed[20] ^= 1
    with refused("tampered with, or sealed for somebody else"):
        parties.clients[2].mask(
            replace(relayed[2], sealed={**relayed[2].sealed, 5: bytes(sealed)}), parties.vectors[2]
        )
    swapped = {**relayed[2].sealed, 5: relayed[2].sealed[8], 8: relayed[2].sealed[5]}
    with refused("tampered with, or sealed for somebody else"):
        parties.clients[2].mask(replace(relayed[2], sealed=swapped), parties.vectors[2])
    for member in (5, 8, 11):
        parties.server.receive(parties.clients[member].mask(relayed[member], parties.vectors[member]))
    request = parties.server.request_unmasking()
    assert request.dropouts == {2}
    assert parties.finish(request) == plain_sum(parties.setup, parties.vectors, (5, 8, 11))


def test_vectors_of_a_wrong_length_or_range(parties: Parties) -> None:
    relayed = parties.share()
    client = parties.clients[2]
    for wrong in (np.zeros(4, np.uint64), np.zeros(5), np.full(5, 1 << 32, np.uint64)):
        with refused(r"accepted: \(5,\) and uint64|is not below 2\^32"):
            client.mask(relayed[2], wrong)
    masked = client.mask(relayed[2], parties.vectors[2])
    with refused("a vector of 19 bytes; accepted: 20"):
        parties.server.receive(replace(masked, vector=masked.vector[1:]))
    parties.server.receive(masked)
    narrow = setup(3, 2, bits=13)
    with refused(r"is not below 2\^13"):
        narrow.ring.unpack(b"\xff" * narrow.ring.size)


def test_a_wrong_share_ends_in_an_error_and_not_in_a_wrong_sum(parties: Parties) -> None:
    request = parties.mask(2)
    messages = {member: parties.clients[member].unmask(request) for member in sorted(request.survivors)}
    for kind, of_client, match in (("seeds", 8, "client 8's seed"), ("mask_keys", 2, "client 2's mask key")):
        server = clone(parties.server)
        wrong = {**getattr(messages[5], kind), of_client: bytes(32)}
        server.receive(replace(messages[5], **{kind: wrong}))
        server.receive(messages[8])
        server.receive(messages[11])
        with refused(f"the shares of {match} do not give it"):
            server.unmask()
    with refused("reveals other shares than it was asked for"):
        parties.server.receive(replace(messages[5], seeds={}))
    with refused("reveals shares of another length"):
        parties.server.receive(replace(messages[5], seeds=dict.fromkeys(messages[5].seeds, b"")))


def clone(server: Server) -> Server:
    copied = Server(server._setup)
    copied.__dict__.update({**vars(server), "_revealed": {}})
    return copied


def test_lists_of_keys_that_a_client_refuses(parties: Parties) -> None:
    keys = parties.advertise()
    client, own = parties.clients[2], keys.keys[2]
    other = keys.keys[5]
    for changed, match in (
        ({2: own, 5: other}, "holds 2 clients; accepted: at least 3"),
        ({**keys.keys, 2: replace(own, mask_key=other.mask_key)}, "does not hold client 2's own"),
        ({m: k for m, k in keys.keys.items() if m != 2}, "does not hold client 2's own"),
        ({**keys.keys, 5: replace(other, encryption_key=own.encryption_key)}, "holds a key twice"),
        ({**keys.keys, 7: other}, "a client that is not a member"),
        ({**keys.keys, 5: replace(other, encryption_key=bytes(32))}, "not one of X25519"),
    ):
        with refused(match):
            client.share(replace(keys, keys=changed))
    with refused("keys that are not two new ones"):
        Server(parties.setup).receive(replace(own, mask_key=own.encryption_key))
    relayed = RelayedShares(SESSION, {5: b"", 8: b"", 7: b""})
    client.share(keys)
    with refused("a client that advertised no keys"):
        client.mask(relayed, parties.vectors[2])
    with refused("2 clients shared their keys; accepted: at least 3"):
        client.mask(RelayedShares(SESSION, {5: b""}), parties.vectors[2])


def test_a_client_that_cannot_make_its_vector_drops_out() -> None:
    of = setup(4, 3)
    given, source = vectors(of), simulated_randomness(0, "nan")

    def vector(member: int) -> Vector:
        if member == 5:
            raise InputError("not finite")
        return given[member]

    exchange = Exchange(Server(of), {m: Client(of, m, source) for m in of.members}, vector)
    legs = list(exchange.run())
    assert exchange.refused == {5: "not finite"}
    assert exchange.outcome.total.tolist() == plain_sum(of, given, (2, 8, 11))
    assert [len(leg.sizes) for leg in legs] == [4, 4, 4, 4, 3, 3, 3]


def test_sizes_of_the_messages() -> None:
    """By hand, for 4 clients and 5 numbers of 4 bytes: 24 bytes of header, 4 a client's number, 32 a key or share."""
    of = setup(4, 3)
    source = simulated_randomness(0, "sizes")
    clients = {m: Client(of, m, source) for m in of.members}
    legs = list(Exchange(Server(of), clients, vectors(of).__getitem__, {11: Stage.MASKED_INPUT}).run())
    assert [leg.sizes[2] for leg in legs] == [
        24 + 64,
        24 + 4 * (4 + 64),
        24 + 32 + 3 * (4 + 12 + 64 + 16),
        24 + 3 * (4 + 12 + 64 + 16),
        24 + 20,
        24 + 4 * 4,
        24 + 4 * (4 + 32),
    ]


@pytest.mark.parametrize(
    ("count", "threshold", "match"),
    [
        (1, 1, "at least 2 different clients"),
        (4, 5, "more than half of the 4 clients and at most all of them, got 5"),
        (4, 2, "more than half of the 4 clients and at most all of them, got 2"),
        (4, 0, "got 0"),
    ],
)
def test_setups_that_cannot_be(count: int, threshold: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        setup(count, threshold)


def test_more_setups_that_cannot_be() -> None:
    of = setup()
    changes: list[tuple[Callable[[], object], str]] = [
        (lambda: replace(of, members=(1, 1, 2)), "different clients"),
        (lambda: replace(of, members=(-1, 1, 2)), "from 0 below 2"),
        (lambda: replace(of, session=b"short"), "session must have 16 bytes, got 5"),
        (lambda: Client(of, 3), "client 3 is not one of the members"),
        (lambda: Ring(64, 5), "8 to 63 bits, got 64"),
        (lambda: Ring(32, 0), "at least 1 number"),
        (lambda: of.ring.expand(b"short"), "32 bytes, got 5"),
        (lambda: split_secret(b"short", 2, 3), "32 bytes, got 5"),
    ]
    for change, match in changes:
        with pytest.raises(ValueError, match=match):
            change()


def test_shares_of_a_secret() -> None:
    secret = bytes(range(32))
    shares = split_secret(secret, 3, 5)
    assert combine_shares({0: shares[0], 3: shares[3], 4: shares[4]}) == secret
    assert combine_shares({0: shares[0], 3: shares[3]}) != secret


def test_sealed_messages_are_bound_to_what_they_are_about() -> None:
    source = simulated_randomness(0, "seal")
    key = source(32)
    sealed = seal(key, b"plain", b"about", source)
    assert unseal(key, sealed, b"about") == b"plain"
    for wrong in ((source(32), sealed, b"about"), (key, sealed, b"other"), (key, sealed[:-1], b"about")):
        with refused("tampered with"):
            unseal(*wrong)
    with refused("of 3 bytes; accepted: 28 or more"):
        unseal(key, b"abc", b"about")


@given(st.integers(8, 63), st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=20))
def test_vectors_survive_the_wire(bits: int, numbers: list[int]) -> None:
    ring = Ring(bits, len(numbers))
    vector = ring.reduce(np.array(numbers, dtype=np.uint64))
    assert ring.unpack(ring.pack(vector)).tolist() == vector.tolist() == [n % 2**bits for n in numbers]
    half = 2 ** (bits - 1)
    assert ring.signed(vector).tolist() == [(n + half) % 2**bits - half for n in numbers]
