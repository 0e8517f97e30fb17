"""The worker's own ledgers: what left of which records, added up in whole numbers, in an order nobody can change.

Ledgers belong to lineages (`lineage`), not to names. An entry is written in the transaction that marks a release as
released, before a byte of it is sent, and is never changed: every entry carries a hash over itself and the one before,
and the sum over all is kept beside. `verify` computes all of it again when the agent starts.

The costs are those of `isthmus.privacy.planning`, computed here from the job's spec and plan; what the service says
that something costs, or that a budget still holds, counts for nothing.
"""

import hashlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from isthmus.privacy.cost import Cost, Limit, fits
from isthmus.privacy.planning import round_cost, round_event
from isthmus.privacy.rdp import ORDERS_VERSION
from isthmus.wire.base import canonical_json
from isthmus.wire.datasets import Budget
from isthmus.wire.privacy import PrivacyMode, PrivacyUnit
from isthmus.wire.rounds import TaskOffer
from isthmus_worker.settings import DatasetSettings

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS ledgers (
    lineage TEXT PRIMARY KEY, epsilon REAL, delta REAL, nano TEXT NOT NULL, draws INTEGER NOT NULL,
    entries INTEGER NOT NULL, unaccounted INTEGER NOT NULL, head TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS ledger_entries (
    lineage TEXT NOT NULL, sequence INTEGER NOT NULL, body TEXT NOT NULL, previous_hash TEXT NOT NULL,
    hash TEXT NOT NULL, PRIMARY KEY (lineage, sequence)
) STRICT;
CREATE TRIGGER IF NOT EXISTS entries_stay BEFORE UPDATE ON ledger_entries
    BEGIN SELECT RAISE(ABORT, 'entries of a ledger are never changed'); END;
CREATE TRIGGER IF NOT EXISTS entries_remain BEFORE DELETE ON ledger_entries
    BEGIN SELECT RAISE(ABORT, 'entries of a ledger are never deleted'); END;
"""
FIRST: Final = "0" * 64
"""What stands for the entry before the first one."""
HANDOVER: Final = "handover"
"""The kind of an entry that says that the ledger went to another worker."""
_ROUNDING: Final = 1 + 1e-9


class LedgerDamaged(Exception):
    """A ledger is not what this worker wrote."""

    def __init__(self, lineage: str, what: str) -> None:
        super().__init__(
            f"The ledger of lineage {lineage[:12]} was changed by hand or is damaged: {what}. This worker releases "
            "nothing until its journal.sqlite is restored from a backup that holds every release since."
        )


class BudgetRefused(Exception):
    """A release would cost more than is left. The message is for the service too."""


@dataclass(frozen=True)
class Account:
    """What a dataset's releases are charged to."""

    lineage: str
    budget: Budget | None
    """As it is configured now; the smallest, where several datasets hold the same records."""


def accounts(datasets: Sequence[tuple[DatasetSettings, str]]) -> dict[str, Account]:
    """Name -> account of datasets with their lineages. Those that hold the same records share the smallest budget."""
    found = dict[str, Account]()
    for dataset, lineage in datasets:
        budget = dataset.budget
        for other, its_lineage in datasets:
            if budget is not None and other.budget is not None and its_lineage == lineage:
                budget = Budget(
                    epsilon=min(budget.epsilon, other.budget.epsilon), delta=min(budget.delta, other.budget.delta)
                )
        found[dataset.name] = Account(lineage, budget)
    return found


@dataclass(frozen=True)
class Charge:
    """What one release costs, by our own arithmetic."""

    lineage: str
    mode: PrivacyMode
    event: Mapping[str, Any] | None
    """The mechanism as the ledger counts it; None where nothing is claimed or nothing leaves."""
    cost: Cost
    """For one record more or less."""
    claimed: Cost
    """For what the job claims: less than `cost` where noise for organizations is central."""
    elements: int
    unaccounted: bool
    """Something leaves that nothing bounds."""

    def to_json(self) -> str:
        """The charge as the journal keeps it with a release."""
        plain = {
            "lineage": self.lineage,
            "mode": self.mode.value,
            "event": self.event,
            "orders": ORDERS_VERSION,
            "nano": list(self.cost.nano),
            "draws": self.cost.draws,
            "claimed_nano": None if self.claimed == self.cost else list(self.claimed.nano),
            "elements": self.elements,
            "unaccounted": self.unaccounted,
        }
        return canonical_json(plain).decode()


def charge_for(offer: TaskOffer, lineage: str) -> Charge:
    """What the release for an offer costs that has passed `contradictions`. The first of a kind takes tens of ms."""
    spec, plan, elements = offer.spec, offer.plan, offer.model_manifest.averaged_elements
    if plan is None or spec.privacy.unit is PrivacyUnit.NONE:
        leaves = bool(offer.upload_manifest.tensors)
        return Charge(lineage, PrivacyMode.NONE, None, Cost.zero(), Cost.zero(), elements, leaves)
    event = round_event(spec, plan, offer.round_number, elements, ledger=True)
    return Charge(
        lineage=lineage,
        mode=spec.privacy.mode,
        event=event.to_json() if event is not None else None,
        cost=round_cost(spec, plan, offer.round_number, elements, ledger=True),
        claimed=round_cost(spec, plan, offer.round_number, elements),
        elements=elements,
        unaccounted=False,
    )


@dataclass(frozen=True)
class Entry:
    """One line of a ledger."""

    lineage: str
    sequence: int
    """From 1."""
    body: str
    """Canonical JSON: of a release its identity and its charge, of a handover who gave it to whom."""
    previous_hash: str
    hash: str

    @property
    def plain(self) -> dict[str, Any]:
        """The body, read."""
        found: dict[str, Any] = json.loads(self.body)
        return found

    @classmethod
    def after(cls, lineage: str, sequence: int, previous_hash: str, body: Mapping[str, Any]) -> "Entry":
        """The entry that follows the one with `previous_hash`."""
        text = canonical_json(body).decode()
        return cls(lineage, sequence, text, previous_hash, hash_of(lineage, sequence, previous_hash, text))


def hash_of(lineage: str, sequence: int, previous_hash: str, body: str) -> str:
    """SHA-256 over an entry and, through the hash before it, over all that came earlier."""
    text = f"isthmus/worker-ledger/v1\n{lineage}\n{sequence}\n{previous_hash}\n{body}"
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Total:
    """What the entries of a ledger come to."""

    cost: Cost
    entries: int
    unaccounted: int
    head: str

    @classmethod
    def none(cls) -> "Total":
        """Of a ledger without entries."""
        return cls(Cost.zero(), 0, 0, FIRST)

    def plus(self, entry: Entry) -> "Total":
        """With one entry more."""
        plain = entry.plain
        unaccounted = 0 if plain["kind"] == HANDOVER else int(plain["unaccounted"])
        return Total(self.cost + costs_of(plain)[0], self.entries + 1, self.unaccounted + unaccounted, entry.hash)


def total_of(lineage: str, entries: Sequence[Entry]) -> Total:
    """The sum of a chain of entries, from the first one on.

    Raises:
        LedgerDamaged: they are no such chain.
    """
    total = Total.none()
    for number, entry in enumerate(entries, start=1):
        if (entry.lineage, entry.sequence, entry.previous_hash) != (lineage, number, total.head):
            raise LedgerDamaged(lineage, f"entry {number} is missing, or does not follow the one before")
        if entry.hash != hash_of(lineage, number, entry.previous_hash, entry.body):
            raise LedgerDamaged(lineage, f"entry {number} does not have the hash that it was written with")
        try:
            total = total.plus(entry)
        except (ValueError, KeyError, TypeError) as error:
            raise LedgerDamaged(lineage, f"entry {number} is no entry") from error
    return total


def costs_of(plain: Mapping[str, Any]) -> tuple[Cost, Cost]:
    """The cost, and the cost as its job counts it, of a charge or of an entry's body.

    Raises:
        ValueError, KeyError, TypeError: it is neither.
    """
    if plain.get("kind") == HANDOVER:
        return Cost.zero(), Cost.zero()
    if plain["orders"] != ORDERS_VERSION:
        raise ValueError("counted over other orders")
    cost = Cost(tuple(map(int, plain["nano"])), int(plain["draws"]))
    claimed = plain["claimed_nano"]
    return cost, cost if claimed is None else Cost(tuple(map(int, claimed)), cost.draws)


class Ledgers:
    """All ledgers of this worker. Part of the journal's database."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._claimed: dict[str, Cost] | None = None

    def total(self, lineage: str) -> Total:
        """What was spent of these records, and how often without any bound."""
        row = self._connection.execute(
            "SELECT nano, draws, entries, unaccounted, head FROM ledgers WHERE lineage = ?", (lineage,)
        ).fetchone()
        if row is None:
            return Total.none()
        return Total(Cost(tuple(json.loads(row[0])), int(row[1])), int(row[2]), int(row[3]), str(row[4]))

    def entries(self, lineage: str) -> list[Entry]:
        """All entries, the first one first."""
        rows = self._connection.execute(
            "SELECT lineage, sequence, body, previous_hash, hash FROM ledger_entries WHERE lineage = ?"
            " ORDER BY sequence",
            (lineage,),
        )
        return [Entry(*row) for row in rows]

    def lineages(self) -> list[str]:
        """All lineages that have a ledger, or a line of one."""
        rows = self._connection.execute("SELECT lineage FROM ledgers UNION SELECT lineage FROM ledger_entries")
        return [str(row[0]) for row in rows]

    def claimed(self, participation_id: str) -> Cost:
        """What was released for a participation, as its job counts it."""
        if self._claimed is None:
            self._claimed = {}
            for (body,) in self._connection.execute("SELECT body FROM ledger_entries").fetchall():
                self._count(json.loads(body))
        return self._claimed.get(participation_id, Cost.zero())

    def append(self, lineage: str, body: Mapping[str, Any]) -> Entry:
        """Write an entry, for good. Within the caller's transaction.

        Args:
            lineage: whose ledger.
            body: `kind`, and for a release all of its `Charge` and what it is a release of.
        """
        before = self.total(lineage)
        entry = Entry.after(lineage, before.entries + 1, before.head, {**body, "at": datetime.now(UTC).isoformat()})
        self.put(entry)
        if self._claimed is not None:
            self._count(entry.plain)
        return entry

    def put(self, entry: Entry) -> None:
        """Take over an entry that follows the last one. Within the caller's transaction."""
        after = self.total(entry.lineage).plus(entry)
        self._connection.execute(
            "INSERT INTO ledger_entries VALUES (?, ?, ?, ?, ?)",
            (entry.lineage, entry.sequence, entry.body, entry.previous_hash, entry.hash),
        )
        self._connection.execute(
            "INSERT INTO ledgers (lineage, nano, draws, entries, unaccounted, head) VALUES (?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (lineage) DO UPDATE SET nano = excluded.nano, draws = excluded.draws,"
            " entries = excluded.entries, unaccounted = excluded.unaccounted, head = excluded.head",
            (
                entry.lineage,
                json.dumps(after.cost.nano),
                after.cost.draws,
                after.entries,
                after.unaccounted,
                after.head,
            ),
        )

    def note_budget(self, account: Account) -> None:
        """Keep the budget as it is configured now, for those who look into the journal."""
        budget = account.budget
        self._connection.execute(
            "INSERT INTO ledgers VALUES (?, ?, ?, ?, 0, 0, 0, ?)"
            " ON CONFLICT (lineage) DO UPDATE SET epsilon = excluded.epsilon, delta = excluded.delta",
            (
                account.lineage,
                budget.epsilon if budget is not None else None,
                budget.delta if budget is not None else None,
                json.dumps(Cost.zero().nano),
                FIRST,
            ),
        )

    def budget(self, lineage: str) -> Budget | None:
        """The budget as it was configured when the agent last started."""
        row = self._connection.execute("SELECT epsilon, delta FROM ledgers WHERE lineage = ?", (lineage,)).fetchone()
        return None if row is None or row[0] is None else Budget(epsilon=row[0], delta=row[1])

    def verify(self) -> None:
        """Compute all chains and sums again.

        Raises:
            LedgerDamaged: something is not as it was written.
        """
        for lineage in self.lineages():
            if total_of(lineage, self.entries(lineage)) != self.total(lineage):
                raise LedgerDamaged(lineage, "its sum, or its number of entries, is not what they come to")

    def forget_sums(self) -> None:
        """Add up anew what participations were charged: a transaction was rolled back, or entries came from outside."""
        self._claimed = None

    def _count(self, plain: Mapping[str, Any]) -> None:
        assert self._claimed is not None
        if plain["kind"] != HANDOVER:
            of = str(plain["participation_id"])
            self._claimed[of] = self._claimed.get(of, Cost.zero()) + costs_of(plain)[1]


def budget_objections(
    offer: TaskOffer, charge: Charge, budget: Budget | None, *, spent: Cost, claimed: Cost
) -> list[str]:
    """Why a release may not be charged; empty if it may.

    Args:
        offer: what it is for.
        charge: what it costs.
        budget: what the organization gives; None: nothing.
        spent: what left or may have left of these records, for any job.
        claimed: what left or may have left of them for this one, as it counts.
    """
    plan = offer.plan
    if plan is None or charge.cost == Cost.zero():
        return []  # nothing is claimed, or nothing leaves
    if budget is None:
        return ["budget: the dataset has no privacy budget in this worker's configuration."]
    found = []
    after = spent + charge.cost
    if not fits(after, Limit.of(budget.epsilon, budget.delta)):
        found.append(
            f"budget: by this worker's own ledger epsilon {spent.epsilon(budget.delta):.4g} of {budget.epsilon:g} (at "
            f"delta {budget.delta:g}) is spent of these records, and round {offer.round_number} would make it "
            f"{after.epsilon(budget.delta):.4g}."
        )
    whole = (claimed + charge.claimed).epsilon(plan.delta)
    if whole > plan.epsilon * _ROUNDING:
        found.append(
            f"budget: with round {offer.round_number} the job would have cost epsilon {whole:.4g} here, at delta "
            f"{plan.delta:g}; it claims {plan.epsilon:.4g}."
        )
    return found
