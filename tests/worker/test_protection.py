"""What happens to an update before it may leave, in each privacy mode."""

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from isthmus.privacy.clipping import NonFiniteUpdate, global_norm
from isthmus.privacy.lattice import UPDATE_SCALE, Lattice
from isthmus.privacy.planning import plan_of
from isthmus.wire.privacy import PrivacyPlan
from isthmus_worker.protection import protect
from tests.worker.factories import LOCAL, make_record_spec, make_spec

Update = dict[str, NDArray[Any]]


def update_of(factor: float = 1.0, elements: int = 40_000) -> Update:
    """Two tensors, in an order that is not the sorted one."""
    chance = np.random.default_rng(0)
    return {
        "b": (chance.standard_normal((elements // 4, 2)) * factor).astype(np.float32),
        "a": (chance.standard_normal(elements // 2) * factor).astype(np.float32),
    }


def mode(where: str, noise: float = 1.0, clip: float = 1.0) -> tuple[Any, PrivacyPlan]:
    """Privacy section and plan of `unit: organization`."""
    privacy = {"unit": "organization", "where": where, "clip_norm": clip, "noise_multiplier": noise}
    spec = make_spec(**{**LOCAL, "privacy": privacy})
    plan = plan_of(spec, 40, 100)
    assert plan is not None
    return spec.privacy, plan


def flat(update: Update) -> NDArray[np.float64]:
    """One vector, in the order of the names."""
    return np.concatenate([update[name].ravel().astype(np.float64) for name in sorted(update)])


def test_local_noise_is_twice_the_bound_times_the_multiplier_on_the_lattice_and_fresh() -> None:
    privacy, plan = mode("local", noise=1.5)
    lattice = Lattice(1.0, UPDATE_SCALE, 40_000)
    zeros = {name: np.zeros_like(array) for name, array in update_of().items()}
    one, other = (flat(protect(zeros, privacy, plan)) for _ in range(2))

    wanted = 1.5 * 2 * lattice.sensitivity * lattice.step
    assert np.std(one) == pytest.approx(wanted, rel=7 / math.sqrt(2 * 40_000))
    steps = one / lattice.step
    assert np.array_equal(steps, np.rint(steps))
    assert (one != other).mean() > 0.99
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.04


def test_a_long_update_is_clipped_as_one_vector_before_its_noise() -> None:
    privacy, plan = mode("local", clip=3.0)
    quiet = plan.model_copy(update={"noise_multiplier": 0.01})  # no job may have so little
    found = flat(protect(update_of(50.0), privacy, quiet))
    noise = 0.01 * 2 * 3.0
    direction = flat(update_of()) / np.linalg.norm(flat(update_of()))
    assert found @ direction == pytest.approx(3.0, abs=7 * noise)


def test_central_is_clipped_here_and_noised_by_the_service() -> None:
    privacy, plan = mode("central")
    update = update_of(50.0)
    found = protect(update, privacy, plan)
    assert global_norm(found) == pytest.approx(1.0, abs=1e-6)
    assert flat(found) / np.linalg.norm(flat(found)) == pytest.approx(
        flat(update) / np.linalg.norm(flat(update)), abs=1e-6
    )


def test_updates_whose_steps_were_noised_are_left_as_they_are() -> None:
    spec = make_record_spec()
    update = update_of(50.0)
    found = protect(update, spec.privacy, plan_of(spec, 40, 100))
    assert all(np.array_equal(found[name], update[name]) for name in update)


@pytest.mark.parametrize("where", ["local", "central"])
def test_the_update_that_was_given_is_not_modified_and_types_stay(where: str) -> None:
    update = {**update_of(50.0, 40), "c": np.array(3.0)}
    before = {name: array.copy() for name, array in update.items()}
    found = protect(update, *mode(where))
    assert {name: (array.dtype, array.shape) for name, array in found.items()} == {
        name: (array.dtype, array.shape) for name, array in before.items()
    }
    assert all(np.array_equal(update[name], before[name]) for name in update)
    assert not any(np.shares_memory(found[name], update[name]) for name in update)


@pytest.mark.parametrize("where", ["local", "central"])
def test_what_is_not_finite_never_leaves(where: str) -> None:
    for broken in ([np.nan, 1], [np.inf, 1], [np.inf, -np.inf]):
        with pytest.raises(NonFiniteUpdate):
            protect({"a": np.array(broken, np.float32)}, *mode(where))


def test_very_large_noise_takes_a_coarser_lattice() -> None:
    privacy, plan = mode("local", noise=10_000.0)
    found = flat(protect(update_of(), privacy, plan))
    assert np.std(found) == pytest.approx(20_000.0, rel=0.05)
