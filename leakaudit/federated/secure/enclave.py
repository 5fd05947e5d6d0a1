"""Asynchronous secure aggregation with a trusted execution environment, as in Papaya (Huba et al. 2022).

    client    sends x + PRG(seed) mod 2^bits to the host, and the seed, sealed for the enclave
    host      sums the masked vectors as they come
    enclave   sums PRG(seed), and after `goal` contributions gives the host that sum, once

The difference is the sum of the `goal` vectors.  No client waits for another, and a client that drops out leaves
nothing to repair, because it never contributed.

SIMULATED: there is no hardware.  The quote that says which code holds the enclave's key is signed by
`SimulatedVendor`, whose private key any simulation makes for itself, over the hash that the enclave takes of its
own source files.  `enclave_process.py` runs the enclave in a process of its own; nothing protects that process from
the machine's owner.

Deviations: one key pair of the enclave serves many buffers, and a client's ephemeral key, never accepted twice,
takes the place of Papaya's initial messages that are good for one client each.  A buffer takes exactly `goal`
contributions.  As in Papaya, a host that makes up all clients of a buffer but one learns that one's vector.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

from Crypto.Signature import eddsa

from leakaudit.federated.secure.primitives import (
    KEY_BYTES,
    SEALED_OVERHEAD,
    SEED_BYTES,
    KeyPair,
    ProtocolError,
    Randomness,
    operating_system,
    seal,
    unseal,
)
from leakaudit.federated.secure.ring import Ring, Vector

SIGNATURE_BYTES = 64
HASH_BYTES = 32
SESSION_BYTES = 16
HEADER_BYTES = SESSION_BYTES + 4
_RUNS_INSIDE = ("enclave.py", "enclave_process.py", "primitives.py", "ring.py")
_PURPOSE = "enclave seed"


@dataclass(frozen=True)
class Terms:
    """What an enclave is started for; its quote vouches for them.

    Attributes:
        ring: of the vectors.
        goal: contributions a buffer, K, at least 2: a sum of one is that client's vector.
        session: 16 bytes.
    """

    ring: Ring
    goal: int
    session: bytes

    def __post_init__(self) -> None:
        if self.goal < 2:
            raise ValueError(f"goal must be at least 2 contributions, got {self.goal}")
        if len(self.session) != SESSION_BYTES:
            raise ValueError(f"session must have {SESSION_BYTES} bytes, got {len(self.session)}")

    def statement(self, code: bytes, public: bytes) -> bytes:
        """What a quote is signed over."""
        numbers = f"{self.ring.bits} {self.ring.length} {self.goal}".encode()
        return b"/".join([b"leakaudit simulated enclave", code, public, self.session, numbers])


@dataclass(frozen=True)
class SimulatedQuote:
    """Attributes:
    code: SHA-256 of the source that says it runs in the enclave, 32 bytes.
    public: the enclave's X25519 key, 32 bytes.
    signature: Ed25519 of the simulated vendor, 64 bytes.
    """

    code: bytes
    public: bytes
    signature: bytes

    @property
    def size(self) -> int:
        return HEADER_BYTES + HASH_BYTES + KEY_BYTES + SIGNATURE_BYTES


@dataclass(frozen=True)
class SealedSeed:
    """A client's seed for the enclave: its ephemeral X25519 key, and the seed sealed under what they agree on."""

    ephemeral: bytes
    sealed: bytes

    @property
    def size(self) -> int:
        return len(self.ephemeral) + len(self.sealed)


@dataclass(frozen=True)
class Contribution:
    """What a client sends: the masked vector (packed) for the host, and the sealed seed, which it passes on."""

    session: bytes
    client: int
    masked: bytes
    seed: SealedSeed

    @property
    def size(self) -> int:
        return HEADER_BYTES + len(self.masked) + self.seed.size


@cache
def code_hash() -> bytes:
    """SHA-256 of the source files that run in the enclave; of real hardware, the measurement of its memory."""
    here = Path(__file__).parent
    return hashlib.sha256(b"".join((here / name).read_bytes() for name in _RUNS_INSIDE)).digest()


class SimulatedVendor:
    """Stands for the maker of the hardware, whose key signs quotes (Ed25519).  It protects nobody."""

    def __init__(self, private: bytes | None = None) -> None:
        self.private = private or operating_system(KEY_BYTES)
        self._key = eddsa.import_private_key(self.private)

    @property
    def public(self) -> bytes:
        raw: bytes = self._key.public_key().export_key(format="raw")
        return raw

    def sign(self, statement: bytes) -> bytes:
        signature: bytes = eddsa.new(self._key, "rfc8032").sign(statement)
        return signature


def check_quote(quote: SimulatedQuote, terms: Terms, vendor: bytes, code: bytes) -> None:
    """`ProtocolError` unless the vendor (public key) vouches that this code holds the key, for these terms."""
    if quote.code != code:
        raise ProtocolError("the enclave runs other code than the client expects")
    key = eddsa.import_public_key(vendor)
    try:
        eddsa.new(key, "rfc8032").verify(terms.statement(quote.code, quote.public), quote.signature)
    except ValueError as error:
        raise ProtocolError("the enclave's quote is not signed by the vendor for these terms") from error


