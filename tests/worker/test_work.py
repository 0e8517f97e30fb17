"""A task of a job with a privacy unit, from the CSV file to the bytes that may leave."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.codec.arrays import decode, read
from isthmus.wire.jobs import JobSpec
from isthmus.wire.rounds import TaskOffer
from isthmus_worker.features import Examples
from isthmus_worker.messages import Done, Work
from isthmus_worker.modules import loaded_module
from isthmus_worker.parts import Split
from isthmus_worker.refusals import DataRefused, WorkBroken
from isthmus_worker.settings import DatasetSettings
from isthmus_worker.work import Desk, local_update
from tests.worker.factories import (
    DATASET,
    JOB_SEED,
    LOCAL,
    RECORD,
    make_local_spec,
    make_model,
    make_offer,
    make_record_spec,
    make_spec,
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


def test_what_is_clipped_is_what_training_changed_and_not_the_weights(tmp_path: Path) -> None:
    clip = 0.1
    spec = make_local_spec(
        privacy={**LOCAL["privacy"], "where": "central", "clip_norm": clip},
        training={"optimizer": {"sgd": {"lr": 1e-6}}, "batch_size": 8},
    )
    weights = np.concatenate([array.ravel() for array in decode(make_model(spec)[0]).values()])
    assert np.linalg.norm(weights) > 5 * clip

    _, leaving = done(tmp_path, make_offer(spec, 1))

    changed = np.linalg.norm(np.concatenate([array.ravel() for array in leaving.values()]))
    assert 0 < changed < clip / 2, "so small a change is left as it is; clipped weights would be as long as the bound"


UNFIT = [
    ["1e400", "x", "unlisted", "1"],
    ["", "", "", "0"],
    ["50", "120", "F", "7"],
    ["50", "120", "F", ""],
]
"""Patients as `write_patients` has them, but for values that a job without privacy refuses."""


@pytest.mark.parametrize("unfit", UNFIT)
@pytest.mark.parametrize("number", [0, 1, 4])
def test_no_single_record_changes_whether_a_task_is_done(tmp_path: Path, number: int, unfit: list[str]) -> None:
    path = write_patients(tmp_path / "patients.csv", 60)
    header = path.read_text().splitlines()[0].split(",")
    known = dict(zip(["age", "pressure", "sex", "ill"], unfit, strict=True))
    line = ",".join(known.get(name, "") for name in header) + "\n"
    plain = make_offer(make_spec(), number)
    done(tmp_path, plain)
    path.write_text(path.read_text() + line)

    done(tmp_path, make_offer(make_record_spec(**NOISED), number))

    with pytest.raises(DataRefused):
        done(tmp_path, plain)


def test_records_without_a_target_take_no_part_and_a_dataset_of_them_alone_is_no_failure(tmp_path: Path) -> None:
    path = write_patients(tmp_path / "patients.csv", 60)
    lines = path.read_text().splitlines()
    spec = make_record_spec(**NOISED)
    whole = done(tmp_path, make_offer(spec))[0].metrics
    path.write_text("\n".join([*lines, *(line.rpartition(",")[0] + "," for line in lines[1:])]) + "\n")
    more = done(tmp_path, make_offer(spec))[0].metrics
    assert more["train/examples"] + more["holdout/examples"] == 60
    assert more["holdout/examples"] == whole["holdout/examples"]
    path.write_text("\n".join([lines[0], *(line.rpartition(",")[0] + "," for line in lines[1:])]) + "\n")
    assert done(tmp_path, make_offer(spec))[0].metrics["train/examples"] == 0
    done(tmp_path, make_offer(spec, 0))


@pytest.mark.parametrize("where", ["local", "central"])
@pytest.mark.parametrize("broken", [np.nan, 3e38])
def test_an_update_that_is_not_finite_is_one_of_zeros_with_noise_and_no_failure(where: str, broken: float) -> None:
    spec = make_local_spec(privacy={**LOCAL["privacy"], "where": where})
    found = _updated(spec, broken)
    moved = np.concatenate([array.ravel() for array in found.values()])
    assert np.isfinite(moved).all()
    assert moved.any() == (where == "local")
    with pytest.raises(WorkBroken, match="diverged"):
        _updated(make_spec(**{**LOCAL, "privacy": "none"}), broken)


def _updated(spec: JobSpec, value: float) -> dict[str, Any]:
    """What leaves of training on records of which one holds `value`."""
    offer = make_offer(spec)
    inputs = np.ones((20, 3), np.float32)
    inputs[7] = value
    examples = Examples(inputs=inputs, targets=np.arange(20) % 2)
    before = decode(make_model(spec)[0], offer.model_manifest)
    return local_update(
        loaded_module(spec.model, (), before), before, Split(examples, examples.only(np.arange(20) < 0)), spec,
        plan=offer.plan, manifest=offer.model_manifest, round_number=1, seed=JOB_SEED, tell=lambda _share: None,
    )[0]  # fmt: skip


def test_a_number_outside_of_an_embedding_is_no_failure_with_a_privacy_unit(tmp_path: Path) -> None:
    data = {"task": "classification", "features": ["age"], "target": "ill", "classes": 2}
    model = {"layers": [{"embedding": {"num": 61, "dim": 4}}, "flatten", {"linear": {"in": 4, "out": 2}}]}
    (tmp_path / "patients.csv").write_text("age,ill\n" + "60,0\n9,1\n61,1\n-1,0\n1e30,1\n" * 20)
    for number in (1, 4):
        done(tmp_path, make_offer(make_record_spec(data=data, model=model, **NOISED), number))
        with pytest.raises(IndexError):
            done(tmp_path, make_offer(make_spec(data=data, model=model, evaluation={"holdout": 0.5}), number))


def test_statistics_are_noised_and_within_the_ranges(tmp_path: Path) -> None:
    offer = make_offer(make_record_spec(), 0)
    one, other = (done(tmp_path, offer)[1] for _ in range(2))
    assert one["statistics/mean"].tolist() != other["statistics/mean"].tolist()
    ranges = [feature["range"] for feature in RECORD["data"]["features"] if "range" in feature]
    for mean, (lowest, highest) in zip(one["statistics/mean"], ranges, strict=True):
        assert lowest <= mean <= highest
