"""The life of jobs and rounds: both tables whole, and what is due, by table and by what must always hold."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from app.federation.lifecycle import (
    ENDED_JOBS,
    JOB_TRANSITIONS,
    OFFERED_AGAIN,
    OPEN_TASKS,
    ROUND_TRANSITIONS,
    JobEvent,
    RoundEvent,
    RoundState,
    TransitionRefused,
    advance_job,
    advance_round,
    due_event,
)
from isthmus.wire.jobs import JobState
from isthmus.wire.problems import ProblemCode
from isthmus.wire.rounds import RoundPhase, TaskState

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)
ENDED_ROUNDS = frozenset({RoundPhase.COMPLETED, RoundPhase.FAILED, RoundPhase.CANCELLED})


# --- The tables -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("phase", "event"), list(product(RoundPhase, RoundEvent)))
def test_every_pair_of_a_round_is_in_the_table_or_refused(phase: RoundPhase, event: RoundEvent) -> None:
    if (phase, event) in ROUND_TRANSITIONS:
        assert advance_round(phase, event) is ROUND_TRANSITIONS[phase, event]
        return
    with pytest.raises(TransitionRefused) as refusal:
        advance_round(phase, event)
    assert refusal.value.code is ProblemCode.STATE_CONFLICT
    assert phase.value in refusal.value.detail
    assert event.value in refusal.value.detail


@pytest.mark.parametrize(("state", "event"), list(product(JobState, JobEvent)))
def test_every_pair_of_a_job_is_in_the_table_or_refused(state: JobState, event: JobEvent) -> None:
    if (state, event) in JOB_TRANSITIONS:
        assert advance_job(state, event) is JOB_TRANSITIONS[state, event]
        return
    with pytest.raises(TransitionRefused) as refusal:
        advance_job(state, event)
    assert refusal.value.code is ProblemCode.STATE_CONFLICT
    assert state.value.replace("_", " ") in refusal.value.detail


def reachable(table: Mapping[tuple[Any, Any], Any], start: Any) -> set[Any]:
    """Where one can get to."""
    found, new = {start}, {start}
    while new:
        new = {after for (before, _), after in table.items() if before in new} - found
        found |= new
    return found


def test_every_phase_and_state_is_reached_and_the_ended_ones_are_left_by_nothing() -> None:
    assert reachable(ROUND_TRANSITIONS, RoundPhase.COLLECTING) == set(RoundPhase)
    assert reachable(JOB_TRANSITIONS, JobState.DRAFT) == set(JobState)
    assert {before for before, _ in ROUND_TRANSITIONS} == set(RoundPhase) - ENDED_ROUNDS
    assert {before for before, _ in JOB_TRANSITIONS} == set(JobState) - ENDED_JOBS


def test_from_everywhere_there_is_an_end() -> None:
    for phase in RoundPhase:
        assert reachable(ROUND_TRANSITIONS, phase) & ENDED_ROUNDS
    for state in JobState:
        assert reachable(JOB_TRANSITIONS, state) & ENDED_JOBS
        assert state in ENDED_JOBS or (state, JobEvent.CANCELLED) in JOB_TRANSITIONS


def test_a_task_is_open_or_offered_again_or_neither() -> None:
    assert not set(OPEN_TASKS) & set(OFFERED_AGAIN)
    assert set(TaskState) - set(OPEN_TASKS) - set(OFFERED_AGAIN) == {
        TaskState.SUBMITTED,
        TaskState.REFUSED,
        TaskState.CANCELLED,
    }


# --- What is due ------------------------------------------------------------------------------------------------------

AT_WORK = RoundState(
    phase=RoundPhase.COLLECTING,
    paused=False,
    accepted=0,
    target_updates=4,
    min_updates=2,
    attempt=1,
    attempts=3,
    open_tasks=4,
    offered_again=0,
    able=4,
    unasked=0,
    closes_at=NOON,
    uploading_until=None,
)
BEFORE, AFTER = NOON - SECOND, NOON + SECOND
DUE: dict[str, tuple[dict[str, Any], datetime, RoundEvent | None]] = {
    "at work": ({}, BEFORE, None),
    "target reached": ({"accepted": 4, "open_tasks": 0}, BEFORE, RoundEvent.TARGET_REACHED),
    "target reached, others at work": ({"accepted": 4, "open_tasks": 2}, BEFORE, RoundEvent.TARGET_REACHED),
    "target reached, an upload under way": (
        {"accepted": 4, "uploading_until": AFTER}, AFTER, RoundEvent.TARGET_REACHED,
    ),
    "target reached while paused": ({"accepted": 4, "paused": True}, AFTER, RoundEvent.TARGET_REACHED),
    "enough, others at work": ({"accepted": 2, "open_tasks": 2}, BEFORE, None),
    "enough at the deadline to the moment": ({"accepted": 2, "open_tasks": 2}, NOON, RoundEvent.DEADLINE_WITH_ENOUGH),
    "enough, nobody left": ({"accepted": 3, "open_tasks": 0}, BEFORE, RoundEvent.DEADLINE_WITH_ENOUGH),
    "enough, one may be offered again": (
        {"accepted": 3, "open_tasks": 0, "offered_again": 1}, BEFORE, RoundEvent.DEADLINE_WITH_ENOUGH,
    ),
    "enough, an upload within its grace": (
        {"accepted": 2, "open_tasks": 1, "uploading_until": AFTER}, NOON, None,
    ),
    "enough, the grace is over": (
        {"accepted": 2, "open_tasks": 1, "uploading_until": NOON}, NOON, RoundEvent.DEADLINE_WITH_ENOUGH,
    ),
    "too few at the deadline": ({"accepted": 1, "open_tasks": 3}, NOON, RoundEvent.OFFER_MISSING_AGAIN),
    "too few, an upload within its grace": (
        {"accepted": 1, "open_tasks": 1, "uploading_until": AFTER}, NOON, None,
    ),
    "too few, the others failed": (
        {"accepted": 1, "open_tasks": 0, "offered_again": 3}, BEFORE, RoundEvent.OFFER_MISSING_AGAIN,
    ),
    "too few, the others refused": ({"accepted": 1, "open_tasks": 0}, BEFORE, RoundEvent.ATTEMPTS_EXHAUSTED),
    "too few could ever come": ({"accepted": 0, "open_tasks": 1}, BEFORE, RoundEvent.ATTEMPTS_EXHAUSTED),
    "too few could ever come, for want of grants": (
        {"accepted": 0, "open_tasks": 1, "able": 1}, BEFORE, RoundEvent.GRANTS_LACKING,
    ),
    "nobody is left, for want of grants": ({"open_tasks": 0, "able": 0}, BEFORE, RoundEvent.GRANTS_LACKING),
    "too few could ever come, but others were not asked": (
        {"accepted": 0, "open_tasks": 1, "unasked": 1}, BEFORE, RoundEvent.REFILLED,
    ),
    "the others that were not asked are not enough either": (
        {"accepted": 0, "open_tasks": 0, "able": 1, "unasked": 1}, BEFORE, RoundEvent.GRANTS_LACKING,
    ),
    "grants are lacking and the round can still be filled": ({"open_tasks": 2, "able": 1}, BEFORE, None),
    "grants are lacking while paused": ({"open_tasks": 0, "able": 0, "paused": True}, AFTER, None),
    "too few, the last attempt": ({"accepted": 1, "attempt": 3}, NOON, RoundEvent.ATTEMPTS_EXHAUSTED),
    "too few, the last attempt still at work": ({"accepted": 1, "attempt": 3}, BEFORE, None),
    "paused at the deadline": ({"accepted": 2, "paused": True}, AFTER, None),
    "paused with nobody left": ({"accepted": 1, "open_tasks": 0, "paused": True}, AFTER, None),
    "an evaluation at work": ({"min_updates": 0}, BEFORE, None),
    "an evaluation that nobody answered": ({"min_updates": 0}, NOON, RoundEvent.DEADLINE_WITH_ENOUGH),
    "an evaluation that all refused": (
        {"min_updates": 0, "open_tasks": 0}, BEFORE, RoundEvent.DEADLINE_WITH_ENOUGH,
    ),
    "aggregating": ({"phase": RoundPhase.AGGREGATING, "accepted": 4}, AFTER, None),
    "completed": ({"phase": RoundPhase.COMPLETED, "accepted": 4}, AFTER, None),
    "failed": ({"phase": RoundPhase.FAILED}, AFTER, None),
    "cancelled": ({"phase": RoundPhase.CANCELLED}, AFTER, None),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "now", "event"), DUE.values(), ids=DUE)
def test_what_is_due(changes: dict[str, Any], now: datetime, event: RoundEvent | None) -> None:
    assert due_event(replace(AT_WORK, **changes), now) is event


moments = st.integers(-100, 100).map(lambda seconds: NOON + seconds * SECOND)
small = st.integers(0, 6)
states = st.builds(
    RoundState,
    phase=st.sampled_from(RoundPhase),
    paused=st.booleans(),
    accepted=small,
    target_updates=st.integers(1, 6),
    min_updates=small,
    attempt=st.integers(1, 3),
    attempts=st.integers(1, 3),
    open_tasks=small,
    offered_again=small,
    able=small,
    unasked=small,
    closes_at=moments,
    uploading_until=st.none() | moments,
)
collecting = states.map(lambda state: replace(state, phase=RoundPhase.COLLECTING))
CLOSING = (RoundEvent.TARGET_REACHED, RoundEvent.DEADLINE_WITH_ENOUGH)


@given(states, moments)
def test_nothing_is_due_that_the_table_lacks(state: RoundState, now: datetime) -> None:
    event = due_event(state, now)

    assert event is None or (state.phase, event) in ROUND_TRANSITIONS


@given(collecting, moments)
def test_a_round_closes_with_its_minimum_or_its_target_and_never_with_less(state: RoundState, now: datetime) -> None:
    if due_event(state, now) in CLOSING:
        assert state.accepted >= min(state.min_updates, state.target_updates)


@given(collecting, moments)
def test_a_round_is_given_up_only_when_it_lacks_updates_and_nothing_is_left_to_try(
    state: RoundState, now: datetime
) -> None:
    event = due_event(state, now)
    if event in (RoundEvent.ATTEMPTS_EXHAUSTED, RoundEvent.GRANTS_LACKING):
        assert state.accepted < state.min_updates
        assert state.attempt >= state.attempts or not state.can_be_filled
    if event is RoundEvent.GRANTS_LACKING:
        assert state.able < state.min_updates


@given(collecting, moments, moments)
def test_what_is_due_stays_due_until_it_is_done(state: RoundState, now: datetime, later: datetime) -> None:
    assume(now <= later)
    event = due_event(state, now)
    if event is not None:
        assert due_event(state, later) is event


@given(collecting)
def test_a_round_does_not_wait_for_ever(state: RoundState) -> None:
    end = max(state.closes_at, state.uploading_until or state.closes_at)

    assert state.paused or due_event(state, end) is not None


@given(collecting, moments)
def test_one_more_update_never_turns_a_close_into_a_wait(state: RoundState, now: datetime) -> None:
    more = replace(state, accepted=state.accepted + 1)
    if due_event(state, now) in CLOSING:
        assert due_event(more, now) in CLOSING


@given(collecting, moments)
def test_one_more_update_never_makes_a_round_fail(state: RoundState, now: datetime) -> None:
    assume(state.open_tasks > 0)
    in_now = replace(state, accepted=state.accepted + 1, open_tasks=state.open_tasks - 1)
    if due_event(in_now, now) is RoundEvent.ATTEMPTS_EXHAUSTED:
        assert due_event(state, now) in (RoundEvent.ATTEMPTS_EXHAUSTED, None)  # None: nobody is at work any more
        assert in_now.accepted < in_now.min_updates


@given(collecting, moments)
@example(AT_WORK, AFTER)
def test_to_a_paused_round_nothing_happens_but_its_target(state: RoundState, now: datetime) -> None:
    event = due_event(replace(state, paused=True), now)

    assert event in (None, RoundEvent.TARGET_REACHED)
    assert (event is RoundEvent.TARGET_REACHED) == (state.accepted >= state.target_updates)


@given(collecting, moments)
def test_attempts_come_to_an_end(state: RoundState, now: datetime) -> None:
    for _ in range(state.attempts + 1):
        event = due_event(state, now)
        if event is not RoundEvent.OFFER_MISSING_AGAIN:
            return
        state = replace(
            state,
            attempt=state.attempt + 1,
            open_tasks=0,
            offered_again=state.open_tasks + state.offered_again,
            closes_at=now,
        )
    raise AssertionError("a round was offered again without end")
