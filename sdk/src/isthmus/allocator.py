"""How a process keeps memory that it has freed: the allocator of glibc, told what it is used for.

By its defaults glibc takes large blocks from the system and gives them back when they are freed, each time; the kernel
clears every page of them anew. That is more work than most of what passes through them. musl and macOS have other
allocators: there nothing here does anything.
"""

import ctypes
import sys
from functools import cache
from typing import Final

LARGEST_BYTES: Final = 32 << 20
"""A larger block comes from the system and goes back there, unless the free end of the heap has room for it."""

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3


def keep_freed(*, blocks_bytes: int, at_most_bytes: int) -> None:
    """Have freed memory used again instead of given back.

    Args:
        blocks_bytes: blocks up to this size are kept; at most LARGEST_BYTES.
        at_most_bytes: where no more than that is free at the end of the heap, it stays with the process; where more
            is, nearly all of it goes back.

    Raises:
        ValueError: larger blocks than can be kept.
    """
    if blocks_bytes > LARGEST_BYTES:
        raise ValueError(f"blocks of {blocks_bytes} bytes cannot be kept; {LARGEST_BYTES} is the most")
    if (library := _glibc()) is not None:
        library.mallopt(_M_MMAP_THRESHOLD, blocks_bytes)
        library.mallopt(_M_TRIM_THRESHOLD, at_most_bytes)


@cache
def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        library = ctypes.CDLL(None)
    except OSError:  # a Python that loads no libraries
        return None
    return library if hasattr(library, "gnu_get_libc_version") else None
