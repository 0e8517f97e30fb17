"""Processes of the demo: started with a log each, recorded in a file, and ended to the last one.

The file says which processes are ours, so that another run can see and end them: each by its id *and* the moment it
was born, because ids are used again. Nothing else is ever ended.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

DEMO: Final = "demo"
"""Ended first, for it ends the others."""
SERVICE: Final = "service"
"""Ended last: the others work for it."""
PATIENCE_S: Final = 15.0
"""So long a process may take to end by itself."""
TAIL_LINES: Final = 15
_PR_SET_PDEATHSIG: Final = 1
_LIBC: Final = ctypes.CDLL(None) if sys.platform == "linux" else None


class ProcessDied(Exception):
    """A process ended that should not have."""

    def __init__(self, name: str, code: int, log: Path) -> None:
        super().__init__(f"{name} ended with exit code {code}.")
        self.log = log


@dataclass(frozen=True)
class Process:
    """One process, by what nobody else has: its id and when it was born."""

    name: str
    pid: int
    born: str

    def lives(self) -> bool:
        """Whether this very process runs. A zombie does not."""
        return birth(self.pid) == self.born


class Processes:
    """The processes of one demo, in `folder`. Start them from the main thread: they hear of its end."""

    def __init__(self, folder: Path, *, keep: bool) -> None:
        self._logs = folder / "logs"
        self._record = record_in(folder)
        self._keep = keep
        self._started: list[tuple[Process, subprocess.Popen[bytes]]] = []
        self._logs.mkdir()
        self._write()

    def start(
        self,
        name: str,
        command: Sequence[str | Path],
        *,
        folder: Path,
        environment: Mapping[str, str] | None = None,
        text: str | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a command in `folder`, in a session of its own; what it says goes to its log, `text` to its input."""
        with self.log(name).open("ab") as log:
            process = subprocess.Popen(
                [str(word) for word in command],
                cwd=folder,
                env={**environment_of_a_process(), **(environment or {})},
                stdin=subprocess.DEVNULL if text is None else subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C in the terminal is for the demo, which ends them in order
                preexec_fn=None if self._keep else _die_with_the_demo,  # noqa: PLW1509 - one call of libc, no threads
            )
        self._started.append((Process(name, process.pid, birth(process.pid) or "gone"), process))
        self._write()
        if text is not None and process.stdin is not None:
            with suppress(BrokenPipeError), process.stdin as pipe:
                pipe.write(text.encode())
        return process

    def await_end(self, name: str) -> None:
        """Wait until a command is done.

        Raises:
            ProcessDied: it ended with an error.
        """
        process = next(process for found, process in self._started if found.name == name)
        code = process.wait()
        self._started = [(found, process) for found, process in self._started if found.name != name]
        self._write()
        if code != 0:
            raise ProcessDied(name, code, self.log(name))

    def require_all(self) -> None:
        """Make sure that everything still runs.

        Raises:
            ProcessDied: something does not.
        """
        for found, process in self._started:
            code = process.poll()
            if code is not None:
                raise ProcessDied(found.name, code, self.log(found.name))

    def await_that(self, condition: Callable[[], bool], what: str, patience_s: float = 60.0) -> None:
        """Wait for something that the processes bring about.

        Raises:
            ProcessDied: one of them ended.
            TimeoutError: it did not happen.
        """
        deadline = time.monotonic() + patience_s
        while not condition():
            self.require_all()
            if time.monotonic() > deadline:
                raise TimeoutError(f"Waited for {patience_s:.0f} s: {what}.")
            time.sleep(0.05)

    def log(self, name: str) -> Path:
        """Where a process writes what it has to say."""
        return self._logs / f"{name}.log"

    def stop(self) -> None:
        """End them all; nothing is left afterwards."""
        stop([found for found, _process in self._started], self._reap)
        self._started = []
        self._write()

    def _reap(self) -> None:
        for _found, process in self._started:
            process.poll()

    def _write(self) -> None:
        ourselves = Process(DEMO, os.getpid(), birth(os.getpid()) or "gone")
        partial = self._record.with_suffix(".new")
        partial.write_text(
            json.dumps(
                [asdict(found) for found in (ourselves, *(found for found, _process in self._started))], indent=2
            )
        )
        partial.replace(self._record)


def stop(processes: Sequence[Process], reap: Callable[[], object] = lambda: None) -> None:
    """End processes: a demo itself, then the workers, all at once, then the service. Who does not listen is killed.

    Args:
        reap: lets go of our own children, which else stay zombies.
    """
    turns = {DEMO: 0, SERVICE: 2}
    for turn in range(3):
        group = [process for process in processes if turns.get(process.name, 1) == turn]
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in group:
                if process.lives():
                    with suppress(ProcessLookupError):
                        os.kill(process.pid, number)
            deadline = time.monotonic() + PATIENCE_S
            while any(process.lives() for process in group) and time.monotonic() < deadline:
                reap()
                time.sleep(0.02)


def recorded(folder: Path) -> list[Process]:
    """The processes that a demo in `folder` recorded and that still run."""
    try:
        found = json.loads(record_in(folder).read_text())
    except FileNotFoundError:
        return []
    return [process for process in (Process(**one) for one in found) if process.lives()]


def record_in(folder: Path) -> Path:
    """The file that says which processes belong to a demo, and that a folder is a demo's."""
    return folder / "processes.json"


def birth(pid: int) -> str | None:
    """When a process was born, in the system's own words; None if it does not run."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self").exists():
            return None
        told = subprocess.run(
            ["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
        )
        state, _, born = told.stdout.strip().partition(" ")
        return None if state.startswith("Z") or not born else born.strip()
    return None if state in ("Z", "X") else fields[18]


def command(name: str) -> Path:
    """A command of ours, beside the interpreter that runs this."""
    return Path(sys.executable).with_name(name)


def environment_of_a_process() -> dict[str, str]:
    """Ours, without the settings that would make the demo another one."""
    return {name: value for name, value in os.environ.items() if not name.startswith("ISTHMUS_")}


def tail(log: Path) -> str:
    """The last lines of a log."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-TAIL_LINES:])


def _die_with_the_demo() -> None:
    """Between fork and exec: SIGTERM reaches this process when the demo is killed so hard that it cannot say it."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
