"""The messages of a secured round's steps: taken once, kept, and answered with what the step's closing gives.

Taking one is a short transaction under the round's lock. What one member gets is cut out of the others' messages in
Postgres; so the cost of an answer grows with the members, and not with their square.
"""

from dataclasses import dataclass
from typing import Final
from uuid import UUID

from procrastinate import App as Queue
from sqlalchemy import ARRAY, Integer, LargeBinary, bindparam, case, func, or_, select, type_coerce
from sqlalchemy.dialects.postgresql import aggregate_order_by
from sqlalchemy.ext.asyncio import AsyncSession

from app.errors import (
    GrantWithdrawn,
    InvalidRequest,
    JobNotRunning,
    LeaseLost,
    StepClosed,
    StepConflict,
    StepMessageInvalid,
    TaskNotClaimed,
    TaskNotOpen,
)
from app.federation.lifecycle import OPEN_TASKS
from app.federation.secured_lifecycle import STEPS
from app.models import SecuredAttempt, SecuredMember, Task
from app.rounds.queries import hold_task
from app.rounds.secured.closing import settle_standing
from app.rounds.secured.queries import MESSAGES, HeldMember, hold_member, read_standing
from app.rounds.specs import is_secured
from isthmus.secagg.messages import ADVERTISEMENT_BYTES, REVEALED_BYTES, SEALED_BYTES, SIGNATURE_BYTES
from isthmus.secagg.server import (
    check_confirmation,
    check_keys,
    check_reveal,
    check_shares,
    confirmations_answer,
    survivors_answer,
)
from isthmus.secagg.violations import MessageInvalid
from isthmus.wire.jobs import JobState, ParticipationState
from isthmus.wire.rounds import RoundPhase, TaskState
from isthmus.wire.secured import LARGEST_COHORT, Step

LARGEST: Final = {
    Step.KEYS: ADVERTISEMENT_BYTES,
    Step.SHARES: (LARGEST_COHORT - 1) * SEALED_BYTES,
    Step.UPDATE: 0,
    Step.SURVIVORS: SIGNATURE_BYTES,
    Step.UNMASK: LARGEST_COHORT * REVEALED_BYTES,
}
"""Bytes of the longest message of each step, in the largest cohort."""
AHEAD: Final = "The step {step} is not open yet: the round is at {at}. Send it once the step before has been answered."


@dataclass(frozen=True, slots=True)
class Taken:
    """A message is in."""

    round_id: UUID
    closed: bool
    """Whether its step has closed, or the attempt is over: it is worth while to look for the answer."""


async def take_message(
    session: AsyncSession,
    queue: Queue,
    *,
    task_id: UUID,
    worker_id: UUID,
    fence: int,
    step: Step,
    message: bytes,
) -> Taken:
    """Keep a member's message of a step, and close the step if nobody else is waited for. The same again is harmless.

    Raises:
        NotFound: the task is not the worker's.
        JobNotRunning, GrantWithdrawn, LeaseLost, TaskNotClaimed, TaskNotOpen: nothing is taken for it any more.
        StepClosed: the step closed without this member, or the round is over.
        StepConflict: another message is in.
        StepMessageInvalid: the step does not take this, or not yet.
        InvalidRequest: the task has no steps.
    """
    held = await hold_member(session, task_id, worker_id, step)
    if held is None:
        return await _without_attempt(session, task_id, worker_id, fence, step)
    _require_member(held, fence, step)
    attempt, member = held.attempt, held.member
    if held.sent is not None:
        if held.sent != message:
            raise StepConflict(step.value)
        return Taken(held.of.id, _answered(attempt, step))
    if step is Step.UPDATE:  # the upload is its message
        return Taken(held.of.id, _answered(attempt, step))
    if _closed(attempt, step) and step is not Step.SURVIVORS:
        raise StepClosed(f"The step {step.value} closed without this participation: its message had not come.")
    await _check(session, held, step, message)
    setattr(member, MESSAGES[step].key, message)
    await session.flush()
    if not _closed(attempt, step):
        standing = await read_standing(session, held.job, held.of, attempt)
        event = await settle_standing(session, queue, held.job, held.of, attempt, standing.state, standing.now)
        if event is not None:
            return Taken(held.of.id, closed=True)
    return Taken(held.of.id, _answered(attempt, step))


def _closed(attempt: SecuredAttempt, step: Step) -> bool:
    """Whether the round has gone on to a later step."""
    return STEPS.index(attempt.step) > STEPS.index(step)


