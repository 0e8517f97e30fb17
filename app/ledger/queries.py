"""Reading ledgers: what is answered was verified against the chain of entries and the sums that follow from it."""

import json
from typing import Final
from uuid import UUID

from sqlalchemy import String, cast, exists, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from app.datasets.budgets import budget_view
from app.datasets.queries import get_dataset
from app.dependencies import Caller
from app.errors import CursorInvalid, Forbidden, LedgerTampered
from app.models import Dataset, Ledger, LedgerEntry
from app.pagination import Paging, begins_after, paginate
from isthmus.privacy.chain import ChainBroken, verify
from isthmus.wire.base import canonical_json
from isthmus.wire.events import GENESIS
from isthmus.wire.ledger import LedgerEntryView, LedgerKind, LedgerPage
from isthmus.wire.organizations import Role

ADVICE: Final = (
    " Somebody changed it past the service. The ledger that the dataset's worker keeps is the authority: go by that "
    "one, and tell whoever runs this platform."
)
_SUMS: Final = text("""
    WITH costs AS (
        SELECT place, sum(CASE kind WHEN 'reserve' THEN nano ELSE -nano END) AS reserved,
            coalesce(sum(nano) FILTER (WHERE kind = 'spend'), 0) AS spent
        FROM ledger_entries, unnest(rdp_nano) WITH ORDINALITY AS at_order(nano, place)
        WHERE ledger_id = :ledger_id AND 0 <> ANY (rdp_nano)
        GROUP BY place
    ), draws AS (
        SELECT coalesce(sum(CASE kind WHEN 'reserve' THEN draws ELSE -draws END), 0) AS reserved,
            coalesce(sum(draws) FILTER (WHERE kind = 'spend'), 0) AS spent,
            count(*) FILTER (WHERE kind = 'spend' AND mode = 'none') AS unaccounted,
            count(*) AS entries, coalesce(max(sequence), 0) AS last
        FROM ledger_entries WHERE ledger_id = :ledger_id
    ), nothing AS (
        SELECT array_fill(0::numeric, ARRAY[cardinality(spent_nano)]) AS nano FROM ledgers WHERE id = :ledger_id
    )
    SELECT
        ledger.reserved_nano::numeric[] = coalesce(
            (SELECT array_agg(reserved ORDER BY place) FROM costs), nothing.nano) AS "what is promised",
        ledger.spent_nano::numeric[] = coalesce(
            (SELECT array_agg(spent ORDER BY place) FROM costs), nothing.nano) AS "what is spent",
        ledger.reserved_draws = draws.reserved AS "the draws that are promised",
        ledger.spent_draws = draws.spent AS "the draws that are spent",
        ledger.unaccounted_releases = draws.unaccounted AS "the number of releases that nothing bounds",
        ledger.head_sequence = draws.entries AND ledger.head_sequence = draws.last AS "the number of entries",
        ledger.head_hash = coalesce((
            SELECT hash FROM ledger_entries WHERE ledger_id = :ledger_id AND sequence = draws.last
        ), :genesis) AS "the head"
    FROM ledgers ledger, draws, nothing WHERE ledger.id = :ledger_id
""")
"""Whether each figure of a ledger follows from its entries: as `isthmus_enter` adds them up, and in one snapshot."""


async def page_entries(session: AsyncSession, dataset_id: UUID, paging: Paging, *, caller: Caller) -> LedgerPage:
    """One page of the ledger that a dataset draws on, in the order of its entries, under all names of the same data.

    What is answered was verified: every entry against its hash and the entry before it, also across pages; the last one
    of all against the ledger's head; and the ledger's sums, which the budget is told by, against all of its entries.

    Raises:
        Forbidden: the caller is neither a steward nor an admin.
        NotFound: there is no such dataset, or it is another organization's.
        CursorInvalid: the cursor is not one that this list gave out.
        LedgerTampered: entries are not those that were written, or the sums are not theirs.
    """
    if caller.role not in (Role.ADMIN, Role.STEWARD):
        raise Forbidden("A ledger is shown to the stewards of the dataset's organization and to admins.")
    dataset = await get_dataset(session, dataset_id, caller=caller)
    # The ledger's head in the same statement as the entries: between two of them others may append.
    statement = (
        select(LedgerEntry, Ledger)
        .join(Ledger, Ledger.id == LedgerEntry.ledger_id)
        .where(LedgerEntry.ledger_id == dataset.ledger_id)
        .execution_options(populate_existing=True)
    )
    try:
        rows, cursor = await paginate(session, statement, LedgerEntry.sequence, int, paging)
    except LookupError as error:  # a kind that no entry has: the row cannot even be loaded
        raise await _unknown_kind(session, dataset.ledger_id) from error
    sequence, head = await _anchor(session, dataset.ledger_id, begins_after(paging, int) or 0)
    entries = [view_of(row[0]) for row in rows]
    if rows:
        ledger = rows[0][1]
    else:
        ledger, more = await _beyond(session, dataset, sequence)
        if more:  # it was appended between the two statements
            return await page_entries(session, dataset_id, paging, caller=caller)
    try:
        verify(entries, sequence=sequence, head=head, until=_end_of(ledger) if cursor is None else None)
    except ChainBroken as broken:
        raise LedgerTampered(f"{broken}{ADVICE}") from broken
    await _require_sums(session, dataset.ledger_id)
    return LedgerPage(items=entries, next_cursor=cursor, budget=budget_view(ledger))


