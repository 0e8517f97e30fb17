"""A simulated job and a real one, of a service and workers as processes, come to the same bytes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from isthmus.wire.jobs import JobState
from isthmus.wire.rounds import TaskKind
from isthmus_worker.data import CsvSource
from isthmus_worker.settings import CsvSettings
from isthmus_worker.simulation.clients import Client
from isthmus_worker.simulation.engine import simulate
from isthmus_worker.state import StateDir
from tests.acceptance.island import Island, island, job_spec, write_patients

SITES = 4


@pytest.fixture
def four(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Island]:
    """A service and four organizations; their datasets differ in size, so that weights matter."""
    monkeypatch.setattr(
        "tests.acceptance.island.write_patients",
        lambda path, number: write_patients(path, number, rows=60 + 20 * number),
    )
    with island(tmp_path, database_url) as opened:
        opened.open(SITES)
        yield opened


def clients_like(opened: Island) -> list[Client]:
    """The same records, under the same names, held out by the same secrets."""
    columns = job_spec().data.columns()
    found = []
    for number in range(SITES):
        site = opened.folder / f"clinic-{number}"
        table = CsvSource(CsvSettings(path=site / "patients.csv")).load(columns)
        found.append(Client(f"clinic-{number}", "patients", table, StateDir(site / "state").holdout_key()))
    return found


def test_a_simulation_gives_the_checkpoints_statistics_and_measures_of_a_real_run(four: Island) -> None:
    assert four.researcher is not None
    half = {"fraction": 0.5, "min_updates": 2, "deadline_s": 60}
    jobs: list[dict[str, Any]] = [
        {"strategy": "fedavg", "cohort": half},
        {"strategy": "fedavgm", "training": {"optimizer": {"adam": {"lr": 0.01}}, "batch_size": 7, "epochs": 2}},
        {"strategy": {"fedadam": {"lr": 0.05, "weights": "uniform"}}, "cohort": half,
         "privacy": {"unit": "none", "clip_norm": 0.05}},
        {"data": {**job_spec().data.model_dump(), "standardize": "none",
                  "features": ["age", {"name": "sex", "categories": ["Female", "Male"]}]},
         "model": {"layers": [{"linear": {"in": 3, "out": 4}}, {"dropout": {"p": 0.3}}, "tanh",
                              {"linear": {"in": 4, "out": 2}}]},
         "training": {"optimizer": {"sgd": {"lr": 0.001, "momentum": 0.9, "nesterov": True}}, "batch_size": "all"},
         "evaluation": {"holdout": 0}, "rounds": 4},
    ]  # fmt: skip
    for changes in jobs:
        spec = job_spec(**changes)
        job = four.finish(four.submit(spec))
        assert job.state is JobState.COMPLETED, job.detail

        simulation = simulate(spec, clients_like(four), processes=2)

        real = {view.round_number: view.digest for view in four.researcher.jobs.checkpoints(job.id)}
        trained = [one for one in simulation.rounds if one.kind is TaskKind.TRAIN]
        assert {one.number: one.model_digest for one in trained} == {n: real[n] for n in range(1, spec.rounds + 1)}
        assert simulation.digest == job.model_digest
        assert simulation.manifest == job.manifest
        assert simulation.statistics == job.statistics
        for one in simulation.rounds:
            view = four.researcher.jobs.round(job.id, one.number)
            assert [(key.organization, key.dataset) for key in one.cohort] == [
                (update.organization, update.dataset) for update in view.updates
            ]
            if one.kind is not TaskKind.STATISTICS:
                assert one.metrics == view.metrics
                assert list(one.sites.values()) == [update.metrics for update in view.updates]


@pytest.mark.parametrize("weights", ["declared", "uniform"])
def test_a_simulated_secured_job_gives_the_checkpoints_of_a_real_one(four: Island, weights: str) -> None:
    """Masked and unmasked, or never masked at all: the whole numbers are the same."""
    assert four.researcher is not None
    spec = job_spec(
        strategy={"fedavg": {"weights": weights}},
        privacy={"unit": "none", "clip_norm": 0.5},
        secure_aggregation=True,
        cohort={"min_updates": 3, "deadline_s": 60},
        data={**job_spec().data.model_dump(), "standardize": "none",
              "features": ["age", {"name": "sex", "categories": ["Female", "Male"]}]},
        model={"layers": [{"linear": {"in": 3, "out": 2}}]},
        evaluation={"holdout": 0.2, "release": "local"},
    )  # fmt: skip
    job = four.finish(four.submit(spec))
    assert job.state is JobState.COMPLETED, job.detail

    simulation = simulate(spec, clients_like(four), processes=2)

    real = {view.round_number: view.digest for view in four.researcher.jobs.checkpoints(job.id)}
    trained = [one for one in simulation.rounds if one.kind is TaskKind.TRAIN]
    assert {one.number: one.model_digest for one in trained} == {n: real[n] for n in range(1, spec.rounds + 1)}
