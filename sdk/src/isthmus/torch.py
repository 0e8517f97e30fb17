"""Declared models as torch modules, and torch modules as named arrays. The only file of the SDK that imports torch.

Every tensor of a module goes by its name in the state_dict. A tensor that is registered under several names (tied
weights) goes by the first of them, as in `Module.named_parameters`: under two names, an update would count it twice and
noise would pull the two copies apart.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, assert_never

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from isthmus.wire.layers import (
    ELU,
    Activation,
    AdaptiveAvgPool,
    AnyLayer,
    BatchNorm,
    Conv1d,
    Conv2d,
    Dropout,
    Embedding,
    Flatten,
    GroupNorm,
    LayerNorm,
    LeakyReLU,
    Linear,
    Permute,
    Pool,
    Recurrent,
    Reshape,
    Residual,
)
from isthmus.wire.manifest import FLOATS, AggregationRule, DType, Manifest, TensorSpec
from isthmus.wire.models import ModelSpec

Arrays = dict[str, NDArray[Any]]

LARGE_BYTES: Final = 2_000_000
"""From here on it is faster to build a model without drawing its weights."""
ALIGNMENT_BYTES: Final = 64
"""Where torch begins a tensor on the CPU."""

_DTYPES: Final[Mapping[torch.dtype, DType]] = {
    torch.float64: DType.F64, torch.float32: DType.F32, torch.float16: DType.F16,
    torch.int64: DType.I64, torch.int32: DType.I32, torch.int16: DType.I16, torch.int8: DType.I8,
    torch.uint64: DType.U64, torch.uint32: DType.U32, torch.uint16: DType.U16, torch.uint8: DType.U8,
    torch.bool: DType.BOOL,
}  # fmt: skip


class UnsupportedTensor(ValueError):
    """A module holds something that does not travel."""

    def __init__(self, name: str, what: str, remedy: str) -> None:
        super().__init__(f"{name!r} is {what}: {remedy}")
        self.name = name


class ArraysMisfit(ValueError):
    """Arrays are not those that a module takes."""


# --- Modules ---------------------------------------------------------------------------------------------------------
# Where torch's own layer does not take what ours does, it stands within one of ours as `inner`, unchanged: whoever
# looks for torch's classes (per-sample gradients, checks for batch norm) finds them.


class WholeNumberEmbedding(nn.Module):
    """nn.Embedding for records that arrive as floats.

    Attributes:
        clamps: whether a number outside of the table is taken for its nearer end, and NaN for the first row; else it is
            an IndexError.
    """

    clamps = False

    def __init__(self, layer: Embedding) -> None:
        super().__init__()
        self.inner = nn.Embedding(layer.num, layer.dim, padding_idx=layer.padding_idx)

    def forward(self, values: Tensor) -> Tensor:
        """(records, ...) -> (records, ..., dim)."""
        if self.clamps:
            values = values.double().nan_to_num(0.0).clamp(0, self.inner.num_embeddings - 1)
        rows: Tensor = self.inner(values.long())
        return rows


class AnyBatchNorm(nn.Module):
    """Batch normalization of records with any number of axes behind the channels."""

    def __init__(self, layer: BatchNorm) -> None:
        super().__init__()
        self.inner = nn.BatchNorm2d(layer.features)

    def forward(self, values: Tensor) -> Tensor:
        """(records, channels, ...) -> the same shape."""
        flat: Tensor = self.inner(values.reshape(values.shape[0], values.shape[1], -1, 1))
        return flat.reshape(values.shape)


class RecurrentTake(nn.Module):
    """A recurrent network that gives one tensor: its final state, or every step's output."""

    def __init__(self, layer: Recurrent) -> None:
        super().__init__()
        kinds: Mapping[str, type[nn.GRU] | type[nn.LSTM] | type[nn.RNN]] = {
            "gru": nn.GRU,
            "lstm": nn.LSTM,
            "rnn": nn.RNN,
        }
        self.inner = kinds[layer.kind](
            layer.inputs, layer.hidden, layer.layers, batch_first=True, bidirectional=layer.bidirectional
        )
        self.take = layer.take
        self.directions = 2 if layer.bidirectional else 1

    def forward(self, values: Tensor) -> Tensor:
        """(records, steps, features) -> (records, features) or (records, steps, features)."""
        steps: Tensor
        steps, state = self.inner(values)
        if self.take == "all":
            return steps
        hidden: Tensor = state[0] if isinstance(state, tuple) else state
        return hidden[-self.directions :].transpose(0, 1).flatten(1)


