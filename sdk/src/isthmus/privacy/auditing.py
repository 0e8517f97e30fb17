"""Attacks on a mechanism as it really runs: whether it keeps what it claims, as far as an attacker can tell.

Each takes the *mechanism* itself, from what single units contribute to what is released, with its clipping, its
encoding and its noise, and gives a figure that must not contradict the claim. They find bugs: noise that is missing,
too small, drawn twice or off its lattice; a bound that is no bound. **Passing them proves no privacy**: a lower bound
below the claim says only that these attacks did not succeed.

An audit draws its canaries from a generator that is given. It is not for mechanisms whose noise comes from there too.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.floating[Any]]
Mechanism = Callable[[Sequence[Vector]], Vector]
"""From the vectors of all units that take part to the one vector that is released: the noised sum, in any unit."""

SIGNIFICANT: Final = 1e-6
"""A conformance check whose p-value is below this has failed."""
CONFIDENCE: Final = 0.95

_LEAST_OVERLAP: Final = 1000  # products that a sum needs to be near a normal variable
_LARGEST_EPSILON: Final = 1e6
_HALVINGS: Final = 60


@dataclass(frozen=True)
class NoiseConformance:
    """What two releases of nothing at all looked like.

    Attributes:
        samples: elements that were looked at.
        variance_ratio: the noise's variance in the claimed one's unit.
        variance_p: how likely honest noise is to be off by that much, either way.
        off_lattice: the share of elements, of those where float32 can tell, that are no whole number of steps.
        repetition_p: how likely honest noise is to resemble itself so much, at any distance within both releases.
    """

    samples: int
    variance_ratio: float
    variance_p: float
    off_lattice: float
    repetition_p: float

    @property
    def conforms(self) -> bool:
        """Whether none of the three says otherwise."""
        return min(self.variance_p, self.repetition_p) >= SIGNIFICANT and self.off_lattice == 0


@dataclass(frozen=True)
class CanaryAudit:
    """What the canaries in one release tell.

    Attributes:
        canaries: how many there were.
        estimate: the epsilon of an attacker who looks at cosines, with their mean and deviation as fitted; too large by
            a sixth and some tenths for 300 canaries, by a tenth for 1,000.
        lower_bound: what is left of it with the confidence that was asked for.
    """

    canaries: int
    estimate: float
    lower_bound: float

    def contradicts(self, epsilon: float) -> bool:
        """Whether the claim of this epsilon cannot stand."""
        return self.lower_bound > epsilon


@dataclass(frozen=True)
class OneRunAudit:
    """What guessing who took part in one release tells.

    Attributes:
        canaries: how many there were, about half of which took part.
        guesses: how many of them the attacker dared to guess.
        correct: how many of the guesses were right.
        lower_bound: of epsilon, with 95 % confidence, the choice among several numbers of guesses paid for.
    """

    canaries: int
    guesses: int
    correct: int
    lower_bound: float

    def contradicts(self, epsilon: float) -> bool:
        """Whether the claim of this epsilon cannot stand."""
        return self.lower_bound > epsilon


def noise_conformance(mechanism: Mechanism, *, dimension: int, step: float, variance: int) -> NoiseConformance:
    """Whether the noise is the noise that is claimed, from two releases of one unit that holds zeros.

    Args:
        mechanism: as it really runs.
        dimension: elements of a vector; from 1000. A million tell noise apart that is 1 % too small.
        step: what one lattice step is worth in what is released.
        variance: the claimed sigma^2, in steps.

    Raises:
        ValueError: too few elements, or the mechanism released something else than so many finite numbers.
    """
    if dimension < _LEAST_OVERLAP:
        raise ValueError(f"noise of {dimension} elements says too little; {_LEAST_OVERLAP} are needed")
    released = [np.asarray(mechanism([np.zeros(dimension, np.float32)])) for _ in range(2)]
    if any(one.shape != (dimension,) or not np.isfinite(one).all() for one in released):
        raise ValueError(f"the mechanism did not release {dimension} finite numbers")
    noise = np.concatenate(released).astype(np.float64) / step
    ratio = float(np.square(noise).mean()) / variance
    return NoiseConformance(
        samples=noise.size,
        variance_ratio=ratio,
        variance_p=_chi_squared_p(ratio, noise.size),
        off_lattice=_off_lattice(np.concatenate(released), step),
        repetition_p=_repetition_p(noise),
    )


def unit_canaries(count: int, dimension: int, norm: float, generator: np.random.Generator) -> NDArray[np.float32]:
    """Vectors of this norm in random directions: (count, dimension). They show noise that is too small."""
    drawn = generator.standard_normal((count, dimension), dtype=np.float32)
    drawn *= norm / np.linalg.norm(drawn, axis=1, keepdims=True)
    return drawn


def dense_canaries(count: int, dimension: int, size: float, generator: np.random.Generator) -> NDArray[np.float32]:
    """Vectors of which every element is `size` or its negative: (count, dimension), of norm size * sqrt(dimension).

    They show clipping that bounds each element and not the norm, to which short vectors in random directions are blind.
    """
    signs = generator.integers(0, 2, (count, dimension), dtype=np.int8)
    return np.float32(size) * (2 * signs.astype(np.float32) - 1)


def one_shot_canary(
    mechanism: Mechanism, canaries: NDArray[np.float32], delta: float, *, confidence: float = CONFIDENCE
) -> CanaryAudit:
    """How well canaries are seen in one release in which all of them took part.

    The cosine between what was released and a random direction that did *not* take part is normal, with mean 0 and
    variance 1 / d. Those that did take part are fitted with a normal distribution of their own, and epsilon is what
    tells the two apart, at `delta`. The lower bound takes the least mean that the canaries allow, and the larger of
    both deviations for both: what a fit of few canaries pretends to see in the tails does not count.

    Args:
        mechanism: as it really runs.
        canaries: (count, dimension), drawn at random: `unit_canaries` and, in another audit, `dense_canaries`.
        delta: of the claim; above 0 and below 1.
        confidence: of the lower bound, above 0.5 and below 1. An honest mechanism contradicts its claim with
            probability 1 - confidence at most.

    Source:
        Andrew, Kairouz, Oh, Oprea, McMahan and Suriyakumar 2023, "One-shot Empirical Privacy Estimation for Federated
        Learning", https://arxiv.org/abs/2302.03098, section 3.
    """
    count, dimension = canaries.shape
    cosines = _cosines(canaries, mechanism(list(canaries)))
    null = 1.0 / math.sqrt(dimension)
    mean, deviation = float(cosines.mean()), float(cosines.std(ddof=1))
    wider = max(deviation, null)
    least = abs(mean) - NormalDist().inv_cdf(confidence) * wider / math.sqrt(count)
    return CanaryAudit(
        canaries=count,
        estimate=_normal_epsilon(mean, deviation, null, delta),
        lower_bound=_normal_epsilon(max(0.0, least), wider, wider, delta),
    )


def one_run_audit(
    mechanism: Mechanism, canaries: NDArray[np.float32], delta: float, generator: np.random.Generator
) -> OneRunAudit:
    """How well an attacker guesses, from one release, which canaries a fair coin had let take part.

    Args:
        mechanism: as it really runs.
        canaries: (count, dimension), nearly at right angles to each other: many more elements than canaries.
        delta: of the claim; above 0 and below 1.
        generator: for the coins.

    Source:
        Steinke, Nasr and Jagielski 2023, "Privacy Auditing with One (1) Training Run",
        https://arxiv.org/abs/2305.08846, Algorithm 1 and Theorem 5.2.
    """
    count = len(canaries)
    takes_part = generator.integers(0, 2, count, dtype=np.int8).astype(bool)
    order = np.argsort(_cosines(canaries, mechanism(list(canaries[takes_part]))))
    sides = sorted({max(1, count * share // 200) for share in (1, 2, 5, 10, 25, 50, 90)})  # guesses at either end
    significance = (1 - CONFIDENCE) / len(sides)
    found = []
    for side in sides:
        correct = int(takes_part[order[-side:]].sum() + (~takes_part[order[:side]]).sum())
        bound = epsilon_lower_bound(count, 2 * side, correct, delta, significance=significance)
        found.append(OneRunAudit(count, 2 * side, correct, bound))
    return max(found, key=lambda audit: audit.lower_bound)


def epsilon_lower_bound(
    canaries: int, guesses: int, correct: int, delta: float, *, significance: float = 1 - CONFIDENCE
) -> float:
    """The largest epsilon that so many right guesses refute.

    Args:
        canaries: of which each took part by a fair coin.
        guesses: how many of them were guessed; at most `canaries`.
        correct: how many guesses were right.
        delta: of the claim.
        significance: how likely the answer may be too large.

    Returns:
        epsilon, from 0: a mechanism that keeps (epsilon, delta) would see so many right guesses less often than
        `significance` says. 0 if nothing is refuted.

    Raises:
        ValueError: the numbers contradict each other.

    Source:
        Steinke, Nasr and Jagielski 2023, https://arxiv.org/abs/2305.08846, Theorem 5.2.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(f"{correct} right ones of {guesses} guesses about {canaries} canaries")
    if correct == 0:
        return 0.0
    numbers = np.arange(guesses + 1)
    log_binomials = np.concatenate([[0.0], np.cumsum(np.log(numbers[:0:-1] / numbers[1:]))])

    def likelihood(epsilon: float) -> float:
        """Of so many right guesses at least, if (epsilon, delta) is kept."""
        log_right = -math.log1p(math.exp(-epsilon))
        masses = np.exp(log_binomials + numbers * log_right + (guesses - numbers) * (log_right - epsilon))
        at_least = np.cumsum(masses[::-1])[::-1]
        fewer = at_least[:correct][::-1]  # of 1, 2, ... right guesses less
        gain = float(((fewer - at_least[correct]) / numbers[1 : correct + 1]).max())
        return float(at_least[correct]) + 2 * canaries * delta * gain

    return _bisected(lambda epsilon: likelihood(epsilon) < significance)


