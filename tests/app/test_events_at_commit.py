"""Events are written when their transaction commits, letter by letter what was hashed, or not at all."""

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest

from app.audit.service import PLATFORM, append
from app.database import open_engine, open_sessions, open_single_statements
from isthmus.wire.events import EventKind, EventView, verify_chain
from tests.running import Platform

AT = datetime(2026, 1, 31, 12, 0, 0, 123456, tzinfo=UTC)


async def appended(url: str, *data: dict[str, Any], then: Exception | None = None) -> None:
    engine = open_engine(url, connections=2)
    try:
        async with open_sessions(engine).begin() as session:
            for item in data:
                append(session, PLATFORM, EventKind.JOB_CREATED, at=AT, **item)
            if then is not None:
                raise then
    finally:
        await engine.dispose()


def chain(platform: Platform) -> list[EventView]:
    return list(platform.admin.events.list(PLATFORM))


def test_numbers_come_back_as_they_were_hashed(platform: Platform) -> None:
    before = len(chain(platform))
    hard = {
        "large": 1e16,
        "minus": -0.0,
        "whole": 10**15,
        "text": 'a "quoted" \\ ü \u2028 line',
        "deep": [{"a": [1.5, None]}],
    }

    asyncio.run(appended(platform.database_url, hard, {"second": True}))

    found = chain(platform)
    assert len(found) == before + 2
    assert found[-2].data == hard
    assert str(found[-2].data["minus"]) == "-0.0"
    assert found[-1].data == {"second": True}
    assert found[-1].at == AT
    verify_chain(found)


def test_a_transaction_that_is_rolled_back_leaves_no_event(platform: Platform) -> None:
    before = chain(platform)

    with pytest.raises(LookupError):
        asyncio.run(appended(platform.database_url, {"lost": True}, then=LookupError()))

    assert chain(platform) == before


def test_transactions_at_once_make_one_chain(platform: Platform) -> None:
    before = len(chain(platform))

    async def many() -> None:
        await asyncio.gather(*(appended(platform.database_url, {"number": n}, {"again": n}) for n in range(12)))

    asyncio.run(many())

    found = chain(platform)
    assert len(found) == before + 24
    verify_chain(found)


def test_where_nothing_is_committed_an_event_is_refused(platform: Platform) -> None:
    async def lost() -> None:
        engine = open_engine(platform.database_url, connections=2)
        try:
            async with open_single_statements(engine)() as session:
                append(session, PLATFORM, EventKind.JOB_CREATED, at=AT)
        finally:
            await engine.dispose()

    with pytest.raises(RuntimeError, match="never commits"):
        asyncio.run(lost())
