"""A round under secure aggregation in numbers: updates as whole numbers, their sum, and what the sum moves.

What is masked are whole numbers modulo 2^32, on the job's public lattice (`isthmus.privacy.scales.secured_lattice`),
which is so fine, and no finer, that a sum never leaves 32 bits: read as two's complement, the unmasked sum is exact.

    member i    y_i = rint(w_i * S / C * clip(update_i, C)) + noise_i       modulo 2^32, then masked
    service     mean = (y_1 + ... + y_n) * (C / S) / (w_1 + ... + w_n)

with w_i the member's share of weight: 1 where weights are uniform, else its declared rows over the largest of the
roster. Where a job's noise is added by the members, it is in y_i before anything is masked.
"""

import math
import queue
from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import accumulate
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from isthmus.codec.header import check_types
from isthmus.federation.aggregation import (
    BLOCK_ELEMENTS,
    SHARED_ELEMENTS,
    BlockSink,
    BlockSource,
    Buffers,
    fold,
    in_order,
)
from isthmus.federation.strategies import Block, Strategy
from isthmus.privacy.clipping import Tensors
from isthmus.privacy.discrete_gaussian import Noise
from isthmus.privacy.keystream import Keystream
from isthmus.privacy.lattice import Lattice, sum_of_squares
from isthmus.privacy.planning import secured_noise
from isthmus.privacy.scales import secured_lattice
from isthmus.secagg.derivation import Mask
from isthmus.secagg.masks import add_masks
from isthmus.wire.jobs import JobSpec
from isthmus.wire.manifest import AggregationRule, DType, Manifest, TensorSpec, update_manifest
from isthmus.wire.privacy import PrivacyPlan
from isthmus.wire.secured import MASKED

SUM: Final = "sum"
"""The one tensor of an unmasked sum: I32, all averaged elements in canonical order."""
PIECE_ELEMENTS: Final = 1 << 18
"""A sum is unmasked so many elements at a time, by each thread. The result does not depend on it."""

_TAIL: Final = 10
_LARGEST_EXACT: Final = 1 << 53  # of sums in float64


def lattice_of(spec: JobSpec, plan: PrivacyPlan | None, elements: int) -> tuple[Lattice, int]:
    """The lattice of a secured job, and sigma^2 of the noise that each member adds on it: 0 where it adds none.

    Args:
        spec: the job, with secure aggregation.
        plan: a participation's; None for a job without a privacy unit. All members' agree in what counts here.
        elements: numbers of an update.

    Raises:
        ValueError: the job bounds no update, or so much noise does not fit into 32 bits.
    """
    if spec.update_bound is None:
        raise ValueError("an update without a bound cannot be summed in whole numbers")
    noise_multiplier, apart, shares = secured_noise(spec, plan)
    return secured_lattice(spec.update_bound, elements, noise_multiplier=noise_multiplier, apart=apart, shares=shares)


def quantise(update: Tensors, spec: JobSpec, plan: PrivacyPlan | None, weight_share: float = 1.0) -> NDArray[np.uint32]:
    """A member's update as the whole numbers that are masked: clipped, counted by its share, rounded, noised.

    Args:
        update: tensor name -> float array, what rounds average of the model; clipped before or not. Not modified.
        spec: the job, with secure aggregation.
        plan: of this participation; None for a job without a privacy unit.
        weight_share: the member's weight over the largest of the roster; 1 where weights are uniform.

    Returns:
        One-dimensional, all tensors in the order of their names; two's complement modulo 2^32.

    Raises:
        NonFiniteUpdate: some element is NaN or infinite.
        ValueError: some tensor does not hold floats; a share outside of (0, 1], or other than 1 where noise is added.

    Guarantees:
        Without its noise, the vector's norm is at most `Lattice.reach(weight_share)` steps, in exact arithmetic.
        Without noise (unit none and record) the same arguments give the same numbers, so the update may be kept and
        turned into numbers once the roster's weights are known. With noise (unit organization) every call draws new
        noise, and is a release of its own: call it once, and keep what it gave.

    Memory: the result, and some 2 MiB.
    """
    elements = sum(array.size for array in update.values())
    lattice, variance = lattice_of(spec, plan, elements)
    if variance and weight_share != 1.0:
        raise ValueError("where noise is added every member counts the same")
    noise = Noise(variance, Keystream()) if variance else None
    found = np.empty(elements, np.uint32)
    for start, integers in lattice.encoded(update, weight_share):
        if noise is not None:
            noise.add_to(integers)
        np.copyto(found[start : start + integers.size], integers, casting="unsafe")  # modulo 2^32
    return found


