"""Appending to the hash chains."""

from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from app.models import Event, EventStream
from isthmus.wire.events import GENESIS, EventKind, event_hash

PLATFORM: Final = "platform"
SERVICE: Final = "service"


def job_stream(job_id: UUID) -> str:
    """The stream of a job."""
    return f"job:{job_id}"


def organization_stream(organization_id: UUID) -> str:
    """The stream of an organization."""
    return f"organization:{organization_id}"


async def append(
    session: AsyncSession, stream: str, kind: EventKind, *, at: datetime, actor: str = SERVICE, **data: Any
) -> None:
    """Append one event. Number and hash are assigned under the lock of the stream's row, so call it late.

    `data` must be plain JSON values; it is hashed as canonical JSON.
    """
    await append_all(session, stream, [(kind, data)], at=at, actor=actor)


async def append_all(
    session: AsyncSession,
    stream: str,
    events: list[tuple[EventKind, dict[str, Any]]],
    *,
    at: datetime,
    actor: str = SERVICE,
) -> None:
    """Append several events of one moment and one actor: one lock, one write."""
    locked = await session.execute(
        select(EventStream)
        .where(EventStream.name == stream)
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    head = locked.scalar_one_or_none()
    if head is None:
        await session.execute(
            insert(EventStream).values(name=stream, sequence=0, head_hash=GENESIS).on_conflict_do_nothing()
        )
        locked = await session.execute(
            select(EventStream)
            .where(EventStream.name == stream)
            .with_for_update()
            .execution_options(populate_existing=True)
        )
        head = locked.scalar_one()
    for kind, data in events:
        sequence = head.sequence + 1
        digest = event_hash(
            stream=stream,
            sequence=sequence,
            kind=kind.value,
            at=at,
            actor=actor,
            data=data,
            previous_hash=head.head_hash,
        )
        session.add(
            Event(
                stream=stream,
                sequence=sequence,
                kind=kind,
                at=at,
                actor=actor,
                data=data,
                previous_hash=head.head_hash,
                hash=digest,
            )
        )
        head.sequence, head.head_hash = sequence, digest
    await session.flush()
