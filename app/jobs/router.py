"""A researcher's side: draft a job, give it a model, start it, watch it, end it, take the model."""

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials

from app.audit.queries import list_events, page_events
from app.audit.service import job_stream
from app.blobs import checkpoint_key
from app.dependencies import (
    BriefJobReader,
    BriefJobWriter,
    Credentials,
    JobReader,
    JobWriter,
    Parts,
    PartsOf,
    Repeatable,
    Transaction,
    authenticate,
    check_scope,
)
from app.errors import (
    BodyTooLarge,
    InvalidRequest,
    LengthRequired,
    PlatformError,
    RangeNotSatisfiable,
    UnsupportedMediaType,
)
from app.federation.lifecycle import ENDED_JOBS
from app.jobs import privacy, queries, service
from app.jobs.initial_model import ModelInspector
from app.jobs.privacy_page import CONTENT_SECURITY_POLICY, HTML_MEDIA_TYPE, page_of
from app.models import Job
from app.pagination import Page as Paging
from app.participations.queries import page_participations
from app.problems import refuses
from isthmus.wire.base import Digest, Page, format_repr_digest, parse_repr_digest
from isthmus.wire.events import EventView
from isthmus.wire.jobs import CancelJob, CreateJob, JobState, JobView, ParticipationView
from isthmus.wire.organizations import Scope
from isthmus.wire.privacy import PrivacyReport
from isthmus.wire.problems import ProblemCode
from isthmus.wire.rounds import CheckpointView, RoundMetrics, RoundView
from isthmus.wire.version import DIGEST_HEADER, EVENTS_MEDIA_TYPE, TENSORS_MEDIA_TYPE

jobs = APIRouter(tags=["jobs"])
checkpoints = APIRouter(tags=["checkpoints"])

KEEP_ALIVE_S = 15.0
LARGEST = 2**31 - 1
"""Of the numbers that rounds and events have in the database."""

_TENSORS: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {TENSORS_MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}},
        "description": "The model as safetensors; `ETag` is its digest, and ranges are served.",
    }
}


@jobs.post(
    "/jobs",
    status_code=201,
    summary="Draft a job",
    responses=refuses(ProblemCode.IDEMPOTENCY_CONFLICT, ProblemCode.BODY_TOO_LARGE),
)
async def create_job(body: CreateJob, caller: JobWriter, session: Transaction, once: Repeatable) -> JobView:
    """Draft a federated training job. Upload its initial model and start it to set it going."""

    async def act() -> JobView:
        return await queries.get_job_view(session, caller, await service.create_job(session, caller, body.spec))

    return await once(JobView, body, act)


@jobs.get("/jobs", summary="Jobs", responses=refuses(ProblemCode.CURSOR_INVALID))
async def list_jobs(
    caller: JobReader,
    session: Transaction,
    paging: Paging,
    state: Annotated[JobState | None, Query(description="Only those in this state.")] = None,
) -> Page[JobView]:
    """Your jobs, or those that ask for your organization's datasets; the newest first."""
    return await queries.page_jobs(session, caller, paging, state=state)


@jobs.get("/jobs/{job_id}", summary="One job", responses=refuses(ProblemCode.NOT_FOUND))
async def get_job(job_id: UUID, caller: JobReader, session: Transaction) -> JobView:
    """A job, where it stands, and why."""
    return await queries.get_job_view(session, caller, job_id)


