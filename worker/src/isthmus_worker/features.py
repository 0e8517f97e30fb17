"""From records to numbers: what a job's data section asks for, as the arrays that a model reads.

Every refusal names the column, and never a value: its text goes to the service. How many records are concerned stays in
the log, see `isthmus_worker.refusals`.

Under privacy of records a refusal would tell of single ones, so each is read `apart`: what becomes of it is a function
of that record alone, and nothing that it holds is refused.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from isthmus.wire.data import DataSpec, FeatureSpec, FeatureStatistics, Missing
from isthmus_worker.data import Cell, Column, Table, parse_number
from isthmus_worker.refusals import DataRefused, SchemaRefused

_NUMBERS: Final = "biuf"
"""The kinds of NumPy's types that are numbers."""
_NARROW: Final = frozenset(map(np.dtype, ("?", "u1", "i1", "u2", "i2", "f2")))
"""Every value of these is one of float32 too, and none comes near its limit when it is divided."""
_ELEMENTS_AT_ONCE: Final = 1 << 16
"""So many elements of a column of arrays are encoded at once: they stay in the processor's cache."""


@dataclass(frozen=True)
class Examples:
    """Records as a model reads them, in the order of the table."""

    inputs: NDArray[np.float32]
    """[rows, width]"""
    targets: NDArray[Any]
    """Classification: int64 [rows], 0 to classes - 1. Regression: float32 [rows, 1]."""

    def __len__(self) -> int:
        return len(self.inputs)

    def only(self, marks: NDArray[np.bool_]) -> "Examples":
        """The marked rows; all of them without a copy."""
        if marks.all():
            return self
        return Examples(inputs=self.inputs[marks], targets=self.targets[marks])


def encode_inputs(
    table: Table, data: DataSpec, statistics: FeatureStatistics | None, *, apart: bool = False
) -> NDArray[np.float32]:
    """The input matrix [rows, data.width].

    Columns follow the features as listed. A number is one column, (value - mean) / standard deviation of the whole
    federation; only centred where the deviation is 0, and as it is with `standardize: none` or its own
    `standardize: false`. Categories are one column each, in the order listed. With `missing: indicate` one more
    column follows directly after the feature's own, 1 where the value was missing. A missing number becomes the
    federation's mean, a missing category zeros. A number beyond float32 becomes the largest there is: a refusal would
    tell whoever chooses mean and variance where the largest value lies. An array enters row by row, divided by the
    feature's `divide_by`.

    With `apart` what cannot be read counts as missing, and what is missing is never refused: a number becomes the
    federation's mean, or without one the middle of its range, or 0; a category zeros; an element of an array 0.

    Raises:
        SchemaRefused: a column is missing, or is of another kind or shape than the job says.
        DataRefused: a column holds something else than the job says, or a value is missing or is no listed category
            where the job refuses that; not with `apart`.
    """
    inputs = np.zeros((table.rows, data.width), dtype=np.float32)
    known = _by_name(data, statistics)
    place = 0
    for feature in data.features:
        own = feature.width - (1 if feature.missing is Missing.INDICATE else 0)
        if feature.shape is not None:
            _fill_arrays(inputs[:, place : place + own], table, feature, feature.shape, apart=apart)
            place += own
            continue
        if feature.categories is None:
            values = number_column(table, feature, apart=apart)
            absent = np.isnan(values)
            inputs[:, place] = _saturated(_standardized(values, absent, feature, known.get(feature.name)))
        else:
            positions = _category_positions(table, feature, feature.categories, apart=apart)
            absent = positions < 0
            rows = np.flatnonzero(~absent)
            inputs[rows, place + positions[rows]] = 1.0
        if feature.missing is Missing.INDICATE:
            inputs[:, place + own] = absent
        place += feature.width
    return inputs


def number_column(table: Table, feature: FeatureSpec, *, apart: bool = False) -> NDArray[np.float64]:
    """A column of numbers, NaN where the value is missing; those outside of the feature's range are its nearer end.

    With `apart` words are missing too, and what is missing is not refused.

    Raises:
        SchemaRefused: there is no such column, or it holds arrays.
        DataRefused: it holds words, or values are missing and the job refuses that; not with `apart`.
    """
    column = _column(table, feature.name)
    _require_single(column, f"Column {feature.name!r} must hold numbers")
    values, absent = _numbers(column)
    words = int(np.isnan(values).sum()) - absent
    if words and not apart:
        raise DataRefused(
            f"Column {feature.name!r} must hold numbers; some records have something else there.", records=words
        )
    if absent and feature.missing is Missing.REFUSE and not apart:
        raise _missing(feature, absent)
    return values if feature.range is None else np.clip(values, *feature.range)


