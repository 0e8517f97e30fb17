"""What a job's privacy section promises at each dataset, and what of it was spent."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.dependencies import Caller
from app.errors import NotFound
from app.jobs.queries import visible_to
from app.jobs.references import references
from app.models import Dataset, Job, LedgerEntry, Organization, Participation
from app.rounds.specs import elements_in
from isthmus.privacy.cost import Cost
from isthmus.privacy.explaining import explanation_of
from isthmus.privacy.planning import grant_event, round_cost
from isthmus.privacy.rdp import ORDERS_VERSION
from isthmus.wire.jobs import JobSpec, JobState, ParticipationState
from isthmus.wire.ledger import LedgerKind
from isthmus.wire.organizations import Role
from isthmus.wire.privacy import DatasetPrivacy, NoisePlace, PrivacyPlan, PrivacyReport

LARGEST_REFERENCE = 20.0
"""Above it a plan has no second opinion: it would take gigabytes, and nobody needs to know more precisely."""
NO_PROMISE = 1e6
"""The epsilon that is told where so much was spent that nothing is promised any more: JSON has no infinity."""


@dataclass(frozen=True, slots=True)
class Releases:
    """What a ledger holds of releases of a job that are alike: of rounds of one kind, which all cost the same."""

    count: int
    round_number: int
    """Of the first of them."""
    cost: Cost | None
    """As the ledger counts it; None: over orders of another version."""
    elements: int


@dataclass(frozen=True, slots=True)
class Part:
    """What the database holds of one dataset's part in a job."""

    organization: str
    dataset: str
    state: ParticipationState
    declared_rows: int
    plan: PrivacyPlan | None
    rounds_released: int
    releases: Sequence[Releases]


@dataclass(frozen=True, slots=True)
class Records:
    """What a report is made of, read in one transaction."""

    job_id: UUID
    name: str
    state: JobState
    spec: JobSpec
    elements: int
    """Parameters that rounds average; 0 before the job is started, when it has no parts."""
    parts: Sequence[Part]


async def read_records(session: AsyncSession, caller: Caller, job_id: UUID) -> Records:
    """A job, and its datasets as far as the caller may see them: a steward those of its own organization.

    Raises:
        NotFound: missing, or another's.
    """
    job = (await session.scalars(select(Job).where(Job.id == job_id, visible_to(caller)))).one_or_none()
    if job is None:
        raise NotFound("job", job_id)
    statement = (
        select(Participation, Organization.name, Dataset.name)
        .join(Dataset, Dataset.id == Participation.dataset_id)
        .join(Organization, Organization.id == Dataset.organization_id)
        .where(Participation.job_id == job_id)
        .order_by(Organization.name, Dataset.name)
    )
    if caller.role is Role.STEWARD:
        statement = statement.where(Dataset.organization_id == caller.organization_id)
    rows = (await session.execute(statement)).all()
    participations = [row[0].id for row in rows]
    releases = await _releases(session, job_id, participations)
    rounds = await _rounds_released(session, job_id, participations)
    parts = [
        Part(
            organization=organization,
            dataset=dataset,
            state=participation.state,
            declared_rows=participation.declared_rows,
            plan=None if participation.plan is None else PrivacyPlan.model_validate(participation.plan),
            rounds_released=rounds.get(participation.id, 0),
            releases=releases[participation.id],
        )
        for participation, organization, dataset in rows
    ]
    return Records(
        job.id, job.name, job.state, JobSpec.model_validate(job.spec), elements_in(job) if parts else 0, parts
    )


