"""A federation that stands for a whole file of tests: each test runs jobs of its own on it, and leaves none running.

Also how tests speak to it past our client: HTTP by hand, and what a refusal must look like.

    def test_a_pickle_is_refused(standing: Federation) -> None:
        assert_problem(put_update(standing, site, offer, b"..."), ProblemCode.NOT_SAFETENSORS)
"""

import hashlib
import http.client
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import httpx
import psycopg
import pytest
from psycopg import sql

from app.federation.lifecycle import ENDED_JOBS
from isthmus.client import Client
from isthmus.wire.base import format_repr_digest
from isthmus.wire.problems import PROBLEMS, Problem, ProblemCode
from isthmus.wire.rounds import TaskOffer
from isthmus.wire.version import DIGEST_HEADER, FENCE_HEADER, PROBLEM_MEDIA_TYPE, TENSORS_MEDIA_TYPE
from tests.federation import Federation, Site, open_federation
from tests.postgres_plugin import _drop, _with_database
from tests.running import PATIENCE_S


@pytest.fixture(scope="module")
def _standing(
    postgres_url: str, _maintenance: psycopg.Connection, _template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Federation]:
    name = f"isthmus_{uuid4().hex[:12]}"
    copy = sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY wal_log")
    _maintenance.execute(copy.format(sql.Identifier(name), sql.Identifier(_template)))
    try:
        with ExitStack() as stack:
            url = _with_database(postgres_url, name)
            yield open_federation(url, tmp_path_factory.mktemp("standing"), stack)
    finally:
        _drop(_maintenance, name)


@pytest.fixture
def standing(_standing: Federation) -> Iterator[Federation]:
    """Three sites that approve by rule, as the tests before left them; jobs still open are cancelled afterwards."""
    yield _standing
    for job in _standing.researcher.jobs.list():
        if job.state not in ENDED_JOBS:
            _standing.researcher.jobs.cancel(job.id)


def update_headers(offer: TaskOffer, body: bytes, **changes: str | None) -> dict[str, str]:
    """The headers of an honest upload, with changes by name (`_` for `-`); None leaves one out."""
    headers: dict[str, str | None] = {
        "content-type": TENSORS_MEDIA_TYPE,
        "content-length": str(len(body)),
        DIGEST_HEADER.lower(): format_repr_digest(hashlib.sha256(body).hexdigest()),
        FENCE_HEADER.lower(): str(offer.fence),
    }
    headers |= {name.replace("_", "-"): value for name, value in changes.items()}
    return {name: value for name, value in headers.items() if value is not None}


def put_update(
    federation: Federation, site: Site, offer: TaskOffer, body: bytes, *, task_id: UUID | None = None, **changes: str
) -> httpx.Response:
    """Upload any bytes for a task, under any headers."""
    address = f"/v1/tasks/{task_id or offer.task_id}/update"
    headers = update_headers(offer, body, **changes) | {
        "authorization": f"Bearer {federation.platform.keys[site.worker]}"
    }
    with httpx.Client(base_url=federation.platform.base_url, timeout=PATIENCE_S, verify=False) as client:
        return client.put(address, content=body, headers=headers)


def assert_problem(response: httpx.Response, code: ProblemCode) -> Problem:
    """The refusal, which must be of this code, say so as the contract does, and hold a sentence for people."""
    assert response.headers["content-type"] == PROBLEM_MEDIA_TYPE, response.text
    found = Problem.model_validate_json(response.content)
    assert found.code == code, found
    assert (response.status_code, found.status, found.title) == (found.status, *PROBLEMS[code])
    assert re.fullmatch(r"\S[^\n]{15,1000}", found.detail), found.detail
    return found


class Wire:
    """One request by hand over a socket of its own: what no client would send, and when no client would send it."""

    def __init__(self, federation: Federation, client: Client) -> None:
        address = urlsplit(federation.platform.base_url)
        self._host = address.netloc
        self._key = federation.platform.keys[client]
        self.socket = socket.create_connection((address.hostname, address.port), timeout=PATIENCE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    def head(self, method: str, path: str, headers: Mapping[str, str]) -> None:
        """The request line and the headers."""
        lines = [f"{method} {path} HTTP/1.1", f"host: {self._host}", f"authorization: Bearer {self._key}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self.socket.sendall("\r\n".join([*lines, "", ""]).encode())

    def put(self, offer: TaskOffer, headers: Mapping[str, str]) -> None:
        """The head of an upload."""
        self.head("PUT", f"/v1/tasks/{offer.task_id}/update", headers)

    def send(self, data: bytes) -> None:
        """More of the body."""
        self.socket.sendall(data)

    def first_line(self) -> str:
        """What the service says first, left in place for `answer`."""
        return self.socket.recv(64, socket.MSG_PEEK).split(b"\r\n")[0].decode()

    def answer(self) -> httpx.Response:
        """The final answer."""
        found = http.client.HTTPResponse(self.socket)
        found.begin()
        return httpx.Response(found.status, headers=dict(found.getheaders()), content=found.read())


def entries_of(federation: Federation, site: Site, offer: TaskOffer) -> list[Any]:
    """The ledger's digests for one participation and round."""
    rows = federation.platform.execute(
        "SELECT digest FROM ledger_entries WHERE participation_id = %s AND round_number = %s ORDER BY sequence",
        [offer.participation_id, offer.round_number],
    )
    return [row[0] for row in rows]


def leftovers(federation: Federation) -> set[str]:
    """Files that the service keeps and nothing in the database speaks of: drafts and refused bodies."""
    known = federation.platform.execute(
        "SELECT blob_key FROM updates WHERE NOT excluded"
        " UNION SELECT 'checkpoints/' || left(digest, 2) || '/' || digest FROM checkpoints"
        " UNION SELECT 'checkpoints/' || left(state_digest, 2) || '/' || state_digest FROM checkpoints"
    )
    root = federation.folder / "data" / "blobs"
    return {str(path.relative_to(root)) for path in federation.blobs()} - {row[0] for row in known}


__all__ = ["_standing", "standing"]
