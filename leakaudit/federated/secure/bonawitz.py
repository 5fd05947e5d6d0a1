"""Secure aggregation of Bonawitz et al. 2017 (CCS), "Practical Secure Aggregation for Privacy-Preserving Machine
Learning", figure 4, for parties that follow the protocol but look at all they see (honest but curious).

    round 0, AdvertiseKeys           two public keys a client: c to encrypt, s for masks
    round 1, ShareKeys               shares of the private s and of the seed b, sealed for every other client
    round 2, MaskedInputCollection   y_u = x_u + PRG(b_u) + sum_{v < u} PRG(s_uv) - sum_{v > u} PRG(s_uv)  mod 2^bits
    round 3, Unmasking               shares of b of those whose y arrived, of s of those whose y did not

U1, U2, U3 are the clients that finished rounds 0, 1, 2, as in the paper; the server learns sum_{u in U3} x_u and
goes on only while at least `threshold` clients are left.

Left out: signatures and the round ConsistencyCheck (underlined in the figure), with which clients would notice a
server that lies about who dropped out, or makes up clients.  Channels between client and server are taken to be
private and authentic (TLS).  Deviations, none of which weakens it:
  - the threshold must exceed half of the clients, which the paper asks for against malicious servers only;
  - a client opens what others sealed for it in round 2 already, rather than in round 3;
  - a client commits to b by a hash in round 1, and the server compares what it recovers with that and with the
    public key s: a wrong share ends the protocol with an error instead of a wrong sum.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from leakaudit.errors import InputError
from leakaudit.federated.secure.messages import (
    NUMBER_BYTES,
    SESSION_BYTES,
    ClientMessage,
    EncryptedShares,
    FromServer,
    KeyAdvertisement,
    KeyList,
    MaskedInput,
    RelayedShares,
    RevealedShares,
    UnmaskRequest,
)
from leakaudit.federated.secure.primitives import (
    KEY_BYTES,
    SEALED_OVERHEAD,
    SEED_BYTES,
    SHARE_BYTES,
    KeyPair,
    ProtocolError,
    Randomness,
    combine_shares,
    operating_system,
    seal,
    split_secret,
    unseal,
)
from leakaudit.federated.secure.ring import Ring, Vector

SEALED_BYTES = 2 * SHARE_BYTES + SEALED_OVERHEAD


class Stage(IntEnum):
    """The round that a party is in."""

    ADVERTISE_KEYS = 0
    SHARE_KEYS = 1
    MASKED_INPUT = 2
    UNMASK = 3
    ENDED = 4

    def __str__(self) -> str:
        return (
            f"round {int(self)} ({self.name.lower().replace('_', ' ')})" if self < Stage.ENDED else "the end"
        )


ROUNDS = (Stage.ADVERTISE_KEYS, Stage.SHARE_KEYS, Stage.MASKED_INPUT, Stage.UNMASK)
_STAGES: dict[type, Stage] = {
    KeyAdvertisement: Stage.ADVERTISE_KEYS,
    EncryptedShares: Stage.SHARE_KEYS,
    MaskedInput: Stage.MASKED_INPUT,
    RevealedShares: Stage.UNMASK,
}


class Aborted(ProtocolError):
    """Too few clients are left."""


@dataclass(frozen=True)
class Setup:
    """What all parties know beforehand.

    Attributes:
        members: the numbers of the clients that are asked, at least 2, each from 0 below 2^32.
        threshold: how many must be left in every round, t; more than half of the members, at most all.
        ring: of the vectors.
        session: 16 bytes, never used twice.
    """

    members: tuple[int, ...]
    threshold: int
    ring: Ring
    session: bytes

    def __post_init__(self) -> None:
        count = len(self.members)
        if count < 2 or len(set(self.members)) != count:
            raise ValueError(f"members must be at least 2 different clients, got {list(self.members)}")
        if not all(0 <= member < 1 << 8 * NUMBER_BYTES for member in self.members):
            raise ValueError(f"members must be numbers from 0 below 2^32, got {list(self.members)}")
        check_threshold(self.threshold, count)
        if len(self.session) != SESSION_BYTES:
            raise ValueError(f"session must have {SESSION_BYTES} bytes, got {len(self.session)}")


def check_threshold(threshold: int, clients: int) -> None:
    """`ValueError` unless more than half and at most all of the clients.

    Below or at half, a server could ask one half for the shares of one secret of a client and the other half for
    those of its other secret, and so unmask it.
    """
    if not clients < 2 * threshold <= 2 * clients:
        raise ValueError(
            f"threshold must be more than half of the {clients} clients and at most all of them, got {threshold}"
        )


class Client:
    """One client in one session: `advertise`, `share`, `mask`, `unmask`, each once and in this order.

    All raise `ProtocolError` for a message that comes at another time, is of another session, or does not hold
    what it should; then nothing was revealed and the client is in the stage that it was in.

    Args:
        number: which of the members.
        randomness: for keys, seeds and nonces; `simulated_randomness` in tests and simulation only.
    """

    def __init__(self, setup: Setup, number: int, randomness: Randomness = operating_system) -> None:
        if number not in setup.members:
            raise ValueError(f"client {number} is not one of the members {list(setup.members)}")
        self.number, self.stage = number, Stage.ADVERTISE_KEYS
        self._setup, self._randomness = setup, randomness
        self._encryption = KeyPair.generate(randomness)
        self._masking = KeyPair.generate(randomness)
        self._seed = randomness(SEED_BYTES)
        self._keys: Mapping[int, KeyAdvertisement] = {}
        self._own: tuple[bytes, bytes] = (b"", b"")
        self._shares: dict[int, tuple[bytes, bytes]] = {}

    def advertise(self) -> KeyAdvertisement:
        """Round 0."""
        self._expect(Stage.ADVERTISE_KEYS)
        self.stage = Stage.SHARE_KEYS
        return self._advertisement

    def share(self, keys: KeyList) -> EncryptedShares:
        """Round 1: shares of both secrets, one pair for each client of U1 (its own is kept)."""
        self._expect(Stage.SHARE_KEYS, keys)
        self._check_keys(keys.keys)
        order, threshold = sorted(keys.keys), self._setup.threshold
        shares = dict(
            zip(
                order,
                zip(
                    split_secret(self._masking.private, threshold, len(order)),
                    split_secret(self._seed, threshold, len(order)),
                    strict=True,
                ),
                strict=True,
            )
        )
        own = shares.pop(self.number)
        sealed = {
            peer: self._sealed(keys.keys[peer].encryption_key, peer, pair) for peer, pair in shares.items()
        }
        self._keys, self._own, self.stage = dict(keys.keys), own, Stage.MASKED_INPUT
        commitment = _commitment(self._setup.session, self.number, self._seed)
        return EncryptedShares(self._setup.session, self.number, sealed, commitment)

    def mask(self, relayed: RelayedShares, vector: Vector) -> MaskedInput:
        """Round 2: the vector, (length,) uint64 below 2^bits, under the masks with every other client of U2."""
        self._expect(Stage.MASKED_INPUT, relayed)
        self._setup.ring.check(vector)
        shares = self._opened(relayed.sealed)
        masked = vector + self._setup.ring.expand(self._seed)
        for peer in shares:
            if peer != self.number:
                masked += self._pairwise(peer)
        self._shares, self.stage = shares, Stage.UNMASK
        packed = self._setup.ring.pack(self._setup.ring.reduce(masked))
        return MaskedInput(self._setup.session, self.number, packed)

    def unmask(self, request: UnmaskRequest) -> RevealedShares:
        """Round 3: a share of each survivor's seed and of each dropout's mask key, never both of one client."""
        self._expect(Stage.UNMASK, request)
        both = sorted(request.survivors & request.dropouts)
        if both:
            raise ProtocolError(f"the server asks for both shares of client {both[0]}, which would unmask it")
        if request.survivors | request.dropouts != set(self._shares):
            raise ProtocolError("the server asks for shares of other clients than those that shared theirs")
        if self.number not in request.survivors:
            raise ProtocolError(
                f"the server takes client {self.number} for a dropout and asks it nonetheless"
            )
        if len(request.survivors) < self._setup.threshold:
            raise ProtocolError(
                f"the server asks to unmask {len(request.survivors)} clients;"
                f" accepted: at least {self._setup.threshold}"
            )
        self.stage = Stage.ENDED
        seeds = {peer: self._shares[peer][1] for peer in sorted(request.survivors)}
        mask_keys = {peer: self._shares[peer][0] for peer in sorted(request.dropouts)}
        return RevealedShares(self._setup.session, self.number, seeds, mask_keys)

    @property
    def _advertisement(self) -> KeyAdvertisement:
        return KeyAdvertisement(
            self._setup.session, self.number, self._encryption.public, self._masking.public
        )

    def _expect(self, stage: Stage, message: FromServer | None = None) -> None:
        if self.stage != stage:
            raise ProtocolError(f"client {self.number} is at {self.stage}, not at {stage}")
        if message is not None and message.session != self._setup.session:
            raise ProtocolError(f"a message of another session than client {self.number}'s")

    def _check_keys(self, keys: Mapping[int, KeyAdvertisement]) -> None:
        if not set(keys) <= set(self._setup.members):
            raise ProtocolError("the list of keys holds a client that is not a member")
        if len(keys) < self._setup.threshold:
            raise ProtocolError(
                f"the list of keys holds {len(keys)} clients; accepted: at least {self._setup.threshold}"
            )
        if keys.get(self.number) != self._advertisement:
            raise ProtocolError(f"the list of keys does not hold client {self.number}'s own as it sent them")
        different = {key for one in keys.values() for key in (one.encryption_key, one.mask_key)}
        if len(different) != 2 * len(keys):
            raise ProtocolError("the list of keys holds a key twice")

    def _sealed(self, public: bytes, peer: int, pair: tuple[bytes, bytes]) -> bytes:
        session = self._setup.session
        key = self._encryption.agree(public, "shares", session, self.number, peer)
        return seal(key, pair[0] + pair[1], _route(session, self.number, peer), self._randomness)

    def _opened(self, sealed: Mapping[int, bytes]) -> dict[int, tuple[bytes, bytes]]:
        """Everybody's shares for this client, its own among them: U2."""
        if not set(sealed) <= set(self._keys) - {self.number}:
            raise ProtocolError(
                "the server relays shares of a client that advertised no keys, or the client's own"
            )
        if len(sealed) + 1 < self._setup.threshold:
            raise ProtocolError(
                f"{len(sealed) + 1} clients shared their keys; accepted: at least {self._setup.threshold}"
            )
        opened = {peer: self._open(peer, message) for peer, message in sealed.items()}
        return {**opened, self.number: self._own}

    def _open(self, peer: int, sealed: bytes) -> tuple[bytes, bytes]:
        session = self._setup.session
        key = self._encryption.agree(self._keys[peer].encryption_key, "shares", session, peer, self.number)
        plain = unseal(key, sealed, _route(session, peer, self.number))
        if len(plain) != 2 * SHARE_BYTES:
            raise ProtocolError(f"client {peer} sealed {len(plain)} bytes; accepted: {2 * SHARE_BYTES}")
        return plain[:SHARE_BYTES], plain[SHARE_BYTES:]

    def _pairwise(self, peer: int) -> Vector:
        return pairwise_mask(self._setup, self._masking, self.number, self._keys[peer].mask_key, peer)


