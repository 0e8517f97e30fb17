"""Reads the service's answers: whatever is not exactly as it should be is a violation."""

from itertools import pairwise
from typing import Final

from isthmus.secagg.violations import ProtocolViolation

_NUMBER_BYTES: Final = 4


class Reader:
    """Goes through the bytes of one answer."""

    def __init__(self, raw: bytes, what: str) -> None:
        """Begin at the first byte.

        Args:
            raw: the answer.
            what: what it is, as the beginning of a sentence: "The answer to keys".
        """
        self._raw = raw
        self._what = what
        self._at = 0

    def take(self, count: int) -> bytes:
        """The next so many bytes. Raises ProtocolViolation where there are fewer."""
        found = self._raw[self._at : self._at + count]
        if len(found) < count:
            raise ProtocolViolation(f"{self._what} ends too early.")
        self._at += count
        return found

    def u32(self) -> int:
        """The next number, of 4 bytes."""
        return int.from_bytes(self.take(_NUMBER_BYTES), "big")

    def u64(self) -> int:
        """The next number, of 8 bytes."""
        return int.from_bytes(self.take(2 * _NUMBER_BYTES), "big")

    def name(self) -> str:
        """The next text, of a length that its first byte tells. Raises ProtocolViolation where it is not UTF-8."""
        try:
            return self.take(self.take(1)[0]).decode()
        except UnicodeDecodeError as error:
            raise ProtocolViolation(f"{self._what} has a name that is not UTF-8.") from error

    def indices(self) -> tuple[int, ...]:
        """The next count and so many numbers, each greater than the one before. Raises ProtocolViolation if not."""
        count = self.u32()
        raw = self.take(count * _NUMBER_BYTES)
        found = tuple(int.from_bytes(raw[at : at + 4], "big") for at in range(0, len(raw), _NUMBER_BYTES))
        self.require_ascending(found)
        return found

    def require_ascending(self, indices: tuple[int, ...]) -> None:
        """Raises ProtocolViolation unless each is greater than the one before."""
        if any(later <= earlier for earlier, later in pairwise(indices)):
            raise ProtocolViolation(f"{self._what} names members twice or not in their order.")

    def end(self) -> None:
        """Raises ProtocolViolation where bytes are left."""
        left = len(self._raw) - self._at
        if left:
            raise ProtocolViolation(f"{self._what} has {left} bytes more than belong to it.")