async def _releases(session: AsyncSession, job_id: UUID, participations: Sequence[UUID]) -> dict[UUID, list[Releases]]:
    """By participation: a handful of groups each, whatever the number of rounds, as rounds of a kind cost the same."""
    alike = (
        LedgerEntry.participation_id,
        LedgerEntry.orders_version,
        LedgerEntry.rdp_nano,
        LedgerEntry.draws,
        LedgerEntry.elements,
        LedgerEntry.release,
    )
    found = await session.execute(
        select(*alike, func.count(), func.min(LedgerEntry.round_number))
        .where(*_released(job_id, participations))
        .group_by(*alike)
    )
    grouped: dict[UUID, list[Releases]] = defaultdict(list)
    for participation, version, nano, draws, elements, _, count, first in found:
        assert first is not None, "every release is of a round"
        cost = Cost(tuple(nano), draws) if version == ORDERS_VERSION else None
        grouped[participation].append(Releases(count, first, cost, elements))
    return grouped


async def _rounds_released(session: AsyncSession, job_id: UUID, participations: Sequence[UUID]) -> dict[UUID, int]:
    found = await session.execute(
        select(LedgerEntry.participation_id, func.count(LedgerEntry.round_number.distinct()))
        .where(*_released(job_id, participations))
        .group_by(LedgerEntry.participation_id)
    )
    return {row[0]: row[1] for row in found}


def _released(job_id: UUID, participations: Sequence[UUID]) -> tuple[ColumnElement[bool], ...]:
    return (
        LedgerEntry.job_id == job_id,
        LedgerEntry.kind == LedgerKind.SPEND,
        LedgerEntry.participation_id.in_(participations),
    )


async def report_of(records: Records) -> PrivacyReport:
    """The report. It needs no database: figures that take long are computed meanwhile, and may be missing at first."""
    spec = records.spec
    words = explanation_of(spec)
    plans = {part.plan for part in records.parts if part.plan is not None and part.plan.epsilon <= LARGEST_REFERENCE}
    questions = {plan: (grant_event(spec, plan, records.elements, spec.rounds), plan.delta) for plan in plans}
    answers = await references.answers(list(questions.values()))
    known = {plan: answers[question] for plan, question in questions.items()}
    return PrivacyReport(
        job_id=records.job_id,
        job=records.name,
        job_state=records.state.value,
        unit=spec.privacy.unit,
        where=spec.privacy.where,
        mechanism=words.mechanism,
        adjacency=words.adjacency,
        guarantee=words.guarantee,
        accountant=words.accountant,
        delta=spec.privacy.claimed_delta,
        max_orgs_per_person=spec.privacy.max_orgs_per_person,
        assumptions=list(words.assumptions),
        not_protected=list(words.not_protected),
        released=list(words.released),
        datasets=[_told(spec, part, known) for part in records.parts],
    )


def _told(spec: JobSpec, part: Part, known: Mapping[PrivacyPlan, float | None]) -> DatasetPrivacy:
    plan = part.plan
    return DatasetPrivacy(
        organization=part.organization,
        dataset=part.dataset,
        state=part.state.value,
        declared_rows=part.declared_rows,
        plan=plan,
        epsilon_spent=None if plan is None else epsilon_spent(spec, plan, part.releases),
        epsilon_person=None if plan is None else plan.epsilon * spec.privacy.max_orgs_per_person,
        epsilon_reference=None if plan is None else known.get(plan),
        rounds_released=part.rounds_released,
        releases=sum(alike.count for alike in part.releases),
    )


def epsilon_spent(spec: JobSpec, plan: PrivacyPlan, releases: Iterable[Releases]) -> float | None:
    """Epsilon of what a job released of a dataset, at the job's delta; None if some cost cannot be added up any more.

    Of the claim, not of the ledger: a ledger is of records, and counts twice the sensitivity where the noise hides
    whether an organization takes part.
    """
    total = Cost.zero()
    for alike in releases:
        if plan.where in (NoisePlace.CENTRAL, NoisePlace.DISTRIBUTED):
            total = total + round_cost(spec, plan, alike.round_number, alike.elements) * alike.count
        elif alike.cost is not None:
            total = total + alike.cost * alike.count
        else:
            return None
    return min(total.epsilon(plan.delta), NO_PROMISE)
