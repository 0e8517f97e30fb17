"""Appending to the hash chains.

What happens in a transaction is noted in its session, and written when the transaction commits: one lock, one insert
and one update a stream, whatever happened, and no stream's lock is held while anything else is done. A transaction that
rolls back leaves no event.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import bindparam, event, insert, select, update
from sqlalchemy.dialects.postgresql import insert as insert_if_new
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from app.models import Event, EventStream
from app.models.base import uuid7
from isthmus.wire.events import GENESIS, EventKind, event_hash

PLATFORM: Final = "platform"
SERVICE: Final = "service"

_NOTED: Final = "events noted for the commit"


@dataclass(frozen=True, slots=True)
class _Noted:
    """An event that waits for its number and its hash."""

    stream: str
    kind: EventKind
    at: datetime
    actor: str
    data: dict[str, Any]


def job_stream(job_id: UUID) -> str:
    """The stream of a job."""
    return f"job:{job_id}"


def organization_stream(organization_id: UUID) -> str:
    """The stream of an organization."""
    return f"organization:{organization_id}"


def append(
    session: AsyncSession, stream: str, kind: EventKind, *, at: datetime, actor: str = SERVICE, **data: Any
) -> None:
    """Append one event when the transaction commits. Events of one transaction keep their order.

    `data` must be plain JSON values; it is hashed as canonical JSON.
    """
    session.info.setdefault(_NOTED, []).append(_Noted(stream, kind, at, actor, data))


@event.listens_for(Session, "before_commit")
def _write(session: Session) -> None:
    """Number, hash and insert what was noted, under the locks of the streams, taken in the order of their names."""
    noted: list[_Noted] = session.info.pop(_NOTED, [])
    if not noted:
        return
    heads = _locked_heads(session, sorted({item.stream for item in noted}))
    rows = []
    for item in noted:
        sequence, previous = heads[item.stream]
        digest = event_hash(
            stream=item.stream,
            sequence=sequence + 1,
            kind=item.kind.value,
            at=item.at,
            actor=item.actor,
            data=item.data,
            previous_hash=previous,
        )
        rows.append(
            {
                "id": uuid7(),
                "stream": item.stream,
                "sequence": sequence + 1,
                "kind": item.kind,
                "at": item.at,
                "actor": item.actor,
                "data": item.data,
                "previous_hash": previous,
                "hash": digest,
            }
        )
        heads[item.stream] = (sequence + 1, digest)
    connection = session.connection()
    connection.execute(_INSERT, rows)
    connection.execute(_MOVE, [{"stream": name, "last": last, "head": head} for name, (last, head) in heads.items()])


_LOCK: Final = (
    select(EventStream.name, EventStream.sequence, EventStream.head_hash)
    .where(EventStream.name.in_(bindparam("streams", expanding=True)))
    .order_by(EventStream.name)
    .with_for_update()
)
_INSERT: Final = insert(Event.__table__)  # type: ignore[arg-type]  # mypy takes it for any FromClause
_MOVE: Final = (
    update(EventStream.__table__)  # type: ignore[arg-type]
    .where(EventStream.__table__.c.name == bindparam("stream"))
    .values(sequence=bindparam("last"), head_hash=bindparam("head"))
)


def _locked_heads(session: Session, streams: list[str]) -> dict[str, tuple[int, str]]:
    """Stream -> number and hash of its last event. A stream begins with its first event."""
    heads = {name: (last, head) for name, last, head in session.execute(_LOCK, {"streams": streams})}
    missing = [name for name in streams if name not in heads]
    if missing:
        rows = [{"name": name, "sequence": 0, "head_hash": GENESIS} for name in missing]
        session.execute(insert_if_new(EventStream).values(rows).on_conflict_do_nothing())
        heads |= {name: (last, head) for name, last, head in session.execute(_LOCK, {"streams": missing})}
    return heads
