"""Pages that the kernel gives a process: memory that was given back and is taken anew shows there."""

import platform
from pathlib import Path

import pytest

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told what to keep")


def page_faults(pid: int) -> int:
    """How many pages a process was given so far, each of them cleared."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])
