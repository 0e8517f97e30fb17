"""Central noise: every update clipped once more, summed as integers, and noised once, whoever computes it and how."""

import hashlib
import math
from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import isthmus.federation.aggregation
import isthmus.federation.central
from isthmus.codec.errors import TensorsMismatch
from isthmus.federation.aggregation import MemorySink, MemorySource
from isthmus.federation.central import NOISE_BLOCK, aggregate_noised, clipping_factors, noise_of
from isthmus.federation.strategies import FedAdam, FedAvg, state_manifest
from isthmus.privacy.lattice import UPDATE_SCALE, to_lattice
from isthmus.privacy.scales import noised_lattice
from isthmus.wire.manifest import AggregationRule, DType, Manifest, TensorSpec, update_manifest

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
C = 1.5


def manifest_of(**shapes: tuple[int, ...]) -> Manifest:
    return Manifest(tensors={name: TensorSpec(dtype=DType.F32, shape=shape) for name, shape in shapes.items()})


SMALL = manifest_of(bias=(3,), weight=(40, 5))
LARGE = manifest_of(bias=(7,), weight=(NOISE_BLOCK + 1000,), tail=(2 * NOISE_BLOCK,))


def zeros(manifest: Manifest) -> MemorySource:
    return MemorySource({name: np.zeros(spec.shape, np.float32) for name, spec in manifest.tensors.items()})


def random_update(manifest: Manifest, seed: int, scale: float = 1.0) -> MemorySource:
    generator = np.random.default_rng(seed)
    return MemorySource(
        {
            name: (scale * generator.standard_normal(spec.shape)).astype(np.float32)
            for name, spec in manifest.tensors.items()
        }
    )


def flat(arrays: dict[str, NDArray[np.float32]]) -> NDArray[np.float64]:
    return np.concatenate([arrays[name].reshape(-1) for name in sorted(arrays)]).astype(np.float64)


def summed(
    manifest: Manifest, updates: list[MemorySource], *, noise: float = 1e-3, key: bytes = KEY, threads: int = 1
) -> dict[str, NDArray[np.float32]]:
    sink = MemorySink(manifest.tensors)
    aggregate_noised(
        manifest,
        zeros(manifest),
        updates,
        FedAvg(),
        clip_norm=C,
        noise_multiplier=noise,
        key=key,
        sink=sink,
        threads=threads,
    )
    return sink.arrays


def digest(arrays: dict[str, NDArray[np.float32]]) -> str:
    return hashlib.sha256(b"".join(arrays[name].tobytes() for name in sorted(arrays))).hexdigest()


def test_neither_the_order_of_the_updates_nor_the_threads_change_a_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isthmus.federation.aggregation, "SHARED_ELEMENTS", 1)
    updates = [random_update(LARGE, seed, scale) for seed, scale in ((1, 1.0), (2, 1e-4), (3, 1e3))]

    found = {
        digest(summed(LARGE, list(order), threads=threads)) for order in permutations(updates) for threads in (1, 3)
    }

    assert len(found) == 1


def test_a_sum_done_again_with_the_same_key_is_the_same_release_and_another_key_gives_another() -> None:
    updates = [random_update(SMALL, seed) for seed in (1, 2)]

    assert digest(summed(SMALL, updates)) == digest(summed(SMALL, updates))
    assert digest(summed(SMALL, updates)) != digest(summed(SMALL, updates, key=OTHER))


def test_a_stretch_of_noise_does_not_depend_on_where_it_is_cut() -> None:
    variance, size = 10**12, NOISE_BLOCK + 5000
    whole = noise_of(KEY, "weight", variance, 0, size)

    for cuts in ([0, 1, size], [0, 777, NOISE_BLOCK - 1, NOISE_BLOCK, NOISE_BLOCK + 3, size]):
        parts = [noise_of(KEY, "weight", variance, a, b - a) for a, b in pairwise(cuts)]
        assert (np.concatenate(parts) == whole).all()


def test_no_two_tensors_and_no_two_blocks_share_their_noise() -> None:
    variance, size = 10**12, 2000
    stretches = [
        noise_of(key, name, variance, start, size)
        for key in (KEY, OTHER)
        for name in ("bias", "weight")
        for start in (0, NOISE_BLOCK)
    ]

    for number, one in enumerate(stretches):
        for other in stretches[number + 1 :]:
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.12  # 5 sigmas of 2000 independent pairs


@pytest.mark.parametrize("noise", [0.5, 4.0])
def test_the_noise_of_the_mean_has_the_variance_that_was_claimed(noise: float) -> None:
    """z * D steps on the sum, whatever the number of updates, on every element and once."""
    updates = [zeros(LARGE) for _ in range(4)]
    lattice, _ = noised_lattice(C, 1.0, LARGE.averaged_elements, finest=UPDATE_SCALE)

    mean = flat(summed(LARGE, updates, noise=noise))

    sigma = noise * lattice.sensitivity * lattice.step / 4
    count = mean.size
    assert mean.var() == pytest.approx(sigma**2, rel=5 * math.sqrt(2 / count))
    assert abs(mean.mean()) < 5 * sigma / math.sqrt(count)
    for part in np.array_split(mean, 7):
        assert part.var() == pytest.approx(sigma**2, rel=6 * math.sqrt(2 / part.size))


def test_the_noise_is_added_once_and_not_for_each_update() -> None:
    lattice, _ = noised_lattice(C, 1.0, LARGE.averaged_elements, finest=UPDATE_SCALE)
    one, five = (flat(summed(LARGE, [zeros(LARGE)] * count, noise=2.0)) for count in (1, 5))

    assert one.std() == pytest.approx(2.0 * lattice.sensitivity * lattice.step, rel=0.01)
    np.testing.assert_allclose(five * 5, one, rtol=1e-6)


