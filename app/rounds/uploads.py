"""Updates: admitted from their headers, spent before a byte is read, accepted once their bytes are durable."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

import numpy as np
from numpy.typing import NDArray
from procrastinate import App as Queue
from sqlalchemy import func, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit.service import append, job_stream
from app.blobs import StoredBlob
from app.credentials import Signer
from app.database import clock
from app.errors import (
    BodyTooLarge,
    DatasetNotConfirmed,
    GrantWithdrawn,
    InvalidRequest,
    JobNotRunning,
    LeaseLost,
    NormTooLarge,
    RoundNotCollecting,
    StepClosed,
    StepMessageInvalid,
    TaskNotClaimed,
    TaskNotOpen,
    TensorsMismatch,
    UpdateConflict,
)
from app.federation.lifecycle import OPEN_TASKS
from app.ledger.pricing import noises_the_sum, price_of_round, spends_when_summed
from app.ledger.service import Account, charge, require_promised
from app.models import Job, Participation, Round, Task, Update
from app.rounds.closing import settle
from app.rounds.queries import HeldTask, find_update, hold_task
from app.rounds.secured.queries import Uploading, hold_uploading
from app.rounds.specs import elements_in, is_secured, manifest_of_task, plan_of, spec_of
from app.settings import Settings
from app.wakeups import announce_change
from isthmus.codec.header import length_bounds
from isthmus.codec.scanner import UpdateScanner
from isthmus.federation.rounds import weight_of
from isthmus.privacy.clipping import norm_bound
from isthmus.privacy.lattice import UPDATE_SCALE
from isthmus.privacy.scales import noised_lattice
from isthmus.wire.datasets import DatasetState
from isthmus.wire.events import EventKind
from isthmus.wire.jobs import JobSpec, JobState, ParticipationState
from isthmus.wire.manifest import Manifest
from isthmus.wire.privacy import NoisePlace, PrivacyPlan, PrivacyUnit
from isthmus.wire.rounds import (
    STATISTICS_PREFIX,
    RoundPhase,
    TaskKind,
    TaskState,
    UpdateReceipt,
    receipt_bytes,
)
from isthmus.wire.secured import Step

NORM_TOLERANCE = 1e-5
"""Relative room for the rounding of a clipped update to float32."""
LARGEST_COUNT: Final = 1e15
LARGEST_RESULT: Final = 1e120
"""Far beyond any mean or sum of squares of real data, and far enough below float64's limit that sums stay finite."""


@dataclass(frozen=True, slots=True)
class UploadHeaders:
    """What a worker declares before it sends a byte."""

    length: int
    digest: str
    fence: int


@dataclass(frozen=True, slots=True)
class Admission:
    """Leave to send the body: what it must hold, and how long it may be as a vector."""

    task_id: UUID
    manifest: Manifest
    norm_bound: float | None
    """L2 norm that an honest update does not exceed; None: the job bounds none."""
    told: str
    """Where that bound comes from."""
    exact_statistics: bool
    """Whether statistics are as the rows gave them; noised ones need not fit together."""


class UpdateInspector:
    """Judges a body as it arrives: the codec's checks, then the bound on its norm and the sense of its statistics."""

    def __init__(self, admission: Admission, length: int) -> None:
        self.scanner = UpdateScanner(admission.manifest, length)
        self._admission = admission

    def feed(self, chunk: bytes | memoryview) -> None:
        """See `isthmus.codec.scanner`."""
        self.scanner.feed(chunk)

    def finish(self) -> None:
        """Refuse what no honest clipping and noise can have given.

        Raises:
            NormTooLarge: an honest update is so long with probability below e^-50.
            InvalidRequest: statistics that no rows have.
        """
        self.scanner.finish()
        asked = self._admission
        if asked.norm_bound is not None and self.scanner.l2_norm > asked.norm_bound:
            raise NormTooLarge(
                f"The update has L2 norm {self.scanner.l2_norm:.6g}; with {asked.told} it is at most "
                f"{asked.norm_bound:.6g}."
            )
        _check_released(self.scanner.captured, exact=asked.exact_statistics)

    def released(self) -> dict[str, Any]:
        """Metrics and statistics by name: numbers, or lists of them."""
        return {name: array.tolist() for name, array in sorted(self.scanner.captured.items())}


