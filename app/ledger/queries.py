"""Reading ledgers."""

import json
from uuid import UUID

from sqlalchemy import exists, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.datasets.budgets import budget_view
from app.datasets.queries import get_dataset
from app.dependencies import Caller
from app.errors import Forbidden, LedgerTampered
from app.models import Dataset, Ledger, LedgerEntry
from app.pagination import Paging, paginate
from isthmus.privacy.chain import ChainBroken, verify
from isthmus.wire.events import GENESIS
from isthmus.wire.ledger import LedgerEntryView, LedgerPage
from isthmus.wire.organizations import Role


async def page_entries(session: AsyncSession, dataset_id: UUID, paging: Paging, *, caller: Caller) -> LedgerPage:
    """One page of the ledger that a dataset draws on, in the order of its entries, under all names of the same data.

    What is answered was verified: every entry against its hash and the entry before it, and the last one of all
    against the ledger's head.

    Raises:
        Forbidden: the caller is neither a steward nor an admin.
        NotFound: there is no such dataset, or it is another organization's.
        LedgerTampered: entries are not those that were written.
    """
    if caller.role not in (Role.ADMIN, Role.STEWARD):
        raise Forbidden("A ledger is shown to the stewards of the dataset's organization and to admins.")
    dataset = await get_dataset(session, dataset_id, caller=caller)
    # The ledger's head in the same statement as the entries: between two of them others may append.
    statement = (
        select(LedgerEntry, Ledger)
        .join(Ledger, Ledger.id == LedgerEntry.ledger_id)
        .where(LedgerEntry.ledger_id == dataset.ledger_id)
    )
    rows, cursor = await paginate(session, statement, LedgerEntry.sequence, int, paging)
    entries = [view_of(row[0]) for row in rows]
    if rows:
        ledger = rows[0][1]
    else:
        ledger, begun = await _beyond(session, dataset)
        if begun and paging.cursor is None:  # its first entry was appended between the two statements
            return await page_entries(session, dataset_id, paging, caller=caller)
    _require_untouched(entries, ledger, whole=paging.cursor is None, last=cursor is None)
    return LedgerPage(items=entries, next_cursor=cursor, budget=budget_view(ledger))


def view_of(entry: LedgerEntry) -> LedgerEntryView:
    """An entry as answered."""
    event = None if entry.event is None else json.loads(entry.event)
    columns = {name: getattr(entry, name) for name in LedgerEntryView.model_fields if name != "event"}
    return LedgerEntryView.model_validate({**columns, "event": event})


def _require_untouched(entries: list[LedgerEntryView], ledger: Ledger, *, whole: bool, last: bool) -> None:
    """Whether a stretch of entries stands as it was written.

    Args:
        entries: without gaps.
        ledger: read by the same statement.
        whole: they begin with the first.
        last: they end with the last.
    """
    sequence, head = (0, GENESIS) if whole or not entries else (entries[0].sequence - 1, entries[0].previous_hash)
    until = (ledger.head_sequence, ledger.head_hash) if last and (entries or whole) else None
    try:
        verify(entries, sequence=sequence, head=head, until=until)
    except ChainBroken as broken:
        raise LedgerTampered(
            f"{broken} Somebody changed it past the service. The ledger that the dataset's worker keeps is the "
            "authority: go by that one, and tell whoever runs this platform."
        ) from broken


async def _beyond(session: AsyncSession, dataset: Dataset) -> tuple[Ledger, bool]:
    """A dataset's ledger, and whether it has any entry."""
    any_entry = exists().where(LedgerEntry.ledger_id == Ledger.id)
    found = await session.execute(select(Ledger, any_entry).where(Ledger.id == dataset.ledger_id))
    ledger, begun = found.one()
    return ledger, begun
