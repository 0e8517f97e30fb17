"""A worker's side of the rounds: claim, heartbeat, hand in, refuse, fail."""

import asyncio
import re
import time
from collections.abc import AsyncIterator
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Header, Query, Request, Response

from app.blobs import update_key
from app.dependencies import (
    Agent,
    Caller,
    Credentials,
    Parts,
    PartsOf,
    Transaction,
    authenticate,
    authenticate_asking,
    check_scope,
)
from app.errors import BodyTooLarge, Forbidden, InvalidRequest, LengthRequired, NormTooLarge, UnsupportedMediaType
from app.problems import refuses
from app.rounds import offers, queries, uploads
from app.rounds.secured import steps
from isthmus.codec.errors import CodecError
from isthmus.wire.base import parse_repr_digest
from isthmus.wire.organizations import Scope
from isthmus.wire.problems import ProblemCode
from isthmus.wire.rounds import (
    ClaimTask,
    FailTask,
    Heartbeat,
    HeartbeatReceipt,
    RefuseTask,
    TaskOffer,
    TaskState,
    TaskView,
    UpdateReceipt,
)
from isthmus.wire.secured import Step
from isthmus.wire.version import DIGEST_HEADER, FENCE_HEADER, SECAGG_MEDIA_TYPE, TENSORS_MEDIA_TYPE

router = APIRouter(prefix="/tasks", tags=["tasks"])

_LOST = (ProblemCode.NOT_FOUND, ProblemCode.LEASE_LOST, ProblemCode.TASK_NOT_CLAIMED, ProblemCode.TASK_NOT_OPEN)


def worker_of(caller: Caller) -> UUID:
    """The worker whose key this is.

    Raises:
        Forbidden: it is nobody's of that kind.
    """
    if caller.worker_id is None:
        raise Forbidden("Only a worker's key may do that: enrol one with a one-time token.")
    return caller.worker_id


async def _upload_headers(
    request: Request,
    fence: Annotated[int, Header(alias=FENCE_HEADER, ge=1, description="The fence of the claim.")],
    digest: Annotated[
        str, Header(alias=DIGEST_HEADER, max_length=500, description="`sha-256=:<base64>:` of the whole body.")
    ],
) -> uploads.UploadHeaders:
    length = request.headers.get("content-length")
    if length is None or not re.fullmatch("[0-9]{1,20}", length):
        raise LengthRequired("State the body's length in Content-Length: updates are admitted before they are read.")
    media_type = request.headers.get("content-type", "").partition(";")[0].strip()
    if media_type != TENSORS_MEDIA_TYPE:
        raise UnsupportedMediaType(f"Updates are {TENSORS_MEDIA_TYPE}; this is {media_type or 'of no stated type'}.")
    try:
        return uploads.UploadHeaders(length=int(length), digest=parse_repr_digest(digest), fence=fence)
    except ValueError as error:
        raise InvalidRequest(f"{DIGEST_HEADER}: {error}.") from error


@router.post(
    "/claim",
    summary="Ask for work",
    response_model=TaskOffer,
    responses={204: {"description": "Nothing is on offer; ask again after `Retry-After` seconds."}, **refuses()},
)
async def claim(
    body: ClaimTask,
    parts: PartsOf,
    credentials: Credentials,
    request: Request,
    wait: Annotated[float, Query(ge=0, le=300, description="Seconds to wait for work before answering 204.")] = 0,
) -> Response:
    """Get the oldest task on offer, under a lease; waits for one to come, without holding a database connection."""
    ends = time.monotonic() + min(wait, parts.settings.longest_wait.total_seconds())
    heard = parts.wakeups.heard  # before the first look: no offer is missed
    worker_id, offered = await _look(parts, credentials)
    with parts.wakeups.worker(worker_id, heard) as woken:
        if offered:
            woken.set()
        async for _ in _wakings(parts, woken, ends):
            if await request.is_disconnected():  # an agent that is gone must not take a task along
                return Response(status_code=204)
            offer = await _try_claim(parts, worker_id, body)
            if offer is not None:
                return Response(offer.model_dump_json(by_alias=True), media_type="application/json")
    return _nothing_yet(parts, 204, wait)


async def _wakings(parts: Parts, woken: asyncio.Event, ends: float) -> AsyncIterator[None]:
    """Every moment at which who waits should look, until `ends` by the monotonic clock, or the process ends."""
    while not parts.wakeups.closing or woken.is_set():
        try:
            async with asyncio.timeout(ends - time.monotonic()):
                await woken.wait()
        except TimeoutError:
            if parts.wakeups.connected.is_set():
                return  # whoever waited all the time looks again first of all when it comes back
        woken.clear()
        yield
        if time.monotonic() >= ends:
            return


