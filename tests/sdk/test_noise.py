"""Noise: its distribution, where its seed comes from, and that it is never the same twice."""

import inspect
import math
import os

import numpy as np
import pytest

from isthmus.privacy.clipping import NonFiniteUpdate
from isthmus.privacy.noise import gaussian_noise

N = 200_000


def fixed(count: int) -> bytes:
    return bytes(range(count))


def test_noise_has_the_standard_deviation_that_was_asked_for() -> None:
    update = {"a": np.full((2, N // 2), 3.0, "<f4"), "b": np.full(N, -1.0)}
    noised = gaussian_noise(update, 0.5, 4.0, entropy=fixed)
    for name, centre in (("a", 3.0), ("b", -1.0)):
        noise = noised[name].astype(np.float64) - centre
        assert (noised[name].dtype, noised[name].shape) == (update[name].dtype, update[name].shape)
        assert abs(noise.mean()) < 6 * 2.0 / math.sqrt(N)
        assert abs(noise.std() - 2.0) < 6 * 2.0 / math.sqrt(2 * N)
        z = noise.reshape(-1) / 2.0  # the tails of a normal distribution, within six standard errors
        for at, share in ((1.0, 0.3173105), (2.0, 0.0455003), (3.0, 0.0026998)):
            assert abs((np.abs(z) > at).mean() - share) < 6 * math.sqrt(share / N)
    correlation = np.corrcoef(noised["a"].reshape(-1), noised["b"])[0, 1]
    assert abs(correlation) < 6 / math.sqrt(N)


def test_every_call_draws_anew_from_the_operating_system() -> None:
    update = {"a": np.zeros(100, "<f4")}
    first, second = gaussian_noise(update, 1.0, 1.0)["a"], gaussian_noise(update, 1.0, 1.0)["a"]
    assert not (first == second).any()
    assert update["a"].tolist() == [0] * 100
    assert inspect.signature(gaussian_noise).parameters["entropy"].default is os.urandom


def test_the_seed_has_256_bits_and_is_drawn_once() -> None:
    asked: list[int] = []

    def recorded(count: int) -> bytes:
        asked.append(count)
        return bytes(count)

    gaussian_noise({"a": np.zeros(3, "<f4"), "b": np.zeros(3, "<f4")}, 1.0, 1.0, entropy=recorded)
    assert asked == [32]


def test_noise_does_not_depend_on_the_order_of_the_names() -> None:
    a, b = np.zeros(5, "<f4"), np.zeros(7, "<f4")
    one = gaussian_noise({"a": a, "b": b}, 1.0, 1.0, entropy=fixed)
    other = gaussian_noise({"b": b, "a": a}, 1.0, 1.0, entropy=fixed)
    assert all(one[name].tobytes() == other[name].tobytes() for name in "ab")


def test_no_noise_gives_the_update_back_and_draws_nothing() -> None:
    def never(count: int) -> bytes:
        raise AssertionError(count)

    update = {"a": np.array([1.0, -0.0], "<f4")}
    assert gaussian_noise(update, 0.0, 1.0, entropy=never)["a"].tobytes() == update["a"].tobytes()


@pytest.mark.parametrize(
    ("noise_multiplier", "clip_norm"), [(-1, 1), (math.nan, 1), (math.inf, 1), (1, 0), (1, -1), (1, math.inf), (0, 0)]
)
def test_arguments_out_of_range_are_refused(noise_multiplier: float, clip_norm: float) -> None:
    with pytest.raises(ValueError, match="must be finite"):
        gaussian_noise({"a": np.zeros(1, "<f4")}, noise_multiplier, clip_norm)


def test_a_sum_that_overflows_is_refused() -> None:
    with pytest.raises(NonFiniteUpdate, match="'a'"):
        gaussian_noise({"a": np.zeros(100, "<f4")}, 1e30, 1e30)


def test_the_documentation_claims_no_epsilon() -> None:
    documentation = inspect.getdoc(inspect.getmodule(gaussian_noise)) or ""
    assert "supports no claim of an epsilon" in documentation
