"""Workers announce datasets; the stewards of their organization, and nobody else, decide on them."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import exists, or_, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit.service import append, organization_stream
from app.database import clock
from app.datasets import queries
from app.datasets.announcements import require_newer, require_signature
from app.datasets.budgets import begin_anew, keep_ledger, open_ledger, settle_budget
from app.datasets.handovers import take_over
from app.dependencies import Caller
from app.errors import DatasetServedElsewhere, Forbidden, PolicyLoosened, StateConflict
from app.federation.lifecycle import ENDED_JOBS
from app.models import Dataset, Job, Ledger, Participation, Worker
from isthmus.wire.base import digest_of
from isthmus.wire.data import ColumnSchema, DatasetSchema
from isthmus.wire.datasets import (
    AnnounceDataset,
    ConfirmDataset,
    DatasetState,
    DatasetView,
    UsePolicy,
    loosened,
    strictest,
)
from isthmus.wire.events import EventKind
from isthmus.wire.jobs import ParticipationState


async def announce_dataset(session: AsyncSession, name: str, body: AnnounceDataset, *, caller: Caller) -> DatasetView:
    """Say what a worker can read, and for what, under its signature. No steward has confirmed a new dataset yet.

    Announced again by its worker, it takes the new description and number of rows and stays confirmed. Other columns,
    another lineage, a policy that allows more than the last one, or another worker (which needs the former one to be
    revoked), are for the steward to confirm anew; a policy that allows less is in force at once. A worker to which the
    former one has handed the dataset on takes its place. A retired dataset stays retired. Announcing what is known
    already changes nothing. Whatever the lineage, the dataset draws on the ledger that it has had, and a lineage that
    was never heard of draws on that one too, under every name: whether these are other records, a steward says.

    Raises:
        PolicySignatureInvalid: policy and lineage are not signed by the worker for this dataset, or not last.
        DatasetServedElsewhere: another worker of the organization, not revoked, serves the dataset.
    """
    worker_id, organization_id, organization = _worker(caller)
    worker = (await session.scalars(select(Worker).where(Worker.id == worker_id))).one()
    now = await clock(session)
    require_signature(body, organization=organization, dataset=name, public_key=worker.public_key, now=now)
    dataset = await queries.find_dataset(session, organization_id, name)
    if dataset is None:
        dataset = await _create(session, name, body, organization_id=organization_id, worker_id=worker_id, now=now)
        if dataset is not None:
            await _announced(session, dataset, at=now, actor=caller.name)
        else:  # another worker was faster by a moment
            dataset = await queries.find_dataset(session, organization_id, name)
            assert dataset is not None, "datasets are never deleted"
    if body.handover is not None:
        await take_over(session, dataset, body.handover, organization=organization, taker=worker, now=now)
    if await _change(session, dataset, body, worker_id=worker_id, now=now):
        await _announced(session, dataset, at=now, actor=caller.name)
    ledger = await _settle(session, dataset.ledger_id, at=now, actor=caller.name)
    return queries.view_of(dataset, organization, worker.name, ledger, caller=caller)


def _worker(caller: Caller) -> tuple[UUID, UUID, str]:
    """The worker behind a key, its organization, and that one's name."""
    if caller.worker_id is None or caller.organization_id is None or caller.organization is None:
        raise Forbidden("Datasets are announced by the workers that serve them.")
    return caller.worker_id, caller.organization_id, caller.organization


def _told(body: AnnounceDataset) -> dict[str, Any]:
    """What is taken over as it is."""
    return {
        "data_schema": body.data_schema.model_dump(mode="json"),
        "rows": body.rows,
        "task_kinds": [kind.value for kind in body.task_kinds],
        "description": body.description,
        "lineage": body.lineage,
    }