def _check_released(captured: Mapping[str, NDArray[np.float64]], *, exact: bool) -> None:
    """Refuse results that no rows have, or that are too large to be pooled with others'.

    Args:
        captured: by name.
        exact: no noise was added; with noise, there may be more values of a column than rows.

    Raises:
        InvalidRequest: names the tensor.
    """
    for name, values in captured.items():
        counts = name.rpartition("/")[2] in ("examples", "rows", "count")
        largest = LARGEST_COUNT if counts else LARGEST_RESULT
        if bool(np.any(np.abs(values) > largest)):
            raise InvalidRequest(f"{name} holds a number beyond {largest:g}.")
        if counts and bool(np.any((values < 0) | (values != np.floor(values)))):
            raise InvalidRequest(f"{name} is a number of records: it is whole and not negative.")
    if f"{STATISTICS_PREFIX}rows" in captured:
        count, squares = captured[f"{STATISTICS_PREFIX}count"], captured[f"{STATISTICS_PREFIX}m2"]
        if exact and bool(np.any(count > captured[f"{STATISTICS_PREFIX}rows"])):
            raise InvalidRequest(f"{STATISTICS_PREFIX}count says more values than there are rows.")
        if bool(np.any(squares < 0)):
            raise InvalidRequest(f"{STATISTICS_PREFIX}m2 is a sum of squares: it is not negative.")


def receipt_of(accepted: Update) -> UpdateReceipt:
    """The receipt of an accepted update: the same for ever."""
    return UpdateReceipt(
        task_id=accepted.task_id,
        digest=accepted.digest,
        received_at=accepted.received_at,
        signature=accepted.signature,
    )


async def admit_update(
    session: AsyncSession, settings: Settings, *, task_id: UUID, worker_id: UUID, headers: UploadHeaders
) -> Admission | UpdateReceipt:
    """Spend, then leave to send; or the receipt, if these very bytes are in already.

    The same digest is admitted again for nothing, whatever the attempt and the fence. Another digest for the same
    participation and round is refused: a second noising of the same data would be a second release. Only under secure
    aggregation another attempt has another digest, for nothing: its masks are others, over the same update.

    Raises:
        LeaseLost, TaskNotClaimed, TaskNotOpen: the task is not this worker's to hand in for.
        JobNotRunning, RoundNotCollecting, GrantWithdrawn, DatasetNotConfirmed: nothing is taken any more.
        UpdateConflict: other bytes were admitted or accepted.
        StepMessageInvalid, StepClosed: masked, before shares have closed, or of a member without shares.
        BudgetExhausted: the round costs more than is still promised to the grant, or the ledger is closed.
        BodyTooLarge, TensorsMismatch: a body of this length cannot fit the manifest. Nothing is spent.
    """
    held = await hold_task(session, task_id, worker_id, "admit")
    job, of, task = held.job, held.of, held.task
    if task.state not in OPEN_TASKS:
        accepted = await find_update(session, task_id)
        if accepted is not None:
            if accepted.digest != headers.digest:
                raise UpdateConflict
            return receipt_of(accepted)
    if held.dataset_state is not DatasetState.CONFIRMED:
        raise DatasetNotConfirmed
    if held.served_by != worker_id:
        raise TaskNotOpen(
            "The dataset was handed on: another worker serves it now, and the task is offered to that one."
        )
    require_open(job, of, task, held.participation, headers.fence)
    spec = spec_of(job)
    manifest = manifest_of_task(job, task.kind, of.number)
    _require_length(manifest, headers.length, settings.max_update_bytes)
    uploading = await _masked(session, job, task)
    admitted = task.admitted_digest if uploading is None else uploading.member.admitted_digest
    if admitted not in (None, headers.digest):
        raise UpdateConflict
    if task.admitted_digest is None:
        await _spend(session, held, spec, manifest, headers.digest)
        task.admitted_digest = headers.digest
    if uploading is not None:
        uploading.member.admitted_digest = headers.digest
    task.state = TaskState.UPLOADING
    task.lease_expires_at = task.progress_until = func.clock_timestamp() + settings.lease
    bound, told = _norm_bound(spec, plan_of(held.participation), task.kind, elements_in(job))
    return Admission(
        task_id=task_id,
        manifest=manifest,
        norm_bound=bound,
        told=told,
        exact_statistics=spec.privacy.unit is PrivacyUnit.NONE,
    )


