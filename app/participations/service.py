"""Asking for participations, granting and ending them; a grant that ends is honoured in the middle of a job."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from uuid import UUID

from procrastinate import App as Queue
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit.service import append, job_stream
from app.blobs import BlobStore
from app.database import clock
from app.dependencies import Caller
from app.errors import (
    BudgetExhausted,
    GrantRefusedByPolicy,
    InvalidRequest,
    NoMatchingDataset,
    PrivacyImpossible,
    StateConflict,
)
from app.federation.lifecycle import ENDED_JOBS, OPEN_TASKS
from app.ledger.pricing import noises_the_sum, plan_for, price_of_grant
from app.ledger.service import Account, give_back, hold_ledger, reserve, shortfall
from app.models import Dataset, Grant, Job, Organization, Participation, Principal, Round, Task, Update, Worker
from app.participations.queries import find_own
from app.participations.reservations import has_released, price_of_awaited
from app.rounds.closing import settle
from app.rounds.opening import begin_if_enough
from app.rounds.queries import find_open_round, get_job
from app.wakeups import announce_change
from isthmus.federation.cohort import cohort_size
from isthmus.federation.rounds import number_after
from isthmus.privacy.cost import Cost
from isthmus.privacy.planning import PlanImpossible
from isthmus.wire.data import DatasetSchema, misfits
from isthmus.wire.datasets import DatasetState, UsePolicy, policy_objections
from isthmus.wire.events import EventKind
from isthmus.wire.jobs import ApproveParticipation, JobSpec, JobState, ParticipationState
from isthmus.wire.manifest import Manifest
from isthmus.wire.privacy import PrivacyPlan
from isthmus.wire.rounds import RoundPhase, TaskState, kind_of_round
from isthmus.wire.secured import LARGEST_COHORT

RENEWABLE = (ParticipationState.EXPIRED, ParticipationState.EXHAUSTED)
"""A steward who said yes may say so again. A no, and a grant taken back, are final for the job."""
GRANT_S = 30 * 86400


def needed_kinds(spec: JobSpec) -> frozenset[str]:
    """The kinds of tasks that the rounds of a job offer."""
    first, last = number_after(spec, None), number_after(spec, spec.rounds)
    numbers = [number for number in (first, 1, last) if number is not None]
    return frozenset(kind_of_round(number, spec.rounds).value for number in numbers)


@dataclass(frozen=True, slots=True)
class _Asked:
    """A dataset that fits a job, and what the job's privacy section becomes there."""

    name: str
    dataset: Dataset
    plan: PrivacyPlan | None
    objection: str | None
    """Why the dataset is not asked: its policy, its budget, or that no noise would do."""


Plans = dict[int, PrivacyPlan | PlanImpossible | None]
"""Declared rows -> what the job's privacy section becomes at a dataset of so many records."""


async def plan_ahead(session: AsyncSession, job: Job) -> Plans:
    """Compute, before anything is locked, what the job's privacy section becomes at the datasets that fit it.

    Each takes some tenths of a second, in a thread; datasets with equal numbers of rows have the same.
    """
    spec = JobSpec.model_validate(job.spec)
    fitting, _ = await _fitting(session, spec)
    return {rows: await _plan_at(spec, job, rows) for rows in {dataset.rows for _, dataset in fitting}}


async def _plan_at(spec: JobSpec, job: Job, rows: int) -> PrivacyPlan | PlanImpossible | None:
    return await plan_for(spec, rows, Manifest.model_validate(job.manifest).averaged_elements)


