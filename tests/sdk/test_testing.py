"""The fake that organizations test with behaves as it says."""

import httpx
import pytest

from isthmus.client import Refused, Unreachable
from isthmus.testing import (
    FakeService,
    sample_dataset,
    sample_events,
    sample_job,
    sample_me,
    sample_offer,
    sample_spec,
    sample_worker,
)
from isthmus.wire.data import misfits
from isthmus.wire.datasets import policy_objections
from isthmus.wire.events import EventKind, verify_chain
from isthmus.wire.jobs import JobState
from isthmus.wire.organizations import Role
from isthmus.wire.problems import ProblemCode


def test_answers_come_in_turn_and_the_last_one_for_ever() -> None:
    service = FakeService()
    service.answer("GET", "/v1/jobs/*", sample_job(JobState.RUNNING), sample_job(JobState.COMPLETED))
    with service.client() as client:
        states = [client.jobs.get(sample_job().id).state for _ in range(3)]
    assert states == [JobState.RUNNING, JobState.COMPLETED, JobState.COMPLETED]


def test_a_star_is_one_segment() -> None:
    service = FakeService()
    service.answer("GET", "/v1/jobs/*", sample_job())
    with service.client() as client:
        client.jobs.get(sample_job().id)
        with pytest.raises(Refused, match="was told of no GET"):
            list(client.jobs.metrics(sample_job().id))


def test_lists_refusals_and_functions_are_answers() -> None:
    service = FakeService()
    service.answer("GET", "/v1/workers", [sample_worker(), sample_worker(name="agent-2")])
    service.refuse("POST", "/v1/tasks/claim", ProblemCode.KEY_REVOKED, "Revoked yesterday.")
    service.answer("GET", "/v1/me", lambda request: httpx.Response(502))
    with service.client() as client:
        assert [worker.name for worker in client.workers.list()] == ["agent-1", "agent-2"]
        with pytest.raises(Refused, match="Revoked yesterday"):
            client.tasks.claim()
        with pytest.raises(Unreachable):
            client.me()


def test_a_stream_takes_up_after_the_last_event() -> None:
    service = FakeService()
    story = list(sample_events(EventKind.JOB_STARTED, EventKind.ROUND_OPENED, EventKind.JOB_COMPLETED))
    service.stream("/v1/jobs/*/events", story)
    with service.client() as client:
        assert list(client.jobs.events(sample_job().id)) == story
        assert list(client.jobs.events(sample_job().id, after=2)) == story[2:]
        assert list(client.jobs.events(sample_job().id, follow=False)) == story


def test_the_samples_fit_each_other() -> None:
    assert misfits(sample_spec().data, sample_dataset().data_schema) == []
    objections = policy_objections(sample_dataset().policy, sample_spec(), principal="ada", plan=None)
    assert [objection.split(":")[0] for objection in objections] == ["allow_exact_metrics"]
    assert sample_offer().spec == sample_spec()
    assert verify_chain(sample_events(EventKind.JOB_CREATED, EventKind.JOB_STARTED)) != ""
    assert sample_me(Role.STEWARD).organization is not None


def test_a_sample_that_breaks_the_contract_is_no_sample() -> None:
    with pytest.raises(ValueError, match="rounds_completed"):
        sample_job(rounds_completed="many")