async def _masked(session: AsyncSession, job: Job, task: Task) -> Uploading | None:
    """The member whose masked update this is; None where nothing is masked.

    Raises:
        StepMessageInvalid: shares have not closed.
        StepClosed: they have, without this member.
    """
    if not is_secured(job, task.kind):
        return None
    uploading = await hold_uploading(session, task.id)
    if uploading.step in (Step.KEYS, Step.SHARES):
        raise StepMessageInvalid(
            f"The round is at step {uploading.step.value}: send the masked update once step shares has been answered."
        )
    if not uploading.shares:
        raise StepClosed("The step shares closed without this participation, so its masks could never be taken off.")
    return uploading


def _norm_bound(spec: JobSpec, plan: PrivacyPlan | None, kind: TaskKind, elements: int) -> tuple[float | None, str]:
    """How long an honest update may be, and why; None where nothing bounds it.

    What DP-SGD made of noised gradients is as long as it is: it was protected step by step, and is not clipped again.
    Of what is masked only the sum's length can be judged.
    """
    clip_norm = spec.privacy.clip_norm
    masked = spec.secure_aggregation is not None
    if kind is not TaskKind.TRAIN or clip_norm is None or spec.privacy.unit is PrivacyUnit.RECORD or masked:
        return None, ""
    told, tolerance = f"clip_norm {clip_norm:g}", 1 + NORM_TOLERANCE
    if plan is None or plan.where is not NoisePlace.LOCAL:
        return norm_bound(clip_norm, 0.0, elements) * tolerance, told
    lattice, variance = noised_lattice(clip_norm, plan.noise_multiplier, elements, finest=UPDATE_SCALE, apart=2)
    longest, deviation = lattice.sensitivity * lattice.step, math.sqrt(variance) * lattice.step
    told += f" and noise_multiplier {plan.noise_multiplier:g}"
    return norm_bound(longest, deviation / longest, elements) * tolerance, told


async def _spend(session: AsyncSession, held: HeldTask, spec: JobSpec, manifest: Manifest, digest: str) -> None:
    """Charge the dataset and use up one round of the grant.

    Where only the sum is noised nothing is spent yet, but what will be must be promised.

    Raises:
        GrantWithdrawn: the grant has ended, or all its rounds are used.
        UpdateConflict: other bytes were charged for this participation and round.
        BudgetExhausted: the round costs more than is still promised to the grant, or the ledger is closed.
    """
    grant, kind = held.grant, held.task.kind
    if grant.ended_at is not None:
        raise GrantWithdrawn(held.participation.state.value)
    if kind is TaskKind.TRAIN:
        if grant.rounds_used >= grant.rounds:
            raise GrantWithdrawn(ParticipationState.EXHAUSTED.value)
        grant.rounds_used += 1
    account = Account(held.ledger_id, held.dataset_id, held.job.id, held.participation.id)
    price = await price_of_round(
        spec, held.job.spec_digest, plan_of(held.participation), held.of.number, elements_in(held.job)
    )
    if spends_when_summed(spec, kind):
        now = await require_promised(session, account, price)
    else:
        entry = await charge(
            session,
            account,
            price,
            round_number=held.of.number,
            release=kind.value,
            elements=sum(tensor.elements for tensor in manifest.tensors.values()),
            digest=digest,
        )
        now = entry.created_at
    if grant.expires_at <= now:  # the charge is undone with the transaction
        raise GrantWithdrawn("expired")


def require_open(job: Job, of: Round, task: Task, participation: Participation, fence: int) -> None:
    """Whether an upload for the task may go on now.

    Raises:
        JobNotRunning, RoundNotCollecting, GrantWithdrawn, LeaseLost, TaskNotClaimed, TaskNotOpen: it may not, and why.
    """
    if job.state in (JobState.FAILED, JobState.CANCELLED):
        raise JobNotRunning(f"The job is {job.state}: {job.detail or 'it takes nothing any more'}.")
    if participation.state is not ParticipationState.APPROVED:
        raise GrantWithdrawn(participation.state.value)
    if of.phase is not RoundPhase.COLLECTING:
        raise RoundNotCollecting(of.phase.value)
    if task.fence != fence:
        raise LeaseLost
    if task.state is TaskState.OFFERED:
        raise TaskNotClaimed
    if task.state not in (TaskState.CLAIMED, TaskState.UPLOADING):
        raise TaskNotOpen(f"The task is {task.state}: {task.detail or 'it ended before'}.")


