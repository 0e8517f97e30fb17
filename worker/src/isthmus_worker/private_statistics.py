"""What a statistics task tells of a dataset under privacy of records: noised sums, and what follows from them.

A record counts as one vector: 1 for itself, and for each number column whether it has a value, that value, and its
square, where values are moved from the column's declared range to -1..1. These vectors are whole numbers on a lattice;
their length is bounded by the number of columns alone. Their sum gets discrete Gaussian noise; counts, means and
variances are computed from the noised sum, and reveal nothing more (post-processing).
"""

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from isthmus.privacy.discrete_gaussian import DiscreteGaussian
from isthmus.privacy.keystream import Keystream
from isthmus.privacy.lattice import UPDATE_SCALE
from isthmus.privacy.scales import finest_scale
from isthmus.wire.data import DataSpec
from isthmus.wire.rounds import STATISTICS_PREFIX
from isthmus_worker.data import Table
from isthmus_worker.features import number_column
from isthmus_worker.offers import LEAST_VARIANCE

Sums = NDArray[np.int64]
PER_COLUMN: Final = 3
"""Sums of a column: values that are there, values, squares."""


def measure_privately(
    table: Table, data: DataSpec, training: NDArray[np.bool_], noise_multiplier: float
) -> dict[str, NDArray[Any]]:
    """The statistics tensors of the training rows, float64; rows held out are not looked at.

    Args:
        table: the columns that the job reads.
        data: the job's data section; every number has a range.
        training: marks the rows to measure.
        noise_multiplier: standard deviation of the noise in units of what one record can change, in L2 norm.

    Returns:
        `count`, `mean` and `m2` of each number column, and `rows`: such as some records could have. A count and the
        rows are whole numbers from 1; a mean is within the column's range; a variance is never below what the noise
        would leave of a constant, so that nothing is blown up by it.

    Raises:
        SchemaRefused: a column is missing or holds arrays.
    """
    columns = len(data.numbers())
    scale, variance = finest_scale(noise_multiplier, lambda steps: sensitivity(columns, steps), UPDATE_SCALE)
    sums = record_sums(table, data, training, scale)
    sums += DiscreteGaussian(variance).sample(len(sums), Keystream())
    return _statistics(sums / scale, data, math.sqrt(variance) / scale)


def sensitivity(columns: int, scale: int) -> int:
    """L2 norm of what one record adds to the sums, at most, in steps: ceil(scale sqrt(1 + 3 columns))."""
    squares = scale * scale * (1 + PER_COLUMN * columns)
    return math.isqrt(squares - 1) + 1


def record_sums(table: Table, data: DataSpec, training: NDArray[np.bool_], scale: int) -> Sums:
    """The sums over the marked rows, in steps: how many rows there are; then for each column three, see `PER_COLUMN`.

    Guarantees:
        One row more or less changes them by a vector of whole numbers of norm `sensitivity` at most.

    Raises:
        SchemaRefused: a column is missing or holds arrays.
    """
    sums = np.zeros(1 + PER_COLUMN * len(data.numbers()), np.int64)
    sums[0] = int(training.sum()) * scale
    for place, feature in enumerate(data.numbers()):
        assert feature.range is not None, "checked by the spec"
        lowest, highest = feature.range
        values = number_column(table, feature, apart=True)[training]
        values = values[~np.isnan(values)]
        shares = np.clip((values - lowest) / (highest - lowest) * 2.0 - 1.0, -1.0, 1.0)
        first = 1 + PER_COLUMN * place
        sums[first] = len(values) * scale
        sums[first + 1] = np.rint(shares * scale).astype(np.int64).sum()
        sums[first + 2] = np.rint(shares * shares * scale).astype(np.int64).sum()
    return sums


def _statistics(sums: NDArray[np.float64], data: DataSpec, deviation: float) -> dict[str, NDArray[Any]]:
    """What the noised sums say, as records could have it. `deviation`: of the noise on each sum."""
    rows = max(1.0, float(np.rint(sums[0])))
    lowest, highest = np.array([feature.range for feature in data.numbers()], np.float64).T
    present, total, squares = sums[1:].reshape(-1, PER_COLUMN).T
    count = np.clip(np.rint(present), 1.0, rows)
    share = np.clip(total / count, -1.0, 1.0)
    most = 1.0 - share * share  # of the variance of values in -1..1 that have this mean
    spread = np.minimum(np.maximum(squares / count - share * share, deviation / count), most)
    half = (highest - lowest) / 2.0
    mean = np.clip(lowest + (share + 1.0) * half, lowest, highest)
    variance = spread * half * half
    variance[variance < LEAST_VARIANCE * np.maximum(1.0, np.abs(mean)) ** 2] = 0.0
    return {
        f"{STATISTICS_PREFIX}count": count,
        f"{STATISTICS_PREFIX}mean": mean,
        f"{STATISTICS_PREFIX}m2": count * variance,
        f"{STATISTICS_PREFIX}rows": np.array(rows),
    }
