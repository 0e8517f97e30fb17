"""Changing jobs."""

import secrets
from uuid import UUID

from procrastinate import App as Queue
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit.service import append, job_stream
from app.blobs import StoredBlob
from app.database import clock
from app.dependencies import Caller
from app.errors import JobNotDraft, ModelMissing, NotFound
from app.federation.lifecycle import JobEvent, advance_job
from app.models import Checkpoint, Job, Principal, Round, SecuredAttempt
from app.participations.service import plan_ahead, request_participations
from app.rounds.closing import settle
from app.rounds.ending import cancel as close_cancelled
from app.rounds.opening import begin_if_enough, proceed
from app.rounds.queries import find_open_round, get_job, last_finished_number
from app.wakeups import announce_change
from isthmus.wire.base import digest_of
from isthmus.wire.events import EventKind
from isthmus.wire.jobs import JobReason, JobSpec, JobState
from isthmus.wire.manifest import Manifest
from isthmus.wire.rounds import RoundPhase


async def create_job(session: AsyncSession, caller: Caller, asked: JobSpec) -> UUID:
    """Draft a job. Without a seed in its spec the service draws one; the spec's digest is over all of it."""
    spec = asked if asked.seed is not None else asked.model_copy(update={"seed": secrets.token_hex(32)})
    now = await clock(session)
    manifest = None if spec.model.layers is None else spec.model.plan(spec.data.input_shape).manifest
    job = Job(
        name=spec.name,
        owner_id=caller.principal_id,
        spec=spec.model_dump(mode="json"),
        spec_digest=digest_of(spec),
        manifest=None if manifest is None else manifest.model_dump(mode="json"),
        created_at=now,
    )
    session.add(job)
    await session.flush()
    stream = job_stream(job.id)
    append(
        session, stream, EventKind.JOB_CREATED, at=now, actor=caller.name, name=job.name, spec_digest=job.spec_digest
    )
    return job.id


async def require_draft(session: AsyncSession, caller: Caller, job_id: UUID) -> Manifest | None:
    """The manifest that the initial model of a draft must fit; None if the model defines it.

    Raises:
        NotFound: missing, or another's.
        JobNotDraft: it was started already.
    """
    job = await _own(session, caller, job_id, locked=False)
    if job.state is not JobState.DRAFT:
        raise JobNotDraft(f"The job is {job.state}; its initial model can be changed only in a draft.")
    spec = JobSpec.model_validate(job.spec)
    return None if spec.model.layers is None or job.manifest is None else Manifest.model_validate(job.manifest)


async def set_model(
    session: AsyncSession, caller: Caller, job_id: UUID, stored: StoredBlob, manifest: Manifest
) -> None:
    """Make durable bytes the initial model of a draft: checkpoint 0. Again, while it is a draft, replaces it.

    Raises:
        NotFound, JobNotDraft: as `require_draft`.
    """
    job = await _own(session, caller, job_id)
    if job.state is not JobState.DRAFT:
        raise JobNotDraft(f"The job is {job.state}; its initial model can be changed only in a draft.")
    now = await clock(session)
    found = await session.scalars(select(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.round_number == 0))
    checkpoint = found.one_or_none()
    if checkpoint is None:
        checkpoint = Checkpoint(job_id=job_id, round_number=0, created_at=now)
        session.add(checkpoint)
    checkpoint.digest, checkpoint.size_bytes = stored.digest, stored.size_bytes
    job.model_digest, job.manifest = stored.digest, manifest.model_dump(mode="json")
    stream = job_stream(job_id)
    append(session, stream, EventKind.MODEL_UPLOADED, at=now, actor=caller.name, digest=stored.digest)


async def start(session: AsyncSession, caller: Caller, job_id: UUID) -> None:
    """Ask the datasets; rounds begin once enough of them are approved, which a rule may do at once.

    Raises:
        NotFound: missing, or another's.
        ModelMissing: there is nothing to start from.
        NoMatchingDataset: too few datasets could ever take part.
        TransitionRefused: it was started before.
    """
    draft = await _own(session, caller, job_id, locked=False)
    advance_job(draft.state, JobEvent.STARTED)
    if draft.model_digest is None:
        raise ModelMissing
    plans = await plan_ahead(session, draft)
    job = await _own(session, caller, job_id)
    state = advance_job(job.state, JobEvent.STARTED)
    owner = (await session.scalars(select(Principal).where(Principal.id == caller.principal_id))).one()
    now = await clock(session)
    job.state, job.started_at = state, now
    append(session, job_stream(job_id), EventKind.JOB_STARTED, at=now, actor=caller.name, model=job.model_digest)
    await request_participations(session, job, owner, plans, now)
    await begin_if_enough(session, job, now)
    await announce_change(session, job_id)


async def pause(session: AsyncSession, caller: Caller, job_id: UUID) -> None:
    """Offer nothing new. Claimed tasks may finish, the round may complete, the next does not open; deadlines wait.

    Raises:
        NotFound: missing, or another's.
        TransitionRefused: it is not running.
    """
    job = await _own(session, caller, job_id)
    job.state = advance_job(job.state, JobEvent.PAUSED)
    now = await clock(session)
    job.reason, job.detail, job.paused_at = JobReason.BY_REQUEST, f"Paused by {caller.name}.", now
    stream = job_stream(job_id)
    append(session, stream, EventKind.JOB_PAUSED, at=now, actor=caller.name, reason=job.reason.value)
    await announce_change(session, job_id)


async def resume(session: AsyncSession, queue: Queue, caller: Caller, job_id: UUID) -> None:
    """Go on where it was paused: the open round's deadline moves by the pause; or the next round opens.

    Raises:
        NotFound: missing, or another's.
        TransitionRefused: it is not paused.
    """
    job = await _own(session, caller, job_id)
    of = await find_open_round(session, job_id, "update")
    job.state = advance_job(job.state, JobEvent.RESUMED)
    now = await clock(session)
    paused_at, job.paused_at, job.reason, job.detail = job.paused_at, None, None, None
    append(session, job_stream(job_id), EventKind.JOB_RESUMED, at=now, actor=caller.name)
    if of is None:
        await proceed(session, job, await last_finished_number(session, job_id), now)
    elif of.phase is not RoundPhase.AGGREGATING:
        if paused_at is not None:
            pause = now - paused_at
            await session.execute(update(Round).where(Round.id == of.id).values(closes_at=Round.closes_at + pause))
            await session.execute(
                update(SecuredAttempt)
                .where(SecuredAttempt.round_id == of.id)
                .values(step_closes_at=SecuredAttempt.step_closes_at + pause)
            )
            await session.refresh(of)
        await settle(session, queue, job, of, now)
    await announce_change(session, job_id)


async def cancel(session: AsyncSession, caller: Caller, job_id: UUID, note: str) -> None:
    """End a job at any moment; what its workers do is called off.

    Raises:
        NotFound: missing, or another's.
        TransitionRefused: it has ended.
    """
    job = await _own(session, caller, job_id)
    of = await find_open_round(session, job_id, "update")
    await close_cancelled(session, job, of, note, caller.name)


async def _own(session: AsyncSession, caller: Caller, job_id: UUID, *, locked: bool = True) -> Job:
    job = await get_job(session, job_id, "update" if locked else None)
    if job.owner_id != caller.principal_id:
        raise NotFound("job", job_id)
    return job
