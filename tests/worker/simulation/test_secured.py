"""A simulated job under secure aggregation: whole numbers, summed exactly."""

from typing import Any

import numpy as np
import pytest

from isthmus.wire.jobs import JobSpec
from isthmus_worker.simulation import secured
from isthmus_worker.simulation.clients import Client, ClientsRefused
from isthmus_worker.simulation.engine import SimulationFailed
from tests.worker.simulation.cases import job_spec, points, simulated, some_clients


def spec_of(**changes: Any) -> JobSpec:
    """The job of points, secured."""
    plain = {
        "data": {**job_spec().data.model_dump(), "standardize": "none"},
        "privacy": {"unit": "none", "clip_norm": 2.0},
        "cohort": {"min_updates": 3},
        "evaluation": {"holdout": 0.25, "release": "local"},
    }
    return job_spec(**{**plain, "secure_aggregation": True, **changes})


@pytest.mark.parametrize("weights", ["uniform", "declared"])
@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm", "fedadam"])
def test_it_comes_to_what_the_plain_job_comes_to_but_for_the_rounding(weights: str, strategy: str) -> None:
    changes = {"strategy": {strategy: {"weights": weights}}}
    plain = simulated(spec_of(secure_aggregation=None, **changes), some_clients())
    hidden = simulated(spec_of(**changes), some_clients())

    assert hidden.digest != plain.digest
    for name, array in plain.model.items():
        assert np.allclose(hidden.model[name], array, atol=1e-3)


def test_the_same_secured_job_gives_the_same_bytes_with_any_number_of_processes() -> None:
    spec = spec_of()
    assert len({simulated(spec, some_clients(), processes=processes).digest for processes in (1, 2, 3)}) == 1


def test_the_noise_of_all_organizations_together_is_that_of_the_plan() -> None:
    """A round without learning moves the model by the noise alone: over 3 members, at the price of the sum."""
    spec = spec_of(
        privacy={"unit": "organization", "where": "distributed", "clip_norm": 1.0, "noise_multiplier": 5.0},
        strategy={"fedavg": {"weights": "uniform"}},
        training={"optimizer": {"sgd": {"lr": 1e-9}}, "batch_size": 8},
        model={"layers": [{"linear": {"in": 4, "out": 2000}}, "relu", {"linear": {"in": 2000, "out": 3}}]},
        rounds=1,
    )
    still = simulated(spec_of(**{**_plain(spec), "privacy": {"unit": "none", "clip_norm": 1.0}}), some_clients(3))
    noised = simulated(spec, some_clients(3))

    moved = np.concatenate([(noised.model[name] - still.model[name]).ravel() for name in still.model])
    assert moved.std() == pytest.approx(5.0 / 3, rel=0.05)  # of the mean of 3
    assert all(epsilon > 0 for epsilon in noised.epsilon_spent().values())


def _plain(spec: JobSpec) -> dict[str, Any]:
    plain = spec.model_dump(mode="json", by_alias=True)
    return {name: plain[name] for name in ("strategy", "training", "model", "rounds")}


def test_an_organization_with_two_datasets_and_too_large_a_round_are_refused() -> None:
    two = [*some_clients(3), Client("clinic-0", "more", points(40, seed=77))]
    with pytest.raises(ClientsRefused, match="takes part with one dataset; clinic-0 has 2"):
        simulated(spec_of(), two)
    with pytest.raises(ClientsRefused, match="512 members are the most of a round; this job's has 513"):
        secured.require_hideable([], 513)


def test_a_sum_that_is_longer_than_the_bound_allows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secured, "sum_bound", lambda *_: 1)

    with pytest.raises(SimulationFailed, match="longer than the job's bound allows"):
        simulated(spec_of(), some_clients())
