"""How this process keeps memory: buffers that bodies pass through are used again instead of given back each time."""

import contextlib
import ctypes
import sys
from typing import Final

LARGEST_KEPT_BYTES: Final = 4 << 20
"""A buffer up to this size comes from the heap; a larger one from the system, and goes back there."""
KEPT_BYTES: Final = 16 << 20
"""So much free memory at most stays with the process at the end of its heap."""

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3


def keep_buffers() -> None:
    """Have the allocator of glibc keep freed buffers of bodies.

    By its defaults it takes a buffer of 256 KiB, which is what the event loop reads at once, from the system and gives
    it back, once for each read. The kernel clears every page of it anew: for a body of 100 MB that is three times the
    work of receiving it. Elsewhere (musl, macOS) this does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
