"""The processes of a peer: started in one temporary folder, watched, and ended whatever happens."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Final

from benchmarks.processes import command_line, cpu_s, family, resident_mb

Shape = tuple[int, ...]

START_S: Final = 60.0
ROUND_S: Final = 120.0
"""A peer that needs longer for one round is given up."""
LOOK_S: Final = 0.2


@dataclass(frozen=True)
class Ended:
    """A round that ended: when, in seconds of any clock, and how many updates were in it."""

    at_s: float
    updates: int


@dataclass(frozen=True)
class PeerRounds:
    """What a peer's rounds took."""

    seconds: tuple[float, ...]
    """Each from the end of the round before to its own, without the first."""
    cpu_s_per_round: float
    """CPU seconds of all its processes, a round, over the rounds that are counted."""
    server_peak_mb: float
    """Most memory that its server's processes had together, looked at every LOOK_S, in MB of 10^6 bytes."""


@dataclass
class Site:
    """A folder, and the processes that were started in it."""

    folder: Path
    environment: dict[str, str]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, *command: object) -> subprocess.Popen[bytes]:
        """Start a process that stays, in a group of its own; its log is `<name>.log`."""
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [str(word) for word in command], cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        return self.processes[name]

    def call(self, *command: object) -> None:
        """Run a process to its end.

        Raises:
            RuntimeError: it failed, or took too long.
        """
        try:
            done = subprocess.run(
                [str(word) for word in command], cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL,
                capture_output=True, text=True, timeout=START_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{command[0]} took longer than {START_S:g} s") from error
        if done.returncode != 0:
            raise RuntimeError(f"{command[0]} failed: {(done.stdout + done.stderr)[-800:]}")

    def wait_for_port(self, port: int) -> None:
        """Wait until somebody listens there."""
        deadline = time.monotonic() + START_S
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"nobody listens on port {port}: {self.last_words()}")
            self.require_alive()
            time.sleep(0.05)

    def require_alive(self) -> None:
        """Raise RuntimeError if a process has ended."""
        ended = [name for name, process in self.processes.items() if process.poll() is not None]
        if ended:
            raise RuntimeError(f"{', '.join(ended)} ended: {self.last_words(*ended)}")

    def last_words(self, *names: str) -> str:
        """The ends of the logs."""
        logs = [self.folder / f"{name}.log" for name in names or self.processes]
        return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-600:]}" for log in logs if log.exists())

    def cpu_s(self) -> float:
        """CPU seconds of all processes so far, with all that they started."""
        return cpu_s(process.pid for process in self.processes.values())


@contextmanager
def site(environment: Mapping[str, str]) -> Iterator[Site]:
    """A folder for a peer, with this environment besides our own; nothing of it is left."""
    folder = Path(tempfile.mkdtemp(prefix="isthmus-peer-"))
    ours = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    here = Site(folder, {**ours, **environment})
    try:
        yield here
    finally:
        _end(here.processes.values())
        shutil.rmtree(folder, ignore_errors=True)


def rounds_told(
    here: Site,
    told: Callable[[], list[Ended]],
    *,
    server: subprocess.Popen[bytes],
    clients: int,
    rounds: int,
    not_server: str | None = None,
) -> PeerRounds:
    """Wait until a peer has ended so many rounds.

    Args:
        told: the rounds that have ended so far.
        server: the process whose memory is looked at, with what it started.
        not_server: a word in the command lines of those descendants that are no part of the server.

    Raises:
        RuntimeError: a process ended, a round took too long, or an update was missing.
    """
    ended: list[Ended] = []
    began_cpu_s, counted_from = 0.0, 0
    deadline = time.monotonic() + START_S + ROUND_S
    with _peak_of(server.pid, not_server) as peak_mb:
        while len(ended) < rounds:
            time.sleep(0.02)
            now = told()
            if len(now) > len(ended):
                if not ended:
                    began_cpu_s, counted_from = here.cpu_s(), len(now)
                ended, deadline = now, time.monotonic() + ROUND_S
            elif time.monotonic() > deadline:
                raise RuntimeError(f"no round ended in {ROUND_S:g} s; {len(ended)} had before: {here.last_words()}")
            else:
                here.require_alive()
        spent_s = here.cpu_s() - began_cpu_s
        most_mb = peak_mb()
    if {one.updates for one in ended} != {clients}:
        raise RuntimeError(f"of {clients} clients, so many were in the rounds: {[one.updates for one in ended]}")
    seconds = tuple(later.at_s - earlier.at_s for earlier, later in pairwise(ended))
    return PeerRounds(seconds, spent_s / (len(ended) - counted_from), most_mb)


@contextmanager
def _peak_of(root: int, without: str | None) -> Iterator[Callable[[], float]]:
    """Look at the memory of a process and its descendants all the time; gives a function that says the most."""
    most, over = [0.0], threading.Event()

    def look() -> None:
        while not over.wait(LOOK_S):
            total = 0.0
            for pid in family(root):
                with suppress(OSError):
                    if without is None or without not in command_line(pid):
                        total += resident_mb(pid)
            most[0] = max(most[0], total)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield lambda: most[0]
    finally:
        over.set()
        thread.join()


def _end(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """End the processes with all that they started, at once: nothing of theirs is kept."""
    started = {process.pid: family(process.pid) for process in processes if process.poll() is None}
    for leader, members in started.items():
        with suppress(ProcessLookupError):
            os.killpg(leader, signal.SIGKILL)
        for pid in members:  # some may have left the group
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    for process in processes:
        process.wait()
