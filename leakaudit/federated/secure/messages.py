"""What the parties of Bonawitz et al. 2017 send each other, in the order of the protocol.

`size` is in bytes on the wire: a header of 24 (session 16, sender 4, receiver 4) and the fields as they are;
a client's number takes 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from leakaudit.federated.secure.primitives import KEY_BYTES, SHARE_BYTES

SESSION_BYTES = 16
NUMBER_BYTES = 4
HEADER_BYTES = SESSION_BYTES + 2 * NUMBER_BYTES
COMMITMENT_BYTES = 32


@dataclass(frozen=True)
class FromClient:
    """Attributes:
    session: 16 bytes, the same in all messages of one run of the protocol.
    sender: the client's number.
    """

    session: bytes
    sender: int


@dataclass(frozen=True)
class FromServer:
    """Attributes:
    session: as of `FromClient`.
    """

    session: bytes


@dataclass(frozen=True)
class KeyAdvertisement(FromClient):
    """Round 0, client: the public keys for encryption (c) and for masks (s), 32 bytes each."""

    encryption_key: bytes
    mask_key: bytes

    @property
    def size(self) -> int:
        return HEADER_BYTES + 2 * KEY_BYTES


@dataclass(frozen=True)
class KeyList(FromServer):
    """Round 0, server: everybody's advertisement, by client."""

    keys: Mapping[int, KeyAdvertisement]

    @property
    def size(self) -> int:
        return HEADER_BYTES + len(self.keys) * (NUMBER_BYTES + 2 * KEY_BYTES)


@dataclass(frozen=True)
class EncryptedShares(FromClient):
    """Round 1, client: a sealed pair of shares for every other client; and, which the paper has not, a hash of the
    seed of its own mask, so that the server notices a wrong share of it."""

    sealed: Mapping[int, bytes]
    seed_commitment: bytes

    @property
    def size(self) -> int:
        return (
            HEADER_BYTES + COMMITMENT_BYTES + sum(NUMBER_BYTES + len(share) for share in self.sealed.values())
        )


@dataclass(frozen=True)
class RelayedShares(FromServer):
    """Round 1, server: what the others sealed for this client, by sender."""

    sealed: Mapping[int, bytes]

    @property
    def size(self) -> int:
        return HEADER_BYTES + sum(NUMBER_BYTES + len(share) for share in self.sealed.values())


@dataclass(frozen=True)
class MaskedInput(FromClient):
    """Round 2, client: its vector under all masks, packed as `leakaudit.federated.secure.ring.Ring` packs."""

    vector: bytes

    @property
    def size(self) -> int:
        return HEADER_BYTES + len(self.vector)


@dataclass(frozen=True)
class UnmaskRequest(FromServer):
    """Round 2, server: whose masked vectors arrived (survivors), and whose did not although they shared keys."""

    survivors: frozenset[int]
    dropouts: frozenset[int]

    @property
    def size(self) -> int:
        return HEADER_BYTES + NUMBER_BYTES * (len(self.survivors) + len(self.dropouts))


@dataclass(frozen=True)
class RevealedShares(FromClient):
    """Round 3, client: shares (32 bytes) of the survivors' seeds and of the dropouts' mask keys, by client."""

    seeds: Mapping[int, bytes]
    mask_keys: Mapping[int, bytes]

    @property
    def size(self) -> int:
        return HEADER_BYTES + (len(self.seeds) + len(self.mask_keys)) * (NUMBER_BYTES + SHARE_BYTES)


ClientMessage = KeyAdvertisement | EncryptedShares | MaskedInput | RevealedShares
