"""The ledger of a dataset: numbered without gaps, chained, never changed, and never overdrawn."""

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple
from uuid import UUID

import psycopg
import pytest
from sqlalchemy import event, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.database import Sessions, clock, open_engine, open_sessions
from app.datasets.budgets import conversion_of
from app.errors import BudgetExhausted, UpdateConflict
from app.ledger.pricing import FREE, Price
from app.ledger.service import Account, Spend, charge, give_back, hold_ledger, reserve
from app.models import Dataset, Job, Participation
from isthmus.client import Client
from isthmus.privacy.chain import verify
from isthmus.privacy.cost import Cost, Limit, times_within
from isthmus.privacy.events import GaussianRelease
from isthmus.wire.base import canonical_json
from isthmus.wire.ledger import LedgerKind
from isthmus.wire.privacy import PrivacyMode
from isthmus.wire.problems import ProblemCode
from tests.running import Platform, missing_id, refused

ONE, OTHER = "1" * 64, "2" * 64
NOISE = GaussianRelease(4.0)
SLICE = Price(PrivacyMode.RECORD, Cost.of(NOISE, 338), canonical_json(NOISE.to_json()).decode())
"""What a round costs in these tests."""


def times(price: Price, count: int) -> Price:
    """The same so many times: what a grant of so many rounds reserves."""
    return Price(price.mode, price.cost * count, price.event)


class Book(NamedTuple):
    """A dataset with a budget that takes part in a job."""

    steward: Client
    account: Account

    @property
    def dataset_id(self) -> UUID:
        return self.account.dataset_id


@asynccontextmanager
async def sessions_of(platform: Platform) -> AsyncIterator[Sessions]:
    engine = open_engine(platform.database_url, connections=8)
    try:
        yield open_sessions(engine)
    finally:
        await engine.dispose()


async def take_part(sessions: Sessions, dataset_id: UUID, owner_id: UUID) -> Account:
    """A participation of a new job; the job's own fields do not matter here."""
    async with sessions.begin() as session:
        now = await clock(session)
        ledger_id = (await session.scalars(select(Dataset.ledger_id).where(Dataset.id == dataset_id))).one()
        job = Job(name="job", owner_id=owner_id, spec={}, spec_digest=ONE, created_at=now)
        session.add(job)
        await session.flush()
        participation = Participation(job_id=job.id, dataset_id=dataset_id, declared_rows=303, created_at=now)
        session.add(participation)
        await session.flush()
        return Account(ledger_id, dataset_id, job.id, participation.id)


async def set_limit(sessions: Sessions, ledger_id: UUID, epsilon: float, delta: float = 1e-5) -> None:
    """Give a ledger a budget, as the policy of its dataset does."""
    limit = Limit.of(epsilon, delta)
    async with sessions.begin() as session:
        ledger = await hold_ledger(session, ledger_id)
        ledger.epsilon, ledger.delta = epsilon, delta
        ledger.limit_nano, ledger.limit_draws = list(limit.nano), limit.draws
        ledger.conversion = conversion_of(delta)


@pytest.fixture
def book(platform: Platform) -> Book:
    """A dataset with a budget of epsilon 3, and a participation."""
    organization = platform.organization()
    steward, worker = platform.steward(organization), platform.worker(organization)
    dataset = platform.dataset(worker, confirmed_by=steward)
    owner_id = platform.researcher().me().principal.id

    async def begin() -> Account:
        async with sessions_of(platform) as sessions:
            account = await take_part(sessions, dataset.id, owner_id)
            await set_limit(sessions, account.ledger_id, 3.0)
            return account

    return Book(steward, asyncio.run(begin()))


async def lock(session: AsyncSession, account: Account) -> None:
    """As an admission does, in a statement of its own."""
    await session.execute(
        select(Participation.id).where(Participation.id == account.participation_id).with_for_update()
    )
    await hold_ledger(session, account.ledger_id)


async def charged(
    sessions: Sessions, account: Account, *, round_number: int = 1, digest: str = ONE, price: Price = FREE
) -> Spend:
    async with sessions.begin() as session:
        await lock(session, account)
        return await charge(
            session, account, price, round_number=round_number, release="train", elements=338, digest=digest
        )


async def reserved(sessions: Sessions, account: Account, price: Price) -> None:
    async with sessions.begin() as session:
        await lock(session, account)
        await reserve(session, account, price, elements=338)


