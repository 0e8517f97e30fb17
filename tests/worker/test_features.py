"""From records to numbers, and which of them are held out."""

from typing import Any

import numpy as np
import pytest

from isthmus.wire.data import DataSpec, FeatureSpec, FeatureStatistics, Missing
from isthmus_worker.data import Cell, Table, fingerprint
from isthmus_worker.features import (
    Examples,
    encode_inputs,
    encode_targets,
    number_column,
    require_enough_rows,
    require_two_classes,
    usable_targets,
)
from isthmus_worker.measuring import measure_columns
from isthmus_worker.npz import fingerprints_of
from isthmus_worker.refusals import DataRefused, SchemaRefused
from isthmus_worker.splitting import held_out

KEY = b"k" * 32


def _table(**columns: list[Cell]) -> Table:
    rows = list(zip(*columns.values(), strict=True))
    return Table(columns=columns, fingerprints=[fingerprint(row) for row in rows])


def _data(*features: dict[str, Any], **changes: Any) -> DataSpec:
    plain = {"task": "classification", "features": features, "target": "y", "classes": 2, "standardize": "federated"}
    return DataSpec.model_validate({**plain, **changes})


def _statistics(**mean_and_variance: tuple[float, float]) -> FeatureStatistics:
    means, variances = zip(*mean_and_variance.values(), strict=True)
    count = [10.0] * len(means)
    return FeatureStatistics(
        names=list(mean_and_variance), count=count, mean=list(means), variance=list(variances), rows=10, sites=2
    )


def test_columns_follow_the_features_with_indicators_beside_their_own() -> None:
    data = _data(
        {"name": "age"},
        {"name": "chol", "missing": "indicate"},
        {"name": "kind", "categories": ["b", "a", "1"], "missing": "indicate"},
        {"name": "raw", "standardize": False, "missing": "impute"},
    )
    table = _table(age=["60", 40.0], chol=["250", None], kind=["a", None], raw=[None, "5"], y=[0, 1])

    inputs = encode_inputs(table, data, _statistics(age=(50, 100), chol=(200, 0), raw=(7, 4)))

    assert inputs.dtype == np.float32
    assert inputs.tolist() == [
        [1, 50, 0, 0, 1, 0, 0, 7],  # chol is constant over all sites: only centred
        [-1, 0, 1, 0, 0, 0, 1, 5],
    ]


def test_without_standardization_numbers_enter_as_they_are() -> None:
    data = _data({"name": "age"}, {"name": "code", "categories": ["0", "1"]}, standardize="none")

    inputs = encode_inputs(_table(age=["60"], code=[1.0], y=[0]), data, None)

    assert inputs.tolist() == [[60, 0, 1]]


@pytest.mark.parametrize(
    ("feature", "cells", "complaint"),
    [
        ({"name": "a"}, ["1", "secret"], "Column 'a' must hold numbers; some records"),
        ({"name": "a"}, ["1", None], "Column 'a' has missing values in some records"),
        ({"name": "a", "categories": ["x"]}, ["x", "secret"], "Column 'a' holds a category that the job does not list"),
        ({"name": "a", "categories": ["x"]}, ["x", None], "Column 'a' has missing values in some records"),
        ({"name": "b"}, ["1", "2"], "no column 'b'"),
    ],
)
def test_a_column_that_does_not_fit_is_named_without_a_value(
    feature: dict[str, Any], cells: list[Cell], complaint: str
) -> None:
    with pytest.raises(DataRefused, match=complaint) as refusal:
        encode_inputs(_table(a=cells, y=[0, 1]), _data(feature, standardize="none"), None)

    assert "secret" not in str(refusal.value)
    assert not any(digit in refusal.value.told(counts=False) for digit in "0123456789")


def test_how_many_records_are_concerned_stays_in_the_log_unless_counts_may_leave() -> None:
    refusal = DataRefused("Some records lack 'a'.", where="file:7", records=3)

    assert refusal.told(counts=False) == "Some records lack 'a'."
    assert refusal.told(counts=True) == "Some records lack 'a'. (records: 3)"
    assert refusal.where == "file:7; records: 3"


