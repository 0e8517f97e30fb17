"""What a job asks of the data: which columns, how missing values are met, and what goes into the model."""

import math
from enum import StrEnum
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from isthmus.wire.base import Digest, Finite, Name, Request, Response

MAX_FEATURES: Final = 10_000
MAX_TENSOR_ELEMENTS: Final = 2**24
"""Most numbers that one record holds in one column: an image of 3 x 2048 x 2048 fits."""

LARGEST_RANGE: Final = 1e15

Column = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]
RecordShape = Annotated[
    tuple[Annotated[int, Field(ge=1, le=MAX_TENSOR_ELEMENTS)], ...], Field(min_length=1, max_length=4)
]
"""The shape of one record, without the batch: `[3, 32, 32]` is an image of 3 channels."""
DatasetReference = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_.-]{1,63}/[a-z0-9_.-]{1,63}$")]
"""A dataset by name: `organization/dataset`."""


class Missing(StrEnum):
    """What happens where a value is missing."""

    REFUSE = "refuse"  # the dataset does not fit the job; the message names the column
    IMPUTE = "impute"  # a number becomes the mean over all sites, a category none of those listed
    INDICATE = "indicate"  # the same, and one more input tells that the value was missing


class FeatureSpec(Request):
    """One column that the model reads.

    With `categories` it is one-hot encoded in their order; with `shape` every record holds an array of that shape
    there, such as an image, which enters row by row; else it is a number.
    """

    name: Column
    categories: tuple[str, ...] | None = Field(default=None, min_length=1, max_length=10_000)
    missing: Missing = Missing.REFUSE
    standardize: bool = True
    """False: a number enters as it is (a mean imputed for it is still the federation's). Only numbers are
    standardized: categories and arrays never are."""
    range: tuple[Finite, Finite] | None = None
    """Numbers outside are taken for the nearer end. Whoever standardizes under privacy of records needs it: noise can
    only cover what is bounded. Write what is known of the quantity, never what was seen in the data."""
    shape: RecordShape | None = None
    """The column holds one array of this shape a record. It is never missing."""
    divide_by: Annotated[Finite, Field(ge=1e-6, le=1e12)] | None = None
    """What every element of an array is divided by: 255 takes the bytes of an image to 0 ... 1; None: as it is."""

    @model_validator(mode="after")
    def _parts_fit_together(self) -> "FeatureSpec":
        if self.categories is not None and len(set(self.categories)) != len(self.categories):
            raise ValueError(f"the categories of {self.name!r} are not all different")
        if self.range is not None:
            if self.categories is not None or self.shape is not None:
                raise ValueError(f"{self.name!r} is no number: `range` is for numbers")
            if not self.range[0] < self.range[1] or self.range[1] - self.range[0] > LARGEST_RANGE:
                raise ValueError(f"the range of {self.name!r} is [lowest, highest], with lowest below highest")
        if self.shape is None:
            if self.divide_by is not None:
                raise ValueError(f"{self.name!r} has no `shape`: `divide_by` is for arrays")
            return self
        if self.categories is not None:
            raise ValueError(f"{self.name!r} has both `shape` and `categories`: an array holds numbers")
        if self.missing is not Missing.REFUSE:
            raise ValueError(f"{self.name!r} has a `shape`: an array is never missing, leave `missing` out")
        if math.prod(self.shape) > MAX_TENSOR_ELEMENTS:
            raise ValueError(f"the shape of {self.name!r} holds more than {MAX_TENSOR_ELEMENTS} elements")
        return self

    @property
    def width(self) -> int:
        """Number of model inputs that this column becomes."""
        if self.shape is not None:
            return math.prod(self.shape)
        own = 1 if self.categories is None else len(self.categories)
        return own + (1 if self.missing is Missing.INDICATE else 0)


