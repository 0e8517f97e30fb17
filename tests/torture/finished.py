"""A finished job with everything that it leaves behind: rows, blobs, and the journals of three workers.

Made without processes of agents: the journals are the worker's own, written by the worker's own hand-in over HTTP.
"""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import numpy as np
import psycopg
import pytest
from psycopg import sql

from app.credentials import load_signer
from isthmus.codec import arrays
from isthmus.wire.jobs import JobState
from isthmus.wire.rounds import TaskOffer
from isthmus_worker.journal import Journal
from isthmus_worker.ledger import Account
from isthmus_worker.release import HandedIn, hand_in
from isthmus_worker.state import StateDir
from tests.federation import Arrays, Site, filled, job_spec, measured, open_federation
from tests.postgres_plugin import _drop, _with_database
from tests.torture.invariants import Record

ROUNDS = 3


@dataclass(frozen=True)
class Finished:
    """Where it all is."""

    database_url: str
    folder: Path
    job_id: UUID
    public_key: str

    def record(self, connection: psycopg.Connection, folder: Path) -> Record:
        """Where the invariants look: the files are those of `folder`, a copy of ours."""
        journals = {f"clinic-{number:02}": folder / "states" / f"clinic-{number:02}" for number in range(3)}
        return Record(connection, folder / "data" / "blobs", journals, self.public_key)


def _update_of(offer: TaskOffer, number: int) -> Arrays:
    """A site's update: no two are alike, and sums of them are rounded."""
    found = {name: tensor + np.float32(0.1 * (number + 1) * offer.round_number) for name, tensor in filled(1.0).items()}
    return found | measured(offer, loss=0.1 * (number + 1))


def _release(site: Site, offer: TaskOffer, journal: Journal, state: StateDir, number: int, public_key: str) -> None:
    data = arrays.encode(_update_of(offer, number))
    draft = state.scratch / "upload.safetensors"
    draft.write_bytes(data)
    release = journal.prepare(
        offer,
        draft,
        digest=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
        metrics={"train/loss": 0.5},
        account=Account("1e" * 32, budget=None),
    )
    outcome, reason = hand_in(site.worker, journal, release, service_public_key=public_key)
    assert outcome is HandedIn.ACKNOWLEDGED, reason


@pytest.fixture(scope="module")
def finished(
    postgres_url: str, _maintenance: psycopg.Connection, _template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Finished]:
    """A job of three rounds at three sites, done; its service has stopped."""
    name, folder = f"isthmus_finished_{np.random.default_rng().integers(2**40):x}", tmp_path_factory.mktemp("finished")
    copy = sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY wal_log")
    _maintenance.execute(copy.format(sql.Identifier(name), sql.Identifier(_template)))
    url = _with_database(postgres_url, name)
    try:
        with ExitStack() as stack:
            federation = open_federation(url, folder, stack)
            public_key = load_signer(folder / "data" / "signing-key.pem", create=False).public_key
            states = [StateDir.open(folder / "states" / site.organization.name) for site in federation.sites]
            journals = [Journal.open(state) for state in states]
            job = federation.start(
                job_spec(rounds=ROUNDS, strategy="fedavgm", privacy={"unit": "none", "clip_norm": 100.0})
            )
            for _ in range(ROUNDS):
                for number, site in reversed(list(enumerate(federation.sites))):
                    offer = site.claim()
                    _release(site, offer, journals[number], states[number], number, public_key)
            done = federation.finish(job)
            assert done.state is JobState.COMPLETED, done.detail
            for journal in journals:
                journal.close()
        yield Finished(url, folder, job.id, public_key)
    finally:
        _drop(_maintenance, name)


__all__ = ["finished"]