@pytest.mark.parametrize("variance", [1e-20, 0.0, 1.0])
def test_numbers_beyond_float32_saturate_so_that_no_refusal_tells_where_they_lie(variance: float) -> None:
    table = _table(a=["1", "1e300", "-1e308"], y=[0, 1, 0])

    inputs = encode_inputs(table, _data({"name": "a"}), _statistics(a=(1.0, variance)))

    largest = np.finfo(np.float32).max
    assert inputs[:, 0].tolist() == [0.0, largest, -largest]


@pytest.mark.parametrize(
    ("training", "holdout", "exact", "word"),
    [
        (10, 10, True, ""),
        (10, 0, True, ""),
        (10, 1, False, ""),
        (9, 20, False, "training"),
        (50, 9, True, "held-out"),
        (50, 1, True, "held-out"),
    ],
)
def test_no_share_leaves_single_records_in_a_part_of_which_numbers_leave(
    training: int, holdout: int, exact: bool, word: str
) -> None:
    if not word:
        require_enough_rows(training, holdout, 10, exact=exact)
        return
    with pytest.raises(DataRefused, match=f"min_rows: fewer {word}") as refusal:
        require_enough_rows(training, holdout, 10, exact=exact)

    assert not any(digit in refusal.value.told(counts=True) for digit in "0123456789")


def test_targets_are_whole_numbers_or_labels_in_their_order() -> None:
    whole, words = _data("a"), _data("a", classes=None, labels=["well", "ill"])  # type: ignore[arg-type]  # a bare name

    assert encode_targets(_table(y=["1", "0.0", 1]), whole).tolist() == [1, 0, 1]
    assert encode_targets(_table(y=["ill", "well"]), words).tolist() == [1, 0]
    regression = DataSpec.model_validate({"task": "regression", "features": ["a"], "target": "y"})
    numbers = encode_targets(_table(y=["1.5", "2"]), regression)
    assert (str(numbers.dtype), numbers.tolist()) == ("float32", [[1.5], [2.0]])


@pytest.mark.parametrize(
    ("cells", "complaint"),
    [(["2"], "0 to 1"), (["0.5"], "0 to 1"), (["secret"], "0 to 1"), ([None], "missing in some")],
)
def test_a_target_that_does_not_fit_is_named_without_a_value(cells: list[Cell], complaint: str) -> None:
    with pytest.raises(DataRefused, match=f"'y'.*{complaint}") as refusal:
        encode_targets(_table(y=cells), _data({"name": "a"}))

    assert "secret" not in str(refusal.value)


def test_one_class_only_cannot_be_trained_on() -> None:
    data = _data({"name": "a"})
    with pytest.raises(DataRefused, match="'y'"):
        require_two_classes(data, np.array([1, 1, 1]))

    require_two_classes(data, np.array([1, 0]))


def test_numbers_outside_of_a_features_range_are_its_nearer_end_and_missing_ones_stay_missing() -> None:
    feature = FeatureSpec(name="a", range=(0.0, 10.0), missing=Missing.INDICATE)

    found = number_column(_table(a=[-5.0, 3.0, None, 1e300, 10.0]), feature)

    assert np.array_equal(found, [0.0, 3.0, np.nan, 10.0, 10.0], equal_nan=True)


def test_statistics_are_those_of_the_training_rows_and_of_what_is_not_missing() -> None:
    data = _data({"name": "a", "missing": "impute"})
    table = _table(a=["1", "3", None, "1000"], y=[0, 1, 0, 1])

    found = measure_columns(table, data, np.array([True, True, True, False]))

    assert {name: array.tolist() for name, array in found.items()} == {
        "statistics/count": [2.0], "statistics/mean": [2.0], "statistics/m2": [2.0], "statistics/rows": 3.0,
    }  # fmt: skip
    assert all(array.dtype == np.float64 for array in found.values())


def test_number_columns_keep_double_precision() -> None:
    assert number_column(_table(a=["0.1"]), _data({"name": "a"}).features[0])[0] == 0.1


