"""Whose keys the others of a secured round have: pinned by organization, so that the service cannot invent members.

The first key that is seen of an organization is pinned. Another one is refused from then on, until somebody at this
worker has made sure, by another way than this service, that it is theirs (`isthmus-worker peers trust`). From then on
only keys that were trusted so pass for that organization: the one that was seen first may have been an impostor's.
"""

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from isthmus.secagg.roster import Member
from isthmus_worker.transaction import Transaction

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS peers (
    organization TEXT NOT NULL, public_key TEXT NOT NULL, trusted INTEGER NOT NULL, since TEXT NOT NULL,
    PRIMARY KEY (organization, public_key)
) STRICT;
"""
KEY_DIGITS: Final = 64


@dataclass(frozen=True)
class Peer:
    """A key of another organization."""

    organization: str
    public_key: str
    """In hexadecimal: what its `isthmus-worker status` shows."""
    trusted: bool
    """Somebody here said so; else it was pinned when it was first seen."""
    since: str


class Peers:
    """The pinned keys of one worker. An agent may work with them while a command changes them."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def all(self, organization: str | None = None) -> list[Peer]:
        """What is pinned, of one organization or of all, in the order of their names."""
        with closing(
            self._connection.execute(
                "SELECT organization, public_key, trusted, since FROM peers WHERE ?1 IS NULL OR organization = ?1"
                " ORDER BY organization, since, public_key",
                (organization,),
            )
        ) as rows:
            return [Peer(str(name), str(key), bool(trusted), str(since)) for name, key, trusted, since in rows]

    def objections(self, members: Sequence[Member], *, trusted_only: bool) -> list[str]:
        """Whose keys are not those that are pinned, one sentence each; empty if all may pass.

        Args:
            members: the others of a roster.
            trusted_only: a key that nobody here has trusted does not pass (`policy.pinned_peers_only`).
        """
        found = []
        for member in members:
            known, key = self.all(member.organization), member.identity.hex()
            passing = {peer.public_key for peer in known if peer.trusted or not trusted_only}
            if key in passing or not (known or trusted_only):
                continue
            if trusted_only:
                found.append(
                    f"pinned_peers_only: the key {key[:16]}... of {member.organization} was not trusted at this worker "
                    "beforehand."
                )
            else:
                found.append(
                    f"{member.organization} is pinned to another identity at this worker: the roster has the key "
                    f"{key[:16]}..., pinned is {known[0].public_key[:16]}..."
                )
        return found

    def pin(self, members: Sequence[Member]) -> list[Peer]:
        """Pin the keys of organizations of which none is known yet; those that are new."""
        now, new = datetime.now(UTC).isoformat(), []
        for member in members:
            if not self.all(member.organization):
                new.append(Peer(member.organization, member.identity.hex(), trusted=False, since=now))
        self._connection.executemany(
            "INSERT INTO peers VALUES (?, ?, 0, ?) ON CONFLICT DO NOTHING",
            [(peer.organization, peer.public_key, peer.since) for peer in new],
        )
        return new

    def trust(self, organization: str, public_key: str) -> None:
        """Let a key pass for an organization, beside those that were trusted before. One only seen passes no more.

        Raises:
            ValueError: it is no public key.
        """
        key = public_key.strip().lower()
        if len(key) != KEY_DIGITS or not set(key) <= set("0123456789abcdef"):
            raise ValueError(
                f"{public_key!r} is no fingerprint: it has 64 hexadecimal digits, as the other worker's `peers list` "
                "or `status` shows them"
            )
        with Transaction(self._connection) as connection:
            connection.execute(
                "INSERT INTO peers VALUES (?, ?, 1, ?)"
                " ON CONFLICT (organization, public_key) DO UPDATE SET trusted = 1",
                (organization, key, datetime.now(UTC).isoformat()),
            )
            connection.execute("DELETE FROM peers WHERE organization = ? AND trusted = 0", (organization,))

    def forget(self, organization: str) -> int:
        """Forget an organization's keys: the next one that is seen is pinned. How many there were."""
        return self._connection.execute("DELETE FROM peers WHERE organization = ?", (organization,)).rowcount
