"""Where the demo's service keeps its records: an embedded Postgres, or a new database on a server that is given."""

import os
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

VARIABLE: Final = "ISTHMUS_DATABASE_URL"


def settings_for(folder: Path) -> dict[str, str]:
    """The service's environment as far as its database goes. A given server gets a new, empty database."""
    given = os.environ.get(VARIABLE)
    if not given:
        return {}
    name = f"isthmus_demo_{uuid4().hex[:12]}"
    _execute(given, "CREATE DATABASE {}", name)
    _record(folder).write_text(name + "\n")
    return {VARIABLE: urlunsplit(urlsplit(given)._replace(path=f"/{name}"))}


def described(folder: Path) -> str:
    """Where the records are, in words."""
    if (record := _record(folder)).exists():
        return f"the new database {record.read_text().strip()} of the server in {VARIABLE}"
    return "a Postgres of its own"


def clear(folder: Path) -> None:
    """After the service has ended: drop the database made for it, or stop a Postgres that it left behind."""
    if (record := _record(folder)).exists():
        if given := os.environ.get(VARIABLE):
            _execute(given, "DROP DATABASE IF EXISTS {} WITH (FORCE)", record.read_text().strip())
            record.unlink()
        return
    embedded = folder / "service" / "postgres"
    if (embedded / "server" / "postmaster.pid").exists():  # the service was killed
        from app.embedded_postgres import EmbeddedPostgres  # noqa: PLC0415 - hardly ever needed

        EmbeddedPostgres(embedded).outlast()


def _execute(url: str, statement: str, name: str) -> None:
    import psycopg  # noqa: PLC0415 - only where a server is given
    from psycopg import sql  # noqa: PLC0415

    with psycopg.connect(url.replace("postgresql+psycopg:", "postgresql:", 1), autocommit=True) as connection:
        connection.execute(sql.SQL(statement).format(sql.Identifier(name)))


def _record(folder: Path) -> Path:
    return folder / "database"