async def _create(
    session: AsyncSession, name: str, body: AnnounceDataset, *, organization_id: UUID, worker_id: UUID, now: datetime
) -> Dataset | None:
    """A new dataset; None if there is one of that name. It draws on the ledger of its lineage, new or not."""
    created = await session.scalars(
        insert(Dataset)
        .values(
            organization_id=organization_id,
            name=name,
            worker_id=worker_id,
            policy=_in_force(body.policy, None).model_dump(mode="json"),
            announced_policy=body.policy.model_dump(mode="json"),
            policy_signature=body.signature,
            signed_at=body.signed_at,
            ledger_id=await open_ledger(session, organization_id, body.lineage),
            announced_at=now,
            **_told(body),
        )
        .on_conflict_do_nothing(index_elements=[Dataset.organization_id, Dataset.name])
        .returning(Dataset)
    )
    return created.one_or_none()


def _in_force(announced: UsePolicy, dataset: Dataset | None) -> UsePolicy:
    """The worker's policy, as far as a steward has tightened it. Whether jobs are granted by rule is the steward's."""
    former = UsePolicy() if dataset is None else UsePolicy.model_validate(dataset.policy)
    if dataset is None or dataset.policy_set_by is None:
        former = announced.model_copy(update={"automatic_approval": former.automatic_approval})
    return strictest(announced, former)


async def _change(
    session: AsyncSession, dataset: Dataset, body: AnnounceDataset, *, worker_id: UUID, now: datetime
) -> bool:
    """Bring the row up to what the worker told; whether that changed anything but the signature."""
    moved = dataset.worker_id != worker_id
    if moved:
        serving = (await session.scalars(select(Worker).where(Worker.id == dataset.worker_id))).one()
        if serving.revoked_at is None:
            raise DatasetServedElsewhere(
                f"Worker {serving.name!r} of your organization serves dataset {dataset.name!r}. Have it revoked, or "
                "announce under another name."
            )
    else:  # another worker's clock is its own
        require_newer(body, signed_at=dataset.signed_at, signature=dataset.policy_signature)
    dataset.policy_signature, dataset.signed_at = body.signature, body.signed_at
    announced = UsePolicy.model_validate(dataset.announced_policy)
    changed = {field: value for field, value in _told(body).items() if getattr(dataset, field) != value}
    if not changed and not moved and announced == body.policy:
        return False
    reshaped = "data_schema" in changed and _columns(changed["data_schema"]) != _columns(dataset.data_schema)
    for field, value in changed.items():
        setattr(dataset, field, value)
    if announced != body.policy:
        dataset.policy = _in_force(body.policy, dataset).model_dump(mode="json")
        dataset.announced_policy = body.policy.model_dump(mode="json")
    if "lineage" in changed:
        await keep_ledger(session, dataset.organization_id, body.lineage, ledger_id=dataset.ledger_id)
    dataset.worker_id, dataset.announced_at = worker_id, now
    for_the_steward = moved or reshaped or "lineage" in changed or loosened(announced, body.policy)
    if for_the_steward and dataset.state is DatasetState.CONFIRMED:
        dataset.state, dataset.confirmed_at = DatasetState.ANNOUNCED, None
    await session.flush()
    return True


def _columns(schema: dict[str, Any]) -> dict[str, ColumnSchema]:
    """The columns by name: their order means nothing, nor do keys that a schema was stored without, long ago."""
    return {column.name: column for column in DatasetSchema.model_validate(schema).columns}


async def _settle(session: AsyncSession, ledger_id: UUID, *, at: datetime, actor: str) -> Ledger:
    """Give a ledger the budget of the policies in force, and tell of it if that is another one; the ledger."""
    stands = select(Ledger).where(Ledger.id == ledger_id).execution_options(populate_existing=True)
    ledger = (await session.scalars(stands)).one()
    before = (ledger.epsilon, ledger.delta, ledger.limit_nano, ledger.closed)
    await settle_budget(session, ledger_id)
    ledger = (await session.scalars(stands)).one()
    if before != (ledger.epsilon, ledger.delta, ledger.limit_nano, ledger.closed):
        append(
            session,
            organization_stream(ledger.organization_id),
            EventKind.DATASET_BUDGET_SET,
            at=at,
            actor=actor,
            lineage=ledger.lineage,
            epsilon=ledger.epsilon,
            delta=ledger.delta,
            closed=ledger.closed,
        )
    return ledger


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
        policy_digest=digest_of(UsePolicy.model_validate(dataset.announced_policy)),
        lineage=dataset.lineage,
    )


