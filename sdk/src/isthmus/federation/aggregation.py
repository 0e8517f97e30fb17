"""The next model as a function of the present one, the round's updates in order, and the strategy's state.

Everything runs block by block: memory depends on neither the model nor the number of updates. Every element's value is

    w_0 * x_0 + w_1 * x_1 + ...      in float64, from left to right, each product and each sum rounded once,

with w_i = n_i / sum(n) computed once, then the strategy's step, then one rounding to the model's element type. No
reduction over elements takes part (no BLAS, no pairwise sums), and no product is fused with a sum, so the result does
not depend on the block size, the machine or the number of processes. It does depend on the order of the updates, which
the caller fixes: the cohort's canonical order.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from isthmus.codec.blocks import check_block
from isthmus.codec.dtypes import NUMPY_DTYPE, dtype_of
from isthmus.codec.errors import shown
from isthmus.codec.header import TensorPlace, TensorType, canonical_order, check_types, layout
from isthmus.federation.strategies import Block, Strategy, state_manifest, state_name
from isthmus.wire.manifest import AggregationRule, DType, Manifest, TensorSpec, update_manifest

BLOCK_ELEMENTS: Final = 1 << 15


class NonFiniteAggregate(ArithmeticError):
    """The next model, or the strategy's next state, would hold NaN or an infinity.

    Attributes:
        tensor: the first one that does.
    """

    def __init__(self, tensor: str) -> None:
        super().__init__(f"The aggregate of tensor {shown(tensor)} is not finite.")
        self.tensor = tensor


class BlockSource(Protocol):
    """Named tensors that can be read in stretches: `isthmus.codec.blocks.TensorFile`, or a `MemorySource`."""

    @property
    def tensors(self) -> Mapping[str, TensorType]:
        """Name -> element type and shape."""
        ...

    def read_block(self, name: str, start: int, out: NDArray[Any]) -> None:
        """Fill `out`, of the tensor's element type, with its elements from index `start` on, in row order."""
        ...


class BlockSink(Protocol):
    """Takes tensors in stretches: `isthmus.codec.blocks.TensorFileWriter`, or a `MemorySink`.

    Stretches of one tensor come in order; those of different tensors may alternate.
    """

    def write_block(self, name: str, start: int, block: NDArray[Any]) -> None:
        """Take the elements from index `start` on. `block` is reused by the caller afterwards."""
        ...