class AnyPool(nn.Module):
    """Pooling over one or two axes, whichever the records have behind their channels."""

    def __init__(self, over_one: nn.Module, over_two: nn.Module) -> None:
        super().__init__()
        self.over_one = over_one
        self.over_two = over_two

    def forward(self, values: Tensor) -> Tensor:
        """(records, channels, ...) -> as many axes."""
        pooled: Tensor = self.over_one(values) if values.dim() == 3 else self.over_two(values)
        return pooled


class Form(nn.Module):
    """Reshapes or permutes each record."""

    def __init__(self, layer: Reshape | Permute) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, values: Tensor) -> Tensor:
        """(records, ...) -> (records, ...)."""
        if isinstance(self.layer, Permute):
            return values.permute(0, *(axis + 1 for axis in self.layer.order))
        return values.reshape(values.shape[0], *self.layer.shape)

    def extra_repr(self) -> str:
        """What torch shows between the brackets."""
        return repr(self.layer)


class Sum(nn.Module):
    """A residual: body(x) + shortcut(x)."""

    def __init__(self, layer: Residual) -> None:
        super().__init__()
        self.body = _row(layer.layers)
        self.shortcut = nn.Identity() if layer.shortcut is None else _row(layer.shortcut)

    def forward(self, values: Tensor) -> Tensor:
        """(records, ...) -> (records, ...)."""
        total: Tensor = self.body(values) + self.shortcut(values)
        return total


def build(spec: ModelSpec) -> nn.Module:
    """The module of a declared model: float32, on the CPU, its weights drawn from torch's global generator.

    Guarantees:
        `manifest_of_module` of it is the manifest of `spec.plan`, whatever torch's default dtype and device.

    Raises:
        NotDeclarative: the model is an entry point.
    """
    with _usual_defaults():
        return _row(spec.declared_layers())


def build_holding(spec: ModelSpec, arrays: Mapping[str, NDArray[Any]]) -> nn.Module:
    """The module of a declared model with `arrays` as its tensors, as `build` and `load_arrays` together give it.

    A large model draws nothing that would be overwritten at once, which saves most of the time. A small one is built
    faster with its draws, so that torch's global generator may move.

    Raises:
        NotDeclarative, ArraysMisfit, UnsupportedTensor: as those two.
    """
    if sum(array.nbytes for array in arrays.values()) < LARGE_BYTES:
        module = build(spec)
        load_arrays(module, arrays)
        return module
    with _usual_defaults(), torch.device("meta"):
        module = _row(spec.declared_layers())
    if unknown := {name for name, _ in module.named_buffers()} - module.state_dict().keys():
        raise AssertionError(f"no array fills the buffers {sorted(unknown)}")  # they would hold what memory held before
    _check_fit(_tensors(module), arrays, strict=True)
    module.load_state_dict({name: torch.from_numpy(_aligned_copy(arrays[name])) for name in arrays}, assign=True)
    return module


