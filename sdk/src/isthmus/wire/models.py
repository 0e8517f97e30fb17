"""The model of a job: layers that anyone can build, or an entry point that the organizations have installed."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Final

from pydantic import BeforeValidator, Field, StrictBool, StrictInt, StringConstraints, model_validator

from isthmus.wire.base import Finite, Request
from isthmus.wire.layers import (
    MAX_ELEMENTS,
    MAX_LAYERS,
    AnyLayer,
    BatchNorm,
    LayerMisfit,
    Layers,
    Residual,
    Shape,
    shape_after,
    tensors_of,
)
from isthmus.wire.manifest import MAX_RANK, MAX_TENSORS, Manifest, TensorSpec

MAX_NESTING: Final = 8

EntryPoint = Annotated[
    str,
    StringConstraints(
        max_length=200, pattern=r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*:[A-Za-z_][A-Za-z0-9_]*$"
    ),
]
"""A function by name: `package.module:function`."""


def _scalar(value: Any) -> Any:
    if value is not None and not isinstance(value, bool | int | float | str):
        raise ValueError("an option is a word, a number, true, false or null")
    if isinstance(value, int) and abs(value) > 2**53:
        raise ValueError("a whole number is at most 2^53")  # beyond it, not every reader of JSON keeps it exact
    return value


OptionName = Annotated[str, StringConstraints(max_length=100, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Option = Annotated[
    StrictBool | StrictInt | Finite | Annotated[str, StringConstraints(max_length=1_000)] | None,
    BeforeValidator(_scalar),
]


class ModelKind(StrEnum):
    """Where a model comes from."""

    DECLARATIVE = "declarative"  # built from its layers; the service knows its tensors
    ENTRY_POINT = "entry_point"  # built by code that an organization installed and allow-listed


class NotDeclarative(ValueError):
    """The model is an entry point: only those who have installed it can say what is in it."""

    def __init__(self, entry_point: str) -> None:
        super().__init__(
            f"the model is the entry point {entry_point!r}, not a list of layers: "
            "its tensors are those of the initial model that was uploaded"
        )
        self.entry_point = entry_point


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """What a declared model will be, known without building it."""

    manifest: Manifest
    """Every tensor of the state_dict, by its name."""
    output_shape: Shape
    """What the model gives for one record, without the batch."""


class ModelSpec(Request):
    """The model of a job: either `layers` or an `entry_point` with its `options`."""

    layers: Layers | None = None
    entry_point: EntryPoint | None = None
    options: dict[OptionName, Option] = Field(default_factory=dict, max_length=100)
    """Keyword arguments of the entry point."""

    @model_validator(mode="after")
    def _is_one_kind_and_bounded(self) -> "ModelSpec":
        if (self.layers is None) == (self.entry_point is None):
            raise ValueError("a model has either `layers` or an `entry_point`")
        if self.options and self.entry_point is None:
            raise ValueError("only an entry point takes `options`")
        for count, (nesting, _layer) in enumerate(_nested(self.layers or ()), start=1):
            if count > MAX_LAYERS:
                raise ValueError(f"a model has at most {MAX_LAYERS} layers, the nested ones included")
            if nesting > MAX_NESTING:
                raise ValueError(f"layers are nested at most {MAX_NESTING} deep")
        elements = 0
        for count, (_name, tensor) in enumerate(tensors_of(self.layers or ()), start=1):
            elements += tensor.elements
            if elements > MAX_ELEMENTS or count > MAX_TENSORS:
                raise ValueError(f"a model has at most {MAX_ELEMENTS} elements in {MAX_TENSORS} tensors")
        return self

    @property
    def kind(self) -> ModelKind:
        """Where the model comes from."""
        return ModelKind.DECLARATIVE if self.layers is not None else ModelKind.ENTRY_POINT

    @property
    def mixes_records(self) -> bool:
        """Whether a declared layer lets the records of a batch see each other, as batch_norm does.

        Then clipping each record's gradient does not bound what a record can do: no privacy by record.

        Raises:
            NotDeclarative: the model is an entry point.
        """
        return any(isinstance(layer, BatchNorm) for _nesting, layer in _nested(self.declared_layers()))

    def declared_layers(self) -> tuple[AnyLayer, ...]:
        """The layers.

        Raises:
            NotDeclarative: the model is an entry point.
        """
        if self.layers is None:
            assert self.entry_point is not None
            raise NotDeclarative(self.entry_point)
        return self.layers

    def plan(self, input_shape: Shape) -> ModelPlan:
        """The tensors of the model and what it gives for records of `input_shape` (one record, without the batch).

        Guarantees:
            The manifest is that of `isthmus.torch.build(self)`: names, dtypes, shapes and rules.

        Raises:
            LayerMisfit: a layer does not fit what comes before it.
            NotDeclarative: the model is an entry point.
            ValueError: `input_shape` is not the shape of a record.
        """
        layers = self.declared_layers()
        if not 1 <= len(input_shape) <= MAX_RANK or min(input_shape) < 1 or math.prod(input_shape) > MAX_ELEMENTS:
            raise ValueError(f"{list(input_shape)} is not the shape of a record")
        output_shape = shape_after(layers, tuple(input_shape), of_record=True)
        tensors: dict[str, TensorSpec] = dict(tensors_of(layers))
        return ModelPlan(manifest=Manifest(tensors=tensors), output_shape=output_shape)


def _nested(layers: tuple[AnyLayer, ...], nesting: int = 0) -> Iterator[tuple[int, AnyLayer]]:
    """Every layer, with the number of residuals it stands in."""
    for layer in layers:
        yield nesting, layer
        if isinstance(layer, Residual):
            yield from _nested(layer.layers, nesting + 1)
            yield from _nested(layer.shortcut or (), nesting + 1)


__all__ = [
    "MAX_LAYERS", "MAX_NESTING", "EntryPoint", "LayerMisfit", "ModelKind", "ModelPlan", "ModelSpec", "NotDeclarative",
]  # fmt: skip
