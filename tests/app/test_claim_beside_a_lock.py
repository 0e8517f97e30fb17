"""A task that somebody looks at just now is not lost to the worker that waits for it."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from app.rounds import offers
from tests.federation import Federation, job_spec

MOMENT_S = 0.5
"""Long enough for a claim to find the row locked; where it is not, nothing is shown and nothing fails."""
WAIT_S = 8


def test_a_task_whose_row_is_locked_when_its_worker_wakes_is_claimed_once_it_is_free(
    federation: Federation, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A late heartbeat, or the message of a secured round's step, holds the row for a moment; and a new attempt of the
    round wakes the same worker in that very moment."""
    claim_task, looked = offers.claim_task, threading.Event()

    async def claim_and_tell(*arguments: Any) -> Any:
        looked.set()
        return await claim_task(*arguments)

    monkeypatch.setattr(offers, "claim_task", claim_and_tell)
    job = federation.start(job_spec())
    with psycopg.connect(database_url) as other, ThreadPoolExecutor(1) as pool:
        other.execute("SELECT 1 FROM tasks WHERE job_id = %s FOR UPDATE", [job.id])
        waiting = pool.submit(federation.sites[0].try_claim, WAIT_S)
        assert looked.wait(WAIT_S)
        time.sleep(MOMENT_S)
        other.rollback()
        offer = waiting.result()
    assert offer is not None
    assert offer.job_id == job.id
