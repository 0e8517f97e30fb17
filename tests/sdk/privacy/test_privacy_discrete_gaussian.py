"""The sampler: its tables exactly, its samples by chi-square under fixed keys, and its rare decisions one by one."""

import copy
import math
import os
import pickle
import tracemalloc
from typing import Any

import mpmath
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import chi2

from isthmus.privacy import discrete_gaussian
from isthmus.privacy.alias_table import WEIGHT_BITS, AliasTable, Scratch
from isthmus.privacy.discrete_gaussian import MAX_VARIANCE, TABLE_VARIANCE, DiscreteGaussian, Noise, below_exp
from isthmus.privacy.keystream import Keystream, KeystreamForked

KEY = bytes(range(32))
DRAWS = 4_000_000
FIRST_OF_4 = [2, 4, 4, 1, 2, 0, 1, 0]
FIRST_OF_A_MILLION_SQUARED = [213367, 272216, -1553897, 966133, 534113, 311780, -676434, 454833]


def masses(variance: int) -> dict[int, Any]:
    """The distribution itself, with 100 digits."""
    reach = math.ceil(30 * math.sqrt(variance))
    with mpmath.workdps(100):
        weights = {z: mpmath.exp(-mpmath.mpf(z * z) / (2 * variance)) for z in range(-reach, reach + 1)}
        total = mpmath.fsum(weights.values())
        return {z: weight / total for z, weight in weights.items()}


def table_masses(table: AliasTable) -> dict[int, Any]:
    """What a table draws with which probability, as its thresholds say, exactly."""
    cells, whole = 1 << table.bits, 1 << WEIGHT_BITS
    found: dict[int, int] = {}
    for cell, threshold in enumerate(table._thresholds):
        for value, weight in ((table._values[2 * cell + 1], threshold), (table._values[2 * cell], whole - threshold)):
            found[int(value)] = found.get(int(value), 0) + weight
    with mpmath.workdps(100):
        return {value: mpmath.mpf(weight) / (cells * whole) for value, weight in found.items() if weight}


@pytest.mark.parametrize("variance", [1, 2, 64, 1000, TABLE_VARIANCE])
def test_the_table_of_a_small_sigma_is_exact_to_the_208th_bit(variance: int) -> None:
    exact, found = masses(variance), table_masses(DiscreteGaussian(variance).table)
    with mpmath.workdps(100):
        apart = mpmath.fsum(abs(found.get(z, 0) - mass) for z, mass in exact.items()) / 2
        assert apart < mpmath.mpf(2) ** -208


@pytest.mark.parametrize("variance", [TABLE_VARIANCE + 1, 4 * TABLE_VARIANCE, 10**5])
def test_candidates_of_a_large_sigma_have_exactly_its_law_once_accepted(variance: int) -> None:
    """2^j y + u, weighted with the chance of keeping it, and with a sign: the discrete Gaussian, but for 2^-208."""
    gaussian = DiscreteGaussian(variance)
    step = 1 << gaussian.shift
    exact, high = masses(variance), table_masses(gaussian.table)
    with mpmath.workdps(100):
        kept = {
            y + u: mass * mpmath.exp(-mpmath.mpf(u * (u + 2 * y)) / (2 * variance))
            for y, mass in high.items()
            for u in range(step)
        }
        total = 2 * mpmath.fsum(kept.values()) - kept[0]
        apart = mpmath.fsum(abs(kept.get(abs(z), 0) / total - mass) for z, mass in exact.items()) / 2
        assert apart < mpmath.mpf(2) ** -208
        assert mpmath.fsum(kept.values()) > 0.9  # acceptance
    assert 256 < variance / 4**gaussian.shift <= 1024


