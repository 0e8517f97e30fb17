"""The parsed parts of jobs that a process keeps."""

from uuid import uuid4

from app.models import Job
from app.rounds import specs
from isthmus.testing import sample_manifest, sample_spec
from isthmus.wire.base import digest_of
from isthmus.wire.jobs import EvaluationSpec
from isthmus.wire.rounds import TaskKind, evaluates_in_round, task_manifest


def test_a_long_job_keeps_no_manifest_for_each_round() -> None:
    spec = sample_spec(evaluation=EvaluationSpec(holdout=0.2, every=3))
    job = Job(
        id=uuid4(),
        spec=spec.model_dump(mode="json"),
        spec_digest=digest_of(spec),
        manifest=sample_manifest().model_dump(mode="json"),
    )
    found = {number: specs.manifest_of_task(job, TaskKind.TRAIN, number) for number in range(1, 50)}

    for number, manifest in found.items():
        assert manifest == task_manifest(TaskKind.TRAIN, spec, number, sample_manifest())
    assert len({id(manifest) for manifest in found.values()}) == 2
    assert {evaluates_in_round(spec, number) for number in found} == {True, False}
