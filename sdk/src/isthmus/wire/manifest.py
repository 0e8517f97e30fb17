"""The manifest: which tensors a body must hold, exactly. It is checked before a byte of the body is kept."""

import math
from enum import StrEnum
from typing import Final

from pydantic import Field, model_validator

from isthmus.wire.base import Request

MAX_TENSORS: Final = 20_000
MAX_RANK: Final = 8


class DType(StrEnum):
    """Element types by their safetensors names. BF16 is left out: NumPy cannot average it exactly."""

    F64 = "F64"
    F32 = "F32"
    F16 = "F16"
    I64 = "I64"
    I32 = "I32"
    I16 = "I16"
    I8 = "I8"
    U64 = "U64"
    U32 = "U32"
    U16 = "U16"
    U8 = "U8"
    BOOL = "BOOL"


ITEM_SIZE: Final[dict[DType, int]] = {
    DType.F64: 8, DType.F32: 4, DType.F16: 2, DType.I64: 8, DType.I32: 4, DType.I16: 2, DType.I8: 1,
    DType.U64: 8, DType.U32: 4, DType.U16: 2, DType.U8: 1, DType.BOOL: 1,
}  # fmt: skip

FLOATS: Final = frozenset({DType.F64, DType.F32, DType.F16})


class AggregationRule(StrEnum):
    """What a round does with a tensor of the model."""

    MEAN = "mean"  # the weighted mean of the updates moves it
    KEEP = "keep"  # it never leaves the worker: the next checkpoint holds the same bytes


class TensorSpec(Request):
    """One tensor: its element type and shape, what a round does with it, and whether a body may leave it out."""

    dtype: DType
    shape: tuple[int, ...] = Field(max_length=MAX_RANK)
    rule: AggregationRule = AggregationRule.MEAN
    optional: bool = False

    @model_validator(mode="after")
    def _only_floats_are_averaged(self) -> "TensorSpec":
        if any(side < 0 for side in self.shape):
            raise ValueError("a side of a shape is negative")
        if self.rule is AggregationRule.MEAN and self.dtype not in FLOATS:
            raise ValueError(f"{self.dtype} tensors cannot be averaged: declare rule 'keep'")
        return self

    @property
    def elements(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.elements * ITEM_SIZE[self.dtype]


class Manifest(Request):
    """Tensor name -> what it must be. The order of the names is the sorted one, everywhere."""

    tensors: dict[str, TensorSpec] = Field(max_length=MAX_TENSORS)

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors' data, the optional ones included."""
        return sum(spec.size_bytes for spec in self.tensors.values())

    def names(self) -> list[str]:
        """All names, sorted: the canonical order of an update's elements."""
        return sorted(self.tensors)

    def averaged(self) -> dict[str, TensorSpec]:
        """The tensors that the updates move, by name, in canonical order."""
        return {name: self.tensors[name] for name in self.names() if self.tensors[name].rule is AggregationRule.MEAN}

    @property
    def averaged_elements(self) -> int:
        """How many numbers the updates move: each of them is noised, where there is noise."""
        return sum(tensor.elements for tensor in self.averaged().values())


def update_manifest(model: Manifest) -> Manifest:
    """What an update of `model` holds: the averaged tensors under the same names; F16 travels as F32.

    A tensor with rule `keep` (integer buffers such as `num_batches_tracked`) is not in it.
    """
    return Manifest(
        tensors={
            name: TensorSpec(dtype=DType.F64 if spec.dtype is DType.F64 else DType.F32, shape=spec.shape)
            for name, spec in model.averaged().items()
        }
    )