@jobs.put(
    "/jobs/{job_id}/model",
    summary="Upload the initial model",
    responses=refuses(
        ProblemCode.NOT_FOUND,
        ProblemCode.JOB_NOT_DRAFT,
        ProblemCode.LENGTH_REQUIRED,
        ProblemCode.BODY_TOO_LARGE,
        ProblemCode.UNSUPPORTED_MEDIA_TYPE,
        ProblemCode.NOT_SAFETENSORS,
        ProblemCode.TENSORS_MISMATCH,
        ProblemCode.NON_FINITE,
        ProblemCode.DIGEST_MISMATCH,
        ProblemCode.LENGTH_MISMATCH,
    ),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {TENSORS_MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
async def put_model(
    job_id: UUID,
    request: Request,
    parts: PartsOf,
    caller: BriefJobWriter,
    digest: Annotated[
        str, Header(alias=DIGEST_HEADER, max_length=500, description="`sha-256=:<base64>:` of the whole body.")
    ],
) -> JobView:
    """Give a draft the model that round 1 starts from; it is checked against the job's layers as it arrives."""
    length = _declared_length(request, parts.settings.max_model_bytes)
    try:
        expected = parse_repr_digest(digest)
    except ValueError as error:
        raise InvalidRequest(f"{DIGEST_HEADER}: {error}.") from error
    async with parts.single_statements() as session:
        inspector = ModelInspector(await service.require_draft(session, caller, job_id), length)
    stored = await parts.blobs.receive(
        checkpoint_key(expected), request.stream(), length=length, digest=expected, inspector=inspector
    )
    assert inspector.manifest is not None  # a body without a header was refused
    async with parts.sessions.begin() as session:
        await service.set_model(session, caller, job_id, stored, inspector.manifest)
        return await queries.get_job_view(session, caller, job_id)


def _declared_length(request: Request, largest: int) -> int:
    length = request.headers.get("content-length")
    if length is None or not re.fullmatch("[0-9]{1,20}", length):
        raise LengthRequired("State the model's length in Content-Length.")
    if int(length) > largest:
        raise BodyTooLarge(f"A model has at most {largest} bytes here; {length} were declared.")
    media_type = request.headers.get("content-type", "").partition(";")[0].strip()
    if media_type != TENSORS_MEDIA_TYPE:
        raise UnsupportedMediaType(f"Models are {TENSORS_MEDIA_TYPE}; this is {media_type or 'of no stated type'}.")
    return int(length)


@jobs.get(
    "/jobs/{job_id}/model",
    summary="Download the newest model",
    response_class=FileResponse,
    responses={**_TENSORS, **refuses(ProblemCode.NOT_FOUND, ProblemCode.RANGE_NOT_SATISFIABLE)},
)
async def get_model(job_id: UUID, request: Request, parts: PartsOf, caller: BriefJobReader) -> Response:
    """The newest checkpoint of a job: the final model, once it has completed."""
    async with parts.single_statements() as session:
        digest = await queries.get_model_digest(session, caller, job_id)
    return await _checkpoint(parts, request, digest, immutable=False)


@checkpoints.get(
    "/checkpoints/{digest}",
    summary="Download a checkpoint",
    response_class=FileResponse,
    responses={**_TENSORS, **refuses(ProblemCode.NOT_FOUND, ProblemCode.RANGE_NOT_SATISFIABLE)},
)
async def get_checkpoint(digest: Digest, request: Request, parts: PartsOf, credentials: Credentials) -> Response:
    """A model by its digest. The bytes behind a digest never change, so keep them as long as you like."""
    async with parts.single_statements() as session:
        caller = check_scope(await authenticate(session, credentials), Scope.JOBS_READ, Scope.TASKS)
        await queries.require_checkpoint(session, caller, digest)
    return await _checkpoint(parts, request, digest, immutable=True)


async def _checkpoint(parts: Parts, request: Request, digest: str, *, immutable: bool) -> Response:
    headers = {
        "ETag": f'"{digest}"',
        DIGEST_HEADER: format_repr_digest(digest),
        "Cache-Control": "private, max-age=31536000, immutable" if immutable else "private, no-cache",
    }
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    path = await parts.blobs.open_path(checkpoint_key(digest))
    size = path.stat().st_size
    asked = re.fullmatch(r"bytes=(\d{1,18})-(\d{0,18})", request.headers.get("range", ""))
    first, last = (0, "") if asked is None else (int(asked[1]), asked[2])
    if (
        asked is None
        or request.headers.get("if-range", headers["ETag"]) != headers["ETag"]
        or int(last or first) < first
    ):
        # RFC 9110, 14.2: a range that we do not serve is not there. FileResponse would refuse some in plain text.
        request.scope["headers"] = [item for item in request.scope["headers"] if item[0] != b"range"]
    elif first >= size:
        raise RangeNotSatisfiable(f"The checkpoint has {size} bytes; the range begins at {first}.")
    return _ModelResponse(path, media_type=TENSORS_MEDIA_TYPE, headers=headers)


class _ModelResponse(FileResponse):
    """A file in pieces of a quarter of a megabyte: a thread is asked for each, and a slow reader holds about four."""

    chunk_size = 1 << 18


@jobs.post(
    "/jobs/{job_id}/start",
    summary="Start a job",
    responses=refuses(
        ProblemCode.NOT_FOUND, ProblemCode.STATE_CONFLICT, ProblemCode.MODEL_MISSING, ProblemCode.NO_MATCHING_DATASET
    ),
)
async def start(job_id: UUID, caller: JobWriter, session: Transaction) -> JobView:
    """Ask the stewards of every dataset that fits; rounds begin once `min_updates` of them have said yes."""
    await service.start(session, caller, job_id)
    return await queries.get_job_view(session, caller, job_id)


@jobs.post(
    "/jobs/{job_id}/pause",
    summary="Pause a job",
    responses=refuses(ProblemCode.NOT_FOUND, ProblemCode.STATE_CONFLICT),
)
async def pause(job_id: UUID, caller: JobWriter, session: Transaction) -> JobView:
    """Offer nothing new. What was claimed may finish, and the round may complete; deadlines stand still."""
    await service.pause(session, caller, job_id)
    return await queries.get_job_view(session, caller, job_id)


@jobs.post(
    "/jobs/{job_id}/resume",
    summary="Resume a job",
    responses=refuses(ProblemCode.NOT_FOUND, ProblemCode.STATE_CONFLICT),
)
async def resume(job_id: UUID, parts: PartsOf, caller: JobWriter, session: Transaction) -> JobView:
    """Go on where the job was paused."""
    await service.resume(session, parts.queue, caller, job_id)
    return await queries.get_job_view(session, caller, job_id)


@jobs.post(
    "/jobs/{job_id}/cancel",
    summary="Cancel a job",
    responses=refuses(ProblemCode.NOT_FOUND, ProblemCode.STATE_CONFLICT),
)
async def cancel(job_id: UUID, body: CancelJob, caller: JobWriter, session: Transaction) -> JobView:
    """End a job at any moment. Its checkpoints stay; what its workers do is called off."""
    await service.cancel(session, caller, job_id, body.note)
    return await queries.get_job_view(session, caller, job_id)


@jobs.get(
    "/jobs/{job_id}/participations",
    summary="Who takes part",
    responses=refuses(ProblemCode.NOT_FOUND, ProblemCode.CURSOR_INVALID),
)
async def list_participations(
    job_id: UUID, caller: JobReader, session: Transaction, paging: Paging
) -> Page[ParticipationView]:
    """The datasets that were asked, what their stewards said, and their grants."""
    await queries.require_visible(session, caller, job_id)
    return await page_participations(session, caller, paging, job_id=job_id)


@jobs.get(
    "/jobs/{job_id}/rounds",
    summary="Rounds",
    responses=refuses(ProblemCode.NOT_FOUND, ProblemCode.CURSOR_INVALID),
)
async def list_rounds(job_id: UUID, caller: JobReader, session: Transaction, paging: Paging) -> Page[RoundView]:
    """The job's rounds with their tasks and updates: who is in, who is missing, and why.

    Of tasks and updates a steward sees its own organization's part.
    """
    await queries.require_visible(session, caller, job_id)
    return await queries.page_rounds(session, caller, job_id, paging)


@jobs.get("/jobs/{job_id}/rounds/{number}", summary="One round", responses=refuses(ProblemCode.NOT_FOUND))
async def get_round(
    job_id: UUID, number: Annotated[int, Path(ge=0, le=LARGEST)], caller: JobReader, session: Transaction
) -> RoundView:
    """One round by its number: 0 gathers statistics, 1 to `rounds` train, one more evaluates the final model."""
    await queries.require_visible(session, caller, job_id)
    return await queries.get_round_view(session, caller, job_id, number)


@jobs.get(
    "/jobs/{job_id}/metrics",
    summary="Metrics",
    responses=refuses(ProblemCode.NOT_FOUND, ProblemCode.CURSOR_INVALID),
)
async def list_metrics(job_id: UUID, caller: JobReader, session: Transaction, paging: Paging) -> Page[RoundMetrics]:
    """What every round measured, over all sites and at each, as far as the job's evaluation releases it.

    Of the sites a steward sees its own organization's part.
    """
    await queries.require_visible(session, caller, job_id)
    return await queries.page_metrics(session, caller, job_id, paging)


@jobs.get(
    "/jobs/{job_id}/checkpoints",
    summary="Checkpoints",
    responses=refuses(ProblemCode.NOT_FOUND, ProblemCode.CURSOR_INVALID),
)
async def list_checkpoints(
    job_id: UUID, caller: JobReader, session: Transaction, paging: Paging
) -> Page[CheckpointView]:
    """The model after every round, by digest; round 0 is the initial one."""
    await queries.require_open(session, caller, job_id)
    return await queries.page_checkpoints(session, job_id, paging)


@jobs.get(
    "/jobs/{job_id}/events",
    summary="What happened",
    response_model=Page[EventView],
    responses={
        200: {
            "content": {EVENTS_MEDIA_TYPE: {"schema": {"type": "string"}}},
            "description": "A page of events; for `Accept: text/event-stream` a stream of them until the job ends.",
        },
        **refuses(ProblemCode.NOT_FOUND, ProblemCode.CURSOR_INVALID),
    },
)
async def list_events_of_job(
    job_id: UUID,
    request: Request,
    parts: PartsOf,
    caller: BriefJobReader,
    credentials: Credentials,
    paging: Paging,
    after: Annotated[int, Query(ge=0, le=LARGEST, description="Only events after this number.")] = 0,
    last_event_id: Annotated[int | None, Header(ge=0, le=LARGEST, description="Where a broken stream goes on.")] = None,
) -> Page[EventView] | Response:
    """The job's hash-chained events, as a page or as server-sent events."""
    since = last_event_id if last_event_id is not None else after
    async with parts.single_statements() as session:
        await queries.require_open(session, caller, job_id)
        if EVENTS_MEDIA_TYPE not in request.headers.get("accept", ""):
            return await page_events(session, job_stream(job_id), paging, after=since)
    return StreamingResponse(
        _stream(parts, credentials, job_id, since),
        media_type=EVENTS_MEDIA_TYPE,
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def _stream(
    parts: Parts, credentials: HTTPAuthorizationCredentials | None, job_id: UUID, after: int
) -> AsyncIterator[bytes]:
    """Events as they come, as long as the key is good; the stream waits without a connection to the database."""
    async with parts.wakeups.job(job_id) as woken:
        while True:
            woken.clear()
            async with parts.sessions.begin() as session:
                try:
                    caller = await authenticate(session, credentials)
                    await queries.require_open(session, caller, job_id)
                except PlatformError:
                    return
                job = await session.get_one(Job, job_id)
                ended = job.state in ENDED_JOBS  # read before the events: the last one is not missed
                events = await list_events(session, job_stream(job_id), after=after)
            for event in events:
                after = event.sequence
                yield f"id: {event.sequence}\nevent: {event.kind}\ndata: {event.model_dump_json()}\n\n".encode()
            if events:
                continue
            if ended or parts.wakeups.closing:
                return
            try:
                await asyncio.wait_for(woken.wait(), KEEP_ALIVE_S)
            except TimeoutError:
                yield b": still here\n\n"


@jobs.get(
    "/jobs/{job_id}/privacy",
    summary="Privacy report",
    response_model=PrivacyReport,
    responses={
        200: {
            "content": {HTML_MEDIA_TYPE: {"schema": {"type": "string"}}},
            "description": "The report; for `Accept: text/html` as a page to read and to print.",
        },
        **refuses(ProblemCode.NOT_FOUND),
    },
)
async def get_privacy(
    job_id: UUID, request: Request, parts: PartsOf, caller: BriefJobReader
) -> PrivacyReport | Response:
    """What a job promises about the records behind it, by which mechanism, what was spent, and what is not protected.

    Of the datasets a steward sees its own organization's. Figures by another accountant may be missing at first: they
    take a while.
    """
    async with parts.single_statements() as session:
        records = await privacy.read_records(session, caller, job_id)
    report = await privacy.report_of(records)
    headers = {"Cache-Control": "private, no-cache", "Vary": "Accept"}
    if HTML_MEDIA_TYPE in request.headers.get("accept", ""):
        headers["Content-Security-Policy"] = CONTENT_SECURITY_POLICY
        return HTMLResponse(page_of(report), headers=headers)
    return Response(report.model_dump_json(), media_type="application/json", headers=headers)


router = APIRouter()
router.include_router(jobs)
router.include_router(checkpoints)
