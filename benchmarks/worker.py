"""What a worker costs beside its training: its start, its memory while it waits, and its share of a task's time.

    python -m benchmarks.worker

The service, Postgres and the agents are real processes with their defaults. The start runs from the spawn of
`isthmus-worker run` until the bytes of its first claim pass a relay in front of the service. A task runs from the
claim's answer to the receipt; time in training and time spent waiting for the service are taken off, and what is left
is the worker's own overhead, part by part (see `traced_worker`). The other worker of the job begins late, so that it is
not measured as well.
"""

import argparse
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.federation import environment, federation, trivial_job
from benchmarks.processes import cpu_s, family, resident_mb
from benchmarks.tables import Report, Spread, arguments, numbers
from tests.acceptance.island import Island, until, write_patients

TRACED = Path(__file__).parent / "traced_worker"
COLD_TASKS = 3
LATE_S = 0.35
CLAIM = b"POST /v1/tasks/claim"

HTTP = ("Tasks.download_model", "Tasks.submit_update")
"""Time for the service, but for what is done between admission and body."""


class Relay:
    """A port that passes everything on to the service, and notes when a claim first went by."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.claimed_at: float | None = None
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                inner, _ = self._listener.accept()
                outer = socket.create_connection(("127.0.0.1", self._target))
                for one in (inner, outer):
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._pass_on, args=(inner, outer, True), daemon=True).start()
                threading.Thread(target=self._pass_on, args=(outer, inner, False), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, watched: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if watched and self.claimed_at is None and CLAIM in data:
                    self.claimed_at = time.monotonic()
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()


@contextlib.contextmanager
def agent(folder: Path, relay: Relay) -> Iterator[tuple[subprocess.Popen[bytes], float]]:
    """The agent of a site as a process without any tracing, and when it was started."""
    relay.claimed_at = None
    command = [str(Path(sys.executable).parent / "isthmus-worker"), "run", "--config", "worker.toml"]
    with (folder / "agent.log").open("ab") as log:
        began = time.monotonic()
        process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield process, began
    finally:
        process.terminate()
        process.wait(20)


def proportional_mb(pid: int) -> float:
    """Resident memory with pages that are shared counted in parts (PSS), in MB of 10^6 bytes."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def measure_start(report: Report, island: Island, repetitions: int) -> None:
    """Start the first site's agent again and again, over 500 records."""
    site = island.folder / "clinic-0"
    write_patients(site / "patients.csv", 0, rows=500)
    port = urlsplit(island.url).port
    assert port is not None
    relay = Relay(port)
    toml = site / "worker.toml"
    toml.write_text(toml.read_text().replace(f":{port}", f":{relay.port}"))
    seconds, cpu, resident, proportional = [], [], [], []
    for _ in range(repetitions):
        with agent(site, relay) as (process, began):
            until(lambda: relay.claimed_at, "the agent asks for work")
            assert relay.claimed_at is not None
            seconds.append(relay.claimed_at - began)
            cpu.append(cpu_s([process.pid]))
            until(lambda pid=process.pid: family(pid) == [pid], "the child that described the data has ended")
            time.sleep(0.5)
            resident.append(resident_mb(process.pid))
            proportional.append(proportional_mb(process.pid))
    relay.close()
    toml.write_text(toml.read_text().replace(f":{relay.port}", f":{port}"))
    report.row(Spread.of(seconds), Spread.of(cpu), Spread.of(resident), Spread.of(proportional))


@dataclass(frozen=True, slots=True)
class Span:
    """One call of a traced function."""

    name: str
    began: float
    ended: float
    cpu_s: float

    @property
    def ms(self) -> float:
        """How long it took."""
        return (self.ended - self.began) * 1000


def spans_of(site: Path) -> list[Span]:
    """What the processes of a site noted."""
    found = []
    for path in (site / "traces").iterdir():
        for line in path.read_text(encoding="ascii").splitlines():
            name, began, ended, cpu_s = line.split(" ")
            found.append(Span(name, float(began), float(ended), float(cpu_s)))
    return sorted(found, key=lambda one: one.began)