def view_of(entry: LedgerEntry) -> LedgerEntryView:
    """An entry as answered.

    Raises:
        LedgerTampered: the row holds what was never written: it is no entry at all.
    """
    try:
        event = None if entry.event is None else json.loads(entry.event)
        if event is not None and canonical_json(event).decode() != entry.event:
            raise ValueError("its mechanism is not in the form that it was written in")
        columns = {name: getattr(entry, name) for name in LedgerEntryView.model_fields if name != "event"}
        return LedgerEntryView.model_validate({**columns, "event": event})
    except ValueError as error:
        raise _unreadable(entry.sequence) from error


def _unreadable(sequence: int) -> LedgerTampered:
    return LedgerTampered(f"{ChainBroken(sequence, 'it cannot be read as an entry')}{ADVICE}")


async def _unknown_kind(session: AsyncSession, ledger_id: UUID) -> LedgerTampered:
    kinds = [kind.value for kind in LedgerKind]
    found = await session.scalars(
        select(LedgerEntry.sequence)
        .where(LedgerEntry.ledger_id == ledger_id, cast(LedgerEntry.kind, String).not_in(kinds))
        .order_by(LedgerEntry.sequence)
        .limit(1)
    )
    return _unreadable(found.one())


async def _anchor(session: AsyncSession, ledger_id: UUID, sequence: int) -> tuple[int, str]:
    """Number and hash of the entry that a page follows: 0 and genesis for the first.

    Raises:
        CursorInvalid: the ledger never had so many entries.
        LedgerTampered: the entry is not there any more.
    """
    if sequence == 0:
        return 0, GENESIS
    found = await session.execute(
        select(Ledger.head_sequence, LedgerEntry.hash)
        .outerjoin(LedgerEntry, (LedgerEntry.ledger_id == Ledger.id) & (LedgerEntry.sequence == sequence))
        .where(Ledger.id == ledger_id)
    )
    last, anchor = found.one()
    if anchor is not None:
        return sequence, anchor
    if sequence > last:
        raise CursorInvalid
    raise LedgerTampered(f"{ChainBroken(sequence, 'it was taken out')}{ADVICE}")


def _end_of(ledger: Ledger) -> tuple[int, str]:
    return ledger.head_sequence, ledger.head_hash


async def _require_sums(session: AsyncSession, ledger_id: UUID) -> None:
    """Whether the sums by which Postgres enforces a budget are those of all its entries.

    Raises:
        LedgerTampered: they are not. Says which.
    """
    found = (await session.execute(_SUMS, {"ledger_id": ledger_id, "genesis": GENESIS})).mappings().one()
    wrong = [name for name, follows in found.items() if not follows]
    if wrong:
        raise LedgerTampered(
            f"The ledger was tampered with: {', '.join(wrong)} does not follow from its entries.{ADVICE}"
        )


async def _beyond(session: AsyncSession, dataset: Dataset, sequence: int) -> tuple[Ledger, bool]:
    """A dataset's ledger, and whether it has any entry after one."""
    any_entry = exists().where(LedgerEntry.ledger_id == Ledger.id, LedgerEntry.sequence > sequence)
    found = await session.execute(select(Ledger, any_entry).where(Ledger.id == dataset.ledger_id))
    ledger, more = found.one()
    return ledger, more