async def given_back(sessions: Sessions, account: Account) -> bool:
    async with sessions.begin() as session:
        await lock(session, account)
        return await give_back(session, account, PrivacyMode.RECORD)


def test_the_same_bytes_again_are_charged_nothing(platform: Platform, book: Book) -> None:
    async def twice() -> tuple[Spend, Spend]:
        async with sessions_of(platform) as sessions:
            await reserved(sessions, book.account, times(SLICE, 2))
            first = await charged(sessions, book.account, price=SLICE)
            return first, await charged(sessions, book.account, price=SLICE)

    first, second = asyncio.run(twice())

    assert first == second
    assert platform.execute("SELECT sequence, digest FROM ledger_entries WHERE kind = 'spend'") == [(2, ONE)]
    assert platform.execute("SELECT spent_nano FROM ledgers") == [(list(SLICE.cost.nano),)]


def test_other_bytes_for_the_same_release_are_refused(platform: Platform, book: Book) -> None:
    async def twice() -> None:
        async with sessions_of(platform) as sessions:
            await charged(sessions, book.account)
            with pytest.raises(UpdateConflict):
                await charged(sessions, book.account, digest=OTHER)

    asyncio.run(twice())

    assert platform.execute("SELECT digest FROM ledger_entries") == [(ONE,)]


def test_charges_at_once_are_numbered_without_gaps(platform: Platform, book: Book) -> None:
    async def many() -> None:
        async with sessions_of(platform) as sessions:
            await asyncio.gather(*(charged(sessions, book.account, round_number=number) for number in range(1, 21)))

    asyncio.run(many())

    assert platform.execute("SELECT sequence FROM ledger_entries ORDER BY 1") == [(n,) for n in range(1, 21)]


def test_charges_at_once_without_any_lock_are_numbered_without_gaps_too(platform: Platform, book: Book) -> None:
    """The trigger takes the lock that its caller forgot."""

    async def one(sessions: Sessions, number: int) -> None:
        async with sessions.begin() as session:
            await charge(session, book.account, FREE, round_number=number, release="train", elements=1, digest=ONE)

    async def many() -> None:
        async with sessions_of(platform) as sessions:
            await asyncio.gather(*(one(sessions, number) for number in range(1, 21)))

    asyncio.run(many())

    assert platform.execute("SELECT sequence FROM ledger_entries ORDER BY 1") == [(n,) for n in range(1, 21)]
    assert len(list(book.steward.datasets.ledger(book.dataset_id))) == 20


def test_of_two_digests_at_once_one_is_charged(platform: Platform, book: Book) -> None:
    async def race() -> list[object]:
        async with sessions_of(platform) as sessions:
            both = (charged(sessions, book.account, digest=digest) for digest in (ONE, OTHER, ONE, OTHER))
            return list(await asyncio.gather(*both, return_exceptions=True))

    answers = asyncio.run(race())

    assert sum(isinstance(answer, UpdateConflict) for answer in answers) == 2
    assert len({answer.id for answer in answers if isinstance(answer, Spend)}) == 1
    assert platform.execute("SELECT count(*) FROM ledger_entries") == [(1,)]