def pairwise_mask(setup: Setup, own: KeyPair, number: int, public: bytes, peer: int) -> Vector:
    """What client `number` adds because of `peer`: PRG(s) where its number is the larger one, else -PRG(s).

    Computed modulo 2^64; of the two clients' masks the sum is 0.
    """
    low, high = sorted((number, peer))
    mask = setup.ring.expand(own.agree(public, "mask", setup.session, low, high))
    return mask if number > peer else setup.ring.zeros() - mask


class Server:
    """The server in one session: it receives what the clients send in a round, then closes the round.

    `receive` raises `ProtocolError` for a message that is not of this session, this round or a client that is
    still in it, is the second of a client in a round, or does not hold what it should; nothing of it is used, and
    its client counts as dropped unless a good message follows.  The four closing methods raise `Aborted` when
    fewer than the threshold are left.
    """

    def __init__(self, setup: Setup) -> None:
        self.stage = Stage.ADVERTISE_KEYS
        self._setup = setup
        self._keys: dict[int, KeyAdvertisement] = {}
        self._sealed: dict[int, EncryptedShares] = {}
        self._survivors: set[int] = set()
        self._total = setup.ring.zeros()
        self._revealed: dict[int, RevealedShares] = {}

    def receive(self, message: ClientMessage) -> None:
        """Take one client's message of the present round."""
        self._expect(message)
        match message:
            case KeyAdvertisement():
                self._receive_keys(message)
            case EncryptedShares():
                self._receive_shares(message)
            case MaskedInput():
                self._total += self._setup.ring.unpack(message.vector)
                self._survivors.add(message.sender)
            case RevealedShares():
                self._receive_revealed(message)

    def announce_keys(self) -> KeyList:
        """Close round 0; the same message for all of U1."""
        self._close(Stage.ADVERTISE_KEYS)
        return KeyList(self._setup.session, dict(self._keys))

    def relay_shares(self) -> dict[int, RelayedShares]:
        """Close round 1; a message for each client of U2."""
        self._close(Stage.SHARE_KEYS)
        return {
            receiver: RelayedShares(
                self._setup.session,
                {
                    sender: message.sealed[receiver]
                    for sender, message in self._sealed.items()
                    if sender != receiver
                },
            )
            for receiver in self._sealed
        }

    def request_unmasking(self) -> UnmaskRequest:
        """Close round 2; the same message for all of U3."""
        self._close(Stage.MASKED_INPUT)
        return UnmaskRequest(self._setup.session, self.survivors, frozenset(self._sealed) - self.survivors)

    def unmask(self) -> Vector:
        """Close round 3: the sum of the survivors' vectors, (length,) uint64 below 2^bits.

        `ProtocolError` where shares do not give the secret that they are shares of.
        """
        self._close(Stage.UNMASK)
        total = self._total.copy()
        for number in self.survivors:
            total -= self._setup.ring.expand(self._seed(number))
        for dropout in frozenset(self._sealed) - self.survivors:
            masking = self._mask_key(dropout)
            for number in self.survivors:
                # the dropout's own mask is the survivor's with the other sign
                total += pairwise_mask(self._setup, masking, dropout, self._keys[number].mask_key, number)
        return self._setup.ring.reduce(total)

    @property
    def survivors(self) -> frozenset[int]:
        """Whose vectors are in the sum, U3."""
        return frozenset(self._survivors)

    def _arrived(self) -> Collection[int]:
        """Who sent in this round."""
        sent: tuple[Collection[int], ...] = (self._keys, self._sealed, self._survivors, self._revealed, ())
        return sent[self.stage]

    def _left(self) -> Collection[int]:
        """Who may send in this round: those who sent in the one before."""
        before: tuple[Collection[int], ...] = (
            self._setup.members,
            self._keys,
            self._sealed,
            self._survivors,
            (),
        )
        return before[self.stage]

    def _expect(self, message: ClientMessage) -> None:
        stage = _STAGES[type(message)]
        if message.session != self._setup.session:
            raise ProtocolError(f"a message of client {message.sender} of another session")
        if message.sender not in self._setup.members:
            raise ProtocolError(f"a message of client {message.sender}, which is not a member")
        if stage != self.stage:
            raise ProtocolError(f"a message of {stage} of client {message.sender}, at {self.stage}")
        if message.sender not in self._left():
            raise ProtocolError(f"a message of client {message.sender}, which has dropped out")
        if message.sender in self._arrived():
            raise ProtocolError(f"a second message of client {message.sender} in {stage}")

    def _receive_keys(self, message: KeyAdvertisement) -> None:
        taken = {key for one in self._keys.values() for key in (one.encryption_key, one.mask_key)}
        keys = {message.encryption_key, message.mask_key}
        if len(keys) != 2 or keys & taken or any(len(key) != KEY_BYTES for key in keys):
            raise ProtocolError(
                f"client {message.sender} advertises keys that are not two new ones of {KEY_BYTES} bytes"
            )
        self._keys[message.sender] = message

    def _receive_shares(self, message: EncryptedShares) -> None:
        if set(message.sealed) != set(self._keys) - {message.sender}:
            raise ProtocolError(
                f"client {message.sender} does not share with every other client that advertised"
            )
        if any(len(sealed) != SEALED_BYTES for sealed in message.sealed.values()):
            raise ProtocolError(
                f"client {message.sender} seals shares of another length than {SEALED_BYTES} bytes"
            )
        self._sealed[message.sender] = message

    def _receive_revealed(self, message: RevealedShares) -> None:
        if (
            set(message.seeds) != self.survivors
            or set(message.mask_keys) != set(self._sealed) - self.survivors
        ):
            raise ProtocolError(f"client {message.sender} reveals other shares than it was asked for")
        if any(len(share) != SHARE_BYTES for share in (*message.seeds.values(), *message.mask_keys.values())):
            raise ProtocolError(
                f"client {message.sender} reveals shares of another length than {SHARE_BYTES} bytes"
            )
        self._revealed[message.sender] = message

    def _close(self, stage: Stage) -> None:
        if self.stage != stage:
            raise ProtocolError(f"the server is at {self.stage}, not at {stage}")
        left, threshold = len(self._arrived()), self._setup.threshold
        self.stage = Stage(stage + 1)
        if left < threshold:
            self.stage = Stage.ENDED
            raise Aborted(f"{left} clients are left after {stage}, fewer than the threshold of {threshold}")

    def _seed(self, number: int) -> bytes:
        seed = self._recovered({sender: message.seeds[number] for sender, message in self._revealed.items()})
        if _commitment(self._setup.session, number, seed) != self._sealed[number].seed_commitment:
            raise ProtocolError(f"the shares of client {number}'s seed do not give it: one of them is wrong")
        return seed

    def _mask_key(self, number: int) -> KeyPair:
        key = KeyPair(
            self._recovered({sender: message.mask_keys[number] for sender, message in self._revealed.items()})
        )
        if key.public != self._keys[number].mask_key:
            raise ProtocolError(
                f"the shares of client {number}'s mask key do not give it: one of them is wrong"
            )
        return key

    def _recovered(self, shares: Mapping[int, bytes]) -> bytes:
        """The secret from the first `threshold` shares, by the client that revealed each."""
        place = {number: index for index, number in enumerate(sorted(self._keys))}
        return combine_shares(
            {place[sender]: shares[sender] for sender in sorted(shares)[: self._setup.threshold]}
        )


