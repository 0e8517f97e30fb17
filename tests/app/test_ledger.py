"""The ledger of a dataset: one entry a release, numbered without gaps, never changed."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple
from uuid import UUID

import pytest
from sqlalchemy import event, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.database import Sessions, clock, open_engine, open_sessions
from app.errors import UpdateConflict
from app.ledger.service import charge
from app.models import Dataset, Job, LedgerEntry, Participation
from isthmus.client import Client
from isthmus.wire.problems import ProblemCode
from tests.running import Platform, missing_id, refused

ONE, OTHER = "1" * 64, "2" * 64


class Book(NamedTuple):
    """A dataset that takes part in a job."""

    steward: Client
    dataset_id: UUID
    job_id: UUID
    participation_id: UUID


@asynccontextmanager
async def sessions_of(platform: Platform) -> AsyncIterator[Sessions]:
    engine = open_engine(platform.database_url, connections=8)
    try:
        yield open_sessions(engine)
    finally:
        await engine.dispose()


@pytest.fixture
def book(platform: Platform) -> Book:
    """A dataset with a participation; the job's own fields do not matter here."""
    organization = platform.organization()
    steward, worker = platform.steward(organization), platform.worker(organization)
    dataset = platform.dataset(worker, confirmed_by=steward)
    owner_id = platform.researcher().me().principal.id

    async def take_part() -> tuple[UUID, UUID]:
        async with sessions_of(platform) as sessions, sessions.begin() as session:
            now = await clock(session)
            job = Job(name="job", owner_id=owner_id, spec={}, spec_digest=ONE, created_at=now)
            session.add(job)
            await session.flush()
            participation = Participation(job_id=job.id, dataset_id=dataset.id, declared_rows=303, created_at=now)
            session.add(participation)
            await session.flush()
            return job.id, participation.id

    return Book(steward, dataset.id, *asyncio.run(take_part()))


async def lock(session: AsyncSession, book: Book) -> None:
    """As an admission does, in a statement of its own."""
    await session.execute(select(Dataset.id).where(Dataset.id == book.dataset_id).with_for_update(key_share=True))


async def charged(sessions: Sessions, book: Book, *, round_number: int = 1, digest: str = ONE) -> LedgerEntry:
    async with sessions.begin() as session:
        await lock(session, book)
        return await charge(
            session,
            dataset_id=book.dataset_id,
            job_id=book.job_id,
            participation_id=book.participation_id,
            round_number=round_number,
            release="train",
            clip_norm=1.0,
            noise_multiplier=0.5,
            elements=338,
            digest=digest,
        )


def test_the_same_bytes_again_are_charged_nothing(platform: Platform, book: Book) -> None:
    async def twice() -> tuple[LedgerEntry, LedgerEntry]:
        async with sessions_of(platform) as sessions:
            return await charged(sessions, book), await charged(sessions, book)

    first, second = asyncio.run(twice())

    assert first.id == second.id
    assert platform.execute("SELECT sequence, digest FROM ledger_entries") == [(1, ONE)]


def test_other_bytes_for_the_same_release_are_refused(platform: Platform, book: Book) -> None:
    async def twice() -> None:
        async with sessions_of(platform) as sessions:
            await charged(sessions, book)
            with pytest.raises(UpdateConflict):
                await charged(sessions, book, digest=OTHER)

    asyncio.run(twice())

    assert platform.execute("SELECT digest FROM ledger_entries") == [(ONE,)]


def test_charges_at_once_are_numbered_without_gaps(platform: Platform, book: Book) -> None:
    async def many() -> None:
        async with sessions_of(platform) as sessions:
            await asyncio.gather(*(charged(sessions, book, round_number=number) for number in range(1, 21)))

    asyncio.run(many())

    assert platform.execute("SELECT sequence FROM ledger_entries ORDER BY 1") == [(n,) for n in range(1, 21)]


def test_of_two_digests_at_once_one_is_charged(platform: Platform, book: Book) -> None:
    async def race() -> list[object]:
        async with sessions_of(platform) as sessions:
            both = (charged(sessions, book, digest=digest) for digest in (ONE, OTHER, ONE, OTHER))
            return list(await asyncio.gather(*both, return_exceptions=True))

    answers = asyncio.run(race())

    assert sum(isinstance(answer, UpdateConflict) for answer in answers) == 2
    assert len({answer.id for answer in answers if isinstance(answer, LedgerEntry)}) == 1
    assert platform.execute("SELECT count(*) FROM ledger_entries") == [(1,)]


def test_a_charge_takes_one_statement(platform: Platform, book: Book) -> None:
    async def count() -> int:
        engine = open_engine(platform.database_url, connections=2)
        statements: list[str] = []
        async with open_sessions(engine).begin() as session:
            await lock(session, book)
            event.listen(engine.sync_engine, "before_cursor_execute", lambda *all: statements.append(all[2]))
            await charge(
                session,
                dataset_id=book.dataset_id,
                job_id=book.job_id,
                participation_id=book.participation_id,
                round_number=1,
                release="train",
                clip_norm=None,
                noise_multiplier=0.0,
                elements=1,
                digest=ONE,
            )
        await engine.dispose()
        return len(statements)

    assert asyncio.run(count()) == 1


def test_a_ledger_is_read_in_pages_by_the_steward_and_by_admins(platform: Platform, book: Book) -> None:
    async def many() -> None:
        async with sessions_of(platform) as sessions:
            for number in range(1, 6):
                await charged(sessions, book, round_number=number)

    asyncio.run(many())

    entries = list(book.steward.datasets.ledger(book.dataset_id))
    assert [(entry.sequence, entry.round_number) for entry in entries] == [(n, n) for n in range(1, 6)]
    assert (entries[0].clip_norm, entries[0].noise_multiplier, entries[0].elements) == (1.0, 0.5, 338)
    assert list(platform.admin.datasets.ledger(book.dataset_id)) == entries
    page = book.steward.datasets.ledger_page(book.dataset_id, limit=2)
    assert [entry.sequence for entry in page.items] == [1, 2]
    rest = book.steward.datasets.ledger_page(book.dataset_id, limit=3, cursor=page.next_cursor)
    assert [entry.sequence for entry in rest.items] == [3, 4, 5]
    assert rest.next_cursor is None


def test_a_ledger_is_closed_to_everybody_else(platform: Platform, book: Book) -> None:
    stranger = platform.steward(platform.organization())

    for dataset_id in (book.dataset_id, missing_id()):
        with refused(ProblemCode.NOT_FOUND):
            stranger.datasets.ledger_page(dataset_id)
        with refused(ProblemCode.FORBIDDEN):
            platform.researcher().datasets.ledger_page(dataset_id)