def sum_bound(spec: JobSpec, plan: PrivacyPlan | None, elements: int, weight_shares: Sequence[float]) -> int:
    """How long an honest round's sum can be, in steps, but for bad luck below e^-50. A longer one is refused.

    Args:
        spec, plan, elements: as for `lattice_of`.
        weight_shares: of all that are in the sum.

    Returns:
        The largest norm: every member's own reach, and the tail of their noise. A dishonest member may still take up
        what the others leave of it.

    Source:
        Discrete Gaussians are sub-Gaussian with their sigma^2 (Canonne, Kamath, Steinke 2020, Corollary 17), so a sum
        of n is with n sigma^2, and a vector of d such sums is longer than sigma sqrt(n) (sqrt(d) + t) with probability
        at most exp(-t^2 / 2): Hsu, Kakade, Zhang 2012, "A tail inequality for quadratic forms of subgaussian random
        vectors", https://arxiv.org/abs/1110.2842, Theorem 2.1 (t = 10 here).
    """
    lattice, variance = lattice_of(spec, plan, elements)
    signal = sum(lattice.reach(share) for share in weight_shares)
    if not variance:
        return signal
    together = len(weight_shares) * variance
    return signal + math.isqrt(together * elements) + 1 + _TAIL * (math.isqrt(together) + 1)


def unmask(
    sources: Sequence[BlockSource],
    masks: Sequence[Mask],
    elements: int,
    *,
    sink: BlockSink,
    threads: int = 1,
    progress: Callable[[float], None] | None = None,
    piece_elements: int = PIECE_ELEMENTS,
) -> int:
    """Add up masked updates, take the masks off, and write the sum.

    Args:
        sources: the masked updates of all survivors, in any order; each with the tensor `masked`, U32, beside others.
        masks: what has to be *added* to the sum so that it is unmasked, with their signs
            (`isthmus.secagg.server.reconstruct`).
        elements: of an update.
        sink: takes the tensor `sum`, I32.
        threads: how many work at the same time, each at its own stretch; the caller's own writes.
        progress: is told the share of the sum that is written, by the caller's thread. What it raises ends the work.
        piece_elements: how many elements are held of each source at a time, by each thread.

    Returns:
        The sum of the squares, exactly: what `sum_bound` squared is compared with.

    Raises:
        ValueError: there are no updates, or a number is out of its range.
        TensorsMismatch: an update is not `elements` of U32.

    Guarantees:
        The numbers written, and what is returned, do not depend on `threads` or `piece_elements`, nor on the order of
        sources and masks. Memory: a few pieces for each thread, however many updates and masks there are.
    """
    if not sources:
        raise ValueError("there are no updates to sum")
    if elements < 1 or threads < 1 or piece_elements < 1:
        raise ValueError("elements, threads and the elements of a piece are 1 at least")
    expected = {MASKED: TensorSpec(dtype=DType.U32, shape=(elements,), rule=AggregationRule.KEEP)}
    for source in sources:
        check_types(expected, {name: source.tensors[name] for name in expected if name in source.tensors})
    if elements < SHARED_ELEMENTS:
        threads = 1
    idle: queue.SimpleQueue[NDArray[np.uint32]] = queue.SimpleQueue()
    for _ in range(threads):
        idle.put(np.empty(min(piece_elements, elements), np.uint32))

    def compute(start: int) -> _Unmasked:
        room = idle.get()
        try:
            return _unmasked(sources, masks, start, room[: min(piece_elements, elements - start)])
        finally:
            idle.put(room)

    squares = 0
    with closing(in_order(compute, range(0, elements, piece_elements), threads)) as pieces:
        for piece in pieces:
            sink.write_block(SUM, piece.start, piece.values)
            squares += piece.squares
            if progress is not None:
                progress((piece.start + piece.values.size) / elements)
    return squares


