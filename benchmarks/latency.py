"""From a job's submission to its first task at a worker, and from a killed server to the next accepted update."""

import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from benchmarks.federation import Federation, federation, trivial_job
from benchmarks.tables import Report, Spread, arguments
from isthmus.client import Client, NoWork
from isthmus.wire.jobs import ApproveParticipation, CancelJob, JobView, ParticipationState
from isthmus.wire.organizations import CreateOrganization, Role
from isthmus.wire.rounds import ClaimTask
from tests.acceptance.island import POLICY
from tests.running import announcement, introduction

PATIENCE_S = 120.0
WAIT_S = 20
"""Length of a waiting worker's long poll."""
MODEL_MB = 0.25
MOST_ROUNDS = 1000
"""What a worker's policy lets pass unless it says otherwise: more than all repeats need."""


def main() -> None:
    """Measure what the command line asks for."""
    parser = arguments("latency", __doc__)
    parser.add_argument("--workers", type=int, default=3, help="how many (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=10, help="of each measurement (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where everything is kept meanwhile (default: the system's own)")
    parser.add_argument("--only", choices=("first-task", "restart"), help="one of the two measurements")
    options = parser.parse_args()
    report = Report("latency", "From submission to the first task offered (s)", ("from", "until", "s", "p90 s"))
    if options.only != "restart":
        with federation(0, under=options.folder) as running:
            taken = first_tasks(running, options.workers, options.repeats)
        for start, until, samples in (
            (
                "`submit` is called: draft, initial weights, upload, start",
                "a waiting worker has its task",
                taken.submit_s,
            ),
            ("POST /v1/jobs/{id}/start is sent", "a waiting worker has its task", taken.start_s),
            ("POST /v1/jobs/{id}/start is sent", "all waiting workers have theirs", taken.all_s),
        ):
            report.row(start, until, samples, samples.percentile(0.9))
    report.section("From SIGKILL of the server to the next accepted update (s); it is started again at once", RESTARTS)
    if options.only != "first-task":
        with federation(options.workers, under=options.folder) as running:
            restarted = restarts(running, options.workers, options.repeats)
        for until, samples in (
            ("its port is open", restarted.listens_s),
            ("the next update is accepted", restarted.accepted_s),
            ("the next round is completed", restarted.completed_s),
        ):
            report.row(until, samples, samples.percentile(0.9), samples.most)
    report.note(f"{options.workers} workers, a model of {MODEL_MB:g} MB; the service and Postgres are warm.")
    report.note("Restart: real agents, training returns at once; killed at a random moment of a running round.")
    report.finish(options.json)


RESTARTS = ("until", "s", "p90 s", "worst s")


@dataclass(frozen=True)
class FirstTasks:
    """Seconds until waiting workers had the first task of a job."""

    submit_s: Spread
    start_s: Spread
    all_s: Spread


class Waiter:
    """A worker that is nothing but its long poll; it remembers when a job's task came."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.claimed: dict[str, float] = {}
        self._over = False
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        while not self._over:
            with suppress(Exception):  # cancelled, or the service ends: whoever misses a claim says so
                offer = self._client.tasks.claim(ClaimTask(), wait_s=WAIT_S)
                if not isinstance(offer, NoWork):
                    self.claimed[offer.job] = time.perf_counter()

    def end(self) -> None:
        """Let the poll that is under way be the last."""
        self._over = True


def first_tasks(running: Federation, workers: int, repeats: int) -> FirstTasks:
    """Submit jobs, one after the other, to so many waiting workers.

    Raises:
        RuntimeError: a task did not come.
    """
    waiters = _waiters(running, workers)
    submit_s, start_s, all_s = [], [], []
    try:
        for number in range(repeats + 1):
            time.sleep(0.3)  # all wait again
            submitted = time.perf_counter()
            created = _draft(running, number, workers)
            started = time.perf_counter()
            researcher = running.island.researcher
            assert researcher is not None
            job = researcher.jobs.start(created.id)
            times = sorted(_claimed(waiters, job))
            researcher.jobs.cancel(job.id, CancelJob(note="measured"))
            if number:  # the first one fills caches
                submit_s.append(times[0] - submitted)
                start_s.append(times[0] - started)
                all_s.append(times[-1] - started)
    finally:
        for waiter in waiters:
            waiter.end()
    return FirstTasks(Spread.of(submit_s), Spread.of(start_s), Spread.of(all_s))


def _waiters(running: Federation, workers: int) -> list[Waiter]:
    """So many organizations with a confirmed dataset each, and a worker that waits."""
    island, waiters = running.island, []
    for number in range(workers):
        organization = island.admin.organizations.create(
            CreateOrganization(name=f"waits-{number}", display_name="waits")
        )
        token = island.admin.organizations.issue_enrollment_token(organization.id).token
        signing = Ed25519PrivateKey.generate()
        with Client(island.url) as anybody:
            worker = Client(island.url, anybody.workers.enroll(introduction(token, key=signing)).api_key)
        dataset = worker.datasets.announce("patients", announcement(signing, organization.name, "patients"))
        steward = island._principal(f"waits-{number}-steward", Role.STEWARD, organization.id)
        steward.datasets.set_policy(dataset.id, POLICY)
        steward.datasets.confirm(dataset.id)
        waiters.append(Waiter(worker))
    return waiters


def _draft(running: Federation, number: int, workers: int) -> JobView:
    from isthmus.submission import submit  # noqa: PLC0415 -- what a researcher's program has imported already

    assert running.island.researcher is not None
    spec = trivial_job(MODEL_MB, 3, workers, name=f"job-{number}")
    return submit(running.island.researcher, spec, start=False)


def _claimed(waiters: Sequence[Waiter], job: JobView) -> list[float]:
    deadline = time.monotonic() + PATIENCE_S
    while not all(job.name in waiter.claimed for waiter in waiters):
        if time.monotonic() > deadline:
            raise RuntimeError(f"{job.name}: not every waiting worker was given its task in {PATIENCE_S:g} s")
        time.sleep(0.001)
    return [waiter.claimed[job.name] for waiter in waiters]


@dataclass(frozen=True)
class Restarts:
    """Seconds from the server's death until it listened, took an update, and completed a round."""

    listens_s: Spread
    accepted_s: Spread
    completed_s: Spread


def restarts(running: Federation, workers: int, repeats: int) -> Restarts:
    """Kill the server while rounds run, start it again at once, and see how long nothing is accepted.

    Raises:
        RuntimeError: it did not go on.
    """
    island = running.island
    spec = trivial_job(MODEL_MB, MOST_ROUNDS, workers)
    job = island.submit(spec)
    for steward in island.stewards:  # a job of so many rounds is approved by nobody's rule
        for part in steward.participations.list(job_id=job.id):
            if part.state is ParticipationState.PENDING:
                steward.participations.approve(part.id, ApproveParticipation())
    listens_s, accepted_s, completed_s = [], [], []
    with psycopg.connect(island.database_url, autocommit=True) as connection:
        _first_after(connection, "min(completed_at)", "rounds", "completed_at", _clock(connection))
        for number in range(repeats):
            time.sleep(1.0 + 0.137 * number % 0.4)  # another moment of a round each time
            island.service.kill()
            killed, killed_at = time.monotonic(), _clock(connection)
            island.service.start()
            listens_s.append(_listens(island.url) - killed)
            accepted_s.append(_first_after(connection, "min(received_at)", "updates", "received_at", killed_at))
            completed_s.append(_first_after(connection, "min(completed_at)", "rounds", "completed_at", killed_at))
    return Restarts(Spread.of(listens_s), Spread.of(accepted_s), Spread.of(completed_s))


def _clock(connection: psycopg.Connection) -> float:
    row = connection.execute("SELECT extract(epoch FROM clock_timestamp())::float8").fetchone()
    assert row is not None
    return float(row[0])


def _listens(url: str) -> float:
    parts = urlsplit(url)
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection((parts.hostname, parts.port), timeout=1):
            return time.monotonic()
        time.sleep(0.005)
    raise RuntimeError(f"the service did not come back in {PATIENCE_S:g} s")


def _first_after(connection: psycopg.Connection, what: str, table: str, column: str, after: float) -> float:
    """Seconds from `after`, by Postgres's clock, to the first row of the table with a later time."""
    deadline = time.monotonic() + PATIENCE_S
    query = f"SELECT extract(epoch FROM {what})::float8 FROM {table} WHERE {column} > to_timestamp(%s)"
    while time.monotonic() < deadline:
        row = connection.execute(query.encode(), [after]).fetchone()
        if row is not None and row[0] is not None:
            return float(row[0]) - after
        time.sleep(0.02)
    raise RuntimeError(f"nothing new in {table} in {PATIENCE_S:g} s after the server was killed")


if __name__ == "__main__":
    main()
