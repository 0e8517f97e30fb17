"""Which data a dataset is, whatever it is called: budgets belong to records, not to names.

A dataset's lineage is a random number that stands for its records, and its ledger is kept under it. The same data get
the same one: they are known by a name that they had here, by the file that they lay in (or the function that reads
them), by a file's content, and, for CSV files, by having at least half of their records in common (`likeness`). What
was known once stays known, so that neither renaming a dataset nor copying, moving or editing its file gives it a fresh
budget. A copy that shares fewer records, or in which a column was changed throughout, is not recognised: that is
another data set by any measure that does not know what the columns mean.

A dataset of which this tells two things at once is not served: its records would be charged to one budget and
not to the other.
"""

import json
import secrets
import sqlite3
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final

from isthmus.wire.base import canonical_json
from isthmus_worker.likeness import Sketch, alike
from isthmus_worker.messages import Content
from isthmus_worker.settings import CsvSettings, DatasetSettings, NpzSettings, SourceSettings
from isthmus_worker.transaction import Transaction

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS lineages (
    lineage TEXT PRIMARY KEY, dataset TEXT NOT NULL, made_at TEXT NOT NULL, holdout_key TEXT, handed_to TEXT
) STRICT;
CREATE TABLE IF NOT EXISTS lineage_evidence (
    kind TEXT NOT NULL CHECK (kind IN ('name', 'source', 'content')), value TEXT NOT NULL, lineage TEXT NOT NULL,
    PRIMARY KEY (kind, value)
) STRICT;
CREATE TABLE IF NOT EXISTS sketches (
    content TEXT PRIMARY KEY, lineage TEXT NOT NULL, sketch TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS stamps (source TEXT PRIMARY KEY, stamp TEXT NOT NULL, content TEXT NOT NULL) STRICT;
"""
_BYTES: Final = 32


class LineageRefused(Exception):
    """The dataset cannot be served, because of which data it is. The message says what to do."""


class Lineages:
    """What is known of which data are which. Part of the journal's database."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def known_stamp(self, source: SourceSettings) -> str | None:
        """The stamp of a source's file when its content was noted last; None if it never was."""
        row = self._connection.execute("SELECT stamp FROM stamps WHERE source = ?", (source_identity(source),))
        found = row.fetchone()
        return None if found is None else str(found[0])

    def of(self, dataset: DatasetSettings, content: Content | None) -> str:
        """The lineage of a dataset, made if its data were never seen; what is new about them is noted.

        Args:
            dataset: as it is configured now.
            content: of its file; None: it is no file, or the one that `known_stamp` stands for.

        Raises:
            LineageRefused: the data were handed on to another worker, or are those of two lineages.
        """
        source = source_identity(dataset.source)
        evidence = {"name": dataset.name, "source": source}
        digest = content.digest if content is not None else self._last_content(source)
        if digest is not None:
            evidence["content"] = digest
        found = self._matching(evidence, content.sketch if content is not None else None)
        if len(found) > 1:
            raise LineageRefused(self._conflict(dataset.name, found))
        lineage = next(iter(found), None)
        if lineage is not None and (taker := self.handed_to(lineage)) is not None:
            raise LineageRefused(
                f"Dataset {dataset.name!r} was handed on to the worker with the public key {taker}: it is served "
                "there. Remove it from this worker's configuration."
            )
        self._note(lineage, dataset.name, evidence, content, source)
        return self.find(dataset.name) or ""

    def find(self, name: str) -> str | None:
        """The lineage of a dataset that was served here under this name; None if none was."""
        row = self._connection.execute(
            "SELECT lineage FROM lineage_evidence WHERE kind = 'name' AND value = ?", (name,)
        ).fetchone()
        return None if row is None else str(row[0])

    def names(self, lineage: str) -> list[str]:
        """All names under which these data were served here."""
        rows = self._connection.execute(
            "SELECT value FROM lineage_evidence WHERE kind = 'name' AND lineage = ? ORDER BY value", (lineage,)
        )
        return [str(row[0]) for row in rows]

    def handed_to(self, lineage: str) -> str | None:
        """The public key of the worker that serves these data now; None: this one does."""
        row = self._connection.execute("SELECT handed_to FROM lineages WHERE lineage = ?", (lineage,)).fetchone()
        return None if row is None or row[0] is None else str(row[0])

    def holdout_key(self, lineage: str) -> str | None:
        """The hold-out key, in hexadecimal, that came with data from another worker; None: our own counts."""
        row = self._connection.execute("SELECT holdout_key FROM lineages WHERE lineage = ?", (lineage,)).fetchone()
        return None if row is None or row[0] is None else str(row[0])

    def contents(self, lineage: str) -> list[str]:
        """Digests of all contents that these data had, for the worker that takes them over."""
        rows = self._connection.execute(
            "SELECT value FROM lineage_evidence WHERE kind = 'content' AND lineage = ? ORDER BY value", (lineage,)
        )
        return [str(row[0]) for row in rows]

    def sketches(self, lineage: str) -> Mapping[str, Sketch]:
        """Content digest -> sketch, of all CSV files that these data were in."""
        rows = self._connection.execute("SELECT content, sketch FROM sketches WHERE lineage = ?", (lineage,))
        return {str(content): Sketch.model_validate_json(sketch) for content, sketch in rows}

    def hand_on(self, lineage: str, taker: str) -> None:
        """Serve these data no more. Within the caller's transaction."""
        self._connection.execute("UPDATE lineages SET handed_to = ? WHERE lineage = ?", (taker, lineage))

    def take(
        self,
        lineage: str,
        name: str,
        *,
        holdout_key: str,
        contents: list[str],
        sketches: Mapping[str, Sketch],
    ) -> None:
        """Know these data from now on, as the worker that handed them on did. Within the caller's transaction."""
        self._connection.execute(
            "INSERT INTO lineages VALUES (?, ?, ?, ?, NULL)"
            " ON CONFLICT (lineage) DO UPDATE SET holdout_key = excluded.holdout_key, handed_to = NULL",
            (lineage, name, _now(), holdout_key),
        )
        for kind, value in [("name", name), *(("content", digest) for digest in contents)]:
            self._connection.execute(
                "INSERT INTO lineage_evidence VALUES (?, ?, ?) ON CONFLICT DO NOTHING", (kind, value, lineage)
            )
        self._keep_sketches(lineage, sketches)

    def _last_content(self, source: str) -> str | None:
        row = self._connection.execute("SELECT content FROM stamps WHERE source = ?", (source,)).fetchone()
        return None if row is None else str(row[0])

    def _matching(self, evidence: Mapping[str, str], sketch: Sketch | None) -> dict[str, str]:
        """Lineage -> by what it was recognised first."""
        found = dict[str, str]()
        for kind, value in evidence.items():
            row = self._connection.execute(
                "SELECT lineage FROM lineage_evidence WHERE kind = ? AND value = ?", (kind, value)
            ).fetchone()
            if row is not None:
                found.setdefault(str(row[0]), _WORDS[kind])
        if sketch is not None:
            for lineage, plain in self._connection.execute("SELECT lineage, sketch FROM sketches").fetchall():
                if lineage not in found and alike(sketch, Sketch.model_validate_json(plain)):
                    found[str(lineage)] = "its records"
        return found

    def _conflict(self, name: str, found: Mapping[str, str]) -> str:
        told = "; ".join(
            f"by {how} it is the one that was served as {' or '.join(map(repr, self.names(lineage))) or lineage[:12]}"
            for lineage, how in found.items()
        )
        return (
            f"Dataset {name!r} is two datasets at once, and each has a budget of its own: {told}. Serve data under the "
            "name and from the file that they had, and give other data a name and a file of their own."
        )

    def _note(
        self, lineage: str | None, name: str, evidence: Mapping[str, str], content: Content | None, source: str
    ) -> None:
        with Transaction(self._connection) as connection:
            if lineage is None:
                lineage = secrets.token_hex(_BYTES)
                connection.execute("INSERT INTO lineages VALUES (?, ?, ?, NULL, NULL)", (lineage, name, _now()))
            for kind, value in evidence.items():
                connection.execute(
                    "INSERT INTO lineage_evidence VALUES (?, ?, ?) ON CONFLICT DO NOTHING", (kind, value, lineage)
                )
            if content is not None:
                connection.execute(
                    "INSERT OR REPLACE INTO stamps VALUES (?, ?, ?)", (source, content.stamp, content.digest)
                )
                if content.sketch is not None:
                    self._keep_sketches(lineage, {content.digest: content.sketch})

    def _keep_sketches(self, lineage: str, sketches: Mapping[str, Sketch]) -> None:
        for digest, sketch in sketches.items():
            self._connection.execute(
                "INSERT INTO sketches VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
                (digest, lineage, sketch.model_dump_json()),
            )


_WORDS: Final[Mapping[str, str]] = {"name": "its name", "source": "its source", "content": "its content"}


def source_identity(source: SourceSettings) -> str:
    """Where records come from, in one text: the file behind all links, or the function and its options."""
    if isinstance(source, CsvSettings | NpzSettings):
        return f"file:{source.path.resolve()}"
    options = canonical_json(json.loads(json.dumps(source.options, default=str))).decode()
    return f"function:{source.function}:{options}"


def _now() -> str:
    return datetime.now(UTC).isoformat()
