"""Opening rounds: which comes next, whom it asks, and what if there are too few."""

from datetime import datetime, timedelta

from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit.service import append, job_stream
from app.federation.lifecycle import JobEvent, RoundEvent, advance_job, advance_round
from app.models import Grant, Job, Participation, Round, Task
from app.rounds.offering import ask, new_task, pause_for_want, tell_reopened
from app.rounds.queries import Candidate, list_candidates, list_unasked
from app.rounds.secured.opening import open_attempt
from app.rounds.specs import is_secured, spec_of
from app.wakeups import announce_change
from isthmus.federation.cohort import Cohort, TooFewParticipations
from isthmus.federation.rounds import cohort_seed, draw_round, number_after
from isthmus.wire.events import EventKind
from isthmus.wire.jobs import JobReason, JobSpec, JobState, ParticipationState
from isthmus.wire.rounds import TaskKind, kind_of_round


async def begin_if_enough(session: AsyncSession, job: Job, now: datetime) -> None:
    """Start a job that waits for approval once `min_updates` participations are approved. Needs the job's lock.

    A job that can no longer get so many fails, and says why.
    """
    if job.state is not JobState.AWAITING_APPROVAL:
        return
    spec = spec_of(job)
    candidates = await list_candidates(session, job.id, now)
    if len(candidates) < spec.cohort.min_updates:
        await _fail_if_hopeless(session, job, spec.cohort.min_updates, now)
        return
    job.state = advance_job(job.state, JobEvent.ENOUGH_APPROVED)
    job.reason, job.detail = None, None
    append(session, job_stream(job.id), EventKind.JOB_RUNNING, at=now, approved=len(candidates))
    await proceed(session, job, None, now)


async def _fail_if_hopeless(session: AsyncSession, job: Job, needed: int, now: datetime) -> None:
    """A job of which too many stewards said no will never run: say so, instead of waiting for ever."""
    states = await session.execute(
        select(Participation.state, func.count())
        .where(Participation.job_id == job.id)
        .group_by(Participation.state)
        .order_by(Participation.state)
    )
    counts = {row[0]: row[1] for row in states}
    over = (ParticipationState.REJECTED, ParticipationState.WITHDRAWN)
    if sum(count for state, count in counts.items() if state not in over) >= needed:
        return
    job.state = advance_job(job.state, JobEvent.FAILED)
    job.reason, job.ended_at = JobReason.TOO_FEW_PARTICIPATIONS, now
    listed = ", ".join(f"{count} {state.value}" for state, count in counts.items())
    job.detail = f"The job needs {needed} participations; of those that were asked, {listed}."
    append(session, job_stream(job.id), EventKind.JOB_FAILED, at=now, reason=job.reason.value, detail=job.detail)
    await announce_change(session, job.id)


async def proceed(session: AsyncSession, job: Job, last: int | None, now: datetime) -> None:
    """After round `last`: open the next one, end the job, or pause it for want of grants. Needs the job's lock.

    A paused job waits: nothing is opened until it is resumed.
    """
    spec = spec_of(job)
    number = number_after(spec, last)
    if number is None:
        await _complete(session, job, now)
        return
    if job.state is not JobState.RUNNING:
        return
    kind = kind_of_round(number, spec.rounds)
    candidates = await _with_rounds_left(session, job, kind, now)
    if kind is TaskKind.EVALUATE and not candidates:
        await _complete(session, job, now)
        return
    assert spec.seed is not None  # the service draws one when the job is created
    seed = cohort_seed(spec.seed, number)
    asked = [(candidate.organization, candidate.dataset) for candidate in candidates]
    try:
        cohort = draw_round(spec.cohort, kind, asked, seed)
    except TooFewParticipations:
        await pause_for_want(session, job, spec.cohort.min_updates, now)
        return
    await _open(session, job, spec, number, kind, seed, cohort, candidates, now)


