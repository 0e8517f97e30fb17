"""Who was asked in one attempt of a round: the same list, in the same order, for everybody."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from pydantic import TypeAdapter, ValidationError

from isthmus.secagg.reading import Reader
from isthmus.secagg.violations import ProtocolViolation
from isthmus.wire.base import Name
from isthmus.wire.secured import LARGEST_COHORT, SMALLEST_COHORT

IDENTITY_BYTES: Final = 32
_LARGEST_WEIGHT: Final = (1 << 64) - 1
_NAME: Final[TypeAdapter[str]] = TypeAdapter(Name)


@dataclass(frozen=True)
class Member:
    """One participation that was asked."""

    organization: str
    dataset: str
    identity: bytes
    """The organization's Ed25519 public key."""
    weight: int
    """What its update counts for in the mean: 1, or the rows that its dataset declares."""

    def __post_init__(self) -> None:
        """Raises ValueError where a field cannot be written into a roster."""
        for name in (self.organization, self.dataset):
            _require_name(name)
        if len(self.identity) != IDENTITY_BYTES:
            raise ValueError(f"the identity of {self.organization} has {len(self.identity)} bytes, not 32")
        if not 1 <= self.weight <= _LARGEST_WEIGHT:
            raise ValueError(f"the weight of {self.organization} is {self.weight}, which is not in 1 to 2^64 - 1")

    @property
    def place(self) -> tuple[bytes, bytes]:
        """What rosters are sorted by."""
        return self.organization.encode(), self.dataset.encode()


@dataclass(frozen=True, init=False)
class Roster:
    """The members of an attempt. A member's index is its place here, from 0."""

    members: tuple[Member, ...]
    """Sorted by the bytes of the organization's name."""

    def __init__(self, members: Iterable[Member]) -> None:
        """Sort the members.

        Raises:
            ValueError: they are fewer than 3 or more than 512, or an organization or an identity comes twice: whoever
                is there twice would have two of the shares.
        """
        found = tuple(sorted(members, key=lambda member: member.place))
        if not SMALLEST_COHORT <= len(found) <= LARGEST_COHORT:
            raise ValueError(f"a roster has {SMALLEST_COHORT} to {LARGEST_COHORT} members, not {len(found)}")
        if len({member.organization for member in found}) < len(found):
            raise ValueError("an organization is in the roster twice")
        if len({member.identity for member in found}) < len(found):
            raise ValueError("two organizations of the roster have the same identity")
        object.__setattr__(self, "members", found)

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> Member:
        return self.members[index]

    def to_bytes(self) -> bytes:
        """The roster as it is hashed and sent."""
        parts = [len(self.members).to_bytes(4, "big")]
        for member in self.members:
            for name in member.place:
                parts += len(name).to_bytes(1, "big"), name
            parts += member.identity, member.weight.to_bytes(8, "big")
        return b"".join(parts)

    @classmethod
    def from_bytes(cls, raw: bytes) -> "Roster":
        """The roster that was sent.

        Raises:
            ProtocolViolation: the bytes are no roster, or not the one form of it.
        """
        reader = Reader(raw, "The roster")
        count = reader.u32()
        if count > LARGEST_COHORT:
            raise ProtocolViolation(f"The roster says that it has {count} members; {LARGEST_COHORT} is the most.")
        members = [(reader.name(), reader.name(), reader.take(IDENTITY_BYTES), reader.u64()) for _ in range(count)]
        reader.end()
        try:
            found = [Member(*fields) for fields in members]
            roster = cls(found)
        except ValueError as error:
            raise ProtocolViolation(f"The roster is not valid: {error}.") from error
        if roster.members != tuple(found):
            raise ProtocolViolation("The roster's members are not in their order.")
        return roster

    def digest(self) -> str:
        """SHA-256 of the bytes, in hex."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def _require_name(name: str) -> None:
    """Rosters come from the service, and people read their names in logs and lists, line by line.

    Raises:
        ValueError: the platform gives no such name. The message shows it in ASCII, control characters escaped.
    """
    try:
        _NAME.validate_python(name)
    except ValidationError:
        raise ValueError(
            f"{name!a} is no name: it has 1 to 63 of a-z, 0-9, '-', '_' and '.', beginning and ending with a letter or "
            "digit"
        ) from None
