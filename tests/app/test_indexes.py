"""A service runs for years: what a round asks of Postgres costs the same after ten thousand jobs as after one."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine, event

from isthmus.wire.jobs import JobState
from tests.federation import Federation, filled, job_spec
from tests.secured import enter, go, secured_spec

LARGE = frozenset({"jobs", "participations", "rounds", "tasks", "updates", "checkpoints", "events", "grants"})
"""Tables that grow as long as there are jobs."""
COPY = (
    "INSERT INTO {table} SELECT (jsonb_populate_record(t, jsonb_build_object({changes}))).*"
    " FROM {table} t, generate_series(1, 2000) n"
)


def copied(table: str, *keys: str, more: str = "") -> str:
    """Two thousand times what a table holds, with other keys."""
    changes = ", ".join(f"'{key}', pg_temp.id(t.{key}, n)" for key in ("id", *keys))
    return COPY.format(table=table, changes=changes + more)


PAST = (
    "CREATE FUNCTION pg_temp.id(uuid, int) RETURNS uuid LANGUAGE sql IMMUTABLE RETURN md5($1::text || $2)::uuid",
    copied("jobs", more=", 'name', t.name || n"),
    copied("participations", "job_id"),
    copied("grants", "participation_id"),
    copied("rounds", "job_id"),
    copied("checkpoints", "job_id"),
    copied("tasks", "job_id", "round_id", "participation_id"),
    copied("updates", "task_id", "round_id", "participation_id"),
    "ANALYZE",
)
"""Two thousand more jobs like the one that is over."""
EXPLAINED = ("SELECT", "INSERT", "UPDATE", "DELETE", "WITH")


@contextmanager
def asked() -> Iterator[dict[str, Any]]:
    """The statements of every engine of this process while the block runs, each with values that it was sent with."""
    found: dict[str, Any] = {}

    def note(_connection: Any, _cursor: Any, statement: str, values: Any, *_: Any) -> None:
        if statement.lstrip().startswith(EXPLAINED):
            found[statement] = values[0] if isinstance(values, list) else values

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield found
    finally:
        event.remove(Engine, "before_cursor_execute", note)


def read_whole(plan: dict[str, Any]) -> Iterator[str]:
    """Tables that a plan reads from the first row to the last."""
    if plan["Node Type"] == "Seq Scan":
        yield plan["Relation Name"]
    for step in plan.get("Plans", ()):
        if plan["Node Type"] != "Limit" or step["Node Type"] != "Seq Scan" or "Filter" in step:  # else it is any row
            yield from read_whole(step)


@pytest.mark.parametrize("secured", [False, True], ids=["plain", "secured"])
def test_nothing_that_a_round_or_a_sweep_asks_reads_a_whole_table(
    make_federation: Callable[..., Federation], secured: bool
) -> None:
    with asked() as statements:
        federation = make_federation()
        job = federation.start(secured_spec() if secured else job_spec(rounds=2))
        if secured:
            go(enter(federation.sites))
        else:
            for _round in range(2):
                for site in federation.sites:
                    offer = site.claim()
                    site.heartbeat(offer)
                    site.hand_in(offer, filled(1.0))
        assert federation.finish(job).state is JobState.COMPLETED

    assert len(statements) > 50
    whole = {}
    with psycopg.connect(federation.platform.database_url, autocommit=True) as connection:
        for statement in PAST:
            connection.execute(statement.encode())
        for statement, values in statements.items():
            (plan,) = connection.execute(f"EXPLAIN (FORMAT JSON) {statement}".encode(), values).fetchone() or ()
            if tables := set(read_whole((json.loads(plan) if isinstance(plan, str) else plan)[0]["Plan"])) & LARGE:
                whole[" ".join(statement.split())] = tables
    assert whole == {}
