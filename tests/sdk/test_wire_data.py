"""What a job asks of the data: whether a dataset fits, and what its columns become."""

from typing import Any

import pytest

from isthmus.wire.data import ColumnKind, ColumnSchema, DatasetSchema, DataSpec, FeatureSpec, misfits

NUMBER, CATEGORY, TENSOR = ColumnKind.NUMBER, ColumnKind.CATEGORY, ColumnKind.TENSOR
IMAGE = {"name": "image", "shape": [1, 28, 28], "divide_by": 255}
FITTING = {
    "age": ColumnSchema(name="age", kind=NUMBER),
    "chol": ColumnSchema(name="chol", kind=NUMBER, missing=True),
    "sex": ColumnSchema(name="sex", kind=CATEGORY),
    "stage": ColumnSchema(name="stage", kind=CATEGORY, missing=True),
    "disease": ColumnSchema(name="disease", kind=NUMBER),
    "notes": ColumnSchema(name="notes", kind=CATEGORY, missing=True),
}
WORDS = {"classes": None, "labels": ["no", "yes"]}


def data_spec(**changes: Any) -> DataSpec:
    """Numbers and categories, with and without leave to be missing."""
    spec: dict[str, Any] = {
        "task": "classification",
        "features": [
            "age",
            {"name": "chol", "missing": "impute"},
            {"name": "sex", "categories": ["Female", "Male"]},
            {"name": "stage", "categories": ["I", "II", "III"], "missing": "indicate"},
        ],
        "target": "disease",
        "classes": 2,
        "standardize": "federated",
    }
    return DataSpec.model_validate({**spec, **changes})


def schema(without: str | None = None, **changes: ColumnSchema) -> DatasetSchema:
    """A dataset that fits `data_spec`, and a column that no job asks for; with changes, or without one column."""
    columns = {**FITTING, **changes}
    return DatasetSchema(columns=tuple(column for name, column in columns.items() if name != without))


def column(
    name: str, kind: ColumnKind, *, missing: bool = False, shape: tuple[int, ...] | None = None
) -> dict[str, ColumnSchema]:
    """One column, as a change."""
    return {name: ColumnSchema(name=name, kind=kind, missing=missing, shape=shape)}


FITS = {
    "as-asked": (data_spec(), schema()),
    "words-with-labels": (data_spec(**WORDS), schema(**column("disease", CATEGORY))),
    "numbers-with-labels": (data_spec(**WORDS), schema()),
    "numbers-as-categories": (data_spec(), schema(**column("sex", NUMBER))),
    "nothing-missing-where-it-might": (data_spec(), schema(**column("chol", NUMBER))),
    "another-column-misfits": (data_spec(features=["age"]), schema(**column("sex", NUMBER, missing=True))),
    "images": (data_spec(features=["age", IMAGE]), schema(**column("image", TENSOR, shape=(1, 28, 28)))),
}


@pytest.mark.parametrize(("data", "held"), FITS.values(), ids=FITS)
def test_of_a_dataset_that_fits_there_is_nothing_to_say(data: DataSpec, held: DatasetSchema) -> None:
    assert misfits(data, held) == []


