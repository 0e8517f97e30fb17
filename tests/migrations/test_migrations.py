"""The schema's history: it goes up and down, ends at the models, and keeps the books append-only."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import CheckConstraint, Connection, Engine, create_engine, inspect

from app.database import alembic_config, migrate, sqlalchemy_url
from app.models import Base
from migrations import procrastinate_schema

ROOT = Path(__file__).parent.parent.parent


def engine_of(url: str) -> Engine:
    return create_engine(sqlalchemy_url(url))


@pytest.fixture
def migrated(database_url: str) -> Iterator[Connection]:
    """A connection to a migrated database."""
    engine = engine_of(database_url)
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def names_in(url: str) -> set[str]:
    """Every table, function and type of the schema `public`."""
    with psycopg.connect(url) as connection:
        return {
            str(row[0])
            for query in (
                "SELECT tablename FROM pg_tables WHERE schemaname = 'public'",
                "SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace",
                "SELECT typname FROM pg_type WHERE typnamespace = 'public'::regnamespace AND typtype IN ('e', 'c')",
            )
            for row in connection.execute(query)
        }


def test_up_down_and_up_again_end_at_the_same_schema(empty_database_url: str) -> None:
    migrate(empty_database_url)
    before = names_in(empty_database_url)

    command.downgrade(alembic_config(empty_database_url), "base")
    assert names_in(empty_database_url) <= {"alembic_version"}

    migrate(empty_database_url)
    assert names_in(empty_database_url) == before
    assert set(Base.metadata.tables) < before


def test_there_is_one_head(empty_database_url: str) -> None:
    assert len(ScriptDirectory.from_config(alembic_config(empty_database_url)).get_heads()) == 1


def test_the_schema_equals_the_models(migrated: Connection) -> None:
    def ours(name: str | None, kind: str, parents: object) -> bool:
        return kind != "table" or not (name or "").startswith("procrastinate_")

    context = MigrationContext.configure(
        migrated, opts={"compare_type": True, "compare_server_default": True, "include_name": ours}
    )

    assert compare_metadata(context, Base.metadata) == []


def test_checks_and_partial_indexes_equal_the_models(migrated: Connection) -> None:
    """Alembic does not compare them, so both sides are written out by Postgres: ours in a schema of the models' own."""
    migrated.exec_driver_sql("CREATE SCHEMA of_models")
    migrated.exec_driver_sql("SET LOCAL search_path = of_models, public")  # functions are those of the migrations
    Base.metadata.create_all(migrated, checkfirst=False)
    migrated.exec_driver_sql("SET LOCAL search_path = pg_catalog")
    constraints = (
        "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint "
        "WHERE connamespace = '{schema}'::regnamespace AND contype <> 'n' ORDER BY 1, 2"
    )
    indexes = "SELECT tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = '{schema}' ORDER BY 1, 2"

    for query in (constraints, indexes):
        models, migrations = (
            [
                tuple(str(part).replace("of_models.", "").replace("public.", "") for part in row)
                for row in migrated.exec_driver_sql(query.format(schema=schema))
                if "procrastinate_" not in str(row) and "alembic_version" not in str(row)
            ]
            for schema in ("of_models", "public")
        )
        assert models == migrations


def test_every_check_of_the_models_has_a_name_of_its_own(migrated: Connection) -> None:
    inspector = inspect(migrated)

    for name, table in Base.metadata.tables.items():
        found = {check["name"] for check in inspector.get_check_constraints(name)}
        assert len(found) == len([item for item in table.constraints if isinstance(item, CheckConstraint)])
        assert all(str(check).startswith(f"ck_{name}_") for check in found)


def test_two_processes_that_migrate_at_once_wait_for_each_other(empty_database_url: str) -> None:
    program = "import os; from app.database import migrate; migrate(os.environ['ISTHMUS_DATABASE_URL'])"
    environment = {**os.environ, "ISTHMUS_DATABASE_URL": empty_database_url}
    both = [
        subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]

    for process in both:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said


def test_migrating_a_migrated_database_changes_nothing(database_url: str) -> None:
    before = names_in(database_url)
    migrate(database_url)
    assert names_in(database_url) == before


@pytest.mark.parametrize("change", ["UPDATE {} SET {} = {}", "DELETE FROM {}", "TRUNCATE {}"])
@pytest.mark.parametrize(("table", "column"), [("events", "actor"), ("ledger_entries", "digest")])
def test_the_books_are_append_only(database_url: str, table: str, column: str, change: str) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute("INSERT INTO event_streams VALUES ('platform', 1, 'a')")
        connection.execute(
            "INSERT INTO events VALUES (%s, 'platform', 1, 'key-issued', now(), 'somebody', '{}', 'a', 'b')", [uuid4()]
        )

        with pytest.raises(psycopg.errors.RestrictViolation, match=f"{table} is append-only"):
            connection.execute(change.format(table, column, column).encode())


def test_the_queue_has_the_schema_of_the_installed_package(database_url: str) -> None:
    """If this fails after an upgrade of procrastinate: add a migration that calls `bring_up_to_date()`."""
    with psycopg.connect(database_url) as connection:
        row = connection.execute("SELECT obj_description('procrastinate_jobs'::regclass, 'pg_class')").fetchone()

    assert row is not None
    noted = tuple(int(part) for part in str(row[0]).removeprefix("schema of procrastinate ").split("."))
    assert procrastinate_schema.pending(noted) == []
    assert procrastinate_schema.pending((3, 2, 0)) != []
