"""Seconds per round when nobody trains: what the federation itself costs, beside plain sockets and its peers."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psycopg

from benchmarks.federation import Federation, federation, parameters_of, shapes_of, trivial_job, width_of
from benchmarks.peers import PEERS, Peer
from benchmarks.processes import forget_peak, peak_mb
from benchmarks.sockets import socket_floor
from benchmarks.tables import Report, Spread, arguments, numbers
from isthmus.wire.jobs import JobSpec, JobState, JobView

SKIPPED_ROUNDS = 1
"""The first round starts the training processes; it is shown by `benchmarks.latency`, not here."""
PATIENCE_S = 300.0

COLUMNS = ("model MB", "workers", "what", "s per round", "p90 s", "x sockets", "x Isthmus")
COSTS = (
    "model MB", "workers", "what", "rounds", "CPU s per round", "of it service", "of it workers", "of it Postgres",
    "service peak MB",
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """Rounds of one job: seconds each, CPU seconds a round by kind of process, and the service's peak memory."""

    seconds: Spread
    cpu_service_s: float
    cpu_workers_s: float
    cpu_postgres_s: float | None
    peak_mb: float

    @property
    def cpu_s(self) -> float:
        """CPU seconds a round, of all kinds that could be seen."""
        return self.cpu_service_s + self.cpu_workers_s + (self.cpu_postgres_s or 0.0)


def main() -> None:
    """Measure what the command line asks for."""
    parser = arguments("rounds", __doc__)
    parser.add_argument("--workers", default="2,5", help="numbers of workers (default: %(default)s)")
    parser.add_argument("--sizes", default="0.25,10,100", help="model sizes in MB of 10^6 bytes (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=12, help="rounds of the largest models; smaller ones get more")
    parser.add_argument("--peers", default="none", help=f"of {', '.join(PEERS)}; or none (default: %(default)s)")
    parser.add_argument("--peer-rounds", type=int, default=4, help="rounds of the peers (default: %(default)s)")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="run the service under cProfile and write this")
    parser.add_argument("--folder", type=Path, help="where everything is kept meanwhile (default: the system's own)")
    parser.add_argument("--clip", type=float, help="have the workers clip to this norm (default: they do not clip)")
    options = parser.parse_args()
    peers = [] if options.peers == "none" else [PEERS[name] for name in options.peers.split(",")]
    report = Report("rounds", "Seconds per round, training returns at once", COLUMNS)
    costs: list[tuple[Any, ...]] = []
    for workers in (int(number) for number in numbers(options.workers)):
        profile = options.profile.resolve() if options.profile else None
        for size in numbers(options.sizes):
            rounds = rounds_of(size, options.rounds)
            found, floor = measure(size, workers, rounds, clip=options.clip, profile=profile, under=options.folder)
            base = (size, workers)
            report.row(*base, "plain sockets", floor, floor.percentile(0.9), 1.0, None)
            report.row(
                *base, "Isthmus", found.seconds, found.seconds.percentile(0.9),
                found.seconds.median / floor.median, 1.0,
            )  # fmt: skip
            costs.append(
                (*base, "Isthmus", len(found.seconds.samples), found.cpu_s, found.cpu_service_s, found.cpu_workers_s,
                 found.cpu_postgres_s, found.peak_mb)
            )  # fmt: skip
            for peer in peers:
                run_peer(report, costs, peer, size, workers, options.peer_rounds, found.seconds, floor)
    for note in sorted({note for peer in peers for note in peer.notes}):
        report.note(note)
    report.section("What it costs", COSTS)
    for cost in costs:
        report.row(*cost)
    report.note("A round lasts from the completion of the one before to its own; the first of a job is left out.")
    report.note("Sockets: the model from a file to all workers and an update from each to an fsynced file, plain TCP.")
    report.note("x sockets, x Isthmus: ratios of medians, taken side by side in this run.")
    if options.profile:
        report.note(f"The service ran under cProfile, which slows it down: {options.profile}")
    report.finish(options.json)


def rounds_of(model_mb: float, rounds: int) -> int:
    """Small models get more rounds: theirs are short."""
    return rounds * (5 if model_mb < 2 else 2 if model_mb < 50 else 1)


