"""From a spec to a job that runs, in one call."""

import pytest

from isthmus.client import Refused
from isthmus.codec.arrays import decode
from isthmus.submission import CannotDraw, draw_model, submit
from isthmus.testing import SEED, FakeService, sample_job, sample_manifest, sample_spec
from isthmus.wire.jobs import JobSpec, JobState, JobView
from isthmus.wire.problems import ProblemCode

ENTRY_POINT = {"entry_point": "my_package:build"}


def service_for(seed: str = SEED) -> FakeService:
    service = FakeService()
    draft = sample_job(JobState.DRAFT, spec=sample_spec(seed=seed))
    service.answer("POST", "/v1/jobs", draft)
    service.answer("PUT", "/v1/jobs/*/model", draft)
    service.answer("POST", "/v1/jobs/*/start", sample_job(JobState.AWAITING_APPROVAL))
    return service


def without_seed() -> JobSpec:
    return sample_spec(seed=None)


def test_submitting_creates_draws_uploads_and_starts() -> None:
    service = service_for(seed="ab" * 32)
    drafts: list[JobView] = []
    with service.client() as client:
        job = submit(client, without_seed(), on_created=drafts.append)

    assert job.state is JobState.AWAITING_APPROVAL
    assert [draft.state for draft in drafts] == [JobState.DRAFT]
    assert [(sent.method, sent.path.split("/")[-1]) for sent in service.requests] == [
        ("POST", "jobs"),
        ("PUT", "model"),
        ("POST", "start"),
    ]
    uploaded = service.requests[1].body
    assert uploaded == draw_model(sample_spec(seed="ab" * 32)), "the weights follow from the seed that the service drew"
    assert uploaded != draw_model(sample_spec(seed="ac" * 32))
    assert decode(uploaded, sample_manifest()).keys() == {"0.weight", "0.bias"}


def test_a_model_of_ones_own_is_sent_as_it_is() -> None:
    service = service_for()
    with service.client() as client:
        submit(client, sample_spec(model=ENTRY_POINT), b"own", start=False)
    assert [sent.body for sent in service.requests[1:]] == [b"own"]


def test_what_cannot_be_drawn_is_said_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    service = service_for()
    with service.client() as client:
        with pytest.raises(CannotDraw, match="--model FILE"):
            submit(client, sample_spec(model=ENTRY_POINT))
        monkeypatch.setattr("isthmus.submission.find_spec", lambda _name: None)
        with pytest.raises(CannotDraw, match=r"isthmus\[torch\]"):
            submit(client, sample_spec())
    assert service.requests == []


def test_a_failure_half_way_names_the_draft() -> None:
    service = FakeService()
    service.answer("POST", "/v1/jobs", sample_job(JobState.DRAFT))
    service.refuse("PUT", "/v1/jobs/*/model", ProblemCode.TENSORS_MISMATCH)
    with service.client() as client, pytest.raises(Refused) as refused:
        submit(client, sample_spec(), b"own")
    assert str(sample_job().id) in refused.value.__notes__[0]


def test_a_spec_without_a_seed_draws_nothing() -> None:
    with pytest.raises(ValueError, match="no seed"):
        draw_model(without_seed())
