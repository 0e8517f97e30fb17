"""A Postgres of the torture's own: durable, restarted in the middle of things, with a clock that can jump."""

import contextlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
from psycopg import sql

from app.database import migrate
from app.embedded_postgres import EmbeddedPostgres

_migrating = threading.Lock()  # alembic keeps what it is doing in its module: one thread at a time


class OwnPostgres:
    """One server. It is not in the mode for tests: a restart in immediate mode must lose nothing that was committed."""

    def __init__(self, folder: Path) -> None:
        self._postgres = EmbeddedPostgres(folder)

    def open(self) -> str:
        """Start it; the URL of its migrated database."""
        url = self._postgres.join()
        with _migrating:
            migrate(url)
        return url

    def restart(self, mode: str) -> None:
        """Stop it as `pg_ctl` names it, `fast` (clients are sent away) or `immediate` (as a crash), and start it."""
        postgres = self._postgres
        with postgres._turn():
            stopped = postgres._run("pg_ctl", "stop", "-w", "-t", "60", "-m", mode, inside=postgres.server_dir)
            assert stopped.returncode == 0, stopped.stdout
            postgres._ensure_running()

    def close(self) -> None:
        """Stop it for good."""
        self._postgres.leave()
        self._postgres.discard()


@contextmanager
def own_postgres(folder: Path) -> Iterator[OwnPostgres]:
    """A Postgres that is not left behind."""
    postgres = OwnPostgres(folder)
    try:
        yield postgres
    finally:
        postgres.close()


class JumpingClock:
    """Puts a `clock_timestamp` of our own before Postgres's in everybody's search path, off by as much as we say.

    To be made before the service connects: the search path is a database's, and taken at the beginning of a session.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        with psycopg.connect(url, autocommit=True) as connection:
            name = connection.info.dbname
            connection.execute("CREATE SCHEMA torture")
            connection.execute("CREATE TABLE torture.jump (seconds double precision NOT NULL)")
            connection.execute("INSERT INTO torture.jump VALUES (0)")
            connection.execute(
                "CREATE FUNCTION torture.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE AS $$"
                " SELECT pg_catalog.clock_timestamp() + make_interval(secs => (SELECT seconds FROM torture.jump)) $$"
            )
            path = sql.SQL("ALTER DATABASE {} SET search_path = public, torture, pg_catalog")
            connection.execute(path.format(sql.Identifier(name)))

    def jump(self, seconds: float) -> None:
        """Move it by so much; everybody sees it with the next statement."""
        with psycopg.connect(self._url, autocommit=True) as connection:
            connection.execute("UPDATE torture.jump SET seconds = seconds + %s", [seconds])

    def right(self) -> None:
        """The right time again."""
        with psycopg.connect(self._url, autocommit=True) as connection:
            connection.execute("UPDATE torture.jump SET seconds = 0")

    def is_obeyed(self) -> bool:
        """Whether a session that asks as the service does gets our time."""
        self.jump(86_400)
        try:
            with psycopg.connect(self._url, autocommit=True) as connection:
                row = connection.execute("SELECT clock_timestamp() - pg_catalog.clock_timestamp()").fetchone()
                return row is not None and row[0].total_seconds() > 80_000
        finally:
            self.jump(-86_400)


class Watch:
    """A connection that survives restarts of the server: it answers None while there is none."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._connection: psycopg.Connection | None = None

    def ask(self, statement: str, *values: object) -> list[tuple[object, ...]] | None:
        """The rows, or None."""
        try:
            if self._connection is None:
                self._connection = psycopg.connect(self._url, autocommit=True, connect_timeout=5)
            return self._connection.execute(statement.encode(), values).fetchall()
        except psycopg.OperationalError:
            self.close()
            time.sleep(0.05)
            return None

    def close(self) -> None:
        """Let go."""
        if self._connection is not None:
            with contextlib.suppress(psycopg.Error):
                self._connection.close()
        self._connection = None
