"""Appending to the hash chains.

What happens in a transaction is noted in its session, and written when the transaction commits: one lock, one insert
and one update a stream, whatever happened, and no stream's lock is held while anything else is done. A transaction that
rolls back leaves no event.
"""

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import bindparam, event, select, text
from sqlalchemy.dialects.postgresql import insert as insert_if_new
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from app.database import UNCOMMITTED
from app.models import EventStream
from app.models.base import uuid7
from isthmus.wire.events import GENESIS, EventKind, event_hash

PLATFORM: Final = "platform"
SERVICE: Final = "service"

_NOTED: Final = "events noted for the commit"
_HEADS: Final = "heads of streams that this transaction has locked"


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

    Raises:
        RuntimeError: the session never commits, and the event would be lost.
    """
    if UNCOMMITTED in session.info:
        raise RuntimeError("an event was appended in a session that never commits")
    session.info.setdefault(_NOTED, []).append(_Noted(stream, kind, at, actor, data))


@event.listens_for(Session, "before_commit")
def _write(session: Session) -> None:
    """Number, hash and insert what was noted, under the locks of the streams, taken in the order of their names."""
    noted: list[_Noted] = session.info.pop(_NOTED, [])
    known: dict[str, tuple[int, str]] = session.info.pop(_HEADS, {})
    if not noted:
        return
    streams = sorted({item.stream for item in noted})
    heads = {name: known[name] for name in streams if name in known}
    heads |= _locked_heads(session, [name for name in streams if name not in heads])
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
                "id": str(uuid7()),
                "stream": item.stream,
                "sequence": sequence + 1,
                "kind": item.kind.value,
                "at": item.at.isoformat(),
                "actor": item.actor,
                "data": item.data,
                "previous_hash": previous,
                "hash": digest,
            }
        )
        heads[item.stream] = (sequence + 1, digest)
    moved = [{"name": name, "sequence": last, "head_hash": head} for name, (last, head) in heads.items()]
    session.connection().execute(_WRITE, {"events": json.dumps(rows), "heads": json.dumps(moved)})


def know_head(session: AsyncSession, stream: str, sequence: int, head_hash: str) -> None:
    """Tell what the last event of a stream is, where its row was read under its lock: it need not be read again."""
    session.info.setdefault(_HEADS, {})[stream] = (sequence, head_hash)


# One statement, whatever the number of events. The type `json` keeps `data` letter by letter: it is what was hashed.
_WRITE: Final = text(
    """
    WITH moved AS (
        UPDATE event_streams SET sequence = head.sequence, head_hash = head.head_hash
        FROM json_to_recordset(CAST(:heads AS json)) AS head(name text, sequence integer, head_hash text)
        WHERE event_streams.name = head.name
    )
    INSERT INTO events (id, stream, sequence, kind, at, actor, data, previous_hash, hash)
    SELECT id, stream, sequence, kind, at, actor, data, previous_hash, hash
    FROM json_to_recordset(CAST(:events AS json)) AS event(
        id uuid, stream text, sequence integer, kind text, at timestamptz, actor text, data json,
        previous_hash text, hash text
    )
    """
)
_LOCK: Final = (
    select(EventStream.name, EventStream.sequence, EventStream.head_hash)
    .where(EventStream.name.in_(bindparam("streams", expanding=True)))
    .order_by(EventStream.name)
    .with_for_update()
)


def _locked_heads(session: Session, streams: list[str]) -> dict[str, tuple[int, str]]:
    """Stream -> number and hash of its last event. A stream begins with its first event."""
    if not streams:
        return {}
    heads = {name: (last, head) for name, last, head in session.execute(_LOCK, {"streams": streams})}
    missing = [name for name in streams if name not in heads]
    if missing:
        rows = [{"name": name, "sequence": 0, "head_hash": GENESIS} for name in missing]
        session.execute(insert_if_new(EventStream).values(rows).on_conflict_do_nothing())
        heads |= {name: (last, head) for name, last, head in session.execute(_LOCK, {"streams": missing})}
    return heads
