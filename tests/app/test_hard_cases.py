"""What goes wrong only in the field: jobs that would hang or die without need, and who may not see what."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psycopg
import pytest

from isthmus.client import NoWork, Refused
from isthmus.wire.datasets import UsePolicy
from isthmus.wire.jobs import ApproveParticipation, JobReason, JobState, RejectParticipation, WithdrawParticipation
from isthmus.wire.problems import ProblemCode
from isthmus.wire.rounds import ClaimTask, TaskKind, TaskOffer, TaskState
from tests.app.test_deadlines import HalfAnUpload, pass_deadline
from tests.app.test_grants import approve, part_of
from tests.app.test_races import withdraw
from tests.app.test_waiting import until_waiting
from tests.federation import BY_HAND, Federation, Site, filled, job_spec, measured
from tests.running import refused

MakeFederation = Callable[..., Federation]


@pytest.mark.parametrize("value", [-1.0, 0.5, 1e300])
def test_numbers_of_examples_that_no_site_has_are_refused_and_the_round_goes_on(
    federation: Federation, value: float
) -> None:
    job = federation.start(job_spec(evaluation={"holdout": 0.2, "release": "exact"}))
    first, *others = federation.sites
    offer = first.claim()
    wrong = {**filled(1.0), **measured(offer), "metrics/train/examples": np.array(value)}
    with refused(ProblemCode.INVALID_REQUEST) as found:
        first.hand_in(offer, wrong)
    assert "metrics/train/examples" in found[0].detail

    for site in others:
        mine = site.claim()
        site.hand_in(mine, {**filled(1.0), **measured(mine)})
    assert federation.until(lambda: federation.job(job).rounds_completed == 1)


def test_a_round_that_lost_too_many_asks_those_that_it_did_not_ask(make_federation: MakeFederation) -> None:
    federation = make_federation(sites=5)
    job = federation.start(job_spec(cohort={"fraction": 0.4, "min_updates": 2, "deadline_s": 60}))
    asked = {task.organization for task in federation.researcher.jobs.round(job.id, 1).tasks}
    assert len(asked) == 2
    lost = next(site for site in federation.sites if site.organization.name in asked)
    withdraw(federation, job, lost)

    for site in federation.sites:
        offer = None if site is lost else site.try_claim(1)
        if offer is not None:
            site.hand_in(offer, filled(1.0))
    done = federation.finish(job)
    assert done.state is JobState.COMPLETED, done.detail
    assert federation.researcher.jobs.round(job.id, 1).cohort_size == 5


def test_a_revoked_worker_pauses_a_job_that_needs_it_instead_of_ending_it(federation: Federation) -> None:
    job = federation.start(job_spec(cohort={"min_updates": 3, "deadline_s": 60}))
    third = federation.sites[2]
    third.steward.workers.revoke(next(iter(third.steward.workers.list())).id)

    paused = federation.until_state(job, JobState.PAUSED, JobState.FAILED)
    assert (paused.state, paused.reason) == (JobState.PAUSED, JobReason.TOO_FEW_PARTICIPATIONS)


def test_a_retired_dataset_is_not_offered_and_comes_back_with_a_confirmation(federation: Federation) -> None:
    job = federation.start(job_spec(cohort={"min_updates": 3, "deadline_s": 60}))
    first, second, third = federation.sites
    third.steward.datasets.retire(third.dataset.id)
    first.hand_in(first.claim(), filled(1.0))
    assert third.try_claim() is None
    paused = federation.until_state(job, JobState.PAUSED, JobState.FAILED)
    assert paused.state is JobState.PAUSED, paused.detail
    assert federation.researcher.jobs.round(job.id, 1).tasks[2].state is TaskState.CANCELLED
    assert second.try_claim() is None, "a paused job offers nothing"


def test_a_dataset_confirmed_anew_lets_a_waiting_job_begin(make_federation: MakeFederation) -> None:
    federation = make_federation(policy=BY_HAND, sites=2)
    first, second = federation.sites
    job = federation.start()
    columns = ("age", "chol", "disease", "weight")
    second.announce(rows=100, columns=columns)
    approve(first, job)
    approve(second, job)
    assert federation.job(job).state is JobState.AWAITING_APPROVAL

    second.steward.datasets.confirm(second.dataset.id)
    assert federation.until_state(job, JobState.RUNNING).state is JobState.RUNNING


def test_a_job_that_too_many_refuse_does_not_wait_for_ever(make_federation: MakeFederation) -> None:
    federation = make_federation(policy=BY_HAND)
    job = federation.start()
    for site in federation.sites[:2]:
        mine = part_of(site, job)
        site.steward.participations.reject(mine.id, RejectParticipation(note="no"))

    ended = federation.until_state(job, JobState.FAILED)
    assert ended.reason is JobReason.TOO_FEW_PARTICIPATIONS
    assert ended.detail is not None
    assert "needs 2" in ended.detail
    assert "2 rejected" in ended.detail


def test_an_expired_grant_is_renewed_and_the_job_goes_on(make_federation: MakeFederation) -> None:
    federation = make_federation(sites=2)
    job = federation.start()
    first, second = federation.sites
    federation.platform.execute(
        "UPDATE grants SET expires_at = clock_timestamp() WHERE participation_id = %s", [part_of(first, job).id]
    )
    federation.until_state(job, JobState.PAUSED)
    grant = first.steward.participations.approve(part_of(first, job).id, ApproveParticipation(expires_in_s=3600)).grant
    assert grant is not None
    assert grant.rounds == 1

    federation.researcher.jobs.resume(job.id)
    for site in (first, second):
        site.hand_in(site.claim(), filled(1.0))
    assert federation.finish(job).state is JobState.COMPLETED


def test_all_may_refuse_at_once(make_federation: MakeFederation) -> None:
    federation = make_federation(sites=6)
    job = federation.start(job_spec(cohort={"min_updates": 6, "deadline_s": 60}))
    offers = [(site, site.claim()) for site in federation.sites]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda pair: _refuse(*pair), offers))
    assert federation.finish(job).state is JobState.FAILED
    time.sleep(1.5)  # Postgres counts with a delay of a second
    deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    assert federation.platform.execute(deadlocks) == [(0,)]


def _refuse(site: Site, offer: TaskOffer) -> None:
    """Refuse a task. The first refusal ends the job; the others' tasks are over then, and they are told so."""
    try:
        site.refuse(offer)
    except Refused as refusal:
        if refusal.code is not ProblemCode.TASK_NOT_OPEN:
            raise


