"""A secured round in numbers: exact sums under masks, the same bytes however they are cut, and nothing too long."""

import hashlib
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import isthmus.federation.aggregation
import isthmus.federation.secured
from isthmus.codec.errors import TensorsMismatch
from isthmus.federation.aggregation import MemorySink, MemorySource, aggregate
from isthmus.federation.secured import (
    aggregate_sum,
    exact_squares,
    lattice_of,
    quantise,
    sum_bound,
    sum_tensors,
    unmask,
)
from isthmus.federation.strategies import FedAdam, FedAvg, FedAvgM, Strategy, state_manifest
from isthmus.privacy.clipping import NonFiniteUpdate
from isthmus.privacy.planning import plan_of
from isthmus.secagg.derivation import Mask
from isthmus.secagg.masks import add_masks
from isthmus.testing import sample_spec
from isthmus.wire.jobs import JobSpec
from isthmus.wire.manifest import AggregationRule, DType, Manifest, TensorSpec
from isthmus.wire.privacy import PrivacyPlan
from isthmus.wire.secured import MASKED

C = 2.0
Arrays = dict[str, NDArray[Any]]
MODEL = Manifest(
    tensors={
        "weight": TensorSpec(dtype=DType.F32, shape=(40, 50)),
        "bias": TensorSpec(dtype=DType.F64, shape=(7,)),
        "count": TensorSpec(dtype=DType.I64, shape=(), rule=AggregationRule.KEEP),
    }
)
ELEMENTS = MODEL.averaged_elements


def secured_job(**changes: Any) -> JobSpec:
    parts: dict[str, Any] = {
        "privacy": {"unit": "none", "clip_norm": C},
        "secure_aggregation": True,
        "cohort": {"min_updates": 3},
        "strategy": {"fedavg": {"weights": "uniform"}},
    }
    return sample_spec(**{**parts, **changes})


def noised_job(where: str, noise: float = 1.0, *, members: int = 3, colluding: int = 0, **changes: Any) -> JobSpec:
    return secured_job(
        privacy={"unit": "organization", "where": where, "clip_norm": C, "noise_multiplier": noise},
        secure_aggregation={"max_colluding": colluding},
        cohort={"min_updates": members},
        **changes,
    )


def planned(spec: JobSpec, elements: int = ELEMENTS) -> PrivacyPlan:
    plan = plan_of(spec, 100, elements)
    assert plan is not None
    return plan


PLAIN = secured_job()


def update_of(seed: int, scale: float = 1.0) -> Arrays:
    generator = np.random.default_rng(seed)
    return {
        "weight": (scale * generator.standard_normal((40, 50))).astype(np.float32),
        "bias": scale * generator.standard_normal(7),
    }


def zeros(elements: int) -> Arrays:
    return {"w": np.zeros(elements, np.float32)}


def flat(update: Arrays) -> NDArray[np.float64]:
    return np.concatenate([update[name].reshape(-1).astype(np.float64) for name in sorted(update)])


def signed(numbers: NDArray[np.uint32]) -> NDArray[np.int64]:
    return numbers.view(np.int32).astype(np.int64)


def masked(vectors: Sequence[NDArray[np.uint32]], seed: int = 0) -> tuple[list[MemorySource], list[Mask]]:
    """Each with a mask of its own and one that cancels with its neighbour's; and what takes them off the sum."""
    keys = [hashlib.sha256(f"{seed}/{number}".encode()).digest() for number in range(2 * len(vectors))]
    sources, masks = [], []
    for number, vector in enumerate(vectors):
        own, pair, before = keys[number], keys[len(vectors) + number], keys[len(vectors) + number - 1]
        if number == 0:
            before = keys[-1]
        hidden = vector.copy()
        add_masks(hidden, 0, [Mask(own, 1), Mask(pair, 1), Mask(before, -1)])
        sources.append(MemorySource({MASKED: hidden}))
        masks.append(Mask(own, -1))
    return sources, masks


def unmasked(
    sources: Sequence[MemorySource], masks: Sequence[Mask], elements: int = ELEMENTS, **options: Any
) -> tuple[NDArray[np.int64], int]:
    sink = MemorySink(sum_tensors(elements))
    squares = unmask(sources, masks, elements, sink=sink, **options)
    return sink.arrays["sum"].astype(np.int64), squares


