"""How the keys of an attempt come from its secrets: X25519 between two, HKDF-SHA256 with the context, no shortcuts.

Every key has 256 bits and is used for one thing only.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Final, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from isthmus.secagg.context import PROTOCOL
from isthmus.secagg.shamir import PRIME

KEY_BYTES: Final = 32
_FIELD: Final = 2**255 - 19  # that X25519 computes in
_PROBE: Final = X25519PrivateKey.from_private_bytes(bytes([64]) * KEY_BYTES)  # any: points of low order give 0 with all


@dataclass(frozen=True)
class Mask:
    """A mask that is added to a vector or taken off it. The key makes its words; see `isthmus.secagg.masks`."""

    key: bytes = field(repr=False)
    """32 bytes, a secret."""
    sign: Literal[1, -1]

    def __post_init__(self) -> None:
        """Raises ValueError where key or sign are not such."""
        if len(self.key) != KEY_BYTES or self.sign not in (1, -1):
            raise ValueError("a mask has a key of 32 bytes and is added (1) or taken off (-1)")


def public_key(secret: bytes) -> bytes:
    """The X25519 public key of 32 secret bytes."""
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def require_public_key(raw: bytes) -> None:
    """Goes on with a public key that secrets may be agreed with.

    Raises:
        ValueError: it is not in its one form, or one of the few points that everybody has the same "secret" with.
    """
    if int.from_bytes(raw, "little") >= _FIELD:
        raise ValueError("a public key is not in its canonical form")
    agree(_PROBE, raw)


def agree(secret: X25519PrivateKey, public: bytes) -> bytes:
    """What only the two owners of the keys know (X25519).

    Raises:
        ValueError: the public key is a point of low order, so that everybody would know it.
    """
    try:
        return secret.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise ValueError("a public key is a point of low order") from error


def derive(secret: bytes, info: bytes, length: int = KEY_BYTES) -> bytes:
    """HKDF-SHA256 under the protocol's salt."""
    return HKDF(SHA256(), length, PROTOCOL, info).derive(secret)


def channel_key(context: bytes, agreed: bytes, one: int, other: int) -> bytes:
    """What shares between two members are encrypted with, from what their channel keys agree on."""
    return derive(agreed, context + b"ch" + _pair(one, other))


def pair_mask_key(context: bytes, agreed: bytes, one: int, other: int) -> bytes:
    """What makes the mask between two members, from what their mask keys agree on."""
    return derive(agreed, context + b"pw" + _pair(one, other))


def pair_mask(context: bytes, agreed: bytes, mine: int, other: int) -> Mask:
    """The mask between two members, as the member `mine` applies it: the lower index adds, the higher takes off."""
    return Mask(pair_mask_key(context, agreed, mine, other), 1 if mine < other else -1)


def self_mask_key(context: bytes, seed: bytes) -> bytes:
    """What makes a member's own mask."""
    return derive(seed, context + b"self")


def commitment_to(context: bytes, seed: bytes) -> bytes:
    """What a member signs of the seed of its own mask, so that a wrongly rebuilt one is noticed."""
    return hashlib.sha256(b"b" + context + seed).digest()


def polynomial(context: bytes, coins: bytes, label: bytes, secret: bytes, threshold: int) -> list[int]:
    """The polynomial whose values are the shares of a secret: always the same for the same coins.

    A member that crashed makes the very same shares again. 512 bits modulo the prime are as good as uniform.
    """
    coefficients = (
        int.from_bytes(derive(coins, context + label + power.to_bytes(4, "big"), 64), "big") % PRIME
        for power in range(1, threshold)
    )
    return [int.from_bytes(secret, "big"), *coefficients]


def is_signed(identity: bytes, signature: bytes, message: bytes) -> bool:
    """Whether the Ed25519 signature of the message is of this identity."""
    try:
        Ed25519PublicKey.from_public_bytes(identity).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def _pair(one: int, other: int) -> bytes:
    return min(one, other).to_bytes(4, "big") + max(one, other).to_bytes(4, "big")
