"""Handing a dataset on to another worker of the organization, together with the account of what left of it.

The old worker writes a document with the ledger, and stops serving the data for good: the last entry of the ledger says
to whom it went. The new worker takes it only if the document is signed by the old one, is made out to itself, holds an
unbroken chain, and continues whatever it knows of that ledger: an older document, taken a second time, is shorter than
what it knows. So at most one worker can add to a ledger. It signs what it took, and the service moves the dataset upon
both signatures.

The document holds no record. It does hold hashes of records, and the key that decides which of them are held out (the
split must stay what it was): it is for the other worker's eyes only.
"""

import hashlib
import json
import sqlite3
from collections.abc import Collection
from datetime import UTC, datetime
from typing import Any, Final, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from isthmus.wire.base import Digest, Name, canonical_json
from isthmus.wire.datasets import Handover, Signature, handover_bytes
from isthmus_worker.journal import Journal
from isthmus_worker.ledger import HANDOVER, Entry, LedgerDamaged, total_of
from isthmus_worker.likeness import Sketch
from isthmus_worker.transaction import Transaction

_PARTICIPATION: Final = (
    "participation_id", "job_id", "dataset", "spec_digest", "job_seed", "statistics_digest", "seen_at", "plan_digest",
)  # fmt: skip
_RELEASE: Final = (
    "participation_id", "round_number", "model_digest", "spec_digest", "kind", "state", "job", "dataset", "task_id",
    "fence", "digest", "size_bytes", "clip_norm", "noise_multiplier", "prepared_at", "released_at", "acknowledged_at",
    "lineage", "charge",
)  # fmt: skip


class HandoverRefused(Exception):
    """A dataset cannot be handed on, or taken over. The message says why, and what to do."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EntryRecord(_Part):
    """An entry of a ledger, as it was written."""

    body: str
    previous_hash: Digest
    hash: Digest


class Document(_Part):
    """All that is known of a dataset's data, but the data."""

    version: Literal[1] = 1
    organization: Name
    dataset: Name
    giver: Digest
    taker: Digest
    signed_at: AwareDatetime
    lineage: Digest
    contents: list[Digest]
    sketches: dict[Digest, Sketch]
    holdout_key: Digest
    entries: list[EntryRecord]
    participations: list[dict[str, str | None]]
    releases: list[dict[str, str | int | float | None]]
    """What was released, so that none of it is noised a second time."""

    def chain(self) -> list[Entry]:
        """The entries of the ledger."""
        return [
            Entry(self.lineage, number, one.body, one.previous_hash, one.hash)
            for number, one in enumerate(self.entries, start=1)
        ]

    def terms(self) -> dict[str, Any]:
        """What of it the service is told, and both workers sign."""
        return {
            "giver": self.giver,
            "taker": self.taker,
            "lineage": self.lineage,
            "entries": len(self.entries),
            "head": self.entries[-1].hash,
            "document": hashlib.sha256(canonical_json(self.model_dump(mode="json"))).hexdigest(),
            "signed_at": self.signed_at,
        }

    def signed_bytes(self) -> bytes:
        """What both workers sign."""
        return handover_bytes(self.organization, self.dataset, **self.terms())


class SignedDocument(_Part):
    """A document as it goes from worker to worker."""

    document: Document
    signature: Signature
    """The giver's, over `Document.signed_bytes`."""


def give(
    journal: Journal,
    identity: Ed25519PrivateKey,
    organization: str,
    dataset: str,
    *,
    taker: str,
    holdout_key: str,
    configured: Collection[str],
) -> SignedDocument:
    """Stop serving a dataset for good, and write down what another worker needs to go on with it.

    Called again with the same taker, it gives the same document.

    Args:
        journal: ours; nobody else works with it.
        identity: our key.
        organization: ours.
        dataset: its name.
        taker: the other worker's public key, in hexadecimal.
        holdout_key: our own, for data that came with none.
        configured: names of the datasets in our configuration.

    Raises:
        HandoverRefused: it is not ours to give, something of it is still under way, or it went to another worker.
        LedgerDamaged: the ledger is not what we wrote.
    """
    own = identity.public_key().public_bytes_raw().hex()
    lineage = journal.lineages.find(dataset)
    if lineage is None:
        raise HandoverRefused(f"This worker has never served a dataset {dataset!r}: there is nothing to hand on.")
    if taker == own:
        raise HandoverRefused("That is this worker's own public key: name the one of the worker that takes it over.")
    if (gone := journal.lineages.handed_to(lineage)) is not None:
        if gone != taker:
            raise HandoverRefused(
                f"Dataset {dataset!r} was handed on to the worker with the public key {gone}. Only that one can hand "
                "it on now."
            )
        return _given(journal, lineage)
    journal.verify()
    _require_settled(journal, lineage, dataset, configured)
    now = datetime.now(UTC)
    with Transaction(journal.connection):
        journal.ledgers.append(lineage, {"kind": HANDOVER, "giver": own, "taker": taker})
        journal.lineages.hand_on(lineage, taker)
        document = _document(journal, organization, dataset, lineage, own, taker, now, holdout_key)
        found = SignedDocument(document=document, signature=identity.sign(document.signed_bytes()).hex())
        journal.connection.execute(
            "INSERT INTO handovers (lineage, entries, dataset, given, document) VALUES (?, ?, ?, 1, ?)",
            (lineage, len(document.entries), dataset, found.model_dump_json()),
        )
    return found


