"""How this process keeps memory: buffers that bodies pass through are used again instead of given back each time."""

from typing import Final

from isthmus.allocator import keep_freed

LARGEST_KEPT_BYTES: Final = 4 << 20
KEPT_BYTES: Final = 16 << 20


def keep_buffers() -> None:
    """Keep freed buffers of bodies.

    The event loop reads 256 KiB at once, a block that glibc would take from the system for each read: for a body of
    100 MB that is three times the work of receiving it.
    """
    keep_freed(blocks_bytes=LARGEST_KEPT_BYTES, at_most_bytes=KEPT_BYTES)
