"""Advisory locks: whatever goes wrong with letting go of one, nobody waits for it for ever."""

from typing import Any

import psycopg
import pytest

from app.database import AdvisoryLocks

KEY = 7


async def _is_free(url: str) -> bool:
    async with AdvisoryLocks(url) as others, others.hold(KEY) as held:
        return held


async def test_one_holds_a_lock_and_it_is_free_afterwards(database_url: str) -> None:
    async with AdvisoryLocks(database_url) as locks:
        async with locks.hold(KEY) as held, locks.hold(KEY) as again:
            assert (held, again) == (True, False)
        assert await _is_free(database_url)


@pytest.mark.parametrize("statement", ["SELECT pg_try_advisory_lock(%s)", "SELECT pg_advisory_unlock(%s)"])
async def test_a_lock_ends_with_its_connection_when_it_could_not_be_let_go(
    database_url: str, monkeypatch: pytest.MonkeyPatch, statement: str
) -> None:
    execute: Any = psycopg.AsyncConnection.execute
    failed = list[str]()

    async def interrupted(connection: psycopg.AsyncConnection, query: str, *given: Any, **more: Any) -> Any:
        if query != statement or failed:
            return await execute(connection, query, *given, **more)
        failed.append(query)
        if "try" in query:
            await execute(connection, query, *given, **more)  # Postgres has done it already
        raise psycopg.errors.QueryCanceled("interrupted")

    async with AdvisoryLocks(database_url) as locks:
        with monkeypatch.context() as patched:
            patched.setattr(psycopg.AsyncConnection, "execute", interrupted)
            try:
                async with locks.hold(KEY):
                    pass
            except psycopg.errors.QueryCanceled:
                assert "try" in statement
        assert failed
        assert await _is_free(database_url)
