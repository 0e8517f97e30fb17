"""Workers in long poll at one server process: its memory, its processor time, and how fast an offer reaches a worker.

    python -m benchmarks.waiting --workers 2000,10000

One real `isthmus-server serve` with its defaults, on a Postgres of its own with durable commits; the workers are
connections of this process, each with its own enrolled worker and key, that behave as the agent does: they wait as long
as it does, ask again as soon as the service allows, and come back if their connection is cut. They are switched on one
after the other, and measured from the moment when the service itself says that all wait.
An offer's time runs from the moment its transaction's COMMIT is sent until the worker has read the claim's answer.
Whatever else than work or no work a worker is answered is counted as a failure.
"""

import argparse
import asyncio
import math
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit
from urllib.request import Request, urlopen
from uuid import UUID

import psycopg
import uvloop
from sqlalchemy import text

from app.database import open_engine, open_sessions
from benchmarks.federation import Federation, federation
from benchmarks.fleet import Fleet, Member, add_members, begin_job
from benchmarks.processes import resident_mb
from benchmarks.tables import Report, Spread, arguments
from isthmus.wire.organizations import CreateApiKey, CreateOrganization
from isthmus_worker.loop import WAIT_S, a_poll_s

PATIENCE_S = 60.0
"""So long at most until an offer has reached its worker, or everybody waits."""
WAITING_SHARE = 0.99
"""Of all workers must wait before anything is measured: some are always between two polls."""
AGAIN_S = 1.0
"""Until a worker comes back that was refused, cut off, or given a task."""


class Waiter(asyncio.Protocol):
    """One worker: asks for work, again and again, over one connection, and notes when it was given some."""

    def __init__(self, poll: "Polling", member: Member) -> None:
        self.poll, self.member = poll, member
        self._transport: asyncio.Transport | None = None
        self._answer = b""
        self.given: asyncio.Future[float] | None = None

    async def connect(self) -> None:
        """Connect, and ask at once."""
        try:
            await self.poll.loop.create_connection(lambda: self, "127.0.0.1", self.poll.port)
        except OSError as error:
            self.poll.failed(f"no connection: {error}")
            self._later(AGAIN_S, self._reconnect)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport, self._answer = cast(asyncio.Transport, transport), b""  # uvloop's is no subclass of it
        self.ask()

    def ask(self) -> None:
        """Send a claim that waits."""
        if self._transport is None or self._transport.is_closing():
            return
        self._transport.write(
            f"POST /v1/tasks/claim?wait={self.poll.next_wait_s():g} HTTP/1.1\r\nhost: 127.0.0.1\r\n"
            f"authorization: Bearer {self.member.api_key}\r\naccept: application/json\r\n"
            "content-type: application/json\r\ncontent-length: 2\r\n\r\n{}".encode()
        )

    def data_received(self, data: bytes) -> None:
        self._answer += data
        head, end, body = self._answer.partition(b"\r\n\r\n")
        if not end:
            return
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        if len(body) < int(fields.get(b"content-length", 0)):
            return
        now, status, self._answer = time.perf_counter(), head[9:12], b""
        after_s = float(fields.get(b"retry-after", 0))
        if status == b"200":
            if self.given is not None and not self.given.done():
                self.given.set_result(now)
            if not self.poll.busy:
                self._later(AGAIN_S, self.ask)
        elif status == b"204":
            self.poll.empty += 1
            self._later(after_s, self.ask)
        else:
            self.poll.failed(head.split(b"\r\n")[0].decode("latin-1"))
            self._later(max(AGAIN_S, after_s) * random.uniform(1.0, 1.5), self.ask)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if not self.poll.over:
            self.poll.failed(f"a connection was lost: {exc}")
            self._later(AGAIN_S, self._reconnect)

    def close(self) -> None:
        """Go away."""
        if self._transport is not None:
            self._transport.abort()

    def _later(self, seconds: float, what: Callable[[], object]) -> None:
        self.poll.loop.call_later(seconds, what)

    def _reconnect(self) -> None:
        if not self.poll.over:
            self.poll.begin(self.connect())


