"""What a ledger adds to a round: reserving a grant and spending a slice, as its book grows to ten thousand entries."""

import asyncio
import tempfile
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.database import Sessions, clock, open_engine, open_sessions
from app.datasets.budgets import conversion_of, open_ledger
from app.ledger.pricing import Price
from app.ledger.queries import view_of
from app.ledger.service import Account, charge, hold_ledger, reserve, shortfall
from app.models import Dataset, Job, LedgerEntry, Organization, Participation, Principal, Worker
from app.models.base import uuid7
from benchmarks.federation import database
from benchmarks.tables import Report, Spread, arguments
from isthmus.privacy.chain import verify
from isthmus.privacy.cost import Limit
from isthmus.privacy.planning import grant_cost, plan_of, round_cost
from isthmus.wire.datasets import DatasetState
from isthmus.wire.jobs import JobSpec
from isthmus.wire.organizations import Role
from isthmus.wire.privacy import PrivacyMode, PrivacyPlan
from tests.federation import job_spec

EPSILON, DELTA = 100.0, 1e-5
ROWS, ELEMENTS = 10_000, 100_000
DIGEST = "d" * 64


def main() -> None:
    """Measure what the command line asks for."""
    parser = arguments("ledger", __doc__)
    parser.add_argument("--entries", type=int, default=10_000, help="of the full ledger (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=200, help="of each measurement (default: %(default)s)")
    options = parser.parse_args()
    report = Report("ledger", "One dataset's ledger (ms)", ("entries", "what", "ms", "p99 ms"))
    with tempfile.TemporaryDirectory() as folder, database(Path(folder) / "postgres") as (url, _):
        asyncio.run(_measure(report, url, options.entries, options.repeats))
    report.note("Each in a transaction of its own, with its locks, over the service's own driver; one after the other.")
    report.note("'reserve' looks first whether the budget holds it; with what it costs known, as after a job's first.")
    report.finish(options.json)


async def _measure(report: Report, url: str, entries: int, repeats: int) -> None:
    engine = open_engine(url, connections=4)
    try:
        sessions = open_sessions(engine)
        bench = await _Bench.begin(sessions)
        for size in (0, entries):
            await bench.fill(size)
            there = await bench.count()
            await _timed(repeats, bench.ask)
            reserves = await _timed(repeats, bench.reserve)
            spends = await _timed(repeats, bench.spend)
            for what, samples in (
                ("reserve a grant", reserves),
                ("spend a slice", spends),
                ("both", [one + two for one, two in zip(reserves, spends, strict=True)]),
                ("of a spend, the one statement that an admission makes for it", bench.statements[-repeats:]),
            ):
                spread = Spread.of(samples)
                report.row(there, what, spread, spread.percentile(0.99))
        began = time.perf_counter()
        checked = await bench.verify()
        report.row(checked, "verify the whole chain", 1000 * (time.perf_counter() - began), None)
    finally:
        await engine.dispose()


async def _timed(repeats: int, what: Callable[[], Coroutine[Any, Any, None]]) -> list[float]:
    samples = []
    for _ in range(repeats):
        began = time.perf_counter()
        await what()
        samples.append(1000 * (time.perf_counter() - began))
    return samples


class _Bench:
    """A dataset, and jobs at it."""

    def __init__(self, sessions: Sessions, spec: JobSpec, plan: PrivacyPlan) -> None:
        self.sessions, self.spec, self.plan = sessions, spec, plan
        self.whole = Price(PrivacyMode.RECORD, grant_cost(spec, plan, ELEMENTS, spec.rounds), "{}")
        self.slice = Price(PrivacyMode.RECORD, round_cost(spec, plan, 1, ELEMENTS), "{}")
        self.asked: list[Account] = []
        self.accounts: list[Account] = []
        self.statements: list[float] = []
        self.spent = 0
        self.ledger_id = self.dataset_id = self.owner_id = UUID(int=0)

    @classmethod
    async def begin(cls, sessions: Sessions) -> "_Bench":
        """An organization with one dataset, whose budget holds whatever comes."""
        privacy = {"unit": "record", "clip_norm": 1.0, "noise_multiplier": 2000.0}
        spec = job_spec(privacy=privacy, rounds=1)
        plan = plan_of(spec, ROWS, ELEMENTS)
        assert plan is not None
        bench = cls(sessions, spec, plan)
        async with sessions.begin() as session:
            now = await clock(session)
            organization = Organization(name="clinic", display_name="Clinic", created_at=now)
            owner = Principal(name="ada", display_name="Ada", role=Role.RESEARCHER, created_at=now)
            session.add_all([organization, owner])
            await session.flush()
            agent = Principal(
                name="agent", display_name="Agent", role=Role.WORKER, organization_id=organization.id, created_at=now
            )
            session.add(agent)
            await session.flush()
            worker = Worker(
                organization_id=organization.id,
                principal_id=agent.id,
                name="agent",
                public_key="0" * 64,
                version="1",
                enrolled_at=now,
            )
            session.add(worker)
            await session.flush()
            bench.ledger_id = await open_ledger(session, organization.id, DIGEST)
            ledger, limit = await hold_ledger(session, bench.ledger_id), Limit.of(EPSILON, DELTA)
            ledger.epsilon, ledger.delta, ledger.conversion = EPSILON, DELTA, conversion_of(DELTA)
            ledger.limit_nano, ledger.limit_draws = list(limit.nano), 1 << 62
            dataset = Dataset(
                organization_id=organization.id,
                name="heart",
                worker_id=worker.id,
                state=DatasetState.CONFIRMED,
                data_schema={},
                rows=ROWS,
                task_kinds=["train"],
                description="",
                policy={},
                announced_policy={},
                policy_signature="",
                signed_at=now,
                lineage=DIGEST,
                ledger_id=bench.ledger_id,
                announced_at=now,
            )
            session.add(dataset)
            await session.flush()
            bench.dataset_id, bench.owner_id = dataset.id, owner.id
        return bench

    async def fill(self, entries: int) -> None:
        """Reserve and spend until the ledger has so many entries."""
        while await self.count() < entries:
            async with self.sessions.begin() as session:
                for _ in range(250):
                    account = await self._account(session)
                    await reserve(session, account, self.whole, elements=ELEMENTS)
                    await self._charge(session, account)

    async def count(self) -> int:
        """How many entries there are."""
        async with self.sessions.begin() as session:
            return (await hold_ledger(session, self.ledger_id)).head_sequence

    async def ask(self) -> None:
        """One more participation, which nobody times."""
        async with self.sessions.begin() as session:
            self.asked.append(await self._account(session))

    async def reserve(self) -> None:
        """As an approval does: lock, look, reserve."""
        account = self.asked.pop()
        async with self.sessions.begin() as session:
            ledger = await hold_ledger(session, self.ledger_id)
            lacking = await shortfall(ledger, self.spec, self.plan, rounds=1, elements=ELEMENTS)
            assert lacking is None, lacking
            await reserve(session, account, self.whole, elements=ELEMENTS)
        self.accounts.append(account)

    async def spend(self) -> None:
        """As an admission does: lock, charge."""
        account = self.accounts[self.spent]
        async with self.sessions.begin() as session:
            await hold_ledger(session, self.ledger_id)
            began = time.perf_counter()
            await self._charge(session, account)
            self.statements.append(1000 * (time.perf_counter() - began))
        self.spent += 1

    async def verify(self) -> int:
        """Read every entry and follow the chain; how many there are."""
        async with self.sessions.begin() as session:
            entries = await session.scalars(
                select(LedgerEntry).where(LedgerEntry.ledger_id == self.ledger_id).order_by(LedgerEntry.sequence)
            )
            return verify(map(view_of, entries))[0]

    async def _charge(self, session: AsyncSession, account: Account) -> None:
        await charge(session, account, self.slice, round_number=1, release="train", elements=ELEMENTS, digest=DIGEST)

    async def _account(self, session: AsyncSession) -> Account:
        now = await clock(session)
        job = Job(id=uuid7(), name="job", owner_id=self.owner_id, spec={}, spec_digest=DIGEST, created_at=now)
        session.add(job)
        await session.flush()
        part = Participation(job_id=job.id, dataset_id=self.dataset_id, declared_rows=ROWS, created_at=now)
        session.add(part)
        await session.flush()
        return Account(self.ledger_id, self.dataset_id, job.id, part.id)


if __name__ == "__main__":
    main()