def test_what_is_masked_is_the_clipped_update_on_the_jobs_lattice_in_the_order_of_names() -> None:
    update = update_of(1)
    lattice, variance = lattice_of(PLAIN, None, ELEMENTS)
    assert variance == 0
    expected = flat(update) * min(1.0, C / float(np.linalg.norm(flat(update)))) / lattice.step
    assert np.abs(signed(quantise(update, PLAIN, None)) - expected).max() <= 0.5 + 1e-6
    short = update_of(1, 1e-3)
    assert np.abs(signed(quantise(short, PLAIN, None)) - flat(short) / lattice.step).max() <= 0.5 + 1e-6


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-9, 1.0), st.sampled_from([1e-20, 1e-3, 1.0, 1e30]), st.integers(0, 5))
def test_a_share_of_weight_counts_before_rounding_and_keeps_its_own_reach(
    share: float, scale: float, seed: int
) -> None:
    lattice, _ = lattice_of(PLAIN, None, ELEMENTS)
    update = update_of(seed, scale)
    found = signed(quantise(update, PLAIN, None, share))
    squares = sum(int(one) ** 2 for one in found)
    assert squares <= lattice.reach(share) ** 2 <= lattice.sensitivity**2
    exact = flat(update)
    exact = exact * (min(1.0, C / float(np.linalg.norm(exact))) * share / lattice.step)
    assert np.abs(found - exact).max() <= 0.5 + 1e-3
    assert (signed(quantise(update, PLAIN, None, share)) == found).all()


def test_every_call_with_noise_draws_its_own_and_without_noise_gives_the_same_numbers() -> None:
    for spec in (noised_job("local"), noised_job("distributed")):
        plan = planned(spec)
        assert (quantise(update_of(1), spec, plan) != quantise(update_of(1), spec, plan)).mean() > 0.99
        with pytest.raises(ValueError, match="every member counts the same"):
            quantise(update_of(1), spec, plan, 0.5)
    record = secured_job(
        privacy={"unit": "record", "clip_norm": 1.0, "epsilon": 3.0}, secure_aggregation={"clip_norm": C}
    )
    found = quantise(update_of(1), record, planned(record))
    assert (found == quantise(update_of(1), PLAIN, None)).all()  # its noise is in its steps; bounded to the update's


def test_what_is_not_finite_or_has_no_share_is_refused() -> None:
    broken = update_of(1)
    broken["bias"][3] = math.nan
    with pytest.raises(NonFiniteUpdate):
        quantise(broken, PLAIN, None)
    for share in (0.0, -0.5, 1.5, math.nan):
        with pytest.raises(ValueError, match="share"):
            quantise(update_of(1), PLAIN, None, share)
    with pytest.raises(ValueError, match="without a bound"):
        quantise(update_of(1), sample_spec(), None)


@pytest.mark.parametrize("where", [None, "local", "distributed"])
def test_the_sum_is_exact_and_no_mask_is_left(where: str | None) -> None:
    spec = PLAIN if where is None else noised_job(where)
    plan = None if where is None else planned(spec)
    vectors = [quantise(update_of(seed), spec, plan) for seed in range(5)]
    sources, masks = masked(vectors)
    found, squares = unmasked(sources, masks)
    exact = np.sum([signed(vector) for vector in vectors], axis=0)
    assert (found == exact).all()
    assert squares == sum(int(one) ** 2 for one in exact)
    wrong, _ = unmasked(sources, masks[1:])
    assert (wrong != exact).mean() > 0.99


def test_neither_threads_nor_pieces_nor_the_order_change_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isthmus.federation.secured, "SHARED_ELEMENTS", 1)
    elements, generator = 10_007, np.random.default_rng(4)
    vectors = [generator.integers(0, 1 << 32, elements, dtype=np.uint32) for _ in range(4)]
    sources, masks = masked(vectors)
    expected, squares = unmasked(sources, masks, elements)
    for threads, piece in ((1, 1), (1, 999), (2, 64), (3, 1000), (4, 1 << 20)):
        if piece == 1:
            part = [MemorySource({MASKED: source.arrays[MASKED][:50]}) for source in sources]
            found, _ = unmasked(part, masks, 50, threads=threads, piece_elements=piece)
            assert (found == expected[:50]).all()
            continue
        found, again = unmasked(sources[::-1], masks[::-1], elements, threads=threads, piece_elements=piece)
        assert (found == expected).all()
        assert again == squares