def usable_targets(table: Table, data: DataSpec) -> NDArray[np.bool_]:
    """Marks the records whose target `encode_targets` takes, each by itself.

    Raises:
        SchemaRefused: there is no such column, or it holds arrays.
    """
    column = _column(table, data.target)
    _require_single(column, f"The target {data.target!r} must hold one value a record")
    if data.labels is not None:
        return _positions(column, data.labels)[0] >= 0
    values, _absent = _numbers(column)
    return np.isfinite(_narrow(values)) if data.task == "regression" else _whole(values, data.outputs)


def encode_targets(table: Table, data: DataSpec) -> NDArray[Any]:
    """What is to be predicted, see `Examples.targets`.

    Raises:
        DataRefused: the column is missing, or some records hold nothing or something else than the job lists there.
    """
    column = _column(table, data.target)
    values, absent = _numbers(column) if data.labels is None else _positions(column, data.labels)
    if absent:
        raise DataRefused(f"The target {data.target!r} is missing in some records.", records=absent)
    if data.task == "regression":
        if words := int(np.isnan(values).sum()):
            raise DataRefused(
                f"The target {data.target!r} must hold numbers; some records have something else there.", records=words
            )
        narrow = _narrow(values)
        if not np.isfinite(narrow).all():
            raise DataRefused(f"The target {data.target!r} holds numbers too large for float32.")
        return narrow.reshape(-1, 1)
    if data.labels is not None:
        classes, expected = values.astype(np.int64), "one of the job's labels"
    else:
        classes = np.where(_whole(values, data.outputs), values, -1).astype(np.int64)
        expected = f"a whole number from 0 to {data.outputs - 1}"
    if other := int((classes < 0).sum()):
        raise DataRefused(
            f"The target {data.target!r} must hold {expected}; some records have something else there.", records=other
        )
    return classes


def strata(data: DataSpec, targets: NDArray[Any]) -> NDArray[np.int64]:
    """The label of each row as far as holding out goes: the class, or one and the same for regression."""
    if data.task == "regression":
        return np.zeros(len(targets), dtype=np.int64)
    return np.asarray(targets, dtype=np.int64)


def require_rows(table: Table) -> None:
    """Refuse a dataset without records."""
    if table.rows == 0:
        raise DataRefused("The dataset has no records.")


def require_enough_rows(training: int, holdout: int, fewest: int, *, exact: bool) -> None:
    """Refuse a share that would leave single records in one of the parts.

    Args:
        training: records that are trained on or measured; under privacy of records as they were declared.
        holdout: records that are held out; none at all is allowed.
        fewest: the policy's `min_rows`.
        exact: whether numbers about the parts leave as they are.

    Raises:
        SchemaRefused: too few. The text holds none of the numbers.
    """
    if training < fewest:
        raise SchemaRefused(
            "min_rows: fewer training records than this worker's policy asks for.",
            where=f"training records: {training}",
        )
    if exact and 0 < holdout < fewest:
        raise SchemaRefused(
            "min_rows: fewer held-out records than this worker's policy asks for where exact numbers leave.",
            where=f"held-out records: {holdout}",
        )


def require_two_classes(data: DataSpec, targets: NDArray[Any]) -> None:
    """Refuse to train a classifier where all records have the same target: it could only learn that answer."""
    if data.task == "classification" and len(np.unique(targets)) < 2:
        raise DataRefused(f"All records have the same target {data.target!r}: there is nothing to tell apart.")


def text_of(cell: Cell) -> str:
    """A cell as a category is written in a job: whole numbers without a point."""
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return str(cell)


def _column(table: Table, name: str) -> Column:
    try:
        return table.columns[name]
    except KeyError:
        raise SchemaRefused(f"The dataset has no column {name!r}.") from None


def _require_single(column: Column, what: str) -> None:
    if isinstance(column, np.ndarray) and column.ndim != 1:
        raise SchemaRefused(f"{what}; it holds arrays.")


