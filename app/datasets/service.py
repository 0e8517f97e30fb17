"""Workers announce datasets; the stewards of their organization, and nobody else, decide on them."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit.service import append, organization_stream
from app.database import clock
from app.datasets import queries
from app.dependencies import Caller
from app.errors import DatasetServedElsewhere, Forbidden
from app.models import Dataset, Worker
from isthmus.wire.base import digest_of
from isthmus.wire.data import ColumnSchema, DatasetSchema
from isthmus.wire.datasets import AnnounceDataset, DatasetState, DatasetView, UsePolicy
from isthmus.wire.events import EventKind


async def announce_dataset(session: AsyncSession, name: str, body: AnnounceDataset, *, caller: Caller) -> DatasetView:
    """Say what a worker can read. A new dataset is closed: no policy opens it, and no steward has confirmed it yet.

    Announced again by its worker, it takes the new description and number of rows and stays confirmed; other columns,
    or another worker (which needs the former one to be revoked), are for the steward to confirm anew. A retired
    dataset stays retired. Announcing what is known already changes nothing.

    Raises:
        DatasetServedElsewhere: another worker of the organization, not revoked, serves the dataset.
    """
    worker_id, organization_id, organization = _worker(caller)
    now = await clock(session)
    dataset = await queries.find_dataset(session, organization_id, name)
    told = {
        "data_schema": body.data_schema.model_dump(mode="json"),
        "rows": body.rows,
        "task_kinds": [kind.value for kind in body.task_kinds],
        "description": body.description,
    }
    if dataset is None:
        created = await session.scalars(
            insert(Dataset)
            .values(
                organization_id=organization_id,
                name=name,
                worker_id=worker_id,
                policy=UsePolicy().model_dump(mode="json"),
                announced_at=now,
                **told,
            )
            .on_conflict_do_nothing(index_elements=[Dataset.organization_id, Dataset.name])
            .returning(Dataset)
        )
        dataset = created.one_or_none()
        if dataset is not None:
            await _announced(session, dataset, at=now, actor=caller.name)
        else:  # another worker was faster by a moment
            dataset = await queries.find_dataset(session, organization_id, name)
            assert dataset is not None, "datasets are never deleted"
    if await _change(session, dataset, told, worker_id=worker_id, now=now):
        await _announced(session, dataset, at=now, actor=caller.name)
    name_of_worker = (await session.scalars(select(Worker.name).where(Worker.id == worker_id))).one()
    return queries.view_of(dataset, organization, name_of_worker, caller=caller)


def _worker(caller: Caller) -> tuple[UUID, UUID, str]:
    """The worker behind a key, its organization, and that one's name."""
    if caller.worker_id is None or caller.organization_id is None or caller.organization is None:
        raise Forbidden("Datasets are announced by the workers that serve them.")
    return caller.worker_id, caller.organization_id, caller.organization


async def _change(
    session: AsyncSession, dataset: Dataset, told: dict[str, Any], *, worker_id: UUID, now: datetime
) -> bool:
    """Bring the row up to what the worker told; whether that changed anything."""
    moved = dataset.worker_id != worker_id
    if moved:
        serving = (await session.scalars(select(Worker).where(Worker.id == dataset.worker_id))).one()
        if serving.revoked_at is None:
            raise DatasetServedElsewhere(
                f"Worker {serving.name!r} of your organization serves dataset {dataset.name!r}. Have it revoked, or "
                "announce under another name."
            )
    changed = {field: value for field, value in told.items() if getattr(dataset, field) != value}
    if not changed and not moved:
        return False
    reshaped = "data_schema" in changed and _columns(changed["data_schema"]) != _columns(dataset.data_schema)
    for field, value in changed.items():
        setattr(dataset, field, value)
    dataset.worker_id, dataset.announced_at = worker_id, now
    if (moved or reshaped) and dataset.state is DatasetState.CONFIRMED:
        dataset.state, dataset.confirmed_at = DatasetState.ANNOUNCED, None
    await session.flush()
    return True


def _columns(schema: dict[str, Any]) -> dict[str, ColumnSchema]:
    """The columns by name: their order means nothing, nor do keys that a schema was stored without, long ago."""
    return {column.name: column for column in DatasetSchema.model_validate(schema).columns}


async def _announced(session: AsyncSession, dataset: Dataset, *, at: datetime, actor: str) -> None:
    append(
        session,
        organization_stream(dataset.organization_id),
        EventKind.DATASET_ANNOUNCED,
        at=at,
        actor=actor,
        dataset_id=str(dataset.id),
        name=dataset.name,
        worker_id=str(dataset.worker_id),
        state=dataset.state.value,
        rows=dataset.rows,
        schema_digest=digest_of(dataset.data_schema),
    )


async def confirm_dataset(session: AsyncSession, dataset_id: UUID, *, caller: Caller) -> DatasetView:
    """Let a dataset take part in jobs, as far as its policy goes. A retired one comes back with its ledger.

    Raises:
        NotFound: there is no such dataset, or it is another organization's.
    """
    dataset = await queries.get_dataset(session, dataset_id, caller=caller, lock=True)
    if dataset.state is not DatasetState.CONFIRMED:
        now = await clock(session)
        dataset.state, dataset.confirmed_at = DatasetState.CONFIRMED, now
        await _decided(session, dataset, EventKind.DATASET_CONFIRMED, at=now, caller=caller, rows=dataset.rows)
    return await queries.get_view(session, dataset_id, caller=caller)


async def retire_dataset(session: AsyncSession, dataset_id: UUID, *, caller: Caller) -> DatasetView:
    """Take a dataset out of all future rounds and jobs. Its name stays its own, and its ledger stays readable.

    Raises:
        NotFound: there is no such dataset, or it is another organization's.
    """
    dataset = await queries.get_dataset(session, dataset_id, caller=caller, lock=True)
    if dataset.state is not DatasetState.RETIRED:
        now = await clock(session)
        dataset.state, dataset.confirmed_at = DatasetState.RETIRED, None
        await _decided(session, dataset, EventKind.DATASET_RETIRED, at=now, caller=caller)
    return await queries.get_view(session, dataset_id, caller=caller)


async def set_policy(session: AsyncSession, dataset_id: UUID, policy: UsePolicy, *, caller: Caller) -> DatasetView:
    """Say what the dataset may be used for. Grants given under the former policy hold until they are withdrawn.

    Raises:
        NotFound: there is no such dataset, or it is another organization's.
    """
    dataset = await queries.get_dataset(session, dataset_id, caller=caller, lock=True)
    former = UsePolicy.model_validate(dataset.policy)
    if policy != former:
        now = await clock(session)
        dataset.policy = policy.model_dump(mode="json")
        dataset.policy_set_by = caller.principal_id
        await _decided(
            session,
            dataset,
            EventKind.DATASET_POLICY_SET,
            at=now,
            caller=caller,
            policy_digest=digest_of(policy),
            former_policy_digest=digest_of(former),
        )
    return await queries.get_view(session, dataset_id, caller=caller)


async def _decided(
    session: AsyncSession, dataset: Dataset, kind: EventKind, *, at: datetime, caller: Caller, **data: Any
) -> None:
    append(
        session,
        organization_stream(dataset.organization_id),
        kind,
        at=at,
        actor=caller.name,
        dataset_id=str(dataset.id),
        name=dataset.name,
        schema_digest=digest_of(dataset.data_schema),
        **data,
    )
