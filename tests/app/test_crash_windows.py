"""What breaks between two steps: the transaction takes back what it did, and the next try does it once."""

import hashlib
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest
import structlog.testing

from app.queue import defer
from app.rounds import aggregation, uploads
from isthmus.codec import arrays
from isthmus.wire.events import EventKind, verify_chain
from isthmus.wire.jobs import JobState, JobView
from isthmus.wire.problems import ProblemCode
from isthmus.wire.rounds import RoundPhase, TaskOffer, TaskState
from tests.app.test_deadlines import pass_deadline
from tests.federation import Federation, Site, filled, job_spec
from tests.standing import assert_problem, entries_of, leftovers, put_update

Step = Callable[..., Awaitable[Any]]
BOTH = pytest.mark.parametrize("when", ["before", "after"])
GOOD = arrays.encode(filled(1.0))


class Broken(Exception):
    """Nobody expects this one."""


class Once:
    """A step that raises the first time that it is taken, before it did anything or after it did all."""

    def __init__(self, step: Step, when: str) -> None:
        self._step, self._when = step, when
        self.calls: list[tuple[Any, ...]] = []

    async def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.calls.append(arguments)
        first = len(self.calls) == 1
        if first and self._when == "before":
            raise Broken
        answer = await self._step(*arguments, **named)
        if first:
            raise Broken
        return answer


def told(federation: Federation, job: JobView, kind: EventKind) -> int:
    """How often the job's record tells this; its chain is whole."""
    events = list(federation.researcher.jobs.events(job.id, follow=False))
    verify_chain(events)
    return sum(event.kind is kind for event in events)


def assert_done_once(federation: Federation, job: JobView, value: float, *, rounds: int = 1) -> None:
    """The job completed; each round was frozen, aggregated and published once, and nothing else is kept."""
    done = federation.finish(job)
    assert (done.state, done.rounds_completed) == (JobState.COMPLETED, rounds), done.detail
    assert all((tensor == value).all() for tensor in federation.model(job).values())
    assert told(federation, job, EventKind.ROUND_FROZEN) == rounds
    assert told(federation, job, EventKind.ROUND_COMPLETED) == rounds
    numbers = [item.round_number for item in federation.researcher.jobs.checkpoints(job.id)]
    assert numbers == list(range(rounds + 1))
    assert not leftovers(federation)


def assert_breaks(federation: Federation, site: Site, offer: TaskOffer) -> None:
    """The upload is answered with a failure of the service's own, which is logged."""
    with structlog.testing.capture_logs() as logs:
        assert_problem(put_update(federation, site, offer, GOOD), ProblemCode.INTERNAL)
    assert [line for line in logs if line["log_level"] == "error"]


@BOTH
def test_an_aggregate_that_was_stored_and_not_published_is_made_again_with_the_same_bytes(
    make_federation: Callable[..., Federation], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    broken = Once(aggregation._complete, when)
    monkeypatch.setattr(aggregation, "_complete", broken)
    federation = make_federation(aggregation_retry=timedelta(seconds=0.3))
    job = federation.start(job_spec(rounds=2, strategy="fedavgm"))

    for number in (1, 2):
        for site in federation.sites:
            offer = site.claim()
            assert offer.round_number == number, "no round opens before its time"
            site.hand_in(offer, filled(1.0))

    assert_done_once(federation, job, 1.0 + 1.9, rounds=2)
    results = [result for _, _, result in broken.calls]
    assert results[0] == results[1], "digests of model and state, and what was measured"
    assert len(results) == 3
    first = federation.researcher.jobs.round(job.id, 1)
    assert first.result_digest == results[0].checkpoint.digest


@BOTH
def test_an_upload_that_was_stored_and_not_accepted_leaves_nothing_and_is_charged_once(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    job = federation.start()
    site = federation.sites[0]
    offers = [one.claim() for one in federation.sites]
    broken = Once(uploads.accept_update, when)
    monkeypatch.setattr(uploads, "accept_update", broken)

    assert_breaks(federation, site, offers[0])

    assert not federation.blobs("updates")
    assert not leftovers(federation)
    assert federation.researcher.jobs.round(job.id, 1).accepted == 0
    assert site.worker.tasks.get(offers[0].task_id).state is TaskState.UPLOADING
    assert put_update(federation, site, offers[0], GOOD).status_code == 200
    assert len(broken.calls) == 2
    for other, offer in zip(federation.sites[1:], offers[1:], strict=True):
        other.hand_in(offer, filled(1.0))
    assert_done_once(federation, job, 1.0)
    assert entries_of(federation, site, offers[0]) == [hashlib.sha256(GOOD).hexdigest()]
    grants = [part.grant for part in federation.researcher.jobs.participations(job.id)]
    assert [grant.rounds_used for grant in grants if grant is not None] == [1, 1, 1]


@BOTH
def test_a_freeze_that_breaks_takes_the_last_update_back_and_happens_once_when_it_comes_again(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    job = federation.start()
    offers = [site.claim() for site in federation.sites]
    for site, offer in zip(federation.sites[:2], offers[:2], strict=True):
        site.hand_in(offer, filled(1.0))
    broken = Once(defer, when)
    monkeypatch.setattr("app.rounds.closing.defer", broken)
    site, offer = federation.sites[2], offers[2]

    assert_breaks(federation, site, offer)

    collecting = federation.researcher.jobs.round(job.id, 1)
    assert (collecting.phase, collecting.accepted) == (RoundPhase.COLLECTING, 2)
    assert [update.position for update in collecting.updates] == [None, None]
    assert told(federation, job, EventKind.ROUND_FROZEN) == 0
    assert len(federation.blobs("updates")) == 2
    assert federation.platform.execute("SELECT count(*) FROM procrastinate_jobs") == [(0,)]
    assert put_update(federation, site, offer, GOOD).status_code == 200
    assert_done_once(federation, job, 1.0)
    assert len(broken.calls) == 2
    assert entries_of(federation, site, offer) == [hashlib.sha256(GOOD).hexdigest()]


@BOTH
def test_a_freeze_that_breaks_in_the_sweep_happens_once_in_the_next_one(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    job = federation.start()
    for site in federation.sites[:2]:
        site.hand_in(site.claim(), filled(1.0))
    late = federation.sites[2].claim()
    broken = Once(defer, when)
    monkeypatch.setattr("app.rounds.closing.defer", broken)

    pass_deadline(federation, job)

    assert_done_once(federation, job, 1.0)
    assert len(broken.calls) == 2
    assert federation.sites[2].worker.tasks.get(late.task_id).state is TaskState.EXPIRED
