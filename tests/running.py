"""A real service for a test: the whole app on a database of the test's own, served on a port, driven by our own client.

def test_a_name_is_given_once(platform: Platform) -> None:
    platform.admin.organizations.create(...)
"""

import asyncio
import hashlib
import itertools
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import psycopg
import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from app.admin.service import create_first_admin
from app.database import open_engine, open_sessions
from app.main import create_app
from app.settings import Settings
from isthmus.client import NO_RETRIES, Client, Refused
from isthmus.wire.data import ColumnKind, ColumnSchema, DatasetSchema
from isthmus.wire.datasets import AnnounceDataset, Budget, DatasetView, UsePolicy, announcement_bytes
from isthmus.wire.models import ModelKind
from isthmus.wire.organizations import (
    CreateApiKey,
    CreateOrganization,
    CreatePrincipal,
    OrganizationView,
    PrincipalView,
    Role,
    Scope,
)
from isthmus.wire.privacy import LARGEST_DELTA, LARGEST_EPSILON, PrivacyMode
from isthmus.wire.problems import ProblemCode
from isthmus.wire.rounds import TaskKind
from isthmus.wire.workers import EnrollWorker

PATIENCE_S = 30.0

LOOSEST = UsePolicy(
    purposes=("*",),
    model_kinds=tuple(ModelKind),
    modes=tuple(PrivacyMode),
    budget=Budget(epsilon=LARGEST_EPSILON, delta=LARGEST_DELTA),
    max_delta=LARGEST_DELTA,
    max_rounds=1_000_000,
    allow_exact_metrics=True,
    allow_exact_statistics=True,
)
"""A policy that refuses nothing: what the workers of tests announce, so that every other one tightens it."""


