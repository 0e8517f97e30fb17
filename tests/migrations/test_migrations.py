"""The schema's history: it goes up and down, ends at the models, and keeps the books append-only."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import CheckConstraint, Connection, Engine, create_engine, inspect

from app.database import alembic_config, migrate, sqlalchemy_url
from app.models import Base
from isthmus.wire.jobs import JobSpec
from isthmus.wire.privacy import PrivacySpec, PrivacyUnit
from migrations import procrastinate_schema
from tests.federation import job_spec

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


BEFORE_PRIVACY = "2026_11_23_index_tasks_to_claim"
SHA = "a" * 64


def old_spec(clip_norm: float | None, noise_multiplier: float, release: str | None) -> dict[str, Any]:
    """A spec as it was stored before privacy was accounted for."""
    spec = job_spec().model_dump(mode="json")
    spec["privacy"] = {"clip_norm": clip_norm, "noise_multiplier": noise_multiplier}
    spec["evaluation"]["release"] = release
    del spec["evaluation"]["noise_multiplier"]
    for feature in spec["data"]["features"]:
        for name in ("range", "shape", "divide_by"):
            del feature[name]
    return spec


@pytest.fixture
def old_database(empty_database_url: str) -> str:
    """A database from before privacy was accounted for, with a steward who set a dataset's policy."""
    command.upgrade(alembic_config(empty_database_url), BEFORE_PRIVACY)
    with psycopg.connect(empty_database_url) as connection:
        organization, steward, agent, worker = (uuid4() for _ in range(4))
        connection.execute("INSERT INTO organizations VALUES (%s, 'clinic', 'Clinic', now())", [organization])
        for principal, role in ((steward, "steward"), (agent, "worker")):
            connection.execute(
                "INSERT INTO principals VALUES (%s, %s, '', %s, %s, now())", [principal, role, role, organization]
            )
        connection.execute(
            "INSERT INTO workers VALUES (%s, %s, %s, 'agent', 'key', '1', now())", [worker, organization, agent]
        )
        connection.execute(
            "INSERT INTO datasets VALUES (%s, %s, 'heart', %s, 'confirmed', '{}', 303, '{train}', '',"
            " '{\"min_cohort\": 3}', %s, now(), now())",
            [uuid4(), organization, worker, steward],
        )
    return empty_database_url


def insert_job(connection: psycopg.Connection[Any], state: str, spec: dict[str, Any]) -> UUID:
    """A job of the steward's, with that spec."""
    job_id = uuid4()
    connection.execute(
        "INSERT INTO jobs (id, name, owner_id, state, spec, spec_digest, rounds_completed, created_at)"
        " SELECT %s, 'job', id, %s, %s, %s, 0, now() FROM principals WHERE role = 'steward'",
        [job_id, state, json.dumps(spec), SHA],
    )
    return job_id


@pytest.mark.parametrize(
    ("clip_norm", "noise_multiplier", "release", "kept", "told"),
    [
        (None, 0.0, None, None, None),
        (1.5, 0.0, None, 1.5, "local"),
        (1.5, 2.0, "exact", 1.5, "exact"),
        (1e300, 0.5, None, 1e9, "local"),
    ],
)
def test_specs_from_before_privacy_was_accounted_for_claim_nothing_and_can_be_read(
    old_database: str, clip_norm: float | None, noise_multiplier: float, release: str | None, kept: float | None,
    told: str | None,
) -> None:  # fmt: skip
    before = old_spec(clip_norm, noise_multiplier, release)
    with psycopg.connect(old_database) as connection:
        insert_job(connection, "completed", before)

    migrate(old_database)

    with psycopg.connect(old_database) as connection:
        rows = connection.execute("SELECT spec, spec_digest, state, pg_typeof(spec)::text FROM jobs").fetchall()
    ((stored, digest, state, kind),) = rows
    spec = JobSpec.model_validate(stored)
    assert (digest, state, kind) == (SHA, "completed", "json")
    assert stored["privacy"] == PrivacySpec(unit=PrivacyUnit.NONE, clip_norm=kept).model_dump(mode="json")
    assert stored["evaluation"]["release"] == told
    assert {**stored, "privacy": 0, "evaluation": 0} == {**before, "privacy": 0, "evaluation": 0}
    assert spec.evaluation.holdout == before["evaluation"]["holdout"]


