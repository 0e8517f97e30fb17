"""What opens, closes and aggregates rounds while nobody asks: the sweep, and the queue's tasks.

Rounds are the truth, queue jobs are alarms. Everything that time makes due stands in columns; one coordinator at a time
(whoever holds an advisory lock) looks once a second, and once when it gets the lock, and does what is due.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from typing import Final
from uuid import UUID

import structlog
from procrastinate import App as Queue
from sqlalchemy import delete, func, select, text, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.database import clock
from app.dependencies import Parts
from app.models import DiscardedBlob, IdempotencyKey, Round
from app.participations.reservations import list_over, refund
from app.participations.schedule import expire_grant, list_expired, list_stranded, release_stranded
from app.queue import AGGREGATE_ROUND, ROUNDS, defer
from app.retention import EVERY as ORPHANS_EVERY
from app.retention import collect_orphans
from app.rounds.aggregation import aggregate_round
from app.rounds.closing import settle
from app.rounds.discarding import delete_blobs
from app.rounds.offers import lapse_leases, list_lapsed
from app.rounds.opening import begin_if_enough
from app.rounds.queries import get_job, hold_round, list_due_rounds, list_waiting_jobs
from isthmus.wire.rounds import RoundPhase

log = structlog.get_logger(__name__)

SWEEP_LOCK: Final = 0x15_74_4D_55_5357_4550
IDEMPOTENCY_KEPT: Final = timedelta(hours=24)
PATIENCE_MS: Final = 500
"""So long a piece of the sweep waits for a lock."""
DISCARDED_AT_ONCE: Final = 500
"""So many discarded blobs a sweep deletes."""
GRACE_S: Final = 5.0
"""So long an aggregation may go on when its process ends."""
CANCEL_AGAIN_S: Final = 2 * GRACE_S
"""Whoever has not ended by then has not heard that it should."""


def install_tasks(queue: Queue, parts: Parts) -> None:
    """Teach the queue what the names of deferred tasks mean in this process."""

    async def run(round_id: str) -> None:
        await aggregate_round(parts, UUID(round_id))

    queue.task(name=AGGREGATE_ROUND, queue=ROUNDS)(run)


@contextlib.asynccontextmanager
async def coordinating(parts: Parts) -> AsyncIterator[None]:
    """Sweep, aggregate and collect orphans in the background of a block of code."""
    install_tasks(parts.queue, parts)
    tasks = [asyncio.create_task(routine(parts)) for routine in (_aggregate_forever, _sweep_forever, _collect_forever)]
    try:
        yield
    finally:
        await _end(tasks)


async def _end(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancel tasks until they have ended.

    Once does not always do: Python 3.11's `wait_for`, by which pools of connections wait, loses a cancellation that
    comes just as a connection does, and whoever works for ever would go on.
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=CANCEL_AGAIN_S)
    await asyncio.gather(*tasks, return_exceptions=True)


async def _aggregate_forever(parts: Parts) -> None:
    while True:
        try:
            await parts.queue.run_worker_async(
                queues=[ROUNDS],
                concurrency=2,
                install_signal_handlers=False,
                fetch_job_polling_interval=1.0,
                shutdown_graceful_timeout=GRACE_S,
                delete_jobs="always",  # a failure is logged, and the sweep asks again as long as the round wants it
            )
        except Exception:
            log.exception("the queue's worker stopped; it is started again")
        await asyncio.sleep(parts.settings.sweep.total_seconds())


async def _sweep_forever(parts: Parts) -> None:
    pause = parts.settings.sweep.total_seconds()
    while True:
        try:
            async with parts.locks.hold(SWEEP_LOCK) as held:
                patience = timedelta(0)  # first of all: whoever swept until now may have died with its aggregations
                while held:
                    await sweep(parts, patience)
                    await asyncio.sleep(pause)
                    patience = parts.settings.aggregation_retry
        except Exception:
            log.exception("the sweep failed; it goes on")
        await asyncio.sleep(pause)


async def _collect_forever(parts: Parts) -> None:
    """Every process that coordinates does it: deleting twice is harmless, and each may have a disk of its own."""
    while True:
        try:
            await collect_orphans(parts.single_statements, parts.blobs)
        except Exception:
            log.exception("orphaned blobs could not be collected; it is tried again")
        await asyncio.sleep(ORPHANS_EVERY.total_seconds())


async def sweep(parts: Parts, aggregation_retry: timedelta) -> None:
    """Do what time has made due, each piece in a transaction of its own that waits for no lock for long.

    An aggregation that was asked for longer ago than `aggregation_retry` is asked for again.

    So one bad row, or one job that somebody holds, wedges nobody else: its piece is skipped, and due again next time.
    """
    async with parts.single_statements() as session:
        lapsed = await list_lapsed(session)
        expired = await list_expired(session)
        stranded = await list_stranded(session)
        waiting = await list_waiting_jobs(session)
    for job_id, round_id in lapsed:
        async with _piece(parts, "leases", job_id) as session:
            await lapse_leases(session, job_id, round_id)
    for job_id, participation_id in expired:
        async with _piece(parts, "a grant", job_id) as session:
            await expire_grant(session, parts.queue, job_id, participation_id)
    for job_id, round_id in stranded:
        async with _piece(parts, "stranded tasks", job_id) as session:
            await release_stranded(session, parts.queue, job_id, round_id)
    for job_id in waiting:
        async with _piece(parts, "a waiting job", job_id) as session:
            await begin_if_enough(session, await get_job(session, job_id, "update"), await clock(session))
    async with (
        parts.single_statements() as session
    ):  # after the leases and grants: what they ended may have made rounds due
        due = await list_due_rounds(session, await clock(session))
    for job_id, round_id in due:
        async with _piece(parts, "a round", job_id) as session:
            job, of = await hold_round(session, round_id)
            await settle(session, parts.queue, job, of, await clock(session))
    async with parts.single_statements() as session:  # after what ended grants and jobs
        over = await list_over(session)
    for job_id, participation_id in over:
        async with _piece(parts, "a reservation", job_id) as session:
            await refund(session, job_id, participation_id)
    async with _piece(parts, "forgotten aggregations") as session:
        await _defer_forgotten_aggregations(session, parts, aggregation_retry)
    await delete_discarded(parts)
    async with _piece(parts, "old idempotency keys") as session:
        kept = await clock(session) - IDEMPOTENCY_KEPT
        await session.execute(delete(IdempotencyKey).where(IdempotencyKey.created_at < kept))


async def delete_discarded(parts: Parts) -> None:
    """Delete blobs that a committed transaction discarded, and that whoever committed it has not deleted."""
    try:
        async with parts.single_statements() as session:
            keys = await session.scalars(select(DiscardedBlob.key).order_by(func.random()).limit(DISCARDED_AT_ONCE))
        # In any order: so many that cannot be deleted do not stand before the others for ever.
        await delete_blobs(parts, keys.all())
    except Exception as error:
        log.warning("discarded blobs were not deleted; it is tried again", error=repr(error))


@contextlib.asynccontextmanager
async def _piece(parts: Parts, what: str, job_id: UUID | None = None) -> AsyncIterator[AsyncSession]:
    """One piece of a sweep: its failure is logged, and the next piece goes on."""
    try:
        async with parts.sessions.begin() as session:
            await session.execute(text(f"SET LOCAL lock_timeout = '{PATIENCE_MS}ms'"))
            yield session
    except Exception as error:
        log.warning("a piece of the sweep was skipped", what=what, job_id=str(job_id), error=repr(error))


async def _defer_forgotten_aggregations(session: AsyncSession, parts: Parts, retry: timedelta) -> None:
    """A killed process leaves rounds aggregating that nobody works on: ask again. Asking twice is harmless."""
    now = await clock(session)
    forgotten = await session.scalars(
        select(Round.id)
        .where(Round.phase == RoundPhase.AGGREGATING, Round.deferred_at <= now - retry)
        .with_for_update(skip_locked=True)
    )
    for round_id in forgotten.all():
        await session.execute(update(Round).where(Round.id == round_id).values(deferred_at=now))
        await defer(session, parts.queue, AGGREGATE_ROUND, round_id=round_id)