def _cosines(canaries: NDArray[np.float32], released: Vector) -> NDArray[np.float64]:
    direction = released.astype(np.float64)
    direction /= max(float(np.linalg.norm(direction)), 1e-300)  # a release of zeros tells nothing
    found: NDArray[np.float64] = (canaries @ direction.astype(np.float32)).astype(np.float64)
    found /= np.linalg.norm(canaries, axis=1)
    return found


def _normal_epsilon(mean: float, deviation: float, null: float, delta: float) -> float:
    """Epsilon between N(0, null^2) and N(mean, deviation^2) at `delta`, the larger of both directions."""
    without, with_it = (0.0, null), (mean, max(deviation, 1e-6 * null))
    return max(
        _bisected(lambda epsilon: _hockey_stick(without, with_it, epsilon) > delta),
        _bisected(lambda epsilon: _hockey_stick(with_it, without, epsilon) > delta),
    )


def _hockey_stick(one: tuple[float, float], other: tuple[float, float], epsilon: float) -> float:
    """The integral of (p - e^epsilon q) where it is positive, for normal densities p and q."""
    (m, s), (n, t) = one, other
    # log p - log q - epsilon = a x^2 + b x + c
    a = (1 / t**2 - 1 / s**2) / 2
    b = m / s**2 - n / t**2
    c = (n**2 / t**2 - m**2 / s**2) / 2 + math.log(t / s) - epsilon
    root = b * b - 4 * a * c
    if abs(a) * (abs(m) + s + abs(n) + t) < 1e-12 * abs(b):
        inside = [(-c / b, math.inf)] if b > 0 else [(-math.inf, -c / b)]
    elif root <= 0:
        inside = [(-math.inf, math.inf)] if a > 0 else []
    else:
        stable = -(b + math.copysign(math.sqrt(root), b)) / 2
        low, high = sorted((stable / a, c / stable))
        inside = [(-math.inf, low), (high, math.inf)] if a > 0 else [(low, high)]
    return sum(_mass(m, s, *ends) - _scaled_mass(n, t, *ends, epsilon) for ends in inside)