def measure(
    model_mb: float,
    workers: int,
    rounds: int,
    *,
    clip: float | None = None,
    profile: Path | None = None,
    under: Path | None = None,
) -> tuple[Measured, Spread]:
    """Rounds of a federation of its own, and of plain sockets before and after it on the same disk."""
    size_bytes = 4 * parameters_of(width_of(model_mb))
    command = None
    if profile is not None:
        command = [sys.executable, "-m", "benchmarks.profiled_service", str(profile), "serve", "--no-migrate"]
        os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent)
    with (
        federation(workers, service=command, under=under) as running,
        socket_floor(running.folder / "floor", size_bytes, workers) as sockets,
    ):
        sockets.round()  # pages and buffers are touched for the first time
        floor = [sockets.round() for _ in range(3)]
        privacy = {} if clip is None else {"privacy": {"unit": "none", "clip_norm": clip}}
        spec = trivial_job(model_mb, rounds, workers, **privacy)
        found = measure_job(running, spec, rounds, profiled=profile is not None)
        floor += [sockets.round() for _ in range(3)]
    return found, Spread.of(floor)


def measure_job(running: Federation, spec: JobSpec, rounds: int, *, profiled: bool = False) -> Measured:
    """Run a job to its last round and say what each round took; `profiled` for a service under `profiled_service`.

    Raises:
        RuntimeError: it failed, or did not get there in time.
    """
    forget_peak(running.service_pid)
    job = running.island.submit(spec)
    with _watching(running, job) as completed:
        first = completed(SKIPPED_ROUNDS)
        if profiled:
            os.kill(running.service_pid, signal.SIGUSR1)
        before = running.cpu()
        last = completed(rounds)
        after = running.cpu()
        if profiled:
            os.kill(running.service_pid, signal.SIGUSR1)
    peak = peak_mb(running.service_pid)
    running.island.finish(job)
    times = [
        row[0] for row in running.query(
            "SELECT extract(epoch FROM completed_at)::float8 FROM rounds"
            " WHERE job_id = %s AND kind = 'train' AND number > 0 ORDER BY number",
            [job.id],
        )
    ]  # fmt: skip
    seconds = [later - earlier for earlier, later in pairwise(times)]
    counted = last - first
    postgres = None if after.postgres_s is None else (after.postgres_s - (before.postgres_s or 0.0)) / counted
    return Measured(
        seconds=Spread.of(seconds[SKIPPED_ROUNDS - 1 :]),
        cpu_service_s=(after.service_s - before.service_s) / counted,
        cpu_workers_s=(after.workers_s - before.workers_s) / counted,
        cpu_postgres_s=postgres,
        peak_mb=peak,
    )


@contextmanager
def _watching(running: Federation, job: JobView) -> Iterator[Any]:
    """A function that waits until so many rounds are completed and says how many are."""
    with psycopg.connect(running.island.database_url, autocommit=True) as connection:

        def completed(number: int) -> int:
            deadline = time.monotonic() + PATIENCE_S
            while True:
                row = connection.execute(
                    "SELECT rounds_completed, state, detail FROM jobs WHERE id = %s", [job.id]
                ).fetchone()
                assert row is not None
                if row[0] >= number:
                    return int(row[0])
                if row[1] in (JobState.FAILED, JobState.CANCELLED) or time.monotonic() > deadline:
                    raise RuntimeError(
                        f"the job stands at round {row[0]} of {number}, state {row[1]}: {row[2]}\n"
                        + "\n".join(agent.log.read_text()[-600:] for agent in running.island.agents[:1])
                    )
                time.sleep(0.05)

        yield completed


def run_peer(
    report: Report,
    costs: list[tuple[Any, ...]],
    peer: Peer,
    model_mb: float,
    workers: int,
    rounds: int,
    ours: Spread,
    floor: Spread,
) -> None:
    """The same work on a peer; what stops it becomes a note."""
    try:
        found = peer.rounds(shapes_of(width_of(model_mb)), workers, rounds)
    except RuntimeError as error:
        report.note(f"{peer.name}, {model_mb:g} MB, {workers} workers: not measured: {error}")
        return
    seconds = Spread.of(found.seconds)
    report.row(
        model_mb, workers, peer.name, seconds, seconds.percentile(0.9), seconds.median / floor.median,
        seconds.median / ours.median,
    )  # fmt: skip
    costs.append(
        (
            model_mb,
            workers,
            peer.name,
            len(found.seconds),
            found.cpu_s_per_round,
            None,
            None,
            None,
            found.server_peak_mb,
        )
    )


if __name__ == "__main__":
    main()
