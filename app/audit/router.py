"""The address of the hash chains."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query

from app.audit import queries
from app.audit.service import organization_stream
from app.dependencies import AnyCaller, Caller, Transaction, check_scope
from app.errors import Forbidden, NotFound
from app.pagination import Page as Paging
from app.problems import refuses
from isthmus.wire.base import Page
from isthmus.wire.events import EventView
from isthmus.wire.organizations import Role, Scope
from isthmus.wire.problems import ProblemCode

router = APIRouter(prefix="/events", tags=["events"])

UUID_PATTERN = "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
Stream = Annotated[
    str,
    Query(
        pattern=f"^(platform|(organization|job):{UUID_PATTERN})$",
        description="`platform`, `organization:<id>` or `job:<id>`.",
        openapi_examples={"the platform's": {"value": "platform"}},
    ),
]
After = Annotated[int, Query(ge=0, le=2**31 - 1, description="Begin behind the event of this number.")]


def _reader(caller: AnyCaller) -> Caller:
    return check_scope(caller, Scope.PLATFORM, Scope.DATASETS_READ)


Reader = Annotated[Caller, Depends(_reader)]


@router.get(
    "",
    summary="Read a stream of events",
    responses=refuses(ProblemCode.NOT_FOUND, ProblemCode.CURSOR_INVALID),
)
async def list_events(
    stream: Stream, caller: Reader, session: Transaction, paging: Paging, after: After = 0
) -> Page[EventView]:
    """List what happened as a hash chain: any stream for an admin, that of the own organization for a steward."""
    if not caller.is_admin:
        if caller.role is not Role.STEWARD or caller.organization_id is None:
            raise Forbidden("Events are shown to admins, and to stewards those of their organization.")
        if stream != organization_stream(caller.organization_id):
            raise NotFound("stream", stream)
    return await queries.page_events(session, stream, paging, after=after)
