"""Jobs with a privacy unit from end to end: real processes, real noise, and two ledgers that agree."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from isthmus.wire.jobs import JobSpec, JobState
from isthmus.wire.ledger import LedgerEntryView, LedgerKind
from isthmus.wire.privacy import PrivacyUnit
from isthmus.wire.rounds import TaskKind
from tests.acceptance.island import PATIENCE_S, Island, island, job_spec, program_path, until

UNIFORM = {"fedavg": {"weights": "uniform"}}
RANGED = {
    "task": "classification",
    "features": [
        {"name": "age", "range": [0, 120]},
        {"name": "chol", "range": [50, 500], "missing": "indicate"},
        {"name": "sex", "categories": ["Female", "Male"]},
    ],
    "target": "disease",
    "classes": 2,
    "standardize": "federated",
}
PLAIN = {
    "task": "classification",
    "features": ["age", {"name": "sex", "categories": ["Female", "Male"]}],
    "target": "disease",
    "classes": 2,
}
NARROW = {"layers": [{"linear": {"in": 3, "out": 4}}, "relu", {"linear": {"in": 4, "out": 2}}]}
ELEMENTS = 3 * 4 + 4 + 4 * 2 + 2


@pytest.fixture
def three(database_url: str, tmp_path: Path) -> Iterator[Island]:
    """A service and three organizations."""
    with island(tmp_path, database_url) as opened:
        opened.open(3)
        yield opened


def record_job(**changes: object) -> JobSpec:
    return job_spec(
        rounds=3,
        data=RANGED,
        privacy={"unit": "record", "epsilon": 3.0, "clip_norm": 1.0},
        evaluation={"holdout": 0.25, **dict(changes.pop("evaluation", {}))},  # type: ignore[call-overload]
        **changes,
    )


def organization_job(where: str, noise: float, clip: float = 0.5) -> JobSpec:
    privacy = {"unit": "organization", "where": where, "noise_multiplier": noise, "clip_norm": clip}
    return job_spec(rounds=2, data=PLAIN, model=NARROW, privacy=privacy, strategy=UNIFORM, evaluation={"holdout": 0.25})


def entries_of(three: Island, job_id: object) -> list[list[LedgerEntryView]]:
    """What every dataset's ledger holds of a job, once its reservation was settled."""

    def settled() -> list[list[LedgerEntryView]] | None:
        found = []
        for steward in three.stewards:
            dataset = next(iter(steward.datasets.list()))
            found.append([entry for entry in steward.datasets.ledger(dataset.id) if entry.job_id == job_id])
        return found if not any(map(promised, found)) else None

    return until(settled, "nothing is promised to the job any more")


def held_updates(three: Island) -> list[Path]:
    """The bodies of updates that lie on the service's disk."""
    return [path for path in (three.folder / "service").rglob("*") if path.is_file() and "updates" in path.parts]


def promised(entries: list[LedgerEntryView]) -> bool:
    """Whether something is still reserved."""
    signed = [(1 if entry.kind is LedgerKind.RESERVE else -1, entry.rdp_nano) for entry in entries]
    return any(sum(sign * nano[order] for sign, nano in signed) for order in range(len(entries[0].rdp_nano)))


def test_records_stay_hidden_and_both_ledgers_say_what_that_cost(three: Island) -> None:
    assert three.researcher is not None
    job = three.finish(three.submit(record_job()))
    assert job.state is JobState.COMPLETED, job.detail
    assert job.statistics is not None
    assert all(50 <= mean <= 500 or 0 <= mean <= 120 for mean in job.statistics.mean)

    for number in range(1, 5):
        of = three.researcher.jobs.round(job.id, number)
        assert of.metrics == {}, "nothing that was measured leaves"
        assert all(update.metrics == {} for update in of.updates)

    report = three.researcher.jobs.privacy(job.id)
    assert report.unit is PrivacyUnit.RECORD
    for site in report.datasets:
        assert site.plan is not None
        assert site.epsilon_spent is not None
        assert 2.9 < site.epsilon_spent <= site.plan.epsilon <= 3.0
    for entries in entries_of(three, job.id):
        kinds = [(entry.kind.value, entry.release) for entry in entries]
        assert kinds == [
            ("reserve", None), ("spend", "statistics"), *[("spend", "train")] * 3, ("spend", "evaluate"),
        ]  # fmt: skip
        spent = [sum(order) for order in zip(*(entry.rdp_nano for entry in entries[1:]), strict=True)]
        assert spent == entries[0].rdp_nano, "the job released all that was reserved for it, and nothing is refunded"
        assert not any(entries[5].rdp_nano), "an evaluation that stays at the site costs nothing"

    for number in range(3):  # they stay at the site, and are read there
        told = results(three.folder / f"clinic-{number}", job.name)
        final = [one for one in told if one["kind"] == TaskKind.EVALUATE.value]
        assert len(final) == 1
        assert 0.0 <= final[0]["metrics"]["holdout/accuracy"] <= 1.0
        assert {one["dataset"] for one in told} == {"patients"}


def results(folder: Path, job: str) -> list[dict[str, dict[str, float]]]:
    """What a worker tells of a job where its data is."""
    words = [program_path("isthmus-worker"), "results", job, "--config", "worker.toml", "--json"]
    ran = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    found: list[dict[str, dict[str, float]]] = json.loads(ran.stdout)
    return found


def test_noised_counts_leave_and_are_charged(three: Island) -> None:
    assert three.researcher is not None
    job = three.finish(three.submit(record_job(evaluation={"release": "noised", "every": 0})))
    assert job.state is JobState.COMPLETED, job.detail
    final = three.researcher.jobs.round(job.id, 4)
    assert set(final.metrics) == {"holdout/examples", "holdout/accuracy"}
    assert 0.0 <= final.metrics["holdout/accuracy"] <= 1.0
    for entries in entries_of(three, job.id):
        (evaluated,) = [entry for entry in entries if entry.release == "evaluate"]
        assert all(evaluated.rdp_nano)


def test_local_noise_is_in_every_update_as_strong_as_it_was_claimed(three: Island) -> None:
    assert three.researcher is not None
    job = three.finish(three.submit(organization_job("local", noise=4.0)))
    assert job.state is JobState.COMPLETED, job.detail
    updates = [update for number in (1, 2) for update in three.researcher.jobs.round(job.id, number).updates]
    expected = 4.0 * 2 * 0.5 * ELEMENTS**0.5
    assert all(0.5 * expected < (update.l2_norm or 0.0) < 1.6 * expected for update in updates)
    assert len({update.digest for update in updates}) == 6


def test_central_noise_is_drawn_once_and_leaves_neither_key_nor_updates(three: Island) -> None:
    assert three.researcher is not None
    job = three.finish(three.submit(organization_job("central", noise=4.0)))
    assert job.state is JobState.COMPLETED, job.detail
    for number in (1, 2):
        of = three.researcher.jobs.round(job.id, number)
        assert all(update.l2_norm is update.digest is None for update in of.updates), "both tell of the records"
    until(lambda: len(held_updates(three)) == 3, "those of the evaluation are left, which are empty")
    for entries in entries_of(three, job.id):
        assert [entry.release for entry in entries if entry.kind is LedgerKind.SPEND] == ["train", "train", "evaluate"]
        assert entries[1].event == {"kind": "gaussian", "noise_multiplier": 4.0, "sensitivity": 2.0}
