"""When rounds close: targets, deadlines, grace, attempts, over-selection; and failures that a person understands."""

import socket
import time
from collections.abc import Callable

from isthmus.wire.base import format_repr_digest
from isthmus.wire.events import EventKind
from isthmus.wire.jobs import JobReason, JobState, JobView
from isthmus.wire.problems import ProblemCode
from isthmus.wire.rounds import RoundPhase, TaskOffer, TaskState
from tests.federation import Federation, Site, filled, job_spec
from tests.running import refused

MakeFederation = Callable[..., Federation]


def pass_deadline(federation: Federation, job: JobView) -> None:
    """Time passes, for the one clock: the open round's deadline is over."""
    federation.platform.execute(
        "UPDATE rounds SET closes_at = clock_timestamp() WHERE job_id = %s AND phase = 'collecting'", [job.id]
    )


def test_over_selection_leaves_the_slowest_behind(make_federation: MakeFederation) -> None:
    federation = make_federation(sites=4)
    cohort = {"fraction": 0.5, "over_selection": 2, "min_updates": 2, "deadline_s": 60}
    job = federation.start(job_spec(cohort=cohort))
    offers = [(site, site.claim()) for site in federation.sites]

    for site, offer in offers[2:]:
        site.hand_in(offer, filled(1.0))
    done = federation.finish(job)

    assert done.state is JobState.COMPLETED
    only = federation.researcher.jobs.round(job.id, 1)
    assert (only.cohort_size, only.target_updates, only.accepted) == (4, 2, 2)
    late_site, late_offer = offers[0]
    assert late_site.heartbeat(late_offer).held is False
    with refused(ProblemCode.ROUND_NOT_COLLECTING):
        late_site.hand_in(late_offer, filled(9.0))
    assert not list(late_site.steward.datasets.ledger(late_site.dataset.id)), "nothing was admitted, nothing is spent"


def test_with_enough_updates_the_deadline_closes_the_round(federation: Federation) -> None:
    job = federation.start()
    first, second, third = federation.sites
    first.hand_in(first.claim(), filled(1.0))
    second.hand_in(second.claim(), filled(3.0))
    offer = third.claim()

    pass_deadline(federation, job)

    assert federation.finish(job).state is JobState.COMPLETED
    assert (federation.model(job)["0.bias"] == 2.0).all()
    assert third.worker.tasks.get(offer.task_id).state is TaskState.EXPIRED


def test_with_enough_updates_the_round_does_not_wait_when_nobody_is_left_to_wait_for(federation: Federation) -> None:
    job = federation.start()
    first, second, third = federation.sites
    first.hand_in(first.claim(), filled(1.0))
    third.refuse(third.claim())
    began = time.monotonic()
    second.hand_in(second.claim(), filled(3.0))

    assert federation.finish(job).state is JobState.COMPLETED
    assert time.monotonic() - began < 40, "the deadline is a minute away"


def test_a_new_attempt_keeps_the_updates_that_are_in(federation: Federation) -> None:
    job = federation.start()
    first, second, third = federation.sites
    first.hand_in(first.claim(), filled(1.0))
    given_up = second.claim()
    second.fail(given_up)
    third.fail(third.claim())

    again = second.claim()
    assert (again.task_id, again.attempt, again.fence) == (given_up.task_id, 2, given_up.fence + 1)
    second.hand_in(again, filled(3.0))
    third.hand_in(third.claim(), filled(5.0))

    assert federation.finish(job).state is JobState.COMPLETED
    assert (federation.model(job)["0.bias"] == 3.0).all()
    assert federation.researcher.jobs.round(job.id, 1).attempt == 2


def test_a_new_attempt_at_the_deadline_leaves_the_living_alone(federation: Federation) -> None:
    job = federation.start()
    first, second, third = federation.sites
    slow = first.claim()
    pass_deadline(federation, job)
    federation.until(lambda: federation.researcher.jobs.round(job.id, 1).attempt == 2)

    assert first.heartbeat(slow).held
    first.hand_in(slow, filled(1.0))
    second.hand_in(second.claim(), filled(1.0))
    third.hand_in(third.claim(), filled(1.0))
    assert federation.finish(job).state is JobState.COMPLETED