def test_a_charge_takes_one_statement(platform: Platform, book: Book) -> None:
    async def count() -> int:
        engine = open_engine(platform.database_url, connections=2)
        statements: list[str] = []
        async with open_sessions(engine).begin() as session:
            await lock(session, book.account)
            event.listen(engine.sync_engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
            await charge(session, book.account, FREE, round_number=1, release="train", elements=1, digest=ONE)
        await engine.dispose()
        return len(statements)

    assert asyncio.run(count()) == 1


def test_a_release_that_nothing_bounds_costs_nothing_and_is_counted_apart(platform: Platform, book: Book) -> None:
    async def one() -> None:
        async with sessions_of(platform) as sessions:
            await charged(sessions, book.account)

    asyncio.run(one())

    page = book.steward.datasets.ledger_page(book.dataset_id)
    (entry,) = page.items
    assert (entry.kind, entry.mode, entry.event, entry.draws) == (LedgerKind.SPEND, "none", None, 0)
    assert set(entry.rdp_nano) == {0}
    assert page.budget is not None
    assert (page.budget.unaccounted_releases, page.budget.spent_epsilon) == (1, 0.0)


def test_a_reservation_is_spent_slice_by_slice_and_its_rest_given_back_once(platform: Platform, book: Book) -> None:
    async def run() -> tuple[bool, bool]:
        async with sessions_of(platform) as sessions:
            await reserved(sessions, book.account, times(SLICE, 5))
            await charged(sessions, book.account, round_number=1, price=SLICE)
            await charged(sessions, book.account, round_number=2, price=SLICE)
            return await given_back(sessions, book.account), await given_back(sessions, book.account)

    assert asyncio.run(run()) == (True, False)

    page = book.steward.datasets.ledger_page(book.dataset_id)
    spent = SLICE.cost * 2
    assert [entry.kind.value for entry in page.items] == ["reserve", "spend", "spend", "refund"]
    assert page.items[3].rdp_nano == list((SLICE.cost * 3).nano)
    assert page.items[3].draws == 3 * 338
    assert page.budget is not None
    assert page.budget.spent_epsilon == page.budget.reserved_epsilon == spent.epsilon(1e-5)
    assert platform.execute("SELECT reserved_nano, reserved_draws FROM participations") == [(None, 0)]


def test_the_epsilons_that_postgres_writes_are_those_of_our_own_accountant(platform: Platform, book: Book) -> None:
    async def run() -> None:
        async with sessions_of(platform) as sessions:
            await reserved(sessions, book.account, times(SLICE, 3))
            for number in (1, 2, 3):
                await charged(sessions, book.account, round_number=number, price=SLICE)

    asyncio.run(run())

    first, *spends = book.steward.datasets.ledger(book.dataset_id)
    assert (first.spent_epsilon, first.reserved_epsilon) == (0.0, pytest.approx((SLICE.cost * 3).epsilon(1e-5)))
    for count, entry in enumerate(spends, start=1):
        assert entry.spent_epsilon == pytest.approx((SLICE.cost * count).epsilon(1e-5), rel=1e-9)
        assert entry.reserved_epsilon == pytest.approx(first.reserved_epsilon, rel=1e-9)


def test_postgres_refuses_an_overdraft_by_itself(platform: Platform, book: Book) -> None:
    """Whatever the service believes: here it asks for one slice more than fits."""
    most = times_within(SLICE.cost, Limit.of(3.0, 1e-5))

    async def run() -> None:
        async with sessions_of(platform) as sessions:
            await reserved(sessions, book.account, times(SLICE, most))
            with pytest.raises(BudgetExhausted):
                await reserved(sessions, book.account, SLICE)

    asyncio.run(run())

    assert most > 1
    page = book.steward.datasets.ledger_page(book.dataset_id)
    assert len(page.items) == 1
    assert page.budget is not None
    assert 0.8 * 3 < page.budget.reserved_epsilon <= 3


def test_a_spend_beyond_its_own_reservation_does_not_eat_another_s(platform: Platform, book: Book) -> None:
    owner_id = platform.researcher().me().principal.id

    async def run() -> None:
        async with sessions_of(platform) as sessions:
            other = await take_part(sessions, book.dataset_id, owner_id)
            await reserved(sessions, other, times(SLICE, 3))
            await reserved(sessions, book.account, SLICE)
            await charged(sessions, book.account, round_number=1, price=SLICE)
            with pytest.raises(BudgetExhausted, match="still promised to the grant"):
                await charged(sessions, book.account, round_number=2, price=SLICE)

    asyncio.run(run())

    assert platform.execute("SELECT count(*) FROM ledger_entries WHERE kind = 'spend'") == [(1,)]


def test_without_a_budget_nothing_that_costs_is_promised(platform: Platform, book: Book) -> None:
    owner_id = platform.researcher().me().principal.id
    organization = platform.organization()
    dataset = platform.dataset(platform.worker(organization))

    async def run() -> None:
        async with sessions_of(platform) as sessions:
            account = await take_part(sessions, dataset.id, owner_id)
            async with sessions.begin() as session:
                ledger = await hold_ledger(session, account.ledger_id)
                ledger.epsilon = ledger.delta = ledger.limit_nano = ledger.limit_draws = ledger.conversion = None
            with pytest.raises(BudgetExhausted):
                await reserved(sessions, account, SLICE)
            await charged(sessions, account)  # what nothing bounds is not for a budget to refuse

    asyncio.run(run())


def test_a_lowered_budget_closes_the_ledger_until_enough_is_given_back(platform: Platform, book: Book) -> None:
    async def run() -> None:
        async with sessions_of(platform) as sessions:
            await reserved(sessions, book.account, times(SLICE, 5))
            await charged(sessions, book.account, round_number=1, price=SLICE)
            limit = Limit.of(1.001 * (SLICE.cost * 2).epsilon(1e-5), 1e-5)
            async with sessions.begin() as session:
                ledger = await hold_ledger(session, book.account.ledger_id)
                ledger.limit_nano, ledger.closed = list(limit.nano), True
            with pytest.raises(BudgetExhausted):
                await charged(sessions, book.account, round_number=2, price=SLICE)
            await given_back(sessions, book.account)
            await reserved(sessions, book.account, SLICE)
            await charged(sessions, book.account, round_number=2, price=SLICE)

    asyncio.run(run())

    assert platform.execute("SELECT closed FROM ledgers WHERE spent_draws > 0") == [(False,)]


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE ledgers SET spent_nano = reserved_nano",
        "UPDATE ledgers SET reserved_draws = 0, head_sequence = 0",
        "UPDATE ledgers SET unaccounted_releases = 0",
        "UPDATE ledgers SET lineage = 'another'",
        "UPDATE participations SET reserved_nano = NULL",
        "UPDATE ledger_entries SET draws = 1",
        "DELETE FROM ledger_entries",
        "DELETE FROM ledgers",
        "TRUNCATE ledgers CASCADE",
    ],
)
def test_sums_and_entries_cannot_be_changed_but_by_an_entry(platform: Platform, book: Book, statement: str) -> None:
    async def run() -> None:
        async with sessions_of(platform) as sessions:
            await reserved(sessions, book.account, times(SLICE, 2))
            await charged(sessions, book.account)

    asyncio.run(run())

    with pytest.raises(psycopg.errors.RestrictViolation):
        platform.execute(statement)


