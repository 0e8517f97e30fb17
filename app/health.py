"""Whether the process lives, whether it can work, and what it counts."""

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from app.dependencies import Admin, PartsOf
from app.errors import NotReady
from app.problems import refuses
from isthmus import __version__
from isthmus.wire.problems import ProblemCode
from isthmus.wire.version import CONTRACT_VERSION
from isthmus.wire.workers import ServiceIdentity

router = APIRouter(tags=["service"])


@router.get("/healthz", summary="Is the process alive?")
async def healthz() -> dict[str, str]:
    """Answers as long as the process does."""
    return {"status": "ok"}


@router.get("/readyz", summary="Can the service work?", responses=refuses(ProblemCode.NOT_READY, needs_key=False))
async def readyz(parts: PartsOf) -> dict[str, str]:
    """Asks the database, and whether changes are heard of."""
    try:
        async with parts.single_statements() as session:
            await session.execute(text("SELECT 1"))
    except (SQLAlchemyError, OSError) as error:
        raise NotReady("The database does not answer.", retry_after_s=1) from error
    if not parts.wakeups.connected.is_set():
        raise NotReady("The listener is not connected to the database.", retry_after_s=1)
    return {"status": "ready"}


@router.get(
    "/metrics",
    summary="Figures for Prometheus",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}, "description": "Prometheus' text format."}, **refuses()},
)
async def metrics(parts: PartsOf, _caller: Admin) -> Response:
    """Requests by route, workers that wait, rounds aggregated: of this process, for an admin's key."""
    parts.meters.waiting.set(parts.wakeups.waiting())
    return Response(parts.meters.rendered(), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/service", summary="Who signs receipts here?")
async def service_identity(parts: PartsOf) -> ServiceIdentity:
    """The service's public key, to be compared with the one that workers pinned, and the contract it speaks."""
    return ServiceIdentity(
        service_public_key=parts.signer.public_key, contract_version=CONTRACT_VERSION, version=__version__
    )
