"""Noised counts instead of exact quality."""

import math

import numpy as np
import pytest

from isthmus_worker.private_evaluation import noised_quality, sensitivity


def test_the_counts_are_noised_by_sqrt_2_times_the_multiplier_afresh() -> None:
    found = [noised_quality(1000, 700, 2.0) for _ in range(1500)]
    examples = np.array([one["examples"] for one in found])
    right = np.array([one["accuracy"] * one["examples"] for one in found])
    for noised, exact in ((examples, 1000), (right, 700)):
        assert noised.mean() == pytest.approx(exact, abs=0.5)
        assert noised.std() == pytest.approx(2.0 * math.sqrt(2.0), rel=0.12)
        assert len(set(noised)) > 10
    assert abs(np.corrcoef(examples, right)[0, 1]) < 0.15


@pytest.mark.parametrize(
    ("examples", "right", "noise"), [(0, 0, 0.01), (0, 0, 100.0), (5, 5, 10_000.0), (10**6, 0, 1.0)]
)
def test_what_leaves_is_such_as_some_records_could_give(examples: int, right: int, noise: float) -> None:
    for _ in range(50):
        found = noised_quality(examples, right, noise)
        assert set(found) == {"examples", "accuracy"}
        assert found["examples"] >= 1
        assert found["examples"].is_integer()
        assert 0.0 <= found["accuracy"] <= 1.0


def test_little_noise_tells_the_counts_nearly_and_the_sensitivity_is_never_below_its_bound() -> None:
    assert noised_quality(200, 150, 0.01) == {"examples": 200.0, "accuracy": pytest.approx(0.75, abs=0.001)}
    for scale in (1, 2, 3, 1024, 1 << 20):
        assert sensitivity(scale) ** 2 >= 2 * scale**2 > (sensitivity(scale) - 1) ** 2