class _Unmasked(NamedTuple):
    """A stretch of the sum."""

    start: int
    values: NDArray[np.int32]
    squares: int


def _unmasked(sources: Sequence[BlockSource], masks: Sequence[Mask], start: int, room: NDArray[np.uint32]) -> _Unmasked:
    """The stretch from `start` on that is as long as `room`, which is overwritten."""
    total = np.empty(room.size, np.uint32)
    sources[0].read_block(MASKED, start, total)
    for source in sources[1:]:
        source.read_block(MASKED, start, room)
        np.add(total, room, out=total)  # modulo 2^32
    add_masks(total, start, masks)
    values = total.view(np.int32)
    return _Unmasked(start, values, exact_squares(values))


def exact_squares(integers: NDArray[np.int32]) -> int:
    """The sum of the squares, exactly; fastest where it is below 2^53."""
    squares = sum_of_squares(integers)
    if squares < _LARGEST_EXACT:
        return squares
    wide = integers.astype(np.int64)
    np.multiply(wide, wide, out=wide)  # 2^62 at most; halves of 32 bits do not overflow their sums below 2^31 elements
    return (int((wide >> 32).sum()) << 32) + int((wide & 0xFFFF_FFFF).sum())


def aggregate_sum(
    manifest: Manifest,
    model: BlockSource,
    total: BlockSource,
    spec: JobSpec,
    plan: PrivacyPlan | None,
    weight_total: float,
    strategy: Strategy,
    *,
    sink: BlockSink,
    state: BlockSource | None = None,
    state_sink: BlockSink | None = None,
    block_elements: int = BLOCK_ELEMENTS,
    threads: int = 1,
) -> None:
    """Move the model by the mean that an unmasked sum stands for; write the next model, and the strategy's next state.

    Args:
        manifest, model, strategy, sink, state, state_sink, block_elements, threads: as for
            `isthmus.federation.aggregation.aggregate`.
        total: the unmasked sum, with the tensor `sum`: I32, all averaged elements in canonical order.
        spec, plan: as for `lattice_of`.
        weight_total: the sum of the weight shares of all that are in `total`; above 0.

    Raises:
        ValueError: a weight that is none, or as for `aggregate`.
        TensorsMismatch, NonFiniteAggregate: as for `aggregate`; the sum has another length.

    Guarantees:
        The bytes written are a function of the values of all arguments but `block_elements` and `threads`.
    """
    if not (math.isfinite(weight_total) and weight_total > 0):
        raise ValueError(f"the weight of a sum is {weight_total}; it must be finite and above zero")
    elements = manifest.averaged_elements
    check_types(sum_tensors(elements), {name: total.tensors[name] for name in total.tensors})
    lattice, _ = lattice_of(spec, plan, elements)
    fold(
        manifest,
        model,
        _MeanOfSum(total, update_manifest(manifest), lattice.step / weight_total),
        strategy,
        sink=sink,
        state=state,
        state_sink=state_sink,
        block_elements=block_elements,
        threads=threads,
    )


def sum_tensors(elements: int) -> dict[str, TensorSpec]:
    """What the file of an unmasked sum holds."""
    return {SUM: TensorSpec(dtype=DType.I32, shape=(elements,), rule=AggregationRule.KEEP)}


class _MeanOfSum:
    """The whole numbers of a sum in the units of the parameters, divided by its weight."""

    def __init__(self, total: BlockSource, moved: Manifest, step: float) -> None:
        names = moved.names()
        ends = accumulate((moved.tensors[name].elements for name in names), initial=0)
        self._begins = dict(zip(names, ends, strict=False))  # one end more than names: the last
        self._total = total
        self._step = step

    def block(self, name: str, start: int, count: int, buffers: Buffers) -> Block:
        """See `isthmus.federation.aggregation.MeanOfUpdates.block`."""
        raw: NDArray[Any] = buffers.raw(DType.I32, count)
        self._total.read_block(SUM, self._begins[name] + start, raw)
        mean = buffers.mean(count)
        np.multiply(raw, self._step, out=mean)
        return mean
