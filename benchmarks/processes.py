"""What processes cost, as the kernel tells it in /proc: CPU seconds and memory, of a process and all it started."""

import os
from collections.abc import Iterable
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def family(root: int) -> list[int]:
    """The process and all its descendants that live now."""
    children: dict[int, list[int]] = {}
    for pid in _pids():
        fields = _stat(pid)
        if fields:
            children.setdefault(int(fields[1]), []).append(pid)
    found, new = [], [root]
    while new:
        pid = new.pop()
        found.append(pid)
        new += children.get(pid, [])
    return found


def cpu_s(roots: Iterable[int]) -> float:
    """CPU seconds, user and system, of the processes, of their descendants, and of those of them that have ended."""
    return sum(_cpu_ticks(pid) for root in roots for pid in family(root)) / _TICKS


def peak_mb(pid: int) -> float:
    """The most memory that was resident at once, in MB of 10^6 bytes, since the start or `forget_peak`."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def resident_mb(pid: int) -> float:
    """What is resident now, in MB of 10^6 bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * _PAGE_BYTES / 1e6


def command_line(pid: int) -> str:
    """The words that a process was started with, between blanks."""
    return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace").replace("\0", " ")


def forget_peak(pid: int) -> None:
    """Let `peak_mb` begin at what is resident now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat behind the name, which may hold blanks; none if the process has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text[text.rindex(")") + 2 :].split()


def _cpu_ticks(pid: int) -> int:
    fields = _stat(pid)  # utime, stime, and the same of its children that ended and were waited for
    return sum(int(field) for field in fields[11:15]) if fields else 0