def _mass(mean: float, deviation: float, low: float, high: float) -> float:
    """What a normal distribution holds between two ends; differences are taken in the tail that keeps digits."""
    u, v = ((end - mean) / deviation / math.sqrt(2) for end in (low, high))
    return (math.erfc(u) - math.erfc(v)) / 2 if u > 0 else (math.erfc(-v) - math.erfc(-u)) / 2


def _scaled_mass(mean: float, deviation: float, low: float, high: float, epsilon: float) -> float:
    mass = _mass(mean, deviation, low, high)
    return math.exp(min(700.0, epsilon + math.log(mass))) if mass > 0 else 0.0


def _bisected(refutes: Callable[[float], bool]) -> float:
    """The largest epsilon that is refuted, for a test that refutes everything below it; 0 if it refutes nothing."""
    if not refutes(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while high < _LARGEST_EPSILON and refutes(high):
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if refutes(middle) else (low, middle)
    return low


def _chi_squared_p(ratio: float, samples: int) -> float:
    """Both tails of chi^2 / samples beyond `ratio`, by Wilson and Hilferty's cube root: good from 1,000 samples."""
    spread = 2 / (9 * samples)
    return math.erfc(abs(ratio ** (1 / 3) - (1 - spread)) / math.sqrt(2 * spread))


def _off_lattice(released: Vector, step: float) -> float:
    """The share of elements that are not the float nearest to a whole number of steps.

    Of those below 2^22 steps: above, float32 has hardly anything but whole steps to offer.
    """
    steps = np.rint(released.astype(np.float64) / step)
    telling = np.abs(steps) < 1 << 22
    if not telling.any():
        return 0.0
    on = (steps * step).astype(np.float32) == released.astype(np.float32)
    return float(1 - on[telling].mean())


def _repetition_p(noise: NDArray[np.float64]) -> float:
    """How likely independent noise is to match itself so well at some distance: the autocorrelation's largest value."""
    size = 1 << (2 * noise.size - 1).bit_length()  # with as many zeros: nothing wraps around
    spectrum = np.fft.rfft(noise, size)
    products = np.fft.irfft(np.abs(spectrum) ** 2, size)[1 : noise.size - _LEAST_OVERLAP + 1]
    power = float(np.square(noise).mean())
    if power == 0:
        return 0.0
    overlaps = noise.size - np.arange(1, products.size + 1)
    largest = float((np.abs(products) / (power * np.sqrt(overlaps))).max())
    return min(1.0, products.size * math.erfc(largest / math.sqrt(2)))
