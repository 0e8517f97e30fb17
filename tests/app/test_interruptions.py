"""Whoever is interrupted while it works on the database ends, and gives its connection back, at whatever step that was.

The event loop is taken for busy all the time: only then does psycopg let others run where it has nothing to wait for.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path

import psycopg.waiting
import pytest
from sqlalchemy import AsyncAdaptedQueuePool, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from app import coordinator
from app.database import AdvisoryLocks, open_engine, open_sessions, open_single_statements, raw_connection
from app.dependencies import Parts
from app.main import open_parts
from app.settings import Settings

Work = Callable[[], Awaitable[None]]
MANY_STEPS = 100
PATIENCE_S = 10.0
KEY = 7
AGAIN = pytest.mark.parametrize("again", [False, True], ids=["once", "again-and-again"])


@pytest.fixture(autouse=True)
def _busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psycopg.waiting, "MAX_BUSY_TIME", -1.0)


async def interrupted(work: Work, after: int, *, again: bool) -> bool:
    """Whether `work` was interrupted: after so many turns of the event loop, once or until it has ended."""
    task = asyncio.ensure_future(work())
    for _ in range(after):
        await asyncio.sleep(0)
    while not task.done():
        task.cancel()
        if not again:
            break
        await asyncio.sleep(0)
    (end,) = await asyncio.gather(task, return_exceptions=True)
    assert end is None or isinstance(end, asyncio.CancelledError), end
    return end is not None


async def at_every_step(work: Work, *, again: bool, then: Work) -> None:
    """Interrupt `work` at its first step, its second, and so on until it is done before; look `then` each time."""
    await work()
    after = 0
    while await interrupted(work, after, again=again):
        await then()
        after += 1
        assert after < MANY_STEPS, "it never gets done"
    assert after > 3, "it was interrupted in its midst"


@AGAIN
@pytest.mark.parametrize("kind", ["transaction", "single statements"])
async def test_an_interrupted_session_gives_its_connection_back_as_it_was(
    database_url: str, kind: str, again: bool
) -> None:
    engine = open_engine(database_url, connections=1)
    sessions, single = open_sessions(engine), open_single_statements(engine)

    def begun() -> AbstractAsyncContextManager[AsyncSession]:
        return sessions.begin() if kind == "transaction" else single()

    async def work() -> None:
        async with begun() as session:
            await session.execute(text("SELECT 1"))

    async def look() -> None:
        assert _taken(engine) == 0
        async with sessions.begin() as session:
            assert not (await raw_connection(session)).autocommit, "a transaction is one"
        async with single() as session:
            assert (await raw_connection(session)).autocommit

    try:
        await at_every_step(work, again=again, then=look)
    finally:
        await engine.dispose()


def _taken(engine: AsyncEngine) -> int:
    assert isinstance(engine.pool, AsyncAdaptedQueuePool)
    return engine.pool.checkedout()


@AGAIN
async def test_an_interrupted_holder_of_a_lock_lets_it_go_and_gives_its_connection_back(
    database_url: str, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    monkeypatch.setattr("app.database.LOCKS_AT_ONCE", 1)
    async with AdvisoryLocks(database_url) as locks, AdvisoryLocks(database_url) as others:

        async def work() -> None:
            async with locks.hold(KEY) as held:
                assert held

        async def free() -> bool:
            async with others.hold(KEY) as held:
                return held

        async def look() -> None:
            async with asyncio.timeout(PATIENCE_S):
                while not await free():  # until Postgres has heard that the connection is closed
                    await asyncio.sleep(0.01)
            await work()

        await at_every_step(work, again=again, then=look)


async def test_an_interruption_that_comes_together_with_a_connection_is_not_lost(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.database.LOCKS_AT_ONCE", 1)
    async with AdvisoryLocks(database_url) as others, others.hold(KEY), AdvisoryLocks(database_url) as locks:

        async def work() -> None:
            async with locks.hold(KEY + 1):
                await asyncio.Event().wait()

        for after in range(20):
            async with locks.hold(KEY) as held:
                assert not held, "so there is nothing to let go, and the next in the queue gets the connection at once"
                task = asyncio.create_task(work())
                for _ in range(5):
                    await asyncio.sleep(0)
            for _ in range(after):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task], timeout=PATIENCE_S)
            assert task.cancelled(), f"after {after} turns"


async def test_a_coordinator_ends_though_its_routines_miss_the_first_word(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = list[str]()

    async def deaf(_: Parts) -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("heard")

    for routine in ("_aggregate_forever", "_sweep_forever", "_collect_forever"):
        monkeypatch.setattr(coordinator, routine, deaf)
    monkeypatch.setattr(coordinator, "CANCEL_AGAIN_S", 0.05)
    async with (
        open_parts(Settings(database_url=database_url, data_dir=tmp_path / "data")) as parts,
        asyncio.timeout(PATIENCE_S),
        coordinator.coordinating(parts),
    ):
        await asyncio.sleep(0)

    assert ended == ["heard"] * 3
