"""Addresses of principals and keys, and of the question who one is."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Body, Path, Query, status

from app.admin import queries, service
from app.dependencies import Admin, AnyCaller, Repeatable, Transaction
from app.pagination import Page as Paging
from app.problems import refuses
from isthmus.wire.base import Page
from isthmus.wire.organizations import (
    ApiKeyIssued,
    ApiKeyView,
    CreateApiKey,
    CreatePrincipal,
    Me,
    PrincipalView,
    RotateApiKey,
)
from isthmus.wire.problems import ProblemCode

router = APIRouter()

KeyId = Annotated[str, Path(pattern="^[0-9A-Za-z]{16}$", description="The public part of a key.")]
NewPrincipal = Annotated[
    CreatePrincipal,
    Body(
        openapi_examples={
            "a researcher": {"value": {"name": "ada", "display_name": "Ada Lovelace", "role": "researcher"}},
            "a steward": {
                "value": {
                    "name": "sam.cleveland",
                    "display_name": "Sam at Cleveland",
                    "role": "steward",
                    "organization_id": "01890a5d-ac96-774b-bcce-b302099a8057",
                }
            },
        }
    ),
]
NewKey = Annotated[
    CreateApiKey,
    Body(
        openapi_examples={
            "a further key of mine that only reads": {
                "value": {"label": "dashboard", "scopes": ["jobs:read"], "expires_in_s": 86400}
            },
            "somebody's first key": {
                "value": {"principal_id": "01890a5d-ac96-774b-bcce-b302099a8057", "label": "laptop"}
            },
        }
    ),
]
Rotation = Annotated[RotateApiKey, Body(openapi_examples={"a day of overlap": {"value": {"overlap_s": 86400}}})]
OfPrincipal = Annotated[
    UUID | None, Query(description="Whose keys; without it one's own, and everybody's for an admin.")
]

SECRETS = (ProblemCode.IDEMPOTENCY_CONFLICT, ProblemCode.SECRET_SHOWN_ONCE)


@router.get("/me", tags=["keys"], summary="Who am I?", responses=refuses())
async def get_me(caller: AnyCaller, session: Transaction) -> Me:
    """Tell who the service takes the caller for, and what this key may be used for."""
    return await queries.get_me(session, caller)


@router.post(
    "/principals",
    tags=["principals"],
    status_code=status.HTTP_201_CREATED,
    summary="Register a principal",
    responses=refuses(ProblemCode.NOT_FOUND, ProblemCode.NAME_TAKEN, ProblemCode.IDEMPOTENCY_CONFLICT),
)
async def create_principal(body: NewPrincipal, caller: Admin, session: Transaction, once: Repeatable) -> PrincipalView:
    """Register an admin, a researcher or an organization's steward; the name is never given again."""

    async def create() -> PrincipalView:
        return PrincipalView.model_validate(await service.create_principal(session, body, caller=caller))

    return await once(PrincipalView, body, create)


@router.get(
    "/principals", tags=["principals"], summary="List principals", responses=refuses(ProblemCode.CURSOR_INVALID)
)
async def list_principals(caller: Admin, session: Transaction, paging: Paging) -> Page[PrincipalView]:
    """List everybody who holds or held keys, the oldest first."""
    return await queries.page_principals(session, paging)


@router.get(
    "/principals/{principal_id}",
    tags=["principals"],
    summary="Read a principal",
    responses=refuses(ProblemCode.NOT_FOUND),
)
async def get_principal(principal_id: UUID, caller: Admin, session: Transaction) -> PrincipalView:
    """Read one principal."""
    return PrincipalView.model_validate(await queries.get_principal(session, principal_id))


@router.post(
    "/principals/{principal_id}/disable",
    tags=["principals"],
    summary="Disable a principal",
    responses=refuses(ProblemCode.NOT_FOUND, ProblemCode.STATE_CONFLICT),
)
async def disable_principal(principal_id: UUID, caller: Admin, session: Transaction) -> PrincipalView:
    """End a principal and all its keys for good; a worker is revoked with it."""
    return PrincipalView.model_validate(await service.disable_principal(session, principal_id, caller=caller))


@router.post(
    "/api-keys",
    tags=["keys"],
    status_code=status.HTTP_201_CREATED,
    summary="Issue an API key",
    responses=refuses(ProblemCode.NOT_FOUND, ProblemCode.STATE_CONFLICT, *SECRETS),
)
async def create_key(body: NewKey, caller: AnyCaller, session: Transaction, once: Repeatable) -> ApiKeyIssued:
    """Issue a further key of one's own, no wider than the one that asks, or as an admin anybody's; shown only here."""
    return await once(ApiKeyIssued, body, lambda: service.create_key(session, body, caller=caller), secret=True)


@router.get(
    "/api-keys",
    tags=["keys"],
    summary="List API keys",
    responses=refuses(ProblemCode.NOT_FOUND, ProblemCode.CURSOR_INVALID),
)
async def list_keys(
    caller: AnyCaller, session: Transaction, paging: Paging, principal_id: OfPrincipal = None
) -> Page[ApiKeyView]:
    """List keys without their secrets: one's own, or as an admin anybody's."""
    return await queries.page_keys(session, principal_id, paging, caller=caller)


@router.post(
    "/api-keys/{key_id}/rotate",
    tags=["keys"],
    status_code=status.HTTP_201_CREATED,
    summary="Rotate an API key",
    responses=refuses(ProblemCode.NOT_FOUND, ProblemCode.STATE_CONFLICT, *SECRETS),
)
async def rotate_key(
    key_id: KeyId, body: Rotation, caller: AnyCaller, session: Transaction, once: Repeatable
) -> ApiKeyIssued:
    """Issue a successor with the same scopes, shown only here; the old key ends after the overlap."""
    return await once(ApiKeyIssued, body, lambda: service.rotate_key(session, key_id, body, caller=caller), secret=True)


@router.post(
    "/api-keys/{key_id}/revoke", tags=["keys"], summary="Revoke an API key", responses=refuses(ProblemCode.NOT_FOUND)
)
async def revoke_key(key_id: KeyId, caller: AnyCaller, session: Transaction) -> ApiKeyView:
    """End a key at once."""
    return ApiKeyView.model_validate(await service.revoke_key(session, key_id, caller=caller))