def contribute(
    terms: Terms,
    quote: SimulatedQuote,
    vendor: bytes,
    client: int,
    vector: Vector,
    randomness: Randomness = operating_system,
) -> Contribution:
    """The client's side: check the quote, mask the vector, seal the seed.

    Args:
        vendor: public key of the hardware's maker, known beforehand.
        vector: (length,) uint64 below 2^bits.

    Raises `ProtocolError` for a quote that does not hold, or a vector that is not one.
    """
    check_quote(quote, terms, vendor, code_hash())
    terms.ring.check(vector)
    seed, ephemeral = randomness(SEED_BYTES), KeyPair.generate(randomness)
    key = ephemeral.agree(quote.public, _PURPOSE, terms.session)
    masked = terms.ring.pack(terms.ring.reduce(vector + terms.ring.expand(seed)))
    sealed = seal(key, seed, terms.session + ephemeral.public, randomness)
    return Contribution(terms.session, client, masked, SealedSeed(ephemeral.public, sealed))


class Enclave(Protocol):
    """What a host can ask of an enclave, wherever it runs."""

    def quote(self) -> SimulatedQuote: ...

    def accept(self, seed: SealedSeed) -> None: ...

    def release(self, buffer: int) -> bytes: ...

    def close(self) -> None: ...


class SimulatedEnclave:
    """The code of the enclave, in this process; see `enclave_process.IsolatedEnclave` for one of its own.

    Its key pair comes from the operating system and never leaves it.
    """

    def __init__(self, terms: Terms, vendor: SimulatedVendor) -> None:
        self._terms, self._key = terms, KeyPair.generate(operating_system)
        statement = terms.statement(code_hash(), self._key.public)
        self._quote = SimulatedQuote(code_hash(), self._key.public, vendor.sign(statement))
        self._seen: set[bytes] = set()
        self._buffer = self._count = 0
        self._masks = terms.ring.zeros()

    def quote(self) -> SimulatedQuote:
        return self._quote

    def accept(self, seed: SealedSeed) -> None:
        """Add PRG(seed) to the sum of the present buffer.

        Raises `ProtocolError`, and adds nothing, for a seed that was accepted before, is sealed for somebody else or
        tampered with, or when the buffer is full.
        """
        if self._count == self._terms.goal:
            raise ProtocolError(f"buffer {self._buffer} is full with {self._count} contributions")
        if len(seed.ephemeral) != KEY_BYTES or len(seed.sealed) != SEED_BYTES + SEALED_OVERHEAD:
            raise ProtocolError(
                f"a sealed seed of {len(seed.ephemeral)} and {len(seed.sealed)} bytes;"
                f" accepted: {KEY_BYTES} and {SEED_BYTES + SEALED_OVERHEAD}"
            )
        if seed.ephemeral in self._seen:
            raise ProtocolError("a contribution that the enclave has accepted before")
        key = self._key.agree(seed.ephemeral, _PURPOSE, self._terms.session)
        plain = unseal(key, seed.sealed, self._terms.session + seed.ephemeral)
        self._seen.add(seed.ephemeral)
        self._masks = self._terms.ring.reduce(self._masks + self._terms.ring.expand(plain))
        self._count += 1

    def release(self, buffer: int) -> bytes:
        """The sum of the masks of buffer 0, 1, ..., packed: once, when it is full, and never again."""
        if buffer < self._buffer:
            raise ProtocolError(f"the masks of buffer {buffer} were released before")
        if buffer > self._buffer or self._count < self._terms.goal:
            found = self._count if buffer == self._buffer else 0
            raise ProtocolError(f"buffer {buffer} holds {found} of {self._terms.goal} contributions")
        packed = self._terms.ring.pack(self._masks)
        self._masks, self._count = self._terms.ring.zeros(), 0
        self._buffer += 1
        return packed

    def close(self) -> None:
        """Nothing to end."""


class Host:
    """The untrusted side: it sums masked vectors and asks the enclave for the sum of the masks."""

    def __init__(self, terms: Terms, enclave: Enclave) -> None:
        self._terms, self._enclave = terms, enclave
        self._total, self.count, self.buffer = terms.ring.zeros(), 0, 0

    def add(self, contribution: Contribution) -> None:
        """Take a contribution.  `ProtocolError`, and nothing is summed on either side, for one of another session, of
        a wrong length, replayed or tampered with, or beyond `goal`."""
        if contribution.session != self._terms.session:
            raise ProtocolError(f"a contribution of client {contribution.client} of another session")
        masked = self._terms.ring.unpack(contribution.masked)
        self._enclave.accept(contribution.seed)
        self._total = self._terms.ring.reduce(self._total + masked)
        self.count += 1

    @property
    def full(self) -> bool:
        return self.count == self._terms.goal

    def release(self) -> Vector:
        """The sum of the buffer's vectors, (length,) uint64 below 2^bits; the next buffer begins.

        `ProtocolError` before `goal` contributions.
        """
        masks = self._terms.ring.unpack(self._enclave.release(self.buffer))
        total = self._terms.ring.reduce(self._total - masks)
        self._total, self.count, self.buffer = self._terms.ring.zeros(), 0, self.buffer + 1
        return total


def encoded(value: bytes) -> str:
    """Bytes as text, for the messages between processes."""
    return base64.b64encode(value).decode()


def decoded(text: object) -> bytes:
    """The inverse of `encoded`; `ProtocolError` for anything else."""
    try:
        return base64.b64decode(str(text), validate=True)
    except ValueError as error:
        raise ProtocolError("a message between processes that is not base64") from error
