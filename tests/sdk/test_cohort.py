"""The draw of a cohort, its sizes, and the seeds of local training."""

import hashlib
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.federation.cohort import (
    CohortSize,
    ParticipationKey,
    TooFewParticipations,
    canonical_order,
    cohort_size,
    draw_cohort,
    round_seed,
)

HOSPITALS = [("cleveland", "heart"), ("hungary", "heart"), ("switzerland", "heart"), ("va", "heart"), ("va", "lung")]
SEED = bytes(range(32))
JOB_SEED = SEED.hex()

# Worked out once, apart from the code under test. They never change: records are replayed with them.
KNOWN_DRAW = (("cleveland", "heart"), ("switzerland", "heart"), ("va", "heart"))
OTHER_DRAW = (("hungary", "heart"), ("va", "heart"), ("va", "lung"))
KNOWN_SEED = "212e6f4e3f21378f64643b5ec79de4f537724893e85baf4201542061ac00046a"


def test_the_canonical_order_is_by_organization_then_dataset() -> None:
    keys = [("b", "a"), ("a", "z"), ("a-b", "a"), ("a", "b")]
    assert canonical_order(keys) == [("a", "b"), ("a", "z"), ("a-b", "a"), ("b", "a")]
    assert canonical_order(keys)[0] == ParticipationKey(organization="a", dataset="b")


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        ((5, 1.0, 0, "all", 3), (5, 5)),
        ((5, 0.5, 0, "all", 1), (3, 3)),  # rounded up
        ((30, 0.1, 0, "all", 1), (3, 3)),  # as a decimal: 0.1 * 30 is above 3 in floats
        ((100, 0.29, 0, "all", 1), (29, 29)),
        ((10, 0.1, 0, "all", 3), (3, 3)),  # at least min_updates
        ((10, 0.5, 2, "all", 3), (7, 5)),  # the over-selected are not waited for
        ((10, 0.5, 20, "all", 3), (10, 5)),
        ((10, 1.0, 2, "all", 3), (10, 10)),
        ((10, 0.8, 0, 5, 3), (8, 5)),
        ((10, 0.8, 0, 2, 3), (8, 3)),  # min_updates lifts the target
        ((10, 0.8, 0, 50, 3), (8, 8)),
        ((10, 0.5, 2, 7, 3), (7, 7)),
        ((1, 1e-9, 0, "all", 1), (1, 1)),
    ],
)
def test_the_size_of_a_cohort(arguments: tuple[Any, ...], size: tuple[int, int]) -> None:
    available, fraction, over, target, minimum = arguments
    found = cohort_size(available, fraction=fraction, over_selection=over, target=target, min_updates=minimum)
    assert found == CohortSize(*size)


@given(
    st.integers(1, 1000), st.floats(0, 1, exclude_min=True), st.integers(0, 50),
    st.just("all") | st.integers(1, 2000), st.integers(1, 1000),
)  # fmt: skip
def test_a_round_can_always_reach_its_target(n: int, fraction: float, over: int, target: Any, minimum: int) -> None:
    try:
        size = cohort_size(n, fraction=fraction, over_selection=over, target=target, min_updates=minimum)
    except TooFewParticipations:
        assert n < minimum
        return
    assert minimum <= size.target_updates <= size.asked <= n


@pytest.mark.parametrize("wrong", [{"fraction": 0.0}, {"fraction": 1.1}, {"fraction": float("nan")},
                                   {"over_selection": -1}, {"target": 0}, {"min_updates": 0}])  # fmt: skip
def test_sizes_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"at least|at most"):
        cohort_size(5, **{"fraction": 1.0, "over_selection": 0, "target": "all", "min_updates": 1, **wrong})


def test_a_known_draw() -> None:
    assert draw_cohort(HOSPITALS, seed=SEED, fraction=0.6).chosen == KNOWN_DRAW
    assert draw_cohort(HOSPITALS, seed=bytes(32), fraction=0.6).chosen == OTHER_DRAW


def test_a_draw_is_what_its_documentation_says() -> None:
    def rank(key: tuple[str, str]) -> bytes:
        parts = [b"isthmus cohort v1", SEED, key[0].encode(), key[1].encode()]
        return hashlib.sha256(b"".join(len(part).to_bytes(8, "big") + part for part in parts)).digest()

    assert list(draw_cohort(HOSPITALS, seed=SEED, fraction=0.6).chosen) == sorted(sorted(HOSPITALS, key=rank)[:3])


def test_the_order_of_the_list_does_not_change_the_draw() -> None:
    reference = draw_cohort(HOSPITALS, seed=SEED, fraction=0.5)
    for seed in range(10):
        shuffled = random.Random(seed).sample(HOSPITALS, len(HOSPITALS))
        assert draw_cohort(shuffled, seed=SEED, fraction=0.5) == reference
    assert list(reference.chosen) == canonical_order(reference.chosen)


def test_everyone_is_drawn_about_equally_often() -> None:
    drawn = Counter(
        key for i in range(2000) for key in draw_cohort(HOSPITALS, seed=i.to_bytes(16, "big"), fraction=0.4).chosen
    )
    assert all(abs(drawn[ParticipationKey(*key)] - 800) < 110 for key in HOSPITALS)  # five standard deviations


def test_more_over_selection_only_adds() -> None:
    few = draw_cohort(HOSPITALS, seed=SEED, fraction=0.4)
    more = draw_cohort(HOSPITALS, seed=SEED, fraction=0.4, over_selection=2)
    assert set(few.chosen) < set(more.chosen)
    assert (few.target_updates, more.target_updates, len(more.chosen)) == (2, 2, 4)


def test_draws_that_cannot_be_are_refused() -> None:
    with pytest.raises(TooFewParticipations):
        draw_cohort(HOSPITALS, seed=SEED, min_updates=6)
    with pytest.raises(ValueError, match="twice"):
        draw_cohort([*HOSPITALS, HOSPITALS[0]], seed=SEED)
    with pytest.raises(ValueError, match="16 bytes"):
        draw_cohort(HOSPITALS, seed=b"short")


def test_a_known_round_seed() -> None:
    assert round_seed(JOB_SEED, 1, "cleveland", "heart") == KNOWN_SEED


def test_round_seeds_differ_wherever_anything_differs() -> None:
    seeds = {
        round_seed(job, number, organization, dataset)
        for job in (JOB_SEED, bytes(32).hex())
        for number in (0, 1, 256)
        for organization, dataset in (("a", "bc"), ("ab", "c"), ("abc", ""), ("", "abc"))
    }
    assert len(seeds) == 24


def test_seeds_that_are_none_are_refused() -> None:
    for wrong in ("", "00", "zz" * 32, "00 " * 32):
        with pytest.raises(ValueError, match=r"hexa"):
            round_seed(wrong, 1, "a", "b")
    with pytest.raises(ValueError, match="negative"):
        round_seed(JOB_SEED, -1, "a", "b")