def _nothing_yet(parts: Parts, status: int, wait: float) -> Response:
    """The answer to who waited in vain. A caller that waits here is paced by its waiting."""
    soon = wait >= 1 and not parts.wakeups.closing
    return Response(status_code=status, headers={"Retry-After": "0" if soon else "1"})


async def _look(parts: Parts, credentials: Credentials) -> tuple[UUID, bool]:
    """Who asks, and whether it is worth while to claim. A function of its own: who waits keeps nothing of it."""
    async with parts.single_statements() as session:
        caller, offered = await authenticate_asking(session, credentials, offers.SOMETHING_ON_OFFER)
    return worker_of(check_scope(caller, Scope.TASKS)), offered


async def _try_claim(parts: Parts, worker_id: UUID, body: ClaimTask) -> TaskOffer | None:
    async with parts.single_statements() as session:
        return await offers.claim_task(session, parts.settings, worker_id, body)


@router.get("/{task_id}", summary="One of the worker's own tasks", responses=refuses(ProblemCode.NOT_FOUND))
async def get_task(task_id: UUID, caller: Agent, session: Transaction) -> TaskView:
    """Where a task stands, and why."""
    return await queries.get_task_view(session, task_id, worker_of(caller))


@router.post("/{task_id}/heartbeat", summary="Keep the lease", responses=refuses(ProblemCode.NOT_FOUND))
async def heartbeat(
    task_id: UUID, body: Heartbeat, parts: PartsOf, caller: Agent, session: Transaction
) -> HeartbeatReceipt:
    """Say that the training process of this task is alive; learn whether the work is still wanted."""
    return await offers.renew_lease(session, parts.settings, task_id, worker_of(caller), body.fence)


