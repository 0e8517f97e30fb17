"""Reading ledgers."""

from uuid import UUID

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.datasets.queries import get_dataset
from app.dependencies import Caller
from app.errors import Forbidden
from app.models import LedgerEntry
from app.pagination import Paging, paginate
from isthmus.wire.base import Page
from isthmus.wire.ledger import LedgerEntryView
from isthmus.wire.organizations import Role


async def page_entries(
    session: AsyncSession, dataset_id: UUID, paging: Paging, *, caller: Caller
) -> Page[LedgerEntryView]:
    """One page of a dataset's ledger, in the order of its entries.

    Raises:
        Forbidden: the caller is neither a steward nor an admin.
        NotFound: there is no such dataset, or it is another organization's.
    """
    if caller.role not in (Role.ADMIN, Role.STEWARD):
        raise Forbidden("A ledger is shown to the stewards of the dataset's organization and to admins.")
    await get_dataset(session, dataset_id, caller=caller)
    statement = select(LedgerEntry).where(LedgerEntry.dataset_id == dataset_id)
    rows, cursor = await paginate(session, statement, LedgerEntry.sequence, int, paging)
    return Page[LedgerEntryView](items=[LedgerEntryView.model_validate(row[0]) for row in rows], next_cursor=cursor)