def tasks_of(spans: list[Span]) -> list[dict[str, float]]:
    """Each training task's parts in milliseconds, and its `total`, from the claim's answer to the receipt."""
    claims = [one.ended for one in spans if one.name == "Tasks.claim"]
    tasks = []
    for serve in (one for one in spans if one.name == "Agent.serve"):
        inside = [one for one in spans if serve.began <= one.began and one.ended <= serve.ended]
        receipts = [one.ended for one in inside if one.name == "Tasks.submit_update"]
        if not receipts or not any(one.name == "train" for one in inside):
            continue
        answered = max(ended for ended in claims if ended <= serve.began)
        parts: dict[str, float] = defaultdict(float)
        for one in inside:
            parts[one.name] += one.ms
            parts[f"{one.name} (CPU)"] += one.cpu_s * 1000
        parts["total"] = (receipts[-1] - serve.began) * 1000
        parts["afterwards"] = (serve.ended - receipts[-1]) * 1000
        parts["before"] = (serve.began - answered) * 1000
        parts["of the service"] = sum(parts[name] for name in HTTP) - parts["Journal.mark_released"]
        parts["overhead"] = parts["total"] - parts["train"] - parts["of the service"]
        # Both of our processes; what the client computes while it speaks to the service is not taken off here.
        parts["overhead (CPU)"] = parts["Agent.serve (CPU)"] + parts["Desk.perform (CPU)"] - parts["train (CPU)"]
        tasks.append(parts)
    return tasks


def measure_tasks(
    report: Report, island: Island, sizes: list[float], rounds: int
) -> dict[float, list[dict[str, float]]]:
    """Jobs of these sizes, whose first worker is watched."""
    (island.folder / "clinic-1" / "late").write_text(str(LATE_S))
    found = {}
    for megabytes in sizes:
        before = len(tasks_of(spans_of(island.folder / "clinic-0")))
        island.finish(island.submit(trivial_job(megabytes, rounds + COLD_TASKS, 2)))
        tasks = tasks_of(spans_of(island.folder / "clinic-0"))[before + COLD_TASKS :]
        found[megabytes] = tasks

        def column(name: str, tasks: list[dict[str, float]] = tasks) -> Spread:
            return Spread.of(task[name] for task in tasks)

        process = island.agents[0].process
        assert process is not None
        agent_pid, *children = family(process.pid)
        report.row(
            megabytes,
            len(tasks),
            column("overhead"),
            column("overhead").percentile(0.9),
            column("of the service"),
            column("train"),
            column("afterwards"),
            resident_mb(agent_pid),
            sum(map(resident_mb, children)),
            proportional_mb(agent_pid) + sum(map(proportional_mb, children)),
        )
    return found


def main() -> None:
    """The command."""
    parser = arguments("worker", __doc__)
    parser.add_argument("--starts", type=int, default=7, help="how often the agent is started")
    parser.add_argument("--sizes", default="0.25", help="sizes of the model in MB")
    parser.add_argument("--rounds", type=int, default=40, help="tasks that are timed, for each size")
    parser.add_argument("--tasks", action=argparse.BooleanOptionalAction, default=True, help="time tasks as well")
    options = parser.parse_args()
    report = Report(
        "worker",
        "Start of the agent, over 500 records",
        ["s to its first poll", "CPU s until then", "idle, resident MB", "idle, proportional MB (PSS)"],
    )
    plain = os.environ.get("PYTHONPATH")
    traced = os.pathsep.join(filter(None, (str(TRACED), plain)))
    with environment(PYTHONPATH=traced), federation(2, trivial=False) as running:
        island = running.island
        if options.starts:
            island.agents[0].stop()
            with environment(PYTHONPATH=plain):
                measure_start(report, island, options.starts)
            island.agents[0].start()
        if options.tasks:
            report.section(
                "A warm task, from the claim's answer to the receipt; milliseconds",
                [
                    "model MB",
                    "tasks",
                    "overhead",
                    "p90",
                    "of the service",
                    "training",
                    "after the receipt",
                    "agent, resident MB",
                    "child, resident MB",
                    "both, PSS MB",
                ],
            )
            found = measure_tasks(report, island, numbers(options.sizes), options.rounds)
            for megabytes, tasks in found.items():
                report.section(f"Parts of a task at {megabytes:g} MB, median ms", ["part", "ms", "least", "CPU ms"])
                for name in sorted({name for task in tasks for name in task if not name.endswith("(CPU)")}):
                    taken = [task[name] for task in tasks]
                    cpu = [task.get(f"{name} (CPU)") for task in tasks]
                    known = [one for one in cpu if one is not None]
                    report.row(name, statistics.median(taken), min(taken), statistics.median(known) if known else None)
    report.finish(options.json)


if __name__ == "__main__":
    main()
