"""Vectors of integers modulo 2^b: what is masked, sent and summed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from Crypto.Cipher import ChaCha20
from numpy.typing import NDArray

from leakaudit.federated.secure.primitives import SEED_BYTES, ProtocolError

Vector = NDArray[np.uint64]


@dataclass(frozen=True)
class Ring:
    """Vectors of `length` integers modulo 2^bits.

    Attributes:
        bits: 8 to 63.
        length: >= 1.

    A number takes ceil(bits / 8) bytes on the wire, little endian, and as many of a mask.
    """

    bits: int
    length: int

    def __post_init__(self) -> None:
        if not 8 <= self.bits <= 63:
            raise ValueError(f"the modulus must have 8 to 63 bits, got {self.bits}")
        if self.length < 1:
            raise ValueError(f"a vector must have at least 1 number, got {self.length}")

    @property
    def width(self) -> int:
        """Bytes of a number."""
        return -(-self.bits // 8)

    @property
    def size(self) -> int:
        """Bytes of a vector."""
        return self.width * self.length

    def zeros(self) -> Vector:
        return np.zeros(self.length, dtype=np.uint64)

    def reduce(self, vector: Vector) -> Vector:
        """Modulo 2^bits; arithmetic of uint64 wraps modulo 2^64, which 2^bits divides."""
        return vector & np.uint64((1 << self.bits) - 1)

    def check(self, vector: Vector) -> Vector:
        """The vector as given; `ProtocolError` unless it is (length,) uint64 below 2^bits."""
        if vector.shape != (self.length,) or vector.dtype != np.uint64:
            raise ProtocolError(
                f"a vector of shape {vector.shape} and type {vector.dtype};"
                f" accepted: ({self.length},) and uint64"
            )
        if int(vector.max()) >> self.bits:
            raise ProtocolError(f"a number of {int(vector.max())} is not below 2^{self.bits}")
        return vector

    def pack(self, vector: Vector) -> bytes:
        """The vector as `size` bytes; `ProtocolError` as `check` raises."""
        little = self.check(vector).astype("<u8", copy=False)
        return little.view(np.uint8).reshape(self.length, 8)[:, : self.width].tobytes()

    def unpack(self, packed: bytes) -> Vector:
        """The inverse of `pack`; `ProtocolError` for a wrong length or a number that is too large."""
        if len(packed) != self.size:
            raise ProtocolError(f"a vector of {len(packed)} bytes; accepted: {self.size}")
        return self.check(self._widened(packed))

    def expand(self, seed: bytes) -> Vector:
        """PRG(seed): `length` even numbers modulo 2^bits from the ChaCha20 key stream (RFC 8439) of a 256-bit seed.

        The nonce is zero: a seed is used for one stream only.
        """
        if len(seed) != SEED_BYTES:
            raise ValueError(f"a seed must have {SEED_BYTES} bytes, got {len(seed)}")
        stream = ChaCha20.new(key=seed, nonce=bytes(12)).encrypt(bytes(self.size))
        return self.reduce(self._widened(stream))

    def signed(self, vector: Vector) -> NDArray[np.int64]:
        """The representatives in [-2^(bits-1), 2^(bits-1))."""
        shift = np.uint64(64 - self.bits)
        return (vector << shift).view(np.int64) >> np.int64(64 - self.bits)

    def _widened(self, packed: bytes) -> Vector:
        wide = np.zeros((self.length, 8), dtype=np.uint8)
        wide[:, : self.width] = np.frombuffer(packed, dtype=np.uint8).reshape(self.length, self.width)
        return wide.reshape(-1).view("<u8").astype(np.uint64, copy=False)
