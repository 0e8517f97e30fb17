"""What is told of a secured attempt that is given up: of what there were too few, and who is missing."""

from datetime import datetime
from typing import Final

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit.service import append, job_stream
from app.federation.lifecycle import OPEN_TASKS, RoundEvent
from app.federation.secured_lifecycle import AbortReason
from app.models import Job, Round, SecuredAttempt, SecuredMember, Task
from app.rounds.ending import fail
from app.rounds.secured.again import Anew
from app.rounds.secured.queries import list_places, names_of, stage_of
from isthmus.wire.events import EventKind
from isthmus.wire.jobs import JobReason
from isthmus.wire.rounds import TaskState
from isthmus.wire.secured import Step

NAMED: Final = 20
"""So many of the missing are named in a job's detail; the event names all."""


async def tell_aborted(
    session: AsyncSession, job: Job, of: Round, attempt: SecuredAttempt, because: AbortReason, now: datetime
) -> None:
    """Record that an attempt is given up, and whose message was missing."""
    places = await list_places(session, of.id, attempt.step)
    stage = stage_of(attempt)
    missing = [place.index for place in places if place.index in stage and not place.sent]
    append(
        session,
        job_stream(job.id),
        EventKind.ATTEMPT_ABORTED,
        at=now,
        round=of.number,
        attempt=of.attempt,
        step=attempt.step.value,
        because=because.value,
        missing=names_of(places, missing),
    )


async def give_round_up(
    session: AsyncSession,
    job: Job,
    of: Round,
    attempt: SecuredAttempt,
    because: AbortReason,
    anew: Anew,
    now: datetime,
) -> None:
    """There is no further attempt: the job fails, and says how many are needed and who did not come."""
    await tell_aborted(session, job, of, attempt, because, now)
    why = because.value.replace("-", " ")
    told = [
        f"Round {of.number} is given up after {of.attempt} of {of.attempts} attempts: {why} in the last one. Of the "
        f"{attempt.members} that it asked {attempt.needed} are needed (threshold {attempt.threshold}, min_updates "
        f"{of.min_updates})"
    ]
    lacking = await _lacking(session, attempt)
    if lacking:
        more = f" and {len(lacking) - NAMED} more" if len(lacking) > NAMED else ""
        told.append(f"Missing at step {attempt.step.value}: {'; '.join(lacking[:NAMED])}{more}")
    if attempt.suspects:
        told.append(
            f"Suspected of wrong shares: {', '.join(attempt.suspects)}. If that happens again, name the others in "
            "data.datasets"
        )
    if anew.obstacle:
        told.append(
            f"Shares were told for the sum of {', '.join(anew.bound_to or ())}, so the round can be tried again with "
            f"exactly that sum only, but it cannot be: {anew.obstacle}. Submit the job anew"
        )
    detail = "".join(f"{sentence}. " for sentence in told).strip()
    await fail(session, job, of, RoundEvent.ATTEMPTS_EXHAUSTED, JobReason.ROUND_FAILED, detail, now)


async def _lacking(session: AsyncSession, attempt: SecuredAttempt) -> list[str]:
    """Those that the present step is for and who did not bring its message, or ended their task; and why."""
    collecting = attempt.step in (Step.KEYS, Step.SHARES, Step.UPDATE)
    found = await session.execute(
        select(SecuredMember.index, Task.state, Task.detail)
        .join(Task, Task.id == SecuredMember.task_id)
        .where(SecuredMember.round_id == attempt.round_id)
    )
    tasks = {index: (state, detail) for index, state, detail in found}
    stage = stage_of(attempt)
    lacking = []
    for place in await list_places(session, attempt.round_id, attempt.step):
        state, detail = tasks[place.index]
        left = collecting and state not in (*OPEN_TASKS, TaskState.SUBMITTED)
        if place.index in stage and (left or not place.sent):
            why = f"{state.value}: {detail}" if detail else state.value
            lacking.append(f"{place.name} ({why})")
    return lacking
