"""Drawing from a finite distribution with one 32-bit word a sample, exactly.

The alias method (Walker 1977; Vose 1991, "A Linear Algorithm for Generating Random Numbers with a Given Distribution"):
a word's low bits choose a cell, and its other bits, as a number in [0, 1), say which of the cell's two values it is.
Where those bits equal the threshold's own leading bits, more bits of the stream decide.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from isthmus.privacy.keystream import Keystream

WEIGHT_BITS: Final = 256
"""A cell's weight is a whole number of 2^-256: that is how exact a table is."""

_WORD: Final = 32


class AliasTable:
    """A distribution over some numbers. Not changed by drawing from it."""

    def __init__(self, weights: Sequence[int], values: Sequence[int]) -> None:
        """Prepare the cells.

        Args:
            weights: whole numbers above or equal to 0, whose sum is K 2^256, where K is the smallest power of two that
                is not below their number (and at most 2^16).
            values: what is drawn with each weight; below 2^53, so that float64 holds them.
        """
        self.bits = max(1, (len(weights) - 1).bit_length())
        cells, whole = 1 << self.bits, 1 << WEIGHT_BITS
        if sum(weights) != cells * whole or self.bits > 16:
            raise ValueError("the weights of an alias table do not add up")
        left = [*weights, *[0] * (cells - len(weights))]
        self._thresholds, aliases = left.copy(), list(range(cells))
        poor = [cell for cell in range(cells) if left[cell] < whole]
        rich = [cell for cell in range(cells) if left[cell] >= whole]
        while poor and rich:
            taker, giver = poor.pop(), rich.pop()
            self._thresholds[taker], aliases[taker] = left[taker], giver
            left[giver] -= whole - left[taker]
            (poor if left[giver] < whole else rich).append(giver)
        for cell in rich:  # what is left over is full: both of its values are its own
            self._thresholds[cell] = whole - 1
        leading = (threshold >> WEIGHT_BITS - (_WORD - self.bits) for threshold in self._thresholds)
        self._leading = np.array([number << self.bits for number in leading], np.uint32)
        own = [*values, *[0] * (cells - len(values))]
        pairs = [value for cell in range(cells) for value in (own[aliases[cell]], own[cell])]
        self._values = np.array(pairs, np.float64)

    def draw(self, stream: Keystream, out: NDArray[np.float64], scratch: "Scratch") -> None:
        """Fill `out` with samples, from as many words of the stream."""
        position = stream.position
        words = stream.take(out.size, np.uint32)
        cells = np.bitwise_and(words, np.uint32((1 << self.bits) - 1), out=scratch.places, casting="unsafe")
        leading = np.take(self._leading, cells, out=scratch.words, mode="wrap")
        below = np.less(words, leading, out=scratch.flags)  # the words' low bits do not matter: the thresholds' are 0
        apart = np.subtract(words, leading, out=leading)  # below 2^bits where the leading bits are the same
        if apart.min() < 1 << self.bits:
            for place in np.flatnonzero(apart < np.uint32(1 << self.bits)):
                below[place] = self._is_below(int(cells[place]), stream, position + 4 * int(place))
        cells += cells
        cells += below
        np.take(self._values, cells, out=out, mode="wrap")

    def _is_below(self, cell: int, stream: Keystream, position: int) -> bool:
        """Whether a number whose leading bits are the threshold's own is below it."""
        # 256 more bits stand below the leading ones, which is more than the threshold has: no tie is left.
        rest = WEIGHT_BITS - (_WORD - self.bits)
        threshold = self._thresholds[cell] & ((1 << rest) - 1)
        return stream.aside(position, WEIGHT_BITS) >> WEIGHT_BITS - rest < threshold


class Scratch:
    """The arrays that drawing needs besides its result: nothing is allocated a batch."""

    def __init__(self, size: int) -> None:
        """Make them for batches of `size`."""
        self.places = np.empty(size, np.intp)
        self.words = np.empty(size, np.uint32)
        self.flags = np.empty(size, np.bool_)