def _answered(attempt: SecuredAttempt, step: Step) -> bool:
    """Whether there is an answer. The last step gives nothing, so nobody waits for the others' messages."""
    return step is Step.UNMASK or _closed(attempt, step)


def _require_member(held: HeldMember, fence: int, step: Step) -> None:
    """Whether anything of this step may come from the member.

    Raises:
        GrantWithdrawn, LeaseLost, TaskNotClaimed, TaskNotOpen, StepClosed, StepMessageInvalid: it may not, and why.
    """
    of, task, attempt, index = held.of, held.task, held.attempt, held.member.index
    over = held.participation_state is not ParticipationState.APPROVED
    if of.phase is RoundPhase.COLLECTING and over and task.state is not TaskState.SUBMITTED:  # what is in stays in
        raise GrantWithdrawn(held.participation_state.value)
    _require_task(task, fence)
    if STEPS.index(step) > STEPS.index(attempt.step):
        raise StepMessageInvalid(AHEAD.format(step=step.value, at=attempt.step.value))
    for former, stayed in ((Step.KEYS, attempt.keyed), (Step.SHARES, attempt.shared), (Step.UPDATE, attempt.survivors)):
        if stayed is not None and index not in stayed:
            raise StepClosed(f"The step {former.value} closed without this participation: its message had not come.")


def _require_task(task: Task, fence: int) -> None:
    if task.fence != fence:
        raise LeaseLost
    if task.state is TaskState.OFFERED:
        raise TaskNotClaimed
    if task.state is TaskState.EXPIRED:
        raise StepClosed(task.detail or "The step closed without this participation.")
    if task.state not in (*OPEN_TASKS, TaskState.SUBMITTED):
        raise TaskNotOpen(f"The task is {task.state}: {task.detail or 'it ended before'}.")


async def _without_attempt(session: AsyncSession, task_id: UUID, worker_id: UUID, fence: int, step: Step) -> Taken:
    """Why a task has no attempt to send anything to. A round that was summed needs no more answers: that is no error.

    Raises:
        NotFound, InvalidRequest, JobNotRunning, LeaseLost, TaskNotClaimed, TaskNotOpen, StepClosed.
    """
    held = await hold_task(session, task_id, worker_id, "accept")
    if not is_secured(held.job, held.task.kind):
        raise InvalidRequest("The task is not of a round under secure aggregation: it has no steps. Hand it in.")
    if held.job.state in (JobState.FAILED, JobState.CANCELLED):
        raise JobNotRunning(f"The job is {held.job.state}: {held.job.detail or 'it takes nothing any more'}.")
    _require_task(held.task, fence)
    if step is Step.UNMASK and held.of.phase is RoundPhase.COMPLETED:
        return Taken(held.of.id, closed=True)
    raise StepClosed(f"The round is {held.of.phase.value}: nothing is taken or told of its steps any more.")


async def _check(session: AsyncSession, held: HeldMember, step: Step, message: bytes) -> None:
    """Refuse what the others could not take.

    Raises:
        StepMessageInvalid: says what is wrong with it.
    """
    attempt, member = held.attempt, held.member
    try:
        if step is Step.KEYS:
            check_keys(attempt.context, member.index, member.identity, message)
            if await session.scalar(_TAKEN_KEYS, {"round_id": held.of.id, "message": message}):
                raise MessageInvalid("A public key comes twice; each has to be fresh.")
        elif step is Step.SHARES:
            check_shares(message, len(attempt.keyed or ()))
        elif step is Step.SURVIVORS:
            check_confirmation(attempt.context, attempt.survivors or (), member.identity, message)
        else:
            check_reveal(message, attempt.shared or (), attempt.survivors or ())
    except MessageInvalid as error:
        raise StepMessageInvalid(str(error)) from error


_CHANNEL, _MASK = (5, 32), (37, 32)  # where Postgres finds the two public keys of a keys message
_MESSAGE: Final = bindparam("message", type_=LargeBinary())
_OWN: Final = [func.substr(_MESSAGE, *place) for place in (_CHANNEL, _MASK)]
_TAKEN_KEYS: Final = select(
    select(SecuredMember.index)
    .where(
        SecuredMember.round_id == bindparam("round_id"),
        or_(*(func.substr(SecuredMember.keys, *place).in_(_OWN) for place in (_CHANNEL, _MASK))),
    )
    .exists()
)


@dataclass(frozen=True, slots=True)
class _Looked:
    """What an answer is made of."""

    round_id: UUID
    step: Step
    index: int
    keyed: list[int] | None
    shared: list[int] | None
    survivors: list[int] | None
    signed: list[int] | None


