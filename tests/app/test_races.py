"""The decided races of the architecture, each as it was decided."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest

from app.rounds import aggregation
from app.rounds.aggregation import lock_key
from isthmus.wire.events import EventKind, verify_chain
from isthmus.wire.jobs import JobReason, JobState, JobView, ParticipationState, WithdrawParticipation
from isthmus.wire.problems import ProblemCode
from isthmus.wire.rounds import RoundPhase, TaskState
from tests.app.test_deadlines import HalfAnUpload
from tests.federation import Federation, Site, filled, job_spec, open_federation, round_id_of
from tests.running import refused

MakeFederation = Callable[..., Federation]


def withdraw(federation: Federation, job: JobView, site: Site) -> None:
    """The site's steward takes its grant back."""
    mine = next(part for part in site.steward.participations.list(job_id=job.id))
    site.steward.participations.withdraw(mine.id, WithdrawParticipation(note="the ethics board said stop"))


def lapse(federation: Federation) -> None:
    """Every lease has passed, for the one clock."""
    federation.platform.execute(
        "UPDATE tasks SET lease_expires_at = clock_timestamp() - interval '1 s' WHERE lease_expires_at IS NOT NULL"
    )


@contextmanager
def nobody_aggregates(federation: Federation, job: JobView, number: int = 1) -> Iterator[None]:
    """Another process holds the round's advisory lock."""
    with psycopg.connect(federation.platform.database_url, autocommit=True) as connection:
        connection.execute("SELECT pg_advisory_lock(%s)", [lock_key(round_id_of(federation, job, number))])
        yield


def spends(site: Site) -> list[str]:
    """What the service's ledger says was released of the site's dataset."""
    return [entry.digest for entry in site.steward.datasets.ledger(site.dataset.id)]


def test_a_lease_that_passed_but_was_not_taken_away_is_still_valid(make_federation: MakeFederation) -> None:
    federation = make_federation(coordinate=False, sites=2)
    job = federation.start()
    first, second = federation.sites
    kept, other = first.claim(), second.claim()
    lapse(federation)

    assert first.heartbeat(kept).held, "progress renews it"
    lapse(federation)
    first.hand_in(kept, filled(1.0))
    second.hand_in(other, filled(1.0))

    assert federation.researcher.jobs.round(job.id, 1).phase is RoundPhase.AGGREGATING


def test_a_lease_taken_away_is_offered_at_once_and_the_same_bytes_cost_nothing(federation: Federation) -> None:
    job = federation.start()
    first, second, third = federation.sites
    taken = first.claim()
    path, digest = first.body(taken, filled(1.0))
    half = HalfAnUpload(first, taken, 1.0)
    lapse(federation)

    again = first.claim()
    assert (again.task_id, again.fence) == (taken.task_id, taken.fence + 1)
    assert not first.heartbeat(taken).held
    assert b"lease-lost" in half.finish()
    first.send(again, path, digest)
    second.hand_in(second.claim(), filled(1.0))
    third.hand_in(third.claim(), filled(1.0))

    assert federation.finish(job).state is JobState.COMPLETED
    assert spends(first) == [digest]
    grants = [part.grant for part in federation.researcher.jobs.participations(job.id)]
    assert [grant.rounds_used for grant in grants if grant is not None] == [1, 1, 1]


def test_a_grant_withdrawn_in_mid_upload_deletes_the_bytes_and_keeps_the_spend(federation: Federation) -> None:
    job = federation.start()
    first, second, third = federation.sites
    upload = HalfAnUpload(third, third.claim(), 9.0)

    withdraw(federation, job, third)
    answer = upload.finish()

    assert b"grant-withdrawn" in answer, answer
    assert len(spends(third)) == 1
    first.hand_in(first.claim(), filled(1.0))
    second.hand_in(second.claim(), filled(1.0))
    assert federation.finish(job).state is JobState.COMPLETED
    assert (federation.model(job)["0.bias"] == 1.0).all()
    assert len(federation.blobs("updates")) == 2


