"""What a ledger adds up: costs and limits in whole numbers, so that no sum depends on its order.

A `Cost` holds the Rényi curve of a release in billionths of a nat, rounded up, and how many integers of noise it drew.
A `Limit` is what a budget of (epsilon, delta) allows, rounded down. Reserving a slice for each round, spending them one
by one and giving back the rest ends at exactly what was spent, in Python and in a database's 64-bit columns alike.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from operator import add
from typing import Final

from isthmus.privacy.conversion import check_delta, epsilon_of, limit_of
from isthmus.privacy.events import Event, rdp_of
from isthmus.privacy.rdp import ORDERS, ORDERS_VERSION

NANO: Final = 1_000_000_000
MAX_EPSILON: Final = 100.0
"""No budget is larger. e^100 promises nothing already."""
CAP: Final = 128 * NANO
"""A component of one event's cost stops here: no limit reaches it, whatever its order and delta (the largest is
MAX_EPSILON + log 2 at order 2)."""
MAX_DRAWS: Final = 1 << 43
"""Integers of noise in one event. A million such slices stay below 2^63, as a million components at `CAP` do."""
MAX_TOTAL_DRAWS: Final = 1 << 62
SAMPLER_SHARE: Final = 0.01
"""The part of a budget's delta that is kept for what the sampler's draws differ from the distribution they claim."""
DRAW_DELTA: Final = 2.0**-63
"""What one drawn integer may add to delta, at any epsilon up to MAX_EPSILON: see `discrete_gaussian`."""

# Floats are computed to about 1e-15; what is rounded to a billionth is moved by more than that, to the safe side.
_RELATIVE: Final = 2.0**-40
_ABSOLUTE: Final = 1e-3


@dataclass(frozen=True)
class Cost:
    """What a release costs. Costs add up, and can be taken so many times.

    Attributes:
        nano: the Rényi divergence at each of `rdp.ORDERS`, in billionths of a nat, rounded up; >= 0. A component of
            `CAP` or more promises nothing.
        draws: integers of noise that were drawn.
    """

    nano: tuple[int, ...]
    draws: int

    def __post_init__(self) -> None:
        """Refuses what was not counted over this version's orders."""
        if len(self.nano) != len(ORDERS):
            raise ValueError(f"a cost has {len(ORDERS)} components ({ORDERS_VERSION}), not {len(self.nano)}")
        if self.draws < 0 or min(self.nano) < 0:
            raise ValueError("a cost is not negative")

    @classmethod
    def of(cls, event: Event, draws: int) -> "Cost":
        """The cost of one event.

        Args:
            event: what is released.
            draws: integers of noise drawn for it, over all its repetitions; 0 to `MAX_DRAWS`.

        Raises:
            ValueError: `draws` is outside of its range.
        """
        if not 0 <= draws <= MAX_DRAWS:
            raise ValueError(f"one release draws {draws} integers of noise; at most {MAX_DRAWS} are counted")
        return cls(_nano_of(event), draws)

    @classmethod
    def zero(cls) -> "Cost":
        """The cost of releasing nothing."""
        return _ZERO

    def __add__(self, other: "Cost") -> "Cost":
        """Both, one after the other."""
        return Cost(tuple(map(add, self.nano, other.nano)), self.draws + other.draws)

    def __mul__(self, times: int) -> "Cost":
        """The same so many times; not negative."""
        return Cost(tuple(value * times for value in self.nano), self.draws * times)

    __rmul__ = __mul__

    def epsilon(self, delta: float) -> float:
        """The epsilon to report for this cost, at `delta`: by Rényi divergence, at the part of delta that `Limit` uses.

        Returns:
            Infinite where the draws alone use up their share of delta, or where no order promises anything.

        Raises:
            ValueError: `delta` is not above 0 and below 1.
        """
        check_delta(delta)
        if self.draws > _draws_within(delta):
            return math.inf
        curve = tuple(value / NANO if value < CAP else math.inf for value in self.nano)
        return epsilon_of(curve, (1 - SAMPLER_SHARE) * delta)[0]


@dataclass(frozen=True)
class Limit:
    """What a budget allows.

    Attributes:
        nano: the largest Rényi divergence at each of `rdp.ORDERS`, in billionths of a nat, rounded down; negative at
            orders that cannot promise so little.
        draws: the most integers of noise that may be drawn, over the budget's life.
    """

    nano: tuple[int, ...]
    draws: int

    def __post_init__(self) -> None:
        """Refuses what was not counted over this version's orders."""
        if len(self.nano) != len(ORDERS):
            raise ValueError(f"a limit has {len(ORDERS)} components ({ORDERS_VERSION}), not {len(self.nano)}")

    @classmethod
    def of(cls, epsilon: float, delta: float) -> "Limit":
        """The limit of a budget.

        Args:
            epsilon: above 0, at most `MAX_EPSILON`.
            delta: above 0 and below 1, of which `SAMPLER_SHARE` is kept for the sampler.

        Raises:
            ValueError: an argument outside of its range.
        """
        if not 0 < epsilon <= MAX_EPSILON:
            raise ValueError(f"epsilon is {epsilon}; a budget's is above 0 and at most {MAX_EPSILON:g}")
        check_delta(delta)
        curve = limit_of(epsilon, (1 - SAMPLER_SHARE) * delta)
        return cls(tuple(map(_rounded_down, curve)), _draws_within(delta))


def fits(cost: Cost, limit: Limit) -> bool:
    """Whether everything that `cost` sums up keeps the budget: few enough draws, and *some* order within its limit."""
    return cost.draws <= limit.draws and any(
        value <= allowed for value, allowed in zip(cost.nano, limit.nano, strict=True)
    )


def times_within(cost: Cost, limit: Limit, *, already: Cost | None = None) -> int:
    """How many times `cost` fits into a budget of which `already` is taken.

    Args:
        cost: of one job, or of one round; not zero.
        limit: the budget's.
        already: reserved and spent so far; None for nothing.

    Returns:
        The largest number of times, from 0.

    Raises:
        ValueError: `cost` is zero at some order: it would fit for ever.
    """
    if min(cost.nano) == 0:
        raise ValueError("what costs nothing fits for ever")
    taken = Cost.zero() if already is None else already
    by_order = max(
        (allowed - spent) // value for value, spent, allowed in zip(cost.nano, taken.nano, limit.nano, strict=True)
    )
    by_draws = (limit.draws - taken.draws) // cost.draws if cost.draws else by_order
    return max(0, min(by_order, by_draws))


def _draws_within(delta: float) -> int:
    return min(math.floor(SAMPLER_SHARE * delta / DRAW_DELTA), MAX_TOTAL_DRAWS)


@lru_cache(maxsize=4096)
def _nano_of(event: Event) -> tuple[int, ...]:
    return tuple(map(_rounded_up, rdp_of(event)))


def _rounded_up(value: float) -> int:
    if value == 0:
        return 0
    scaled = value * NANO * (1 + _RELATIVE) + _ABSOLUTE
    return math.ceil(scaled) if scaled < CAP else CAP  # also where it is infinite


def _rounded_down(value: float) -> int:
    scaled = value * NANO
    return math.floor(scaled - abs(scaled) * _RELATIVE - _ABSOLUTE)


_ZERO: Final = Cost((0,) * len(ORDERS), 0)