def tamper(platform: Platform, statement: str) -> None:
    """Change a ledger as somebody could who owns the database."""
    with psycopg.connect(platform.database_url) as connection:
        for table in ("ledgers", "ledger_entries"):
            connection.execute(f"ALTER TABLE {table} DISABLE TRIGGER USER".encode())
        assert connection.execute(statement.encode()).rowcount == 1


TAMPERED: dict[str, tuple[str, int]] = {
    "a cost made smaller": ("UPDATE ledger_entries SET rdp_nano[3] = 0 WHERE sequence = 3", 3),
    "a digest replaced": (f"UPDATE ledger_entries SET digest = '{OTHER}' WHERE sequence = 2", 2),
    "an epsilon told smaller": ("UPDATE ledger_entries SET spent_epsilon = 0 WHERE sequence = 4", 4),
    "a mechanism renamed": ("UPDATE ledger_entries SET event = '{}' WHERE sequence = 2", 2),
    "an hour earlier": ("UPDATE ledger_entries SET created_at = created_at - interval '1 us' WHERE sequence = 2", 2),
    "another participation": ("UPDATE ledger_entries SET round_number = 9 WHERE sequence = 3", 3),
    "an entry taken out": ("DELETE FROM ledger_entries WHERE sequence = 2", 2),
    "the last entry taken out": ("DELETE FROM ledger_entries WHERE sequence = 4", 4),
    "the head turned back": ("UPDATE ledgers SET head_sequence = 3 WHERE head_sequence = 4", 5),
    "a mechanism that is no JSON": ("UPDATE ledger_entries SET event = '{' WHERE sequence = 2", 2),
    "a mechanism written otherwise": ("UPDATE ledger_entries SET event = event || ' ' WHERE sequence = 2", 2),
    "a kind that there is not": ("UPDATE ledger_entries SET kind = 'gift', round_number = NULL WHERE sequence = 3", 3),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_a_row_changed_by_hand_is_named(platform: Platform, book: Book, case: str) -> None:
    async def run() -> None:
        async with sessions_of(platform) as sessions:
            await reserved(sessions, book.account, times(SLICE, 3))
            for number in (1, 2, 3):
                await charged(sessions, book.account, round_number=number, price=SLICE)

    asyncio.run(run())
    assert len(book.steward.datasets.ledger_page(book.dataset_id).items) == 4
    statement, sequence = TAMPERED[case]

    tamper(platform, statement)

    with refused(ProblemCode.LEDGER_TAMPERED) as answer:
        book.steward.datasets.ledger_page(book.dataset_id)
    assert f"entry {sequence}" in str(answer[0])


SUMS: dict[str, tuple[str, str]] = {
    "less spent": ("spent_nano[3] = 0", "what is spent"),
    "less promised": ("reserved_nano[76] = reserved_nano[76] - 1", "what is promised"),
    "fewer draws spent": ("spent_draws = spent_draws - 1", "the draws that are spent"),
    "fewer draws promised": ("reserved_draws = 0", "the draws that are promised"),
    "fewer releases that nothing bounds": ("unaccounted_releases = 0", "the number of releases that nothing bounds"),
}


def spend_some(platform: Platform, book: Book) -> None:
    """Five entries: a reservation, three rounds that cost something, and one that nothing bounds."""

    async def run() -> None:
        async with sessions_of(platform) as sessions:
            await reserved(sessions, book.account, times(SLICE, 5))
            for number in (1, 2, 3):
                await charged(sessions, book.account, round_number=number, price=SLICE)
            await charged(sessions, book.account, round_number=4)

    asyncio.run(run())


@pytest.mark.parametrize("case", SUMS)
@pytest.mark.parametrize("limit", [50, 2])
def test_sums_that_are_not_those_of_the_entries_are_named(
    platform: Platform, book: Book, case: str, limit: int
) -> None:
    spend_some(platform, book)
    assert len(list(book.steward.datasets.ledger(book.dataset_id))) == 5
    change, figure = SUMS[case]

    tamper(platform, f"UPDATE ledgers SET {change} WHERE head_sequence = 5")

    with refused(ProblemCode.LEDGER_TAMPERED) as answer:
        book.steward.datasets.ledger_page(book.dataset_id, limit=limit)
    assert f": {figure} does not follow" in str(answer[0])


def test_sums_stand_when_a_reservation_was_given_back(platform: Platform, book: Book) -> None:
    spend_some(platform, book)

    async def run() -> None:
        async with sessions_of(platform) as sessions:
            assert await given_back(sessions, book.account)

    asyncio.run(run())

    assert len(book.steward.datasets.ledger_page(book.dataset_id).items) == 6


@pytest.mark.parametrize("taken", [2, 3])
def test_an_entry_taken_out_where_a_page_ends_is_missed(platform: Platform, book: Book, taken: int) -> None:
    """The last entry of one page, and the first of the next; those that stand follow each other on the next."""
    spend_some(platform, book)
    cursor = book.steward.datasets.ledger_page(book.dataset_id, limit=2).next_cursor

    tamper(platform, f"DELETE FROM ledger_entries WHERE sequence = {taken}")

    with refused(ProblemCode.LEDGER_TAMPERED) as answer:
        book.steward.datasets.ledger_page(book.dataset_id, limit=2, cursor=cursor)
    assert f"at entry {taken}:" in str(answer[0])


def test_the_entry_before_a_page_is_not_exchanged_for_another(platform: Platform, book: Book) -> None:
    spend_some(platform, book)
    cursor = book.steward.datasets.ledger_page(book.dataset_id, limit=2).next_cursor

    tamper(platform, f"UPDATE ledger_entries SET hash = '{OTHER}' WHERE sequence = 2")

    with refused(ProblemCode.LEDGER_TAMPERED) as answer:
        book.steward.datasets.ledger_page(book.dataset_id, limit=2, cursor=cursor)
    assert "at entry 3:" in str(answer[0])


def test_a_cursor_beyond_the_ledger_is_none_of_ours(platform: Platform, book: Book) -> None:
    spend_some(platform, book)

    with refused(ProblemCode.CURSOR_INVALID):
        book.steward.datasets.ledger_page(book.dataset_id, cursor=base64.urlsafe_b64encode(b"600").decode())


def test_entries_that_were_all_taken_out_are_missed(platform: Platform, book: Book) -> None:
    async def run() -> None:
        async with sessions_of(platform) as sessions:
            await charged(sessions, book.account)

    asyncio.run(run())
    tamper(platform, "DELETE FROM ledger_entries")

    with refused(ProblemCode.LEDGER_TAMPERED):
        book.steward.datasets.ledger_page(book.dataset_id)


def test_a_ledger_is_read_in_pages_by_the_steward_and_by_admins(platform: Platform, book: Book) -> None:
    async def many() -> None:
        async with sessions_of(platform) as sessions:
            await reserved(sessions, book.account, times(SLICE, 4))
            for number in range(1, 5):
                await charged(sessions, book.account, round_number=number, price=SLICE)

    asyncio.run(many())

    entries = list(book.steward.datasets.ledger(book.dataset_id))
    assert [(entry.sequence, entry.round_number) for entry in entries] == [(1, None), (2, 1), (3, 2), (4, 3), (5, 4)]
    assert entries[1].event == NOISE.to_json()
    assert verify(entries)[0] == 5
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