class Polling:
    """All waiters of one measurement."""

    def __init__(self, port: int, wait_s: float | None) -> None:
        """Begin with nobody. `wait_s`: how long each waits; None: as long as the agent does."""
        self.port = port
        self.loop = asyncio.get_running_loop()
        self.wait_s = wait_s
        self.empty = 0
        self.over = False
        self.busy = False
        """Whether a worker with a task asks for no other: it would be given the same one again."""
        self.failures: Counter[str] = Counter()
        self.waiters: list[Waiter] = []
        self._connecting: set[asyncio.Task[None]] = set()

    def next_wait_s(self) -> float:
        """The length of somebody's next poll."""
        return self.wait_s or a_poll_s()

    def failed(self, why: str) -> None:
        """Count what should not have happened."""
        self.failures[why] += 1

    def begin(self, connecting: Coroutine[Any, Any, None]) -> None:
        """Let somebody connect in the background."""
        task = asyncio.create_task(connecting)
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def open(self, members: tuple[Member, ...], over_s: float) -> None:
        """Connect everybody, evenly over so many seconds; each asks as soon as it is connected."""
        self.waiters = [Waiter(self, member) for member in members]
        began = self.loop.time()
        for number, waiter in enumerate(self.waiters):
            await asyncio.sleep(max(0.0, began + over_s * number / len(self.waiters) - self.loop.time()))
            self.begin(waiter.connect())

    def close(self) -> None:
        """Cut every connection."""
        self.over = True
        for waiter in self.waiters:
            waiter.close()


class Gauge:
    """How many workers wait, as the service itself tells it."""

    def __init__(self, running: Federation) -> None:
        admin = running.island.admin
        key = admin.keys.create(CreateApiKey(principal_id=admin.me().principal.id)).key
        self._request = Request(f"{running.island.url}/metrics", headers={"Authorization": f"Bearer {key}"})

    def read(self) -> int:
        """How many wait now."""
        with urlopen(self._request, timeout=PATIENCE_S) as answer:
            for line in answer.read().decode().splitlines():
                if line.startswith("isthmus_workers_waiting "):
                    return int(float(line.split()[1]))
        raise ValueError("the service does not tell how many wait")

    async def reach(self, number: int) -> bool:
        """Wait until so many wait; False if they do not within our patience."""
        for _ in range(int(2 * PATIENCE_S)):
            if await asyncio.to_thread(self.read) >= number:
                return True
            await asyncio.sleep(0.5)
        return False


async def enrolled(running: Federation, job_id: UUID, organization_id: UUID, number: int) -> Fleet:
    """So many workers of the organization that take part in the job."""
    engine = open_engine(running.island.database_url, connections=2)
    try:
        async with open_sessions(engine).begin() as session:
            members = await add_members(session, organization_id, job_id, number)
            await session.execute(text("ANALYZE"))
    finally:
        await engine.dispose()
    ((round_id,),) = running.query("SELECT id FROM rounds WHERE job_id = %s", [job_id])
    return Fleet(job_id=job_id, round_id=round_id, members=members)


async def offered_one_by_one(
    polling: Polling, fleet: Fleet, connection: psycopg.AsyncConnection[Any], samples: int
) -> tuple[list[float], list[float]]:
    """Milliseconds until each of `samples` offers reached its worker, and those that its COMMIT took."""
    reached: list[float] = []
    committed: list[float] = []
    for waiter in random.sample(polling.waiters, samples):
        waiter.given = polling.loop.create_future()
        async with connection.transaction():
            await fleet.offer(connection, [waiter.member])
            began = time.perf_counter()
        committed.append((time.perf_counter() - began) * 1000)
        try:
            async with asyncio.timeout(PATIENCE_S):
                reached.append((await waiter.given - began) * 1000)
        except TimeoutError:
            reached.append(math.inf)
            polling.failed(f"an offer did not reach its worker in {PATIENCE_S:g} s")
        waiter.given = None
        await fleet.withdraw(connection, [waiter.member])
        await asyncio.sleep(random.uniform(0.02, 0.06))
    return reached, committed


async def offered_at_once(polling: Polling, fleet: Fleet, connection: psycopg.AsyncConnection[Any]) -> list[float]:
    """Milliseconds until each worker had its task, when one transaction offers one to everybody."""
    polling.busy = True
    waiting = [polling.loop.create_future() for _ in polling.waiters]
    for waiter, given in zip(polling.waiters, waiting, strict=True):
        waiter.given = given
    async with connection.transaction():
        await fleet.offer(connection, fleet.members)
        began = time.perf_counter()
    async with asyncio.timeout(3 * PATIENCE_S):
        times = await asyncio.gather(*waiting)
    await fleet.withdraw(connection, fleet.members)
    return [(at - began) * 1000 for at in times]


@dataclass(frozen=True)
class Costs:
    """What the service and its database cost over a span of time, in seconds of a processor a second."""

    service: float
    postgres: float | None
    repolls: float

    @classmethod
    async def over(cls, seconds: float, running: Federation, polling: Polling) -> "Costs":
        """Watch for so long."""
        began, before, empty = time.monotonic(), running.cpu(), polling.empty
        await asyncio.sleep(seconds)
        span_s, after = time.monotonic() - began, running.cpu()
        return cls(
            service=(after.service_s - before.service_s) / span_s,
            postgres=None
            if before.postgres_s is None or after.postgres_s is None
            else (after.postgres_s - before.postgres_s) / span_s,
            repolls=(polling.empty - empty) / span_s,
        )


