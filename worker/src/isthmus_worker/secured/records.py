"""What is kept of a secured round: a worker that is killed at any point goes on with the same bytes, or not at all.

One row for each attempt of a round that a participation took part in. Everything that a message follows from is in its
row before the message is sent: the secrets before the keys, the others' keys before the shares, the digest of the one
masked update before it is admitted, the one set of survivors before it is signed. Whatever came later is made from
that again, byte for byte.

    keys ──▶ shares ──▶ shared ──▶ masked ──▶ submitted ──▶ signed ──▶ revealed
      └────────┴──────────┴──────────┴───────────┴────────────┴───────────┴──────▶ over

`over` has no secrets any more, no messages, no offer: only that the attempt was, and, if shares were revealed, for
which set of survivors, with which keys and weights.

What the database has deleted is still in its log until a checkpoint has emptied that: `Sessions.clean_log`.
"""

import logging
import sqlite3
from collections.abc import Collection, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Final, NamedTuple

from pydantic import ValidationError

from isthmus.wire.rounds import TaskOffer

log = logging.getLogger(__name__)

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS sessions (
    participation_id TEXT NOT NULL, round_number INTEGER NOT NULL, attempt INTEGER NOT NULL, round_id TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN
        ('keys', 'shares', 'shared', 'masked', 'submitted', 'signed', 'revealed', 'over')),
    offer TEXT, secrets BLOB, keys_answer BLOB, shares_answer BLOB, masked_digest TEXT,
    asked INTEGER NOT NULL DEFAULT 0, receipt TEXT, survivors BLOB, revealed_for TEXT,
    began_at TEXT NOT NULL, ended_at TEXT, note TEXT,
    PRIMARY KEY (participation_id, round_number, attempt)
) STRICT;
CREATE INDEX IF NOT EXISTS open_sessions ON sessions (began_at) WHERE state <> 'over';
CREATE TABLE IF NOT EXISTS declared_rows (
    dataset TEXT NOT NULL, rows INTEGER NOT NULL, since TEXT NOT NULL, PRIMARY KEY (dataset, rows)
) STRICT;
"""


class SessionState(StrEnum):
    """How far a session has come. The state is written before the message that follows from it is sent."""

    KEYS = "keys"  # secrets are drawn
    SHARES = "shares"  # whose keys came is known
    SHARED = "shared"  # whose shares came is known
    MASKED = "masked"  # the one masked update of this key set is known
    SUBMITTED = "submitted"  # the service has signed for it
    SIGNED = "signed"  # the one set of survivors is known
    REVEALED = "revealed"  # shares may have been sent
    OVER = "over"


UPLOADED: Final = (SessionState.SUBMITTED, SessionState.SIGNED, SessionState.REVEALED)
"""States that need no offer to go on from."""
_ORDER: Final = tuple(SessionState)


class SessionKey(NamedTuple):
    """One attempt of a round, as one participation sees it."""

    participation_id: str
    round_number: int
    attempt: int


def session_key(offer: TaskOffer) -> SessionKey:
    """The session that an offer is about."""
    return SessionKey(str(offer.participation_id), offer.round_number, offer.attempt)


@dataclass(frozen=True)
class Record:
    """One row that is not over. Its secrets are not shown."""

    key: SessionKey
    state: SessionState
    offer: TaskOffer
    """As it came last."""
    secrets: bytes
    keys_answer: bytes | None
    shares_answer: bytes | None
    masked_digest: str | None
    asked: bool
    """Admission of the masked update may have been asked for."""
    receipt: str | None
    survivors: bytes | None
    """The answer that names them."""

    def __repr__(self) -> str:
        return f"Record({self.key}, {self.state})"


class SessionMoved(Exception):
    """A session is not where it was thought to be: a bug, or two agents on one journal. Nothing was changed."""

    def __init__(self, key: SessionKey, to: SessionState) -> None:
        super().__init__(f"the session {key} cannot become {to.value} from where it is")


_COLUMNS: Final = (
    "participation_id, round_number, attempt, state, offer, secrets, keys_answer, shares_answer, masked_digest, asked,"
    " receipt, survivors"
)


class Sessions:
    """The sessions of one worker, in its journal's database. What returns is on the disk."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._log_is_clean = False

    def begin(self, offer: TaskOffer, secrets: bytes) -> Record:
        """Keep fresh secrets for an attempt. Earlier attempts of its participation are over.

        Raises:
            sqlite3.IntegrityError: there were secrets for this attempt.
        """
        key, secured = session_key(offer), offer.secured
        assert secured is not None, "only offers of secured rounds have sessions"
        self.end_before(key.participation_id, key.round_number, key.attempt)
        self._connection.execute(
            "INSERT INTO sessions (participation_id, round_number, attempt, round_id, state, offer, secrets, began_at)"
            " VALUES (?, ?, ?, ?, 'keys', ?, ?, ?)",
            (*key, str(secured.round_id), offer.model_dump_json(by_alias=True), secrets, _now()),
        )
        return self.get(key)

    def find(self, key: SessionKey) -> Record | None:
        """The session of an attempt, unless there is none or it is over."""
        found = self._records("participation_id = ? AND round_number = ? AND attempt = ?", *key)
        return found[0] if found else None

    def get(self, key: SessionKey) -> Record:
        """The session of an attempt that is not over.

        Raises:
            LookupError: there is none.
        """
        found = self.find(key)
        if found is None:
            raise LookupError(f"there is no session {key}, or it is over")
        return found

    def is_known(self, key: SessionKey) -> bool:
        """Whether this attempt has or had a session."""
        where = "participation_id = ? AND round_number = ? AND attempt = ?"
        return bool(self._connection.execute(f"SELECT 1 FROM sessions WHERE {where}", key).fetchone())  # noqa: S608

    def uploaded(self) -> list[Record]:
        """Those whose masked update the service has, and that are not over."""
        return self._records("state IN ('submitted', 'signed', 'revealed')")

    def masked(self) -> list[Record]:
        """Those whose masked update is known, and not signed for."""
        return self._records("state = 'masked'")

    def past(self, margin: timedelta) -> list[Record]:
        """Those whose update the service never had, and whose attempt was to close longer ago than `margin`."""
        latest = datetime.now(UTC) - margin
        waiting = self._records("state IN ('keys', 'shares', 'shared') OR (state = 'masked' AND asked = 0)")
        return [record for record in waiting if record.offer.closes_at < latest]

    def newest(self, participation_id: str) -> tuple[int, int, str] | None:
        """Round, attempt and round id of the last session of a participation, over or not."""
        row = self._connection.execute(
            "SELECT round_number, attempt, round_id FROM sessions WHERE participation_id = ?"
            " ORDER BY round_number DESC, attempt DESC LIMIT 1",
            (participation_id,),
        ).fetchone()
        return (int(row[0]), int(row[1]), str(row[2])) if row else None

    def revealed_sums(self, participation_id: str, round_number: int) -> list[str]:
        """Of which sums shares were revealed in a round, as `checks.summed_of` tells them, by attempt."""
        rows = self._connection.execute(
            "SELECT revealed_for FROM sessions WHERE participation_id = ? AND round_number = ?"
            " AND revealed_for IS NOT NULL ORDER BY attempt",
            (participation_id, round_number),
        ).fetchall()
        return [str(row[0]) for row in rows]

    def readdress(self, key: SessionKey, offer: TaskOffer) -> Record:
        """Note the fence under which the same attempt is offered now."""
        self._connection.execute(
            "UPDATE sessions SET offer = ? WHERE participation_id = ? AND round_number = ? AND attempt = ?"
            " AND state <> 'over'",
            (offer.model_dump_json(by_alias=True), *key),
        )
        return self.get(key)

    def keep_keys(self, key: SessionKey, answer: bytes) -> Record:
        """Whose keys came."""
        return self._advance(key, SessionState.SHARES, keys_answer=answer)

    def keep_shares(self, key: SessionKey, answer: bytes) -> Record:
        """Whose shares came."""
        return self._advance(key, SessionState.SHARED, shares_answer=answer)

    def keep_masked(self, key: SessionKey, digest: str) -> Record:
        """The digest of the one masked update of this key set.

        Raises:
            SessionMoved: there is one already.
        """
        return self._advance(key, SessionState.MASKED, masked_digest=digest)

    def note_asking(self, key: SessionKey) -> None:
        """Note that the masked update is about to be offered for admission."""
        self._set(key, (SessionState.MASKED,), asked=1)

    def keep_receipt(self, key: SessionKey, receipt: str) -> Record:
        """The receipt, whose signature was verified."""
        return self._advance(key, SessionState.SUBMITTED, receipt=receipt)

    def keep_survivors(self, key: SessionKey, answer: bytes) -> Record:
        """The one set of survivors that is signed in this attempt.

        Raises:
            SessionMoved: there is one already.
        """
        return self._advance(key, SessionState.SIGNED, survivors=answer)

    def keep_revealed(self, key: SessionKey, summed: str) -> Record:
        """Of which sum shares are about to be revealed (`checks.summed_of`). It is kept when all else is gone."""
        return self._advance(key, SessionState.REVEALED, revealed_for=summed)

    def end(self, key: SessionKey, note: str) -> None:
        """Delete all that is secret; harmless where it is over already."""
        self._end("participation_id = ? AND round_number = ? AND attempt = ?", key, note)

    def end_before(self, participation_id: str, round_number: int, attempt: int = 0) -> None:
        """End all sessions of a participation before this attempt of this round: a later one is on."""
        where = "participation_id = ? AND (round_number < ? OR (round_number = ? AND attempt < ?))"
        self._end(where, (participation_id, round_number, round_number, attempt), "a later attempt is on")

    def end_of(self, datasets: Collection[str], note: str) -> None:
        """End all sessions of some datasets."""
        for record in self._records("TRUE"):
            if record.offer.dataset in datasets:
                self.end(record.key, note)

    def end_stale(self, age: timedelta) -> None:
        """End what began longer ago than `age`: nobody will ask for it any more."""
        self._end("began_at < ?", ((datetime.now(UTC) - age).isoformat(),), "nobody asked for it any more")

    def clean_log(self) -> None:
        """Take off the disk what is left of deleted secrets in the database's log, unless that was done.

        While somebody reads the journal (`isthmus-worker status`) it cannot be: then the next call does it. It waits
        for nobody.
        """
        if self._log_is_clean:
            return
        (patience_ms,) = self._connection.execute("PRAGMA busy_timeout").fetchone()
        self._connection.execute("PRAGMA busy_timeout = 0")
        try:
            with suppress(sqlite3.OperationalError):
                busy, *_ = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                self._log_is_clean = not busy
        finally:
            self._connection.execute(f"PRAGMA busy_timeout = {int(patience_ms)}")

    def note_rows(self, dataset: str, rows: int) -> None:
        """Remember that a dataset was announced with so many records."""
        self._connection.execute(
            "INSERT INTO declared_rows VALUES (?, ?, ?) ON CONFLICT DO NOTHING", (dataset, rows, _now())
        )

    def announced_rows(self, dataset: str) -> frozenset[int]:
        """All numbers of records with which a dataset was announced: any may be the one that a job counts it by."""
        rows = self._connection.execute("SELECT rows FROM declared_rows WHERE dataset = ?", (dataset,)).fetchall()
        return frozenset(int(row[0]) for row in rows)

    def _end(self, where: str, values: Sequence[Any], note: str) -> None:
        ended = self._connection.execute(
            "UPDATE sessions SET state = 'over', offer = NULL, secrets = NULL, keys_answer = NULL,"  # noqa: S608 - our own
            " shares_answer = NULL, survivors = NULL, receipt = NULL, ended_at = ?, note = ?"
            f" WHERE state <> 'over' AND ({where})",
            (_now(), note, *values),
        )
        if ended.rowcount > 0:
            self._log_is_clean = False
            self.clean_log()

    def _advance(self, key: SessionKey, to: SessionState, **columns: bytes | str) -> Record:
        self._set(key, (_ORDER[_ORDER.index(to) - 1],), to=to, **columns)
        return self.get(key)

    def _set(
        self,
        key: SessionKey,
        sources: Sequence[SessionState],
        *,
        to: SessionState | None = None,
        **columns: bytes | str | int,
    ) -> None:
        names = dict(columns) if to is None else {"state": to.value, **columns}
        places = ", ".join(f"{name} = ?" for name in names)
        marks = ", ".join("?" for _ in sources)
        changed = self._connection.execute(
            f"UPDATE sessions SET {places} WHERE participation_id = ? AND round_number = ? AND attempt = ?"  # noqa: S608 - our own names
            f" AND state IN ({marks})",
            (*names.values(), *key, *sources),
        )
        if changed.rowcount != 1:
            raise SessionMoved(key, to or sources[0])

    def _records(self, where: str, *values: Any) -> list[Record]:
        with closing(
            self._connection.execute(
                f"SELECT {_COLUMNS} FROM sessions WHERE state <> 'over' AND ({where}) ORDER BY began_at",  # noqa: S608
                values,
            )
        ) as rows:
            found = rows.fetchall()
        return [record for row in found if (record := self._read(row)) is not None]

    def _read(self, row: tuple[Any, ...]) -> Record | None:
        """A session; None: it began under another version, whose offer this one cannot read, and is over."""
        try:
            return _record(row)
        except ValidationError as error:
            key = SessionKey(*row[:3])
            words = {"participation": key.participation_id, "round": key.round_number, "attempt": key.attempt}
            odd = ", ".join(".".join(map(str, one["loc"])) for one in error.errors())
            log.error("session ended: its offer cannot be read", extra={**words, "reason": f"odd or missing: {odd}"})
            self.end(key, "this version cannot read its offer")
            return None


def _record(row: tuple[Any, ...]) -> Record:
    participation_id, number, attempt, state, offer, secrets, keys, shares, digest, asked, receipt, survivors = row
    return Record(
        key=SessionKey(participation_id, number, attempt),
        state=SessionState(state),
        offer=TaskOffer.model_validate_json(offer),
        secrets=secrets,
        keys_answer=keys,
        shares_answer=shares,
        masked_digest=digest,
        asked=bool(asked),
        receipt=receipt,
        survivors=survivors,
    )


def _now() -> str:
    return datetime.now(UTC).isoformat()
