"""The next model as a function of the present one, the round's updates in order, and the strategy's state.

Everything runs block by block: memory depends on neither the model nor the number of updates. Every element's value is

    w_0 * x_0 + w_1 * x_1 + ...      in float64, from left to right, each product and each sum rounded once,

with w_i = n_i / sum(n) computed once, then the strategy's step, then one rounding to the model's element type. No
reduction over elements takes part (no BLAS, no pairwise sums), and no product is fused with a sum, so the result does
not depend on the block size, the machine or the number of threads. It does depend on the order of the updates, which
the caller fixes: the cohort's canonical order.
"""

import dataclasses
import math
import queue
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any, Final, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from isthmus.codec.blocks import check_block
from isthmus.codec.dtypes import NUMPY_DTYPE, dtype_of
from isthmus.codec.errors import shown
from isthmus.codec.header import TensorPlace, TensorType, canonical_order, check_types, layout
from isthmus.federation.strategies import Block, Strategy, state_manifest, state_name
from isthmus.wire.manifest import AggregationRule, DType, Manifest, TensorSpec, update_manifest

BLOCK_ELEMENTS: Final = 1 << 15
SHARED_ELEMENTS: Final = 1 << 18
"""Less than that is not worth a second thread."""
AHEAD: Final = 2
"""So many results a thread at most wait to be written."""
ALIGNMENT_BYTES: Final = 4096


_Given = TypeVar("_Given")
_Made = TypeVar("_Made")


class NonFiniteAggregate(ArithmeticError):
    """The next model, or the strategy's next state, would hold NaN or an infinity.

    Attributes:
        tensor: the first one that does.
    """

    def __init__(self, tensor: str) -> None:
        super().__init__(f"The aggregate of tensor {shown(tensor)} is not finite.")
        self.tensor = tensor


class BlockSource(Protocol):
    """Named tensors that can be read in stretches: `isthmus.codec.blocks.TensorFile`, or a `MemorySource`.

    Several threads may read at the same time.
    """

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


def begin(total: Block, update: NDArray[Any], weight: float) -> None:
    """total = 0 + weight * update, elementwise in float64: as `accumulate` onto zeros, to the sign of a zero."""
    np.copyto(total, update)
    np.multiply(total, weight, out=total)
    np.add(total, 0.0, out=total)


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
    threads: int = 1,
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
        block_elements: how many elements are held of each source at a time, by each thread.
        threads: how many compute stretches at the same time; the caller's own writes them. Models of less than
            SHARED_ELEMENTS are computed by the caller's alone.

    Raises:
        ValueError: no updates, a weight that is none, weights and updates of different number, a state missing or
            not called for, blocks of no element, no thread.
        TensorsMismatch: a source does not hold the tensors that it should.
        NonFiniteAggregate: the result overflows its element type, or was NaN.

    Guarantees:
        The bytes written are a function of the values of all arguments but `block_elements` and `threads`. A tensor
        with rule `keep` is copied byte for byte. Memory: a dozen blocks, for each thread.
    """
    shares = normalised_weights(weights)
    if len(shares) != len(updates):
        raise ValueError(f"there are {len(updates)} updates and {len(shares)} weights")
    check_updates(manifest, updates)
    mean = _WeightedMean(updates, shares, update_manifest(manifest))
    fold(
        manifest,
        model,
        mean,
        strategy,
        sink=sink,
        state=state,
        state_sink=state_sink,
        block_elements=block_elements,
        threads=threads,
    )


def check_updates(manifest: Manifest, updates: Sequence[BlockSource]) -> None:
    """Whether updates hold what rounds average of a model.

    Raises:
        TensorsMismatch: one does not.
    """
    moved = update_manifest(manifest)
    for update in updates:
        check_types(moved.tensors, {n: update.tensors[n] for n in moved.tensors if n in update.tensors})


class MeanOfUpdates(Protocol):
    """What moves the model: the mean of a round's updates, stretch by stretch. Several threads ask at the same time."""

    def block(self, name: str, start: int, count: int, buffers: "Buffers") -> Block:
        """So many elements of an averaged tensor from index `start` on, in float64, in the room of `buffers.mean`."""
        ...


