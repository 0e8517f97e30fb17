"""The address of a dataset's ledger."""

from uuid import UUID

from fastapi import APIRouter

from app.dependencies import DatasetReader, Transaction
from app.ledger import queries
from app.pagination import Page as Paging
from app.problems import refuses
from isthmus.wire.base import Page
from isthmus.wire.ledger import LedgerEntryView
from isthmus.wire.problems import ProblemCode

router = APIRouter(prefix="/datasets", tags=["datasets"])


@router.get(
    "/{dataset_id}/ledger",
    summary="Read a dataset's ledger",
    responses=refuses(ProblemCode.NOT_FOUND, ProblemCode.CURSOR_INVALID),
)
async def list_entries(
    dataset_id: UUID, caller: DatasetReader, session: Transaction, paging: Paging
) -> Page[LedgerEntryView]:
    """List everything that was released of a dataset, the first release first."""
    return await queries.page_entries(session, dataset_id, paging, caller=caller)
