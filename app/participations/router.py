"""A steward's side of jobs: see what is asked, grant it, refuse it, take it back."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query

from app.dependencies import AnyCaller, BriefGrantWriter, GrantWriter, PartsOf, Transaction, check_scope
from app.pagination import Page as Paging
from app.participations import queries, service
from app.problems import refuses
from isthmus.wire.base import Page
from isthmus.wire.jobs import (
    ApproveParticipation,
    ParticipationState,
    ParticipationView,
    RejectParticipation,
    WithdrawParticipation,
)
from isthmus.wire.organizations import Scope
from isthmus.wire.problems import ProblemCode

router = APIRouter(prefix="/participations", tags=["participations"])


@router.get("", summary="Participations", responses=refuses(ProblemCode.CURSOR_INVALID))
async def list_participations(
    caller: AnyCaller,
    session: Transaction,
    paging: Paging,
    job_id: Annotated[UUID | None, Query(description="Only of this job.")] = None,
    state: Annotated[ParticipationState | None, Query(description="Only those in this state.")] = None,
) -> Page[ParticipationView]:
    """What is asked of the datasets of your organization, or of your own jobs."""
    check_scope(caller, Scope.DATASETS_READ, Scope.JOBS_READ)
    return await queries.page_participations(session, caller, paging, job_id=job_id, state=state)


@router.get("/{participation_id}", summary="One participation", responses=refuses(ProblemCode.NOT_FOUND))
async def get_participation(participation_id: UUID, caller: AnyCaller, session: Transaction) -> ParticipationView:
    """One dataset's part in one job, with its grant."""
    check_scope(caller, Scope.DATASETS_READ, Scope.JOBS_READ)
    return await queries.get_participation_view(session, caller, participation_id)


@router.post(
    "/{participation_id}/approve",
    summary="Grant a participation",
    responses=refuses(
        ProblemCode.NOT_FOUND,
        ProblemCode.STATE_CONFLICT,
        ProblemCode.GRANT_REFUSED_BY_POLICY,
        ProblemCode.PRIVACY_IMPOSSIBLE,
        ProblemCode.BUDGET_EXHAUSTED,
    ),
)
async def approve(
    participation_id: UUID, body: ApproveParticipation, caller: GrantWriter, session: Transaction
) -> ParticipationView:
    """Say yes: for the job's purpose, until a time, for a number of rounds. The job starts once enough did.

    What the grant can cost at most is reserved on the dataset's privacy budget at once, or it is refused."""
    await service.approve(session, caller, participation_id, body)
    return await queries.get_participation_view(session, caller, participation_id)


@router.post(
    "/{participation_id}/reject",
    summary="Refuse a participation",
    responses=refuses(ProblemCode.NOT_FOUND, ProblemCode.STATE_CONFLICT),
)
async def reject(
    participation_id: UUID, body: RejectParticipation, caller: GrantWriter, session: Transaction
) -> ParticipationView:
    """Say no, and why; the researcher sees the note."""
    await service.reject(session, caller, participation_id, body.note)
    return await queries.get_participation_view(session, caller, participation_id)


@router.post(
    "/{participation_id}/withdraw",
    summary="Take a grant back",
    responses=refuses(ProblemCode.NOT_FOUND, ProblemCode.STATE_CONFLICT),
)
async def withdraw(
    participation_id: UUID, body: WithdrawParticipation, parts: PartsOf, caller: BriefGrantWriter
) -> ParticipationView:
    """Take a grant back, in the middle of a round if need be: an update that is not summed yet leaves the set."""
    async with parts.sessions.begin() as session:
        deleted = await service.withdraw(session, parts.queue, caller, participation_id, body.note)
    await service.delete_blobs(parts.blobs, deleted)
    async with parts.single_statements() as session:
        return await queries.get_participation_view(session, caller, participation_id)
