"""What grants were promised of their datasets' budgets and did not spend: it goes back once they are over."""

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import ColumnElement, exists, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.federation.lifecycle import ENDED_JOBS
from app.ledger.pricing import price_of_round, spends_when_summed
from app.ledger.service import Account, give_back, hold_ledger
from app.models import Dataset, Job, LedgerEntry, Participation, Round, Update
from app.rounds.queries import get_job
from app.rounds.specs import spec_of
from isthmus.privacy.cost import Cost
from isthmus.wire.jobs import JobSpec, ParticipationState
from isthmus.wire.ledger import LedgerKind
from isthmus.wire.privacy import PrivacyPlan
from isthmus.wire.rounds import OPEN_PHASES, TaskKind


def _awaited() -> ColumnElement[bool]:
    """Of a participation: an update of its is in a round that is not over, and may be spent for when it is summed."""
    return exists().where(
        Update.participation_id == Participation.id,
        Update.excluded.is_(False),
        Update.round_id == Round.id,
        Round.phase.in_(OPEN_PHASES),
    )


def _over() -> ColumnElement[bool]:
    """Of a participation joined with its job: nothing is admitted any more under what it was promised."""
    return Job.state.in_(ENDED_JOBS) | ((Participation.state != ParticipationState.APPROVED) & ~_awaited())


async def list_over(session: AsyncSession) -> Sequence[tuple[UUID, UUID]]:
    """(job, participation) to which something is still promised, and which are over."""
    found = await session.execute(
        select(Participation.job_id, Participation.id)
        .join(Job, Job.id == Participation.job_id)
        .where(Participation.reserved_nano.is_not(None), _over())
        .order_by(Participation.id)
    )
    return [(job_id, participation_id) for job_id, participation_id in found]


async def refund(session: AsyncSession, job_id: UUID, participation_id: UUID) -> None:
    """Give back what a participation that is over did not spend. Done again, or too early, it does nothing.

    The job's lock keeps anybody from admitting, approving or withdrawing meanwhile.
    """
    job = await get_job(session, job_id, "update")
    account = await hold_account(session, participation_id)
    over = await session.scalar(
        select(Participation.id)
        .join(Job, Job.id == Participation.job_id)
        .where(Participation.id == participation_id, _over())
    )
    if over is not None:
        await give_back(session, account, spec_of(job).privacy.mode)


async def hold_account(session: AsyncSession, participation_id: UUID) -> Account:
    """A participation's account, locked in the order of the house: participation, dataset, ledger."""
    found = await session.execute(
        select(Participation.job_id, Participation.dataset_id)
        .where(Participation.id == participation_id)
        .with_for_update()
    )
    job_id, dataset_id = found.one()
    ledger_id = (
        await session.scalars(select(Dataset.ledger_id).where(Dataset.id == dataset_id).with_for_update(read=True))
    ).one()
    await hold_ledger(session, ledger_id)
    return Account(ledger_id, dataset_id, job_id, participation_id)


async def has_released(session: AsyncSession, participation_id: UUID) -> bool:
    """Whether anything was spent for a participation."""
    spent = select(LedgerEntry.id).where(
        LedgerEntry.participation_id == participation_id, LedgerEntry.kind == LedgerKind.SPEND
    )
    return (await session.scalar(spent.limit(1))) is not None


async def price_of_awaited(
    session: AsyncSession, job: Job, spec: JobSpec, participation_id: UUID, plan: PrivacyPlan, elements: int
) -> Cost | None:
    """What a participation's update in the open round will be spent for when it is summed; None if there is none."""
    if not spends_when_summed(spec, TaskKind.TRAIN):
        return None
    number = await session.scalar(
        select(Round.number)
        .join(Update, Update.round_id == Round.id)
        .where(
            Round.job_id == job.id,
            Round.phase.in_(OPEN_PHASES),
            Round.kind == TaskKind.TRAIN,
            Update.participation_id == participation_id,
            Update.excluded.is_(False),
        )
    )
    if number is None:
        return None
    return (await price_of_round(spec, job.spec_digest, plan, number, elements)).cost
