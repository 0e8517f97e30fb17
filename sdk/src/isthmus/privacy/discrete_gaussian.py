"""Exact samples of the discrete Gaussian, tens of millions a second.

D(sigma^2) gives the integer z the mass exp(-z^2 / (2 sigma^2)), divided by the sum over all integers. Nothing here is a
rounded float Gaussian: where a decision hangs on a real number, it is made on more random bits and more digits until
it is certain.

* sigma^2 up to `TABLE_VARIANCE`: an alias table whose weights are whole numbers of 2^-256.
* above: z = 2^j y + u, with y from the non-negative half of D(sigma^2 / 4^j), which has a table, and u uniform below
  2^j; kept with probability exp(-u (u + 2^(j+1) y) / (2 sigma^2)). Then a fair sign, and only one of the two zeros
  (Ducas, Durmus, Lepoint and Lyubashevsky 2013, "Lattice Signatures and Bimodal Gaussians", section 6,
  https://eprint.iacr.org/2013/383, with another table).

Both decisions look at 32 bits first: a table at its threshold's leading bits, the acceptance at a float64 whose error
is known. The few draws that this leaves open (one in 2^20, one in 2^31) are decided on more bits of their own
(`Keystream.aside`). So the samples are a function of the key alone: neither of the machine's `exp`, nor of how many are
asked for at a time.

**How exact.** The weights are rounded to 2^-256, and the tables end beyond 17.1 sigma, where less than 2^-209 is left.
Of the candidates above, nine tenths are kept at least; so one sample is within total variation 2^-208 of its claim,
given uniform bits. Where n samples stand for ideal ones, delta grows by at most n (1 + e^epsilon) 2^-208, which is
below n 2^-63 for every epsilon up to 100. That is what `cost.Cost` counts a draw as.
"""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Final, NoReturn

import mpmath
import numpy as np
from numpy.typing import NDArray

from isthmus.privacy.alias_table import WEIGHT_BITS, AliasTable, Scratch
from isthmus.privacy.keystream import Keystream

MAX_VARIANCE: Final = 1 << 62
TABLE_VARIANCE: Final = 1 << 10
"""The largest sigma^2 with a table of its own. Above, y has a sigma between 16 and 32."""

_REACH: Final = 17.1  # sigmas: exp(-17.1^2 / 2) < 2^-210
_PRECISION: Final = 384  # bits that a table's weights are computed with
_WORD: Final = 32
# What the acceptance's 32 bits leave open, and more than float64 can err in exp(-x) for the x < 3 that occur.
_OPEN: Final = 2.0**-_WORD + 2.0**-47
_BATCH: Final = 1 << 14

Integers = NDArray[np.int64]


class DiscreteGaussian:
    """The distribution D(sigma^2). It holds tables, which nothing changes: any number of streams may sample from it."""

    def __init__(self, variance: int) -> None:
        """Prepare to sample; some milliseconds, or nothing for a variance that was used lately.

        Args:
            variance: sigma^2, a whole number from 1 to `MAX_VARIANCE`. The samples' own variance is at most that.

        Raises:
            ValueError: it is not.
        """
        if not (isinstance(variance, int) and 1 <= variance <= MAX_VARIANCE):
            raise ValueError(f"the noise's sigma^2 is {variance}; it must be a whole number from 1 to {MAX_VARIANCE}")
        self.variance = variance
        self.shift = 0  # j
        while variance > TABLE_VARIANCE << 2 * self.shift:
            self.shift += 1
        self.table = _table(variance, self.shift)

    def sample(self, count: int, stream: Keystream) -> Integers:
        """So many independent samples. `Noise` draws them as they are needed.

        Raises:
            KeystreamForked: this process is a fork of the one that made the stream.
        """
        return Noise(self.variance, stream).take(count)


