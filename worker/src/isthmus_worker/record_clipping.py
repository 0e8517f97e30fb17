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
from isthmus.privacy.lattice import Lattice

_SHORTER: Final = 1.0 - 2.0**-18
_SHRINK: Final = 1.0 - 2.0**-20
_ROWS: Final = 16
_COLUMNS: Final = 1 << 12
"""So many records and elements at a time stay in a core's cache. The columns are no question of how many records there
are: sums of floats depend on how they are parted, and a record's must not depend on the others."""

Gradients = Sequence[NDArray[np.floating[Any]]]


class ClippedSum:
    """A step's sum over records of their clipped gradients, in steps of the lattice.

    Guarantees:
        What one record adds is a function of its own gradient alone, and a vector of whole numbers whose squares add up
        to at most `lattice.sensitivity`^2. A record whose gradient is not finite adds zeros: to fail would tell of it.
        Sums of up to 2^26 records are exact.

    Edge cases:
        a gradient within the bound is only rounded; one longer than float64 can square adds zeros.

    Memory: two vectors of float64, and 1 MiB.
    """

    def __init__(self, lattice: Lattice) -> None:
        """Begin with nothing. `lattice`: of as many elements as a gradient has."""
        self._lattice = lattice
        self._total = np.zeros(lattice.dimension)
        self._part = np.empty(lattice.dimension)
        self._near = np.empty((_ROWS, _COLUMNS), np.float32)
        self._exact = np.empty((_ROWS, _COLUMNS))

    def add(self, gradients: Gradients) -> None:
        """Add records.

        Args:
            gradients: one array a tensor, [records, elements of the tensor], float32 or float64. Not modified.
        """
        for start in range(0, len(gradients[0]), _ROWS):
            self._add([array[start : start + _ROWS] for array in gradients])

    def take(self) -> Integers:
        """The sum, int64, the tensors one after the other; the next one begins with nothing."""
        found: Integers = self._total.astype(np.int64)  # all of it is below 2^53
        self._total[...] = 0.0
        return found

    def _add(self, gradients: Gradients) -> None:
        factors = self._factors(gradients)
        bound = float(self._lattice.sensitivity) ** 2  # below 2^53, like the sums of squares that may pass: exact
        while True:
            squares = self._round(gradients, factors)
            over = squares > bound
            if not over.any():
                break
            factors[over] *= np.sqrt(bound / squares[over]) * _SHRINK
        self._total += self._part

    def _factors(self, gradients: Gradients) -> NDArray[np.float64]:
        """What each record's gradient is multiplied by; 0 where it is not finite.

        A clipped one comes out a little shorter than it might be: by what its norm may be wrong, summed in float32.
        """
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            squares = np.zeros(len(gradients[0]))
            for part in self._parts(gradients):
                squares += np.vecdot(part, part)
            norms = np.sqrt(squares)
            if not np.isfinite(norms).all():  # beyond float32's range, or broken
                squares[...] = 0.0
                for part in self._parts(gradients):
                    exact = self._exact[: len(part), : part.shape[1]]
                    exact[...] = part
                    squares += np.vecdot(exact, exact)
                norms = np.where(np.isfinite(norms), norms, np.sqrt(squares))
            clip_norm, scale = self._lattice.clip_norm, self._lattice.scale
            factors = scale / np.maximum(norms, clip_norm)
            factors[norms > clip_norm] *= _SHORTER
        factors[~np.isfinite(norms)] = 0.0
        return factors

    def _round(self, gradients: Gradients, factors: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sum of the rounded multiples, left in `_part`; the sum of squares of each record's."""
        squares = np.zeros(len(factors))
        lost = np.flatnonzero(factors == 0.0)
        column, narrow = factors[:, None], factors[:, None].astype(np.float32)
        place = 0
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            for part in self._parts(gradients):
                exact = self._exact[: len(part), : part.shape[1]]
                if part.dtype == np.float32:  # whole numbers of float32 are whole, whatever was rounded before
                    near = self._near[: len(part), : part.shape[1]]
                    np.multiply(part, narrow, out=near)
                    np.rint(near, out=near)
                    exact[...] = near
                else:
                    np.multiply(part, column, out=exact)
                    np.rint(exact, out=exact)
                if lost.size:
                    exact[lost] = 0.0  # NaN times 0 is NaN
                squares += np.vecdot(exact, exact)
                np.add.reduce(exact, axis=0, out=self._part[place : place + part.shape[1]])
                place += part.shape[1]
        return squares

    def _parts(self, gradients: Gradients) -> Iterator[NDArray[np.floating[Any]]]:
        for array in gradients:
            for start in range(0, array.shape[1], _COLUMNS):
                yield array[:, start : start + _COLUMNS]
