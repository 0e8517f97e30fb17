"""The worker's own account of what left: written before it leaves, on the disk before we go on.

For one participation, round, model and job spec a worker noises once. The noised bytes are journalled (`prepared`); as
soon as the service admits them, and before any of them is sent, the spend is (`released`); a receipt whose signature
was verified ends it (`acknowledged`). Every later offer of the same round gets the same bytes. Only what was never
released may be `discarded`, and then be computed anew.

    prepared ──▶ released ──▶ acknowledged
        └──────▶ discarded

An admission that was asked for and never answered may have been given: such a release is not discarded but counted as
released, so that this account shows at least what the service's does.

What a participation is, its job, dataset, spec, privacy plan, seed and later the federation's statistics, is pinned
before the first work for it, and a dataset has one participation in a job: the account of one cannot be begun anew
under another name.

What a release costs is journalled with it, and is written into the ledger of its records (`ledger`) in the very
transaction that marks it as released. What may have been admitted unheard counts as spent until that is known. A
release whose cost does not fit into the budget beside all that is neither computed nor prepared.

Under secure aggregation what is noised once is a *vector* that is never sent: what leaves is masked anew with the keys
of each attempt. Its file is `Release.vector`; its `path`, of which bytes may be sent, is None for ever, and so is the
column `file`, for agents of versions that know of no vectors. It is kept until a later round of its participation,
because another attempt of the round must not noise again. Where shares of noise of several organizations protect it
(`where: distributed`), nothing has left before shares of the masks' secrets are revealed, and the spend is recorded
then. A vector that waits for its others takes up its part of the budget all the same as long as its session is open:
several of them must not overdraw together what each would leave room for.

SQLite in WAL mode with synchronous=FULL: a transition that returned is on the disk. `prepare` alone leaves that to the
`note_asking` that follows it: nothing may have been admitted before, and what is synced later takes along what was
written earlier. Files lie in `releases/` under names of their own; one without a row was never prepared, or is needed
no more, and is removed at the next start.
"""

import json
import sqlite3
import uuid
from collections.abc import Collection, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from isthmus.privacy.cost import Cost
from isthmus.wire.base import digest_of
from isthmus.wire.rounds import TaskKind, TaskOffer, UpdateReceipt
from isthmus_worker.files import move_durably, sync_directory, sync_file
from isthmus_worker.ledger import (
    HANDOVER,
    Account,
    BudgetRefused,
    Charge,
    LedgerDamaged,
    Ledgers,
    budget_objections,
    charge_for,
    costs_of,
)
from isthmus_worker.ledger import SCHEMA as LEDGER_SCHEMA
from isthmus_worker.lineage import SCHEMA as LINEAGE_SCHEMA
from isthmus_worker.lineage import Lineages
from isthmus_worker.secured.peers import SCHEMA as PEERS_SCHEMA
from isthmus_worker.secured.peers import Peers
from isthmus_worker.secured.records import SCHEMA as SESSIONS_SCHEMA
from isthmus_worker.secured.records import Sessions
from isthmus_worker.state import StateDir
from isthmus_worker.transaction import Transaction as _Transaction

KEEP_BYTES: Final = timedelta(days=30)
"""Noised bytes that nobody asked for any more are deleted after so long. Their row stays, and so does their spend."""


class ReleaseState(StrEnum):
    """Where a release stands."""

    PREPARED = "prepared"
    RELEASED = "released"
    ACKNOWLEDGED = "acknowledged"
    DISCARDED = "discarded"


TRANSITIONS: Final[Mapping[ReleaseState, frozenset[ReleaseState]]] = MappingProxyType(
    {
        ReleaseState.RELEASED: frozenset({ReleaseState.PREPARED}),
        ReleaseState.ACKNOWLEDGED: frozenset({ReleaseState.RELEASED}),
        ReleaseState.DISCARDED: frozenset({ReleaseState.PREPARED}),
    }
)
"""New state -> the states that it may be reached from."""

