"""Reserving, spending and giving back a dataset's budget. Postgres numbers, sums, chains and bounds every entry.

Locks are the last of all: participation, dataset, ledger. The trigger of an entry takes what nobody took before.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from operator import le
from typing import Any, Final, cast
from uuid import UUID

import psycopg
from sqlalchemy import BigInteger, Integer, String, Table, Uuid, bindparam, exists, func, insert, select
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from app.errors import BudgetExhausted, UpdateConflict
from app.ledger.pricing import Price, price_of_grant
from app.models import Ledger, LedgerEntry, Participation
from app.models.base import uuid7
from isthmus.privacy.cost import Cost, Limit, fits
from isthmus.privacy.rdp import ORDERS_VERSION
from isthmus.wire.jobs import JobSpec
from isthmus.wire.ledger import LedgerKind
from isthmus.wire.privacy import PrivacyMode, PrivacyPlan


@dataclass(frozen=True, slots=True)
class Account:
    """Who is charged, and for which part in which job."""

    ledger_id: UUID
    dataset_id: UUID
    job_id: UUID
    participation_id: UUID


@dataclass(frozen=True, slots=True)
class Spend:
    """The one entry of a release."""

    id: UUID
    created_at: datetime


_LESS_PROMISED: Final = "This release costs more than is still promised to the grant. A steward can approve it anew."
_NOT_HELD: Final = (
    "The dataset's privacy budget does not hold this on top of what is spent and promised, or it was lowered or taken "
    "away meanwhile. What was promised to grants that are over comes back to it."
)
_ENTRY: Final[dict[str, Any]] = {
    "id": Uuid(),
    "ledger_id": Uuid(),
    "dataset_id": Uuid(),
    "job_id": Uuid(),
    "participation_id": Uuid(),
    "kind": LedgerEntry.kind.type,
    "round_number": Integer(),
    "release": String(),
    "mode": String(),
    "event": String(),
    "orders_version": String(),
    "rdp_nano": ARRAY(BigInteger),
    "draws": BigInteger(),
    "elements": BigInteger(),
    "digest": String(),
}
_GIVEN: Final = {name: bindparam(f"of_{name}", type_=kind) for name, kind in _ENTRY.items()}
_TABLE: Final = cast("Table", LedgerEntry.__table__)  # as an ORM statement it would be one of many rows
_ENTER: Final = (
    insert(_TABLE)
    .from_select(
        list(_ENTRY),
        # Looked up before, and not by ON CONFLICT: the trigger would have moved the sums when that finds out.
        select(*_GIVEN.values()).where(
            ~exists().where(
                _TABLE.c.participation_id == _GIVEN["participation_id"],
                _TABLE.c.round_number == _GIVEN["round_number"],
                _TABLE.c.release == _GIVEN["release"],
            )
        ),
        include_defaults=False,
    )
    .returning(_TABLE.c.id, _TABLE.c.created_at)
)
_STANDING: Final = select(LedgerEntry.id, LedgerEntry.created_at, LedgerEntry.digest).where(
    LedgerEntry.participation_id == bindparam("participation_id"),
    LedgerEntry.round_number == bindparam("round_number"),
    LedgerEntry.release == bindparam("release"),
)


async def charge(
    session: AsyncSession,
    account: Account,
    price: Price,
    *,
    round_number: int,
    release: str,
    elements: int,
    digest: str,
) -> Spend:
    """Append the one entry for a release. The same bytes again are charged nothing and get the entry that stands.

    Needs the locks of the participation and the ledger, taken by an earlier statement: this one must see what that one
    waited for. The entry's time is Postgres's, read under that lock.

    Guarantees:
        (participation, round, release) has at most one entry, whatever runs at the same time;
        the entries of a ledger are numbered 1, 2, 3, ... in the order in which they were committed.

    Raises:
        UpdateConflict: other bytes were charged for this participation, round and release.
        BudgetExhausted: the release costs something, and the grant reserved less, or the ledger is closed.
    """
    entry = await _enter(
        session, account, LedgerKind.SPEND, price.mode, price.cost, price.event, round_number, release, elements, digest
    )
    if entry is not None:
        return entry
    charged = {
        "participation_id": account.participation_id,
        "round_number": round_number,
        "release": release,
    }
    standing = (await session.execute(_STANDING, charged)).one()
    if standing.digest != digest:
        raise UpdateConflict
    return Spend(standing.id, standing.created_at)


async def require_promised(session: AsyncSession, account: Account, price: Price) -> datetime:
    """See that a release which is spent for later is promised now; the time, by Postgres's clock.

    Needs the locks of the participation and the ledger, taken by an earlier statement.

    Raises:
        BudgetExhausted: it costs more than is still promised, or the ledger is closed.
    """
    found = await session.execute(
        select(Participation.reserved_nano, Participation.reserved_draws, Ledger.closed, func.clock_timestamp())
        .join(Ledger, Ledger.id == account.ledger_id)
        .where(Participation.id == account.participation_id)
    )
    nano, draws, closed, now = found.one()
    promised = nano is not None and all(map(le, price.cost.nano, nano)) and price.cost.draws <= draws
    if price.cost != Cost.zero() and not promised:
        raise BudgetExhausted(_LESS_PROMISED)
    if price.cost != Cost.zero() and closed:
        raise BudgetExhausted(_NOT_HELD)
    moment: datetime = now
    return moment


async def reserve(session: AsyncSession, account: Account, price: Price, *, elements: int) -> None:
    """Promise a grant what it can cost at most. A grant that costs nothing is promised nothing.

    Raises:
        BudgetExhausted: the budget does not hold it, on top of what is spent and promised.
    """
    if price.cost == Cost.zero():
        return
    await _enter(session, account, LedgerKind.RESERVE, price.mode, price.cost, price.event, None, None, elements, None)


async def give_back(session: AsyncSession, account: Account, mode: PrivacyMode, *, keep: Cost | None = None) -> bool:
    """Give back what a participation was promised and did not spend; False if there is nothing.

    Done twice, it gives back once. Whoever calls sees to it that nothing is admitted any more under that promise.

    Args:
        keep: so much of it stays promised; None for nothing.
    """
    found = await session.execute(
        select(Participation.reserved_nano, Participation.reserved_draws)
        .where(Participation.id == account.participation_id)
        .with_for_update(key_share=True)
    )
    nano, draws = found.one()
    if nano is None:
        return False
    kept = Cost.zero() if keep is None else keep
    rest = Cost(
        tuple(max(0, one - other) for one, other in zip(nano, kept.nano, strict=True)), max(0, draws - kept.draws)
    )
    if rest == Cost.zero():
        return False
    await _enter(session, account, LedgerKind.REFUND, mode, rest, None, None, None, 0, None)
    return True


async def _enter(
    session: AsyncSession,
    account: Account,
    kind: LedgerKind,
    mode: PrivacyMode,
    cost: Cost,
    event: str | None,
    round_number: int | None,
    release: str | None,
    elements: int,
    digest: str | None,
) -> Spend | None:
    values = {
        "id": uuid7(),
        "ledger_id": account.ledger_id,
        "dataset_id": account.dataset_id,
        "job_id": account.job_id,
        "participation_id": account.participation_id,
        "kind": kind,
        "round_number": round_number,
        "release": release,
        "mode": mode.value,
        "event": event,
        "orders_version": ORDERS_VERSION,
        "rdp_nano": list(cost.nano),
        "draws": cost.draws,
        "elements": elements,
        "digest": digest,
    }
    async with _refusing():
        row = (await session.execute(_ENTER, {f"of_{name}": value for name, value in values.items()})).one_or_none()
    return None if row is None else Spend(row.id, row.created_at)


@asynccontextmanager
async def _refusing() -> AsyncIterator[None]:
    """What Postgres refuses for the budget's sake, as a refusal. Its transaction cannot go on."""
    try:
        yield
    except DBAPIError as error:
        cause = error.orig
        constraint = cause.diag.constraint_name if isinstance(cause, psycopg.Error) else None
        if constraint == "ck_participations_within_reservation":
            raise BudgetExhausted(_LESS_PROMISED) from error
        if constraint == "ck_ledgers_within_budget" or isinstance(cause, psycopg.errors.NumericValueOutOfRange):
            raise BudgetExhausted(_NOT_HELD) from error
        raise