class Noise:
    """Samples of D(sigma^2) from one keystream, as they are needed.

    The same key gives the same samples, however they are divided into calls. Some 1 MiB; not for several threads.
    """

    def __init__(self, variance: int, stream: Keystream) -> None:
        """Begin; nothing is drawn yet.

        Args:
            variance: sigma^2, a whole number from 1 to `MAX_VARIANCE`.
            stream: at its beginning, and used for nothing else.

        Raises:
            ValueError: `variance` is outside of its range.
        """
        self._gaussian = DiscreteGaussian(variance)
        self._stream = stream
        self._scratch = Scratch(_BATCH)
        self._high, self._low, self._total, self._sign = np.empty((4, _BATCH))
        self._ready = self._high[:0]

    def take(self, count: int) -> Integers:
        """The next `count` samples, int64."""
        found = np.empty(count, np.int64)
        self.fill(found)
        return found

    def fill(self, out: Integers) -> None:
        """Overwrite `out`, one-dimensional, with the next samples."""
        for part, samples in self._parts(out):
            np.copyto(part, samples, casting="unsafe")  # whole numbers below 2^53

    def add_to(self, out: Integers) -> None:
        """Add the next samples to `out`, one-dimensional, in place."""
        for part, samples in self._parts(out):
            np.add(part, samples.astype(np.int64), out=part)

    def __reduce__(self) -> NoReturn:
        """Refuses to be copied or pickled: two of the same would give two releases the same noise."""
        raise TypeError("noise cannot be copied or pickled")

    def _parts(self, out: Integers) -> Iterator[tuple[Integers, NDArray[np.float64]]]:
        self._stream.require_own_process()  # samples that are ready are no fork's either
        done = 0
        while done < out.size:
            if not self._ready.size:
                self._ready = self._batch()
            samples, self._ready = self._ready[: out.size - done], self._ready[out.size - done :]
            yield out[done : done + samples.size], samples
            done += samples.size

    def _batch(self) -> NDArray[np.float64]:
        """The next samples, as whole float64."""
        self._gaussian.table.draw(self._stream, self._high, self._scratch)
        return self._refined() if self._gaussian.shift else self._high

    def _refined(self) -> NDArray[np.float64]:
        """Of the candidates 2^j y + u those that are kept, with their signs."""
        high, low, total, sign, scratch = self._high, self._low, self._total, self._sign, self._scratch
        words = self._stream.take(_BATCH, np.uint32)
        np.copyto(sign, words.view(np.int32))  # the uppermost bit; u has the lowest j, which are 26 at most
        np.copyto(low, np.bitwise_and(words, np.uint32((1 << self._gaussian.shift) - 1), out=scratch.words))
        np.add(high, low, out=total)
        chance = np.multiply(low, np.add(high, total, out=high), out=high)  # u (u + 2^(j+1) y)
        chance *= -0.5 / self._gaussian.variance
        np.exp(chance, out=chance)
        position = self._stream.position
        words = self._stream.take(_BATCH, np.uint32)
        above = np.multiply(words, 2.0**-_WORD, out=low)
        above -= chance
        kept = np.less(above, 0.0, out=scratch.flags)
        if np.abs(above, out=above).min() < _OPEN:
            for place in np.flatnonzero(above < _OPEN):
                kept[place] = self._is_kept(int(total[place]), int(words[place]), position + 4 * int(place))
        if not total.min():
            kept &= (total > 0) | (sign >= 0)
        signed: NDArray[np.float64] = np.copysign(total, sign, out=total)[kept]
        return signed

    def _is_kept(self, total: int, word: int, position: int) -> bool:
        """The same decision on as many bits as it takes."""
        low = total & ((1 << self._gaussian.shift) - 1)
        return below_exp(
            word, low * (2 * total - low), 2 * self._gaussian.variance, lambda bits: self._stream.aside(position, bits)
        )


def below_exp(word: int, numerator: int, denominator: int, more: Callable[[int], int]) -> bool:
    """Whether a uniform number in [0, 1) is below exp(-numerator / denominator), decided exactly.

    Args:
        word: the number's first 32 bits.
        numerator: not negative.
        denominator: above 0.
        more: so many bits that follow the first; asked again, it gives the same ones and more after them.
    """
    numbers = mpmath.MPContext()  # of its own: precision is a setting that threads would share
    further = 0
    while True:
        further += 64
        numbers.prec = _WORD + further + 64
        exact = numbers.exp(-numbers.mpf(numerator) / denominator)
        least = int(numbers.floor(exact * numbers.mpf(2) ** (_WORD + further)))
        number = word << further | more(further)
        if number < least - 1:
            return True
        if number > least + 1:
            return False


@lru_cache(maxsize=32)
def _table(variance: int, shift: int) -> AliasTable:
    """Of all of D(variance), or, where `shift` is not 0, of 2^shift y for y in the non-negative half."""
    reach = math.ceil(_REACH * math.sqrt(variance) / 2.0**shift) + 2
    values = range(0 if shift else -reach, reach + 1)
    numbers = mpmath.MPContext()
    numbers.prec = _PRECISION
    exponent = -(numbers.mpf(4) ** shift) / (2 * variance)
    masses = [numbers.exp(exponent * value * value) for value in values]
    cells = 1 << max(1, (len(masses) - 1).bit_length())
    unit = cells * numbers.mpf(2) ** WEIGHT_BITS / numbers.fsum(masses)
    weights = [int(numbers.nint(mass * unit)) for mass in masses]
    weights[values.index(0)] += (cells << WEIGHT_BITS) - sum(weights)
    return AliasTable(weights, [value << shift for value in values])
