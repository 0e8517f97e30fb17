"""Whether two files hold the same records, told from a thousand hashes of each.

Of all distinct records the hashes that are smallest are kept (a bottom-k sketch). They are a fair sample, the same one
wherever the same records are, in whatever order: the share of them that two files have in common is the share of their
records that they have in common.
"""

import heapq
from collections.abc import Iterable
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

KEPT: Final = 1024
"""Hashes of a sketch. The share in common is told to about 2 percentage points."""
ALIKE: Final = 0.5
"""From so much of the smaller file's records in the larger one, cell for cell, the two are the same data to us."""
FEWEST: Final = 20
"""Fewer distinct records tell nothing."""
_HASH_BYTES: Final = 8
_SPACE: Final = 1 << (8 * _HASH_BYTES)


class Sketch(BaseModel):
    """What is kept of a file's records. It stays with the worker: hashes of records can be guessed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    records: int = Field(ge=0)
    smallest: tuple[Annotated[str, StringConstraints(pattern="^[0-9a-f]{16}$")], ...] = Field(max_length=KEPT)
    """The smallest hashes of distinct records, ascending."""

    @property
    def distinct(self) -> float:
        """About how many different records there are; exactly, where there are fewer than `KEPT`."""
        if len(self.smallest) < KEPT:
            return float(len(self.smallest))
        return (KEPT - 1) * _SPACE / max(1, int(self.smallest[-1], 16))

    @property
    def tells(self) -> bool:
        """Whether records say which data they are of. In a table of few columns with few values they do not."""
        return self.distinct >= FEWEST and self.distinct >= self.records / 2


def sketch_of(fingerprints: Iterable[bytes]) -> Sketch:
    """The sketch of records, each given by a hash over all its cells of at least 8 bytes."""
    heap, held, records = list[int](), set[int](), 0  # the heap holds negatives: its first is the largest that is kept
    for fingerprint in fingerprints:
        records += 1
        value = int.from_bytes(fingerprint[:_HASH_BYTES], "big")
        if value in held or (len(heap) == KEPT and value > -heap[0]):
            continue
        held.add(value)
        if len(heap) < KEPT:
            heapq.heappush(heap, -value)
        else:
            held.discard(-heapq.heappushpop(heap, -value))
    return Sketch(records=records, smallest=tuple(f"{value:016x}" for value in sorted(held)))


def overlap(one: Sketch, other: Sketch) -> float:
    """About which share of the smaller one's distinct records is also in the other; 0 where one is empty."""
    ours, theirs = set(one.smallest), set(other.smallest)
    sample = sorted(ours | theirs)[:KEPT]  # all that is below in either file is in its sketch
    if not ours or not theirs:
        return 0.0
    common = sum(value in ours and value in theirs for value in sample) / len(sample)
    union = (one.distinct + other.distinct) / (1.0 + common)
    return min(1.0, common * union / min(one.distinct, other.distinct))


def alike(one: Sketch, other: Sketch) -> bool:
    """Whether two files are the same data to us: at least half of the smaller one is in the other."""
    return one.tells and other.tells and overlap(one, other) >= ALIKE
