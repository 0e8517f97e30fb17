"""Reading the hash chains."""

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.models import Event
from app.pagination import Paging, paginate
from isthmus.wire.base import Page
from isthmus.wire.events import EventView


async def page_events(session: AsyncSession, stream: str, paging: Paging, *, after: int = 0) -> Page[EventView]:
    """One page of a stream, from the event after number `after` on."""
    statement = select(Event).where(Event.stream == stream, Event.sequence > after)
    rows, cursor = await paginate(session, statement, Event.sequence, int, paging)
    return Page[EventView](items=[EventView.model_validate(row[0]) for row in rows], next_cursor=cursor)


async def list_events(session: AsyncSession, stream: str, *, after: int, limit: int = 500) -> Sequence[EventView]:
    """The next events of a stream after number `after`, in order."""
    found = await session.scalars(
        select(Event).where(Event.stream == stream, Event.sequence > after).order_by(Event.sequence).limit(limit)
    )
    return [EventView.model_validate(event) for event in found]