def _feature(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class DataSpec(Request):
    """The data requirement of a job. `features` takes bare column names for plain numbers."""

    task: Literal["classification", "regression"]
    features: tuple[Annotated[FeatureSpec, BeforeValidator(_feature)], ...] = Field(
        min_length=1, max_length=MAX_FEATURES
    )
    target: Column
    classes: int | None = Field(default=None, ge=2, le=100_000)
    """Classification: the target holds whole numbers 0 to classes - 1, or the words in `labels`, in their order."""
    labels: tuple[str, ...] | None = Field(default=None, min_length=2, max_length=100_000)
    standardize: Literal["federated", "none"] = "none"
    shape: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(default=None, min_length=1, max_length=4)
    """The shape that the inputs of one record are folded into (row by row) for the model; None: the shape of the one
    feature if that is an array, else one flat vector."""
    datasets: tuple[DatasetReference, ...] | None = Field(default=None, min_length=1, max_length=10_000)
    """Which datasets are asked, as `organization/dataset`; None: every confirmed dataset that fits."""

    @model_validator(mode="after")
    def _parts_fit_together(self) -> "DataSpec":
        names = [feature.name for feature in self.features]
        if len(set(names)) != len(names):
            raise ValueError("a feature is listed twice")
        if self.target in names:
            raise ValueError(f"the target {self.target!r} is also listed as a feature")
        if self.task == "classification":
            if self.labels is not None and len(set(self.labels)) != len(self.labels):
                raise ValueError("the labels are not all different")
            if self.classes is None and self.labels is None:
                raise ValueError("classification needs `classes` or `labels`")
            if self.classes is not None and self.labels is not None and len(self.labels) != self.classes:
                raise ValueError(f"`classes` says {self.classes}, but there are {len(self.labels)} labels")
        elif self.classes is not None or self.labels is not None:
            raise ValueError("regression has no `classes` and no `labels`")
        if self.shape is not None and math.prod(self.shape) != self.width:
            raise ValueError(
                f"`shape` {list(self.shape)} holds {math.prod(self.shape)} inputs, the features give {self.width}"
            )
        if self.standardize == "none":
            for feature in self.features:
                if feature.categories is None and feature.missing is not Missing.REFUSE:
                    raise ValueError(
                        f"missing values of {feature.name!r} become the federation's mean, which needs "
                        "standardize: federated"
                    )
        return self

    @property
    def width(self) -> int:
        """Number of inputs that one record becomes."""
        return sum(feature.width for feature in self.features)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one record as the model sees it, without the batch."""
        if self.shape is not None:
            return self.shape
        only = self.features[0].shape if len(self.features) == 1 else None
        return only if only is not None else (self.width,)

    @property
    def outputs(self) -> int:
        """Number of model outputs: one a class, or one number."""
        if self.labels is not None:
            return len(self.labels)
        return self.classes if self.classes is not None else 1

    def numbers(self) -> list[FeatureSpec]:
        """The features that are numbers, in the order of `features`: the axis of the federation's statistics."""
        return [feature for feature in self.features if feature.categories is None and feature.shape is None]

    def columns(self) -> list[str]:
        """All columns that are read, the target last."""
        return [*(feature.name for feature in self.features), self.target]


class ColumnKind(StrEnum):
    """What a column of a dataset holds."""

    NUMBER = "number"
    CATEGORY = "category"
    TENSOR = "tensor"  # one array of the same shape a record, such as an image


class ColumnSchema(Request):
    """One column of a dataset as announced: metadata, no values."""

    name: Column
    kind: ColumnKind
    missing: bool = False
    """Whether values are missing anywhere in the column."""
    shape: RecordShape | None = None
    """The shape of one record's array; of columns of kind `tensor` only."""

    @model_validator(mode="after")
    def _only_arrays_have_a_shape(self) -> "ColumnSchema":
        if (self.shape is not None) != (self.kind is ColumnKind.TENSOR):
            raise ValueError(f"column {self.name!r}: a column of kind 'tensor' has a `shape`, and no other has")
        if self.kind is ColumnKind.TENSOR and self.missing:
            raise ValueError(f"column {self.name!r}: an array is never missing")
        if self.shape is not None and math.prod(self.shape) > MAX_TENSOR_ELEMENTS:
            raise ValueError(f"the shape of column {self.name!r} holds more than {MAX_TENSOR_ELEMENTS} elements")
        return self


class DatasetSchema(Request):
    """The columns that a worker can read."""

    columns: tuple[ColumnSchema, ...] = Field(min_length=1, max_length=MAX_FEATURES + 1)

    @model_validator(mode="after")
    def _names_differ(self) -> "DatasetSchema":
        names = [column.name for column in self.columns]
        if len(set(names)) != len(names):
            raise ValueError("a column is listed twice")
        return self


def misfits(data: DataSpec, schema: DatasetSchema) -> list[str]:
    """Why a dataset with `schema` cannot serve `data`, one sentence a column; empty if it can."""
    held = {column.name: column for column in schema.columns}
    found = []
    for feature in data.features:
        column = held.get(feature.name)
        if column is None:
            found.append(f"It has no column {feature.name!r}.")
        elif complaint := _misfit(feature, column):
            found.append(f"Column {feature.name!r} {complaint}.")
    target = held.get(data.target)
    if target is None:
        found.append(f"It has no column {data.target!r} (the target).")
    elif target.missing:
        found.append(f"The target {data.target!r} has missing values.")
    elif target.kind is ColumnKind.TENSOR:
        found.append(f"The target {data.target!r} {_held(target)}; a target is a number or a word.")
    elif data.labels is None and target.kind is ColumnKind.CATEGORY:
        found.append(f"The target {data.target!r} holds words; the job lists no labels.")
    return found


def _misfit(feature: FeatureSpec, column: ColumnSchema) -> str | None:
    """What keeps `column` from serving `feature`, without naming it; None if nothing does."""
    if feature.shape is not None:
        if column.shape != feature.shape:
            return f"{_held(column)}; the job wants arrays of shape {list(feature.shape)}"
    elif column.kind is ColumnKind.TENSOR:
        return f"{_held(column)}; the job wants {'numbers' if feature.categories is None else 'categories'}"
    elif feature.categories is None and column.kind is ColumnKind.CATEGORY:
        return "holds words; the job wants numbers"
    elif column.missing and feature.missing is Missing.REFUSE:
        return "has missing values; the job refuses them"
    return None


def _held(column: ColumnSchema) -> str:
    if column.shape is not None:
        return f"holds arrays of shape {list(column.shape)}"
    return "holds words" if column.kind is ColumnKind.CATEGORY else "holds numbers"


class FeatureStatistics(Response):
    """What `standardize: federated` found over all sites: one entry a number feature, in the order of the features."""

    names: list[str]
    count: list[Finite]
    """Values that are not missing."""
    mean: list[Finite]
    variance: list[Finite]
    """Population variance; 0 for a constant column, which is then only centred."""
    rows: Finite
    """Training records over all sites."""
    sites: int


__all__ = [
    "Column", "ColumnKind", "ColumnSchema", "DataSpec", "DatasetReference", "DatasetSchema", "Digest", "FeatureSpec",
    "FeatureStatistics", "Missing", "Name", "RecordShape", "misfits",
]  # fmt: skip
