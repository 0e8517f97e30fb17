"""Databases for tests: one server per run, one migrated template, and a fresh copy of it for every test that asks.

The server is the embedded one, shared by all of pytest-xdist's workers through its users' lock, or the one that
`ISTHMUS_DATABASE_URL` names; there every database has a random name and is dropped again. A watchdog process outlasts
the run, so that a killed one leaves no server behind.
"""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql

from app.embedded_postgres import EmbeddedPostgres

ROOT = Path(__file__).parent.parent
WATCHDOG = """
import sys
from pathlib import Path
from app.embedded_postgres import EmbeddedPostgres
EmbeddedPostgres(Path(sys.argv[1])).outlast(discard=True)
"""
PR_SET_PDEATHSIG = 1
TEMPLATE_LOCK = 0x15_7B_05  # the advisory lock of whoever makes or drops the template


def pytest_configure(config: pytest.Config) -> None:
    """Let a worker of pytest-xdist die with the run: by itself it would first finish its test."""
    if hasattr(config, "workerinput") and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@pytest.fixture(scope="session")
def postgres_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A database of the run's server from which others can be created."""
    given = os.environ.get("ISTHMUS_DATABASE_URL")
    if given:
        yield given.replace("postgresql+psycopg:", "postgresql:", 1)
        return
    folder = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):  # the workers' folders are side by side in the run's
        folder = folder.parent
    postgres = EmbeddedPostgres(folder / "postgres", for_tests=True)
    url = postgres.join()
    try:
        if postgres.started:
            _outlast(postgres.data_dir)
        yield url
    finally:
        postgres.leave()
        postgres.discard()


@pytest.fixture(scope="session")
def _maintenance(postgres_url: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        yield connection


@pytest.fixture(scope="session")
def _template(postgres_url: str, _maintenance: psycopg.Connection, request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the migrated template, made by the first worker that needs it and dropped by the last."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", uuid4().hex)[:12]
    name = f"isthmus_{run}_template"
    users = int(run, 16)  # an advisory lock that every worker shares while it uses the template
    with _template_turn(_maintenance):
        _maintenance.execute("SELECT pg_advisory_lock_shared(%s)", [users])
        if not _maintenance.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]).fetchone():
            _make_template(_maintenance, postgres_url, name)
    yield name
    with _template_turn(_maintenance):
        _maintenance.execute("SELECT pg_advisory_unlock_shared(%s)", [users])
        alone = _maintenance.execute("SELECT pg_try_advisory_lock(%s)", [users]).fetchone()
        if alone == (True,):
            _drop(_maintenance, name)


@pytest.fixture
def database_url(postgres_url: str, _maintenance: psycopg.Connection, _template: str) -> Iterator[str]:
    """A fresh, migrated database of the test's own."""
    name = f"isthmus_{uuid4().hex[:12]}"
    copy = sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY wal_log")
    _maintenance.execute(copy.format(sql.Identifier(name), sql.Identifier(_template)))
    try:
        yield _with_database(postgres_url, name)
    finally:
        _drop(_maintenance, name)


@pytest.fixture
def empty_database_url(postgres_url: str, _maintenance: psycopg.Connection) -> Iterator[str]:
    """A fresh database without a schema."""
    name = f"isthmus_{uuid4().hex[:12]}"
    _create_empty(_maintenance, name)
    try:
        yield _with_database(postgres_url, name)
    finally:
        _drop(_maintenance, name)


def _make_template(connection: psycopg.Connection, url: str, name: str) -> None:
    """Migrate a new database; it gets the template's name only when it is whole."""
    from app.database import migrate

    draft = f"{name}_draft"
    _drop(connection, draft)
    _create_empty(connection, draft)
    migrate(_with_database(url, draft))
    connection.execute(sql.SQL("ALTER DATABASE {} RENAME TO {}").format(sql.Identifier(draft), sql.Identifier(name)))


def _create_empty(connection: psycopg.Connection, name: str) -> None:
    statement = sql.SQL("CREATE DATABASE {} TEMPLATE template0 STRATEGY wal_log")
    connection.execute(statement.format(sql.Identifier(name)))


def _drop(connection: psycopg.Connection, name: str) -> None:
    connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


@contextmanager
def _template_turn(connection: psycopg.Connection) -> Iterator[None]:
    connection.execute("SELECT pg_advisory_lock(%s)", [TEMPLATE_LOCK])
    try:
        yield
    finally:
        connection.execute("SELECT pg_advisory_unlock(%s)", [TEMPLATE_LOCK])


def _with_database(url: str, name: str) -> str:
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


def _outlast(data_dir: Path) -> None:
    """Leave a process behind that stops the server when all its users have gone.

    The shell makes it nobody's child, in a session of its own: what ends the run does not end it too.
    """
    subprocess.run(
        ["/bin/sh", "-c", '"$@" &', "sh", sys.executable, "-c", WATCHDOG, str(data_dir)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        check=True,
    )