@pytest.mark.parametrize("state", ["draft", "awaiting_approval", "running", "paused"])
def test_jobs_that_were_not_over_end_when_their_specs_are_rewritten(old_database: str, state: str) -> None:
    with psycopg.connect(old_database) as connection:
        job_id, round_id, done_id, participation_id = (
            insert_job(connection, state, old_spec(1.0, 1.0, None)), uuid4(), uuid4(), uuid4()
        )  # fmt: skip
        connection.execute(
            "INSERT INTO participations SELECT %s, %s, id, 'approved', NULL, 303, now() FROM datasets",
            [participation_id, job_id],
        )
        for number, one, phase, task in (
            (1, done_id, "completed", "submitted"),
            (2, round_id, "collecting", "claimed"),
        ):
            connection.execute(
                "INSERT INTO rounds VALUES (%s, %s, %s, 'train', %s, 1, 3, %s, 2, 2, 2, 0, %s, NULL, '{}', NULL,"
                " now(), now(), 5)",
                [one, job_id, number, phase, SHA, SHA],
            )
            connection.execute(
                "INSERT INTO tasks SELECT %s, %s, %s, %s, id, 'train', %s, 1, 1, NULL, NULL, now(), now() FROM workers",
                [uuid4(), job_id, one, participation_id, task],
            )

    migrate(old_database)

    with psycopg.connect(old_database) as connection:
        jobs = connection.execute(
            "SELECT state, ended_at IS NULL, detail LIKE '%%Submit%%anew%%' FROM jobs", []
        ).fetchall()
        rounds = connection.execute("SELECT phase FROM rounds ORDER BY number").fetchall()
        tasks = connection.execute(
            "SELECT t.state, t.lease_expires_at IS NULL FROM tasks t JOIN rounds r ON r.id = t.round_id ORDER BY number"
        ).fetchall()
    assert jobs == [("failed", False, True)]
    assert rounds == [("completed",), ("cancelled",)]
    assert tasks == [("submitted", False), ("cancelled", True)]


def test_a_policy_that_was_reset_is_nobody_s(old_database: str) -> None:
    """Else it would count as the steward's, who allows nothing, whatever the worker announces."""
    migrate(old_database)

    with psycopg.connect(old_database) as connection:
        assert connection.execute("SELECT policy::text, policy_set_by FROM datasets").fetchall() == [("{}", None)]


BEFORE_SECURE_AGGREGATION = "2026_11_23_account_for_privacy"


def test_going_back_ends_jobs_under_secure_aggregation_and_leaves_the_others(old_database: str) -> None:
    migrate(old_database)
    spec = job_spec().model_dump(mode="json")
    secured = {**spec, "secure_aggregation": {"clip_norm": 1.0, "max_colluding": 0, "step_s": 60.0}}
    with psycopg.connect(old_database) as connection:
        plain_id, secured_id = insert_job(connection, "running", spec), insert_job(connection, "running", secured)
        for job_id, phase in ((plain_id, "collecting"), (secured_id, "unmasking")):
            connection.execute(
                "INSERT INTO rounds (id, job_id, number, kind, phase, attempt, attempts, cohort_seed, cohort_size,"
                " target_updates, min_updates, accepted, model_digest, metrics, opened_at, closes_at, grace_s)"
                " VALUES (%s, %s, 1, 'train', %s, 1, 3, %s, 3, 3, 3, 0, %s, '{}', now(), now(), 5)",
                [uuid4(), job_id, phase, SHA, SHA],
            )
        with pytest.raises(psycopg.errors.UniqueViolation), connection.transaction():
            connection.execute(
                "UPDATE rounds SET number = 2, phase = 'survivors', job_id = %s WHERE phase = 'collecting'",
                [secured_id],
            )

    command.downgrade(alembic_config(old_database), BEFORE_SECURE_AGGREGATION)

    with psycopg.connect(old_database) as connection:
        rows = connection.execute(
            "SELECT j.id, j.state, r.phase, j.spec::jsonb ? 'secure_aggregation' FROM jobs j JOIN rounds r"
            " ON r.job_id = j.id"
        ).fetchall()
    assert {row[0]: row[1:] for row in rows} == {
        plain_id: ("running", "collecting", False),
        secured_id: ("failed", "cancelled", False),
    }


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
