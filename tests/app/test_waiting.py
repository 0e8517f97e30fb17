"""Workers that wait for work: no offer is missed, and what is said to those who went away empty-handed."""

import asyncio
import gc
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy.exc import TimeoutError as PoolTimeout

from app import dependencies, garbage
from isthmus.wire.problems import ProblemCode
from isthmus.wire.rounds import ClaimTask
from tests.federation import Federation
from tests.running import Platform, refused

PATIENCE_S = 30


def test_an_offer_between_the_first_look_and_the_waiting_is_not_missed(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, looked = federation.sites[0], list[str]()

    async def looking(session: Any, credentials: Any, question: Any) -> Any:
        caller, offered = await dependencies.authenticate_asking(session, credentials, question)
        if not offered and not looked:
            looked.append(caller.name)
            await asyncio.to_thread(federation.start)
            await asyncio.to_thread(federation.sites[1].claim)  # it was woken: this process heard of the offers
        return caller, offered

    monkeypatch.setattr("app.rounds.router.authenticate_asking", looking)

    assert site.try_claim(wait_s=PATIENCE_S) is not None
    assert looked


def test_what_is_offered_while_its_worker_waits_reaches_it_before_the_wait_is_over(federation: Federation) -> None:
    with ThreadPoolExecutor(1) as calls:
        waiting = calls.submit(federation.sites[0].try_claim, PATIENCE_S)  # nobody looks again at the end of a wait
        until_waiting(federation.platform, 1)
        federation.start()

        assert waiting.result() is not None


def until_waiting(platform: Platform, workers: int) -> None:
    """Return when the service says that so many workers wait."""
    http = platform.http(platform.admin)
    ends = time.monotonic() + PATIENCE_S
    while f"isthmus_workers_waiting {workers}.0" not in http.get("/metrics").text.splitlines():
        assert time.monotonic() < ends, "they do not wait"
        time.sleep(0.02)


def test_a_worker_that_waits_in_vain_comes_again_at_once_and_one_that_does_not_wait_later(
    federation: Federation,
) -> None:
    http = federation.platform.http(federation.sites[0].worker)

    waited = http.post("/v1/tasks/claim", params={"wait": 1}, json={})
    asked = http.post("/v1/tasks/claim", json={})

    assert (waited.status_code, waited.headers["retry-after"]) == (204, "0")
    assert (asked.status_code, asked.headers["retry-after"]) == (204, "1")


def test_a_claim_for_other_datasets_waits_though_something_is_on_offer(federation: Federation) -> None:
    federation.start()
    site = federation.sites[0]

    assert not hasattr(site.worker.tasks.claim(ClaimTask(datasets=("another",)), wait_s=1), "task_id")
    assert site.try_claim() is not None


def test_a_claim_is_a_sign_of_life_of_the_worker_and_a_use_of_its_key(federation: Federation) -> None:
    site, database = federation.sites[0], federation.platform
    database.execute("UPDATE workers SET last_seen_at = NULL")
    database.execute("UPDATE api_keys SET last_used_at = now() - interval '2 minutes'")

    site.try_claim()

    ((seen, used),) = database.execute(
        "SELECT last_seen_at > now() - interval '1 minute', last_used_at = last_seen_at"
        " FROM workers JOIN api_keys USING (principal_id) WHERE last_seen_at IS NOT NULL"
    )
    assert (seen, used) == (True, True)


def test_a_service_with_no_connection_to_spare_says_so_and_when_to_come_again(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def exhausted(*_: Any) -> Any:
        raise PoolTimeout("QueuePool limit of size 10 overflow 0 reached, connection timed out, timeout 30.00")

    worker = platform.worker(platform.organization())
    monkeypatch.setattr("app.rounds.router.authenticate_asking", exhausted)

    with refused(ProblemCode.NOT_READY) as found:
        worker.tasks.claim(ClaimTask(), wait_s=0)
    assert found[0].retry_after_s in range(2, 11)


class Ring:
    """Refers to itself: only the collector can free it."""

    def __init__(self) -> None:
        self.itself = self


async def test_old_garbage_is_collected_by_the_clock_and_not_by_the_number_of_objects(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(garbage, "EVERY_S", 0.05)
    before = gc.get_threshold()
    ring = Ring()
    gc.collect()  # it is old now: no look at young objects finds it
    freed = asyncio.Event()
    weakref.finalize(ring, asyncio.get_running_loop().call_soon_threadsafe, freed.set)
    del ring

    collecting = asyncio.create_task(garbage.collect_seldom())
    await asyncio.sleep(0)
    by_number = gc.get_threshold()
    async with asyncio.timeout(PATIENCE_S):
        await freed.wait()
    collecting.cancel()
    await asyncio.gather(collecting, return_exceptions=True)

    assert by_number[:2] == before[:2]
    assert by_number[2] > 1_000_000
    assert gc.get_threshold() == before