def test_with_little_noise_the_mean_is_that_of_the_clipped_updates() -> None:
    updates = [random_update(SMALL, 1, 0.01), random_update(SMALL, 2, 100.0)]
    clipped = [flat(dict(update.arrays)) for update in updates]
    clipped = [update * min(1.0, C / float(np.linalg.norm(update))) for update in clipped]

    mean = flat(summed(SMALL, updates, noise=0.001))

    assert np.abs(mean - sum(clipped) / 2).max() < 6 * 0.001 * C / 2


ADVERSARIAL = {
    "huge": np.full(203, 3e38, np.float32),
    "denormal": np.full(203, 1e-45, np.float32),
    "one hot": np.eye(1, 203, 17, dtype=np.float32)[0] * np.float32(1e30),
    "all equal": np.full(203, C / math.sqrt(203), np.float32),
    "half a step everywhere": np.full(203, 0.5 * C / (1 << 20), np.float32),
    "just above the bound": np.full(203, C / math.sqrt(203) * (1 + 1e-6), np.float32),
    "nothing": np.zeros(203, np.float32),
    "alternating": np.where(np.arange(203) % 2, 1e20, -1e20).astype(np.float32),
}


def as_update(values: NDArray[np.float32]) -> MemorySource:
    return MemorySource({"bias": values[:3], "weight": values[3:].reshape(40, 5)})


def assert_bounded(update: MemorySource) -> None:
    lattice, _ = noised_lattice(C, 1.0, SMALL.averaged_elements, finest=UPDATE_SCALE)
    (factor,) = clipping_factors([update], update_manifest(SMALL).tensors, lattice)
    integers = np.concatenate([to_lattice(array.reshape(-1), factor) for array in update.arrays.values()])
    assert sum(int(value) ** 2 for value in integers) <= lattice.sensitivity**2


@pytest.mark.parametrize("case", ADVERSARIAL)
def test_no_update_is_longer_than_the_bound_in_whole_numbers(case: str) -> None:
    assert_bounded(as_update(ADVERSARIAL[case]))


@given(
    st.integers(0, 2**32),
    st.floats(1e-40, 1e38, allow_nan=False),
    st.sampled_from(["normal", "sparse", "equal"]),
)
@settings(max_examples=60, deadline=None)
def test_whatever_an_update_holds_its_integers_keep_the_bound(seed: int, scale: float, kind: str) -> None:
    generator = np.random.default_rng(seed)
    values = {
        "normal": generator.standard_normal(203),
        "sparse": generator.standard_normal(203) * (generator.random(203) < 0.02),
        "equal": np.full(203, generator.standard_normal()),
    }[kind]

    assert_bounded(as_update(np.clip(values * scale, -3e38, 3e38).astype(np.float32)))


def test_one_long_update_moves_the_mean_by_no_more_than_its_share() -> None:
    """What others brought does not change because one of them is a million times too long."""
    honest = [random_update(SMALL, seed, 0.05) for seed in (1, 2, 3)]
    without = flat(summed(SMALL, [*honest, zeros(SMALL)]))
    shouted = flat(summed(SMALL, [*honest, random_update(SMALL, 4, 1e6)]))

    lattice, _ = noised_lattice(C, 1.0, SMALL.averaged_elements, finest=UPDATE_SCALE)
    assert float(np.linalg.norm(shouted - without)) <= 1.0001 * lattice.sensitivity * lattice.step / 4


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_update_that_is_not_finite_is_refused(value: float) -> None:
    broken = random_update(SMALL, 1)
    broken.arrays["bias"][1] = value

    with pytest.raises(ValueError, match="not finite"):
        summed(SMALL, [random_update(SMALL, 2), broken])


def test_what_is_kept_is_copied_and_the_strategy_keeps_its_state() -> None:
    manifest = Manifest(
        tensors={
            "count": TensorSpec(dtype=DType.I64, shape=(), rule=AggregationRule.KEEP),
            "weight": TensorSpec(dtype=DType.F32, shape=(200,)),
        }
    )
    model = MemorySource({"count": np.array(7), "weight": np.ones(200, np.float32)})
    strategy = FedAdam()
    states = state_manifest(strategy, manifest)
    assert states is not None
    sink, state = MemorySink(manifest.tensors), MemorySink(states.tensors)

    aggregate_noised(
        manifest,
        model,
        [MemorySource({"weight": np.full(200, 0.01, np.float32)})],
        strategy,
        clip_norm=C,
        noise_multiplier=0.01,
        key=KEY,
        sink=sink,
        state_sink=state,
    )

    assert sink.arrays["count"] == 7
    assert state.arrays["m/weight"].any()


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="no updates"):
        summed(SMALL, [])
    with pytest.raises(ValueError, match="32 bytes"):
        summed(SMALL, [zeros(SMALL)], key=b"short")
    with pytest.raises(ValueError, match="noise"):
        summed(SMALL, [zeros(SMALL)], noise=0.0)
    with pytest.raises(TensorsMismatch):
        summed(SMALL, [MemorySource({"bias": np.zeros(3, np.float32)})])


def test_noise_too_loud_for_the_finest_grid_is_drawn_on_a_coarser_one() -> None:
    finest, _ = noised_lattice(C, 1.0, SMALL.averaged_elements, finest=UPDATE_SCALE)
    loud, variance = noised_lattice(C, 10_000.0, SMALL.averaged_elements, finest=UPDATE_SCALE)
    assert loud.scale < finest.scale
    assert math.sqrt(variance) / loud.sensitivity >= 10_000.0
    assert math.sqrt(variance) / loud.sensitivity < 10_000.0 * (1 + 1e-6)
