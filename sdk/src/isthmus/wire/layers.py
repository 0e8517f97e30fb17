"""The layers of a declared model: what each is called, which tensors it holds and what it makes of a shape.

A layer is written as a bare name (`relu`) or as one name with its options (`linear: {in: 18, out: 16}`), and is dumped
in the long form (`{kind: linear, in: 18, out: 16, bias: true}`), which is read as well. Shapes are those of one record,
without the batch. Names and shapes of tensors are those of the state_dict that `isthmus.torch.build` gives; nothing
here imports torch.
"""

import math
from collections.abc import Iterator
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator

from isthmus.wire.base import Finite, Request
from isthmus.wire.manifest import MAX_RANK, AggregationRule, DType, TensorSpec

MAX_ELEMENTS: Final = 2**31
"""Of a model in all, and of what one layer gives for one record."""
MAX_SIDE: Final = 2**24
"""Of any size a layer names. A float32 input tells whole numbers apart up to here, so an embedding is no longer."""

MAX_LAYERS: Final = 1_000

Shape = tuple[int, ...]
Tensors = Iterator[tuple[str, TensorSpec]]
"""Name within the layer -> tensor."""

Size = Annotated[int, Field(strict=True, ge=1, le=MAX_SIDE)]
Padding = Annotated[int, Field(strict=True, ge=0, le=MAX_SIDE)]
Flag = Annotated[bool, Field(strict=True)]


def _pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value


def _list(value: Any) -> Any:
    return (value,) if isinstance(value, int) else value


Sizes2 = Annotated[tuple[Size, Size], BeforeValidator(_pair)]
Paddings2 = Annotated[tuple[Padding, Padding] | Literal["same"], BeforeValidator(_pair)]
Sides = Annotated[tuple[Size, ...], Field(min_length=1, max_length=MAX_RANK), BeforeValidator(_list)]


class LayerMisfit(ValueError):
    """A layer does not fit what comes before it."""

    def __init__(self, path: str, kind: str, complaint: str) -> None:
        super().__init__(f"layer {path} ({kind}) {complaint}")
        self.path = path
        """Where the layer stands, as in its tensors' names: `2`, or `3.body.0` within a residual."""
        self.kind = kind


def _float(*shape: int) -> TensorSpec:
    return TensorSpec(dtype=DType.F32, shape=shape)


def _told(shape: Shape) -> str:
    return str(shape[0]) if len(shape) == 1 else str(list(shape))


class Layer(Request):
    """One layer. As it stands here: no tensors, and the shape stays."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    kind: str

    def tensors(self) -> Tensors:
        """The layer's tensors by their names within it, whatever its input."""
        return iter(())

    def output_shape(self, shape: Shape, path: str) -> Shape:
        """What the layer makes of a record of `shape`; `path` says where it stands.

        Raises:
            LayerMisfit: it cannot take such a record.
        """
        return shape

    def _misfit(self, path: str, complaint: str) -> LayerMisfit:
        return LayerMisfit(path, self.kind, complaint)

    def _require_channels(self, path: str, shape: Shape, channels: int) -> None:
        if shape[0] != channels:
            where = "" if len(shape) == 1 else f" (the first side of {list(shape)})"
            raise self._misfit(path, f"takes {channels} channels but gets {shape[0]}{where}")

    def _require_axes(self, path: str, shape: Shape, *axes: str) -> None:
        if len(shape) != len(axes):
            raise self._misfit(path, f"takes records of ({', '.join(axes)}) but gets {_told(shape)}")


# --- Dense -----------------------------------------------------------------------------------------------------------


class Linear(Layer):
    """out = x W^T + b over the last axis."""

    kind: Literal["linear"] = "linear"
    inputs: Size = Field(alias="in")
    outputs: Size = Field(alias="out")
    bias: Flag = True

    def tensors(self) -> Tensors:
        yield "weight", _float(self.outputs, self.inputs)
        if self.bias:
            yield "bias", _float(self.outputs)

    def output_shape(self, shape: Shape, path: str) -> Shape:
        if shape[-1] != self.inputs:
            where = "" if len(shape) == 1 else f" (the last side of {list(shape)}: flatten first?)"
            raise self._misfit(path, f"takes {self.inputs} inputs but gets {shape[-1]}{where}")
        return (*shape[:-1], self.outputs)