def test_progress_is_told_and_may_end_the_work() -> None:
    sources, masks = masked([quantise(update_of(seed), PLAIN, None) for seed in range(3)])
    told: list[float] = []
    unmasked(sources, masks, progress=told.append, piece_elements=500)
    assert told[-1] == 1.0
    assert len(told) == math.ceil(ELEMENTS / 500)
    assert all(one < other for one, other in pairwise(told))

    def stop(_: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unmasked(sources, masks, progress=stop, piece_elements=500)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-(1 << 31), (1 << 31) - 1), max_size=40))
def test_squares_are_exact_whatever_the_sum_holds(values: list[int]) -> None:
    assert exact_squares(np.array(values, np.int32)) == sum(value**2 for value in values)


def test_squares_beyond_64_bits_are_exact() -> None:
    values = np.full(1 << 16, -(1 << 31), np.int32)
    values[::3] = (1 << 31) - 1
    assert exact_squares(values) == sum(int(one) ** 2 for one in values.tolist()) > 1 << 77


def test_an_update_of_another_length_or_type_or_none_at_all_is_refused() -> None:
    sources, masks = masked([quantise(update_of(seed), PLAIN, None) for seed in range(3)])
    for wrong in (
        MemorySource({MASKED: np.zeros(ELEMENTS - 1, np.uint32)}),
        MemorySource({MASKED: np.zeros(ELEMENTS, np.int32)}),
        MemorySource({"other": np.zeros(ELEMENTS, np.uint32)}),
    ):
        with pytest.raises(TensorsMismatch):
            unmasked([*sources, wrong], masks)
    with pytest.raises(ValueError, match="no updates"):
        unmasked([], masks)
    measured = MemorySource({**sources[0].arrays, "metrics/holdout/examples": np.array(3.0)})
    assert (unmasked([measured, *sources[1:]], masks)[0] == unmasked(sources, masks)[0]).all()


# --- What the sum moves -----------------------------------------------------------------------------------------------


def moved(strategy: Strategy, total: NDArray[np.int64], weight: float, **options: Any) -> tuple[Arrays, Arrays]:
    model = MemorySource({**update_of(99), "count": np.array(12, np.int64)})
    sink, kept = MemorySink(MODEL.tensors), state_manifest(strategy, MODEL)
    state_sink = None if kept is None else MemorySink(kept.tensors)
    aggregate_sum(
        MODEL,
        model,
        MemorySource({"sum": total.astype(np.int32)}),
        PLAIN,
        None,
        weight,
        strategy,
        sink=sink,
        state_sink=state_sink,
        **options,
    )
    return sink.arrays, {} if state_sink is None else state_sink.arrays


@pytest.mark.parametrize("strategy", [FedAvg(), FedAvgM(), FedAdam()], ids=lambda one: type(one).__name__)
def test_the_model_moves_as_by_the_weighted_mean_of_the_clipped_updates(strategy: Strategy) -> None:
    """The plain aggregation is the witness; rounding to the lattice is all that differs."""
    rows = [300, 30, 120]
    shares = [count / max(rows) for count in rows]
    updates = [update_of(seed, 0.01) for seed in range(3)]  # within the bound
    total = np.sum([signed(quantise(one, PLAIN, None, w)) for one, w in zip(updates, shares, strict=True)], axis=0)
    found, state = moved(strategy, total, math.fsum(shares))

    sink, kept = MemorySink(MODEL.tensors), state_manifest(strategy, MODEL)
    state_sink = None if kept is None else MemorySink(kept.tensors)
    model = MemorySource({**update_of(99), "count": np.array(12, np.int64)})
    sources = [MemorySource(update) for update in updates]
    aggregate(MODEL, model, sources, rows, strategy, sink=sink, state_sink=state_sink)
    lattice, _ = lattice_of(PLAIN, None, ELEMENTS)
    away = 1.5 * lattice.step / math.fsum(shares)  # of the mean: half a step for each
    for name, array in sink.arrays.items():
        allowed = 40 * away if isinstance(strategy, FedAdam) else away  # it divides by a root that starts at tau
        assert np.abs(found[name].astype(np.float64) - array).max() <= allowed + 1e-6, name
    assert found["count"] == 12
    assert (state.keys() == state_sink.arrays.keys()) if state_sink is not None else not state


def test_blocks_and_threads_do_not_change_a_byte_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isthmus.federation.aggregation, "SHARED_ELEMENTS", 1)
    total = np.random.default_rng(2).integers(-(1 << 31), 1 << 31, ELEMENTS)
    expected, slots = moved(FedAvgM(), total, 2.5)
    for threads, block in ((1, 7), (3, 100)):
        found, again = moved(FedAvgM(), total, 2.5, threads=threads, block_elements=block)
        for one, other in ((found, expected), (again, slots)):
            assert all(one[name].tobytes() == other[name].tobytes() for name in other)