async def _fitting(session: AsyncSession, spec: JobSpec) -> tuple[list[tuple[str, Dataset]], list[str]]:
    """The datasets whose columns and kinds of tasks fit a job, by name; and why each of the others does not."""
    found = await session.execute(
        select(Dataset, Organization.name)
        .join(Organization, Organization.id == Dataset.organization_id)
        .join(Worker, Worker.id == Dataset.worker_id)
        .where(Dataset.state == DatasetState.CONFIRMED, Worker.revoked_at.is_(None))
        .order_by(Dataset.id)
    )
    fitting, reasons = [], []
    listed = {f"{organization}/{dataset.name}": dataset for dataset, organization in found}
    wanted = spec.data.datasets
    for name in sorted(listed) if wanted is None else sorted(set(wanted)):
        if name not in listed:
            reasons.append(f"{name}: there is no confirmed dataset of that name.")
            continue
        dataset = listed[name]
        unfit = misfits(spec.data, DatasetSchema.model_validate(dataset.data_schema))
        lacking = needed_kinds(spec).difference(dataset.task_kinds)
        if lacking:
            unfit.append(f"It does not take tasks of kind {', '.join(sorted(lacking))}.")
        if unfit:
            reasons.append(f"{name}: {' '.join(unfit)}")
            continue
        fitting.append((name, dataset))
    return fitting, reasons


async def request_participations(
    session: AsyncSession, job: Job, owner: Principal, plans: Plans, now: datetime
) -> None:
    """Ask every dataset that fits the job. Its policy may refuse at once, or grant by rule; else its steward decides.

    A dataset whose budget does not hold the job's whole cost there refuses it now, and not after days of waiting.

    Args:
        plans: see `plan_ahead`.

    Raises:
        NoMatchingDataset: fewer datasets than a round needs fit and may be asked; says why each of the others does not.
    """
    spec = JobSpec.model_validate(job.spec)
    fitting, reasons = await _fitting(session, spec)
    asked = [await _asked(session, job, spec, owner, plans, name, dataset) for name, dataset in fitting]
    asked = await _within_budgets(session, spec, job, asked)
    if spec.secure_aggregation is not None:
        asked = _one_of_each_organization(asked)
    reasons += [f"{item.name}: {item.objection}" for item in asked if item.objection is not None]
    able = sum(item.objection is None for item in asked)
    if able < spec.cohort.min_updates:
        raise NoMatchingDataset(
            f"{able} datasets fit the job and allow it; it needs {spec.cohort.min_updates}. " + " ".join(reasons[:10])
        )
    _require_cohort_that_can_be_hidden(spec, able)
    for item in asked:
        await _request(session, job, spec, owner, item, now)


def _one_of_each_organization(asked: Sequence[_Asked]) -> list[_Asked]:
    """The same, with an objection to all but the first dataset of an organization that may be asked.

    Whoever is in a roster twice has two of the shares by which the others' secrets are rebuilt.
    """
    taken: dict[UUID, str] = {}
    found = []
    for item in asked:  # sorted by name
        if item.objection is None:
            first = taken.setdefault(item.dataset.organization_id, item.name)
            if first != item.name:
                told = f"secure aggregation: a round asks one dataset of each organization, and {first} is asked."
                found.append(replace(item, objection=told))
                continue
        found.append(item)
    return found


def _require_cohort_that_can_be_hidden(spec: JobSpec, able: int) -> None:
    """Whether a round's messages stay small enough.

    Raises:
        InvalidRequest: too many would be asked in a round under secure aggregation.
    """
    if spec.secure_aggregation is None:
        return
    cohort = spec.cohort
    size = cohort_size(
        able,
        fraction=cohort.fraction,
        over_selection=cohort.over_selection,
        target=cohort.target_updates,
        min_updates=cohort.min_updates,
    )
    if size.asked > LARGEST_COHORT:
        raise InvalidRequest(
            f"A round would ask {size.asked} participations; under secure aggregation {LARGEST_COHORT} is the most. "
            "Lower cohort.fraction or cohort.over_selection, or name the datasets in data.datasets."
        )


async def _asked(
    session: AsyncSession, job: Job, spec: JobSpec, owner: Principal, plans: Plans, name: str, dataset: Dataset
) -> _Asked:
    plan = plans[dataset.rows] if dataset.rows in plans else await _plan_at(spec, job, dataset.rows)
    if isinstance(plan, PlanImpossible):
        return _Asked(name, dataset, None, f"privacy: {plan}.")
    objections = policy_objections(UsePolicy.model_validate(dataset.policy), spec, principal=owner.name, plan=plan)
    return _Asked(name, dataset, plan, f"policy: {' '.join(objections)}" if objections else None)


