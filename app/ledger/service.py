"""Charging a dataset for a release, before a byte of it is read."""

from uuid import UUID

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from app.errors import UpdateConflict
from app.models import LedgerEntry
from isthmus.wire.ledger import LedgerKind


async def charge(
    session: AsyncSession,
    *,
    dataset_id: UUID,
    job_id: UUID,
    participation_id: UUID,
    round_number: int,
    release: str,
    clip_norm: float | None,
    noise_multiplier: float,
    elements: int,
    digest: str,
) -> LedgerEntry:
    """Append the one entry for a release. The same bytes again are charged nothing and get the entry that stands.

    Needs the lock of the dataset's row, the last of all locks, taken by an earlier statement: its entries are numbered
    without gaps, and this one must see what that one waited for. The entry's time is Postgres's, read under that lock.

    Guarantees:
        (participation, round, release) has at most one entry, whatever runs at the same time;
        the entries of a dataset are numbered 1, 2, 3, ... in the order in which they were committed.

    Raises:
        UpdateConflict: other bytes were charged for this participation, round and release.
    """
    last = select(func.coalesce(func.max(LedgerEntry.sequence), 0)).where(LedgerEntry.dataset_id == dataset_id)
    appended = await session.scalars(
        insert(LedgerEntry)
        .values(
            dataset_id=dataset_id,
            sequence=last.scalar_subquery() + 1,
            kind=LedgerKind.SPEND,
            job_id=job_id,
            participation_id=participation_id,
            round_number=round_number,
            release=release,
            clip_norm=clip_norm,
            noise_multiplier=noise_multiplier,
            elements=elements,
            digest=digest,
            created_at=func.clock_timestamp(),
        )
        .on_conflict_do_nothing(constraint="uq_ledger_entries_charge_key")
        .returning(LedgerEntry)
    )
    entry = appended.one_or_none()
    if entry is not None:
        return entry
    standing = await session.scalars(
        select(LedgerEntry).where(
            LedgerEntry.participation_id == participation_id,
            LedgerEntry.round_number == round_number,
            LedgerEntry.release == release,
        )
    )
    entry = standing.one()
    if entry.digest != digest:
        raise UpdateConflict
    return entry