async def find_answer(session: AsyncSession, task_id: UUID, worker_id: UUID, fence: int, step: Step) -> bytes | None:
    """What the closing of a step gives to a member whose message is in; None while it is open. Locks nothing.

    Raises:
        NotFound, LeaseLost, TaskNotOpen, JobNotRunning, StepClosed: as `take_message`; there will be no answer.
    """
    if step is Step.UNMASK:
        return b""
    found = await session.execute(_LOOK, {"task_id": task_id, "worker_id": worker_id})
    row = found.one_or_none()
    if row is None:
        await _without_attempt(session, task_id, worker_id, fence, step)
        return None
    state, now_fence, detail, *rest = row
    looked = _Looked(*rest)
    if now_fence != fence:
        raise LeaseLost
    if STEPS.index(looked.step) <= STEPS.index(step):
        if state is TaskState.EXPIRED:
            raise StepClosed(detail or "The step closed without this participation.")
        if state not in (*OPEN_TASKS, TaskState.SUBMITTED):
            raise TaskNotOpen(f"The task is {state}: {detail or 'it ended before'}.")
        return None
    stayed = {Step.KEYS: looked.keyed, Step.SHARES: looked.shared}.get(step, looked.survivors)
    if stayed is None or looked.index not in stayed:
        raise StepClosed(f"The step {step.value} closed without this participation.")
    return await _answer(session, looked, step)


_LOOK: Final = (
    select(
        Task.state,
        Task.fence,
        Task.detail,
        SecuredAttempt.round_id,
        SecuredAttempt.step,
        SecuredMember.index,
        SecuredAttempt.keyed,
        SecuredAttempt.shared,
        SecuredAttempt.survivors,
        SecuredAttempt.signed,
    )
    .join(SecuredMember, SecuredMember.task_id == Task.id)
    .join(SecuredAttempt, SecuredAttempt.round_id == SecuredMember.round_id)
    .where(Task.id == bindparam("task_id"), Task.worker_id == bindparam("worker_id"))
)


async def _answer(session: AsyncSession, looked: _Looked, step: Step) -> bytes | None:
    """The answer's bytes; None where a new attempt has begun meanwhile."""
    if step is Step.KEYS:
        return await session.scalar(_KEYS_ANSWER, {"round_id": looked.round_id, "chosen": looked.keyed})
    if step is Step.SHARES:
        assert looked.keyed is not None, "the step before has closed"
        assert looked.shared is not None, "it has closed"
        place = looked.keyed.index(looked.index)
        told = {"round_id": looked.round_id, "chosen": looked.shared, "own": looked.index, "place": place}
        sealed = await session.scalar(_SEALED, told)
        return None if sealed is None else survivors_answer(looked.shared) + sealed
    assert looked.survivors is not None, "the set is frozen"
    if step is Step.UPDATE:
        return survivors_answer(looked.survivors)
    found = await session.execute(_SIGNATURES, {"round_id": looked.round_id, "chosen": looked.signed})
    signatures = {index: signature for index, signature in found if signature is not None}
    return confirmations_answer(signatures) if signatures else None


_CHOSEN: Final = SecuredMember.index == func.any(bindparam("chosen", type_=ARRAY(Integer)))
_MEMBERS: Final = (SecuredMember.round_id == bindparam("round_id"), _CHOSEN)
_KEYS: Final = (
    select(func.string_agg(SecuredMember.keys, aggregate_order_by(func.decode("", "hex"), SecuredMember.index)))
    .where(*_MEMBERS)
    .scalar_subquery()
)
_COUNT: Final = func.int4send(func.cardinality(bindparam("chosen", type_=ARRAY(Integer))))
_ROSTER: Final = func.int4send(func.length(SecuredAttempt.roster)).op("||")(SecuredAttempt.roster)
_KEYS_ANSWER: Final = select(type_coerce(_ROSTER.op("||")(_COUNT).op("||")(_KEYS), LargeBinary())).where(
    SecuredAttempt.round_id == bindparam("round_id")
)
# A sender's message has a part for each other keyed member, in their order, and none for itself.
_BEFORE: Final = bindparam("place", type_=Integer()) - case((SecuredMember.index < bindparam("own"), 1), else_=0)
_SEALED: Final = select(
    func.string_agg(
        func.substr(SecuredMember.shares, 1 + SEALED_BYTES * _BEFORE, SEALED_BYTES),
        aggregate_order_by(func.decode("", "hex"), SecuredMember.index),
    )
).where(*_MEMBERS, SecuredMember.index != bindparam("own"))
_SIGNATURES: Final = select(SecuredMember.index, SecuredMember.signature).where(*_MEMBERS)