async def _within_budgets(session: AsyncSession, spec: JobSpec, job: Job, asked: list[_Asked]) -> list[_Asked]:
    """The same, with an objection where a ledger does not hold the job. Ledgers stay locked, in the order of ids."""
    concerned = {item.dataset.id for item in asked if item.plan is not None and item.objection is None}
    if not concerned:
        return asked
    found_held = await session.execute(  # all of them, before any ledger: participations will refer to them
        select(Dataset.id, Dataset.ledger_id)
        .where(Dataset.id.in_([item.dataset.id for item in asked]))
        .order_by(Dataset.id)
        .with_for_update(read=True)
    )
    # By the rows as they are locked: what was read before may have been moved to another ledger since.
    held = {row.id: row.ledger_id for row in found_held}
    ledger_ids = sorted({held[dataset_id] for dataset_id in concerned})
    ledgers = {ledger_id: await hold_ledger(session, ledger_id) for ledger_id in ledger_ids}
    elements = Manifest.model_validate(job.manifest).averaged_elements
    promised = dict.fromkeys(ledgers, Cost.zero())  # to datasets of the same lineage, which are asked by this same job
    found = []
    for item in asked:
        objection, ledger_id = None, held[item.dataset.id]
        if item.plan is not None and item.objection is None:
            objection = await shortfall(
                ledgers[ledger_id],
                spec,
                item.plan,
                rounds=spec.rounds,
                elements=elements,
                besides=promised[ledger_id],
            )
            if objection is None:
                promised[ledger_id] += (await price_of_grant(spec, item.plan, spec.rounds, elements)).cost
        found.append(item if objection is None else replace(item, objection=f"budget: {objection}"))
    return found


async def _request(
    session: AsyncSession, job: Job, spec: JobSpec, owner: Principal, asked: _Asked, now: datetime
) -> None:
    dataset, name = asked.dataset, asked.name
    participation = Participation(
        job_id=job.id,
        dataset_id=dataset.id,
        declared_rows=dataset.rows,
        plan=None if asked.plan is None else asked.plan.model_dump(mode="json"),
        created_at=now,
    )
    events: list[tuple[EventKind, dict[str, object]]] = [
        (EventKind.PARTICIPATION_REQUESTED, {"dataset": name, "purpose": spec.purpose})
    ]
    grant = None
    rule, ruler = UsePolicy.model_validate(dataset.policy).automatic_approval, dataset.policy_set_by
    if asked.objection is not None:
        participation.state = ParticipationState.REJECTED
        participation.detail = f"The dataset refuses: {asked.objection}"
        events.append((EventKind.PARTICIPATION_REJECTED, {"dataset": name, "detail": participation.detail}))
    elif rule is not None and ruler is not None and spec.rounds <= rule.max_rounds:
        participation.state = ParticipationState.APPROVED
        grant = Grant(
            purpose=spec.purpose,
            expires_at=now + timedelta(days=rule.grant_days),
            rounds=spec.rounds,
            granted_by=ruler,
            granted_at=now,
            by_rule=True,
        )
        events.append((EventKind.PARTICIPATION_APPROVED, _granted(name, grant)))
    session.add(participation)
    await session.flush()
    if grant is not None:
        grant.participation_id = participation.id
        session.add(grant)
        await session.flush()
        elements = Manifest.model_validate(job.manifest).averaged_elements
        price = await price_of_grant(spec, asked.plan, spec.rounds, elements)
        await reserve(session, _account(participation, dataset.ledger_id), price, elements=elements)
    for kind, data in events:
        append(session, job_stream(job.id), kind, at=now, actor=owner.name, **data)


def _account(participation: Participation, ledger_id: UUID) -> Account:
    return Account(ledger_id, participation.dataset_id, participation.job_id, participation.id)


