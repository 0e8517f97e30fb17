"""The parts that messages are made of, as bytes."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from isthmus.secagg.derivation import KEY_BYTES, is_signed, require_public_key
from isthmus.secagg.shamir import SHARE_BYTES

SIGNATURE_BYTES: Final = 64
ADVERTISEMENT_BYTES: Final = 4 + 3 * KEY_BYTES + SIGNATURE_BYTES
"""What a keys message has."""
SEALED_BYTES: Final = 2 * SHARE_BYTES + 16
"""Two shares for one recipient, encrypted, with their tag."""
REVEALED_BYTES: Final = 4 + 1 + SHARE_BYTES
"""One entry of an unmask message."""
OWN_MASK: Final = 0
"""The kind of a revealed share: of the seed of a survivor's own mask."""
MASK_KEY: Final = 1
"""The kind of a revealed share: of the mask key of a member that left."""


@dataclass(frozen=True)
class Advertisement:
    """A keys message: a member's fresh public keys and the commitment to the seed of its own mask, signed."""

    index: int
    channel: bytes
    """X25519 public key, 32 bytes, for the encryption of shares."""
    mask: bytes
    """X25519 public key, 32 bytes, for the masks between two."""
    commitment: bytes
    signature: bytes

    @classmethod
    def from_bytes(cls, raw: bytes) -> "Advertisement":
        """The fields of a message of `ADVERTISEMENT_BYTES`; nothing is checked yet."""
        return cls(int.from_bytes(raw[:4], "big"), raw[4:36], raw[36:68], raw[68:100], raw[100:])

    def to_bytes(self) -> bytes:
        """The message."""
        return self.fields() + self.signature

    def fields(self) -> bytes:
        """What is signed of it, but for the context."""
        return u32s([self.index]) + self.channel + self.mask + self.commitment

    def require_valid(self, context: bytes, identity: bytes) -> None:
        """Goes on with keys that may be used.

        Raises:
            ValueError: the signature is not this identity's for this context, or a key cannot be used.
        """
        if not is_signed(identity, self.signature, keys_statement(context, self.fields())):
            raise ValueError("the signature of the keys is not this identity's, for this attempt")
        require_public_key(self.channel)
        require_public_key(self.mask)


def u32s(numbers: Iterable[int]) -> bytes:
    """Big-endian numbers of 4 bytes each."""
    return b"".join(number.to_bytes(4, "big") for number in numbers)


def keys_statement(context: bytes, fields: bytes) -> bytes:
    """What a member signs of its keys."""
    return b"isthmus/secagg/keys" + context + fields


def survivors_statement(context: bytes, survivors: Iterable[int]) -> bytes:
    """What a member signs of the set of those whose vectors are in the sum."""
    return b"isthmus/secagg/survivors" + context + hashlib.sha256(u32s(survivors)).digest()
