"""Reading datasets, as far as the caller may see them."""

from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Select, false, select, true
from sqlalchemy.ext.asyncio import AsyncSession

from app.datasets.budgets import budget_view
from app.dependencies import Caller
from app.errors import NotFound
from app.models import Dataset, Ledger, Organization, Worker
from app.pagination import Paging, paginate
from isthmus.wire.base import Page
from isthmus.wire.data import DatasetSchema
from isthmus.wire.datasets import ANY, DatasetState, DatasetView, UsePolicy
from isthmus.wire.organizations import Role


def visible_to(caller: Caller) -> ColumnElement[bool]:
    """Which datasets the caller may see: an admin all, a steward the organization's, a researcher confirmed ones."""
    if caller.role is Role.ADMIN:
        return true()
    if caller.role is Role.STEWARD:
        return Dataset.organization_id == caller.organization_id
    if caller.role is Role.RESEARCHER:
        return Dataset.state == DatasetState.CONFIRMED
    return false()


def view_of(dataset: Dataset, organization: str, worker: str, ledger: Ledger, *, caller: Caller) -> DatasetView:
    """A dataset as answered.

    A researcher is told whether the policy lists him or her, but not who else is listed; neither the lineage, by which
    one could see that two datasets hold the same records, nor what became of the budget: only a job that it does not
    hold is told what would still pass.
    """
    outsider = caller.role is Role.RESEARCHER
    return DatasetView(
        id=dataset.id,
        organization_id=dataset.organization_id,
        organization=organization,
        name=dataset.name,
        worker_id=dataset.worker_id,
        worker=worker,
        state=dataset.state,
        data_schema=DatasetSchema.model_validate(dataset.data_schema),
        rows=dataset.rows,
        task_kinds=dataset.task_kinds,
        description=dataset.description,
        policy=_policy_for(dataset.policy, caller),
        announced_policy=_policy_for(dataset.announced_policy, caller),
        lineage="" if outsider else dataset.lineage,
        ledger_lineage="" if outsider else ledger.lineage,
        budget=None if outsider else budget_view(ledger),
        announced_at=dataset.announced_at,
        confirmed_at=dataset.confirmed_at,
    )


def _policy_for(stored: dict[str, Any], caller: Caller) -> UsePolicy:
    policy = UsePolicy.model_validate(stored)
    if caller.role is not Role.RESEARCHER or policy.principals is None:
        return policy
    own = tuple(name for name in policy.principals if name in (caller.name, ANY))
    return policy.model_copy(update={"principals": own})


def _with_names() -> Select[Dataset, str, str, Ledger]:
    return (
        select(Dataset, Organization.name, Worker.name, Ledger)
        .join(Organization, Organization.id == Dataset.organization_id)
        .join(Worker, Worker.id == Dataset.worker_id)
        .join(Ledger, Ledger.id == Dataset.ledger_id)
    )


async def get_dataset(session: AsyncSession, dataset_id: UUID, *, caller: Caller, lock: bool = False) -> Dataset:
    """The dataset of this id.

    Raises:
        NotFound: there is none that the caller may see.
    """
    statement = select(Dataset).where(Dataset.id == dataset_id, visible_to(caller))
    if lock:
        statement = statement.with_for_update(key_share=True).execution_options(populate_existing=True)
    dataset = (await session.scalars(statement)).one_or_none()
    if dataset is None:
        raise NotFound("dataset", dataset_id)
    return dataset


async def find_dataset(session: AsyncSession, organization_id: UUID, name: str) -> Dataset | None:
    """The organization's dataset of this name, locked."""
    found = await session.scalars(
        select(Dataset)
        .where(Dataset.organization_id == organization_id, Dataset.name == name)
        .with_for_update(key_share=True)
        .execution_options(populate_existing=True)
    )
    return found.one_or_none()


async def get_view(session: AsyncSession, dataset_id: UUID, *, caller: Caller) -> DatasetView:
    """A dataset as answered.

    Raises:
        NotFound: there is none that the caller may see.
    """
    row = (await session.execute(_with_names().where(Dataset.id == dataset_id, visible_to(caller)))).one_or_none()
    if row is None:
        raise NotFound("dataset", dataset_id)
    return view_of(*row, caller=caller)


async def page_datasets(session: AsyncSession, paging: Paging, *, caller: Caller) -> Page[DatasetView]:
    """One page of the datasets that the caller may see, the oldest first."""
    rows, cursor = await paginate(session, _with_names().where(visible_to(caller)), Dataset.id, UUID, paging)
    views = [view_of(*row, caller=caller) for row in rows]
    return Page[DatasetView](items=views, next_cursor=cursor)