class Platform:
    """A running service with its first admin, and a short way to everybody else."""

    def __init__(self, base_url: str, database_url: str, admin_key: str, stack: ExitStack) -> None:
        self.base_url = base_url
        self.database_url = database_url
        self._stack = stack
        self._numbers = itertools.count(1)
        self.keys: dict[Client, str] = {}
        self.signing: dict[Client, tuple[Ed25519PrivateKey, str]] = {}
        """The private key of each worker, and the name of its organization."""
        self.admin = self.client(admin_key)

    def client(self, key: str | None = None) -> Client:
        """A client with a key that repeats nothing, closed after the test."""
        client = self._stack.enter_context(Client(self.base_url, key, retries=NO_RETRIES))
        if key is not None:
            self.keys[client] = key
        return client

    def http(self, client: Client | None = None) -> httpx.Client:
        """Plain HTTP with the key of `client`, for what our client would never send."""
        headers = {} if client is None else {"Authorization": f"Bearer {self.keys[client]}"}
        return self._stack.enter_context(httpx.Client(base_url=self.base_url, headers=headers, timeout=PATIENCE_S))

    def organization(self, name: str | None = None) -> OrganizationView:
        """A new data holder."""
        name = name or f"clinic-{next(self._numbers)}"
        return self.admin.organizations.create(CreateOrganization(name=name, display_name=name.title()))

    def principal(
        self, role: Role, organization: OrganizationView | None = None, name: str | None = None
    ) -> PrincipalView:
        """A new holder of keys, without one yet."""
        name = name or f"{role}-{next(self._numbers)}"
        organization_id = None if organization is None else organization.id
        return self.admin.principals.create(
            CreatePrincipal(name=name, display_name=name.title(), role=role, organization_id=organization_id)
        )

    def client_of(self, principal: PrincipalView, *, scopes: Sequence[Scope] | None = None) -> Client:
        """A client with a new key of the principal, issued by the admin."""
        body = CreateApiKey(principal_id=principal.id, scopes=None if scopes is None else tuple(scopes))
        return self.client(self.admin.keys.create(body).key)

    def researcher(self, name: str | None = None) -> Client:
        """A new researcher."""
        return self.client_of(self.principal(Role.RESEARCHER, name=name))

    def steward(self, organization: OrganizationView) -> Client:
        """A new steward of the organization."""
        return self.client_of(self.principal(Role.STEWARD, organization))

    def worker(self, organization: OrganizationView, name: str | None = None) -> Client:
        """A new worker of the organization, which can sign."""
        key = Ed25519PrivateKey.generate()
        token = self.admin.organizations.issue_enrollment_token(organization.id).token
        worker = self.client(self.client().workers.enroll(introduction(token, name, key=key)).api_key)
        self.signing[worker] = (key, organization.name)
        return worker

    def announce(self, worker: Client, name: str = "heart", **told: Any) -> DatasetView:
        """Have the worker announce a dataset under its signature; what it tells is as `announcement` takes it."""
        return worker.datasets.announce(name, announcement(*self.signing[worker], name, **told))

    def dataset(
        self, worker: Client, name: str = "heart", *, confirmed_by: Client | None = None, **told: Any
    ) -> DatasetView:
        """A dataset that the worker announced, and that the steward confirmed if one is given."""
        dataset = self.announce(worker, name, **told)
        return dataset if confirmed_by is None else confirmed_by.datasets.confirm(dataset.id)

    def execute(self, statement: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """What Postgres answers, past the service."""
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            cursor = connection.execute(statement.encode(), values)
            return cursor.fetchall() if cursor.description else []


def introduction(token: str, name: str | None = None, *, key: Ed25519PrivateKey | None = None) -> EnrollWorker:
    """How a worker introduces itself, with a public key of its own."""
    public_key = (key or Ed25519PrivateKey.generate()).public_key().public_bytes_raw().hex()
    return EnrollWorker(token=token, name=name or f"agent-{secrets.token_hex(4)}", public_key=public_key)


def lineage_of(organization: str, dataset: str) -> str:
    """The lineage that a dataset has in tests, unless it is given another."""
    return hashlib.sha256(f"{organization}/{dataset}".encode()).hexdigest()


def announcement(
    key: Ed25519PrivateKey,
    organization: str,
    dataset: str = "heart",
    *,
    rows: int = 303,
    columns: Sequence[str | ColumnSchema] = ("age", "chol", "disease"),
    task_kinds: Sequence[TaskKind] = tuple(TaskKind),
    description: str = "patients",
    policy: UsePolicy = LOOSEST,
    lineage: str | None = None,
    signed_at: datetime | None = None,
) -> AnnounceDataset:
    """The metadata of a dataset, signed; columns given by name are numbers."""
    schema = DatasetSchema(
        columns=tuple(
            ColumnSchema(name=column, kind=ColumnKind.NUMBER) if isinstance(column, str) else column
            for column in columns
        )
    )
    lineage, signed_at = lineage or lineage_of(organization, dataset), signed_at or datetime.now(UTC)
    signed = announcement_bytes(organization, dataset, policy=policy, lineage=lineage, signed_at=signed_at)
    return AnnounceDataset(
        data_schema=schema,
        rows=rows,
        task_kinds=tuple(task_kinds),
        description=description,
        policy=policy,
        lineage=lineage,
        signed_at=signed_at,
        signature=key.sign(signed).hex(),
    )


@contextmanager
def refused(code: ProblemCode) -> Iterator[list[Refused]]:
    """The block must be refused with this code; what it was refused with is in the list afterwards."""
    found: list[Refused] = []
    with pytest.raises(Refused) as refusal:
        yield found
    assert refusal.value.code is code, refusal.value
    found.append(refusal.value)


def first_admin(database_url: str) -> str:
    """The key of the first admin."""

    async def create() -> str:
        engine = open_engine(database_url, connections=2)
        try:
            async with open_sessions(engine).begin() as session:
                return (await create_first_admin(session)).shown
        finally:
            await engine.dispose()

    return asyncio.run(create())


@contextmanager
def serving(settings: Settings) -> Iterator[str]:
    """The service of `settings`, served from a thread on a port of its own; its address."""
    server = uvicorn.Server(
        uvicorn.Config(create_app(settings), host="127.0.0.1", port=0, log_config=None, access_log=False, ws="none")
    )
    thread = threading.Thread(target=server.run, name="service", daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not server.started:
            assert thread.is_alive(), "the service did not start"
            assert time.monotonic() < deadline, "the service did not start in time"
            time.sleep(0.005)
        host, port = server.servers[0].sockets[0].getsockname()[:2]
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "the service did not stop"


@pytest.fixture
def platform(database_url: str, tmp_path: Path) -> Iterator[Platform]:
    """A running service; nothing drives its rounds."""
    settings = Settings(database_url=database_url, data_dir=tmp_path / "data", coordinate=False)
    with serving(settings) as base_url, ExitStack() as stack:
        yield Platform(base_url, database_url, first_admin(database_url), stack)


def missing_id() -> UUID:
    """An id of nothing."""
    return UUID(int=secrets.randbits(128), version=4)
