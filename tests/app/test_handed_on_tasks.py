"""A dataset that is handed on in the middle of a round: its task goes to the worker that serves it now."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest

from app.coordinator import sweep
from app.main import open_parts
from app.settings import Settings
from isthmus.client import Client
from isthmus.wire.datasets import Handover, handover_bytes
from isthmus.wire.events import EventKind
from isthmus.wire.problems import ProblemCode
from isthmus.wire.rounds import TaskState
from tests.federation import RECORD, Federation, Site, filled, job_spec
from tests.running import announcement, refused

MakeFederation = Callable[..., Federation]
UPDATE = filled(0.1)


@pytest.fixture
def quiet(make_federation: MakeFederation) -> Federation:
    """Three sites on a service without a coordinator."""
    return make_federation(coordinate=False)


def hand_on(site: Site) -> Client:
    """Have another worker of the site serve its dataset; the worker that served it until now is returned."""
    giver, taker = site.worker, site.platform.worker(site.organization, "successor")
    giving, taking = (site.platform.signing[worker][0] for worker in (giver, taker))
    terms = {
        "giver": giving.public_key().public_bytes_raw().hex(),
        "taker": taking.public_key().public_bytes_raw().hex(),
        "lineage": site.dataset.lineage,
        "entries": 1,
        "head": "ab" * 32,
        "document": "cd" * 32,
        "signed_at": datetime.now(UTC),
    }
    said = handover_bytes(site.organization.name, site.dataset.name, **terms)
    handover = Handover(**terms, given=giving.sign(said).hex(), taken=taking.sign(said).hex())
    now = site.steward.datasets.get(site.dataset.id)
    body = announcement(
        taking, site.organization.name, now.name, lineage=now.lineage, rows=now.rows, policy=now.announced_policy
    )
    taker.datasets.announce(now.name, body.model_copy(update={"handover": handover}))
    site.worker = taker
    return giver


def sweep_once(federation: Federation) -> None:
    settings = Settings(database_url=federation.platform.database_url, data_dir=federation.folder / "data")

    async def run() -> None:
        async with open_parts(settings) as parts:
            await sweep(parts, aggregation_retry=timedelta(minutes=1))

    asyncio.run(run())


def test_a_task_on_offer_goes_to_the_worker_that_serves_the_dataset_now(quiet: Federation) -> None:
    quiet.start(job_spec())
    site = quiet.sites[0]
    former = hand_on(site)
    successor, site.worker = site.worker, former
    assert site.try_claim() is None, "it serves the dataset no more, before any sweep"
    site.worker = successor

    sweep_once(quiet)

    assert site.hand_in(site.claim(), UPDATE)


def test_a_task_under_work_is_taken_from_the_former_worker_and_done_by_the_new_one(quiet: Federation) -> None:
    job = quiet.start(job_spec())
    site = quiet.sites[0]
    offer = site.claim()
    former = hand_on(site)
    successor, site.worker = site.worker, former
    with refused(ProblemCode.TASK_NOT_OPEN):
        site.hand_in(offer, UPDATE)
    assert quiet.platform.execute("SELECT count(*) FROM ledger_entries") == [(0,)]
    site.worker = successor

    sweep_once(quiet)

    anew = site.claim()
    assert (anew.task_id, anew.fence) == (offer.task_id, offer.fence + 1)
    assert site.hand_in(anew, UPDATE)
    assert quiet.platform.execute("SELECT count(*) FROM ledger_entries") == [(1,)]
    lost = [one for one in quiet.platform.admin.events.list(f"job:{job.id}") if one.kind is EventKind.LEASE_LOST]
    assert [one.data["task_id"] for one in lost] == [str(offer.task_id)]
    site.worker = former
    with refused(ProblemCode.NOT_FOUND):
        site.heartbeat(offer)


def test_what_was_spent_before_the_handover_is_spent_once(quiet: Federation) -> None:
    """The former worker was admitted, and its body was lost: the new one hands in the same bytes, for nothing."""
    quiet.start(job_spec(privacy=RECORD))
    site = quiet.sites[0]
    offer = site.claim()
    path, digest = site.body(offer, UPDATE)
    with pytest.raises(ConnectionAbortedError):
        site.worker.tasks.submit_update(offer.task_id, path, digest=digest, fence=offer.fence, on_admitted=abandon)
    spends = "SELECT count(*) FROM ledger_entries WHERE kind = 'spend'"
    assert quiet.platform.execute(spends) == [(1,)]
    hand_on(site)

    sweep_once(quiet)

    assert site.hand_in(site.claim(), UPDATE).digest == digest
    assert quiet.platform.execute(spends) == [(1,)]
    assert quiet.platform.execute("SELECT state FROM tasks WHERE state = 'submitted'") == [(TaskState.SUBMITTED.value,)]


def abandon() -> None:
    """The process dies between leave to send and the first byte."""
    raise ConnectionAbortedError
