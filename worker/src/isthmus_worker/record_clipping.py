"""Sums of clipped gradients as whole numbers: what one record can change of them is bounded, and checked to the unit.

As `isthmus.privacy.lattice` does with one update, this does with the gradients of many records at once, which are all
summed: each record's, all its tensors as one vector, is scaled down to the clip, rounded to the lattice, and its norm
checked in whole numbers. So two sets of records that differ by one have sums that differ by at most the lattice's
sensitivity, not about, and noise on the same whole numbers covers it.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from isthmus.privacy.discrete_gaussian import Integers
from isthmus.privacy.lattice import SAMPLE_SCALE, Lattice
from isthmus_worker.scales import finest_scale

_SHORTER: Final = 1.0 - 2.0**-18
_SHRINK: Final = 1.0 - 2.0**-20
_LARGE: Final = 1 << 22

Gradients = Sequence[NDArray[np.floating[Any]]]


def record_lattice(clip_norm: float, noise_multiplier: float, elements: int) -> tuple[Lattice, int]:
    """The finest lattice for gradients, and the noise's variance on it.

    Args:
        clip_norm: C, above 0.
        noise_multiplier: z, the noise's standard deviation in units of the sensitivity; above 0.
        elements: of a gradient; from 1.

    Returns:
        A lattice with a power of two of steps, at most `SAMPLE_SCALE`; and sigma^2 = ceil((z D2)^2) in squared steps.

    Raises:
        ValueError: no lattice takes so much noise.
    """

    def sensitivity_of(scale: int) -> int:
        return Lattice(clip_norm, scale, elements).sensitivity

    scale, variance = finest_scale(noise_multiplier, sensitivity_of, SAMPLE_SCALE)
    return Lattice(clip_norm, scale, elements), variance


def clipped_sum(gradients: Gradients, lattice: Lattice) -> Integers:
    """The sum over records of their clipped gradients, in steps of the lattice.

    Args:
        gradients: one array a tensor, [records, elements of the tensor], float32 or float64. Not modified.
        lattice: for as many elements as the tensors have together.

    Returns:
        [lattice.dimension] int64, the tensors one after the other. Exact for up to 2^26 records.

    Guarantees:
        What one record adds is a function of its own row alone, and a vector of whole numbers whose squares add up to
        at most `lattice.sensitivity`^2. A record whose gradient is not finite adds zeros: to fail would tell of it.

    Edge cases:
        a gradient within the bound is only rounded; one longer than float64 can square adds zeros.
    """
    records = len(gradients[0]) if gradients else 0
    total = np.zeros(lattice.dimension)
    if not records:
        return total.astype(np.int64)
    work = _Workspace(records, max(array.shape[1] for array in gradients), lattice.dimension)
    factors = _factors(gradients, lattice, work)
    bound = float(lattice.sensitivity) ** 2  # below 2^53, like the sums of squares that may pass: exact
    while True:
        squares = _rounded_sum(gradients, factors, total, work)
        over = squares > bound
        if not over.any():
            return total.astype(np.int64)  # all of it is below 2^53
        factors[over] *= np.sqrt(bound / squares[over]) * _SHRINK


class _Workspace:
    """Room for some columns of all records: so many at a time that they stay in a core's cache.

    How many is no question of how many records there are: sums of floats depend on how they are parted, and a record's
    must not depend on the others.
    """

    def __init__(self, records: int, widest: int, dimension: int) -> None:
        self.wide = 1 << (16 if dimension > _LARGE else 12)
        shape = (records, min(self.wide, widest))
        self.near = np.empty(shape, np.float32)
        self.exact = np.empty(shape)

    def parts(self, gradients: Gradients) -> Iterator[NDArray[np.floating[Any]]]:
        """The gradients, some columns at a time."""
        for array in gradients:
            for start in range(0, array.shape[1], self.wide):
                yield array[:, start : start + self.wide]


def _factors(gradients: Gradients, lattice: Lattice, work: _Workspace) -> NDArray[np.float64]:
    """What each record's gradient is multiplied by; 0 where it is not finite.

    A clipped one comes out a little shorter than it might be: by what its norm may be wrong, being summed in float32.
    """
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        squares = np.zeros(len(work.exact))
        for part in work.parts(gradients):
            squares += np.einsum("ij,ij->i", part, part)
        norms = np.sqrt(squares)
        if not np.isfinite(norms).all():  # beyond float32's range, or broken
            squares[...] = 0.0
            for part in work.parts(gradients):
                block = work.exact[:, : part.shape[1]]
                block[...] = part
                squares += np.einsum("ij,ij->i", block, block)
            norms = np.where(np.isfinite(norms), norms, np.sqrt(squares))
    factors = np.where(norms <= lattice.clip_norm, 1.0 / lattice.step, lattice.scale / norms * _SHORTER)
    factors[~np.isfinite(norms)] = 0.0
    return factors


def _rounded_sum(
    gradients: Gradients, factors: NDArray[np.float64], total: NDArray[np.float64], work: _Workspace
) -> NDArray[np.float64]:
    """Overwrite `total` with the sum of the rounded multiples; the sum of squares of each record's."""
    squares = np.zeros(len(factors))
    lost = np.flatnonzero(factors == 0.0)
    column, narrow = factors[:, None], factors[:, None].astype(np.float32)
    place = 0
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        for part in work.parts(gradients):
            exact = work.exact[:, : part.shape[1]]
            if part.dtype == np.float32:  # whole numbers of float32 are whole numbers, whatever was rounded before
                near = work.near[:, : part.shape[1]]
                np.multiply(part, narrow, out=near)
                np.rint(near, out=near)
                exact[...] = near
            else:
                np.multiply(part, column, out=exact)
                np.rint(exact, out=exact)
            if lost.size:
                exact[lost] = 0.0  # NaN times 0 is NaN
            squares += np.einsum("ij,ij->i", exact, exact)
            np.add.reduce(exact, axis=0, out=total[place : place + part.shape[1]])
            place += part.shape[1]
    return squares
