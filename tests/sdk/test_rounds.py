"""What a job's rounds are, whom they ask and how results are pooled."""

import hashlib
from typing import Any

import numpy as np
import pytest

from isthmus.federation.cohort import TooFewParticipations, draw_cohort
from isthmus.federation.rounds import (
    cohort_seed,
    draw_round,
    merge_statistics,
    number_after,
    pool_metrics,
    site_metrics,
    weight_of,
)
from isthmus.federation.statistics import moments
from isthmus.wire.jobs import CohortSpec, JobSpec
from isthmus.wire.rounds import TaskKind
from isthmus.wire.strategies import FedAdam, FedAvg, Weighting

SEED = "5e" * 32
KEYS = [(f"clinic-{number}", "heart") for number in range(9)]


def job_spec(**changes: Any) -> JobSpec:
    spec: dict[str, Any] = {
        "name": "small",
        "model": {"layers": [{"linear": {"in": 2, "out": 2}}]},
        "data": {
            "task": "classification", "features": ["age", "chol"], "target": "ill", "classes": 2,
            "standardize": "federated",
        },
        "training": {"optimizer": "adam"},
        "privacy": "none",
        "rounds": 2,
    }  # fmt: skip
    return JobSpec.model_validate({**spec, **changes})


def walk(spec: JobSpec) -> list[int]:
    found, number = [], number_after(spec, None)
    while number is not None:
        found.append(number)
        number = number_after(spec, number)
    return found


def test_statistics_come_first_and_the_final_model_is_measured_last_where_the_job_asks_for_that() -> None:
    plain = {**job_spec().data.model_dump(), "standardize": "none"}
    words = {**job_spec().data.model_dump(), "features": [{"name": "sex", "categories": ["F", "M"]}]}

    assert walk(job_spec()) == [0, 1, 2, 3]
    assert walk(job_spec(evaluation={"holdout": 0})) == [0, 1, 2]
    assert walk(job_spec(data=plain)) == [1, 2, 3]
    assert walk(job_spec(data=words)) == [1, 2, 3], "there are no numbers to measure"


def test_the_seed_of_a_cohort_is_what_it_always_was() -> None:
    """It is recorded with every round: whoever replays a job derives it again."""
    assert cohort_seed(SEED, 7) == hashlib.sha256(b"isthmus/cohort/v1" + b"\x5e" * 32 + b"\0" * 7 + b"\x07").hexdigest()


def test_only_training_draws_a_part_and_only_an_evaluation_is_content_with_one() -> None:
    spec = CohortSpec(fraction=0.5, over_selection=2, min_updates=3)
    seed = cohort_seed(SEED, 1)

    drawn = draw_round(spec, TaskKind.TRAIN, KEYS, seed)
    assert drawn == draw_cohort(KEYS, seed=bytes.fromhex(seed), fraction=0.5, over_selection=2, min_updates=3)
    assert (len(drawn.chosen), drawn.target_updates) == (7, 5)
    for kind in (TaskKind.STATISTICS, TaskKind.EVALUATE):
        assert list(draw_round(spec, kind, KEYS, seed).chosen) == KEYS
    assert len(draw_round(spec, TaskKind.EVALUATE, KEYS[:1], seed).chosen) == 1
    for kind in (TaskKind.STATISTICS, TaskKind.TRAIN):
        with pytest.raises(TooFewParticipations):
            draw_round(spec, kind, KEYS[:2], seed)


def test_an_update_counts_by_declared_rows_or_like_any_other() -> None:
    assert weight_of(FedAvg(), 40) == 40.0
    assert weight_of(FedAdam(weights=Weighting.UNIFORM), 40) == 1.0


def test_statistics_are_those_of_all_rows_together() -> None:
    chance = np.random.default_rng(1)
    sites = [chance.normal(5, 2, (rows, 2)) for rows in (10, 30)]
    released = []
    for rows in sites:
        found = moments(rows)
        released.append(
            {
                "statistics/count": found.count.tolist(),
                "statistics/mean": found.mean.tolist(),
                "statistics/m2": found.m2.tolist(),
                "statistics/rows": float(len(rows)),
            }
        )

    merged = merge_statistics(job_spec().data, released)

    whole = np.concatenate(sites)
    assert (merged.names, merged.count, merged.rows, merged.sites) == (["age", "chol"], [40.0, 40.0], 40.0, 2)
    assert merged.mean == pytest.approx(whole.mean(axis=0))
    assert merged.variance == pytest.approx(whole.var(axis=0))


def test_measures_are_pooled_by_the_examples_behind_them() -> None:
    sites = [
        {"holdout/examples": 10.0, "holdout/loss": 1.0, "holdout/auc": 0.5, "train/examples": 1.0, "train/loss": 4.0},
        {"holdout/examples": 30.0, "holdout/loss": 2.0, "train/examples": 3.0, "train/loss": 8.0},
        {"holdout/examples": 0.0, "holdout/loss": 0.0},
    ]
    assert pool_metrics(sites) == {
        "holdout/examples": 40.0, "holdout/loss": 1.75, "holdout/auc": 0.5, "train/examples": 4.0, "train/loss": 7.0,
    }  # fmt: skip
    assert pool_metrics([]) == {}


def test_metrics_are_told_from_what_else_a_site_released() -> None:
    assert site_metrics({"metrics/train/loss": 1, "statistics/rows": 5.0}) == {"train/loss": 1.0}