def draw_initial(spec: ModelSpec, seed_hex: str) -> Arrays:
    """The initial tensors of a declared model, as torch initializes its layers.

    Args:
        spec: a model of layers.
        seed_hex: the seed, an even number of hexadecimal digits; at least one byte.

    Returns:
        Every tensor of the state_dict. A function of (spec, seed) for one release of torch on one kind of processor.

    Raises:
        ValueError: the seed is not hexadecimal.
        NotDeclarative: the model is an entry point.

    Guarantees:
        torch's global generators are as they were before; but another thread that draws meanwhile draws from ours.
    """
    seed = bytes.fromhex(seed_hex)
    if not seed:
        raise ValueError("the seed is empty")
    number = int.from_bytes(hashlib.sha256(b"isthmus initial model\0" + seed).digest()[:8])
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that would seed the accelerators too, which nobody restores.
        torch.set_rng_state(torch.Generator("cpu").manual_seed(number).get_state())
        return to_arrays(build(spec))


def _row(layers: tuple[AnyLayer, ...]) -> nn.Sequential:
    return nn.Sequential(*(_module(layer) for layer in layers))


def _module(layer: AnyLayer) -> nn.Module:  # noqa: PLR0911, PLR0912 - a table: one line for each kind of layer
    match layer:
        case Linear():
            return nn.Linear(layer.inputs, layer.outputs, bias=layer.bias)
        case Conv1d():
            return nn.Conv1d(**_convolution(layer))
        case Conv2d():
            return nn.Conv2d(**_convolution(layer))
        case BatchNorm():
            return AnyBatchNorm(layer)
        case LayerNorm():
            return nn.LayerNorm(layer.shape)
        case GroupNorm():
            return nn.GroupNorm(layer.groups, layer.features)
        case Pool():
            options: Any = {"kernel_size": layer.kernel, "stride": layer.stride, "padding": layer.padding}
            if layer.kind == "max_pool":
                return AnyPool(nn.MaxPool1d(**options), nn.MaxPool2d(**options))
            return AnyPool(nn.AvgPool1d(**options), nn.AvgPool2d(**options))
        case AdaptiveAvgPool():
            output: Any = layer.output
            return AnyPool(nn.AdaptiveAvgPool1d(output), nn.AdaptiveAvgPool2d(output))
        case Dropout():
            return nn.Dropout(layer.p)
        case Embedding():
            return WholeNumberEmbedding(layer)
        case Recurrent():
            return RecurrentTake(layer)
        case Flatten():
            return nn.Flatten()
        case Reshape() | Permute():
            return Form(layer)
        case Activation():
            return _ACTIVATIONS[layer.kind]()
        case LeakyReLU():
            return nn.LeakyReLU(layer.slope)
        case ELU():
            return nn.ELU(layer.alpha)
        case Residual():
            return Sum(layer)
        case _:
            assert_never(layer)


_ACTIVATIONS: Final[Mapping[str, type[nn.Module]]] = {
    "relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "silu": nn.SiLU,
}  # fmt: skip


def _convolution(layer: Conv1d | Conv2d) -> dict[str, Any]:
    return {
        "in_channels": layer.inputs,
        "out_channels": layer.outputs,
        "kernel_size": layer.kernel,
        "stride": layer.stride,
        "padding": layer.padding,
        "dilation": layer.dilation,
        "groups": layer.groups,
        "bias": layer.bias,
    }


@contextmanager
def _usual_defaults() -> Iterator[None]:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(usual)


# --- Arrays ----------------------------------------------------------------------------------------------------------


def to_arrays(source: nn.Module | Mapping[str, Tensor]) -> Arrays:
    """The tensors of a module or a state_dict as arrays.

    Returns:
        Name -> a copy in C order that shares no memory with the module. A scalar is an array without axes; a tensor
        under several names goes by the first.

    Raises:
        UnsupportedTensor: something does not travel (bfloat16, complex numbers, extra state that is no tensor).
    """
    return {name: array.copy(order="C") for name, array in views_of_arrays(source).items()}


def views_of_arrays(source: nn.Module | Mapping[str, Tensor]) -> Arrays:
    """As `to_arrays`, without copies: arrays of tensors on the CPU share their memory, in whatever order it lies."""
    return {name: tensor.cpu().numpy() for name, tensor in _tensors(source).items()}