def _require_length(manifest: Manifest, length: int, largest: int) -> None:
    shortest, longest = length_bounds(manifest)
    if length > min(longest, largest):
        raise BodyTooLarge(f"A body for this task has at most {min(longest, largest)} bytes; {length} were declared.")
    if length < shortest:
        raise TensorsMismatch(f"A body for this task has at least {shortest} bytes; {length} were declared.")


async def note_progress(session: AsyncSession, settings: Settings, task_id: UUID, fence: int) -> None:
    """Bytes keep coming: the lease is longer. A lease taken away meanwhile stays away."""
    await session.execute(
        update(Task)
        .where(Task.id == task_id, Task.fence == fence, Task.state == TaskState.UPLOADING)
        .values(
            lease_expires_at=func.clock_timestamp() + settings.lease,
            progress_until=func.clock_timestamp() + settings.lease,
        )
    )


async def accept_update(
    session: AsyncSession,
    queue: Queue,
    signer: Signer,
    *,
    task_id: UUID,
    worker_id: UUID,
    fence: int,
    stored: StoredBlob,
    l2_norm: float | None,
    released: dict[str, Any],
    actor: str,
) -> tuple[Update, bool]:
    """Turn bytes that are durable already into the task's one update; False if equal bytes were in before these.

    The same bytes again give the same receipt, even late. Other bytes are refused. If the set is full with this
    update, it is frozen in the same transaction.
    """
    held = await hold_task(session, task_id, worker_id, "accept")
    job, of, task = held.job, held.of, held.task
    if task.state not in OPEN_TASKS:
        accepted = await find_update(session, task_id)  # looked at under the lock: two equal uploads may race
        if accepted is not None:
            if accepted.digest != stored.digest:
                raise UpdateConflict
            return accepted, False
    require_open(job, of, task, held.participation, fence)
    admitted, weight = task.admitted_digest, _weight(job, held.participation)
    if is_secured(job, task.kind):
        member = (await hold_uploading(session, task_id)).member
        admitted, weight, l2_norm = member.admitted_digest, float(member.weight), None
    if admitted != stored.digest:
        raise UpdateConflict
    now = await clock(session)
    accepted = Update(
        task_id=task_id,
        round_id=of.id,
        participation_id=task.participation_id,
        blob_key=stored.key,
        digest=stored.digest,
        size_bytes=stored.size_bytes,
        weight=weight,
        l2_norm=l2_norm,
        released=released,
        excluded=False,
        received_at=now,
        signature=signer.sign(receipt_bytes(task_id, stored.digest, now)),
    )
    session.add(accepted)
    task.state, task.detail, task.lease_expires_at = TaskState.SUBMITTED, None, None
    of.accepted += 1
    append(
        session,
        job_stream(job.id),
        EventKind.UPDATE_ACCEPTED,
        at=now,
        actor=actor,
        round=of.number,
        task=task.kind.value,
        organization=held.organization,
        dataset=held.dataset,
        # An un-noised update is not told by its digest: it is a function of the records that anyone could try out.
        digest=None if noises_the_sum(spec_of(job), task.kind) else stored.digest,
        accepted=of.accepted,
        target_updates=of.target_updates,
    )
    # Below its minimum an accepted update makes nothing due at once; the sweep sees a round that nobody can fill.
    if of.accepted < of.min_updates or await settle(session, queue, job, of, now) is None:
        await announce_change(session, job.id, offers=False)
    return accepted, True


def _weight(job: Job, participation: Participation) -> float:
    strategy = spec_of(job).strategy
    return weight_of(strategy, participation.declared_rows)


async def reject_content(
    session: AsyncSession, queue: Queue, *, task_id: UUID, worker_id: UUID, fence: int, refusal: str, actor: str
) -> None:
    """A body that can never be taken: the round need not wait for it. What was spent stays spent."""
    held = await hold_task(session, task_id, worker_id, "accept")
    job, of, task = held.job, held.of, held.task
    if task.fence != fence or task.state is not TaskState.UPLOADING:
        return
    task.state, task.detail, task.lease_expires_at = TaskState.FAILED, refusal, None
    await session.flush()
    now: datetime = await clock(session)
    append(session, job_stream(job.id), EventKind.TASK_FAILED, at=now, actor=actor, round=of.number, reason=refusal)
    if job.state in (JobState.RUNNING, JobState.PAUSED):
        await settle(session, queue, job, of, now)
    await announce_change(session, job.id)
