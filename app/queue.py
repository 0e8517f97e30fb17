"""Work with a body, deferred by name in the caller's own transaction: rolled back, it was never asked for."""

from typing import Final
from uuid import UUID

from procrastinate import App, PsycopgConnector
from sqlalchemy.ext.asyncio import AsyncSession

from app.database import libpq_url, raw_connection

ROUNDS: Final = "rounds"
AGGREGATE_ROUND: Final = "aggregate_round"


def open_queue(url: str) -> App:
    """The queue on the database at `url`. Its jobs carry an id; running one twice or never is harmless."""
    return App(connector=PsycopgConnector(conninfo=libpq_url(url), min_size=1, max_size=4))


async def defer(session: AsyncSession, queue: App, name: str, *, round_id: UUID) -> None:
    """Ask for the task `name` when the transaction of `session` commits."""
    connection = await raw_connection(session)
    await queue.configure_task(name, queue=ROUNDS, connection=connection).defer_async(round_id=str(round_id))