def _granted(name: str, grant: Grant) -> dict[str, object]:
    return {
        "dataset": name,
        "purpose": grant.purpose,
        "rounds": grant.rounds,
        "expires_at": grant.expires_at.isoformat(),
        "by_rule": grant.by_rule,
    }


async def approve(session: AsyncSession, caller: Caller, participation_id: UUID, asked: ApproveParticipation) -> None:
    """Grant a participation: for a purpose, until a time, for a number of rounds. Its weight is frozen now.

    Its whole cost is reserved in this transaction. A grant that has expired or is used up is renewed: the rounds come
    on top of those that were used, and what the former one did not spend goes back first.

    Raises:
        NotFound: missing, or another organization's.
        StateConflict: it was decided before, or the job is over.
        GrantRefusedByPolicy: the dataset's own policy forbids it, or the grant would be for another purpose.
        PrivacyImpossible: the dataset has another number of rows now, and no noise reaches the job's target there.
        BudgetExhausted: the dataset's budget does not hold what the grant can cost.
    """
    job_id, dataset_id = await find_own(session, caller, participation_id)
    ahead = await _plan_anew(session, job_id, dataset_id, participation_id)
    job = await get_job(session, job_id, "update")
    participation = await _lock(session, participation_id)
    if job.state in ENDED_JOBS:
        raise StateConflict(f"The job is {job.state}; there is nothing to approve any more.")
    if participation.state not in (ParticipationState.PENDING, *RENEWABLE):
        raise StateConflict(f"The participation is {participation.state}; that is final for this job.")
    dataset, organization, owner = (
        await session.execute(
            select(Dataset, Organization.name, Principal.name)
            .join(Organization, Organization.id == Dataset.organization_id)
            .join(Principal, Principal.id == job.owner_id)
            .where(Dataset.id == dataset_id)
            .with_for_update(read=True, of=Dataset)  # its policy, its rows and its ledger stay as they are
        )
    ).one()
    spec = JobSpec.model_validate(job.spec)
    plan = await _freeze_plan(session, job, spec, participation, dataset.rows, ahead)
    objections = policy_objections(UsePolicy.model_validate(dataset.policy), spec, principal=owner, plan=plan)
    if asked.purpose is not None and asked.purpose != spec.purpose:
        objections.append(f"purpose: the job is for {spec.purpose!r}, not for {asked.purpose!r}.")
    if objections:
        raise GrantRefusedByPolicy(" ".join(objections))
    now = await clock(session)
    grant = await _find_grant(session, participation_id)
    if grant is None:
        grant = Grant(participation_id=participation.id, rounds_used=0)
        session.add(grant)
    rounds = asked.rounds or spec.rounds
    grant.purpose, grant.rounds = spec.purpose, grant.rounds_used + rounds
    grant.expires_at = now + timedelta(seconds=asked.expires_in_s or GRANT_S)
    grant.granted_by, grant.granted_at, grant.ended_at = caller.principal_id, now, None
    grant.by_rule = False
    participation.state, participation.detail = ParticipationState.APPROVED, None
    await session.flush()
    if plan is not None:
        await _reserve_grant(session, job, spec, plan, participation, dataset.ledger_id, rounds)
    name = f"{organization}/{dataset.name}"
    append(
        session,
        job_stream(job_id),
        EventKind.PARTICIPATION_APPROVED,
        at=now,
        actor=caller.name,
        **_granted(name, grant),
    )
    await begin_if_enough(session, job, now)
    await announce_change(session, job_id)


async def _plan_anew(session: AsyncSession, job_id: UUID, dataset_id: UUID, participation_id: UUID) -> Plans:
    """The plan for the rows that a dataset has now, computed before anything is locked."""
    rows, declared = (
        await session.execute(
            select(Dataset.rows, Participation.declared_rows)
            .join(Participation, Participation.dataset_id == Dataset.id)
            .where(Dataset.id == dataset_id, Participation.id == participation_id)
        )
    ).one()
    if rows == declared:
        return {}
    job = await get_job(session, job_id)
    return {rows: await _plan_at(JobSpec.model_validate(job.spec), job, rows)}