def manifest_of_module(module: nn.Module) -> Manifest:
    """What a checkpoint of `module` holds.

    Floats are averaged, buffers such as running statistics included; integers and bools are kept, and so are frozen
    parameters (`requires_grad=False`): they never change, so they need no sending and no noise. A constant buffer of
    floats looks like a statistic and is averaged: register it with `persistent=False`. Tied weights are in it once.

    Raises:
        UnsupportedTensor: something does not travel (bfloat16, complex numbers, extra state that is no tensor).
    """
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    tensors = {}
    for name, tensor in _tensors(module).items():
        dtype = _DTYPES[tensor.dtype]
        mean = dtype in FLOATS and name not in frozen
        rule = AggregationRule.MEAN if mean else AggregationRule.KEEP
        tensors[name] = TensorSpec(dtype=dtype, shape=tuple(tensor.shape), rule=rule)
    return Manifest(tensors=tensors)


def load_arrays(module: nn.Module, arrays: Mapping[str, NDArray[Any]], strict: bool = True) -> None:
    """Copy `arrays` into the tensors of `module` with the same names. Arrays are not modified and not kept.

    Args:
        module: changed in place.
        arrays: name -> array of exactly the tensor's shape and dtype.
        strict: True: every tensor must be given. False: those that are not given stay as they are. A name that the
            module does not have is refused either way.

    Raises:
        ArraysMisfit: a name, shape or dtype is another one. Nothing was changed then.
        UnsupportedTensor: the module holds something that does not travel.
    """
    tensors = _tensors(module)
    _check_fit(tensors, arrays, strict=strict)
    with torch.no_grad():
        for name, array in arrays.items():
            plain = array if array.flags.writeable and array.flags.c_contiguous else np.array(array, order="C")
            tensors[name].copy_(torch.from_numpy(plain))  # torch warns of arrays that are read-only


def _check_fit(tensors: Mapping[str, Tensor], arrays: Mapping[str, NDArray[Any]], *, strict: bool) -> None:
    if unknown := sorted(arrays.keys() - tensors.keys()):
        raise ArraysMisfit(f"the module has no tensor {_some(unknown)}")
    if strict and (missing := sorted(tensors.keys() - arrays.keys())):
        raise ArraysMisfit(f"there is no array for {_some(missing)}")
    for name, array in arrays.items():
        wants = (_numpy_dtype(tensors[name]), tuple(tensors[name].shape))
        if (array.dtype, array.shape) != wants:
            raise ArraysMisfit(
                f"{name!r} is {wants[0]} of shape {list(wants[1])}, not {array.dtype} of {list(array.shape)}"
            )


def _aligned_copy(array: NDArray[Any]) -> NDArray[Any]:
    """A copy in C order where torch would have placed it: kernels may add in another order elsewhere.

    NumPy asks the system for large pages, which torch does not: the first touch takes a third of the time.
    """
    room = np.empty(array.nbytes + ALIGNMENT_BYTES, np.uint8)
    skipped = -room.ctypes.data % ALIGNMENT_BYTES
    copied = room[skipped : skipped + array.nbytes].view(array.dtype).reshape(array.shape)
    copied[...] = array
    return copied


def _tensors(source: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor that travels, detached, sharing memory with the source; a tied one under its first name only."""
    found: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in (source.state_dict() if isinstance(source, nn.Module) else source).items():
        if not isinstance(tensor, Tensor):
            raise UnsupportedTensor(name, "no tensor", "extra state of a module does not travel")
        if tensor.layout is not torch.strided or tensor.dtype not in _DTYPES:
            what = str(tensor.dtype if tensor.layout is torch.strided else tensor.layout).removeprefix("torch.")
            raise UnsupportedTensor(name, what, "convert it to float32 first, for example with module.float()")
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and not tensor.is_meta and place in seen:  # without memory, nothing shares any
            continue
        seen.add(place)
        found[name] = tensor.detach()
    return found


def _numpy_dtype(tensor: Tensor) -> np.dtype[Any]:
    return torch.empty(0, dtype=tensor.dtype, device="cpu").numpy().dtype


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more
