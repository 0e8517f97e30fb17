"""Shares of noise: what a sum costs is spent when its unmasking opens, before anybody tells a share."""

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.ledger.service import charge
from app.models import Job, LedgerEntry, Round
from app.rounds.central import hold_accounts, price_of_part
from app.rounds.queries import list_contributions
from app.rounds.specs import elements_in
from isthmus.wire.ledger import LedgerKind


async def spend_for_survivors(session: AsyncSession, job: Job, of: Round) -> None:
    """Charge every dataset in the frozen set, once for the round whatever the attempt.

    A participation adds the same share of noise to the same update in every attempt, and its worker tells shares for
    one set of survivors only: what a former attempt may have released is this release.

    Raises:
        BudgetExhausted: a ledger was closed after the updates were admitted.
    """
    accounts = await hold_accounts(session, [item.update for item in await list_contributions(session, of.id)])
    found = await session.scalars(
        select(LedgerEntry.participation_id).where(
            LedgerEntry.job_id == job.id,
            LedgerEntry.kind == LedgerKind.SPEND,
            LedgerEntry.round_number == of.number,
            LedgerEntry.release == of.kind.value,
        )
    )
    charged = set(found)
    elements = elements_in(job)
    for account, participation, accepted in accounts:
        if account.participation_id not in charged:
            await charge(
                session,
                account,
                await price_of_part(job, of.number, participation),
                round_number=of.number,
                release=of.kind.value,
                elements=elements,
                digest=accepted.digest,
            )