SPENT: Final = frozenset({ReleaseState.RELEASED, ReleaseState.ACKNOWLEDGED})
"""Something left, or may have left."""


class ReleaseKey(NamedTuple):
    """What is noised once."""

    participation_id: str
    round_number: int
    model_digest: str
    spec_digest: str
    kind: TaskKind


def key_of(offer: TaskOffer) -> ReleaseKey:
    """The release that an offer is about, whatever its task id, attempt or fence."""
    return ReleaseKey(
        str(offer.participation_id), offer.round_number, offer.model.digest, offer.spec_digest, offer.kind
    )


@dataclass(frozen=True)
class Release:
    """One row of the journal."""

    id: int
    key: ReleaseKey
    state: ReleaseState
    job: str
    dataset: str
    task_id: str
    """The task under which it was offered last."""
    fence: int
    digest: str
    size_bytes: int
    unanswered: bool
    """Admission was asked for, and no answer came: the service may have admitted it, and spent."""
    path: Path | None
    """Where the bytes that may be sent are; None: deleted, or there are none (see `vector`)."""
    vector: Path | None = None
    """Of a secured round: where the vector is, which is never sent as it is; None: deleted, or there is none."""
    secured: bool = False

    @property
    def file(self) -> Path | None:
        """What is kept of it."""
        return self.vector if self.secured else self.path


class TransitionRefused(Exception):
    """The journal does not allow that: a bug, or two agents on one journal."""

    def __init__(self, release: Release, to: ReleaseState) -> None:
        super().__init__(
            f"release {release.id} cannot become {to.value}: it is not {' or '.join(sorted(TRANSITIONS[to]))}"
        )


class BytesDamaged(Exception):
    """A file does not hold the bytes that were computed."""


_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS participations (
    participation_id TEXT PRIMARY KEY, job_id TEXT NOT NULL, dataset TEXT NOT NULL, spec_digest TEXT NOT NULL,
    job_seed TEXT NOT NULL, statistics_digest TEXT, seen_at TEXT NOT NULL, plan_digest TEXT, UNIQUE (dataset, job_id)
) STRICT;
CREATE TABLE IF NOT EXISTS releases (
    id INTEGER PRIMARY KEY,
    participation_id TEXT NOT NULL, round_number INTEGER NOT NULL,
    model_digest TEXT NOT NULL, spec_digest TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('statistics', 'train', 'evaluate')),
    state TEXT NOT NULL CHECK (state IN ('prepared', 'released', 'acknowledged', 'discarded')),
    job TEXT NOT NULL, dataset TEXT NOT NULL, task_id TEXT NOT NULL, fence INTEGER NOT NULL,
    digest TEXT NOT NULL, size_bytes INTEGER NOT NULL, unanswered INTEGER NOT NULL DEFAULT 0, file TEXT,
    clip_norm REAL, noise_multiplier REAL NOT NULL,
    prepared_at TEXT NOT NULL, released_at TEXT, acknowledged_at TEXT, discarded_at TEXT, note TEXT, receipt TEXT,
    lineage TEXT, charge TEXT, secured INTEGER NOT NULL DEFAULT 0, vector TEXT
) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS one_release ON releases
    (participation_id, round_number, model_digest, spec_digest, kind) WHERE state <> 'discarded';
CREATE TABLE IF NOT EXISTS results (
    participation_id TEXT NOT NULL, round_number INTEGER NOT NULL, kind TEXT NOT NULL, job TEXT NOT NULL,
    dataset TEXT NOT NULL, metrics TEXT NOT NULL, at TEXT NOT NULL, PRIMARY KEY (participation_id, round_number, kind)
) STRICT;
CREATE TABLE IF NOT EXISTS handovers (
    lineage TEXT NOT NULL, entries INTEGER NOT NULL, dataset TEXT NOT NULL, given INTEGER NOT NULL,
    document TEXT NOT NULL, told INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (lineage, entries)
) STRICT;
"""
_ADDED: Final[Mapping[str, Mapping[str, str]]] = MappingProxyType(
    {
        "participations": {"plan_digest": "TEXT"},
        "releases": {"lineage": "TEXT", "charge": "TEXT", "secured": "INTEGER NOT NULL DEFAULT 0", "vector": "TEXT"},
    }
)
"""Columns that journals of earlier versions lack. What those versions released has no charge, and is in no ledger."""
_HELD: Final = "(file IS NOT NULL OR vector IS NOT NULL)"
_INDEXES: Final = f"""
CREATE INDEX IF NOT EXISTS releases_of_a_participation ON releases
    (participation_id, kind, round_number, state, unanswered);