@router.put(
    "/{task_id}/update",
    summary="Hand in an update",
    response_model=UpdateReceipt,
    responses=refuses(
        *_LOST,
        ProblemCode.JOB_NOT_RUNNING,
        ProblemCode.ROUND_NOT_COLLECTING,
        ProblemCode.GRANT_WITHDRAWN,
        ProblemCode.BUDGET_EXHAUSTED,
        ProblemCode.DATASET_NOT_CONFIRMED,
        ProblemCode.UPDATE_CONFLICT,
        ProblemCode.STEP_CLOSED,
        ProblemCode.MESSAGE_INVALID,
        ProblemCode.LENGTH_REQUIRED,
        ProblemCode.BODY_TOO_LARGE,
        ProblemCode.UNSUPPORTED_MEDIA_TYPE,
        ProblemCode.LENGTH_MISMATCH,
        ProblemCode.DIGEST_MISMATCH,
        ProblemCode.NOT_SAFETENSORS,
        ProblemCode.TENSORS_MISMATCH,
        ProblemCode.NON_FINITE,
        ProblemCode.NORM_TOO_LARGE,
    ),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {TENSORS_MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
async def submit_update(
    task_id: UUID,
    headers: Annotated[uploads.UploadHeaders, Depends(_upload_headers)],
    request: Request,
    parts: PartsOf,
    credentials: Credentials,
) -> UpdateReceipt:
    """Hand in a clipped, noised update. It is admitted, and its release recorded, from the headers; send
    `Expect: 100-continue` and the body after the 100. Repeating the call with the same bytes is safe."""
    async with parts.sessions.begin() as session:
        caller = check_scope(await authenticate(session, credentials), Scope.TASKS)
        worker_id = worker_of(caller)
        admission = await uploads.admit_update(
            session, parts.settings, task_id=task_id, worker_id=worker_id, headers=headers
        )
    if isinstance(admission, UpdateReceipt):
        return admission
    inspector = uploads.UpdateInspector(admission, headers.length)
    try:
        stored = await parts.blobs.receive(
            update_key(task_id),
            request.stream(),
            length=headers.length,
            digest=headers.digest,
            inspector=inspector,
            on_progress=_Progress(parts, task_id, headers.fence).note,
        )
    except (CodecError, NormTooLarge, InvalidRequest) as refusal:
        async with parts.sessions.begin() as session:
            await uploads.reject_content(
                session,
                parts.queue,
                task_id=task_id,
                worker_id=worker_id,
                fence=headers.fence,
                refusal=str(refusal),
                actor=caller.name,
            )
        raise
    kept = False
    try:
        async with parts.sessions.begin() as session:
            update, kept = await uploads.accept_update(
                session,
                parts.queue,
                parts.signer,
                task_id=task_id,
                worker_id=worker_id,
                fence=headers.fence,
                stored=stored,
                l2_norm=inspector.scanner.l2_norm,
                released=inspector.released(),
                actor=caller.name,
            )
        return uploads.receipt_of(update)
    finally:
        if not kept:  # refused, or equal bytes were in before: this copy is nobody's
            await parts.blobs.delete(stored.key)


class _Progress:
    """Notes that bytes keep coming, no more often than a heartbeat."""

    def __init__(self, parts: Parts, task_id: UUID, fence: int) -> None:
        self._parts = parts
        self._task_id = task_id
        self._fence = fence
        self._noted = time.monotonic()

    async def note(self) -> None:
        """Called after every piece."""
        if time.monotonic() - self._noted < self._parts.settings.heartbeat.total_seconds():
            return
        self._noted = time.monotonic()
        async with self._parts.sessions.begin() as session:
            await uploads.note_progress(session, self._parts.settings, self._task_id, self._fence)


@router.post(
    "/{task_id}/steps/{step}",
    summary="Send a message of a secured round's step",
    response_class=Response,
    responses={
        200: {
            "content": {SECAGG_MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}},
            "description": "The step has closed: what its closing gives this member.",
        },
        202: {"description": "The message is in and the step still open; call again with the same one."},
        **refuses(
            *_LOST,
            ProblemCode.JOB_NOT_RUNNING,
            ProblemCode.GRANT_WITHDRAWN,
            ProblemCode.STEP_CLOSED,
            ProblemCode.STEP_CONFLICT,
            ProblemCode.MESSAGE_INVALID,
            ProblemCode.BODY_TOO_LARGE,
            ProblemCode.UNSUPPORTED_MEDIA_TYPE,
        ),
    },
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {SECAGG_MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
async def exchange(
    task_id: UUID,
    step: Step,
    fence: Annotated[int, Header(alias=FENCE_HEADER, ge=1, description="The fence of the claim.")],
    parts: PartsOf,
    credentials: Credentials,
    request: Request,
    wait: Annotated[float, Query(ge=0, le=300, description="Seconds to wait for the step to close.")] = 0,
) -> Response:
    """Send this member's message of one of the steps `keys`, `shares`, `update`, `survivors`, `unmask`, in their order,
    and get what the closing of the step gives. Repeating the call with the same message is safe. It waits without
    holding a database connection."""
    ends = time.monotonic() + min(wait, parts.settings.longest_wait.total_seconds())
    heard = parts.wakeups.steps_heard  # before the first look: no closing is missed
    async with parts.single_statements() as session:  # before the body is read
        worker_id = worker_of(check_scope(await authenticate(session, credentials), Scope.TASKS))
    message = await _step_message(request, step)
    async with parts.sessions.begin() as session:
        taken = await steps.take_message(
            session, parts.queue, task_id=task_id, worker_id=worker_id, fence=fence, step=step, message=message
        )
    with parts.wakeups.step(taken.round_id, heard) as woken:
        if taken.closed:
            woken.set()
        async for _ in _wakings(parts, woken, ends):
            async with parts.single_statements() as session:
                answer = await steps.find_answer(session, task_id, worker_id, fence, step)
            if answer is not None:
                return Response(answer, media_type=SECAGG_MEDIA_TYPE)
    return _nothing_yet(parts, 202, wait)


async def _step_message(request: Request, step: Step) -> bytes:
    """The body, no longer than any message of its step.

    Raises:
        UnsupportedMediaType, BodyTooLarge: it is of another kind, or longer.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip()
    if media_type != SECAGG_MEDIA_TYPE:
        raise UnsupportedMediaType(
            f"Messages of steps are {SECAGG_MEDIA_TYPE}; this is {media_type or 'of no stated type'}."
        )
    message = bytearray()
    async for chunk in request.stream():
        message += chunk
        if len(message) > steps.LARGEST[step]:
            raise BodyTooLarge(f"A message of step {step.value} has at most {steps.LARGEST[step]} bytes.")
    return bytes(message)


@router.post("/{task_id}/refuse", summary="Say no to a task", responses=refuses(*_LOST))
async def refuse(task_id: UUID, body: RefuseTask, parts: PartsOf, caller: Agent, session: Transaction) -> TaskView:
    """The worker's own policy, ledger or data says no. Final for this round; the reason is shown to the job's owner."""
    return await _end(session, parts, caller, task_id, body.fence, TaskState.REFUSED, body.reason)


@router.post("/{task_id}/fail", summary="Give a task up", responses=refuses(*_LOST))
async def fail(task_id: UUID, body: FailTask, parts: PartsOf, caller: Agent, session: Transaction) -> TaskView:
    """The work broke. The task may be offered again in the round's next attempt."""
    return await _end(session, parts, caller, task_id, body.fence, TaskState.FAILED, body.reason)


async def _end(
    session: Transaction, parts: Parts, caller: Caller, task_id: UUID, fence: int, state: TaskState, reason: str
) -> TaskView:
    worker_id = worker_of(caller)
    await offers.end_task(
        session,
        parts.queue,
        task_id=task_id,
        worker_id=worker_id,
        fence=fence,
        state=state,
        reason=reason,
        actor=caller.name,
    )
    return await queries.get_task_view(session, task_id, worker_id)
