"""The address of a dataset's ledger."""

from uuid import UUID

from fastapi import APIRouter

from app.dependencies import DatasetReader, Transaction
from app.ledger import queries
from app.pagination import Page as Paging
from app.problems import refuses
from isthmus.wire.ledger import LedgerPage
from isthmus.wire.problems import ProblemCode

router = APIRouter(prefix="/datasets", tags=["datasets"])


@router.get(
    "/{dataset_id}/ledger",
    summary="Read a dataset's ledger",
    responses=refuses(ProblemCode.NOT_FOUND, ProblemCode.CURSOR_INVALID, ProblemCode.LEDGER_TAMPERED),
)
async def list_entries(dataset_id: UUID, caller: DatasetReader, session: Transaction, paging: Paging) -> LedgerPage:
    """List everything that was promised, released and given back of a dataset's budget, the first entry first.

    Datasets of one lineage (the same data under several names) share a ledger. What is listed was verified: a ledger
    that somebody changed by hand is refused."""
    return await queries.page_entries(session, dataset_id, paging, caller=caller)
