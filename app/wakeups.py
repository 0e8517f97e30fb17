"""Waking who waits. One coalesced NOTIFY a job and change; a process that hears it wakes only whom it concerns.

Waiting holds no database connection: a waiter is an `asyncio.Event`. No offer is missed between a look and the waiting:
a waiter notes how many notifications were `heard` before it looks, and looks again if there are more once it is
registered. Every waiter is woken after a reconnection, looks once more before it gives up while nobody listens, and
looks first of all when it comes back; so a lost notification costs a little time and never a task.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Final
from uuid import UUID

import psycopg
import structlog
from psycopg.rows import TupleRow
from sqlalchemy import bindparam, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.database import libpq_url

log = structlog.get_logger(__name__)

CHANGES: Final = "isthmus_changes"
"""Something of a job changed, but nothing is newly on offer: only who watches the job is woken."""
OFFERS: Final = "isthmus_offers"
"""Tasks of a job may be on offer: the workers that they are for are woken too."""
STEPS: Final = "isthmus_steps"
"""A step of a secured round has closed, or its attempt is over: those are woken who wait for that."""
RECONNECT_S: Final = 0.5


_NOTIFY: Final = select(func.pg_notify(bindparam("channel"), bindparam("job_id")))


async def announce_change(session: AsyncSession, job_id: UUID, *, offers: bool = True) -> None:
    """Tell every process, when this transaction commits, that the job changed. Equal ones are coalesced.

    `offers`: whether tasks may be on offer now that were not before. To say so wrongly costs one query.
    """
    await session.execute(_NOTIFY, {"channel": OFFERS if offers else CHANGES, "job_id": str(job_id)})


async def announce_step(session: AsyncSession, round_id: UUID) -> None:
    """Tell every process, when this transaction commits, that those who wait for a step of the round should look."""
    await session.execute(_NOTIFY, {"channel": STEPS, "job_id": str(round_id)})


class Wakeups:
    """Listens on a direct connection and wakes the workers and event streams that wait in this process."""

    def __init__(self, url: str) -> None:
        self._url = libpq_url(url)
        self._workers: dict[UUID, set[asyncio.Event]] = {}
        self._jobs: dict[UUID, set[asyncio.Event]] = {}
        self._rounds: dict[UUID, set[asyncio.Event]] = {}
        self.connected = asyncio.Event()
        self.heard = 0
        """Counts what may have been news to a worker: offers announced, and connections made anew."""
        self.steps_heard = 0
        """As `heard`, for those who wait for a step of a secured round."""
        self.closing = False
        """Whether the process is about to end: nobody waits here any more."""

    def worker(self, worker_id: UUID, heard: int) -> AbstractContextManager[asyncio.Event]:
        """An event that is set when a task may be on offer to the worker.

        It is set at once if more was heard than when the worker looked last.
        """
        return _registered(self._workers, worker_id, news=heard != self.heard)

    def step(self, round_id: UUID, heard: int) -> AbstractContextManager[asyncio.Event]:
        """An event that is set when a step of the round has closed, or its attempt is over.

        It is set at once if more was heard than when the waiter looked last.
        """
        return _registered(self._rounds, round_id, news=heard != self.steps_heard)

    @contextlib.asynccontextmanager
    async def job(self, job_id: UUID) -> AsyncIterator[asyncio.Event]:
        """An event that is set when something of the job changed."""
        with _registered(self._jobs, job_id) as event:
            yield event

    def waiting(self) -> int:
        """How many workers wait in this process."""
        return len(self._workers)

    def close(self) -> None:
        """Wake everybody, for good: who waits looks once more and is then sent away, to wait at another process."""
        self.closing = True
        self._wake_everybody()

    def _wake_everybody(self) -> None:
        waiters = (*self._workers.values(), *self._jobs.values(), *self._rounds.values())
        _set(event for events in waiters for event in events)

    async def run(self) -> None:
        """Listen until cancelled; reconnect for ever."""
        while True:
            try:
                await self._listen()
            except Exception as error:  # whatever it was: who waits here must be woken again
                log.warning("the listener lost its connection", error=str(error))
            finally:
                self.connected.clear()
            await asyncio.sleep(RECONNECT_S)

    async def _listen(self) -> None:
        connection = await psycopg.AsyncConnection.connect(self._url, autocommit=True)
        async with connection:
            await connection.execute(f"LISTEN {CHANGES}")
            await connection.execute(f"LISTEN {OFFERS}")
            await connection.execute(f"LISTEN {STEPS}")
            self.connected.set()
            self.heard += 1
            self.steps_heard += 1
            self._wake_everybody()
            while True:
                # The first notification is waited for; those that came with it are taken along, for one query.
                notes = [note async for note in connection.notifies(stop_after=1)]
                notes += [note async for note in connection.notifies(timeout=0)]
                _set(event for note in notes for event in self._jobs.get(UUID(note.payload), ()))
                if closed := {UUID(note.payload) for note in notes if note.channel == STEPS}:
                    self.steps_heard += 1
                    _set(event for round_id in closed for event in self._rounds.get(round_id, ()))
                if offering := {UUID(note.payload) for note in notes if note.channel == OFFERS}:
                    self.heard += 1
                    await self._wake_workers(connection, offering)

    async def _wake_workers(self, connection: psycopg.AsyncConnection[TupleRow], jobs: set[UUID]) -> None:
        """Wake the workers that tasks of these jobs are on offer for.

        They are asked for on the listener's own connection: the others are busy just then when many ask for work. If
        it fails, a new connection is made and everybody is woken: rather all too early than one too late.
        """
        if not self._workers:
            return
        found = await connection.execute(_CONCERNED, [list(jobs)])
        concerned = [worker for (worker,) in await found.fetchall()]
        _set(event for worker in concerned for event in self._workers.get(worker, ()))


# The state is no parameter: so an index that holds nothing but offers answers it.
_CONCERNED: Final = "SELECT DISTINCT worker_id FROM tasks WHERE state = 'offered' AND job_id = ANY(%s)"


def _set(events: Iterable[asyncio.Event]) -> None:
    for event in events:
        event.set()


@contextlib.contextmanager
def _registered(waiters: dict[UUID, set[asyncio.Event]], key: UUID, *, news: bool = False) -> Iterator[asyncio.Event]:
    event = asyncio.Event()
    if news:
        event.set()
    waiters.setdefault(key, set()).add(event)
    try:
        yield event
    finally:
        waiters[key].discard(event)
        if not waiters[key]:
            del waiters[key]