async def _freeze_plan(
    session: AsyncSession, job: Job, spec: JobSpec, participation: Participation, rows: int, ahead: Plans
) -> PrivacyPlan | None:
    """The rows and the plan by which a participation counts from now on.

    Those of a dataset that has changed since it was asked are taken anew, unless something was released under a plan:
    the job's claim holds for one plan from the first round to the last.

    Raises:
        PrivacyImpossible: no noise reaches the job's target at so many rows.
    """
    plan = None if participation.plan is None else PrivacyPlan.model_validate(participation.plan)
    if rows == participation.declared_rows or (plan is not None and await has_released(session, participation.id)):
        return plan
    anew = ahead[rows] if rows in ahead else await _plan_at(spec, job, rows)
    if isinstance(anew, PlanImpossible):
        raise PrivacyImpossible(f"The dataset has {rows} rows now, and there {anew}")
    participation.declared_rows = rows
    participation.plan = None if anew is None else anew.model_dump(mode="json")
    return anew


async def _reserve_grant(
    session: AsyncSession,
    job: Job,
    spec: JobSpec,
    plan: PrivacyPlan,
    participation: Participation,
    ledger_id: UUID,
    rounds: int,
) -> None:
    """Reserve what a grant of `rounds` more rounds can cost; of rounds that the job does not have any more, nothing.

    Raises:
        BudgetExhausted: the budget does not hold it. Says what would pass.
    """
    elements = Manifest.model_validate(job.manifest).averaged_elements
    account = _account(participation, ledger_id)
    await hold_ledger(session, ledger_id)
    awaited = await price_of_awaited(session, job, spec, participation.id, plan, elements)
    await give_back(session, account, spec.privacy.mode, keep=awaited)
    ledger = await hold_ledger(session, ledger_id)  # as it stands after that
    counted = min(rounds, spec.rounds - job.rounds_completed)
    lacking = await shortfall(ledger, spec, plan, rounds=counted, elements=elements)
    if lacking is not None:
        raise BudgetExhausted(lacking)
    await reserve(session, account, await price_of_grant(spec, plan, counted, elements), elements=elements)


async def reject(session: AsyncSession, caller: Caller, participation_id: UUID, note: str) -> None:
    """Say no to a pending participation, and why.

    Raises:
        NotFound: missing, or another organization's.
        StateConflict: it was decided before; an approved one is withdrawn.
    """
    job_id, _ = await find_own(session, caller, participation_id)
    await get_job(session, job_id, "share")
    participation = await _lock(session, participation_id)
    if participation.state is not ParticipationState.PENDING:
        raise StateConflict(f"The participation is {participation.state}; only a pending one can be rejected.")
    participation.state, participation.detail = ParticipationState.REJECTED, note
    now = await clock(session)
    stream = job_stream(job_id)
    append(
        session,
        stream,
        EventKind.PARTICIPATION_REJECTED,
        at=now,
        actor=caller.name,
        dataset=await name_of(session, participation),
        detail=note,
    )
    await announce_change(session, job_id)


async def withdraw(
    session: AsyncSession, queue: Queue, caller: Caller, participation_id: UUID, note: str
) -> Sequence[str]:
    """Take a grant back, at any moment. Keys of blobs to delete once this is committed.

    An upload under way finds its task cancelled. An update that is in but not frozen leaves the set. One that is frozen
    stays in this aggregate and enters no later one. What was spent stays spent.

    Raises:
        NotFound: missing, or another organization's.
        StateConflict: there is no grant to take back.
    """
    job_id, _ = await find_own(session, caller, participation_id)
    job = await get_job(session, job_id, "update")
    of = await find_open_round(session, job_id, "update")
    participation = await lock_with_tasks(session, participation_id)
    if participation.state not in (ParticipationState.APPROVED, *RENEWABLE):
        raise StateConflict(f"The participation is {participation.state}; there is no grant to withdraw.")
    now = await clock(session)
    name = await name_of(session, participation)
    await end_grant(session, participation, ParticipationState.WITHDRAWN, note, now)
    deleted: list[str] = []
    if of is not None and of.phase is RoundPhase.COLLECTING:
        deleted = await _exclude(session, job, of, participation, name, now)
        await cancel_tasks(session, [participation.id], "The grant was withdrawn.")
        await session.flush()
    append(
        session,
        job_stream(job_id),
        EventKind.PARTICIPATION_WITHDRAWN,
        at=now,
        actor=caller.name,
        dataset=name,
        note=note,
        stays_in_round=of.number if of is not None and of.phase is not RoundPhase.COLLECTING else None,
    )
    if of is not None and job.state in (JobState.RUNNING, JobState.PAUSED):
        await settle(session, queue, job, of, now)
    await announce_change(session, job_id)
    return deleted


