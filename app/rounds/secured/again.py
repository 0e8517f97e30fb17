"""A new attempt of a secured round: whom it asks, and what becomes of the former one."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from sqlalchemy import delete, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.federation.lifecycle import OPEN_TASKS, RoundEvent, advance_round
from app.models import Dataset, Job, Participation, Round, SecuredAttempt, SecuredMember, Task, Update, Worker
from app.rounds.ending import discard_updates, forget_attempt
from app.rounds.offering import ask, tell_reopened
from app.rounds.queries import Candidate, list_candidates, list_unasked
from app.rounds.secured.opening import open_attempt
from app.rounds.secured.queries import names_of_indices
from app.rounds.specs import spec_of
from isthmus.federation.rounds import weight_of
from isthmus.wire.rounds import TaskState
from isthmus.wire.secured import LARGEST_COHORT, Step

LEFT_BEHIND: Final = (
    "The step {step} closed without this participation: its message had not come. It is asked again if there is a new "
    "attempt, and in the next round."
)
NOT_IN_THE_SUM: Final = "Shares were told for a sum without it: this round takes nobody else any more."
_SAID_NO: Final = (TaskState.REFUSED, TaskState.CANCELLED)
_Asked = tuple[Candidate, Task | None]
"""Who is asked in a new attempt, and by which task; None: it is not asked in this round yet."""


@dataclass(frozen=True, slots=True)
class Anew:
    """Whom a new attempt would ask."""

    asked: Sequence[_Asked]
    able: int
    """How many may be asked at all."""
    bound_to: list[str] | None = None
    """Shares were told for the sum of these, and they are asked, or nobody."""
    obstacle: str | None = None
    """Why they cannot be asked, as part of a sentence."""


async def who_stays(session: AsyncSession, job: Job, of: Round, now: datetime) -> Anew:
    """Those whose keys are in, and who may be asked anew: the others were waited for long enough."""
    candidates = await _candidates(session, job, now)
    tasks = await _hold_tasks(session, of)
    keyed = set(
        await session.scalars(
            select(SecuredMember.task_id).where(SecuredMember.round_id == of.id, SecuredMember.keys.is_not(None))
        )
    )
    stay = [task for task in tasks if task.id in keyed and task.state in OPEN_TASKS]
    return Anew(_able_of(stay, candidates), len(candidates))


async def who_again(session: AsyncSession, job: Job, of: Round, attempt: SecuredAttempt, now: datetime) -> Anew:
    """All that the round asked, that did not say no and that may be asked now; where they are too few, all others too.

    Where shares were told: whom they were told for, if all of them can send the very same again.
    """
    candidates = await _candidates(session, job, now)
    tasks = await _hold_tasks(session, of)
    bound_to = await _bound_to(session, attempt)
    if bound_to is not None:
        obstacle = await _obstacle(session, job, attempt, bound_to, candidates)
        told_for = set(bound_to)
        same = [] if obstacle else _able_of(tasks, candidates)
        asked = [item for item in same if f"{item[0].organization}/{item[0].dataset}" in told_for]
        return Anew(asked, len(candidates), bound_to, obstacle)
    again = _able_of([task for task in tasks if task.state not in _SAID_NO], candidates)
    if len(again) < of.min_updates:
        others = await list_unasked(session, of, list(candidates.values()))
        by_participation = {task.participation_id: task for task in tasks}
        room = LARGEST_COHORT - len(again)
        again += [(item, by_participation.get(item.participation_id)) for item in others][:room]
    return Anew(again, len(candidates))


async def begin_again(
    session: AsyncSession, job: Job, of: Round, attempt: SecuredAttempt, event: RoundEvent, anew: Anew, now: datetime
) -> None:
    """Delete all that came in, and begin a new attempt with new keys, among those who are asked anew."""
    of.phase = advance_round(of.phase, event)
    suspects = attempt.suspects
    await discard_updates(session, of, now)
    await session.execute(delete(Update).where(Update.round_id == of.id, Update.excluded.is_(False)))
    await forget_attempt(session, of)
    of.attempt += 1
    if event is RoundEvent.ROSTER_SHRUNK:  # whoever is off must not use up the attempts of those who are there
        of.attempts += 1
    of.accepted, of.frozen_at, of.deferred_at = 0, None, None
    of.closes_at = now + timedelta(seconds=spec_of(job).cohort.deadline_s)
    await _leave_others(session, of, event, anew)
    for candidate, task in anew.asked:
        ask(session, of, candidate, task, now)
    await session.flush()
    await open_attempt(session, job, of, now, suspects=suspects, bound_to=anew.bound_to)
    await tell_reopened(session, job, of, now, offered=len(anew.asked))


async def _leave_others(session: AsyncSession, of: Round, event: RoundEvent, anew: Anew) -> None:
    """End the tasks of those whom the new attempt does not ask."""
    offered = [task.id for _, task in anew.asked if task is not None]
    others = update(Task).where(Task.round_id == of.id, Task.id.not_in(offered))
    if event is RoundEvent.ROSTER_SHRUNK:  # the attempt after this one asks them again
        detail = LEFT_BEHIND.format(step=Step.KEYS.value)
        left = others.where(Task.state.in_(OPEN_TASKS)).values(state=TaskState.EXPIRED, detail=detail)
    else:
        detail = NOT_IN_THE_SUM if anew.bound_to else "It may not be asked any more."
        left = others.where(Task.state.not_in(_SAID_NO)).values(state=TaskState.CANCELLED, detail=detail)
    await session.execute(left.values(lease_expires_at=None))


async def _candidates(session: AsyncSession, job: Job, now: datetime) -> dict[UUID, Candidate]:
    return {item.participation_id: item for item in await list_candidates(session, job.id, now)}


async def _hold_tasks(session: AsyncSession, of: Round) -> Sequence[Task]:
    found = await session.scalars(
        select(Task)
        .where(Task.round_id == of.id)
        .order_by(Task.id)
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    return found.all()


def _able_of(tasks: Sequence[Task], candidates: dict[UUID, Candidate]) -> list[_Asked]:
    """Those of the tasks whose participation may be asked, and whose grant has a round left, or gave this one."""
    return [
        (candidate, task)
        for task in tasks
        if (candidate := candidates.get(task.participation_id)) is not None
        and (candidate.rounds_left > 0 or task.admitted_digest is not None)
    ]


async def _bound_to(session: AsyncSession, attempt: SecuredAttempt) -> list[str] | None:
    """For whose sum shares were told, in this attempt or one before; None: for nobody's."""
    if attempt.bound_to is not None or attempt.step is not Step.UNMASK:
        return attempt.bound_to
    told = select(SecuredMember.index).where(
        SecuredMember.round_id == attempt.round_id, SecuredMember.reveal.is_not(None)
    )
    if await session.scalar(told.limit(1)) is None:
        return None
    return await names_of_indices(session, attempt.round_id, attempt.survivors or ())