def test_a_worker_revoked_while_it_waits_is_given_nothing(federation: Federation) -> None:
    third = federation.sites[2]
    answers: list[object] = []
    waiter = threading.Thread(
        target=lambda: answers.append(third.worker.tasks.claim(ClaimTask(), wait_s=4)), daemon=True
    )
    waiter.start()
    until_waiting(federation.platform, 1)
    third.steward.workers.revoke(next(iter(third.steward.workers.list())).id)
    federation.start(job_spec(cohort={"min_updates": 2}))
    waiter.join(20)
    assert [type(answer) for answer in answers] == [NoWork]


def test_waiting_goes_on_after_the_database_dropped_every_connection(federation: Federation) -> None:
    site = federation.sites[0]
    answers: list[object] = []
    waiter = threading.Thread(
        target=lambda: answers.append(site.worker.tasks.claim(ClaimTask(), wait_s=20)), daemon=True
    )
    waiter.start()
    until_waiting(federation.platform, 1)
    federation.platform.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
        "AND pid <> pg_backend_pid()"
    )

    def started() -> bool:
        try:
            federation.start()
        except Exception:
            return False
        return True

    federation.until(started)
    waiter.join(25)
    assert answers, "the waiter was woken or told to come again"
    offer = answers[0] if not isinstance(answers[0], NoWork) else federation.until(lambda: site.try_claim(1))
    assert not isinstance(offer, NoWork)
    ready = federation.platform.http().get("/readyz")
    assert federation.until(lambda: federation.platform.http().get("/readyz").status_code == 200), ready.text