def _rows(number: int) -> tuple[list[bytes], np.ndarray[Any, np.dtype[np.int64]]]:
    return [fingerprint([index]) for index in range(number)], np.array(
        [index % 3 == 0 for index in range(number)], np.int64
    )


def test_of_each_label_the_given_share_is_held_out_rounded_down() -> None:
    fingerprints, labels = _rows(100)

    marks = held_out(labels, fingerprints, 0.29, KEY)

    assert [int(marks[labels == label].sum()) for label in (0, 1)] == [19, 9]  # 66 and 34 rows
    assert held_out(np.zeros(100, np.int64), fingerprints, 0.29, KEY).sum() == 29  # not 28, as floats would have it


def test_the_same_records_are_held_out_in_any_order_and_more_of_them_with_a_larger_share() -> None:
    fingerprints, labels = _rows(60)
    turned = np.random.default_rng(0).permutation(60)

    small, large = held_out(labels, fingerprints, 0.2, KEY), held_out(labels, fingerprints, 0.4, KEY)
    again = held_out(labels[turned], [fingerprints[row] for row in turned], 0.2, KEY)

    assert (small <= large).all()
    assert set(turned[again]) == set(np.flatnonzero(small))


def test_another_key_holds_out_other_rows() -> None:
    fingerprints, labels = _rows(60)

    assert (held_out(labels, fingerprints, 0.2, KEY) != held_out(labels, fingerprints, 0.2, b"x" * 32)).any()


def test_equal_records_are_held_out_one_by_one_and_small_labels_not_at_all() -> None:
    marks = held_out(np.array([0] * 10 + [1] * 4), [b"same"] * 14, 0.2, KEY)

    assert np.flatnonzero(marks).tolist() == [0, 1]


def test_nothing_is_held_out_with_a_share_of_zero() -> None:
    fingerprints, labels = _rows(5)

    assert not held_out(labels, fingerprints, 0.0, KEY).any()


# --- Columns that are arrays -----------------------------------------------------------------------------------------

IMAGES = np.arange(4 * 1 * 2 * 3, dtype=np.uint8).reshape(4, 1, 2, 3) * 10


def _arrays(**columns: Any) -> Table:
    return Table(columns=columns, fingerprints=fingerprints_of({name: np.asarray(of) for name, of in columns.items()}))


def _cells(**columns: Any) -> Table:
    return _table(**{name: np.asarray(of).tolist() for name, of in columns.items()})


def _told(values: Any) -> list[Cell]:
    """The values one by one; NaN stands for what is missing."""
    return [None if isinstance(cell, float) and np.isnan(cell) else cell for cell in values.tolist()]


def test_an_array_enters_row_by_row_and_divided_between_the_other_columns() -> None:
    image = {"name": "image", "shape": [1, 2, 3], "divide_by": 255}
    data = _data({"name": "age"}, image, {"name": "sex", "categories": ["F", "M"]})
    table = _arrays(image=IMAGES, age=np.array([50, 60, 40, 50]), sex=np.array(["M", "F", "F", "M"]), y=[0, 1, 0, 1])

    inputs = encode_inputs(table, data, _statistics(age=(50, 100)))

    assert inputs.dtype == np.float32
    assert inputs[:, 0].tolist() == [0, 1, -1, 0]  # standardized; the image is not
    assert (inputs[:, 1:7] == IMAGES.reshape(4, 6).astype(np.float32) / np.float32(255)).all()
    assert inputs[:, 7:].tolist() == [[0, 1], [1, 0], [1, 0], [0, 1]]
    assert data.input_shape == (9,)


@pytest.mark.parametrize("kind", ["u1", "i1", "u2", "i8", "f2", "f4", "f8", "?"])
def test_an_array_of_any_kind_of_numbers_is_read_and_not_changed(kind: str) -> None:
    values = np.random.default_rng(0).integers(0, 100, (70_000, 2)).astype(kind)  # more than one block of rows
    before = values.copy()

    inputs = encode_inputs(_arrays(x=values), _data({"name": "x", "shape": [2]}, standardize="none"), None)

    assert (inputs == values.astype(np.float32)).all()
    assert (values == before).all()