def receive(
    journal: Journal, identity: Ed25519PrivateKey, organization: str, text: str | bytes, *, giver: str
) -> Document:
    """Take a dataset over with its ledger. The service learns of it with the next announcement.

    Called again with the same document, it changes nothing.

    Args:
        journal: ours; nobody else works with it.
        identity: our key.
        organization: ours.
        text: the other worker's document.
        giver: its public key in hexadecimal, as its administrator told it.

    Raises:
        HandoverRefused: the document is no whole one, is not signed by the giver, not made out to us, an old one, or
            does not fit what we have served by ourselves.
    """
    document, signature = _checked(identity, organization, text, giver)
    chain, known = document.chain(), journal.ledgers.entries(document.lineage)
    gone = journal.lineages.handed_to(document.lineage)
    if chain == known and gone is None:
        return document
    if len(chain) <= len(known) or chain[: len(known)] != known:
        raise HandoverRefused(
            f"This worker knows {len(known)} entries of that ledger, and the document does not continue them: it is an "
            "old one, or the data were served here in the meantime. Nothing was taken over."
        )
    _require_no_other_lineage(journal, document)
    with Transaction(journal.connection) as connection:
        for entry in chain[len(known) :]:
            journal.ledgers.put(entry)
        journal.lineages.take(
            document.lineage,
            document.dataset,
            holdout_key=document.holdout_key,
            contents=list(document.contents),
            sketches=document.sketches,
        )
        _import_rows(connection, "participations", _PARTICIPATION, document.participations)
        _import_rows(connection, "releases", _RELEASE, document.releases)
        taken = identity.sign(document.signed_bytes()).hex()
        terms = Handover(**document.terms(), given=signature, taken=taken)
        connection.execute(
            "INSERT INTO handovers (lineage, entries, dataset, given, document) VALUES (?, ?, ?, 0, ?)",
            (document.lineage, len(chain), document.dataset, terms.model_dump_json()),
        )
    journal.ledgers.forget_sums()
    return document


def untold(journal: Journal, lineage: str, dataset: str) -> Handover | None:
    """The handover by which we serve a dataset, as long as the service has not heard of it."""
    row = journal.connection.execute(
        "SELECT document FROM handovers WHERE lineage = ? AND dataset = ? AND given = 0 AND told = 0"
        " ORDER BY entries DESC LIMIT 1",
        (lineage, dataset),
    ).fetchone()
    return None if row is None else Handover.model_validate_json(row[0])


def note_told(journal: Journal, lineage: str) -> None:
    """The service has moved the dataset to us."""
    journal.connection.execute("UPDATE handovers SET told = 1 WHERE lineage = ? AND given = 0", (lineage,))


def _given(journal: Journal, lineage: str) -> SignedDocument:
    (text,) = journal.connection.execute(
        "SELECT document FROM handovers WHERE lineage = ? AND given = 1 ORDER BY entries DESC LIMIT 1", (lineage,)
    ).fetchone()
    return SignedDocument.model_validate_json(text)


def _require_settled(journal: Journal, lineage: str, dataset: str, configured: Collection[str]) -> None:
    others = [name for name in configured if name != dataset and journal.lineages.find(name) == lineage]
    if others:
        raise HandoverRefused(
            f"Dataset {dataset!r} shares its records, and so its ledger, with {', '.join(map(repr, others))}: remove "
            "that from this worker's configuration first. Its data go with the ledger."
        )
    names = journal.lineages.names(lineage)
    waiting = [release for release in journal.unsettled() if release.dataset in names]
    if waiting:
        raise HandoverRefused(
            f"Round {waiting[0].key.round_number} of job {waiting[0].job!r} was released and is not acknowledged yet. "
            "Start the agent, so that it settles that with the service, then stop it and try again."
        )
    journal.give_up_prepared(names, "its dataset was handed on")
    journal.sessions.end_of(names, "its dataset was handed on")


