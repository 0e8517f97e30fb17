"""A real service and real agents, as processes, on a real Postgres; killed in the middle of their work."""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psycopg
import pytest

from isthmus.codec import arrays
from isthmus.wire.events import verify_chain
from isthmus.wire.jobs import JobState, JobView, WithdrawParticipation
from isthmus.wire.rounds import TaskKind
from tests.acceptance.island import Island, island, job_spec, until


@pytest.fixture
def three(database_url: str, tmp_path: Path) -> Iterator[Island]:
    """A service and three organizations."""
    with island(tmp_path, database_url) as opened:
        opened.open(3)
        yield opened


def digests(opened: Island, job: JobView) -> list[str]:
    """The checkpoints, in order of their rounds."""
    assert opened.researcher is not None
    return [item.digest for item in opened.researcher.jobs.checkpoints(job.id)]


def test_killed_services_and_agents_change_nothing_of_the_model(three: Island) -> None:
    """Server momentum and Adam keep state between rounds; training is a function of model, data, spec and seed."""
    for strategy in ("fedavgm", {"fedadam": {"lr": 0.05}}):
        undisturbed = three.submit(job_spec(strategy=strategy))
        done = three.finish(undisturbed)
        assert done.state is JobState.COMPLETED, done.detail

        disturbed = three.submit(job_spec(strategy=strategy))
        three.until_round(disturbed, 1)
        three.service.kill()
        three.agents[0].kill()
        three.service.start()
        three.agents[0].start()
        three.until_round(disturbed, 3)
        three.agents[1].kill()
        three.service.kill()
        time.sleep(0.3)
        three.agents[1].start()
        three.service.start()
        done = three.finish(disturbed)

        assert done.state is JobState.COMPLETED, done.detail
        assert digests(three, disturbed) == digests(three, undisturbed)
        assert len(set(digests(three, disturbed))) == 7
        assert three.researcher is not None
        verify_chain(three.researcher.jobs.events(disturbed.id, follow=False))
        for steward in three.stewards:
            dataset = next(iter(steward.datasets.list()))
            mine = [entry for entry in steward.datasets.ledger(dataset.id) if entry.job_id == disturbed.id]
            assert len(mine) == len({entry.round_number for entry in mine}) == 8, "every release is there once"


def test_statistics_are_those_of_all_training_rows_and_every_site_evaluates_the_final_model(three: Island) -> None:
    job = three.finish(three.submit(job_spec(rounds=10)))
    assert three.researcher is not None
    assert job.state is JobState.COMPLETED, job.detail

    assert job.statistics is not None
    assert job.statistics.names == ["age", "chol"]
    assert job.statistics.rows == 3 * 60, "a quarter of each label's 40 rows is held out at each of three sites"
    assert job.statistics.count[0] == 180
    assert 100 < job.statistics.count[1] < 180, "missing values are not counted"
    assert 50 < job.statistics.mean[0] < 60

    measured = list(three.researcher.jobs.metrics(job.id))
    final = measured[-1]
    assert (final.kind, final.measured_round, len(final.sites)) == (TaskKind.EVALUATE, 10, 3)
    assert {site.metrics["holdout/examples"] for site in final.sites} == {20.0}
    assert final.pooled["holdout/examples"] == 60
    expected = np.mean([site.metrics["holdout/accuracy"] for site in final.sites])
    assert final.pooled["holdout/accuracy"] == pytest.approx(expected)
    assert final.pooled["holdout/loss"] < measured[0].pooled["holdout/loss"], "it learned something"


def test_a_steward_who_withdraws_in_the_middle_is_left_out_from_then_on(three: Island) -> None:
    job = three.submit(job_spec(rounds=90, cohort={"min_updates": 2}))
    three.until_round(job, 2)
    steward = three.stewards[2]
    mine = next(part for part in steward.participations.list(job_id=job.id))
    steward.participations.withdraw(mine.id, WithdrawParticipation(note="the ethics board said stop"))
    assert three.researcher is not None
    seen = three.job(job).rounds_completed
    three.until_round(job, seen + 3)
    three.researcher.jobs.cancel(job.id)

    last = three.researcher.jobs.round(job.id, three.job(job).rounds_completed)
    assert [update.organization for update in last.updates] == ["clinic-0", "clinic-1"]
    spent = len(list(steward.datasets.ledger(next(iter(steward.datasets.list())).id)))
    time.sleep(1)
    assert len(list(steward.datasets.ledger(next(iter(steward.datasets.list())).id))) == spent


def test_an_agent_whose_own_policy_says_no_refuses_whatever_the_service_says(database_url: str, tmp_path: Path) -> None:
    with island(tmp_path, database_url) as opened:
        opened.open(2)
        config = tmp_path / "clinic-1" / "worker.toml"
        config.write_text(config.read_text().replace('purposes = ["research"]', 'purposes = ["audit"]'))
        opened.agents[1].stop()
        opened.agents[1].start()
        steward = opened.stewards[1]
        until(
            lambda: next(iter(steward.datasets.list())).announced_policy.purposes == ("audit",),
            "the other policy is announced",
        )
        steward.datasets.confirm(next(iter(steward.datasets.list())).id)
        open_to_all = next(iter(opened.stewards[0].datasets.list())).id
        with psycopg.connect(database_url) as connection:  # a service that does not mind it
            connection.execute(
                "UPDATE datasets SET policy = (SELECT policy FROM datasets WHERE id = %s)", [open_to_all]
            )
        job = opened.submit(job_spec(cohort={"min_updates": 2, "deadline_s": 60}))
        failed = opened.finish(job)

        assert failed.state is JobState.FAILED
        assert failed.detail is not None
        assert "purpose" in failed.detail


def test_a_clip_without_noise_bounds_every_update_and_is_not_accounted_for(three: Island) -> None:
    assert three.researcher is not None
    job = three.finish(three.submit(job_spec(rounds=2, privacy={"unit": "none", "clip_norm": 0.05})))
    assert job.state is JobState.COMPLETED, job.detail
    updates = [update for number in (1, 2) for update in three.researcher.jobs.round(job.id, number).updates]
    assert [update.l2_norm for update in updates] == [pytest.approx(0.05, rel=1e-4)] * 6
    for steward in three.stewards:
        dataset = next(iter(steward.datasets.list()))
        entries = [entry for entry in steward.datasets.ledger(dataset.id) if entry.job_id == job.id]
        assert [(entry.kind, entry.release, entry.mode) for entry in entries] == [
            ("spend", release, "none") for release in ("statistics", "train", "train", "evaluate")
        ]
        assert not any(any(entry.rdp_nano) for entry in entries)
        assert dataset.budget is not None
        assert dataset.budget.unaccounted_releases >= 4


def test_the_published_model_is_plain_safetensors(three: Island, tmp_path: Path) -> None:
    job = three.finish(three.submit(job_spec(rounds=1)))
    assert three.researcher is not None
    path = tmp_path / "model.safetensors"
    assert three.researcher.jobs.download_model(job.id, path) == job.model_digest
    assert {name: array.shape for name, array in arrays.read(path).items()} == {
        "0.bias": (4,), "0.weight": (4, 5), "2.bias": (2,), "2.weight": (2, 4),
    }  # fmt: skip
