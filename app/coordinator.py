"""What opens, closes and aggregates rounds while nobody asks: the sweep, and the queue's tasks.

Rounds are the truth, queue jobs are alarms. Everything that time makes due stands in columns; one coordinator at a time
(whoever holds an advisory lock) looks once a second, and once when it gets the lock, and does what is due.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Final
from uuid import UUID

import structlog
from procrastinate import App as Queue
from sqlalchemy import delete, select, update
from sqlalchemy.exc import SQLAlchemyError

from app import retention
from app.database import advisory_lock, clock
from app.dependencies import Parts
from app.models import IdempotencyKey, Round
from app.participations.service import expire_grants, release_revoked_workers
from app.queue import AGGREGATE_ROUND, ROUNDS, defer
from app.rounds.aggregation import aggregate_round
from app.rounds.closing import settle
from app.rounds.offers import lapse_leases
from app.rounds.queries import get_job, get_round, list_due_rounds
from isthmus.wire.rounds import RoundPhase

log = structlog.get_logger(__name__)

SWEEP_LOCK: Final = 0x15_74_4D_55_5357_4550
IDEMPOTENCY_KEPT: Final = timedelta(hours=24)


def install_tasks(queue: Queue, parts: Parts) -> None:
    """Teach the queue what the names of deferred tasks mean in this process."""

    async def run(round_id: str) -> None:
        await aggregate_round(parts, UUID(round_id))

    queue.task(name=AGGREGATE_ROUND, queue=ROUNDS)(run)


@contextlib.asynccontextmanager
async def coordinating(parts: Parts) -> AsyncIterator[None]:
    """Sweep and aggregate in the background of a block of code."""
    install_tasks(parts.queue, parts)
    tasks = [asyncio.create_task(_aggregate_forever(parts)), asyncio.create_task(_sweep_forever(parts))]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _aggregate_forever(parts: Parts) -> None:
    while True:
        try:
            await parts.queue.run_worker_async(
                queues=[ROUNDS],
                concurrency=2,
                install_signal_handlers=False,
                fetch_job_polling_interval=1.0,
                shutdown_graceful_timeout=5,
                delete_jobs="successful",
            )
        except Exception:
            log.exception("the queue's worker stopped; it is started again")
        await asyncio.sleep(parts.settings.sweep.total_seconds())


async def _sweep_forever(parts: Parts) -> None:
    pause = parts.settings.sweep.total_seconds()
    url = parts.settings.database_direct_url or parts.settings.resolved_database_url()
    while True:
        try:
            async with advisory_lock(url, SWEEP_LOCK) as held:
                collected = -math.inf
                while held:
                    await sweep(parts)
                    if time.monotonic() - collected >= retention.EVERY.total_seconds():
                        await retention.collect_orphans(parts.sessions, parts.blobs)
                        collected = time.monotonic()
                    await asyncio.sleep(pause)
        except Exception:
            log.exception("the sweep failed; it goes on")
        await asyncio.sleep(pause)


async def sweep(parts: Parts) -> None:
    """Do what time has made due: each piece in a transaction of its own, so that one bad row wedges nobody."""
    async with parts.sessions.begin() as session:
        await lapse_leases(session, await clock(session))
    await expire_grants(parts.sessions, parts.queue)
    await release_revoked_workers(parts.sessions, parts.queue)
    await _settle_due_rounds(parts)
    await _defer_forgotten_aggregations(parts)
    async with parts.sessions.begin() as session:
        now = await clock(session)
        await session.execute(delete(IdempotencyKey).where(IdempotencyKey.created_at < now - IDEMPOTENCY_KEPT))


async def _settle_due_rounds(parts: Parts) -> None:
    async with parts.sessions() as session:
        due = await list_due_rounds(session, await clock(session))
    for job_id, round_id in due:
        try:
            async with parts.sessions.begin() as session:
                job = await get_job(session, job_id, "update")
                of = await get_round(session, round_id, "update")
                await settle(session, parts.queue, job, of, await clock(session))
        except SQLAlchemyError:
            log.exception("a due round could not be settled", round_id=str(round_id))


async def _defer_forgotten_aggregations(parts: Parts) -> None:
    """A killed process leaves rounds aggregating that nobody works on: ask again. Asking twice is harmless."""
    async with parts.sessions.begin() as session:
        now = await clock(session)
        forgotten = await session.scalars(
            select(Round.id)
            .where(Round.phase == RoundPhase.AGGREGATING, Round.deferred_at <= now - parts.settings.aggregation_retry)
            .with_for_update(skip_locked=True)
        )
        for round_id in forgotten.all():
            await session.execute(update(Round).where(Round.id == round_id).values(deferred_at=now))
            await defer(session, parts.queue, AGGREGATE_ROUND, round_id=round_id)
