"""Reading the attempts of secured rounds and their members, and what decides about them."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import ARRAY, Integer, Select, bindparam, func, literal, null, select, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute

from app.audit.service import know_head
from app.federation.lifecycle import OPEN_TASKS
from app.federation.secured_lifecycle import SecuredState
from app.models import EventStream, Job, Participation, Round, SecuredAttempt, SecuredMember, Task
from app.rounds.queries import OF_JOB, STREAM, graced
from isthmus.wire.jobs import JobState, ParticipationState
from isthmus.wire.rounds import RoundPhase, TaskState
from isthmus.wire.secured import Step

MESSAGES: Final[dict[Step, InstrumentedAttribute[bytes | None]]] = {
    Step.KEYS: SecuredMember.keys,
    Step.SHARES: SecuredMember.shares,
    Step.SURVIVORS: SecuredMember.signature,
    Step.UNMASK: SecuredMember.reveal,
}
"""Where each step keeps its message. `update` has none of its own: its message is the upload."""


async def get_attempt(session: AsyncSession, round_id: UUID) -> SecuredAttempt:
    """The present attempt of a secured round that is not over. Read it under the round's lock."""
    found = await session.scalars(
        select(SecuredAttempt).where(SecuredAttempt.round_id == round_id).execution_options(populate_existing=True)
    )
    return found.one()


@dataclass(frozen=True, slots=True)
class HeldMember:
    """A member that sends a message, and all that stands above it, read together under their locks."""

    job: Job
    of: Round
    task: Task
    participation_state: ParticipationState
    attempt: SecuredAttempt
    member: SecuredMember
    sent: bytes | None
    """Its message of this step, if that is in."""


def _holding(step: Step) -> Select[Any]:
    sent = MESSAGES[step] if step in MESSAGES else null()
    columns: list[Any] = [Job, Round, Task, Participation.state, SecuredAttempt, SecuredMember, sent.label("sent")]
    statement: Select[Any] = (
        select(*columns, *STREAM)
        .select_from(Task)
        .join(Job, Job.id == Task.job_id)
        .join(EventStream, OF_JOB)
        .join(Round, Round.id == Task.round_id)
        .join(Participation, Participation.id == Task.participation_id)
        .join(SecuredAttempt, SecuredAttempt.round_id == Round.id)
        .join(SecuredMember, SecuredMember.task_id == Task.id)
        .where(Task.id == bindparam("task_id"), Task.worker_id == bindparam("worker_id"))
        .execution_options(populate_existing=True)
        # In this order: see `app.rounds.queries.hold_task`.
        .suffix_with(
            text(
                "FOR UPDATE OF jobs, rounds, tasks FOR SHARE OF participations "
                "FOR UPDATE OF secured_attempts, secured_members, event_streams"
            )
        )
    )
    return statement


_HOLDING: Final = {step: _holding(step) for step in Step}


async def hold_member(session: AsyncSession, task_id: UUID, worker_id: UUID, step: Step) -> HeldMember | None:
    """The member whose task of this worker's it is; None if the task is none, or not of a secured round that is open.

    All that is locked is read as it is now, whoever changed it while this waited.
    """
    found = await session.execute(_HOLDING[step], {"task_id": task_id, "worker_id": worker_id})
    row = found.one_or_none()
    if row is None:
        return None
    *held, stream, sequence, head_hash = row
    know_head(session, stream, sequence, head_hash)
    return HeldMember(*held)


@dataclass(frozen=True, slots=True)
class Uploading:
    """What an upload has to know of its attempt."""

    member: SecuredMember
    step: Step
    shares: bool
    """Whether the member's shares were passed on: else nobody could ever unmask what it sends."""


async def hold_uploading(session: AsyncSession, task_id: UUID) -> Uploading:
    """The member of an open secured round that uploads. Needs the locks of job, round and task."""
    found = await session.execute(
        select(SecuredMember, SecuredAttempt.step, SecuredAttempt.shared)
        .join(SecuredAttempt, SecuredAttempt.round_id == SecuredMember.round_id)
        .where(SecuredMember.task_id == task_id)
        .with_for_update(of=SecuredMember)
        .execution_options(populate_existing=True)
    )
    member, step, shared = found.one()
    return Uploading(member, step, shared is not None and member.index in shared)


@dataclass(frozen=True, slots=True)
class Standing:
    """A secured round as it stands, and the time by Postgres's clock."""

    state: SecuredState
    now: datetime


