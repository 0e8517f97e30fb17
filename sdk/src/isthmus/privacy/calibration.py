"""How much noise a budget asks for."""

import math
from collections.abc import Callable
from typing import Final

from isthmus.privacy.cost import Cost, Limit, fits

_FIRST: Final = 1000  # significands of four digits: 1000 to 9999
_PER_DECADE: Final = 9 * _FIRST
LOWEST: Final = 0.01
HIGHEST: Final = 1e5


def smallest_noise_multiplier(
    cost_of: Callable[[float], Cost], limit: Limit, *, low: float = LOWEST, high: float = HIGHEST
) -> float:
    """The least noise multiplier of four significant digits with which a cost keeps a limit.

    Four digits are the same number on every machine, can be read aloud, and waste less than a thousandth of noise.

    Args:
        cost_of: what everything costs together with noise multiplier z, *including what the budget holds already*;
            falling in z. Called about 17 times.
        limit: the budget's.
        low: the least z that is looked at; > 0.
        high: the largest.

    Returns:
        z such that cost_of(z) keeps the limit. 0.999 z does not, unless z is `low`, rounded up to four digits.

    Raises:
        ValueError: not even `high` keeps the limit, or `low` and `high` are no range.
    """
    if not 0 < low <= high < math.inf:
        raise ValueError(f"{low} to {high} is no range of noise multipliers")
    first, last = _index_above(low), _index_above(high)
    if not fits(cost_of(_multiplier(last)), limit):
        raise ValueError(
            f"No noise is enough: with a noise multiplier of {_multiplier(last):g} the cost is still above what is left"
            " of the budget. Ask for a larger epsilon or delta, for fewer rounds or a smaller model, or for a dataset"
            " whose budget is not used up."
        )
    while first < last:  # `last` keeps the limit; what is below `first` does not
        middle = (first + last) // 2
        if fits(cost_of(_multiplier(middle)), limit):
            last = middle
        else:
            first = middle + 1
    return _multiplier(last)


def _multiplier(index: int) -> float:
    """The number at this place among all numbers of four significant digits; 0 is the place of 1."""
    decade, digits = divmod(index, _PER_DECADE)
    return float(f"{_FIRST + digits}e{decade - 3}")


def _index_above(value: float) -> int:
    """The place of the smallest number of four significant digits that is not below `value`."""
    decade = math.floor(math.log10(value))
    index = decade * _PER_DECADE + max(0, math.floor(value / 10.0 ** (decade - 3)) - _FIRST) - 1
    while _multiplier(index) < value:
        index += 1
    return index
