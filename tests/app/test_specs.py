"""The parsed parts of jobs that a process keeps."""

import json
from typing import Any
from uuid import uuid4

from app.models import Job
from app.rounds import specs
from isthmus.testing import sample_manifest, sample_spec
from isthmus.wire.base import digest_of
from isthmus.wire.jobs import EvaluationSpec, JobSpec
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


PLAIN: dict[str, Any] = {
    "name": "small",
    "model": {"layers": [{"linear": {"in": 2, "out": 2}}]},
    "data": {"task": "classification", "features": ["age", "chol"], "target": "disease", "classes": 2},
    "training": {"optimizer": {"sgd": {"lr": 0.1}}},
    "privacy": "none",
    "rounds": 1,
    "cohort": {"min_updates": 2, "deadline_s": 60},
    "evaluation": {"holdout": 0, "release": "local"},
    "seed": "5e" * 32,
}


def test_a_plain_job_has_the_bytes_and_the_digest_from_before_there_was_secure_aggregation() -> None:
    spec = JobSpec.model_validate(PLAIN)

    # As the last version without the section computed it.
    assert digest_of(spec) == "62d6537f65db6cf9ccd1fdf46943abd910c51c54555c43ad44240543eb00effa"
    for dumped in (spec.model_dump(), spec.model_dump(mode="json"), json.loads(spec.model_dump_json(by_alias=True))):
        assert "secure_aggregation" not in dumped
        assert JobSpec.model_validate(dumped) == spec
    assert JobSpec.model_validate({**PLAIN, "secure_aggregation": False}) == spec
    # What was stored while the section stood in every job is read as well.
    assert digest_of(JobSpec.model_validate({**PLAIN, "secure_aggregation": None})) == digest_of(spec)


def test_a_job_under_secure_aggregation_says_so_in_its_bytes() -> None:
    spec = JobSpec.model_validate({**PLAIN, "secure_aggregation": {"clip_norm": 5}, "cohort": {"min_updates": 3}})

    dumped = spec.model_dump(mode="json")

    assert dumped["secure_aggregation"]["clip_norm"] == 5
    assert JobSpec.model_validate(dumped) == spec
