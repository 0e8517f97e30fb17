"""Members drop out in every way: the sum is right to the bit, or the attempt ends as it has to, with nothing told."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.secagg.parameters import threshold_of
from isthmus.secagg.violations import ProtocolViolation, TooFewShares
from isthmus.wire.secured import Step
from tests.sdk.secagg.driver import Attempt, Last


def first_step_with_too_few(last: tuple[Last, ...]) -> Step | None:
    """Counted by hand: more than two thirds of all that were asked have to send each message."""
    for step, message in zip(Step, list(Last)[1:], strict=True):
        if 3 * sum(sent >= message for sent in last) <= 2 * len(last):
            return step
    return None


@pytest.mark.parametrize("members", [3, 4, 5, 6])
def test_every_pattern_of_drop_outs_gives_the_sum_or_ends_where_too_few_are_left(members: int) -> None:
    attempt = Attempt(members)
    completed = 0
    for last in product(Last, repeat=members):
        outcome = attempt.run(last)
        expected = first_step_with_too_few(last)
        assert outcome.aborted == expected, last
        if expected is None:
            assert outcome.total is not None
            present = [i for i in range(members) if last[i] >= Last.UPDATE]
            assert np.array_equal(outcome.total, attempt.vectors[present].sum(axis=0, dtype=np.uint32)), last
            completed += 1
        else:
            assert outcome.total is None
    spare = members - threshold_of(members)
    assert completed == 1 + 5 * members * spare  # these cohorts may lose one at most, at any of five points


def test_without_enough_shares_nothing_is_rebuilt_at_any_step() -> None:
    attempt = Attempt(7)  # five have to stay
    everybody = tuple(range(7))
    survivors = everybody[:6]
    reveals = attempt.reveals(everybody, everybody, survivors, survivors)
    for answering in range(5):
        with pytest.raises(TooFewShares, match=f"^{answering} shares of a secret are in; 5 are needed"):
            attempt.rebuild(everybody, survivors, {i: reveals[i] for i in everybody[:answering]})
    assert attempt.rebuild(everybody, survivors, {i: reveals[i] for i in everybody[:5]}).suspects == ()


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_random_patterns_up_to_sixty_members_give_the_sum(data: st.DataObject) -> None:
    members = data.draw(st.integers(7, 60), "members")
    lost = data.draw(st.integers(0, members - threshold_of(members) + 1), "lost")
    who = data.draw(st.permutations(range(members)), "who")[:lost]
    last = [Last.EVERYTHING] * members
    for member in who:
        last[member] = data.draw(st.sampled_from(list(Last)[:-1]), "last message")
    attempt = Attempt(members, seed=f"random {members}")
    outcome = attempt.run(last)
    assert outcome.aborted == first_step_with_too_few(tuple(last))
    if outcome.aborted is None:
        present = [i for i in range(members) if last[i] >= Last.UPDATE]
        assert np.array_equal(outcome.total, attempt.vectors[present].sum(axis=0, dtype=np.uint32))


@pytest.mark.parametrize(("members", "degree", "threshold"), [(12, 6, 4), (13, 8, 5), (16, 7, 5), (24, 10, 6)])
def test_masks_among_neighbours_only_cancel_as_well(members: int, degree: int, threshold: int) -> None:
    attempt = Attempt(members, degree=degree, threshold=threshold, elements=9)
    last = [Last.EVERYTHING] * members
    last[1], last[5], last[8] = Last.SHARES, Last.UPDATE, Last.SURVIVORS
    outcome = attempt.run(last)
    assert outcome.aborted is None
    present = [i for i in range(members) if i != 1]
    assert np.array_equal(outcome.total, attempt.vectors[present].sum(axis=0, dtype=np.uint32))
    everybody = tuple(range(members))
    assert all(len(attempt.masks(everybody, everybody, i)) == 1 + degree for i in everybody)


def test_a_member_whose_neighbours_left_cannot_be_unmasked_and_leaves() -> None:
    attempt = Attempt(12, degree=4, threshold=4)
    gone = sorted(attempt.near(0))[:2]
    staying = tuple(i for i in range(12) if i not in gone)
    everybody = tuple(range(12))
    messages = {i: attempt.share_out(everybody, i) for i in everybody}
    with pytest.raises(ProtocolViolation, match="Only 3 neighbours sent shares; 4 have to"):
        attempt.open_shares(everybody, 0, attempt.shares_answer(everybody, staying, 0, messages))
