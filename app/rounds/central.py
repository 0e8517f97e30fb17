"""Central noise: what a round's sum costs is spent, and its noise is fixed, before the first of it is drawn."""

import secrets
from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.ledger.pricing import Price, price_of_round
from app.ledger.service import Account, charge, hold_ledger
from app.models import Dataset, Job, Participation, Round, Update
from app.rounds.queries import hold_round, list_contributions
from app.rounds.specs import elements_in, plan_of, spec_of
from isthmus.privacy.keystream import KEY_BYTES
from isthmus.wire.rounds import RoundPhase


async def price_ahead(session: AsyncSession, round_id: UUID) -> None:
    """Compute what the parts of a round cost before anything is locked: the answers are kept."""
    found = await session.execute(
        select(Job, Round.number, Participation)
        .join(Round, Round.job_id == Job.id)
        .join(Update, Update.round_id == Round.id)
        .join(Participation, Participation.id == Update.participation_id)
        .where(Round.id == round_id, Update.position.is_not(None))
    )
    for job, number, participation in found:
        await price_of_part(job, number, participation)


async def spend_for_noise(session: AsyncSession, round_id: UUID) -> bytes | None:
    """The noise key of a round that is to be summed: spend for every update of its set and draw the key, once.

    Asked again, it is the same key and nothing is spent: a repeated sum is the same release.

    Returns:
        32 bytes; None if there is nothing to sum any more.

    Raises:
        BudgetExhausted: a ledger was closed after the updates were admitted. The round cannot be summed.
    """
    job, of = await hold_round(session, round_id)
    if of.phase is not RoundPhase.AGGREGATING:
        return None
    standing = await session.scalar(select(Round.noise_key).where(Round.id == round_id))
    if standing is not None:
        return standing
    accounts = await hold_accounts(session, [item.update for item in await list_contributions(session, round_id)])
    elements = elements_in(job)
    for account, participation, accepted in accounts:
        await charge(
            session,
            account,
            await price_of_part(job, of.number, participation),
            round_number=of.number,
            release=of.kind.value,
            elements=elements,
            digest=accepted.digest,
        )
    key = secrets.token_bytes(KEY_BYTES)
    await session.execute(update(Round).where(Round.id == round_id).values(noise_key=key))
    return key


async def hold_accounts(
    session: AsyncSession, accepted: Sequence[Update]
) -> list[tuple[Account, Participation, Update]]:
    """Who is charged for updates, in the order of their ledgers: everybody locks in the same one."""
    updates = {item.participation_id: item for item in accepted}
    participations = await session.scalars(
        select(Participation).where(Participation.id.in_(updates)).order_by(Participation.id).with_for_update()
    )
    parts = participations.all()
    found = await session.execute(
        select(Dataset.id, Dataset.ledger_id)
        .where(Dataset.id.in_([part.dataset_id for part in parts]))
        .order_by(Dataset.id)
        .with_for_update(read=True)
    )
    ledgers = {row.id: row.ledger_id for row in found}
    for ledger_id in sorted(set(ledgers.values())):
        await hold_ledger(session, ledger_id)
    accounts = [
        (Account(ledgers[part.dataset_id], part.dataset_id, part.job_id, part.id), part, updates[part.id])
        for part in parts
    ]
    return sorted(accounts, key=lambda item: (item[0].ledger_id, item[0].participation_id))


async def price_of_part(job: Job, number: int, participation: Participation) -> Price:
    """What a participation's ledger is charged for its part in a round."""
    return await price_of_round(spec_of(job), job.spec_digest, plan_of(participation), number, elements_in(job))