def fold(
    manifest: Manifest,
    model: BlockSource,
    mean: MeanOfUpdates,
    strategy: Strategy,
    *,
    sink: BlockSink,
    state: BlockSource | None = None,
    state_sink: BlockSink | None = None,
    block_elements: int = BLOCK_ELEMENTS,
    threads: int = 1,
) -> None:
    """Move the model by a mean, whichever it is. Arguments, refusals and guarantees are those of `aggregate`."""
    if block_elements < 1:
        raise ValueError("a block holds at least one element")
    if threads < 1:
        raise ValueError("a thread is needed, at least")
    check_types(manifest.tensors, model.tensors)
    _check_state(strategy, manifest, state, state_sink)

    def compute(piece: _Piece) -> list[_Written]:
        buffers = idle.get()
        try:
            return moved.blocks(piece, buffers)
        finally:
            idle.put(buffers)

    moved = _Fold(model, mean, strategy, state)
    pieces = [
        _Piece(name, manifest.tensors[name], start, count)
        for name in canonical_order(manifest.tensors)
        for start, count in _stretches(manifest.tensors[name], block_elements)
    ]
    if sum(piece.elements for piece in pieces) < SHARED_ELEMENTS:
        threads = 1
    idle: queue.SimpleQueue[Buffers] = queue.SimpleQueue()
    for _ in range(threads):
        idle.put(Buffers(block_elements))
    with closing(in_order(compute, pieces, threads)) as results:
        for written in results:
            for block in written:
                target = sink if block.slot is None else state_sink
                assert target is not None, "_check_state has seen to that"
                entry = block.name if block.slot is None else state_name(block.slot, block.name)
                target.write_block(entry, block.start, block.values if block.kept else _finite(entry, block.values))


class _Piece(NamedTuple):
    """A stretch of a tensor of the model."""

    name: str
    spec: TensorSpec
    start: int
    elements: int


class _Written(NamedTuple):
    """What becomes of a stretch: elements of the next model, or of a slot of the strategy's next state."""

    name: str
    slot: str | None
    start: int
    values: NDArray[Any]
    kept: bool


@dataclasses.dataclass(frozen=True)
class _WeightedMean:
    """w_0 * x_0 + w_1 * x_1 + ..., from left to right."""

    updates: Sequence[BlockSource]
    shares: Sequence[float]
    moved: Manifest

    def block(self, name: str, start: int, count: int, buffers: "Buffers") -> Block:
        """See `MeanOfUpdates.block`."""
        mean, raw = buffers.mean(count), buffers.raw(self.moved.tensors[name].dtype, count)
        for number, (update, share) in enumerate(zip(self.updates, self.shares, strict=True)):
            update.read_block(name, start, raw)
            if number:
                accumulate(mean, raw, share, buffers.scratch(count))
            else:
                begin(mean, raw, share)
        return mean


@dataclasses.dataclass(frozen=True)
class _Fold:
    """The arithmetic of one round. Stretches do not depend on each other: any thread computes any of them."""

    model: BlockSource
    mean: MeanOfUpdates
    strategy: Strategy
    state: BlockSource | None

    def blocks(self, piece: _Piece, buffers: "Buffers") -> list[_Written]:
        """The next model's stretch, and that of every slot."""
        name, spec, start, count = piece
        block = np.empty(count, NUMPY_DTYPE[spec.dtype])
        self.model.read_block(name, start, block)
        if spec.rule is AggregationRule.KEEP:
            return [_Written(name, None, start, block, kept=True)]
        # What is not finite is found before it is written: the processor need not warn.
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            mean = self.mean.block(name, start, count, buffers)
            slots = _read_state(self.strategy, self.state, name, start, buffers.raw(DType.F32, count))
            after = self.strategy.step(block.astype(np.float64), mean, slots)
            found = [_Written(name, None, start, after.astype(NUMPY_DTYPE[spec.dtype]), kept=False)]
            for slot, values in slots.items():
                found.append(_Written(name, slot, start, values.astype(NUMPY_DTYPE[DType.F32]), kept=False))
        return found


def in_order(
    compute: Callable[[_Given], _Made], pieces: Sequence[_Given], threads: int
) -> Generator[_Made, None, None]:
    """What `compute` makes of each piece, in their order, while threads are a few pieces ahead. Close it at the end."""
    if threads == 1:
        yield from map(compute, pieces)
        return
    ahead: deque[Future[_Made]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="fold") as pool:
        try:
            for piece in pieces:
                ahead.append(pool.submit(compute, piece))
                if len(ahead) > AHEAD * threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for waiting in ahead:
                waiting.cancel()


class Buffers:
    """Memory that is used again for every block, by one thread at a time."""

    def __init__(self, elements: int) -> None:
        self._raw = _aligned(elements)
        self._mean = _aligned(elements)
        self._scratch = _aligned(elements)

    def raw(self, dtype: DType, count: int) -> NDArray[Any]:
        """Room for `count` elements as they are stored. One at a time: the next call gives the same room."""
        kind = NUMPY_DTYPE[dtype]
        return self._raw.view(np.uint8)[: count * kind.itemsize].view(kind)

    def mean(self, count: int) -> Block:
        """Room for the sum."""
        return self._mean[:count]

    def scratch(self, count: int) -> Block:
        """Room for products."""
        return self._scratch[:count]


def _aligned(elements: int) -> Block:
    """Uninitialized memory that begins at a page: loops and copies over it take a tenth less time."""
    room = np.empty(8 * elements + ALIGNMENT_BYTES, np.uint8)
    skipped = -room.ctypes.data % ALIGNMENT_BYTES
    return room[skipped : skipped + 8 * elements].view(np.float64)


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