async def hold_ledger(session: AsyncSession, ledger_id: UUID) -> Ledger:
    """A ledger, locked: nothing is reserved or spent meanwhile but by us."""
    found = await session.scalars(
        select(Ledger)
        .where(Ledger.id == ledger_id)
        .with_for_update(key_share=True)
        .execution_options(populate_existing=True)
    )
    return found.one()


async def shortfall(
    ledger: Ledger, spec: JobSpec, plan: PrivacyPlan, *, rounds: int, elements: int, besides: Cost | None = None
) -> str | None:
    """Why a ledger does not hold a grant of `rounds` rounds, and what would pass; None if it does.

    Args:
        ledger: as it stands.
        spec: the job.
        plan: what its privacy section becomes at the dataset.
        rounds: training rounds of the grant.
        elements: parameters that are noised.
        besides: what is about to be promised before; None for nothing.
    """
    if ledger.epsilon is None or ledger.delta is None or ledger.limit_nano is None or ledger.limit_draws is None:
        return "The dataset has no privacy budget; its worker's configuration sets one."
    limit = Limit(tuple(ledger.limit_nano), ledger.limit_draws)
    spent = Cost(tuple(ledger.spent_nano), ledger.spent_draws)
    taken = spent + Cost(tuple(ledger.reserved_nano), ledger.reserved_draws) + (besides or Cost.zero())
    cost = (await price_of_grant(spec, plan, rounds, elements)).cost
    if fits(taken + cost, limit) and not ledger.closed:
        return None
    told = (
        f"The dataset's privacy budget is epsilon {ledger.epsilon:g} at delta {ledger.delta:g}, over all jobs: "
        f"{_told(spent, ledger.delta)} is spent, and with what is promised {_told(taken, ledger.delta)} is taken. "
    )
    if ledger.closed:
        return told + "It was lowered below that, so nothing more is promised; its worker's configuration can raise it."
    told += (
        f"{rounds} rounds of this job cost {_told(cost, ledger.delta)}, which would make it "
        f"{_told(taken + cost, ledger.delta)}. "
    )
    most = await _most_rounds(spec, plan, rounds, elements, taken, limit)
    if most:
        return told + f"At most {most} of its rounds would pass, or a job with more noise."
    return told + "Not one of its rounds would pass: a job with more noise, or a smaller epsilon, may."


async def _most_rounds(spec: JobSpec, plan: PrivacyPlan, rounds: int, elements: int, taken: Cost, limit: Limit) -> int:
    """The largest grant, of fewer than `rounds` rounds, that a ledger holds; 0 if none."""
    least, most = 0, rounds  # `least` fits, as far as anything does; `most` does not
    while most - least > 1:
        middle = (least + most) // 2
        cost = (await price_of_grant(spec, plan, middle, elements)).cost
        least, most = (middle, most) if fits(taken + cost, limit) else (least, middle)
    return least


def _told(cost: Cost, delta: float) -> str:
    return f"epsilon {cost.epsilon(delta):.4g}"
