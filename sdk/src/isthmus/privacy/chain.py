"""The hash chain of a ledger: whether its entries are those that were written, all of them and in their order.

Every entry carries the SHA-256 over the entry before it and all of its own fields, each with its length in front, so
that no two entries give the same bytes. The database chains them as they are written; anybody who holds the entries can
follow the chain with what stands here, from the genesis hash to the head.
"""

import hashlib
import struct
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

from isthmus.wire.base import canonical_json
from isthmus.wire.events import GENESIS
from isthmus.wire.ledger import LedgerEntryView

DOMAIN: Final = "isthmus/ledger-entry/v1"
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)


class ChainBroken(ValueError):
    """An entry was changed, left out, added or moved after it had been written.

    Attributes:
        sequence: the number of the first entry that does not stand as it was written.
    """

    def __init__(self, sequence: int, why: str) -> None:
        super().__init__(f"The ledger was tampered with at entry {sequence}: {why}.")
        self.sequence = sequence


def entry_hash(entry: LedgerEntryView) -> str:
    """The hash that an entry must carry, in hexadecimal: over `previous_hash` and everything that it says."""
    fields: Sequence[str | None] = (
        DOMAIN,
        entry.previous_hash,
        str(entry.id),
        str(entry.sequence),
        entry.kind.value,
        entry.lineage,
        str(entry.dataset_id),
        str(entry.job_id),
        str(entry.participation_id),
        _number(entry.round_number),
        entry.release,
        entry.mode,
        None if entry.event is None else canonical_json(entry.event).decode(),
        entry.orders_version,
        " ".join(map(str, entry.rdp_nano)),
        str(entry.draws),
        str(entry.elements),
        entry.digest,
        struct.pack(">d", entry.reserved_epsilon).hex(),
        struct.pack(">d", entry.spent_epsilon).hex(),
        str((entry.created_at - _EPOCH) // _MICROSECOND),
    )
    return hashlib.sha256(b"".join(map(_field, fields))).hexdigest()


def verify(
    entries: Iterable[LedgerEntryView], *, sequence: int = 0, head: str = GENESIS, until: tuple[int, str] | None = None
) -> tuple[int, str]:
    """Follow the chain over `entries`, in their order.

    Args:
        entries: a ledger's, or a stretch of them without gaps.
        sequence: the number of the entry before the first one; 0 at the beginning.
        head: the hash of the entry before the first one.
        until: (number, hash) with which they must end, where they are known: what was cut off at the end is seen only
            then.

    Returns:
        Number and hash of the last entry: the head, as far as the entries go.

    Raises:
        ChainBroken: an entry is not the one that was written at its place.
    """
    for entry in entries:
        sequence += 1
        if entry.sequence != sequence:
            raise ChainBroken(sequence, f"entry {entry.sequence} stands in its place")
        if entry.previous_hash != head:
            raise ChainBroken(sequence, "it does not follow the entry before it")
        if entry_hash(entry) != entry.hash:
            raise ChainBroken(sequence, "it does not have the hash that it was written with")
        head = entry.hash
    if until is not None and until != (sequence, head):
        raise ChainBroken(sequence + 1, f"the ledger's head is entry {until[0]}, and its entries do not end there")
    return sequence, head


def _number(value: int | None) -> str | None:
    return None if value is None else str(value)


def _field(value: str | None) -> bytes:
    if value is None:
        return b"-,"
    content = value.encode()
    return b"%d:%b," % (len(content), content)
