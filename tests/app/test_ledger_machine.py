"""Whatever is reserved, spent, given back, cut off and raced, in any order: no ledger is overdrawn, and all adds up.

A state machine drives one ledger of a real Postgres over several connections at once and keeps its own books beside it.
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar
from uuid import UUID

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from sqlalchemy import select

from app.database import clock, open_engine, open_sessions
from app.datasets.budgets import conversion_of, open_ledger
from app.errors import BudgetExhausted, UpdateConflict
from app.ledger.pricing import FREE, Price
from app.ledger.queries import view_of
from app.ledger.service import Account, charge, give_back, hold_ledger, reserve
from app.models import Dataset, Job, Ledger, LedgerEntry, Organization, Participation
from app.models.base import uuid7
from isthmus.privacy.chain import verify
from isthmus.privacy.cost import Cost, Limit, fits
from isthmus.privacy.events import GaussianRelease, PoissonGaussianRelease, Repeated
from isthmus.wire.ledger import LedgerKind
from isthmus.wire.privacy import PrivacyMode
from tests.running import Platform

EVENTS: Final = (
    GaussianRelease(10.0),
    GaussianRelease(30.0, sensitivity=2.0),
    Repeated(PoissonGaussianRelease(0.05, 1.5), 5),
)
PRICES: Final = tuple(Price(PrivacyMode.RECORD, Cost.of(event, 100), None) for event in EVENTS)
DIGESTS: Final = ("1" * 64, "2" * 64)
PARTS = 4
Answer = TypeVar("Answer")


class Killed(Exception):
    """The process died before its commit."""


class Book:
    """What one participation was promised and has released, by our own account."""

    def __init__(self, account: Account, price: Price) -> None:
        self.account, self.price = account, price
        self.reserved = Cost.zero()
        self.released: dict[int, str] = {}


class LedgerMachine(RuleBasedStateMachine):
    """Jobs that come and go at one dataset."""

    database_url: str
    owner_id: UUID
    names = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.engine = open_engine(self.database_url, connections=6)
        self.sessions = open_sessions(self.engine)
        self.books: list[Book] = []
        self.spent = Cost.zero()
        self.limit = Limit.of(3.0, 1e-5)
        self.unaccounted = 0

    def teardown(self) -> None:
        self.runner.run(self.engine.dispose())
        self.runner.close()

    def run(self, what: Callable[[], Awaitable[Answer]]) -> Answer:
        async def wrapped() -> Answer:
            return await what()

        return self.runner.run(wrapped())

    @initialize(epsilon=st.sampled_from([1.0, 2.0, 4.0]))
    def begin(self, epsilon: float) -> None:
        self.limit = Limit.of(epsilon, 1e-5)

        async def create() -> list[Account]:
            async with self.sessions.begin() as session:
                now = await clock(session)
                number = next(self.names)
                organization = Organization(name=f"machine-{number}", display_name="Machine", created_at=now)
                session.add(organization)
                await session.flush()
                ledger_id = await open_ledger(session, organization.id, f"{number:064x}")
                ledger = await hold_ledger(session, ledger_id)
                ledger.epsilon, ledger.delta, ledger.conversion = epsilon, 1e-5, conversion_of(1e-5)
                ledger.limit_nano, ledger.limit_draws = list(self.limit.nano), self.limit.draws
                template = (await session.scalars(select(Dataset).limit(1))).one()
                columns = {c.name: getattr(template, c.name) for c in Dataset.__table__.columns}
                dataset = Dataset(
                    **{
                        **columns,
                        "id": uuid7(),
                        "organization_id": organization.id,
                        "name": f"heart-{number}",
                        "ledger_id": ledger_id,
                    }
                )
                session.add(dataset)
                await session.flush()
                accounts = []
                for _ in range(PARTS):
                    job = Job(name="job", owner_id=self.owner_id, spec={}, spec_digest=DIGESTS[0], created_at=now)
                    session.add(job)
                    await session.flush()
                    part = Participation(job_id=job.id, dataset_id=dataset.id, declared_rows=1, created_at=now)
                    session.add(part)
                    await session.flush()
                    accounts.append(Account(ledger_id, dataset.id, job.id, part.id))
                return accounts

        for number, account in enumerate(self.run(create)):
            self.books.append(Book(account, PRICES[number % len(PRICES)]))

    async def reserving(self, book: Book, rounds: int, killed: bool = False) -> bool:
        """Whether the promise was made."""
        price = Price(book.price.mode, book.price.cost * rounds, None)
        try:
            async with self.sessions.begin() as session:
                await reserve(session, book.account, price, elements=1)
                if killed:
                    raise Killed
        except (BudgetExhausted, Killed):
            return False
        return True

    async def spending(
        self, book: Book, number: int, price: Price, digest: str = DIGESTS[0], killed: bool = False
    ) -> str:
        """What came of it: spent, exhausted, conflict or killed."""
        try:
            async with self.sessions.begin() as session:
                await session.execute(
                    select(Participation.id).where(Participation.id == book.account.participation_id).with_for_update()
                )
                await hold_ledger(session, book.account.ledger_id)
                await charge(
                    session, book.account, price, round_number=number, release="train", elements=1, digest=digest
                )
                if killed:
                    raise Killed
        except BudgetExhausted:
            return "exhausted"
        except UpdateConflict:
            return "conflict"
        except Killed:
            return "killed"
        return "spent"

    async def refunding(self, book: Book, killed: bool = False) -> bool:
        try:
            async with self.sessions.begin() as session:
                given = await give_back(session, book.account, PrivacyMode.RECORD)
                if killed:
                    raise Killed
        except Killed:
            return False
        return given

    def taken(self) -> Cost:
        found = self.spent
        for book in self.books:
            found = found + book.reserved
        return found

    @rule(part=st.integers(0, PARTS - 1), rounds=st.integers(1, 12), killed=st.booleans())
    def reserve_one(self, part: int, rounds: int, killed: bool) -> None:
        book = self.books[part]
        cost = book.price.cost * rounds
        holds = fits(self.taken() + cost, self.limit)

        assert self.run(lambda: self.reserving(book, rounds, killed)) is (holds and not killed)
        if holds and not killed:
            book.reserved = book.reserved + cost

    @rule(
        part=st.integers(0, PARTS - 1), number=st.integers(1, 6), digest=st.sampled_from(DIGESTS), killed=st.booleans()
    )
    def spend_one(self, part: int, number: int, digest: str, killed: bool) -> None:
        book, cost = self.books[part], self.books[part].price.cost
        if number in book.released:
            expected = "conflict" if book.released[number] != digest else "killed" if killed else "spent"
        elif all(a <= b for a, b in zip(cost.nano, book.reserved.nano, strict=True)):
            expected = "killed" if killed else "spent"
            if not killed:
                book.released[number] = digest
                book.reserved = Cost(
                    tuple(b - a for a, b in zip(cost.nano, book.reserved.nano, strict=True)),
                    book.reserved.draws - cost.draws,
                )
                self.spent = self.spent + cost
        else:
            expected = "exhausted"

        assert self.run(lambda: self.spending(book, number, book.price, digest, killed)) == expected

    @rule(part=st.integers(0, PARTS - 1), number=st.integers(7, 9))
    def spend_free(self, part: int, number: int) -> None:
        book = self.books[part]
        self.unaccounted += number not in book.released
        book.released.setdefault(number, DIGESTS[0])

        assert self.run(lambda: self.spending(book, number, FREE)) == "spent"

    @rule(part=st.integers(0, PARTS - 1), killed=st.booleans())
    def give_back_one(self, part: int, killed: bool) -> None:
        book = self.books[part]
        expected = book.reserved != Cost.zero() and not killed

        assert self.run(lambda: self.refunding(book, killed)) is expected
        if not killed:
            book.reserved = Cost.zero()

    @rule(rounds=st.lists(st.integers(1, 12), min_size=PARTS, max_size=PARTS))
    def reserve_at_once(self, rounds: list[int]) -> None:
        """All jobs at the same time: who wins is open, that it fits is not."""

        async def race() -> list[bool]:
            return list(await asyncio.gather(*map(self.reserving, self.books, rounds)))

        before = self.taken()
        won = self.run(race)
        for book, count, made in zip(self.books, rounds, won, strict=True):
            if made:
                book.reserved = book.reserved + book.price.cost * count
        assert fits(self.taken(), self.limit)
        for book, count, made in zip(self.books, rounds, won, strict=True):
            if not made:  # a refusal is right only if it did not fit beside those who won
                assert not fits(self.taken() + book.price.cost * count, self.limit)
        assert any(won) or not any(
            fits(before + book.price.cost * count, self.limit) for book, count in zip(self.books, rounds, strict=True)
        )

    @rule(part=st.integers(0, PARTS - 1), numbers=st.lists(st.integers(10, 30), min_size=2, max_size=6))
    def spend_at_once(self, part: int, numbers: list[int]) -> None:
        """Rounds of one participation, the same one several times among them, and a refund in between."""
        book, cost = self.books[part], self.books[part].price.cost

        async def race() -> list[Any]:
            spends = [self.spending(book, number, book.price) for number in numbers]
            return list(await asyncio.gather(*spends, self.refunding(book)))

        *answers, _ = self.run(race)
        for number, answer in zip(numbers, answers, strict=True):
            assert answer in ("spent", "exhausted")
            if answer == "spent" and number not in book.released:
                book.released[number] = DIGESTS[0]
                self.spent = self.spent + cost
        # A refused one may be in by its twin; what is left is told by the database, and checked against the entries.
        book.reserved = self.run(lambda: self.remainder(book))

    async def remainder(self, book: Book) -> Cost:
        async with self.sessions.begin() as session:
            found = await session.execute(
                select(Participation.reserved_nano, Participation.reserved_draws).where(
                    Participation.id == book.account.participation_id
                )
            )
            nano, draws = found.one()
            return Cost.zero() if nano is None else Cost(tuple(nano), draws)

    @invariant()
    def books_and_ledger_agree(self) -> None:
        if not self.books:
            return
        ledger, entries, remainders = self.run(self.everything)
        told = {kind: Cost.zero() for kind in LedgerKind}
        for entry in entries:
            told[entry.kind] = told[entry.kind] + Cost(tuple(entry.rdp_nano), entry.draws)
        reserved = Cost(tuple(ledger.reserved_nano), ledger.reserved_draws)
        spent = Cost(tuple(ledger.spent_nano), ledger.spent_draws)

        assert fits(reserved + spent, self.limit)
        assert spent == told[LedgerKind.SPEND] == self.spent
        assert reserved + spent + told[LedgerKind.REFUND] == told[LedgerKind.RESERVE]
        assert sum(remainders, Cost.zero()) == reserved
        assert remainders == [book.reserved for book in self.books]
        assert ledger.unaccounted_releases == self.unaccounted
        verify(map(view_of, entries), until=(ledger.head_sequence, ledger.head_hash))
        if entries:
            assert entries[-1].spent_epsilon == pytest.approx(self.spent.epsilon(1e-5), rel=1e-9)
            assert entries[-1].reserved_epsilon == pytest.approx(self.taken().epsilon(1e-5), rel=1e-9)

    async def everything(self) -> tuple[Ledger, list[LedgerEntry], list[Cost]]:
        async with self.sessions.begin() as session:
            ledger_id = self.books[0].account.ledger_id
            ledger = (await session.scalars(select(Ledger).where(Ledger.id == ledger_id))).one()
            entries = await session.scalars(
                select(LedgerEntry).where(LedgerEntry.ledger_id == ledger_id).order_by(LedgerEntry.sequence)
            )
            listed = list(entries)
        return ledger, listed, [await self.remainder(book) for book in self.books]


def test_no_interleaving_overdraws_a_ledger_and_every_sum_is_that_of_its_entries(platform: Platform) -> None:
    organization = platform.organization()
    platform.dataset(platform.worker(organization), confirmed_by=platform.steward(organization))
    LedgerMachine.database_url = platform.database_url
    LedgerMachine.owner_id = platform.researcher().me().principal.id

    run_state_machine_as_test(
        LedgerMachine,
        settings=settings(
            max_examples=15, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )

    assert platform.execute("SELECT count(*) > 20 FROM ledger_entries") == [(True,)]
