"""The cryptography of both protocols, all of it pycryptodome's: nothing here is a primitive of our own.

    key agreement       X25519 (RFC 7748), then HKDF-SHA256 (RFC 5869) with the session as its salt
    encryption          ChaCha20-Poly1305 (RFC 8439)
    shares of a secret  Shamir 1979 over GF(2^128); a secret of 32 bytes is split as two halves of 16

Every key is derived for one purpose, one session and one ordered pair of parties.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from Crypto.Cipher import ChaCha20, ChaCha20_Poly1305
from Crypto.Hash import SHA256
from Crypto.Protocol.DH import import_x25519_private_key, import_x25519_public_key, key_agreement
from Crypto.Protocol.KDF import HKDF
from Crypto.Protocol.SecretSharing import Shamir
from Crypto.PublicKey.ECC import EccKey
from Crypto.Random import get_random_bytes

from leakaudit.errors import InputError

Randomness = Callable[[int], bytes]
"""How many bytes -> so many random bytes."""

SEED_BYTES = KEY_BYTES = SECRET_BYTES = SHARE_BYTES = 32
NONCE_BYTES, TAG_BYTES = 12, 16
SEALED_OVERHEAD = NONCE_BYTES + TAG_BYTES
HALF = 16


class ProtocolError(InputError):
    """A message that a party refuses, or a protocol that cannot go on."""


operating_system: Randomness = get_random_bytes
"""The only source of randomness outside tests and simulation."""


def simulated_randomness(seed: int, name: str) -> Randomness:
    """Repeatable bytes, for tests and simulation ONLY: whoever knows the seed knows every key and every mask."""
    key = hashlib.sha256(f"leakaudit simulation {seed}/{name}".encode()).digest()
    stream = ChaCha20.new(key=key, nonce=bytes(12))
    return lambda count: stream.encrypt(bytes(count))


@dataclass(frozen=True)
class KeyPair:
    """An X25519 key pair; `private` is its 32 bytes."""

    private: bytes

    @classmethod
    def generate(cls, randomness: Randomness) -> KeyPair:
        return cls(randomness(KEY_BYTES))

    @cached_property
    def _key(self) -> EccKey:
        return import_x25519_private_key(self.private)

    @cached_property
    def public(self) -> bytes:
        """32 bytes."""
        raw: bytes = self._key.public_key().export_key(format="raw")
        return raw

    def agree(self, public: bytes, purpose: str, session: bytes, *parties: int) -> bytes:
        """32 bytes that only the two holders of the key pairs know, for this purpose, session and these parties.

        `ProtocolError` for a public key that is none, such as a point of small order.
        """
        info = b"/".join([b"leakaudit", purpose.encode(), *(b"%d" % party for party in parties)])

        def derive(shared: bytes | bytearray | memoryview) -> bytes:
            key = HKDF(bytes(shared), KEY_BYTES, salt=session, hashmod=SHA256, context=info)
            assert isinstance(key, bytes)
            return key

        try:
            agreed: bytes = key_agreement(
                static_priv=self._key, static_pub=import_x25519_public_key(public), kdf=derive
            )
        except ValueError as error:
            raise ProtocolError(f"a public key that is not one of X25519: {error}") from error
        return agreed


def seal(key: bytes, plain: bytes, about: bytes, randomness: Randomness) -> bytes:
    """nonce (12) || ciphertext || tag (16), which also vouches for `about`."""
    nonce = randomness(NONCE_BYTES)
    cipher = ChaCha20_Poly1305.new(key=key, nonce=nonce)
    cipher.update(about)
    secret, tag = cipher.encrypt_and_digest(plain)
    return nonce + secret + tag


def unseal(key: bytes, sealed: bytes, about: bytes) -> bytes:
    """The inverse of `seal`; `ProtocolError` where anything was changed."""
    if len(sealed) < SEALED_OVERHEAD:
        raise ProtocolError(f"a sealed message of {len(sealed)} bytes; accepted: {SEALED_OVERHEAD} or more")
    cipher = ChaCha20_Poly1305.new(key=key, nonce=sealed[:NONCE_BYTES])
    cipher.update(about)
    try:
        return cipher.decrypt_and_verify(sealed[NONCE_BYTES:-TAG_BYTES], sealed[-TAG_BYTES:])
    except ValueError as error:
        raise ProtocolError("a sealed message that was tampered with, or sealed for somebody else") from error


def split_secret(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """`count` shares (32 bytes each), of which any `threshold` give the secret (32 bytes) and fewer say nothing.

    Shamir's coefficients always come from the operating system, also in a simulation; no result depends on them.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret must have {SECRET_BYTES} bytes, got {len(secret)}")
    halves = [Shamir.split(threshold, count, part, False) for part in (secret[:HALF], secret[HALF:])]
    return [first + second for (_, first), (_, second) in zip(*halves, strict=True)]


def combine_shares(shares: Mapping[int, bytes]) -> bytes:
    """The secret (32 bytes) from exactly `threshold` shares by their position in `split_secret`'s list, from 0.

    Shares that do not belong together give bytes that mean nothing, as Shamir's scheme has it: check them.
    """
    first = [(index + 1, share[:HALF]) for index, share in shares.items()]
    second = [(index + 1, share[HALF:]) for index, share in shares.items()]
    return bytes(Shamir.combine(first, False)) + bytes(Shamir.combine(second, False))