def among(indices: Sequence[int] | None) -> Any:
    """Whether a member is one of `indices`; None: anybody is."""
    if indices is None:
        return literal(True)
    return SecuredMember.index == func.any(bindparam(None, list(indices), ARRAY(Integer), unique=True))


async def read_standing(session: AsyncSession, job: Job, of: Round, attempt: SecuredAttempt) -> Standing:
    """All that decides what is due for a secured round, but for a new attempt. Needs the round's lock. One statement.

    Of keys and shares those count whose sender can still bring its update.
    """
    open_task = Task.state.in_(OPEN_TASKS)
    uploading_until = func.max(Task.progress_until).filter(Task.state == TaskState.UPLOADING)
    counted: tuple[Any, ...]
    step, needed, members = attempt.step, attempt.needed, None
    if step in (Step.KEYS, Step.SHARES):
        message = MESSAGES[step]
        members = attempt.keyed
        counted = (
            func.count().filter(message.is_not(None), open_task),
            func.count().filter(message.is_(None), open_task),
            null(),
        )
    elif step is Step.UPDATE:
        members = attempt.shared
        counted = (literal(of.accepted), func.count().filter(open_task), uploading_until)
    else:
        members = attempt.survivors
        message = MESSAGES[step]
        counted = (func.count().filter(message.is_not(None)), func.count().filter(message.is_(None)), null())
        needed = attempt.threshold if step is Step.SURVIVORS else attempt.answers_needed
    found = await session.execute(
        select(func.clock_timestamp(), *counted)
        .select_from(SecuredMember)
        .join(Task, Task.id == SecuredMember.task_id)
        .where(SecuredMember.round_id == of.id, among(members))
    )
    now, arrived, awaited, until = found.one()
    frozen = of.phase is not RoundPhase.COLLECTING
    state = SecuredState(
        phase=of.phase,
        step=step,
        paused=job.state is JobState.PAUSED,
        arrived=arrived,
        awaited=awaited,
        needed=needed,
        target=needed if frozen else attempt.target,
        tried=attempt.answers_tried or 0,
        attempt=of.attempt,
        attempts=of.attempts,
        bound=attempt.bound_to is not None or (step is Step.UNMASK and arrived > 0),
        staying=0,
        again=0,
        able=0,
        min_updates=of.min_updates,
        step_closes_at=attempt.step_closes_at,
        closes_at=of.closes_at,
        uploading_until=None if until is None else min(until, graced(of)),
    )
    return Standing(state, now)


@dataclass(frozen=True, slots=True)
class Place:
    """A member by its names, and how far it is in a step."""

    round_id: UUID
    index: int
    organization: str
    dataset: str
    sent: bool
    """Its message of the step is in, or its update."""
    open: bool
    """Its task is open: it may still bring an update."""

    @property
    def name(self) -> str:
        """As events and views tell of it."""
        return f"{self.organization}/{self.dataset}"


async def list_places(session: AsyncSession, round_id: UUID, step: Step) -> list[Place]:
    """The roster in its order, with whose message of a step is in. One statement."""
    sent = MESSAGES[step].is_not(None) if step in MESSAGES else Task.state == TaskState.SUBMITTED
    found = await session.execute(
        select(
            SecuredMember.round_id,
            SecuredMember.index,
            SecuredMember.organization,
            SecuredMember.dataset,
            sent,
            Task.state.in_(OPEN_TASKS),
        )
        .join(Task, Task.id == SecuredMember.task_id)
        .where(SecuredMember.round_id == round_id)
        .order_by(SecuredMember.index)
    )
    return [Place(*row) for row in found]


def names_of(places: Sequence[Place], indices: Sequence[int]) -> list[str]:
    """Their names, in the roster's order."""
    chosen = set(indices)
    return [place.name for place in places if place.index in chosen]


async def names_of_indices(session: AsyncSession, round_id: UUID, indices: Sequence[int]) -> list[str]:
    """organization/dataset of some members, in the roster's order."""
    found = await session.execute(
        select(SecuredMember.organization, SecuredMember.dataset)
        .where(SecuredMember.round_id == round_id, among(indices))
        .order_by(SecuredMember.index)
    )
    return [f"{organization}/{dataset}" for organization, dataset in found]


def stage_of(attempt: SecuredAttempt) -> Sequence[int]:
    """The members that the present step is for."""
    if attempt.step is Step.KEYS:
        return range(attempt.members)
    if attempt.step is Step.SHARES:
        return attempt.keyed or ()
    return (attempt.shared if attempt.step is Step.UPDATE else attempt.survivors) or ()