class Embedding(Layer):
    """A learned row for each whole number from 0 to num - 1. Inputs are cut to integers; the new axis is the last.

    It reads the record's own numbers: behind a layer that computes, no gradient would reach that layer.
    """

    kind: Literal["embedding"] = "embedding"
    num: Size
    dim: Size
    padding_idx: Annotated[int, Field(strict=True, ge=0)] | None = None
    """The number whose row starts at zero and is not trained."""

    @model_validator(mode="after")
    def _padding_is_a_row(self) -> "Embedding":
        if self.padding_idx is not None and self.padding_idx >= self.num:
            raise ValueError(f"padding_idx {self.padding_idx} is not among {self.num} rows")
        return self

    def tensors(self) -> Tensors:
        yield "inner.weight", _float(self.num, self.dim)

    def output_shape(self, shape: Shape, path: str) -> Shape:
        return (*shape, self.dim)


class Dropout(Layer):
    """Sets inputs to zero with probability p while training."""

    kind: Literal["dropout"] = "dropout"
    p: Annotated[Finite, Field(ge=0, lt=1)]


# --- Convolutions and pooling ----------------------------------------------------------------------------------------


class _Windows(Layer):
    def _slide(self, path: str, side: int, *, kernel: int, stride: int, padding: int, dilation: int = 1) -> int:
        """How often a window fits on one axis."""
        reach = dilation * (kernel - 1) + 1
        if reach > side + 2 * padding:
            padded = f" padded by {padding}" if padding else ""
            raise self._misfit(path, f"has a window of {reach} but gets a side of {side}{padded}")
        return (side + 2 * padding - reach) // stride + 1

    def _per_axis(self, path: str, shape: Shape, value: int | tuple[int, int]) -> Shape:
        """`value` for each axis of a record of one or two axes behind the channels."""
        if isinstance(value, tuple):
            self._require_axes(path, shape, "channels", "height", "width")
            return value
        if len(shape) not in (2, 3):
            axes = "(channels, length) or (channels, height, width)"
            raise self._misfit(path, f"takes records of {axes} but gets {_told(shape)}")
        return (value,) * (len(shape) - 1)