def _document(
    journal: Journal,
    organization: str,
    dataset: str,
    lineage: str,
    giver: str,
    taker: str,
    now: datetime,
    holdout_key: str,
) -> Document:
    names = journal.lineages.names(lineage)
    held = f"dataset IN ({', '.join('?' for _ in names)})"
    spent = f"{held} AND state IN ('released', 'acknowledged')"
    return Document(
        organization=organization,
        dataset=dataset,
        giver=giver,
        taker=taker,
        signed_at=now,
        lineage=lineage,
        contents=journal.lineages.contents(lineage),
        sketches=dict(journal.lineages.sketches(lineage)),
        holdout_key=journal.lineages.holdout_key(lineage) or holdout_key,
        entries=[
            EntryRecord(body=one.body, previous_hash=one.previous_hash, hash=one.hash)
            for one in journal.ledgers.entries(lineage)
        ],
        participations=_export_rows(journal.connection, "participations", _PARTICIPATION, held, names),
        releases=_export_rows(journal.connection, "releases", _RELEASE, spent, names),
    )


def _checked(identity: Ed25519PrivateKey, organization: str, text: str | bytes, giver: str) -> tuple[Document, str]:
    """The document and the giver's signature, after all that can be checked without the journal."""
    own = identity.public_key().public_bytes_raw().hex()
    try:
        signed = SignedDocument.model_validate_json(text)
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(giver))
    except ValidationError as error:
        raise HandoverRefused("The file is no handover of a dataset, or not a whole one.") from error
    except ValueError as error:
        raise HandoverRefused("A worker's public key is 64 hexadecimal digits; `status` shows it there.") from error
    document = signed.document
    if not document.entries:
        raise HandoverRefused("The file is no handover of a dataset: its ledger has no entry.")
    try:
        key.verify(bytes.fromhex(signed.signature), document.signed_bytes())
    except InvalidSignature:
        raise HandoverRefused(
            "The document is not signed by the worker with that public key, or was changed since. Ask for it anew."
        ) from None
    if document.giver != giver:
        raise HandoverRefused(f"The document says that it comes from another worker: {document.giver}.")
    if document.taker != own:
        raise HandoverRefused(f"The document is made out to the worker {document.taker}, and this one is {own}.")
    if document.organization != organization:
        raise HandoverRefused(f"The dataset belongs to {document.organization!r}, this worker to {organization!r}.")
    try:
        chain = document.chain()
        total_of(document.lineage, chain)
        last = chain[-1].plain
    except (LedgerDamaged, json.JSONDecodeError) as error:
        raise HandoverRefused(f"The ledger in the document is no whole chain: {error}") from error
    if (last["kind"], last.get("giver"), last.get("taker")) != (HANDOVER, giver, own):
        raise HandoverRefused("The ledger in the document does not end with its being handed on to this worker.")
    return document, signed.signature


def _require_no_other_lineage(journal: Journal, document: Document) -> None:
    evidence = [("name", document.dataset), *(("content", digest) for digest in document.contents)]
    for kind, value in evidence:
        row = journal.connection.execute(
            "SELECT 1 FROM lineage_evidence WHERE kind = ? AND value = ? AND lineage <> ?",
            (kind, value, document.lineage),
        ).fetchone()
        if row is not None:
            what = f"a dataset {value!r}" if kind == "name" else "the same data"
            raise HandoverRefused(
                f"This worker has served {what} by itself before, with a ledger of its own: two ledgers cannot become "
                "one. Use a worker with a new state directory."
            )


def _export_rows(
    connection: sqlite3.Connection, table: str, columns: tuple[str, ...], where: str, values: list[str]
) -> list[dict[str, Any]]:
    rows = connection.execute(
        f"SELECT {', '.join(columns)} FROM {table} WHERE {where} ORDER BY rowid",  # noqa: S608 - our own names
        values,
    )
    return [dict(zip(columns, row, strict=True)) for row in rows]


def _import_rows(
    connection: sqlite3.Connection, table: str, columns: tuple[str, ...], rows: Collection[dict[str, Any]]
) -> None:
    """Take over rows that are not here yet: some are, where a dataset comes back."""
    for row in rows:
        if set(row) != set(columns):
            raise HandoverRefused("The document was written by another version of this program. Use the same for both.")
        try:
            connection.execute(
                f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' for _ in columns)})"  # noqa: S608 - our own names
                " ON CONFLICT DO NOTHING",
                [row[name] for name in columns],
            )
        except sqlite3.Error as error:
            raise HandoverRefused(f"The document holds what no worker writes: {error}") from error
