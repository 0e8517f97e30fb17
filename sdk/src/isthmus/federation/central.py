"""The mean of a round's updates with central noise: each clipped once more, summed as integers, noised once.

Whoever sums does not rely on what the workers say that they clipped. An update becomes integers on the job's public
lattice (`isthmus.privacy.lattice`), scaled down so that its norm is within the bound, which is checked in whole
numbers; integers are summed exactly, in any order; and one exact discrete Gaussian is added to every element of the
sum. Back to floats it goes only then:

    mean = (sum of the integers + noise) * C / (S * n)

The noise is a function of the round's key alone. It is drawn in blocks of a fixed size, each with a key of its own, so
that the same key gives the same bytes whatever the threads and the stretches: a sum that was interrupted and is done
again is the same release, not a second one.
"""

import hmac
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from isthmus.codec.dtypes import NUMPY_DTYPE
from isthmus.federation.aggregation import BlockSink, BlockSource, Buffers, check_updates, fold
from isthmus.federation.strategies import Block, Strategy
from isthmus.privacy.discrete_gaussian import Integers, Noise
from isthmus.privacy.keystream import KEY_BYTES, Keystream
from isthmus.privacy.lattice import UPDATE_SCALE, Lattice, sum_of_squares, to_lattice
from isthmus.privacy.scales import noised_lattice
from isthmus.wire.manifest import Manifest, TensorSpec, update_manifest

NOISE_BLOCK: Final = 1 << 17
"""Elements of a tensor that share a keystream. The result depends on it: it never changes under this domain's name."""
DOMAIN: Final = b"isthmus/central-noise/v1"
_READ_BLOCK: Final = 1 << 16
_FACTOR_BITS: Final = 24
_SHRINK: Final = 1 - 2.0**-20


def aggregate_noised(
    manifest: Manifest,
    model: BlockSource,
    updates: Sequence[BlockSource],
    strategy: Strategy,
    *,
    clip_norm: float,
    noise_multiplier: float,
    key: bytes,
    sink: BlockSink,
    state: BlockSource | None = None,
    state_sink: BlockSink | None = None,
    threads: int = 1,
) -> None:
    """Write the next model to `sink`, and the strategy's next state to `state_sink`.

    Args:
        manifest, model, updates, strategy, sink, state, state_sink, threads: as for `isthmus.federation.aggregation`'s
            `aggregate`; every update counts the same.
        clip_norm: C, the bound on the norm of one update; finite, > 0.
        noise_multiplier: z, the noise's standard deviation in units of the sensitivity; > 0.
        key: the round's, 32 bytes, secret; used for nothing else.

    Raises:
        ValueError: no updates, or an argument outside of its range; an update that holds NaN or an infinity.
        TensorsMismatch, NonFiniteAggregate: as for `aggregate`.

    Guarantees:
        Every update's integers have a norm of at most D = S + ceil(sqrt(d) / 2), in exact arithmetic; the sum has
        discrete Gaussian noise of sigma^2 = ceil((z D)^2) on every element: an `events.GaussianRelease` of multiplier
        z. The bytes written are a function of the values of all arguments but `threads`, and do not depend on the
        order of the updates. Memory: some 5 MiB for each thread.
    """
    if not updates:
        raise ValueError("there are no updates to average")
    if len(key) != KEY_BYTES:
        raise ValueError(f"a round's noise key has {KEY_BYTES} bytes, not {len(key)}")
    check_updates(manifest, updates)
    moved = update_manifest(manifest).tensors
    lattice, variance = noised_lattice(clip_norm, noise_multiplier, manifest.averaged_elements, finest=UPDATE_SCALE)
    mean = _NoisedMean(
        updates,
        clipping_factors(updates, moved, lattice, threads=threads),
        moved,
        lattice,
        variance,
        key,
    )
    fold(
        manifest,
        model,
        mean,
        strategy,
        sink=sink,
        state=state,
        state_sink=state_sink,
        block_elements=NOISE_BLOCK,
        threads=threads,
    )


