"""Addresses of workers."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Body, status

from app.dependencies import DatasetReader, DatasetWriter, PartsOf, Transaction
from app.pagination import Page as Paging
from app.problems import refuses
from app.workers import queries, service
from isthmus.wire.base import Page
from isthmus.wire.problems import ProblemCode
from isthmus.wire.workers import EnrollWorker, WorkerEnrolled, WorkerView

router = APIRouter(prefix="/workers", tags=["workers"])

Introduction = Annotated[
    EnrollWorker,
    Body(
        openapi_examples={
            "an agent": {
                "value": {
                    "token": "iet_<secret>",
                    "name": "agent-1",
                    "public_key": "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
                    "version": "0.1.0",
                }
            }
        }
    ),
]


@router.post(
    "",
    status_code=status.HTTP_201_CREATED,
    summary="Enrol a worker",
    responses=refuses(ProblemCode.ENROLLMENT_REFUSED, ProblemCode.NAME_TAKEN, ProblemCode.STATE_CONFLICT),
)
async def enroll_worker(body: Introduction, session: Transaction, parts: PartsOf) -> WorkerEnrolled:
    """Enrol with a one-time token instead of a key; the worker's own key is shown only here."""
    return await service.enroll_worker(session, body, service_public_key=parts.signer.public_key)


@router.get("", summary="List workers", responses=refuses(ProblemCode.CURSOR_INVALID))
async def list_workers(caller: DatasetReader, session: Transaction, paging: Paging) -> Page[WorkerView]:
    """List the workers of the caller's organization; an admin sees all."""
    return await queries.page_workers(session, paging, caller=caller)


@router.get("/{worker_id}", summary="Read a worker", responses=refuses(ProblemCode.NOT_FOUND))
async def get_worker(worker_id: UUID, caller: DatasetReader, session: Transaction) -> WorkerView:
    """Read one worker of the caller's organization."""
    worker, organization = await queries.get_worker(session, worker_id, caller=caller)
    return queries.view_of(worker, organization)


@router.post("/{worker_id}/revoke", summary="Revoke a worker", responses=refuses(ProblemCode.NOT_FOUND))
async def revoke_worker(worker_id: UUID, caller: DatasetWriter, session: Transaction) -> WorkerView:
    """End a worker and its keys for good; another worker of the organization may then announce its datasets."""
    return await service.revoke_worker(session, worker_id, caller=caller)
