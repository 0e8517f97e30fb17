"""What a statistics task tells of a dataset: counts, means and squared distances of its number columns."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.federation.statistics import moments
from isthmus.wire.data import DataSpec
from isthmus.wire.rounds import STATISTICS_PREFIX
from isthmus_worker.data import Table
from isthmus_worker.features import number_column
from isthmus_worker.refusals import DataRefused


def measure_columns(table: Table, data: DataSpec, training: NDArray[np.bool_]) -> dict[str, NDArray[Any]]:
    """The statistics tensors of the training rows, float64; rows held out are not looked at.

    Raises:
        DataRefused: a column does not hold what the job wants, or its numbers are too large to be squared.
    """
    rows = int(training.sum())
    values = np.empty((rows, len(data.numbers())), dtype=np.float64)
    for place, feature in enumerate(data.numbers()):
        values[:, place] = number_column(table, feature)[training]
    try:
        found = moments(values)
    except ValueError as error:
        raise DataRefused("A number column holds values too large to be measured.") from error
    return {
        f"{STATISTICS_PREFIX}count": found.count,
        f"{STATISTICS_PREFIX}mean": found.mean,
        f"{STATISTICS_PREFIX}m2": found.m2,
        f"{STATISTICS_PREFIX}rows": np.array(float(rows)),
    }