async def confirm_dataset(
    session: AsyncSession, dataset_id: UUID, body: ConfirmDataset, *, caller: Caller
) -> DatasetView:
    """Let a dataset take part in jobs, as far as its policy goes. A retired one comes back with its ledger.

    It keeps that ledger under another lineage too, unless the steward says that these are other records than before:
    then it draws on another one from now on, and the old one stays.

    Raises:
        NotFound: there is no such dataset, or it is another organization's.
        StateConflict: other records are said to be there, but the worker announced the lineage of the ledger itself;
            or the dataset is confirmed already with the ledger kept, or takes part in running jobs under it.
    """
    dataset = await queries.get_dataset(session, dataset_id, caller=caller, lock=True)
    former = dataset.ledger_id
    if body.other_records:
        await _leave_ledger(session, dataset)
    if dataset.state is not DatasetState.CONFIRMED:
        now = await clock(session)
        dataset.state, dataset.confirmed_at = DatasetState.CONFIRMED, now
        await _decided(
            session,
            dataset,
            EventKind.DATASET_CONFIRMED,
            at=now,
            caller=caller,
            rows=dataset.rows,
            policy_digest=digest_of(UsePolicy.model_validate(dataset.policy)),
            lineage=dataset.lineage,
            ledger="kept" if dataset.ledger_id == former else "new",
        )
        for ledger_id in sorted({former, dataset.ledger_id}):
            await _settle(session, ledger_id, at=now, actor=caller.name)
    return await queries.get_view(session, dataset_id, caller=caller)


async def _leave_ledger(session: AsyncSession, dataset: Dataset) -> None:
    """Have a dataset of other records than before draw on a ledger of theirs. Said again, it changes nothing.

    Nothing that was promised from one ledger may be spent from another: participations end before.
    """
    former = dataset.ledger_id
    if (await session.scalars(select(Ledger.lineage).where(Ledger.id == former))).one() == dataset.lineage:
        if dataset.state is DatasetState.CONFIRMED:
            return
        raise StateConflict(
            f"The worker of dataset {dataset.name!r} announced the very lineage that its ledger began with: these are "
            "the records of before, and so is their budget. Confirm it without other_records, or have other records "
            "announced under a name of their own."
        )
    if dataset.state is DatasetState.CONFIRMED:
        raise StateConflict(
            f"Dataset {dataset.name!r} is confirmed, and draws on the ledger that it had before. If it holds other "
            "records after all, retire it, and confirm it again with other_records."
        )
    taking_part = exists().where(
        Participation.dataset_id == dataset.id,
        Participation.job_id == Job.id,
        or_(
            Participation.reserved_nano.is_not(None),
            (Participation.state == ParticipationState.APPROVED) & Job.state.not_in(ENDED_JOBS),
        ),
    )
    if await session.scalar(select(taking_part)):
        raise StateConflict(
            f"Dataset {dataset.name!r} takes part in jobs under its former lineage, and what was promised to them is "
            "reserved in its former ledger. Withdraw it from them, or wait until they are over; a moment later it can "
            "be confirmed."
        )
    dataset.ledger_id = await begin_anew(session, dataset.organization_id, dataset.lineage, former=former)


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
        await _settle(session, dataset.ledger_id, at=now, actor=caller.name)
    return await queries.get_view(session, dataset_id, caller=caller)


async def set_policy(session: AsyncSession, dataset_id: UUID, policy: UsePolicy, *, caller: Caller) -> DatasetView:
    """Tighten what the worker's own policy allows. Grants given under the former policy hold until they are withdrawn.

    Raises:
        NotFound: there is no such dataset, or it is another organization's.
        PolicyLoosened: some clause would allow more than the worker's own.
    """
    dataset = await queries.get_dataset(session, dataset_id, caller=caller, lock=True)
    if looser := loosened(UsePolicy.model_validate(dataset.announced_policy), policy):
        raise PolicyLoosened(
            f"{' '.join(looser)} A policy is loosened in the configuration of the worker that serves the dataset, "
            "which then announces it anew."
        )
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
        await _settle(session, dataset.ledger_id, at=now, actor=caller.name)
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