def test_when_attempts_are_exhausted_the_job_fails_and_says_who_did_not_come(federation: Federation) -> None:
    job = federation.start(job_spec(cohort={"min_updates": 2, "deadline_s": 60, "attempts": 2}))
    federation.sites[0].hand_in(federation.sites[0].claim(), filled(1.0))
    for _ in range(2):
        for site in federation.sites[1:]:
            site.fail(site.claim(), "the disk is full")

    failed = federation.finish(job)

    assert (failed.state, failed.reason) == (JobState.FAILED, JobReason.ROUND_FAILED)
    assert failed.detail is not None
    assert "1 of at least 2 updates" in failed.detail
    assert "2 failed (the disk is full)" in failed.detail
    assert federation.researcher.jobs.round(job.id, 1).phase is RoundPhase.FAILED


def test_refusals_are_final_so_a_round_that_cannot_be_filled_fails_at_once(federation: Federation) -> None:
    job = federation.start()
    for site in federation.sites[:2]:
        site.refuse(site.claim(), "purpose 'research' is not allowed here")

    failed = federation.finish(job)

    assert failed.state is JobState.FAILED
    assert failed.detail is not None
    assert "purpose 'research' is not allowed here" in failed.detail


class HalfAnUpload:
    """An upload that was admitted and has sent half of its body."""

    def __init__(self, site: Site, offer: TaskOffer, value: float) -> None:
        path, digest = site.body(offer, filled(value))
        self._data = path.read_bytes()
        host, port = site.platform.base_url.removeprefix("http://").split(":")
        self._socket = socket.create_connection((host, int(port)), timeout=20)
        head = (
            f"PUT /v1/tasks/{offer.task_id}/update HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
            f"Authorization: Bearer {site.platform.keys[site.worker]}\r\n"
            f"Content-Type: application/vnd.safetensors\r\nContent-Length: {len(self._data)}\r\n"
            f"Repr-Digest: {format_repr_digest(digest)}\r\nIsthmus-Fence: {offer.fence}\r\nExpect: 100-continue\r\n\r\n"
        )
        self._socket.sendall(head.encode())
        answer = self._socket.recv(1000)
        assert answer.startswith(b"HTTP/1.1 100"), answer
        self._half = len(self._data) // 2
        self._socket.sendall(self._data[: self._half])

    def finish(self) -> bytes:
        """Send the rest; the service's answer."""
        self._socket.sendall(self._data[self._half :])
        answer = b""
        while piece := self._socket.recv(65536):
            answer += piece
        self._socket.close()
        return answer


def test_an_upload_in_progress_holds_the_round_open_within_its_grace(federation: Federation) -> None:
    job = federation.start(job_spec(cohort={"min_updates": 2, "deadline_s": 60, "grace_s": 30}))
    first, second, third = federation.sites
    first.hand_in(first.claim(), filled(1.0))
    second.hand_in(second.claim(), filled(1.0))
    upload = HalfAnUpload(third, third.claim(), 4.0)

    pass_deadline(federation, job)
    time.sleep(0.5)
    assert upload.finish().startswith(b"HTTP/1.1 200")

    assert federation.finish(job).state is JobState.COMPLETED
    assert (federation.model(job)["0.bias"] == 2.0).all(), "the late one is in"


def test_without_grace_an_upload_in_progress_is_left_behind_and_stays_spent(federation: Federation) -> None:
    job = federation.start(job_spec(cohort={"min_updates": 2, "deadline_s": 60, "grace_s": 0}))
    first, second, third = federation.sites
    first.hand_in(first.claim(), filled(1.0))
    second.hand_in(second.claim(), filled(1.0))
    upload = HalfAnUpload(third, third.claim(), 4.0)

    pass_deadline(federation, job)
    federation.finish(job)
    answer = upload.finish()

    assert b"round-not-collecting" in answer or b"job-not-running" in answer, answer
    assert (federation.model(job)["0.bias"] == 1.0).all()
    assert len(list(third.steward.datasets.ledger(third.dataset.id))) == 1
    assert len(federation.blobs("updates")) == 2


def test_an_aggregate_that_overflows_fails_the_job_and_changes_nothing(federation: Federation) -> None:
    job = federation.start(model=filled(3e38))
    before = federation.job(job).model_digest
    for site in federation.sites:
        site.hand_in(site.claim(), filled(3e38))

    failed = federation.finish(job)

    assert (failed.state, failed.reason) == (JobState.FAILED, JobReason.AGGREGATE_REJECTED)
    assert failed.detail is not None
    assert "0." in failed.detail, "the tensor is named"
    assert failed.model_digest == before
    kinds = [event.kind for event in federation.researcher.jobs.events(job.id, follow=False)]
    assert kinds[-2:] == [EventKind.ROUND_FAILED, EventKind.JOB_FAILED]