def test_a_sum_without_weight_or_of_another_length_moves_nothing() -> None:
    for weight in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="weight of a sum"):
            moved(FedAvg(), np.zeros(ELEMENTS, np.int64), weight)
    with pytest.raises(TensorsMismatch):
        moved(FedAvg(), np.zeros(ELEMENTS + 1, np.int64), 1.0)


# --- How long a sum can be --------------------------------------------------------------------------------------------


def length_allowed(
    spec: JobSpec, plan: PrivacyPlan | None, shares: Sequence[float], elements: int, squares: int
) -> bool:
    return squares <= sum_bound(spec, plan, elements, shares) ** 2


@pytest.mark.parametrize("where", [None, "local", "distributed"])
def test_honest_members_who_all_pull_the_same_way_are_never_refused(where: str | None) -> None:
    """The worst of the honest: every update at the bound, all in one direction, on a lattice that rounds all up."""
    elements, members = 400, 7
    spec = PLAIN if where is None else noised_job(where, members=members)
    plan = None if where is None else planned(spec, elements).model_copy(update={"noise_multiplier": 0.02})
    generator = np.random.default_rng(1)
    for run in range(150 if where else 30):
        direction = np.ones(elements) if run % 2 else generator.standard_normal(elements)
        update = {"w": (10.0 ** generator.uniform(0, 3) * direction).astype(np.float32)}
        total = np.sum([signed(quantise(update, spec, plan)) for _ in range(members)], axis=0)
        squares = sum(int(one) ** 2 for one in total)
        assert length_allowed(spec, plan, [1.0] * members, elements, squares)
        assert squares > (0.9 * sum_bound(spec, plan, elements, [1.0] * members)) ** 2 or where  # and not by far


def test_small_shares_of_weight_are_allowed_what_rounding_adds_to_them() -> None:
    """Of a weight near nothing rounding is what is left: sqrt(d) / 2 steps each."""
    elements, shares = 4096, [1.0, 3.2e-5, 3.2e-5, 3.2e-5]
    lattice, _ = lattice_of(PLAIN, None, elements)
    half = {"w": np.full(elements, 0.5000001 * lattice.step / shares[1], np.float32)}
    full = {"w": np.ones(elements, np.float32)}
    vectors = [quantise(full, PLAIN, None)] + [quantise(half, PLAIN, None, share) for share in shares[1:]]
    assert (signed(vectors[1]) == 1).all(), "each is rounded up"
    total = np.sum([signed(one) for one in vectors], axis=0)
    squares = sum(int(one) ** 2 for one in total)
    assert length_allowed(PLAIN, None, shares, elements, squares)
    assert squares > (sum(shares) * lattice.scale) ** 2, "without that allowance it would be refused"


@pytest.mark.parametrize("where", [None, "distributed"])
def test_a_member_that_does_not_clip_makes_a_sum_that_is_refused(where: str | None) -> None:
    elements, members = 400, 5
    spec = PLAIN if where is None else noised_job(where, members=members)
    plan = None if where is None else planned(spec, elements).model_copy(update={"noise_multiplier": 0.02})
    honest = [
        quantise({"w": np.random.default_rng(seed).standard_normal(elements)}, spec, plan)
        for seed in range(members - 1)
    ]
    lattice, _ = lattice_of(spec, plan, elements)
    poison = np.zeros(elements, np.int64)
    poison[7] = 3 * members * lattice.sensitivity
    sources, masks = masked([*honest, poison.astype(np.uint32)])
    _, squares = unmasked(sources, masks, elements)
    assert not length_allowed(spec, plan, [1.0] * members, elements, squares)


def test_the_tail_of_the_noise_is_within_the_bound_and_not_far_below() -> None:
    """Only noise, from all: sqrt(n d) sigma, and ten sigmas more at most."""
    elements, members = 10_000, 4
    spec = noised_job("local", 3.0)
    plan = planned(spec, elements)
    lattice, variance = lattice_of(spec, plan, elements)
    bound = sum_bound(spec, plan, elements, [1.0] * members) - members * lattice.sensitivity
    typical = math.sqrt(members * variance * elements)
    for _ in range(10):
        total = np.sum([signed(quantise(zeros(elements), spec, plan)) for _ in range(members)], axis=0)
        assert 0.95 * typical < math.sqrt(sum(int(one) ** 2 for one in total)) < bound
    assert bound < 1.11 * typical