CREATE INDEX IF NOT EXISTS prepared_releases ON releases (participation_id, round_number) WHERE state = 'prepared';
CREATE INDEX IF NOT EXISTS prepared_charges ON releases (lineage) WHERE state = 'prepared';
CREATE INDEX IF NOT EXISTS held_releases ON releases (participation_id, round_number)
    WHERE {_HELD};
"""
"""What a task asks costs the same after years: no question of it reads every release there ever was."""
_MAYBE_SPENT: Final = "(state IN ('released', 'acknowledged') OR (state = 'prepared' AND unanswered = 1))"
_WAITING: Final = (
    "(secured = 1 AND EXISTS (SELECT 1 FROM sessions s WHERE s.participation_id = releases.participation_id"
    " AND s.round_number = releases.round_number AND s.state <> 'over'))"
)
_COLUMNS: Final = (
    "id, participation_id, round_number, model_digest, spec_digest, kind, state, job, dataset, task_id, fence,"
    " digest, size_bytes, unanswered, file, secured, vector"
)


class Journal:
    """The journal of one worker. Used by one thread; whoever opens it holds the state directory's lock."""

    def __init__(self, state: StateDir, connection: sqlite3.Connection) -> None:
        self._state = state
        self._connection = connection
        self.ledgers = Ledgers(connection)
        self.lineages = Lineages(connection)
        self.sessions = Sessions(connection)
        self.peers = Peers(connection)

    @classmethod
    def open(cls, state: StateDir) -> "Journal":
        """The journal of a state directory, made if need be."""
        connection = sqlite3.connect(state.journal, isolation_level=None)
        state.journal.chmod(0o600)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA secure_delete = ON")  # secrets of secured rounds that are over
        connection.executescript(_SCHEMA + LINEAGE_SCHEMA + LEDGER_SCHEMA + SESSIONS_SCHEMA + PEERS_SCHEMA)
        _bring_up_to_date(connection)
        connection.executescript(_INDEXES)
        sync_directory(state.root)
        found = cls(state, connection)
        found.sessions.clean_log()  # whoever was killed may have had no time for it
        return found

    @classmethod
    def look_into(cls, state: StateDir) -> "Journal":
        """The journal for reading only, also while an agent works with it.

        Raises:
            sqlite3.OperationalError: there is none yet.
        """
        return cls(
            state, sqlite3.connect(f"{state.journal.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None)
        )

    def close(self) -> None:
        """Let go of the database."""
        self._connection.close()

    @property
    def connection(self) -> sqlite3.Connection:
        """The database, for what is kept beside releases."""
        return self._connection

    def recover(self) -> None:
        """Put in order what a killed agent may have left: files without a row, and bytes that are no longer needed.

        A prepared release whose bytes are gone was never released: it is given up. A released one stays what it is.
        """
        self.sessions.end_stale(KEEP_BYTES)
        self.tidy()
        for release in self._releases(f"state <> 'discarded' AND {_HELD}", by="held_releases"):
            if release.file is not None and not release.file.exists():
                if release.state is ReleaseState.PREPARED:
                    self.give_up(release, "its bytes are gone")
                else:
                    self._let_go(release)
        rows = self._connection.execute(f"SELECT coalesce(file, vector) FROM releases WHERE {_HELD}")  # noqa: S608 - our own
        known = {str(row[0]) for row in rows}
        for path in self._state.releases.iterdir():
            if path.name not in known:
                path.unlink()

    def tidy(self) -> None:
        """Delete bytes that nobody has asked for in a long time. To be called now and then, while nothing is sent."""
        cutoff = (datetime.now(UTC) - KEEP_BYTES).isoformat()
        self._drop_bytes("state = 'acknowledged' AND (secured = 0 OR acknowledged_at < ?)", cutoff)
        for release in self._releases("state = 'prepared' AND prepared_at < ?", cutoff, by="prepared_releases"):
            self.give_up(release, "never admitted")
        self._drop_bytes("state = 'released' AND released_at < ?", cutoff)
        self.sessions.clean_log()

    def pin(self, offer: TaskOffer) -> None:
        """Hold on to what the offer's participation is, and to the federation's statistics once they are known.

        To be called before any work for an offer that `ledger_objections` lets pass.
        """
        statistics, plan = _digest_of_statistics(offer), _digest_of_plan(offer)
        pinned = self._connection.execute(
            "SELECT statistics_digest, plan_digest FROM participations WHERE participation_id = ?",
            (str(offer.participation_id),),
        ).fetchone()
        if pinned is not None and (pinned[0] is not None or statistics is None) and pinned[1] is not None:
            return  # a write of nothing new would still have to reach the disk
        with _Transaction(self._connection) as connection:
            connection.execute(
                "INSERT INTO participations (participation_id, job_id, dataset, spec_digest, job_seed,"
                " statistics_digest, seen_at, plan_digest) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
                " ON CONFLICT (participation_id) DO NOTHING",
                (*_identity_of(offer).values(), statistics, _now(), plan),
            )
            connection.execute(
                "UPDATE participations SET statistics_digest = coalesce(statistics_digest, ?),"
                " plan_digest = coalesce(plan_digest, ?) WHERE participation_id = ?",
                (statistics, plan, str(offer.participation_id)),
            )

    def find(self, key: ReleaseKey) -> Release | None:
        """What was noised for `key`, unless it was discarded."""
        found = self._releases(
            "participation_id = ? AND round_number = ? AND model_digest = ? AND spec_digest = ? AND kind = ?"
            " AND state <> 'discarded'",
            *key,
        )
        return found[0] if found else None

    def prepare(
        self,
        offer: TaskOffer,
        draft: Path,
        *,
        digest: str,
        size_bytes: int,
        metrics: Mapping[str, float],
        account: Account,
    ) -> Release:
        """Take over the noised bytes in `draft`, what they cost, and the results that stay here. Nothing has left yet.

        Of a secured round the draft holds the vector, which no later call gives out as bytes to send.

        The bytes are on the disk when this returns, the row as soon as `note_asking` returns: the name of a file that
        no row knows is removed at the next start, and what nobody could ask for was never released.

        Raises:
            BytesDamaged: the file is not as long as the child says.
            BudgetRefused: what it costs does not fit into the budget.
            sqlite3.IntegrityError: this was noised before.
        """
        charge = charge_for(offer, account.lineage)
        if found := self._budget_objections(offer, charge, account):
            draft.unlink(missing_ok=True)
            raise BudgetRefused(" ".join(found))
        if draft.stat().st_size != size_bytes:  # digested as it was written; the service digests it once more
            raise BytesDamaged(f"{draft} does not hold the bytes that the training process named")
        key, name = key_of(offer), f"{uuid.uuid4().hex}.safetensors"
        sync_file(draft)
        move_durably(draft, self._state.releases / name)
        now, plan, secured = _now(), offer.plan, offer.secured is not None
        with _Transaction(self._connection, synced=False) as connection:
            connection.execute(
                "INSERT INTO releases (participation_id, round_number, model_digest, spec_digest, kind, state,"
                " job, dataset, task_id, fence, digest, size_bytes, file, prepared_at, clip_norm, noise_multiplier,"
                " lineage, charge, secured, vector)"
                " VALUES (?, ?, ?, ?, ?, 'prepared', ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *key,
                    offer.job,
                    offer.dataset,
                    str(offer.task_id),
                    offer.fence,
                    digest,
                    size_bytes,
                    None if secured else name,
                    now,
                    offer.spec.privacy.clip_norm,
                    plan.noise_multiplier if plan is not None else 0.0,
                    charge.lineage,
                    charge.to_json(),
                    int(secured),
                    name if secured else None,
                ),
            )
            if metrics:
                connection.execute(
                    "INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (
                        key.participation_id,
                        key.round_number,
                        key.kind,
                        offer.job,
                        offer.dataset,
                        json.dumps(dict(metrics)),
                        now,
                    ),
                )
        release = self.find(key)
        assert release is not None
        return release

    def readdress(self, release: Release, offer: TaskOffer) -> Release:
        """Note the task under which the same bytes are offered now."""
        self._connection.execute(
            "UPDATE releases SET task_id = ?, fence = ? WHERE id = ?", (str(offer.task_id), offer.fence, release.id)
        )
        return self._releases("id = ?", release.id)[0]

    def note_asking(self, release: Release, unanswered: bool) -> None:
        """Note that admission is being asked for, or that the service has answered and did not admit.

        A service may admit, and spend, without our hearing of it. Where that is possible the release is not discarded
        but counted as spent: this ledger may show more than the service's, never less.
        """
        self._connection.execute("UPDATE releases SET unanswered = ? WHERE id = ?", (int(unanswered), release.id))

    def mark_released(self, release: Release) -> None:
        """Record the spend, here and in the ledger of the records, in one transaction that is on the disk at the end.

        To be called when the service has admitted the bytes and before any of them is sent.
        """
        try:
            with _Transaction(self._connection):
                self._advance(release, ReleaseState.RELEASED, released_at=_now())
                self._charge(release)
        except BaseException:
            self.ledgers.forget_sums()
            raise

    def mark_acknowledged(self, release: Release, receipt: UpdateReceipt) -> None:
        """Keep a receipt whose signature was verified; the bytes are not needed any more. A vector is: see above."""
        told = {"acknowledged_at": _now(), "receipt": receipt.model_dump_json()}
        if release.secured:
            self._advance(release, ReleaseState.ACKNOWLEDGED, **told)
            return
        self._advance(release, ReleaseState.ACKNOWLEDGED, **told, file=None)
        _unlink(release)

    def discard(self, release: Release, note: str) -> None:
        """Forget bytes that were never released: nothing left, nothing is spent."""
        self._advance(release, ReleaseState.DISCARDED, discarded_at=_now(), note=note, file=None, vector=None)
        _unlink(release)

    def give_up(self, release: Release, note: str) -> ReleaseState:
        """Discard a prepared release, or count it as spent where the service may have admitted it unheard."""
        if release.unanswered:
            self.mark_released(release)
            return ReleaseState.RELEASED
        self.discard(release, note)
        return ReleaseState.DISCARDED

    def give_up_prepared(self, datasets: Collection[str], note: str) -> None:
        """Forget what was computed for these datasets and never asked for."""
        for release in self._releases("state = 'prepared'", by="prepared_releases"):
            if release.dataset in datasets:
                self.give_up(release, note)

    def retire_before(self, participation_id: str, round_number: int) -> None:
        """A later round is on: what earlier ones left unsent is discarded, and their bytes are deleted. Spends stay."""
        earlier = "participation_id = ? AND round_number < ?"
        for release in self._releases(f"{earlier} AND state = 'prepared'", participation_id, round_number):
            self.give_up(release, "its round is over")
        self._drop_bytes(f"{earlier} AND state IN ('released', 'acknowledged')", participation_id, round_number)
        self.sessions.end_before(participation_id, round_number)

    def unsettled(self) -> list[Release]:
        """What left or may have left, is not acknowledged, and has its bytes. No vector is among it."""
        where = f"state <> 'acknowledged' AND {_MAYBE_SPENT} AND {_HELD} AND secured = 0"
        return self._releases(where, by="held_releases")

    def _charge(self, release: Release) -> None:
        """Write into the ledger what a release costs. Those of earlier versions have no charge, and no budget."""
        job_id, lineage, charge = self._connection.execute(
            "SELECT p.job_id, r.lineage, r.charge FROM releases r LEFT JOIN participations p USING (participation_id)"
            " WHERE r.id = ?",
            (release.id,),
        ).fetchone()
        if charge is not None:
            key = release.key
            body = {
                "kind": key.kind.value,
                "participation_id": key.participation_id,
                "job_id": job_id,
                "job": release.job,
                "dataset": release.dataset,
                "round_number": key.round_number,
                "model_digest": key.model_digest,
                "digest": release.digest,
            }
            self.ledgers.append(lineage, {**json.loads(charge), **body})

    def _budget_objections(self, offer: TaskOffer, charge: Charge, account: Account) -> list[str]:
        """Why the release for `offer` does not fit into the budget beside what left, or may have left."""
        mine = self.find(key_of(offer))
        if mine is not None and (mine.unanswered or mine.state in SPENT):
            return []  # it is counted already: sent again, it costs nothing
        spent = self.spent(account.lineage, beside=offer)
        claimed = self.ledgers.claimed(str(offer.participation_id))
        for participation_id, _cost, job_cost in self._unheard(account.lineage, offer):
            claimed = claimed + job_cost if participation_id == str(offer.participation_id) else claimed
        return budget_objections(offer, charge, account.budget, spent=spent, claimed=claimed)

    def spent(self, lineage: str, *, beside: TaskOffer | None = None) -> Cost:
        """What left or may have left of these records, and what waits in open sessions to leave.

        Args:
            lineage: of the records.
            beside: leave out what waits for this offer, or for an earlier round of its participation.
        """
        spent = self.ledgers.total(lineage).cost
        for _participation, cost, _job_cost in self._unheard(lineage, beside):
            spent = spent + cost
        return spent

    def _unheard(self, lineage: str, beside: TaskOffer | None) -> list[tuple[str, Cost, Cost]]:
        """Participation, cost and cost to its job of what may have been admitted or waits, and is in no ledger yet."""
        mine = (str(beside.participation_id), beside.round_number) if beside is not None else (None, None)
        rows = self._connection.execute(
            "SELECT participation_id, charge FROM releases WHERE lineage = ? AND state = 'prepared'"  # noqa: S608 - our own
            " AND charge IS NOT NULL AND (unanswered = 1 OR"
            f" ({_WAITING} AND (participation_id IS NOT ? OR round_number > ?)))",
            (lineage, *mine),
        ).fetchall()
        return [(str(participation_id), *costs_of(json.loads(charge))) for participation_id, charge in rows]

    def ledger_objections(self, offer: TaskOffer, max_rounds: int, account: Account) -> list[str]:
        """Why this account of ours does not allow a release for `offer`; empty if it does. No work is done before.

        A round is noised for one model only: an offer of the same round with another model or spec would have the same
        records noised again. No more rounds are released than the grant and our own policy say, and statistics and
        the final evaluation once each. And a participation stays what it was when we first saw it.
        """
        key, found = key_of(offer), self._contradictions(offer)
        # Of a secured round also what was only computed: it may be in a masked update that waits for its shares.
        counts = _MAYBE_SPENT if offer.secured is None else "state <> 'discarded'"
        if self._connection.execute(
            "SELECT 1 FROM releases WHERE participation_id = ? AND round_number = ? AND state <> 'discarded'"  # noqa: S608 - our own
            f" AND NOT (model_digest = ? AND spec_digest = ? AND kind = ?) AND {counts} LIMIT 1",
            key,
        ).fetchone():
            found.append(f"Round {key.round_number} was released before, for another model or another spec.")
        others = self._other_rounds_spent(key)
        if key.kind is not TaskKind.TRAIN and others:
            found.append(f"A round of kind {key.kind.value!r} was released before; there is one in a job.")
        mine = self.find(key)
        if mine is not None and mine.file is None:
            found.append(f"Round {key.round_number} was released before, and its bytes are no longer held.")
        allowed = min(max_rounds, offer.grant_rounds)
        if key.kind is TaskKind.TRAIN and others >= allowed:
            found.append(f"max_rounds: {others} rounds were released for this grant; at most {allowed} pass.")
        return found + self._budget_objections(offer, charge_for(offer, account.lineage), account)

    def _other_rounds_spent(self, key: ReleaseKey) -> int:
        """Of how many rounds of the same participation and kind something left or may have left, this one apart."""
        row = self._connection.execute(
            "SELECT count(DISTINCT round_number) FROM releases WHERE participation_id = ? AND kind = ?"  # noqa: S608 - our own
            f" AND round_number <> ? AND {_MAYBE_SPENT}",
            (key.participation_id, key.kind, key.round_number),
        ).fetchone()
        return int(row[0])

    def _contradictions(self, offer: TaskOffer) -> list[str]:
        """How `offer` differs from what was pinned."""
        now = _identity_of(offer)
        row = self._connection.execute(
            "SELECT participation_id, job_id, dataset, spec_digest, job_seed, statistics_digest, plan_digest"
            " FROM participations WHERE participation_id = ?",
            (now["participation_id"],),
        ).fetchone()
        if row is None:
            other = self._connection.execute(
                "SELECT 1 FROM participations WHERE dataset = ? AND job_id = ?", (now["dataset"], now["job_id"])
            ).fetchone()
            return ["This dataset takes part in the job under another participation already."] if other else []
        *pinned, statistics, plan = row
        changed = [name for name, before in zip(now, pinned, strict=True) if now[name] != before]
        if offer.statistics is not None and statistics not in (None, _digest_of_statistics(offer)):
            changed.append("statistics")
        if plan not in (None, _digest_of_plan(offer)):
            changed.append("privacy plan")
        if not changed:
            return []
        return [f"The participation is not what it was when this worker first saw it: another {', '.join(changed)}."]

    def spends(self) -> list[dict[str, Any]]:
        """How often something left or may have left, by job, dataset, kind and protection."""
        rows = self._connection.execute(
            "SELECT job, dataset, kind, json_extract(charge, '$.mode'), clip_norm, noise_multiplier, count(*)"  # noqa: S608 - our own
            f" FROM releases WHERE {_MAYBE_SPENT} GROUP BY 1, 2, 3, 4, 5, 6 ORDER BY min(id)"
        ).fetchall()
        names = ("job", "dataset", "kind", "mode", "clip_norm", "noise_multiplier", "releases")
        return [dict(zip(names, row, strict=True)) for row in rows]

    def verify(self) -> None:
        """Look whether the ledgers are what this worker wrote, and hold every release that was charged.

        Raises:
            LedgerDamaged: they are not, or do not.
        """
        self.ledgers.verify()
        held = {
            (plain["participation_id"], plain["round_number"], plain["kind"], plain["digest"])
            for lineage in self.ledgers.lineages()
            for plain in (entry.plain for entry in self.ledgers.entries(lineage))
            if plain["kind"] != HANDOVER
        }
        for release in self._releases("state IN ('released', 'acknowledged') AND charge IS NOT NULL"):
            key = release.key
            if (key.participation_id, key.round_number, key.kind, release.digest) not in held:
                raise LedgerDamaged(
                    self._lineage_of(release),
                    f"the entry of round {key.round_number} of job {release.job!r} is missing",
                )

    def _lineage_of(self, release: Release) -> str:
        return str(self._connection.execute("SELECT lineage FROM releases WHERE id = ?", (release.id,)).fetchone()[0])

    def counts(self) -> dict[str, int]:
        """Number of releases by state."""
        rows = self._connection.execute("SELECT state, count(*) FROM releases GROUP BY state").fetchall()
        return {state.value: 0 for state in ReleaseState} | {str(state): int(number) for state, number in rows}

    def results(self, job: str | None = None) -> list[dict[str, Any]]:
        """What was measured here, oldest first; of one job, by its name or id, or of all.

        `measured_round` is the round whose checkpoint `holdout/...` is of; 0 is the initial model.
        """
        rows = self._connection.execute(
            "SELECT r.job, p.job_id, r.participation_id, r.dataset, r.round_number, r.kind, r.metrics, r.at"
            " FROM results r LEFT JOIN participations p USING (participation_id)"
            " WHERE ?1 IS NULL OR r.job = ?1 OR p.job_id = ?1 ORDER BY r.at, r.round_number",
            (job,),
        ).fetchall()
        names = ("job", "job_id", "participation_id", "dataset", "round_number", "kind", "metrics", "at")
        return [
            {
                **dict(zip(names, row, strict=True)),
                "metrics": json.loads(row[6]),
                "measured_round": max(0, int(row[4]) - 1),
            }
            for row in rows
        ]

    def _advance(self, release: Release, to: ReleaseState, **columns: str | None) -> None:
        places = ", ".join(f"{name} = ?" for name in columns)
        sources = sorted(TRANSITIONS[to])
        marks = ", ".join("?" for _ in sources)
        changed = self._connection.execute(
            f"UPDATE releases SET state = ?, {places} WHERE id = ? AND state IN ({marks})",  # noqa: S608 - our own names
            (to, *columns.values(), release.id, *sources),
        )
        if changed.rowcount != 1:
            raise TransitionRefused(release, to)

    def _drop_bytes(self, where: str, *values: Any) -> None:
        for release in self._releases(f"({where}) AND {_HELD}", *values, by="held_releases"):
            self._let_go(release)
            _unlink(release)

    def _let_go(self, release: Release) -> None:
        self._connection.execute("UPDATE releases SET file = NULL, vector = NULL WHERE id = ?", (release.id,))

    def _releases(self, where: str, *values: Any, by: str | None = None) -> list[Release]:
        """Releases in their order; `by`: an index that is taken where SQLite would read all of them for that order."""
        table = "releases" if by is None else f"releases INDEXED BY {by}"
        with closing(
            self._connection.execute(f"SELECT {_COLUMNS} FROM {table} WHERE {where} ORDER BY id", values)  # noqa: S608
        ) as rows:
            return [self._release(row) for row in rows]

    def _release(self, row: tuple[Any, ...]) -> Release:
        number, *key, state, job, dataset, task_id, fence, digest, size_bytes, unanswered, file, secured, vector = row
        return Release(
            id=number,
            key=ReleaseKey(key[0], key[1], key[2], key[3], TaskKind(key[4])),
            state=ReleaseState(state),
            job=job,
            dataset=dataset,
            task_id=task_id,
            fence=fence,
            digest=digest,
            size_bytes=size_bytes,
            unanswered=bool(unanswered),
            path=self._state.releases / file if file is not None and not secured else None,
            vector=self._state.releases / vector if vector is not None else None,
            secured=bool(secured),
        )


def _identity_of(offer: TaskOffer) -> dict[str, str]:
    """What never changes in a participation, by column."""
    return {
        "participation_id": str(offer.participation_id),
        "job_id": str(offer.job_id),
        "dataset": offer.dataset,
        "spec_digest": offer.spec_digest,
        "job_seed": offer.job_seed,
    }


def _digest_of_plan(offer: TaskOffer) -> str:
    return digest_of(offer.plan) if offer.plan is not None else "none"


def _digest_of_statistics(offer: TaskOffer) -> str | None:
    return digest_of(offer.statistics) if offer.statistics is not None else None


def _bring_up_to_date(connection: sqlite3.Connection) -> None:
    """Add what journals of earlier versions lack; their rows stay as they are."""
    for table, columns in _ADDED.items():
        held = {str(row[1]) for row in connection.execute(f"PRAGMA table_info({table})")}
        for name, kind in columns.items():
            if name not in held:
                connection.execute(f"ALTER TABLE {table} ADD COLUMN {name} {kind}")


def _unlink(release: Release) -> None:
    """Delete the bytes, once no row names them any more: killed in between, the next start deletes them."""
    if release.file is not None:
        release.file.unlink(missing_ok=True)


def _now() -> str:
    return datetime.now(UTC).isoformat()