async def _obstacle(
    session: AsyncSession,
    job: Job,
    attempt: SecuredAttempt,
    bound_to: Sequence[str],
    candidates: dict[UUID, Candidate],
) -> str | None:
    """Why those for whom shares were told cannot all send the same once more; None: they can.

    The same means: from the same worker, which keeps what it sent, and of the same weight, as a share of the largest.
    """
    found = await session.execute(
        select(SecuredMember, Task, Participation.declared_rows, Worker.public_key)
        .join(Task, Task.id == SecuredMember.task_id)
        .join(Participation, Participation.id == Task.participation_id)
        .join(Dataset, Dataset.id == Participation.dataset_id)
        .join(Worker, Worker.id == Dataset.worker_id)
        .where(SecuredMember.round_id == attempt.round_id)
        .order_by(SecuredMember.index)
    )
    rows, inside = found.all(), set(bound_to)
    same = [row for row in rows if f"{row[0].organization}/{row[0].dataset}" in inside]
    strategy = spec_of(job).strategy
    gone, other, changed = [], [], []
    for member, task, declared, key in same:
        name = f"{member.organization}/{member.dataset}"
        if task.state in _SAID_NO or not _able_of([task], candidates):
            gone.append(name)
        elif bytes.fromhex(key) != member.identity:
            other.append(name)
        elif int(weight_of(strategy, declared)) != member.weight:
            changed.append(name)
    if gone:
        return f"may not be asked any more, or said no: {', '.join(gone)}"
    if other:
        return f"another worker serves it now, which does not have that update: {', '.join(other)}"
    if changed:
        return f"another number of rows counts now: {', '.join(changed)}"
    if max(row[0].weight for row in same) != max(row[0].weight for row in rows):
        heaviest = max(rows, key=lambda row: row[0].weight)[0]
        return (
            f"updates were scaled by the largest weight, which was that of {heaviest.organization}/{heaviest.dataset}, "
            "and that one is not among them"
        )
    return None