def test_a_steward_sees_its_own_part_and_only_that(federation: Federation) -> None:
    first, second, third = federation.sites
    third.steward.datasets.set_policy(third.dataset.id, UsePolicy(purposes=("audit",)))
    job = federation.start(job_spec(evaluation={"holdout": 0.2, "release": "exact"}))
    for site in (first, second):
        offer = site.claim()
        site.hand_in(offer, {**filled(1.0), **measured(offer)})
    federation.until(lambda: federation.job(job).rounds_completed == 1)

    mine = first.steward.jobs.round(job.id, 1)
    assert [update.organization for update in mine.updates] == [first.organization.name]
    assert [task.organization for task in mine.tasks] == [first.organization.name]
    sites = [site.organization for item in first.steward.jobs.metrics(job.id) for site in item.sites]
    assert set(sites) == {first.organization.name}
    assert list(first.steward.jobs.events(job.id, follow=False)), "who takes part may check the record"

    asked = third.steward.jobs
    assert asked.get(job.id).name == job.name, "what is asked of it, it sees"
    assert not asked.round(job.id, 1).updates
    for look in (
        lambda: list(asked.events(job.id, follow=False)),
        lambda: list(asked.checkpoints(job.id)),
        lambda: asked.download_model(job.id, federation.folder / "stolen"),
    ):
        with refused(ProblemCode.NOT_FOUND):
            look()


def test_a_stream_of_events_ends_with_its_key(federation: Federation) -> None:
    job = federation.start()
    key_id = federation.researcher.me().key_id
    with federation.platform.http(federation.researcher).stream(
        "GET", f"/v1/jobs/{job.id}/events", headers={"Accept": "text/event-stream"}
    ) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("id: 1")
        federation.platform.admin.keys.revoke(key_id)
        federation.sites[0].hand_in(federation.sites[0].claim(), filled(1.0))
        rest = "\n".join(lines)
    assert "update-accepted" not in rest


def test_a_withdrawal_holds_one_connection(make_federation: MakeFederation) -> None:
    federation = make_federation(sites=4, database_connections=2)
    job = federation.start(job_spec(rounds=5))
    parts = [(site, part_of(site, job)) for site in federation.sites]
    with ThreadPoolExecutor(4) as pool:
        ended = list(
            pool.map(
                lambda pair: pair[0].steward.participations.withdraw(
                    pair[1].id, WithdrawParticipation(note="all of us")
                ),
                parts,
            )
        )
    assert {part.state.value for part in ended} == {"withdrawn"}, "nobody waited in vain for a second connection"


def test_a_replaced_worker_takes_the_dataset_over_and_the_job_goes_on(federation: Federation) -> None:
    job = federation.start(job_spec(cohort={"min_updates": 3, "deadline_s": 60}))
    first, second, third = federation.sites
    for site in (first, second):
        site.hand_in(site.claim(), filled(1.0))
    third.steward.workers.revoke(next(iter(third.steward.workers.list())).id)
    federation.until_state(job, JobState.PAUSED)

    third.worker = federation.platform.worker(third.organization)
    third.announce(rows=100)
    third.steward.datasets.confirm(third.dataset.id)
    federation.researcher.jobs.resume(job.id)

    offer = third.claim()
    assert offer.fence > 1
    third.hand_in(offer, filled(4.0))
    assert federation.finish(job).state is JobState.COMPLETED
    assert (federation.model(job)["0.bias"] == 2.0).all()
    events = list(federation.researcher.jobs.events(job.id, follow=False))
    assert sum(event.kind == "round-reopened" for event in events) == 1


def test_a_dataset_that_takes_only_some_kinds_of_tasks_is_asked_only_for_jobs_of_those(
    make_federation: MakeFederation,
) -> None:
    federation = make_federation(sites=2)
    federation.add(1)
    limited = federation.sites[2]
    limited.announce(rows=100, task_kinds=(TaskKind.TRAIN,))

    plain = federation.start(job_spec())
    assert len(list(federation.researcher.jobs.participations(plain.id))) == 3
    measuring = federation.start(job_spec(evaluation={"holdout": 0.2, "release": "local"}))
    asked = [part.organization for part in federation.researcher.jobs.participations(measuring.id)]
    assert limited.organization.name not in asked