def test_an_array_beyond_float32_saturates() -> None:
    data = _data({"name": "x", "shape": [1], "divide_by": 1e-6}, standardize="none")

    inputs = encode_inputs(_arrays(x=np.array([[1e300], [-1e305], [1.0]])), data, None)

    largest = np.finfo(np.float32).max
    assert inputs[:, 0].tolist() == [largest, -largest, 1e6]


@pytest.mark.parametrize(
    ("feature", "column", "complaint"),
    [
        ({"name": "x", "shape": [3, 2]}, np.zeros((2, 2, 3)), r"'x' must hold one array of shape \[3, 2\] a record"),
        ({"name": "x", "shape": [6]}, np.zeros((2, 2, 3)), "'x' must hold one array"),
        ({"name": "x", "shape": [1]}, np.zeros(2), "'x' must hold one array"),
        ({"name": "x", "shape": [1]}, np.array([["4711"], ["b"]]), "'x' must hold one array"),
        ({"name": "x", "shape": [1]}, ["4711", "1"], "'x' must hold one array"),
        ({"name": "x", "shape": [1]}, np.array([[np.nan], [4711]]), "'x' holds NaN or an infinity in some records"),
        ({"name": "x", "shape": [1]}, np.array([[4711], [-np.inf]], np.float32), "'x' holds NaN or an infinity"),
        ({"name": "x"}, np.full((2, 3), 4711), "'x' must hold numbers"),
        ({"name": "x"}, np.array(["1", "4711x"]), "'x' must hold numbers"),
        ({"name": "x"}, np.array([1.0, np.inf]), "'x' must hold numbers"),
        ({"name": "x"}, np.array([4711.0, np.nan]), "'x' has missing values"),
        ({"name": "x", "categories": ["a"]}, np.full((2, 3), 4711), "'x' must hold categories; it holds arrays"),
        ({"name": "x", "categories": ["a"]}, np.array(["a", "4711"]), "'x' holds a category that the job does not"),
        ({"name": "x", "categories": ["1"]}, np.array([1.0, np.nan]), "'x' has missing values"),
    ],
)
def test_an_array_that_does_not_fit_is_named_without_a_value(
    feature: dict[str, Any], column: Any, complaint: str
) -> None:
    table = Table(columns={"x": column}, fingerprints=[b"1", b"2"])

    with pytest.raises(DataRefused, match=complaint) as refusal:
        encode_inputs(table, _data(feature, standardize="none"), None)

    assert "4711" not in str(refusal.value)


@pytest.mark.parametrize(
    "values",
    [
        np.array([3.5, np.nan, 1e300, -0.0]),
        np.array([1, 0, 1, 0], np.uint8),
        np.array([2**53 + 1, -5, 0, 7], np.int64),
        np.array([True, False, True, True]),
        np.array(["1", "2e1", " 3 ", "-4"]),
    ],
    ids=lambda values: str(values.dtype),
)
def test_a_vector_gives_the_same_numbers_as_its_values_one_by_one(values: Any) -> None:
    feature = _data({"name": "x", "missing": "impute"}).features[0]
    cells = _told(values)

    fast = number_column(Table(columns={"x": values}, fingerprints=[b""] * 4), feature)

    slow = number_column(Table(columns={"x": cells}, fingerprints=[b""] * 4), feature)
    assert np.array_equal(fast, slow, equal_nan=True)


@pytest.mark.parametrize(
    ("values", "categories"),
    [
        (np.array(["b", "a", "b"]), ["a", "b"]),
        (np.array([2, 10, 2]), ["10", "2"]),
        (np.array([2.0, 0.5, 2.0]), ["2", "0.5"]),
        (np.array([2.0, np.nan, 7.0]), ["2", "7"]),
    ],
)
def test_a_vector_gives_the_same_categories_as_its_values_one_by_one(values: Any, categories: list[str]) -> None:
    data = _data({"name": "x", "categories": categories, "missing": "indicate"}, standardize="none")
    cells = _told(values)

    fast = encode_inputs(Table(columns={"x": values}, fingerprints=[b""] * 3), data, None)

    assert (fast == encode_inputs(Table(columns={"x": cells}, fingerprints=[b""] * 3), data, None)).all()
    assert fast[:, :2].sum() == len([cell for cell in cells if cell is not None])


