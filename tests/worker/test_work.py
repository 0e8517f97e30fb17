"""A task of a job with a privacy unit, from the CSV file to the bytes that may leave."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.codec.arrays import read
from isthmus.wire.rounds import TaskOffer
from isthmus_worker.messages import Done, Work
from isthmus_worker.refusals import DataRefused
from isthmus_worker.settings import DatasetSettings
from isthmus_worker.work import Desk
from tests.worker.factories import (
    DATASET,
    RECORD,
    make_local_spec,
    make_model,
    make_offer,
    make_record_spec,
    write_patients,
)

NOISED = {"evaluation": {"holdout": 0.2, "every": 1, "release": "noised"}}


def done(
    folder: Path, offer: TaskOffer, *, rows: int = 400, min_rows: int = 5, alike: bool = False
) -> tuple[Done, dict[str, Any]]:
    """What the child answers, and the arrays that would leave."""
    path = folder / "patients.csv"
    if not path.exists():
        write_patients(path, rows)
        if alike:
            lines = path.read_text().splitlines()
            path.write_text("\n".join([lines[0], *(line.rpartition(",")[0] + ",1" for line in lines[1:])]) + "\n")
    (folder / "model").write_bytes(make_model(offer.spec)[0])
    dataset = DatasetSettings.model_validate({"name": DATASET, "source": {"kind": "csv", "path": path}})
    order = Work(
        number=1, offer=offer, dataset=dataset, model_path=folder / "model", upload_path=folder / "upload",
        holdout_key="ab" * 32, entry_points=(), min_rows=min_rows, tell_counts=False,
    )  # fmt: skip
    answer = Desk().perform(order, lambda _share: None)
    return answer, read(folder / "upload", offer.upload_manifest)


@pytest.mark.parametrize("number", [0, 1, 4])
def test_local_results_stay_and_nothing_but_the_manifest_leaves(tmp_path: Path, number: int) -> None:
    offer = make_offer(make_record_spec(), number)
    answer, leaving = done(tmp_path, offer)
    assert set(leaving) == set(offer.upload_manifest.tensors)
    assert not any(name.startswith("metrics/") for name in leaving)
    if number:
        assert answer.metrics["holdout/examples"] == 400 - answer.metrics.get("train/examples", 400 - _held(tmp_path))
        assert {"holdout/loss", "holdout/accuracy", "holdout/auc"} < set(answer.metrics)
        assert ("train/loss" in answer.metrics) == (number == 1)


def _held(folder: Path) -> float:
    return done(folder, make_offer(make_record_spec(), 1))[0].metrics["holdout/examples"]


@pytest.mark.parametrize("number", [1, 4])
def test_noised_results_leave_as_counts_and_the_exact_ones_stay(tmp_path: Path, number: int) -> None:
    offer = make_offer(make_record_spec(**NOISED), number)
    answer, leaving = done(tmp_path, offer)
    again = done(tmp_path, offer)[1]
    told = {name for name in leaving if name.startswith("metrics/")}
    assert told == {"metrics/holdout/examples", "metrics/holdout/accuracy"}
    assert {"holdout/loss", "holdout/accuracy"} < set(answer.metrics)
    assert float(leaving["metrics/holdout/accuracy"]) != answer.metrics["holdout/accuracy"]
    assert float(leaving["metrics/holdout/accuracy"]) != float(again["metrics/holdout/accuracy"])


def test_training_twice_gives_other_bytes_because_noise_has_no_seed(tmp_path: Path) -> None:
    offer = make_offer(make_record_spec(), 1)
    one, other = (done(tmp_path, offer)[1] for _ in range(2))
    assert all((one[name] != other[name]).mean() > 0.9 for name in one)


def test_a_refusal_hangs_on_what_was_declared_and_not_on_the_records(tmp_path: Path) -> None:
    """Neither one class among the targets nor a record less than declared is told; too few declared rows are."""
    declared = make_offer(make_record_spec(), 1)  # 40 rows
    answer, _ = done(tmp_path, declared, rows=12, min_rows=30, alike=True)
    assert answer.metrics["train/examples"] < 30
    with pytest.raises(DataRefused, match="min_rows"):
        done(tmp_path, declared, min_rows=33)


def test_the_update_of_an_organization_is_noised_here_where_the_job_says_so(tmp_path: Path) -> None:
    offer = make_offer(make_local_spec(), 1)
    one, other = (done(tmp_path, offer)[1] for _ in range(2))
    assert all((one[name] != other[name]).all() for name in one)
    assert np.linalg.norm(np.concatenate([array.ravel() for array in one.values()])) > 1.0  # the clip


def test_statistics_are_noised_and_within_the_ranges(tmp_path: Path) -> None:
    offer = make_offer(make_record_spec(), 0)
    one, other = (done(tmp_path, offer)[1] for _ in range(2))
    assert one["statistics/mean"].tolist() != other["statistics/mean"].tolist()
    ranges = [feature["range"] for feature in RECORD["data"]["features"] if "range" in feature]
    for mean, (lowest, highest) in zip(one["statistics/mean"], ranges, strict=True):
        assert lowest <= mean <= highest
