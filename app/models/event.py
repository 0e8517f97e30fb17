"""What happened, one hash chain a stream."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ForeignKey, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from app.models.base import Base, uuid7
from isthmus.wire.events import GENESIS, EventKind


class EventStream(Base):
    """The head of a chain: `job:<id>`, `organization:<id>` or `platform`. Its row's lock orders the events."""

    __tablename__ = "event_streams"

    name: Mapped[str] = mapped_column(primary_key=True)
    sequence: Mapped[int] = mapped_column(default=0)
    head_hash: Mapped[str] = mapped_column(default=GENESIS)


class Event(Base):
    """One link of a chain, appended in the same transaction as the change. A trigger refuses changes."""

    __tablename__ = "events"
    __table_args__ = (UniqueConstraint("stream", "sequence"),)

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid7)
    stream: Mapped[str] = mapped_column(ForeignKey("event_streams.name"))
    sequence: Mapped[int]
    kind: Mapped[EventKind]
    at: Mapped[datetime]
    actor: Mapped[str]
    data: Mapped[dict[str, Any]]
    previous_hash: Mapped[str]
    hash: Mapped[str]
