"""One site of three that cannot serve: its data or its policy says why, its cells stay home, the others go on."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.client import Client
from isthmus.codec import arrays
from isthmus.submission import submit
from isthmus.wire.datasets import DatasetView
from isthmus.wire.jobs import JobSpec, JobState, JobView
from isthmus.wire.models import ModelKind
from isthmus.wire.rounds import TaskState
from tests.acceptance.island import POLICY, Island, Program, island, job_spec, until, write_patients

TWO = {"rounds": 2, "cohort": {"min_updates": 2, "deadline_s": 60}}
BAD = 2
"""The number of the site that cannot serve."""
CELL = "zz-smith-1947"
ALLOWED = "torch.nn:Linear"
"""A function that is installed wherever an agent is."""


def test_a_site_that_cannot_serve_says_why_and_the_others_complete_the_job(database_url: str, tmp_path: Path) -> None:
    with island(tmp_path, database_url) as three:
        three.open(3)
        one_class_only(three)
        words_where_numbers_were_announced(three)
        code_that_one_site_does_not_allow(three)
        code_that_nobody_allows(three)


def one_class_only(three: Island) -> None:
    """The column is read and its statistics are good; there is just nothing to learn from it."""
    rewrite(three, lambda row, _: {**row, "disease": "1"})

    job = three.finish(three.submit(job_spec(**TWO)))

    found = refusals(three, job)
    assert set(found) == {1, 2}, "its columns are measured, and the model is evaluated on them"
    assert_names(found, "All records have the same target 'disease'")
    assert_the_others_completed(three, job)
    assert job.statistics is not None
    assert job.statistics.sites == 3


def words_where_numbers_were_announced(three: Island) -> None:
    """The file was changed behind the announcement: the service could not know, the agent finds out."""
    rewrite(three, lambda row, place: {**row, "age": CELL if place in (3, 50) else row["age"]})

    job = three.finish(three.submit(job_spec(**TWO)))

    found = refusals(three, job)
    assert set(found) == {0, 1, 2, 3}, "statistics, training and the last evaluation all read the column"
    assert_names(found, "Column 'age' must hold numbers")
    assert_the_others_completed(three, job)
    assert job.statistics is not None
    assert job.statistics.sites == 2
    assert CELL not in told(three, job)
    assert CELL not in three.service.log.read_text()


def code_that_one_site_does_not_allow(three: Island) -> None:
    """Two have listed the function in their own configuration; what a steward allows does not open the third."""
    write_patients(three.folder / f"clinic-{BAD}" / "patients.csv", BAD)
    for agent, entry_points in zip(three.agents, ([ALLOWED], [ALLOWED], ["isthmus.models:other"]), strict=True):
        allow(agent, entry_points)
    for steward in three.stewards:

        def announced_anew(steward: Client = steward) -> DatasetView | None:
            dataset = next(iter(steward.datasets.list()))
            return dataset if ModelKind.ENTRY_POINT in dataset.announced_policy.model_kinds else None

        dataset = until(announced_anew, "the looser policy is announced")
        assert dataset is not None
        steward.datasets.set_policy(dataset.id, POLICY.model_copy(update={"model_kinds": tuple(ModelKind)}))
        steward.datasets.confirm(dataset.id)

    spec = job_spec(**TWO, model={"entry_point": ALLOWED, "options": {"in_features": 5, "out_features": 2}})
    job = three.finish(start(three, spec))

    found = refusals(three, job)
    assert set(found) == {0, 1, 2, 3}, "the policy is asked for every task"
    assert_names(found, f"entry_points: {ALLOWED!r} is not listed (allowed: isthmus.models:other).")
    assert_the_others_completed(three, job)


def code_that_nobody_allows(three: Island) -> None:
    """The job fails, and says by which name."""
    job = three.finish(start(three, job_spec(**TWO, model={"entry_point": "os:system"})))

    assert job.state is JobState.FAILED
    assert job.detail is not None
    assert "entry_points: 'os:system' is not listed (allowed: torch.nn:Linear)." in job.detail
    assert job.rounds_completed == 0
    for steward in three.stewards:
        dataset = next(iter(steward.datasets.list()))
        assert not [entry for entry in steward.datasets.ledger(dataset.id) if entry.job_id == job.id]


def rewrite(three: Island, change: Callable[[dict[str, str], int], dict[str, str]]) -> None:
    """Give the bad site its records again, each changed."""
    path = three.folder / f"clinic-{BAD}" / "patients.csv"
    write_patients(path, BAD)
    with path.open(newline="") as file:
        rows = [change(row, place) for place, row in enumerate(csv.DictReader(file))]
    with path.open("w", newline="") as file:
        out = csv.DictWriter(file, list(rows[0]))
        out.writeheader()
        out.writerows(rows)


def allow(agent: Program, entry_points: list[str]) -> None:
    """Change what an organization's own configuration lets in, and start its agent anew."""
    agent.stop()
    config = agent.log.parent / "worker.toml"
    lines = f'[policy]\nmodel_kinds = ["declarative", "entry_point"]\nentry_points = {entry_points}'
    config.write_text(config.read_text().replace("[policy]", lines))
    agent.start()


def start(three: Island, spec: JobSpec) -> JobView:
    """A job whose initial model is that of a layer of five inputs and two classes."""
    assert three.researcher is not None
    zeros = {"weight": np.zeros((2, 5), np.float32), "bias": np.zeros(2, np.float32)}
    return submit(three.researcher, spec, arrays.encode(zeros))


def refusals(three: Island, job: JobView) -> dict[int, str | None]:
    """Round -> why the bad site refused it."""
    assert three.researcher is not None
    return {
        of.number: task.detail
        for of in three.researcher.jobs.rounds(job.id)
        for task in of.tasks
        if task.organization == f"clinic-{BAD}" and task.state is TaskState.REFUSED
    }


def assert_names(found: dict[int, str | None], words: str) -> None:
    """Each reason tells what the matter is."""
    assert [reason for reason in found.values() if reason is None or words not in reason] == []


def assert_the_others_completed(three: Island, job: JobView) -> None:
    """Two rounds of two updates each, and nothing of the bad site in them."""
    assert (job.state, job.rounds_completed) == (JobState.COMPLETED, 2), job.detail
    assert three.researcher is not None
    for number in (1, 2):
        updates = three.researcher.jobs.round(job.id, number).updates
        assert [update.organization for update in updates] == ["clinic-0", "clinic-1"]


def told(three: Island, job: JobView) -> str:
    """All that the service tells of a job."""
    assert three.researcher is not None
    jobs = three.researcher.jobs
    views: list[Any] = [job, *jobs.rounds(job.id), *jobs.participations(job.id), *jobs.events(job.id, follow=False)]
    return "\n".join(view.model_dump_json() for view in views)