def measure(report: Report, number: int, options: Any) -> None:
    """One size of fleet, on a fresh database and a fresh server."""
    with federation(2, trivial=False) as running:
        job = begin_job(running.island)
        organization = running.island.admin.organizations.create(CreateOrganization(name="fleet", display_name="Fleet"))
        uvloop.run(_measure(report, running, job.id, organization.id, number, options))


async def _measure(
    report: Report, running: Federation, job_id: UUID, organization_id: UUID, number: int, options: Any
) -> None:
    fleet, pid = await enrolled(running, job_id, organization_id, number), running.service_pid
    print(f"{number} workers are enrolled", file=sys.stderr, flush=True)
    port = urlsplit(running.island.url).port
    assert port is not None
    gauge = await asyncio.to_thread(Gauge, running)
    warm = Polling(port, 1.0)
    await warm.open(fleet.members[:20], 1.0)
    await asyncio.sleep(3)
    warm.close()
    await gauge.reach(0)
    idle_mb = resident_mb(pid)

    polling = Polling(port, options.wait)
    wait_s = options.wait or WAIT_S
    began, cpu_s = time.monotonic(), running.cpu().service_s
    await polling.open(fleet.members, options.opening or wait_s)
    all_wait = await gauge.reach(int(WAITING_SHARE * number))
    opening_s, opening_cpu_s = time.monotonic() - began, running.cpu().service_s - cpu_s
    if not all_wait:
        report.note(f"{number} workers: fewer than {WAITING_SHARE:.0%} ever waited at once")
    while_opening = polling.failures.total()
    print(f"they wait, after {opening_s:.1f} s", file=sys.stderr, flush=True)
    costs = await Costs.over(min(wait_s, options.watch), running, polling)
    above_mb = resident_mb(pid) - idle_mb
    async with await psycopg.AsyncConnection.connect(running.island.database_url, autocommit=True) as connection:
        reached, committed = await offered_one_by_one(polling, fleet, connection, min(options.samples, number))
        above_mb = max(above_mb, resident_mb(pid) - idle_mb)
        everybody = await offered_at_once(polling, fleet, connection) if options.cohort else None
    after_mb = resident_mb(pid) - idle_mb
    polling.close()
    report.row(
        number,
        idle_mb,
        above_mb,
        above_mb * 1e6 / 1024 / number,
        opening_s,
        opening_cpu_s,
        costs.repolls,
        costs.service * 100,
        None if costs.postgres is None else costs.postgres * 100,
        costs.service / costs.repolls * 1000 if costs.repolls else None,
        Spread.of(reached).median,
        Spread.of(reached).percentile(0.99),
        Spread.of(reached).most,
        Spread.of(committed).median,
        None if everybody is None else Spread.of(everybody).most / 1000,
        None if everybody is None else after_mb,
        while_opening,
        polling.failures.total() - while_opening,
    )
    for failure, times in polling.failures.most_common(5):
        report.note(f"{number} workers, {times} times: {failure}")


def main() -> None:
    """The command."""
    parser = arguments("waiting", __doc__)
    parser.add_argument("--workers", default="2000,10000", help="how many, one measurement each")
    parser.add_argument("--wait", type=float, help="seconds of a long poll (default: as the agent)")
    parser.add_argument("--opening", type=float, help="seconds in which all are switched on (default: one poll)")
    parser.add_argument("--watch", type=float, default=30.0, help="seconds in which the re-polls are watched, at most")
    parser.add_argument("--samples", type=int, default=300, help="offers that are timed, one at a time")
    parser.add_argument("--cohort", action=argparse.BooleanOptionalAction, default=True, help="offer to all at once")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    report = Report(
        "waiting",
        "Workers in long poll at one server process",
        [
            "workers",
            "idle MB",
            "MB above idle",
            "KiB a worker",
            "opening s",
            "opening CPU s",
            "re-polls/s",
            "CPU % meanwhile",
            "Postgres CPU %",
            "CPU ms a re-poll",
            "offer ms, median",
            "p99",
            "worst",
            "of it COMMIT",
            "all at once, s",
            "MB after that",
            "failures at first",
            "later",
        ],
    )
    for number in (int(part) for part in options.workers.split(",")):
        measure(report, number, options)
    report.finish(options.json)


if __name__ == "__main__":
    main()