def test_an_update_withdrawn_before_the_freeze_is_excluded_and_deleted(federation: Federation) -> None:
    job = federation.start()
    first, second, third = federation.sites
    third.hand_in(third.claim(), filled(9.0))
    assert len(federation.blobs("updates")) == 1

    withdraw(federation, job, third)

    assert not federation.blobs("updates")
    assert federation.researcher.jobs.round(job.id, 1).accepted == 0
    first.hand_in(first.claim(), filled(1.0))
    second.hand_in(second.claim(), filled(1.0))
    assert federation.finish(job).state is JobState.COMPLETED
    assert (federation.model(job)["0.bias"] == 1.0).all()
    assert len(spends(third)) == 1
    kinds = [event.kind for event in federation.researcher.jobs.events(job.id, follow=False)]
    assert EventKind.UPDATE_EXCLUDED in kinds


def test_an_update_withdrawn_after_the_freeze_is_in_this_aggregate_and_in_no_later_one(
    make_federation: MakeFederation,
) -> None:
    federation = make_federation(aggregation_retry=timedelta(seconds=0.2))
    job = federation.start(job_spec(rounds=2))
    first, second, third = federation.sites
    offers = [(site, site.claim()) for site in federation.sites]
    with nobody_aggregates(federation, job):
        for site, offer in offers:
            site.hand_in(offer, filled(3.0))
        withdraw(federation, job, third)
    federation.until(lambda: federation.job(job).rounds_completed == 1)
    assert (federation.model(job)["0.bias"] == 3.0).all()

    first.hand_in(first.claim(), filled(1.0))
    second.hand_in(second.claim(), filled(1.0))
    assert federation.finish(job).state is JobState.COMPLETED
    assert third.try_claim() is None
    events = list(federation.researcher.jobs.events(job.id, follow=False))
    told = next(event for event in events if event.kind is EventKind.PARTICIPATION_WITHDRAWN)
    assert told.data["stays_in_round"] == 1
    verify_chain(events)


