"""Addresses of organizations and of the tokens with which their workers enrol."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Body, Depends, status

from app.dependencies import Admin, AnyCaller, Caller, Repeatable, Transaction, check_scope
from app.organizations import queries, service
from app.pagination import Page as Paging
from app.problems import refuses
from isthmus.wire.base import Page
from isthmus.wire.organizations import (
    CreateEnrollmentToken,
    CreateOrganization,
    EnrollmentTokenIssued,
    OrganizationView,
    Scope,
)
from isthmus.wire.problems import ProblemCode

router = APIRouter(prefix="/organizations", tags=["organizations"])

NewOrganization = Annotated[
    CreateOrganization,
    Body(
        openapi_examples={
            "a hospital": {"value": {"name": "cleveland", "display_name": "Cleveland Clinic Foundation"}},
        }
    ),
]
NewToken = Annotated[
    CreateEnrollmentToken, Body(openapi_examples={"good for an hour": {"value": {"expires_in_s": 3600}}})
]


def _token_issuer(caller: AnyCaller) -> Caller:
    return check_scope(caller, Scope.PLATFORM, Scope.DATASETS_WRITE)


TokenIssuer = Annotated[Caller, Depends(_token_issuer)]


@router.post(
    "",
    status_code=status.HTTP_201_CREATED,
    summary="Admit an organization",
    responses=refuses(ProblemCode.NAME_TAKEN, ProblemCode.IDEMPOTENCY_CONFLICT),
)
async def create_organization(
    body: NewOrganization, caller: Admin, session: Transaction, once: Repeatable
) -> OrganizationView:
    """Admit a data holder to the platform; its name is never given again."""

    async def create() -> OrganizationView:
        return OrganizationView.model_validate(await service.create_organization(session, body, caller=caller))

    return await once(OrganizationView, body, create)


@router.get("", summary="List organizations", responses=refuses(ProblemCode.CURSOR_INVALID))
async def list_organizations(caller: Admin, session: Transaction, paging: Paging) -> Page[OrganizationView]:
    """List all data holders, the oldest first."""
    return await queries.page_organizations(session, paging)


@router.get("/{organization_id}", summary="Read an organization", responses=refuses(ProblemCode.NOT_FOUND))
async def get_organization(organization_id: UUID, caller: Admin, session: Transaction) -> OrganizationView:
    """Read one data holder."""
    return OrganizationView.model_validate(await queries.get_organization(session, organization_id))


@router.post(
    "/{organization_id}/enrollment-tokens",
    status_code=status.HTTP_201_CREATED,
    summary="Issue an enrolment token",
    responses=refuses(ProblemCode.NOT_FOUND, ProblemCode.IDEMPOTENCY_CONFLICT, ProblemCode.SECRET_SHOWN_ONCE),
)
async def issue_enrollment_token(
    organization_id: UUID, body: NewToken, caller: TokenIssuer, session: Transaction, once: Repeatable
) -> EnrollmentTokenIssued:
    """Issue a token with which one worker of the organization may enrol, once; it is shown only here."""
    return await once(
        EnrollmentTokenIssued,
        body,
        lambda: service.issue_enrollment_token(session, organization_id, body, caller=caller),
        secret=True,
    )
