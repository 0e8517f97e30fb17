"""Large files on their way to the disk: writing back begins while the rest still comes, so that `fsync` is short."""

import sys
from collections.abc import Callable
from functools import cache
from typing import Final

STRETCH_BYTES: Final = 8 << 20
_SYNC_FILE_RANGE_WRITE: Final = 2


class Writeback:
    """Counts what is appended to a file, and has the kernel begin to write back every `STRETCH_BYTES` of it.

    This makes nothing durable: `fsync` still does, and has less left to do. Where the system has no such call, on
    anything but Linux, or its file system refuses it, nothing happens.
    """

    def __init__(self, descriptor: int, written: int = 0) -> None:
        self._descriptor = descriptor
        self._begun = written
        self._written = written

    def wrote(self, count: int) -> None:
        """So many more bytes were written at the end of the file."""
        self._written += count
        pending = self._written - self._begun
        if pending >= STRETCH_BYTES:
            _begin()(self._descriptor, self._begun, pending)
            self._begun = self._written


@cache
def _begin() -> Callable[[int, int, int], None]:
    """Begins to write a range of a file back, without waiting for it."""
    if not sys.platform.startswith("linux"):
        return _nothing
    import ctypes  # noqa: PLC0415 - an agent that moves small files only does without it

    try:
        call = ctypes.CDLL(None, use_errno=True).sync_file_range
    except (OSError, AttributeError):
        return _nothing
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)

    def begin(descriptor: int, offset: int, count: int) -> None:
        call(descriptor, offset, count, _SYNC_FILE_RANGE_WRITE)

    return begin


def _nothing(_descriptor: int, _offset: int, _count: int) -> None:
    """Leave it to the kernel."""