def _route(session: bytes, sender: int, receiver: int) -> bytes:
    """What a sealed pair of shares is bound to."""
    return session + sender.to_bytes(NUMBER_BYTES, "little") + receiver.to_bytes(NUMBER_BYTES, "little")


def _commitment(session: bytes, number: int, seed: bytes) -> bytes:
    return hashlib.sha256(
        b"leakaudit/seed/" + session + number.to_bytes(NUMBER_BYTES, "little") + seed
    ).digest()


@dataclass(frozen=True)
class Leg:
    """Messages that travel at the same time.

    Attributes:
        stage: the round; upward: from the clients to the server, or back.
        sizes: client -> bytes of its message.
    """

    stage: Stage
    upward: bool
    sizes: Mapping[int, int]


@dataclass(frozen=True)
class Outcome:
    """Attributes:
    total: sum of the survivors' vectors modulo 2^bits, (length,) uint64.
    survivors: whose vectors are in it, in order.
    """

    total: Vector
    survivors: tuple[int, ...]


@dataclass
class Exchange:
    """All parties of one session in one place, for simulation and tests.

    Attributes:
        server, clients: at the beginning of round 0.
        vector: a member's vector, asked for in round 2; an `InputError` of it makes the client drop out.
        leaving: who drops out, and in which round its message does not come.
        refused: client -> why its message was refused or could not be made; it then counts as dropped.
        outcome: after the last leg.
    """

    server: Server
    clients: dict[int, Client]
    vector: Callable[[int], Vector]
    leaving: Mapping[int, Stage] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    outcome: Outcome = field(init=False)

    def run(self) -> Iterator[Leg]:
        """One leg after the other; `Aborted` when too few clients are left."""
        yield self._collect(Stage.ADVERTISE_KEYS, lambda client: client.advertise())
        keys = self.server.announce_keys()
        yield self._reply(Stage.ADVERTISE_KEYS, lambda _: keys.size)
        yield self._collect(Stage.SHARE_KEYS, lambda client: client.share(keys))
        relayed = self.server.relay_shares()
        yield self._reply(Stage.SHARE_KEYS, lambda number: relayed[number].size)
        yield self._collect(
            Stage.MASKED_INPUT,
            lambda client: client.mask(relayed[client.number], self.vector(client.number)),
        )
        request = self.server.request_unmasking()
        yield self._reply(Stage.MASKED_INPUT, lambda _: request.size)
        yield self._collect(Stage.UNMASK, lambda client: client.unmask(request))
        self.outcome = Outcome(self.server.unmask(), tuple(sorted(self.server.survivors)))

    def _collect(self, stage: Stage, message_of: Callable[[Client], ClientMessage]) -> Leg:
        sizes = {}
        for number, client in list(self.clients.items()):
            if self.leaving.get(number) == stage:
                del self.clients[number]
                continue
            try:
                message = message_of(client)
                sizes[number] = message.size
                self.server.receive(message)
            except InputError as error:
                self.refused[number] = str(error)
                del self.clients[number]
        return Leg(stage, True, sizes)

    def _reply(self, stage: Stage, size: Callable[[int], int]) -> Leg:
        return Leg(stage, False, {number: size(number) for number in self.clients})


def secure_sum(
    setup: Setup,
    vectors: Mapping[int, Vector],
    leaving: Mapping[int, Stage] | None = None,
    randomness: Randomness = operating_system,
) -> Outcome:
    """The whole protocol in one process: the sum of the vectors (by member) of those whose vectors arrived.

    Raises `Aborted` where the dropouts of `leaving` leave fewer than the threshold in any round.
    """
    clients = {number: Client(setup, number, randomness) for number in setup.members}
    exchange = Exchange(Server(setup), clients, vectors.__getitem__, leaving or {})
    for _ in exchange.run():
        pass
    return exchange.outcome
