"""Memory that is freed is used again: the kernel does not clear its pages anew each time."""

import resource
import subprocess
import sys

import pytest

from isthmus.allocator import LARGEST_BYTES, keep_freed
from tests.page_faults import glibc

FAULTS = """
import ctypes, resource
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: huge pages would be few
import numpy as np
from isthmus.allocator import LARGEST_BYTES, keep_freed
{first}
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    rooms = [np.full({megabytes} << 17, 1.0) for _ in range(2)]
    del rooms
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 2 * (1 << 20) // resource.getpagesize()
"""That two blocks of one MB have."""


def faults(first: str, megabytes: int) -> int:
    """How many pages the kernel hands out while a process allocates two blocks of so many MB fifty times."""
    program = FAULTS.format(first=first, megabytes=megabytes)
    return int(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, timeout=60).stdout)


@glibc
def test_blocks_are_cleared_once_and_not_fifty_times() -> None:
    keep = "keep_freed(blocks_bytes=LARGEST_BYTES, at_most_bytes=64 << 20)"
    assert faults(keep, megabytes=3) < 2 * 3 * PAGES


@glibc
def test_no_more_stays_than_is_said() -> None:
    keep = "keep_freed(blocks_bytes=LARGEST_BYTES, at_most_bytes=1 << 20)"
    assert faults(keep, megabytes=3) > 40 * 3 * PAGES


def test_blocks_that_glibc_would_not_keep_are_refused() -> None:
    with pytest.raises(ValueError, match="33554432 is the most"):
        keep_freed(blocks_bytes=LARGEST_BYTES + 1, at_most_bytes=1)
