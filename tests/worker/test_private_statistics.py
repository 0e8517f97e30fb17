"""Noised statistics: what one record can change, what comes out, and what never does."""

from typing import Any

import numpy as np
import pytest

from isthmus.wire.data import DataSpec
from isthmus.wire.rounds import STATISTICS_PREFIX
from isthmus_worker import private_statistics
from isthmus_worker.data import Table, fingerprint
from isthmus_worker.offers import LEAST_VARIANCE
from isthmus_worker.private_statistics import measure_privately, record_sums, sensitivity

DATA = DataSpec.model_validate(
    {
        "task": "classification",
        "features": [
            {"name": "age", "range": [0, 120]},
            {"name": "pressure", "range": [50, 250], "missing": "indicate"},
            {"name": "flat", "range": [-1e6, 1e6]},
        ],
        "target": "ill",
        "classes": 2,
        "standardize": "federated",
    }
)
SCALE = 1 << 20


def table_of(ages: Any, pressures: Any, flat: Any) -> Table:
    """Records with these columns."""
    columns = {"age": ages, "pressure": pressures, "flat": flat}
    columns = {name: np.asarray(values, np.float64) for name, values in columns.items()}
    return Table(columns=columns, fingerprints=[fingerprint(row) for row in zip(*columns.values(), strict=True)])


def some(rows: int, seed: int = 0) -> Table:
    """Made-up patients; every tenth pressure is missing."""
    chance = np.random.default_rng(seed)
    pressures = chance.normal(130, 20, rows)
    pressures[::10] = np.nan
    return table_of(chance.normal(50, 10, rows), pressures, np.full(rows, 7.0))


def told(table: Table, noise: float) -> dict[str, Any]:
    """The statistics, without their prefix."""
    found = measure_privately(table, DATA, np.ones(table.rows, np.bool_), noise)
    return {name.removeprefix(STATISTICS_PREFIX): value for name, value in found.items()}


def test_one_record_changes_the_sums_by_the_sensitivity_at_most_whatever_it_holds() -> None:
    chance = np.random.default_rng(4)
    for values in (
        [120, 250, 1e6],
        [0, 50, -1e6],
        [1e300, -1e300, 1e300],
        [np.nan] * 3,
        *chance.normal(0, 1e3, (30, 3)),
    ):
        sums = record_sums(_unchecked(values), _lenient(), np.ones(1, np.bool_), SCALE)
        assert sum(int(one) ** 2 for one in sums) <= sensitivity(3, SCALE) ** 2
    largest = record_sums(table_of([120], [250], [1e6]), DATA, np.ones(1, np.bool_), SCALE)
    assert sum(int(one) ** 2 for one in largest) > (sensitivity(3, SCALE) - 1) ** 2  # and no less is true


def _lenient() -> DataSpec:
    features = [{**feature.model_dump(exclude_none=True), "missing": "indicate"} for feature in DATA.features]
    return DataSpec.model_validate({**DATA.model_dump(exclude_none=True), "features": features})


def _unchecked(values: Any) -> Table:
    return table_of(*([value] for value in values))


def test_with_little_noise_the_statistics_are_those_of_the_records() -> None:
    table = some(20_000)
    found = told(table, 0.01)
    assert found["rows"] == pytest.approx(20_000, abs=2)
    assert found["count"] == pytest.approx([20_000, 18_000, 20_000], abs=2)
    assert found["mean"][:2] == pytest.approx([50, 130], abs=0.5)
    assert found["m2"][:2] / found["count"][:2] == pytest.approx([100, 400], rel=0.05)


def test_rows_that_are_held_out_are_not_counted_and_values_outside_of_the_range_are_its_end() -> None:
    table = table_of([30, 1e9, 60, 60], [100, 100, 100, 100], [0, 0, 0, 0])
    sums = record_sums(table, DATA, np.array([True, True, False, False]), SCALE)
    assert sums[:3].tolist() == [2 * SCALE, 2 * SCALE, SCALE - SCALE // 2]  # 30 of 0..120 is -1/2, the other one 1


@pytest.mark.parametrize("noise", [0.5, 5.0, 500.0, 10_000.0])
def test_whatever_the_noise_the_statistics_are_such_as_some_records_could_have(noise: float) -> None:
    for seed in range(20):
        found = told(some(3, seed), noise)
        assert found["rows"] >= 1
        assert found["rows"] == np.floor(found["rows"])
        assert ((found["count"] >= 1) & (found["count"] <= found["rows"])).all()
        assert (found["count"] == np.floor(found["count"])).all()
        for place, (lowest, highest) in enumerate([(0, 120), (50, 250), (-1e6, 1e6)]):
            mean, variance = found["mean"][place], found["m2"][place] / found["count"][place]
            assert lowest <= mean <= highest
            assert 0 <= variance <= (highest - lowest) ** 2 / 4 * (1 + 1e-9)
            assert variance == 0 or variance >= LEAST_VARIANCE * max(1, abs(mean)) ** 2


def test_noise_is_fresh_in_every_call_and_as_large_as_it_is_charged_for() -> None:
    table, noise = some(2000), 3.0
    rows = np.array([told(table, noise)["rows"] for _ in range(400)])
    assert len(set(rows)) > 20
    wanted = noise * sensitivity(3, SCALE) / SCALE
    assert np.std(rows - 2000) == pytest.approx(wanted, rel=0.2)
    assert private_statistics.PER_COLUMN * 3 + 1 == 10  # as many draws as isthmus.privacy.planning counts