async def _with_rounds_left(session: AsyncSession, job: Job, kind: TaskKind, now: datetime) -> list[Candidate]:
    """Who may be asked. A grant whose rounds are used up ends when one more training round would be needed."""
    candidates = list(await list_candidates(session, job.id, now))
    if kind is not TaskKind.TRAIN:
        return candidates
    used_up = [candidate for candidate in candidates if candidate.rounds_left <= 0]
    if used_up:
        ids = [candidate.participation_id for candidate in used_up]
        await session.execute(
            update(Participation)
            .where(Participation.id.in_(ids))
            .values(state=ParticipationState.EXHAUSTED, detail="All rounds of its grant are used.")
        )
        await session.execute(update(Grant).where(Grant.participation_id.in_(ids)).values(ended_at=now))
        for gone in used_up:
            append(
                session,
                job_stream(job.id),
                EventKind.PARTICIPATION_EXHAUSTED,
                at=now,
                organization=gone.organization,
                dataset=gone.dataset,
            )
    return [candidate for candidate in candidates if candidate.rounds_left > 0]


async def _open(
    session: AsyncSession,
    job: Job,
    spec: JobSpec,
    number: int,
    kind: TaskKind,
    seed: str,
    cohort: Cohort,
    candidates: list[Candidate],
    now: datetime,
) -> None:
    assert job.model_digest is not None
    by_names = {(candidate.organization, candidate.dataset): candidate for candidate in candidates}
    opened = Round(
        job_id=job.id,
        number=number,
        kind=kind,
        attempts=spec.cohort.attempts,
        cohort_seed=seed,
        cohort_size=len(cohort.chosen),
        target_updates=cohort.target_updates,
        min_updates=0 if kind is TaskKind.EVALUATE else spec.cohort.min_updates,
        model_digest=job.model_digest,
        opened_at=now,
        closes_at=now + timedelta(seconds=spec.cohort.deadline_s),
        grace_s=spec.cohort.grace_s,
    )
    session.add(opened)
    await session.flush()
    session.add_all(new_task(job.id, opened, by_names[chosen], now) for chosen in cohort.chosen)
    if is_secured(job, kind):
        await session.flush()
        await open_attempt(session, job, opened, now)
    append(
        session,
        job_stream(job.id),
        EventKind.ROUND_OPENED,
        at=now,
        round=number,
        task=kind.value,
        model_digest=job.model_digest,
        cohort_seed=seed,
        cohort=[f"{chosen.organization}/{chosen.dataset}" for chosen in cohort.chosen],
        target_updates=cohort.target_updates,
    )
    await announce_change(session, job.id)


async def refill(session: AsyncSession, job: Job, of: Round, now: datetime) -> None:
    """A round that lost too many of those that it asked asks all the others. Needs the locks of job and round."""
    of.phase = advance_round(of.phase, RoundEvent.REFILLED)
    others = await list_unasked(session, of, await list_candidates(session, job.id, now))
    called_off = await session.scalars(
        select(Task)
        .where(Task.round_id == of.id, Task.participation_id.in_([item.participation_id for item in others]))
        .order_by(Task.id)
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    again = {task.participation_id: task for task in called_off}
    for item in others:
        ask(session, of, item, again.get(item.participation_id), now)
    await session.flush()
    await tell_reopened(session, job, of, now, added=sorted(f"{item.organization}/{item.dataset}" for item in others))


async def _complete(session: AsyncSession, job: Job, now: datetime) -> None:
    job.state = advance_job(job.state, JobEvent.COMPLETED)
    job.reason, job.ended_at = JobReason.ALL_ROUNDS_DONE, now
    job.detail = f"All {job.rounds_completed} rounds are done."
    append(
        session,
        job_stream(job.id),
        EventKind.JOB_COMPLETED,
        at=now,
        model_digest=job.model_digest,
        rounds=job.rounds_completed,
    )
    await announce_change(session, job.id)