def test_a_renewed_grant_is_the_steward_s_own_and_an_expired_one_can_still_be_withdrawn(
    make_federation: MakeFederation,
) -> None:
    federation = make_federation(sites=3)
    job = federation.start()
    first, second, third = federation.sites
    first.hand_in(first.claim(), filled(9.0))
    federation.platform.execute(
        "UPDATE grants SET expires_at = clock_timestamp() WHERE participation_id IN (%s, %s)",
        [part_of(first, job).id, part_of(second, job).id],
    )
    federation.until(lambda: part_of(second, job).state.value == "expired")

    withdraw(federation, job, first)
    assert not federation.blobs("updates"), "its update was in, and not summed yet: it leaves the set"
    grant = second.steward.participations.approve(part_of(second, job).id, ApproveParticipation()).grant
    assert grant is not None
    assert not grant.by_rule
    if federation.job(job).state is JobState.PAUSED:
        federation.researcher.jobs.resume(job.id)
    for site in (second, third):
        site.hand_in(site.claim(), filled(1.0))
    assert federation.finish(job).state is JobState.COMPLETED
    assert (federation.model(job)["0.bias"] == 1.0).all()


def test_an_upload_that_stalls_does_not_hold_the_round_by_heartbeats(federation: Federation) -> None:
    job = federation.start(job_spec(cohort={"min_updates": 2, "deadline_s": 60, "grace_s": 60}))
    first, second, third = federation.sites
    first.hand_in(first.claim(), filled(1.0))
    second.hand_in(second.claim(), filled(1.0))
    offer = third.claim()
    upload = HalfAnUpload(third, offer, 4.0)
    federation.platform.execute(
        "UPDATE tasks SET progress_until = clock_timestamp() + interval '1 s' WHERE state = 'uploading'"
    )
    pass_deadline(federation, job)
    beats = 0
    while federation.researcher.jobs.round(job.id, 1).accepted == 2 and federation.job(job).state is JobState.RUNNING:
        third.heartbeat(offer)
        beats += 1
        time.sleep(0.25)
        assert beats < 40, "the round waits for an upload that brings nothing"
    assert federation.finish(job).state is JobState.COMPLETED
    upload.finish()


def test_a_job_that_somebody_holds_keeps_no_other_waiting_and_its_leases_wait_for_it(
    make_federation: MakeFederation,
) -> None:
    federation = make_federation(sites=3)
    held, other = federation.start(), federation.start()
    for site in federation.sites:
        site.claim()  # the older job's task
    for site in federation.sites[:2]:
        site.hand_in(site.claim(), filled(1.0))
    assert federation.researcher.jobs.round(other.id, 1).accepted == 2
    with psycopg.connect(federation.platform.database_url) as holder:
        holder.execute("SELECT 1 FROM jobs WHERE id = %s FOR UPDATE", [held.id])
        federation.platform.execute("UPDATE tasks SET lease_expires_at = clock_timestamp() WHERE state = 'claimed'")
        pass_deadline(federation, other)
        federation.until(lambda: federation.job(other).state is JobState.COMPLETED)
        # Whoever takes leases away takes the job first, then its tasks: here it gets no further than the job.
        fences = "SELECT DISTINCT fence FROM tasks WHERE job_id = %s"
        assert federation.platform.execute(fences, [held.id]) == [(1,)]
        unlocked = "SELECT count(*) FROM (SELECT 1 FROM tasks WHERE job_id = %s FOR UPDATE NOWAIT) AS tasks"
        assert federation.platform.execute(unlocked, [held.id]) == [(3,)]

    federation.until(lambda: {task.fence for task in federation.researcher.jobs.round(held.id, 1).tasks} == {2})
