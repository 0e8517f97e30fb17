"""Exact samples of the discrete Gaussian, by the ten million a second.

D(sigma^2) gives the integer z the mass exp(-z^2 / (2 sigma^2)) / sum over all integers. Nothing here is a rounded
float Gaussian: where a decision hangs on a real number it is made on more random bits and more digits until it is
certain.

* sigma^2 up to `TABLE_VARIANCE`: an alias table (Walker 1977, Vose 1991) whose weights are integers of 2^-256.
* above: z = 2^j y + u, with y from the half of D(sigma^2 / 4^j), which has a table too, and u uniform below 2^j; kept
  with probability exp(-u (u + 2^(j+1) y) / (2 sigma^2)). That is the discrete Gaussian's non-negative half (Ducas,
  Durmus, Lepoint and Lyubashevsky 2013, "Lattice Signatures and Bimodal Gaussians", https://eprint.iacr.org/2013/383,
  section 6, for another base). A fair sign follows, and one of the two zeros is dropped.

Both decisions look at a 32-bit word first. A table's threshold is compared by its leading bits, an acceptance by a
float64 whose error is known; the rare draw that this leaves open (one in 2^20, one in 2^31) is decided on more bits of
its own (`Keystream.aside`), exactly. So the samples are a function of the key alone: not of the machine's `exp`, nor of
how many are asked for at a time.

**How exact.** Weights are rounded to 2^-256 and the tables end beyond 17.1 sigma, where less than 2^-209 is left. With
the acceptance above (at least 0.9) one sample is within total variation 2^-208 of its claim, given uniform bits. If n
samples replace the ideal ones, delta grows by at most n (1 + e^epsilon) 2^-208 < n 2^-63 for any epsilon up to 100.
That is the 2^-63 a draw that `cost.Cost` counts.
"""

import math
from functools import lru_cache
from typing import Any, Final

import mpmath
import numpy as np
from numpy.typing import NDArray

from isthmus.privacy.keystream import Keystream

MAX_VARIANCE: Final = 1 << 62
TABLE_VARIANCE: Final = 1 << 10
"""The largest sigma^2 with a table of its own. Above, y's sigma is in (16, 32]."""

_BITS: Final = 256  # of a table's weights
_DIGITS: Final = 384  # bits that the weights are computed with
_REACH: Final = 17.1  # sigmas: exp(-17.1^2 / 2) < 2^-210
_WORD: Final = 32
_MARGIN: Final = 2.0**-32 + 2.0**-47  # the word's own width, and more than float64 errs in exp(-x) of x = num / 2 sigma^2
_BATCH: Final = 1 << 14

Integers = NDArray[np.int64]