def test_a_job_cancelled_while_aggregating_stays_cancelled(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed, go_on = threading.Event(), threading.Event()
    compute = aggregation._compute

    async def held(*arguments: Any) -> Any:
        result = await compute(*arguments)
        computed.set()
        await asyncio.to_thread(go_on.wait, 20)
        return result

    monkeypatch.setattr(aggregation, "_compute", held)
    job = federation.start()
    for site in federation.sites:
        site.hand_in(site.claim(), filled(1.0))
    assert computed.wait(20)

    federation.researcher.jobs.cancel(job.id)
    go_on.set()

    ended = federation.finish(job)
    assert (ended.state, ended.rounds_completed, ended.model_digest) == (
        JobState.CANCELLED, 0, federation.job(job).model_digest,
    )  # fmt: skip
    assert federation.researcher.jobs.round(job.id, 1).phase is RoundPhase.CANCELLED
    assert [item.round_number for item in federation.researcher.jobs.checkpoints(job.id)] == [0]


def test_a_paused_job_offers_nothing_finishes_what_is_claimed_and_opens_no_next_round(federation: Federation) -> None:
    job = federation.start(job_spec(rounds=2))
    first, second, third = federation.sites
    offers = [(site, site.claim()) for site in (first, second)]

    federation.researcher.jobs.pause(job.id)
    assert third.try_claim() is None, "nothing new is offered"
    for site, offer in offers:
        site.hand_in(offer, filled(1.0))
    federation.platform.execute("UPDATE rounds SET closes_at = clock_timestamp()")
    federation.until(lambda: federation.researcher.jobs.round(job.id, 1).accepted == 2)
    assert federation.job(job).state is JobState.PAUSED

    federation.researcher.jobs.resume(job.id)
    third.hand_in(third.claim(), filled(1.0))
    federation.until(lambda: federation.job(job).rounds_completed == 1)
    assert federation.job(job).current_round == 2


def test_the_round_of_a_paused_job_may_complete_and_the_next_opens_on_resume(federation: Federation) -> None:
    job = federation.start(job_spec(rounds=2))
    offers = [(site, site.claim()) for site in federation.sites]
    federation.researcher.jobs.pause(job.id)
    for site, offer in offers:
        site.hand_in(offer, filled(1.0))
    federation.until(lambda: federation.job(job).rounds_completed == 1)

    assert federation.job(job).current_round is None
    federation.researcher.jobs.resume(job.id)
    assert federation.job(job).current_round == 2


def test_a_pause_stops_the_clock_of_the_round(federation: Federation) -> None:
    job = federation.start()
    before = federation.researcher.jobs.round(job.id, 1).closes_at
    federation.researcher.jobs.pause(job.id)
    federation.platform.execute("UPDATE jobs SET paused_at = paused_at - interval '1 hour'")

    federation.researcher.jobs.resume(job.id)

    moved = federation.researcher.jobs.round(job.id, 1).closes_at - before
    assert timedelta(hours=1) <= moved < timedelta(hours=1, minutes=1)


def test_with_too_few_grants_left_the_job_pauses_and_says_so(federation: Federation) -> None:
    job = federation.start(job_spec(rounds=2))
    for site in federation.sites:
        site.hand_in(site.claim(), filled(1.0))
    federation.until(lambda: federation.job(job).current_round == 2)
    for site in federation.sites[:2]:
        withdraw(federation, job, site)

    paused = federation.until_state(job, JobState.PAUSED)
    assert paused.reason is JobReason.TOO_FEW_PARTICIPATIONS
    assert paused.current_round == 2

    federation.researcher.jobs.resume(job.id)
    assert federation.job(job).state is JobState.PAUSED, "nobody new is there to be asked"


def test_with_too_few_grants_before_a_round_opens_the_job_pauses_and_says_so(
    make_federation: MakeFederation,
) -> None:
    federation = make_federation(aggregation_retry=timedelta(seconds=0.2))
    job = federation.start(job_spec(rounds=2))
    offers = [(site, site.claim()) for site in federation.sites]
    with nobody_aggregates(federation, job):
        for site, offer in offers:
            site.hand_in(offer, filled(1.0))
        for site in federation.sites[:2]:
            withdraw(federation, job, site)

    paused = federation.until_state(job, JobState.PAUSED)

    assert paused.reason is JobReason.TOO_FEW_PARTICIPATIONS
    assert paused.detail is not None
    assert "needs 2 participations; 1 are approved" in paused.detail
    assert paused.rounds_completed == 1


def test_two_equal_uploads_at_once_are_one_update(federation: Federation) -> None:
    job = federation.start()
    first, second, third = federation.sites
    offer = first.claim()
    path, digest = first.body(offer, filled(1.0))

    with ThreadPoolExecutor(8) as pool:
        receipts = list(pool.map(lambda _: first.send(offer, path, digest), range(8)))

    assert len({receipt.model_dump_json() for receipt in receipts}) == 1
    assert federation.researcher.jobs.round(job.id, 1).accepted == 1
    assert len(federation.blobs("updates")) == 1
    second.hand_in(second.claim(), filled(1.0))
    third.hand_in(third.claim(), filled(1.0))
    assert federation.finish(job).state is JobState.COMPLETED


def test_one_task_is_claimed_once(federation: Federation) -> None:
    federation.start()
    site = federation.sites[0]
    with ThreadPoolExecutor(8) as pool:
        offers = [offer for offer in pool.map(lambda _: site.try_claim(), range(8)) if offer is not None]
    assert len(offers) == 1


def test_the_database_itself_refuses_what_must_not_be(federation: Federation) -> None:
    job = federation.start()
    site = federation.sites[0]
    site.hand_in(site.claim(), filled(1.0))
    execute = federation.platform.execute
    with pytest.raises(psycopg.errors.UniqueViolation, match="uq_rounds_one_open_a_job"):
        execute(_copy(federation, "rounds", number="number + 1"))
    with pytest.raises(psycopg.errors.UniqueViolation, match="uq_rounds_job_id_number"):
        execute(_copy(federation, "rounds", phase="'failed'"))
    with pytest.raises(psycopg.errors.UniqueViolation, match="uq_tasks_round_id_participation_id"):
        execute(_copy(federation, "tasks"))
    with pytest.raises(psycopg.errors.UniqueViolation, match="uq_updates_task_id"):
        execute(_copy(federation, "updates"))
    with pytest.raises(psycopg.errors.UniqueViolation, match="uq_ledger_entries_charge_key"):
        execute(_copy(federation, "ledger_entries", sequence="sequence + 1"))
    assert federation.job(job).state is JobState.RUNNING


def _copy(federation: Federation, table: str, **changes: str) -> str:
    """A statement that copies one row of a table under a new id."""
    rows = federation.platform.execute(
        "SELECT column_name FROM information_schema.columns WHERE table_name = %s AND table_schema = 'public' "
        "ORDER BY ordinal_position",
        [table],
    )
    columns = [row[0] for row in rows]
    values = [{"id": "gen_random_uuid()", **changes}.get(column, column) for column in columns]
    return f"INSERT INTO {table} ({', '.join(columns)}) SELECT {', '.join(values)} FROM {table} LIMIT 1"


def test_two_services_and_two_coordinators_on_one_database_do_everything_once(
    database_url: str, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        federation = open_federation(database_url, tmp_path, stack)
        other = _second_service(database_url, tmp_path, stack)
        job = federation.start(job_spec(rounds=4))
        for number in range(1, 5):
            for index, site in enumerate(federation.sites):
                if (index + number) % 2:
                    site.worker = stack.enter_context(_at(other, federation.platform.keys[site.worker], federation))
                offer = site.claim()
                assert offer.round_number == number
                site.hand_in(offer, filled(1.0))

        assert federation.finish(job).state is JobState.COMPLETED
        assert (federation.model(job)["0.bias"] == np.float32(4.0)).all()
        events = list(federation.researcher.jobs.events(job.id, follow=False))
        assert sum(event.kind is EventKind.ROUND_COMPLETED for event in events) == 4
        verify_chain(events)


def _second_service(database_url: str, folder: Path, stack: ExitStack) -> str:
    from app.settings import Settings
    from tests.running import serving

    settings = Settings(
        database_url=database_url,
        data_dir=folder / "data",
        sweep=timedelta(milliseconds=100),
        lease=timedelta(minutes=10),
    )
    return stack.enter_context(serving(settings))


def _at(base_url: str, key: str, federation: Federation) -> Any:
    from isthmus.client import NO_RETRIES, Client

    client = Client(base_url, key, retries=NO_RETRIES)
    federation.platform.keys[client] = key
    return client


def test_a_worker_revoked_in_mid_round_holds_nobody_up(federation: Federation) -> None:
    job = federation.start()
    first, second, third = federation.sites
    third.claim()

    worker = next(iter(third.steward.workers.list()))
    third.steward.workers.revoke(worker.id)
    first.hand_in(first.claim(), filled(1.0))
    second.hand_in(second.claim(), filled(1.0))

    assert federation.finish(job).state is JobState.COMPLETED
    tasks = {task.organization: task for task in federation.researcher.jobs.round(job.id, 1).tasks}
    assert tasks[third.organization.name].state is TaskState.CANCELLED
    with refused(ProblemCode.KEY_REVOKED):
        third.try_claim()


def test_participations_tell_how_they_ended(federation: Federation) -> None:
    job = federation.start(job_spec(rounds=2))
    withdraw(federation, job, federation.sites[2])
    states = [part.state for part in federation.researcher.jobs.participations(job.id)]
    assert sorted(states) == [ParticipationState.APPROVED, ParticipationState.APPROVED, ParticipationState.WITHDRAWN]