def test_targets_are_read_from_vectors_as_from_values_one_by_one() -> None:
    whole, words = _data({"name": "a"}, classes=3), _data({"name": "a"}, classes=None, labels=["well", "ill"])
    regression = DataSpec.model_validate({"task": "regression", "features": ["a"], "target": "y"})
    for data, targets in [
        (whole, np.array([2, 0, 1], np.uint8)), (whole, np.array([2.0, 0.0, 1.0])),
        (words, np.array(["ill", "well", "ill"])), (regression, np.array([1.5, -2.0, 0.0])),
    ]:  # fmt: skip
        found = encode_targets(_arrays(y=targets), data)
        assert found.tolist() == encode_targets(_cells(y=targets), data).tolist()
        assert found.dtype == (np.float32 if data is regression else np.int64)


@pytest.mark.parametrize(
    ("targets", "complaint"),
    [
        (np.array([0, 3]), "a whole number from 0 to 2"),
        (np.array([0, -1]), "a whole number from 0 to 2"),
        (np.array([0, 0.5]), "a whole number from 0 to 2"),
        (np.array([0, 2**63], np.uint64), "a whole number from 0 to 2"),
        (np.array([0, np.inf]), "a whole number from 0 to 2"),
        (np.array([0, np.nan]), "is missing in some records"),
        (np.zeros((2, 3)), "a whole number from 0 to 2"),
    ],
)
def test_a_vector_of_targets_that_does_not_fit_is_named_without_a_value(targets: Any, complaint: str) -> None:
    with pytest.raises(DataRefused, match=complaint):
        encode_targets(Table(columns={"y": targets}, fingerprints=[b"1", b"2"]), _data({"name": "a"}, classes=3))


def test_only_numbers_are_measured_beside_arrays() -> None:
    data = _data({"name": "image", "shape": [1, 2, 3]}, {"name": "age"})
    table = _arrays(image=IMAGES, age=np.array([50.0, np.nan, 40.0, 60.0]), y=np.array([0, 1, 0, 1]))
    unfit = _data({"name": "image", "shape": [1, 2, 3]}, {"name": "age", "missing": "impute"})

    found = measure_columns(table, unfit, np.array([True, True, True, False]))

    assert {name: array.tolist() for name, array in found.items()} == {
        "statistics/count": [2.0], "statistics/mean": [45.0], "statistics/m2": [50.0], "statistics/rows": 3.0,
    }  # fmt: skip
    with pytest.raises(DataRefused, match="'age' has missing values"):
        measure_columns(table, data, np.ones(4, np.bool_))


def test_a_table_of_some_records_is_what_was_taken_of_cells_and_arrays_alike() -> None:
    table = Table(
        columns={"image": IMAGES, "age": ["1", None, "3", "4"]},
        fingerprints=[b"a", b"b", b"c", b"d"],
    )

    part = table.only(np.array([3, 1, 1]))

    assert part.rows == 3
    assert (np.asarray(part.columns["image"]) == IMAGES[[3, 1, 1]]).all()
    assert part.columns["age"] == ["4", None, None]
    assert part.fingerprints == [b"d", b"b", b"b"]
    assert np.asarray(part.columns["image"]).base is None or not np.shares_memory(part.columns["image"], IMAGES)
    with pytest.raises(IndexError):
        table.only(np.array([4]))
    assert table.only(np.array([], np.int64)).rows == 0


def test_all_rows_of_examples_are_not_copied_and_some_are() -> None:
    examples = Examples(inputs=np.ones((3, 2), np.float32), targets=np.zeros(3, np.int64))

    assert examples.only(np.ones(3, np.bool_)) is examples
    assert len(examples.only(np.array([True, False, True]))) == 2