async def delete_blobs(blobs: BlobStore, keys: Sequence[str]) -> None:
    """Forget the bytes of withdrawn updates, after the commit that excluded them."""
    for key in keys:
        await blobs.delete(key)


async def _exclude(
    session: AsyncSession, job: Job, of: Round, participation: Participation, name: str, now: datetime
) -> list[str]:
    accepted = (
        await session.scalars(
            select(Update).where(
                Update.round_id == of.id, Update.participation_id == participation.id, Update.excluded.is_(False)
            )
        )
    ).one_or_none()
    if accepted is None:
        return []
    spec = JobSpec.model_validate(job.spec)
    accepted.excluded = True
    of.accepted -= 1
    await session.execute(
        update(Task)
        .where(Task.id == accepted.task_id)
        .values(state=TaskState.CANCELLED, detail="The grant was withdrawn after the update was in; it was deleted.")
    )
    append(
        session,
        job_stream(job.id),
        EventKind.UPDATE_EXCLUDED,
        at=now,
        round=of.number,
        dataset=name,
        digest=None if noises_the_sum(spec, of.kind) else accepted.digest,  # see `accept_update`
        accepted=of.accepted,
    )
    return [] if accepted.blob_key is None else [accepted.blob_key]


async def cancel_tasks(session: AsyncSession, participation_ids: Sequence[UUID], detail: str) -> None:
    """Call off what these participations may still bring in their open round."""
    await session.execute(
        update(Task)
        .where(Task.participation_id.in_(participation_ids), Task.state.in_((*OPEN_TASKS, TaskState.FAILED)))
        .values(state=TaskState.CANCELLED, detail=detail, lease_expires_at=None)
    )


async def end_grant(
    session: AsyncSession, participation: Participation, state: ParticipationState, detail: str | None, now: datetime
) -> None:
    """End a participation's grant, and say how."""
    participation.state, participation.detail = state, detail
    await session.execute(
        update(Grant).where(Grant.participation_id == participation.id, Grant.ended_at.is_(None)).values(ended_at=now)
    )


async def _lock(session: AsyncSession, participation_id: UUID) -> Participation:
    found = await session.scalars(
        select(Participation)
        .where(Participation.id == participation_id)
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    return found.one()


async def lock_with_tasks(session: AsyncSession, participation_id: UUID) -> Participation:
    """The participation's open tasks, then itself: the order of the house."""
    await session.execute(
        select(Task.id)
        .where(Task.participation_id == participation_id, Task.state.in_((*OPEN_TASKS, TaskState.SUBMITTED)))
        .order_by(Task.id)
        .with_for_update()
    )
    return await _lock(session, participation_id)


async def _find_grant(session: AsyncSession, participation_id: UUID) -> Grant | None:
    found = await session.scalars(select(Grant).where(Grant.participation_id == participation_id))
    return found.one_or_none()


async def name_of(session: AsyncSession, participation: Participation) -> str:
    """`organization/dataset`, as events tell of it."""
    row = await session.execute(
        select(Organization.name, Dataset.name)
        .join(Organization, Organization.id == Dataset.organization_id)
        .where(Dataset.id == participation.dataset_id)
    )
    organization, dataset = row.one()
    return f"{organization}/{dataset}"
