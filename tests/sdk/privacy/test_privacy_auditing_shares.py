"""The audits on noise in shares: each member's numbers, real masks, the real unmasking. Members that add no share show.

Shares are drawn from the operating system, as they are in a round; so bounds here are generous: a run that fails by
chance comes once in a million.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from isthmus.federation.aggregation import MemorySink, MemorySource
from isthmus.federation.secured import lattice_of, quantise, sum_tensors, unmask
from isthmus.privacy.auditing import Mechanism, noise_conformance, one_shot_canary, unit_canaries
from isthmus.privacy.planning import noise_shares, plan_of, round_cost
from isthmus.privacy.reporting import analytic_gaussian_epsilon
from isthmus.secagg.derivation import Mask
from isthmus.secagg.masks import add_masks
from isthmus.testing import sample_spec
from isthmus.wire.jobs import JobSpec
from isthmus.wire.privacy import PrivacyPlan
from isthmus.wire.secured import MASKED

CLIP_NORM = 0.5
DELTA = 1e-5
Updates = Sequence[NDArray[Any]]


def job_of(members: int, noise_multiplier: float, colluding: int = 0) -> JobSpec:
    return sample_spec(
        privacy={
            "unit": "organization",
            "where": "distributed",
            "clip_norm": CLIP_NORM,
            "noise_multiplier": noise_multiplier,
            "delta": DELTA,
        },
        secure_aggregation={"max_colluding": colluding},
        cohort={"min_updates": members},
        strategy={"fedavg": {"weights": "uniform"}},
        rounds=1,
    )


def planned(spec: JobSpec, dimension: int) -> PrivacyPlan:
    plan = plan_of(spec, 100, dimension)
    assert plan is not None
    return plan


def secured(spec: JobSpec, members: int, dimension: int, *, without_noise: int = 0) -> Mechanism:
    """A round as it runs: a member for every update, those that are missing hold zeros. The last ones add no noise."""
    plan = planned(spec, dimension)
    silent = sample_spec(
        privacy={"unit": "none", "clip_norm": CLIP_NORM}, secure_aggregation=True, cohort={"min_updates": 3}
    )
    assert lattice_of(silent, None, dimension)[0].scale == lattice_of(spec, plan, dimension)[0].scale
    step = lattice_of(spec, plan, dimension)[0].step

    def release(updates: Updates) -> NDArray[Any]:
        sources, masks = [], []
        for number in range(members):
            update = {"w": updates[number] if number < len(updates) else np.zeros(dimension, np.float32)}
            noisy = number < members - without_noise
            numbers = quantise(update, spec, plan) if noisy else quantise(update, silent, None)
            own, pair, before = (
                hashlib.sha256(f"{kind}/{which % members}".encode()).digest()
                for kind, which in (("self", number), ("pair", number), ("pair", number - 1))
            )
            add_masks(numbers, 0, [Mask(own, 1), Mask(pair, 1), Mask(before, -1)])
            sources.append(MemorySource({MASKED: numbers}))
            masks.append(Mask(own, -1))
        sink = MemorySink(sum_tensors(dimension))
        unmask(sources, masks, dimension, sink=sink)
        return sink.arrays["sum"] * step

    return release


@pytest.mark.parametrize(("members", "colluding"), [(3, 0), (12, 3)])
@pytest.mark.parametrize("noise_multiplier", [0.5, 6.0])
def test_the_sum_has_the_noise_of_all_its_shares(members: int, colluding: int, noise_multiplier: float) -> None:
    """n shares, each of (z D)^2 / n_floor: what the claim needs, and what the colluding add besides."""
    spec, dimension = job_of(members, noise_multiplier, colluding), 50_000
    lattice, local = lattice_of(spec, planned(spec, dimension), dimension)
    found = noise_conformance(
        secured(spec, members, dimension), dimension=dimension, step=lattice.step, variance=members * local
    )
    assert found.conforms, found
    assert noise_shares(spec) * local >= (noise_multiplier * lattice.sensitivity) ** 2
    assert members * local == pytest.approx(
        (noise_multiplier * lattice.sensitivity) ** 2 * members / (members - colluding), rel=1e-9
    )


def test_the_shape_of_the_sum_is_that_of_a_gaussian() -> None:
    """Chi-square over cells of equal chance."""
    spec, dimension = job_of(4, 2.0), 200_000
    lattice, local = lattice_of(spec, planned(spec, dimension), dimension)
    noise = secured(spec, 4, dimension)([]) / lattice.step / math.sqrt(4 * local)
    chances = np.array([(1 + math.erf(value / math.sqrt(2))) / 2 for value in noise])
    counts = np.histogram(chances, bins=64, range=(0.0, 1.0))[0]
    expected = dimension / 64
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert 20 < statistic < 130, "chi-square with 63 degrees of freedom: 20 and 130 leave a chance of about 10^-6"


@pytest.mark.parametrize("without_noise", [1, 2])
def test_a_share_that_is_left_out_does_not_conform(without_noise: int) -> None:
    spec, dimension = job_of(4, 2.0), 50_000
    lattice, local = lattice_of(spec, planned(spec, dimension), dimension)
    found = noise_conformance(
        secured(spec, 4, dimension, without_noise=without_noise),
        dimension=dimension,
        step=lattice.step,
        variance=4 * local,
    )
    assert not found.conforms
    assert found.variance_ratio == pytest.approx(1 - without_noise / 4, rel=0.03)


def test_canaries_stay_below_the_claim_and_exceed_it_where_shares_are_left_out() -> None:
    """As many canaries as members. Six shares of 240 leave a sixth of the deviation."""
    members, dimension, noise_multiplier = 240, 12_000, 4.0
    spec = job_of(members, noise_multiplier)
    plan = planned(spec, dimension)
    claim = round_cost(spec, plan, 1, dimension).epsilon(DELTA)
    exact = analytic_gaussian_epsilon(noise_multiplier, DELTA)
    assert exact < claim == plan.epsilon < 1.3 * exact
    canaries = unit_canaries(members, dimension, CLIP_NORM, np.random.default_rng(9))

    honest = one_shot_canary(secured(spec, members, dimension), canaries, DELTA, confidence=0.999999)
    assert not honest.contradicts(claim)

    cheated = secured(spec, members, dimension, without_noise=members - 6)
    assert one_shot_canary(cheated, canaries, DELTA).contradicts(claim)
