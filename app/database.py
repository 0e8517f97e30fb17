"""The database: engine, sessions, the one clock, migrations."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

import psycopg
from psycopg_pool import AsyncConnectionPool
from sqlalchemy import Connection, event, func, make_url, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

if TYPE_CHECKING:
    from alembic.config import Config

Sessions = async_sessionmaker[AsyncSession]

UNCOMMITTED: Final = "nothing is committed here"
"""Marks, in its `info`, a session that never commits: nothing can be done at its commit."""
LOCKS_AT_ONCE: Final = 8
"""Of one process: the sweep's, and one for each aggregation that runs."""
LOCK_PATIENCE_S: Final = 4.0
"""So long is a connection for a lock waited for, and so long does the pool go on trying before it begins anew. Left to
itself it waits twice as long after each attempt: a database that was away for minutes would be missed for minutes."""


def sqlalchemy_url(url: str) -> str:
    """`url` (libpq's form) with the driver named: psycopg 3."""
    return make_url(url).set(drivername="postgresql+psycopg").render_as_string(hide_password=False)


def libpq_url(url: str) -> str:
    """`url` in libpq's own form."""
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


def open_engine(url: str, *, connections: int, pooled: bool = False) -> AsyncEngine:
    """A pool of at most `connections`. `pooled`: behind a transaction pooler, so nothing is prepared in a session."""
    return create_async_engine(
        sqlalchemy_url(url),
        pool_size=connections,
        max_overflow=0,
        pool_use_lifo=True,  # the connection used last has its statements prepared
        pool_pre_ping=False,
        connect_args={"prepare_threshold": None} if pooled else {},
    )


def open_sessions(engine: AsyncEngine) -> Sessions:
    """One session is one transaction; nothing is read again after its commit."""
    return async_sessionmaker(engine, expire_on_commit=False)


def open_single_statements(engine: AsyncEngine) -> Sessions:
    """Sessions in which every statement is a transaction of its own: for what takes one statement, or only reads.

    Such a statement goes to Postgres once; BEGIN and COMMIT would make it three times. And nothing is rolled back: with
    a rollback psycopg forgets all prepared statements of the connection, and Postgres plans them anew, which takes it
    many times as long as running them.
    """
    single = engine.execution_options()
    event.listen(single.sync_engine, "engine_connect", _commit_by_itself)
    return async_sessionmaker(single, expire_on_commit=False, info={UNCOMMITTED: True})


def _commit_by_itself(connection: Connection) -> None:
    """Let every statement of a connection just taken from the pool be a transaction of its own.

    psycopg lets others run meanwhile if the event loop was busy, so whoever waits here may be cancelled. Nobody knows
    of the connection yet: given as the engine's own option, the isolation level would lose it, and the pool its place.
    """
    try:
        connection.execution_options(isolation_level="AUTOCOMMIT")
    except BaseException:
        connection.invalidate()  # never to be taken for one that does as transactions do
        raise


_CLOCK: Final = select(func.clock_timestamp())


async def clock(session: AsyncSession) -> datetime:
    """Now, by the one clock: Postgres's. Read it after the lock that the decision stands on."""
    now: datetime = (await session.execute(_CLOCK)).scalar_one()
    return now.astimezone(UTC)


async def raw_connection(session: AsyncSession) -> psycopg.AsyncConnection[tuple[object, ...]]:
    """The psycopg connection under a session's transaction."""
    connection: AsyncConnection = await session.connection()
    driver = (await connection.get_raw_connection()).driver_connection
    assert isinstance(driver, psycopg.AsyncConnection)
    return driver


class AdvisoryLocks:
    """Advisory locks of Postgres, each on a connection of its own, so that they end with the process whatever happens.

    The connections are kept for the next lock: opening one costs more than a round's whole bookkeeping.
    """

    def __init__(self, url: str) -> None:
        self._pool = AsyncConnectionPool(
            libpq_url(url),
            min_size=0,
            max_size=LOCKS_AT_ONCE,
            kwargs={"autocommit": True},
            check=AsyncConnectionPool.check_connection,  # Postgres may have been restarted since the last lock
            timeout=LOCK_PATIENCE_S,
            reconnect_timeout=LOCK_PATIENCE_S,
            open=False,
        )

    async def __aenter__(self) -> Self:
        await self._pool.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._pool.close()

    @asynccontextmanager
    async def hold(self, key: int) -> AsyncIterator[bool]:
        """Hold a lock for as long as the block lasts; False if another holds it, here or in another process."""
        task = asyncio.current_task()
        cancelled = task.cancelling() if task else 0
        async with self._pool.connection() as connection:
            if task and task.cancelling() > cancelled:
                raise asyncio.CancelledError  # lost where the pool waits, by Python 3.11's `wait_for`
            free = False
            try:
                cursor = await connection.execute("SELECT pg_try_advisory_lock(%s)", (key,))
                row = await cursor.fetchone()
                held = bool(row and row[0])
                free = not held
                try:
                    yield held
                finally:
                    if held:
                        with suppress(psycopg.OperationalError):
                            await connection.execute("SELECT pg_advisory_unlock(%s)", (key,))
                            free = True
            finally:
                if not free:  # interrupted while it asked, or could not let go: the lock ends with its connection
                    await connection.close()


def alembic_config(url: str) -> "Config":
    """Alembic's configuration for `url`; migrations stand beside the package."""
    from alembic.config import Config  # noqa: PLC0415 -- serving does without, and a restart should be short

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).resolve().parent.parent / "migrations"))
    config.attributes["url"] = sqlalchemy_url(url)
    return config


def migrate(url: str, revision: str = "head") -> None:
    """Bring the schema of the database at `url` up to `revision`. Two at once wait for each other."""
    from alembic import command  # noqa: PLC0415 -- as above

    command.upgrade(alembic_config(url), revision)
