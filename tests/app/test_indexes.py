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

SMALL = frozenset({"discarded_blobs"})
"""Tables whose rows are all there is to do."""
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
        connection.execute("SET enable_seqscan = off")  # tables are empty here; so only where there is no other way
        for statement, values in statements.items():
            (plan,) = connection.execute(f"EXPLAIN (FORMAT JSON) {statement}".encode(), values).fetchone() or ()
            tables = set(read_whole((json.loads(plan) if isinstance(plan, str) else plan)[0]["Plan"])) - SMALL
            if tables:
                whole[" ".join(statement.split())] = tables
    assert whole == {}