MISFITS = {
    "no-column": (data_spec(), schema(without="age"), "It has no column 'age'."),
    "no-category-column": (data_spec(), schema(without="stage"), "It has no column 'stage'."),
    "words-for-numbers": (data_spec(), schema(**column("age", CATEGORY)), "Column 'age' holds words"),
    "words-with-gaps-for-numbers": (data_spec(), schema(**column("chol", CATEGORY, missing=True)), "'chol' holds"),
    "numbers-missing": (data_spec(), schema(**column("age", NUMBER, missing=True)), "Column 'age' has missing values"),
    "category-missing": (data_spec(), schema(**column("sex", CATEGORY, missing=True)), "'sex' has missing values"),
    "arrays-for-numbers": (
        data_spec(), schema(**column("age", TENSOR, shape=(2, 3))),
        "Column 'age' holds arrays of shape [2, 3]; the job wants numbers."
    ),
    "arrays-for-categories": (
        data_spec(), schema(**column("sex", TENSOR, shape=(2,))),
        "Column 'sex' holds arrays of shape [2]; the job wants categories."
    ),
    "numbers-for-arrays": (
        data_spec(features=[IMAGE]), schema(**column("image", NUMBER)),
        "Column 'image' holds numbers; the job wants arrays of shape [1, 28, 28]."
    ),
    "words-with-gaps-for-arrays": (
        data_spec(features=[IMAGE]), schema(**column("image", CATEGORY, missing=True)),
        "Column 'image' holds words; the job wants arrays"
    ),
    "arrays-of-another-shape": (
        data_spec(features=[IMAGE]), schema(**column("image", TENSOR, shape=(3, 32, 32))),
        "Column 'image' holds arrays of shape [3, 32, 32]; the job wants arrays of shape [1, 28, 28]."
    ),
    "target-of-arrays": (
        data_spec(), schema(**column("disease", TENSOR, shape=(2,))),
        "The target 'disease' holds arrays of shape [2]; a target is a number or a word."
    ),
    "no-target": (data_spec(), schema(without="disease"), "It has no column 'disease' (the target)."),
    "target-missing": (
        data_spec(), schema(**column("disease", NUMBER, missing=True)), "The target 'disease' has missing values."
    ),
    "labelled-target-missing": (
        data_spec(**WORDS), schema(**column("disease", CATEGORY, missing=True)), "'disease' has missing values."
    ),
    "target-of-words": (
        data_spec(), schema(**column("disease", CATEGORY)), "The target 'disease' holds words; the job lists no labels."
    ),
    "regression-on-words": (
        data_spec(task="regression", classes=None), schema(**column("disease", CATEGORY)), "'disease' holds words"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("data", "held", "words"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_is_one_sentence_that_names_the_column(
    data: DataSpec, held: DatasetSchema, words: str
) -> None:
    found = misfits(data, held)

    assert len(found) == 1
    assert words in found[0]


def test_every_column_that_does_not_fit_is_named_the_target_last() -> None:
    held = schema(**column("age", CATEGORY), **column("disease", CATEGORY), without="sex")

    found = misfits(data_spec(), held)

    assert [words in sentence for words, sentence in zip(("'age'", "'sex'", "'disease'"), found, strict=True)] == [
        True, True, True,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("feature", "width"),
    [
        ({"name": "x"}, 1),
        ({"name": "x", "missing": "impute"}, 1),
        ({"name": "x", "missing": "indicate"}, 2),
        ({"name": "x", "categories": ["a"]}, 1),
        ({"name": "x", "categories": ["a", "b", "c"]}, 3),
        ({"name": "x", "categories": ["a", "b", "c"], "missing": "impute"}, 3),
        ({"name": "x", "categories": ["a", "b", "c"], "missing": "indicate"}, 4),
        (IMAGE, 784),
    ],
)
def test_a_column_becomes_one_input_or_one_a_category_and_one_more_where_its_gaps_are_told(
    feature: dict[str, Any], width: int
) -> None:
    assert FeatureSpec.model_validate(feature).width == width


def test_a_record_is_as_wide_as_its_columns_together() -> None:
    data = data_spec()

    assert data.width == 1 + 1 + 2 + (3 + 1)
    assert data.input_shape == (8,)
    assert data_spec(shape=[2, 4]).input_shape == (2, 4)
    assert [feature.name for feature in data.numbers()] == ["age", "chol"]
    assert data.columns() == ["age", "chol", "sex", "stage", "disease"]


def test_a_shape_that_the_inputs_do_not_fill_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`shape` \[3, 3\] holds 9 inputs, the features give 8"):
        data_spec(shape=[3, 3])


@pytest.mark.parametrize(
    ("changes", "outputs"),
    [
        ({"classes": 7}, 7),
        ({"classes": None, "labels": ["a", "b", "c"]}, 3),
        ({"task": "regression", "classes": None}, 1),
    ],
)
def test_a_model_has_an_output_a_class_or_one_number(changes: dict[str, Any], outputs: int) -> None:
    assert data_spec(**changes).outputs == outputs


def test_an_array_is_no_number_and_gives_its_shape_to_the_record_where_it_is_alone() -> None:
    alone, beside = data_spec(features=[IMAGE], standardize="none"), data_spec(features=["age", IMAGE])

    assert alone.input_shape == (1, 28, 28)
    assert data_spec(features=[IMAGE], shape=[784]).input_shape == (784,)
    assert beside.input_shape == (785,)
    assert [feature.name for feature in beside.numbers()] == ["age"]
    assert alone.numbers() == []


@pytest.mark.parametrize(
    ("feature", "complaint"),
    [
        ({**IMAGE, "categories": ["a"]}, "'image' has both `shape` and `categories`"),
        ({**IMAGE, "missing": "impute"}, "'image' has a `shape`: an array is never missing"),
        ({"name": "age", "divide_by": 255}, "'age' has no `shape`: `divide_by` is for arrays"),
        ({**IMAGE, "divide_by": 0}, "divide_by"),
        ({**IMAGE, "divide_by": float("nan")}, "divide_by"),
        ({**IMAGE, "shape": []}, "shape"),
        ({**IMAGE, "shape": [1, 0]}, "shape"),
        ({**IMAGE, "shape": [1, 1, 1, 1, 1]}, "shape"),
        ({**IMAGE, "shape": [4096, 4097]}, "holds more than 16777216 elements"),
    ],
)
def test_an_array_that_makes_no_sense_is_refused(feature: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        data_spec(features=[feature])


@pytest.mark.parametrize(
    ("told", "complaint"),
    [
        ({"kind": "tensor"}, "has a `shape`, and no other has"),
        ({"kind": "number", "shape": [2]}, "has a `shape`, and no other has"),
        ({"kind": "tensor", "shape": [2], "missing": True}, "never missing"),
        ({"kind": "tensor", "shape": [4096, 4097]}, "more than 16777216 elements"),
    ],
)
def test_a_column_of_arrays_is_announced_with_its_shape_and_only_such_a_column(
    told: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        ColumnSchema.model_validate({"name": "x", **told})