class _Convolution(_Windows):
    inputs: Size = Field(alias="in")
    outputs: Size = Field(alias="out")
    groups: Size = 1
    bias: Flag = True

    @model_validator(mode="after")
    def _groups_divide_channels(self) -> "_Convolution":
        if self.inputs % self.groups or self.outputs % self.groups:
            raise ValueError(f"{self.groups} groups do not divide {self.inputs} and {self.outputs} channels evenly")
        return self

    def _kernels(self, *kernel: int) -> Tensors:
        yield "weight", _float(self.outputs, self.inputs // self.groups, *kernel)
        if self.bias:
            yield "bias", _float(self.outputs)


class Conv1d(_Convolution):
    """Convolution of (channels, length). Padding `same` keeps the length and needs stride 1."""

    kind: Literal["conv1d"] = "conv1d"
    kernel: Size
    stride: Size = 1
    padding: Padding | Literal["same"] = 0
    dilation: Size = 1

    @model_validator(mode="after")
    def _same_has_no_stride(self) -> "Conv1d":
        if self.padding == "same" and self.stride != 1:
            raise ValueError("padding 'same' needs stride 1")
        return self

    def tensors(self) -> Tensors:
        return self._kernels(self.kernel)

    def output_shape(self, shape: Shape, path: str) -> Shape:
        self._require_axes(path, shape, "channels", "length")
        self._require_channels(path, shape, self.inputs)
        if self.padding == "same":
            return (self.outputs, shape[1])
        length = self._slide(
            path, shape[1], kernel=self.kernel, stride=self.stride, padding=self.padding, dilation=self.dilation
        )
        return (self.outputs, length)


class Conv2d(_Convolution):
    """Convolution of (channels, height, width). A number counts for both axes; `same` keeps both and needs stride 1."""

    kind: Literal["conv2d"] = "conv2d"
    kernel: Sizes2
    stride: Sizes2 = (1, 1)
    padding: Paddings2 = (0, 0)
    dilation: Sizes2 = (1, 1)

    @model_validator(mode="after")
    def _same_has_no_stride(self) -> "Conv2d":
        if self.padding == "same" and self.stride != (1, 1):
            raise ValueError("padding 'same' needs stride 1")
        return self

    def tensors(self) -> Tensors:
        return self._kernels(*self.kernel)

    def output_shape(self, shape: Shape, path: str) -> Shape:
        self._require_axes(path, shape, "channels", "height", "width")
        self._require_channels(path, shape, self.inputs)
        if self.padding == "same":
            return (self.outputs, *shape[1:])
        windows = zip(shape[1:], self.kernel, self.stride, self.padding, self.dilation, strict=True)
        sides = (
            self._slide(path, side, kernel=kernel, stride=stride, padding=padding, dilation=dilation)
            for side, kernel, stride, padding, dilation in windows
        )
        return (self.outputs, *sides)


class Pool(_Windows):
    """The greatest value or the mean of each window, by channel: of (channels, length) or of (channels, height, width).

    A number counts for every axis, a pair for height and width. The stride is the kernel unless given. A mean counts
    padded zeros in.
    """

    kind: Literal["max_pool", "avg_pool"]
    kernel: Size | tuple[Size, Size]
    stride: Size | tuple[Size, Size] | None = None
    padding: Padding | tuple[Padding, Padding] = 0

    def output_shape(self, shape: Shape, path: str) -> Shape:
        kernels = self._per_axis(path, shape, self.kernel)
        strides = kernels if self.stride is None else self._per_axis(path, shape, self.stride)
        paddings = self._per_axis(path, shape, self.padding)
        sides = []
        for side, kernel, stride, padding in zip(shape[1:], kernels, strides, paddings, strict=True):
            if 2 * padding > kernel:
                raise self._misfit(path, f"is padded by {padding}, more than half its kernel of {kernel}")
            sides.append(self._slide(path, side, kernel=kernel, stride=stride, padding=padding))
        return (shape[0], *sides)


class AdaptiveAvgPool(_Windows):
    """Means over windows chosen so that `output` of them come out on every axis but the channels'."""

    kind: Literal["adaptive_avg_pool"] = "adaptive_avg_pool"
    output: Size | tuple[Size, Size]

    def output_shape(self, shape: Shape, path: str) -> Shape:
        return (shape[0], *self._per_axis(path, shape, self.output))


# --- Normalization ---------------------------------------------------------------------------------------------------


class BatchNorm(Layer):
    """Normalizes each channel (the first axis) over the records of a batch; no other layer mixes records."""

    kind: Literal["batch_norm"] = "batch_norm"
    features: Size

    def tensors(self) -> Tensors:
        for name in ("weight", "bias", "running_mean", "running_var"):
            yield f"inner.{name}", _float(self.features)
        yield "inner.num_batches_tracked", TensorSpec(dtype=DType.I64, shape=(), rule=AggregationRule.KEEP)

    def output_shape(self, shape: Shape, path: str) -> Shape:
        self._require_channels(path, shape, self.features)
        return shape


class LayerNorm(Layer):
    """Normalizes each record over its last axes, which have `shape`. `features: n` is read as `shape: [n]`."""

    kind: Literal["layer_norm"] = "layer_norm"
    shape: Sides

    @model_validator(mode="before")
    @classmethod
    def _features_are_a_shape(cls, value: Any) -> Any:
        if isinstance(value, dict) and "features" in value and "shape" not in value:
            return {"shape" if name == "features" else name: option for name, option in value.items()}
        return value

    def tensors(self) -> Tensors:
        yield "weight", _float(*self.shape)
        yield "bias", _float(*self.shape)

    def output_shape(self, shape: Shape, path: str) -> Shape:
        if shape[-len(self.shape) :] != self.shape:
            raise self._misfit(path, f"normalizes over {_told(self.shape)} but gets {_told(shape)}")
        return shape


class GroupNorm(Layer):
    """Normalizes each record over groups of its channels (the first axis)."""

    kind: Literal["group_norm"] = "group_norm"
    groups: Size
    features: Size

    @model_validator(mode="after")
    def _groups_divide_channels(self) -> "GroupNorm":
        if self.features % self.groups:
            raise ValueError(f"{self.groups} groups do not divide {self.features} channels evenly")
        return self

    def tensors(self) -> Tensors:
        yield "weight", _float(self.features)
        yield "bias", _float(self.features)

    def output_shape(self, shape: Shape, path: str) -> Shape:
        self._require_channels(path, shape, self.features)
        return shape


# --- Sequences -------------------------------------------------------------------------------------------------------

_GATES: Final = {"rnn": 1, "gru": 3, "lstm": 4}


class Recurrent(Layer):
    """A recurrent network over (steps, features)."""

    kind: Literal["gru", "lstm", "rnn"]
    inputs: Size = Field(alias="in")
    hidden: Size
    layers: Annotated[int, Field(strict=True, ge=1, le=16)] = 1
    bidirectional: Flag = False
    take: Literal["last", "all"] = "last"
    """`last`: the top layer's final state, each direction at its own end: (features,). `all`: every step's output."""

    def tensors(self) -> Tensors:
        rows = _GATES[self.kind] * self.hidden
        for layer in range(self.layers):
            inputs = self.inputs if layer == 0 else self._width
            for direction in ("", "_reverse") if self.bidirectional else ("",):
                yield f"inner.weight_ih_l{layer}{direction}", _float(rows, inputs)
                yield f"inner.weight_hh_l{layer}{direction}", _float(rows, self.hidden)
                yield f"inner.bias_ih_l{layer}{direction}", _float(rows)
                yield f"inner.bias_hh_l{layer}{direction}", _float(rows)

    def output_shape(self, shape: Shape, path: str) -> Shape:
        self._require_axes(path, shape, "steps", "features")
        if shape[1] != self.inputs:
            complaint = f"takes {self.inputs} features a step but gets {shape[1]} (the last side of {list(shape)})"
            raise self._misfit(path, complaint)
        return (self._width,) if self.take == "last" else (shape[0], self._width)

    @property
    def _width(self) -> int:
        return self.hidden * (2 if self.bidirectional else 1)


# --- Form ------------------------------------------------------------------------------------------------------------


class Flatten(Layer):
    """All axes become one, row by row."""

    kind: Literal["flatten"] = "flatten"

    def output_shape(self, shape: Shape, path: str) -> Shape:
        return (math.prod(shape),)


class Reshape(Layer):
    """The same values in another shape, row by row."""

    kind: Literal["reshape"] = "reshape"
    shape: Sides

    def output_shape(self, shape: Shape, path: str) -> Shape:
        if math.prod(shape) != math.prod(self.shape):
            wants, gets = f"{_told(self.shape)}, {math.prod(self.shape)} values,", math.prod(shape)
            raise self._misfit(path, f"gives {wants} but gets {gets}")
        return self.shape


class Permute(Layer):
    """The axes in another order: `order: [1, 0]` turns (channels, length) into (length, channels)."""

    kind: Literal["permute"] = "permute"
    order: tuple[Annotated[int, Field(strict=True, ge=0, lt=MAX_RANK)], ...] = Field(min_length=1, max_length=MAX_RANK)

    @model_validator(mode="after")
    def _names_every_axis_once(self) -> "Permute":
        if sorted(self.order) != list(range(len(self.order))):
            raise ValueError(f"{list(self.order)} does not name each axis from 0 to {len(self.order) - 1} once")
        return self

    def output_shape(self, shape: Shape, path: str) -> Shape:
        if len(shape) != len(self.order):
            raise self._misfit(path, f"orders {len(self.order)} axes but gets {_told(shape)}")
        return tuple(shape[axis] for axis in self.order)


FORM: Final = frozenset({"flatten", "reshape", "permute"})
"""The layers that move values and compute nothing."""


# --- Activations -----------------------------------------------------------------------------------------------------


class Activation(Layer):
    """A function of each value, without options."""

    kind: Literal["relu", "gelu", "tanh", "sigmoid", "silu"]


class LeakyReLU(Layer):
    """x above zero, slope * x below."""

    kind: Literal["leaky_relu"] = "leaky_relu"
    slope: Annotated[Finite, Field(ge=0, le=1)] = 0.01


class ELU(Layer):
    """x above zero, alpha * (exp(x) - 1) below."""

    kind: Literal["elu"] = "elu"
    alpha: Annotated[Finite, Field(gt=0, le=100)] = 1.0


# --- Composition -----------------------------------------------------------------------------------------------------


class Residual(Layer):
    """The sum of what `layers` and `shortcut` make of the same input; without a shortcut, of the input itself."""

    kind: Literal["residual"] = "residual"
    layers: "Layers"
    shortcut: "Layers | None" = None

    def tensors(self) -> Tensors:
        yield from tensors_of(self.layers, "body.")
        yield from tensors_of(self.shortcut or (), "shortcut.")

    def output_shape(self, shape: Shape, path: str) -> Shape:
        body = shape_after(self.layers, shape, f"{path}.body.")
        shortcut = shape_after(self.shortcut or (), shape, f"{path}.shortcut.")
        if body != shortcut:
            other = "its input has" if self.shortcut is None else "its shortcut gives"
            raise self._misfit(
                path, f"adds equal shapes, but its layers give {_told(body)} and {other} {_told(shortcut)}"
            )
        return body


def _short_form(value: Any) -> Any:
    """`relu`, or `{linear: {in: 18, out: 16}}`, or the long form with `kind`."""
    if isinstance(value, str):
        return {"kind": value}
    if isinstance(value, Layer) or (isinstance(value, dict) and "kind" in value):
        return value
    if isinstance(value, dict) and len(value) == 1:
        kind, options = next(iter(value.items()))
        if options is None or (isinstance(options, dict) and "kind" not in options):
            return {"kind": kind, **(options or {})}
    raise ValueError("a layer is a bare name (relu) or one name with its options (linear: {in: 18, out: 16})")


def _not_empty(layers: "tuple[AnyLayer, ...]") -> "tuple[AnyLayer, ...]":
    if not layers:
        raise ValueError("there is no layer")
    return layers


AnyLayer = (
    Linear | Embedding | Dropout | Conv1d | Conv2d | Pool | AdaptiveAvgPool | BatchNorm | LayerNorm | GroupNorm
    | Recurrent | Flatten | Reshape | Permute | Activation | LeakyReLU | ELU | Residual
)  # fmt: skip

LayerSpec = Annotated[Annotated[AnyLayer, Field(discriminator="kind")], BeforeValidator(_short_form)]
Layers = Annotated[tuple[LayerSpec, ...], Field(max_length=MAX_LAYERS), AfterValidator(_not_empty)]
Residual.model_rebuild()


def tensors_of(layers: tuple[AnyLayer, ...], prefix: str = "") -> Tensors:
    """The tensors of `layers` in a row, under their names in the state_dict."""
    for position, layer in enumerate(layers):
        for name, tensor in layer.tensors():
            yield f"{prefix}{position}.{name}", tensor


def shape_after(layers: tuple[AnyLayer, ...], shape: Shape, prefix: str = "", *, of_record: bool = False) -> Shape:
    """What `layers` in a row make of `shape`. With `of_record` the input is a record's own numbers.

    Raises:
        LayerMisfit: a layer does not fit what comes before it, or gives more than `MAX_ELEMENTS` values.
    """
    for position, layer in enumerate(layers):
        path = f"{prefix}{position}"
        if isinstance(layer, Embedding) and not of_record:
            raise LayerMisfit(
                path, layer.kind, f"takes the record itself: only {', '.join(sorted(FORM))} may stand before it"
            )
        shape = layer.output_shape(shape, path)
        if math.prod(shape) > MAX_ELEMENTS:
            raise LayerMisfit(
                path, layer.kind, f"gives {math.prod(shape)} values a record; at most {MAX_ELEMENTS} are allowed"
            )
        of_record = of_record and layer.kind in FORM
    return shape