class MemorySource:
    """Arrays as a `BlockSource`, for tests and simulation."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self.arrays = arrays
        self.tensors: Mapping[str, TensorPlace] = layout(
            {name: TensorPlace(dtype_of(array), array.shape, 0, 0) for name, array in arrays.items()}
        )

    def read_block(self, name: str, start: int, out: NDArray[Any]) -> None:
        """See `BlockSource.read_block`."""
        check_block(name, self.tensors[name], start, out)
        out[...] = self.arrays[name].reshape(-1)[start : start + out.size]


class MemorySink:
    """Collects what is written in `arrays`, for tests and simulation."""

    def __init__(self, tensors: Mapping[str, TensorType]) -> None:
        self._tensors = tensors
        self.arrays: dict[str, NDArray[Any]] = {
            name: np.zeros(spec.shape, NUMPY_DTYPE[spec.dtype]) for name, spec in tensors.items()
        }

    def write_block(self, name: str, start: int, block: NDArray[Any]) -> None:
        """See `BlockSink.write_block`."""
        check_block(name, self._tensors[name], start, block)
        self.arrays[name].reshape(-1)[start : start + block.size] = block


def normalised_weights(weights: Sequence[float]) -> list[float]:
    """w_i = n_i / sum(n), with the sum correctly rounded, so that it does not depend on the order.

    Raises:
        ValueError: there are none, or one is not a finite number above zero, or their sum is not finite.
    """
    if not weights:
        raise ValueError("there are no updates to average")
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"a weight is {weight}; it must be a finite number above zero")
    try:
        total = math.fsum(weights)
    except OverflowError as error:
        raise ValueError("the sum of the weights is not finite") from error
    return [weight / total for weight in weights]


def accumulate(total: Block, update: NDArray[Any], weight: float, scratch: Block) -> None:
    """total += weight * update, elementwise in float64; the product is rounded before it is added.

    Args:
        total: moved on in place.
        update: a block of floats of the same length.
        weight: the update's normalised weight.
        scratch: of the same length, overwritten.
    """
    np.copyto(scratch, update)
    np.multiply(scratch, weight, out=scratch)
    np.add(total, scratch, out=total)


def aggregate(
    manifest: Manifest,
    model: BlockSource,
    updates: Sequence[BlockSource],
    weights: Sequence[float],
    strategy: Strategy,
    *,
    sink: BlockSink,
    state: BlockSource | None = None,
    state_sink: BlockSink | None = None,
    block_elements: int = BLOCK_ELEMENTS,
) -> None:
    """Write the next model to `sink`, and the strategy's next state to `state_sink`.

    Args:
        manifest: the model's.
        model: the present model; holds exactly the manifest's tensors.
        updates: the round's updates in canonical order, each with exactly the tensors of `update_manifest(manifest)`;
            others (`metrics/...`, `statistics/...`) are not looked at.
        weights: one an update, finite and above zero; the sizes of their datasets, or all 1.
        strategy: how the mean moves the model.
        sink: takes every tensor of the manifest, in canonical order.
        state: the strategy's state after the last round; None before the first.
        state_sink: takes the state's tensors; needed if the strategy has slots.
        block_elements: how many elements are held of each source at a time.

    Raises:
        ValueError: no updates, a weight that is none, weights and updates of different number, a state missing or
            not called for.
        TensorsMismatch: a source does not hold the tensors that it should.
        NonFiniteAggregate: the result overflows its element type, or was NaN.

    Guarantees:
        The bytes written are a function of the values of all arguments but `block_elements`. A tensor with rule `keep`
        is copied byte for byte. Memory: a dozen blocks.
    """
    shares = normalised_weights(weights)
    if len(shares) != len(updates):
        raise ValueError(f"there are {len(updates)} updates and {len(shares)} weights")
    if block_elements < 1:
        raise ValueError("a block holds at least one element")
    moved = update_manifest(manifest)
    check_types(manifest.tensors, model.tensors)
    for update in updates:
        check_types(moved.tensors, {n: update.tensors[n] for n in moved.tensors if n in update.tensors})
    _check_state(strategy, manifest, state, state_sink)

    buffers = _Buffers(block_elements)
    # What is not finite is found before it is written: the processor need not warn.
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        for name in canonical_order(manifest.tensors):
            spec = manifest.tensors[name]
            for start, count in _stretches(spec, block_elements):
                if spec.rule is AggregationRule.KEEP:
                    block = buffers.raw(spec.dtype, count)
                    model.read_block(name, start, block)
                    sink.write_block(name, start, block)
                    continue
                mean = buffers.zeroed(count)
                for update, share in zip(updates, shares, strict=True):
                    block = buffers.raw(moved.tensors[name].dtype, count)
                    update.read_block(name, start, block)
                    accumulate(mean, block, share, buffers.scratch(count))
                block = buffers.raw(spec.dtype, count)
                model.read_block(name, start, block)
                present = block.astype(np.float64)
                slots = _read_state(strategy, state, name, start, buffers.raw(DType.F32, count))
                after = strategy.step(present, mean, slots)
                sink.write_block(name, start, _finite(name, after.astype(NUMPY_DTYPE[spec.dtype])))
                if state_sink is not None:
                    for slot, values in slots.items():
                        entry = state_name(slot, name)
                        state_sink.write_block(entry, start, _finite(entry, values.astype(NUMPY_DTYPE[DType.F32])))


class _Buffers:
    """Memory that is used again for every block."""

    def __init__(self, elements: int) -> None:
        self._raw = np.empty(8 * elements, np.uint8)
        self._mean = np.empty(elements, np.float64)
        self._scratch = np.empty(elements, np.float64)

    def raw(self, dtype: DType, count: int) -> NDArray[Any]:
        """Room for `count` elements as they are stored. One at a time: the next call gives the same room."""
        kind = NUMPY_DTYPE[dtype]
        return self._raw[: count * kind.itemsize].view(kind)

    def zeroed(self, count: int) -> Block:
        """A sum of nothing."""
        self._mean[:count] = 0.0
        return self._mean[:count]

    def scratch(self, count: int) -> Block:
        """Room for products."""
        return self._scratch[:count]


def _stretches(spec: TensorSpec, block_elements: int) -> Iterator[tuple[int, int]]:
    for start in range(0, spec.elements, block_elements):
        yield start, min(block_elements, spec.elements - start)


def _check_state(
    strategy: Strategy, manifest: Manifest, state: BlockSource | None, state_sink: BlockSink | None
) -> None:
    expected = state_manifest(strategy, manifest)
    if expected is None:
        if state is not None or state_sink is not None:
            raise ValueError("the strategy keeps no state")
        return
    if state_sink is None:
        raise ValueError("the strategy keeps a state, but there is nowhere to write it")
    if state is not None:
        check_types(expected.tensors, state.tensors)


def _read_state(
    strategy: Strategy, state: BlockSource | None, name: str, start: int, block: NDArray[Any]
) -> dict[str, Block]:
    slots = {}
    for slot in strategy.slots:
        if state is None:
            block[...] = strategy.initial(slot)
        else:
            state.read_block(state_name(slot, name), start, block)
        slots[slot] = block.astype(np.float64)
    return slots


def _finite(name: str, block: NDArray[Any]) -> NDArray[Any]:
    if not np.isfinite(block).all():
        raise NonFiniteAggregate(name)
    return block