def chi_squared_p(samples: NDArray[np.int64], variance: int) -> float:
    """Of the counts by value, or by runs of values where there are many, against the exact masses."""
    sigma = math.sqrt(variance)
    width = max(1, round(sigma / 50))
    reach = math.ceil(4.5 * sigma / width) * width
    values = np.arange(-reach, reach + width, dtype=np.float64)[: 2 * reach // width * width]
    density = np.exp(-(values**2) / (2 * variance)) / (math.sqrt(2 * math.pi) * sigma if sigma > 3 else theta(variance))
    expected = density.reshape(-1, width).sum(axis=1) * samples.size
    inside = (samples >= -reach) & (samples < values.size - reach)
    observed = np.bincount((samples[inside] + reach) // width, minlength=expected.size)
    observed = np.append(observed, samples.size - inside.sum())
    expected = np.append(expected, samples.size - expected.sum())
    few = expected < 10
    observed, expected = (np.append(counts[~few], counts[few].sum()) for counts in (observed, expected))
    if expected[-1] < 10:
        observed, expected = observed[:-1], expected[:-1]
    return float(chi2.sf(float(((observed - expected) ** 2 / expected).sum()), expected.size - 1))


def theta(variance: int) -> float:
    return math.fsum(math.exp(-z * z / (2 * variance)) for z in range(-100, 101))


@pytest.mark.parametrize("variance", [1, 2, 4, 64, 100, 1024, 1025, 4095, 4097, 6400, 10**6, 10**8])
def test_samples_pass_a_chi_squared_test(variance: int) -> None:
    """Chi-squared, and both sides of the borders between tables."""
    samples = DiscreteGaussian(variance).sample(DRAWS, Keystream(KEY))
    assert chi_squared_p(samples, variance) > 1e-4
    if variance <= 6400:  # of wider ones the test cannot tell
        assert chi_squared_p(samples + 1, variance) < 1e-6


def test_a_sigma_one_percent_off_fails_the_chi_squared_test() -> None:
    samples = DiscreteGaussian(10**6).sample(DRAWS, Keystream(KEY))
    assert chi_squared_p(samples, 1_020_000) < 1e-6


@pytest.mark.parametrize("variance", [1 << 44, MAX_VARIANCE - 12_345, MAX_VARIANCE])
def test_the_widest_noise_has_the_right_moments_and_even_low_bits(variance: int) -> None:
    count = 1_000_000
    samples = DiscreteGaussian(variance).sample(count, Keystream(KEY))
    scaled = samples / math.sqrt(variance)
    assert abs(scaled.mean()) < 5 / math.sqrt(count)
    assert abs(np.square(scaled).mean() - 1) < 5 * math.sqrt(2 / count)
    assert abs((scaled**4).mean() - 3) < 5 * math.sqrt(96 / count)
    quantiles = np.array([mpmath.sqrt(2) * mpmath.erfinv(2 * k / 64 - 1) for k in range(1, 64)], np.float64)
    counts = np.bincount(np.searchsorted(quantiles, scaled), minlength=64)
    assert chi2.sf(float(((counts - count / 64) ** 2 / (count / 64)).sum()), 63) > 1e-4
    low = np.bincount(samples & 1023, minlength=1024)
    assert chi2.sf(float(((low - count / 1024) ** 2 / (count / 1024)).sum()), 1023) > 1e-4


@pytest.mark.parametrize(
    ("variance", "of_samples", "at_zero"),
    [(1, 0.999999788768, 0.398942278267), (4, 4.000000, 0.199471140201)],
)
def test_the_variance_and_the_mass_at_zero_are_the_known_ones(variance: int, of_samples: float, at_zero: float) -> None:
    """Canonne, Kamath and Steinke 2020: the variance is at most sigma^2."""
    drawn = table_masses(DiscreteGaussian(variance).table)
    assert float(mpmath.fsum(z * z * mass for z, mass in drawn.items())) == pytest.approx(of_samples, abs=1e-10)
    assert float(drawn[0]) == pytest.approx(at_zero, abs=1e-12)
    samples = DiscreteGaussian(variance).sample(DRAWS, Keystream(KEY))
    assert abs(float((samples == 0).mean()) - at_zero) < 5 * math.sqrt(at_zero / DRAWS)


def test_the_same_key_gives_the_same_noise_for_ever() -> None:
    """Literal: a service that draws a stored round's noise again may be a later version of itself."""
    assert DiscreteGaussian(4).sample(8, Keystream(KEY)).tolist() == FIRST_OF_4
    assert DiscreteGaussian(10**12).sample(8, Keystream(KEY)).tolist() == FIRST_OF_A_MILLION_SQUARED


@pytest.mark.parametrize("variance", [9, 10**9])
def test_noise_does_not_depend_on_how_it_is_divided(variance: int) -> None:
    whole = Noise(variance, Keystream(KEY)).take(100_000)
    noise = Noise(variance, Keystream(KEY))
    parts = [noise.take(count) for count in (0, 1, 7, 16_384, 16_383, 50_000)]
    rest = np.arange(100_000 - sum(part.size for part in parts))
    added = rest.copy()
    noise.add_to(added)
    assert np.concatenate([*parts, added - rest]).tobytes() == whole.tobytes()


def test_adding_noise_keeps_every_digit_of_large_integers() -> None:
    base = np.full(1000, (1 << 60) + 1)
    Noise(4, Keystream(KEY)).add_to(base)
    assert (base - (1 << 60) - 1).tobytes() == Noise(4, Keystream(KEY)).take(1000).tobytes()


def test_noise_that_is_ready_can_neither_be_copied_nor_used_in_a_fork() -> None:
    noise = Noise(100, Keystream())
    noise.take(1)
    for double in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be copied"):
            double(noise)
    child = os.fork()
    if not child:
        try:
            noise.take(1)
        except KeystreamForked:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_no_two_releases_share_noise() -> None:
    one, other = (DiscreteGaussian(10**6).sample(100_000, Keystream()) for _ in range(2))
    assert abs(float(np.corrcoef(one, other)[0, 1])) < 6 / math.sqrt(100_000)
    assert (one == other).mean() < 0.01


@pytest.mark.parametrize("variance", [1025, 10**9])
def test_decisions_by_floats_are_those_of_exact_arithmetic(variance: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = Noise(variance, Keystream(KEY))._batch()
    asked = []
    exact = discrete_gaussian.below_exp
    monkeypatch.setattr(discrete_gaussian, "below_exp", lambda *given: asked.append(1) or exact(*given))
    monkeypatch.setattr(discrete_gaussian, "_OPEN", 2.0**-5)
    assert Noise(variance, Keystream(KEY))._batch().tobytes() == fast.tobytes()
    assert len(asked) > 500


def test_a_word_that_leaves_the_acceptance_open_is_decided_by_more_bits() -> None:
    """exp(-1/7) = 0.866877899..., to 352 bits; a number that begins like it is below or not by what follows."""
    with mpmath.workprec(400):
        bits = int(mpmath.floor(mpmath.exp(-mpmath.mpf(1) / 7) * mpmath.mpf(2) ** 352))
    word, tail = bits >> 320, bits & ((1 << 320) - 1)
    for change, expected in ((-(1 << 70), True), (1 << 70, False), (-(1 << 150), True), (1 << 150, False)):
        given = []
        number = tail + change

        def more(count: int, number: int = number, given: list[int] = given) -> int:
            given.append(count)
            return number >> 320 - count

        assert below_exp(word, 1, 7, more) is expected
        assert given[-1] == (256 if abs(change) == 1 << 70 else 192)
    for other, expected in ((word - 1, True), (word + 1, False)):
        assert below_exp(other, 1, 7, lambda count: 1 << count - 1) is expected


class Scripted:
    """A keystream whose words, and what lies aside of them, are given."""

    def __init__(self, words: list[int], aside: int) -> None:
        self.words, self.further, self.asked, self.position = words, aside, [], 40  # type: ignore[var-annotated]

    def take(self, count: int, dtype: Any) -> NDArray[np.uint32]:
        assert (count, dtype) == (len(self.words), np.uint32)
        return np.array(self.words, np.uint32)

    def aside(self, position: int, bits: int) -> int:
        self.asked.append((position, bits))
        return self.further


def test_a_word_that_equals_a_threshold_is_decided_by_the_thresholds_further_bits() -> None:
    third, whole = (1 << 256) // 3, 1 << 256
    table = AliasTable([third, 2 * whole - third], [5, 9])
    leading, rest = third >> 225, third & ((1 << 225) - 1)
    word = leading << 1  # cell 0: 5 below the threshold, else 9
    for further, expected in (((rest - 1) << 31, 5), (rest << 31, 9), ((rest << 31) - 1, 5)):
        stream = Scripted([1, word, word - 2, word + 2], further)
        out = np.empty(4)
        table.draw(stream, out, Scratch(4))  # type: ignore[arg-type]
        assert out.tolist() == [9, expected, 5, 9]
        assert stream.asked == [(44, 256)]


def test_weights_that_do_not_add_up_make_no_table() -> None:
    with pytest.raises(ValueError, match="add up"):
        AliasTable([1 << 256, (1 << 256) - 1], [0, 1])


@pytest.mark.parametrize("wrong", [0, -1, MAX_VARIANCE + 1, 4.0, math.nan, None])
def test_a_variance_that_cannot_be_sampled_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="whole number from 1"):
        DiscreteGaussian(wrong)


def test_drawing_into_an_array_needs_no_memory_of_its_size() -> None:
    out = np.zeros(4_000_000, np.int64)
    noise = Noise(10**6, Keystream(KEY))
    noise.take(1)
    tracemalloc.start()
    noise.add_to(out)
    noise.fill(out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
