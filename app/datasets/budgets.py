"""The ledger that a dataset draws on, and the budget that the policies in force give it."""

from uuid import UUID

from sqlalchemy import func, not_, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from app.models import Dataset, Ledger, Lineage
from isthmus.privacy.conversion import limit_of
from isthmus.privacy.cost import SAMPLER_SHARE, Cost, Limit
from isthmus.privacy.rdp import ORDERS
from isthmus.wire.datasets import Budget, DatasetState, UsePolicy
from isthmus.wire.ledger import BudgetView

TAKEN_AWAY = [-1] * len(ORDERS)
"""The limit of a ledger whose budget is no more: nothing is within it, and what was spent can still be told."""
NO_PROMISE = 1e6
"""The epsilon that is told where nothing is promised, as JSON has no infinity."""


async def open_ledger(session: AsyncSession, organization_id: UUID, lineage: str) -> UUID:
    """The ledger of a lineage of data in an organization: the one that stands, or a new one without a budget."""
    known = await _find_ledger(session, organization_id, lineage)
    if known is None:
        own = await _own_ledger(session, organization_id, lineage)
        await keep_ledger(session, organization_id, lineage, ledger_id=own)
        known = await _find_ledger(session, organization_id, lineage)
        assert known is not None, "lineages are never deleted"
    return known


async def keep_ledger(session: AsyncSession, organization_id: UUID, lineage: str, *, ledger_id: UUID) -> None:
    """Have a lineage that was never heard of draw on a ledger that stands; one that has its ledger keeps it."""
    await session.execute(
        insert(Lineage)
        .values(organization_id=organization_id, lineage=lineage, ledger_id=ledger_id)
        .on_conflict_do_nothing()
    )


async def begin_anew(session: AsyncSession, organization_id: UUID, lineage: str, *, former: UUID) -> UUID:
    """The ledger of a lineage whose records are not those of ledger `former`, after all.

    That is the one that the lineage has through another dataset; or a new one, which it draws on from now on.
    """
    known = await open_ledger(session, organization_id, lineage)
    if known != former:
        return known
    own = await _own_ledger(session, organization_id, lineage)
    await session.execute(
        update(Lineage)
        .where(Lineage.organization_id == organization_id, Lineage.lineage == lineage)
        .values(ledger_id=own)
    )
    return own


async def _find_ledger(session: AsyncSession, organization_id: UUID, lineage: str) -> UUID | None:
    found: UUID | None = await session.scalar(
        select(Lineage.ledger_id).where(Lineage.organization_id == organization_id, Lineage.lineage == lineage)
    )
    return found


async def _own_ledger(session: AsyncSession, organization_id: UUID, lineage: str) -> UUID:
    """The ledger that bears a lineage in all its entries."""
    created: UUID | None = await session.scalar(
        insert(Ledger)
        .values(organization_id=organization_id, lineage=lineage)
        .on_conflict_do_nothing(index_elements=[Ledger.organization_id, Ledger.lineage])
        .returning(Ledger.id)
    )
    if created is not None:
        return created
    found = await session.scalars(
        select(Ledger.id).where(Ledger.organization_id == organization_id, Ledger.lineage == lineage)
    )
    return found.one()


async def settle_budget(session: AsyncSession, ledger_id: UUID) -> None:
    """Give a ledger the budget of the policies in force: the smallest among its confirmed datasets.

    What was only announced counts where nothing is confirmed: it must not close a ledger that others work with.
    Grants keep what is reserved for them. Where a lowered budget does not hold that, the ledger is closed: nothing more
    is reserved or spent, until what is given back, or a larger budget, makes it fit again.
    """
    await session.flush()
    await session.execute(select(Ledger.id).where(Ledger.id == ledger_id).with_for_update(key_share=True))
    standing = (
        await session.execute(
            select(Dataset.state, Dataset.policy).where(
                Dataset.ledger_id == ledger_id, Dataset.state != DatasetState.RETIRED
            )
        )
    ).all()
    confirmed = [policy for state, policy in standing if state == DatasetState.CONFIRMED]
    policies = confirmed or [policy for _state, policy in standing]
    budgets = [budget for policy in policies if (budget := UsePolicy.model_validate(policy).budget) is not None]
    if not budgets:
        taken = {"limit_nano": TAKEN_AWAY, "closed": True}
        await session.execute(update(Ledger).where(Ledger.id == ledger_id, Ledger.epsilon.is_not(None)).values(taken))
        return
    budget = Budget(epsilon=min(item.epsilon for item in budgets), delta=min(item.delta for item in budgets))
    limit = Limit.of(budget.epsilon, budget.delta)
    nano = list(limit.nano)
    within = func.isthmus_within_budget(
        nano, limit.draws, Ledger.reserved_nano, Ledger.reserved_draws, Ledger.spent_nano, Ledger.spent_draws
    )
    await session.execute(
        update(Ledger)
        .where(Ledger.id == ledger_id)
        .values(
            epsilon=budget.epsilon,
            delta=budget.delta,
            limit_nano=nano,
            limit_draws=limit.draws,
            conversion=conversion_of(budget.delta),
            closed=not_(within),
        )
    )


def conversion_of(delta: float) -> list[float]:
    """What epsilon is above the divergence, at each order: what Postgres tells the epsilon of a sum by."""
    return [-bound for bound in limit_of(0.0, (1 - SAMPLER_SHARE) * delta)]


def budget_view(ledger: Ledger) -> BudgetView | None:
    """Where the budget of a ledger stands; None if none was ever set."""
    if ledger.epsilon is None or ledger.delta is None:
        return None
    spent = Cost(tuple(ledger.spent_nano), ledger.spent_draws)
    reserved = Cost(tuple(ledger.reserved_nano), ledger.reserved_draws)
    return BudgetView(
        epsilon=ledger.epsilon,
        delta=ledger.delta,
        spent_epsilon=min(spent.epsilon(ledger.delta), NO_PROMISE),
        reserved_epsilon=min((spent + reserved).epsilon(ledger.delta), NO_PROMISE),
        unaccounted_releases=ledger.unaccounted_releases,
        entries=ledger.head_sequence,
        closed=ledger.closed,
    )