def _narrow(values: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def _whole(values: NDArray[Any], classes: int) -> NDArray[np.bool_]:
    marks: NDArray[np.bool_] = (values >= 0) & (values < classes) & (values == np.floor(values))  # NaN is none of that
    return marks


def _number_or_nan(cell: Cell) -> float:
    number = parse_number(cell)
    return float("nan") if number is None else number


def _numbers(column: Column) -> tuple[NDArray[np.float64], int]:
    """The numbers of a column, NaN where a value is missing or no finite number; and how many are missing."""
    if isinstance(column, np.ndarray) and column.ndim != 1:
        return np.full(len(column), np.nan), 0
    if isinstance(column, np.ndarray) and column.dtype.kind in _NUMBERS:
        values = column.astype(np.float64)
        absent = int(np.isnan(values).sum())
        values[np.isinf(values)] = np.nan
        return values, absent
    cells = cells_of(column)
    return np.array([_number_or_nan(cell) for cell in cells], dtype=np.float64), sum(cell is None for cell in cells)


def _positions(column: Column, categories: tuple[str, ...]) -> tuple[NDArray[np.int64], int]:
    """For each row the place of its category, -1 where it is missing, -2 where it is none; and how many are missing."""
    places = {category: place for place, category in enumerate(categories)}

    def place_of(cell: Cell) -> int:
        return -1 if cell is None else places.get(text_of(cell), -2)

    if isinstance(column, np.ndarray) and column.ndim != 1:
        return np.full(len(column), -2, dtype=np.int64), 0
    if isinstance(column, np.ndarray) and column.dtype.kind in f"{_NUMBERS}U":
        different, where = np.unique(column, return_inverse=True)
        positions = np.array([place_of(cell) for cell in cells_of(different)], dtype=np.int64)[where]
    else:
        positions = np.array([place_of(cell) for cell in cells_of(column)], dtype=np.int64)
    return positions, int((positions == -1).sum())


def cells_of(column: Column) -> Sequence[Cell]:
    """The values one by one; None where a vector of floats has NaN."""
    if not isinstance(column, np.ndarray):
        return column
    return [None if isinstance(cell, float) and math.isnan(cell) else cell for cell in column.tolist()]


def _fill_arrays(
    inputs: NDArray[np.float32], table: Table, feature: FeatureSpec, shape: tuple[int, ...], *, apart: bool
) -> None:
    """Write a column of arrays into its place [rows, elements], a block of rows at a time."""
    column = _column(table, feature.name)
    if not isinstance(column, np.ndarray) or column.dtype.kind not in _NUMBERS or column.shape[1:] != shape:
        raise SchemaRefused(
            f"Column {feature.name!r} must hold one array of shape {list(shape)} a record; it holds something else."
        )
    flat = column.reshape(len(column), -1)
    divide_by = feature.divide_by or 1.0
    rows, unfit = max(1, _ELEMENTS_AT_ONCE // flat.shape[1]), 0
    for start in range(0, len(flat), rows):
        block = flat[start : start + rows]
        if block.dtype.kind == "f" and not (finite := np.isfinite(block)).all():
            unfit += int((~finite.all(axis=1)).sum())
            block = np.where(finite, block, block.dtype.type(0))
        if block.dtype in _NARROW:
            np.divide(block, divide_by, out=inputs[start : start + rows], dtype=np.float32)
        else:
            with np.errstate(over="ignore"):
                inputs[start : start + rows] = _saturated(np.divide(block, divide_by, dtype=np.float64))
    if unfit and not apart:
        raise DataRefused(f"Column {feature.name!r} holds NaN or an infinity in some records.", records=unfit)


def _category_positions(
    table: Table, feature: FeatureSpec, categories: tuple[str, ...], *, apart: bool
) -> NDArray[np.int64]:
    """For each row, the place of its category among those listed; below 0 where there is none."""
    column = _column(table, feature.name)
    _require_single(column, f"Column {feature.name!r} must hold categories")
    positions, absent = _positions(column, categories)
    if apart:
        return positions
    if unknown := int((positions == -2).sum()):
        raise DataRefused(
            f"Column {feature.name!r} holds a category that the job does not list, in some records.", records=unknown
        )
    if absent and feature.missing is Missing.REFUSE:
        raise _missing(feature, absent)
    return positions


def _missing(feature: FeatureSpec, absent: int) -> DataRefused:
    return DataRefused(
        f"Column {feature.name!r} has missing values in some records; the job refuses them.", records=absent
    )


def _by_name(data: DataSpec, statistics: FeatureStatistics | None) -> dict[str, tuple[float, float]]:
    """Column -> (mean, standard deviation), empty with `standardize: none`."""
    if data.standardize == "none":
        return {}
    names = [feature.name for feature in data.numbers()]
    if statistics is None or statistics.names != names:
        raise DataRefused("The federation's statistics are not those of the job's number columns.")
    deviations = np.sqrt(np.asarray(statistics.variance, dtype=np.float64))
    return {name: (mean, float(std)) for name, mean, std in zip(names, statistics.mean, deviations, strict=True)}


def _standardized(
    values: NDArray[np.float64], absent: NDArray[np.bool_], feature: FeatureSpec, known: tuple[float, float] | None
) -> NDArray[np.float64]:
    if known is None:
        return np.where(absent, sum(feature.range) / 2 if feature.range is not None else 0.0, values)
    mean, deviation = known
    filled = np.where(absent, mean, values)
    if not feature.standardize:
        return filled
    with np.errstate(over="ignore"):
        centred = filled - mean
        return centred / deviation if deviation > 0 else centred


def _saturated(values: NDArray[np.float64]) -> NDArray[np.float32]:
    limit = float(np.finfo(np.float32).max)
    narrow: NDArray[np.float32] = np.clip(values, -limit, limit).astype(np.float32)
    return narrow