def clipping_factors(
    updates: Sequence[BlockSource], tensors: Mapping[str, TensorSpec], lattice: Lattice, *, threads: int = 1
) -> list[float]:
    """What each update is multiplied with to become integers that keep the lattice's bound: steps per unit.

    Args:
        updates: each with `tensors`, all finite.
        tensors: name -> type and shape.
        lattice: the job's.
        threads: how many updates are read at the same time.

    Raises:
        ValueError: an update holds NaN or an infinity.

    Guarantees:
        For each: the sum of the squares of its integers is at most `lattice.sensitivity` squared, exactly.
    """

    def of_update(update: BlockSource) -> float:
        factor = _coarse(lattice.factor_of(_norm(update, tensors)))
        while not lattice.bound_holds(_squares(update, tensors, factor)):
            factor *= _SHRINK
        return factor

    with ThreadPoolExecutor(threads, thread_name_prefix="clip") as pool:
        return list(pool.map(of_update, updates))


class _NoisedMean:
    """The sum of the updates' integers with its noise, divided by their number."""

    def __init__(
        self,
        updates: Sequence[BlockSource],
        factors: Sequence[float],
        tensors: Mapping[str, TensorSpec],
        lattice: Lattice,
        variance: int,
        key: bytes,
    ) -> None:
        self._updates = updates
        self._factors = factors
        self._tensors = tensors
        self._variance = variance
        self._key = key
        self._step = lattice.step / len(updates)

    def block(self, name: str, start: int, count: int, buffers: Buffers) -> Block:
        """See `isthmus.federation.aggregation.MeanOfUpdates.block`."""
        raw = buffers.raw(self._tensors[name].dtype, count)
        total = noise_of(self._key, name, self._variance, start, count)
        for update, factor in zip(self._updates, self._factors, strict=True):
            update.read_block(name, start, raw)
            total += to_lattice(raw, factor)
        return np.multiply(total, self._step, out=buffers.mean(count))


def noise_of(key: bytes, name: str, variance: int, start: int, count: int) -> Integers:
    """The noise of so many elements of a tensor, from index `start` on: int64.

    Args:
        key: the round's, 32 bytes.
        name: the tensor's.
        variance: sigma^2, a whole number.
        start, count: any stretch; it costs least where it is one of whole blocks of NOISE_BLOCK.

    Guarantees:
        Independent samples of D(sigma^2), one for each (tensor, index): a stretch's noise does not depend on how the
        tensor is cut.
    """
    found = np.empty(count, np.int64)
    done = 0
    while done < count:
        number, skipped = divmod(start + done, NOISE_BLOCK)
        part = found[done : done + NOISE_BLOCK - skipped]
        noise = Noise(variance, Keystream(_subkey(key, name, number)))
        if skipped:
            noise.take(skipped)
        noise.fill(part)
        done += part.size
    return found


def _subkey(key: bytes, name: str, number: int) -> bytes:
    """The key of one block's keystream: HMAC-SHA-256 under the round's key, over where the block stands."""
    return hmac.digest(key, DOMAIN + number.to_bytes(8, "big") + name.encode(), "sha256")


def _coarse(factor: float) -> float:
    """`factor` rounded down to 24 bits: sums of squares differ in their last bits from processor to processor."""
    mantissa, exponent = math.frexp(factor)
    return math.ldexp(math.floor(math.ldexp(mantissa, _FACTOR_BITS)), exponent - _FACTOR_BITS)


def _norm(update: BlockSource, tensors: Mapping[str, TensorSpec]) -> float:
    """Euclidean norm over all tensors, in float64; infinite beyond its range.

    Raises:
        ValueError: an element is NaN.
    """
    squares = 0.0
    with np.errstate(over="ignore", under="ignore"):
        for block in _blocks(update, tensors):
            wide = block.astype(np.float64)
            squares += float(np.multiply(wide, wide, out=wide).sum())
    if math.isnan(squares):
        raise ValueError("an update is not finite: it holds NaN")
    return math.sqrt(squares)


def _squares(update: BlockSource, tensors: Mapping[str, TensorSpec], factor: float) -> int:
    return sum(sum_of_squares(to_lattice(block, factor)) for block in _blocks(update, tensors))


def _blocks(update: BlockSource, tensors: Mapping[str, TensorSpec]) -> Iterator[NDArray[Any]]:
    """The elements of all tensors, in the order of their names, in stretches that use the same room."""
    for name in sorted(tensors):
        spec = tensors[name]
        room = np.empty(min(_READ_BLOCK, spec.elements), NUMPY_DTYPE[spec.dtype])
        for start in range(0, spec.elements, _READ_BLOCK):
            block = room[: min(_READ_BLOCK, spec.elements - start)]
            update.read_block(name, start, block)
            yield block