@pytest.mark.parametrize(
    ("feature", "cells", "wanted"),
    [
        ({"name": "a", "categories": ["x", "z"]}, ["x", "secret", None, "z"], [[1, 0], [0, 0], [0, 0], [0, 1]]),
        ({"name": "a", "categories": ["x"], "missing": "indicate"}, ["x", "secret"], [[1, 0], [0, 1]]),
        ({"name": "a"}, ["60", "secret", None, "inf"], [[1], [0], [0], [0]]),
        ({"name": "a", "standardize": False}, ["60", "secret", None], [[60], [50], [50]]),
        ({"name": "a", "range": [0, 55]}, ["60", None], [[0.5], [0]]),
    ],
)
def test_a_record_that_is_read_apart_is_never_refused(feature: dict[str, Any], cells: list[Cell], wanted: Any) -> None:
    statistics = None if "categories" in feature else _statistics(a=(50, 100))
    data = _data(feature, **({} if statistics else {"standardize": "none"}))
    table = _table(a=cells, y=[0] * len(cells))

    together = encode_inputs(table, data, statistics, apart=True)

    assert together.tolist() == wanted
    for row, alone in enumerate(wanted):
        one = table.only(np.array([row]))
        assert encode_inputs(one, data, statistics, apart=True).tolist() == [alone]


def test_without_statistics_a_missing_number_is_the_middle_of_its_range_or_zero() -> None:
    data = _data({"name": "a", "range": [10, 30]}, {"name": "b"}, standardize="none")
    inputs = encode_inputs(_table(a=[None, "x", 12], b=["", None, 5], y=[0, 1, 0]), data, None, apart=True)
    assert inputs.tolist() == [[20, 0], [20, 0], [12, 5]]


def test_elements_of_arrays_that_are_not_finite_are_zero_apart_and_the_records_stay_as_they_are() -> None:
    values = np.array([[1.0, np.nan], [-np.inf, 2.0], [3.0, 4.0]])
    data = _data({"name": "x", "shape": [2], "divide_by": 2}, standardize="none")
    assert encode_inputs(_arrays(x=values), data, None, apart=True).tolist() == [[0.5, 0], [0, 1], [1.5, 2]]
    assert np.isnan(values[0, 1])


@pytest.mark.parametrize(
    ("column", "feature"),
    [
        (np.zeros((2, 3)), {"name": "x"}),
        (np.zeros((2, 3)), {"name": "x", "categories": ["0"]}),
        (["1", "2"], {"name": "x", "shape": [1]}),
        (["1", "2"], {"name": "other"}),
    ],
)
def test_what_the_columns_are_is_refused_apart_too(column: Any, feature: dict[str, Any]) -> None:
    table = Table(columns={"x": column}, fingerprints=[b"1", b"2"])
    with pytest.raises(SchemaRefused):
        encode_inputs(table, _data(feature, standardize="none"), None, apart=True)


def test_targets_are_usable_record_by_record_where_they_can_be_encoded() -> None:
    whole = _data({"name": "a"}, classes=2)
    words = _data({"name": "a"}, classes=None, labels=["well", "ill"])
    number = _data({"name": "a"}, task="regression", classes=None)
    for data, cells, wanted in (
        (whole, ["1", None, "2", "0.5", "x", 0], [1, 0, 0, 0, 0, 1]),
        (words, ["ill", None, "dead", "well"], [1, 0, 0, 1]),
        (number, ["1.5", None, "x", "1e300", "inf", "-2"], [1, 0, 0, 0, 0, 1]),
    ):
        table = _table(y=list[Cell](cells))
        usable = usable_targets(table, data)
        assert usable.tolist() == [bool(one) for one in wanted]
        encode_targets(table.only(np.flatnonzero(usable)), data)
        for row in np.flatnonzero(~usable):
            with pytest.raises(DataRefused):
                encode_targets(table.only(np.array([row])), data)
    with pytest.raises(SchemaRefused):
        usable_targets(_arrays(y=np.zeros((2, 3))), whole)
