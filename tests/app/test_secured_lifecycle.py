"""What is due for a secured round: by table, and by what must always hold."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from app.federation.lifecycle import ROUND_TRANSITIONS, RoundEvent
from app.federation.secured_lifecycle import STEPS, AbortReason, SecuredState, abort_reason, due_secured_event
from isthmus.wire.rounds import RoundPhase
from isthmus.wire.secured import Step

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)
BEFORE, AFTER, MUCH_LATER = NOON - SECOND, NOON + SECOND, NOON + timedelta(days=1)
PHASE_OF = {
    Step.KEYS: RoundPhase.COLLECTING,
    Step.SHARES: RoundPhase.COLLECTING,
    Step.UPDATE: RoundPhase.COLLECTING,
    Step.SURVIVORS: RoundPhase.SURVIVORS,
    Step.UNMASK: RoundPhase.UNMASKING,
}
CLOSES = {
    Step.KEYS: RoundEvent.KEYS_CLOSED,
    Step.SHARES: RoundEvent.SHARES_CLOSED,
    Step.UPDATE: RoundEvent.SURVIVORS_FIXED,
    Step.SURVIVORS: RoundEvent.SURVIVORS_SIGNED,
    Step.UNMASK: RoundEvent.UNMASKED,
}
LACKING = {
    Step.KEYS: AbortReason.KEYS,
    Step.SHARES: AbortReason.SHARES,
    Step.UPDATE: AbortReason.UPDATES,
    Step.SURVIVORS: AbortReason.SIGNATURES,
    Step.UNMASK: AbortReason.ANSWERS,
}
ENDS = (RoundEvent.ATTEMPT_ABORTED, RoundEvent.ATTEMPTS_EXHAUSTED, RoundEvent.GRANTS_LACKING)


def at(step: Step, **changes: Any) -> SecuredState:
    """Five members of which four are needed, at work; the step's time and the round's are over at noon."""
    frozen = step in (Step.SURVIVORS, Step.UNMASK)
    state = SecuredState(
        phase=PHASE_OF[step],
        step=step,
        paused=False,
        arrived=0,
        awaited=5,
        needed=4,
        target=4 if frozen else 5,
        tried=0,
        attempt=1,
        attempts=3,
        bound=False,
        staying=0,
        again=5,
        able=5,
        min_updates=3,
        step_closes_at=None if step is Step.UPDATE else NOON,
        closes_at=NOON,
        uploading_until=None,
    )
    return replace(state, **changes)


GIVEN_UP = RoundEvent.ATTEMPT_ABORTED
EVERYWHERE: dict[str, tuple[dict[str, Any], datetime, str | RoundEvent | None]] = {
    "at work": ({}, BEFORE, None),
    "all are in": ({"arrived": 5, "awaited": 0}, BEFORE, "closes"),
    "all are in, late": ({"arrived": 5, "awaited": 0}, MUCH_LATER, "closes"),
    "enough, and nobody else may come": ({"arrived": 4, "awaited": 0}, BEFORE, "closes"),
    "enough at the moment": ({"arrived": 4, "awaited": 1}, NOON, "closes"),
    "too few and too few may come": ({"arrived": 2, "awaited": 1}, BEFORE, GIVEN_UP),
    "too few and nobody may come": ({"arrived": 2, "awaited": 0}, BEFORE, GIVEN_UP),
    "just enough may still come": ({"arrived": 3, "awaited": 1}, BEFORE, None),
    "too few when the time is over": ({"arrived": 2, "awaited": 3}, NOON, GIVEN_UP),
    "nobody came": ({}, NOON, GIVEN_UP),
    "given up for the last time": ({"attempt": 3}, NOON, RoundEvent.ATTEMPTS_EXHAUSTED),
    "nobody is left for a new attempt": ({"again": 2, "able": 3}, NOON, RoundEvent.ATTEMPTS_EXHAUSTED),
    "grants lack for a new attempt": ({"again": 2, "able": 2}, NOON, RoundEvent.GRANTS_LACKING),
    "the last attempt, and grants lack": (
        {"attempt": 3, "again": 2, "able": 2}, NOON, RoundEvent.ATTEMPTS_EXHAUSTED,
    ),
    "bound to all, and all may be asked": ({"bound": True, "arrived": 3}, NOON, GIVEN_UP),
    "bound to somebody who may not be asked": ({"bound": True, "again": 0}, NOON, RoundEvent.ATTEMPTS_EXHAUSTED),
    "bound, and grants lack": ({"bound": True, "again": 0, "able": 2}, NOON, RoundEvent.ATTEMPTS_EXHAUSTED),
    "as many for a new attempt as it needs": ({"again": 3, "able": 3}, NOON, GIVEN_UP),
    "paused, too few when the time is over": ({"paused": True, "arrived": 3}, MUCH_LATER, None),
    "paused and hopeless": ({"paused": True, "arrived": 0, "awaited": 1}, MUCH_LATER, None),
    "paused, and all are in": ({"paused": True, "arrived": 5, "awaited": 0}, BEFORE, "closes"),
    "being summed": ({"phase": RoundPhase.AGGREGATING}, MUCH_LATER, None),
}  # fmt: skip


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("changes", "now", "event"), EVERYWHERE.values(), ids=EVERYWHERE)
def test_what_is_due_in_every_step(
    step: Step, changes: dict[str, Any], now: datetime, event: str | RoundEvent | None
) -> None:
    expected = CLOSES[step] if event == "closes" else event

    assert due_secured_event(at(step, **changes), now) is expected


BUT: dict[str, tuple[SecuredState, datetime, RoundEvent | None]] = {
    "keys that are too few for any roster are waited for until the round's own deadline": (
        at(Step.KEYS, arrived=2, awaited=3, closes_at=AFTER), NOON, None,
    ),
    "keys that are enough for a smaller roster have the step's time": (
        at(Step.KEYS, arrived=3, awaited=2, staying=3, closes_at=MUCH_LATER), BEFORE, None,
    ),
    "then the roster shrinks": (
        at(Step.KEYS, arrived=3, awaited=2, staying=3, closes_at=MUCH_LATER), NOON, RoundEvent.ROSTER_SHRUNK,
    ),
    "it shrinks at once where nobody else may come": (
        at(Step.KEYS, arrived=3, awaited=0, staying=3), BEFORE, RoundEvent.ROSTER_SHRUNK,
    ),
    "whoever may still come has the step's time, though too few for this roster": (
        at(Step.KEYS, arrived=3, awaited=1, needed=5, staying=3), BEFORE, None,
    ),
    "a smaller roster uses up no attempt": (
        at(Step.KEYS, arrived=3, staying=3, attempt=3), NOON, RoundEvent.ROSTER_SHRUNK,
    ),
    "a roster does not shrink to those who may not be asked": (
        at(Step.KEYS, arrived=3, awaited=2, staying=2, closes_at=AFTER), NOON, None,
    ),
    "and is asked anew at the deadline": (at(Step.KEYS, arrived=3, awaited=2, staying=2), NOON, GIVEN_UP),
    "a paused round's roster does not shrink": (
        at(Step.KEYS, arrived=3, awaited=2, staying=3, paused=True), MUCH_LATER, None,
    ),
    "a bound round's roster does not shrink": (
        at(Step.KEYS, arrived=3, awaited=2, staying=3, bound=True), MUCH_LATER, GIVEN_UP,
    ),
    "shares do not make a smaller roster": (at(Step.SHARES, arrived=3, awaited=2, staying=3), NOON, GIVEN_UP),
    "shares that are too few are not": (
        at(Step.SHARES, arrived=3, awaited=2, closes_at=MUCH_LATER), NOON, GIVEN_UP,
    ),
    "enough keys close at the step's own time": (
        at(Step.KEYS, arrived=4, awaited=1, closes_at=MUCH_LATER), NOON, RoundEvent.KEYS_CLOSED,
    ),
    "enough keys before that wait for everybody": (
        at(Step.KEYS, arrived=4, awaited=1, closes_at=BEFORE), BEFORE, None,
    ),
    "as many keys as the round wants wait for everybody too": (
        at(Step.KEYS, arrived=4, awaited=1, target=4), BEFORE, None,
    ),
    "as many shares as the round wants wait for everybody too": (
        at(Step.SHARES, arrived=4, awaited=1, target=4), BEFORE, None,
    ),
    "enough updates wait for the others": (at(Step.UPDATE, arrived=4, awaited=1), BEFORE, None),
    "as many updates as the round wants do not": (
        at(Step.UPDATE, arrived=4, awaited=1, target=4), BEFORE, RoundEvent.SURVIVORS_FIXED,
    ),
    "an upload within its grace holds the set open": (
        at(Step.UPDATE, arrived=4, awaited=1, uploading_until=AFTER), NOON, None,
    ),
    "an upload within its grace may still be the one that is needed": (
        at(Step.UPDATE, arrived=3, awaited=1, uploading_until=AFTER), NOON, None,
    ),
    "the grace is over": (
        at(Step.UPDATE, arrived=4, awaited=1, uploading_until=AFTER), AFTER, RoundEvent.SURVIVORS_FIXED,
    ),
    "signatures of the threshold are enough at once": (
        at(Step.SURVIVORS, arrived=4, awaited=1), BEFORE, RoundEvent.SURVIVORS_SIGNED,
    ),
    "answers of the threshold are enough at once": (
        at(Step.UNMASK, arrived=4, awaited=1), BEFORE, RoundEvent.UNMASKED,
    ),
    "a paused round's signatures are taken": (
        at(Step.SURVIVORS, arrived=4, awaited=1, paused=True), BEFORE, RoundEvent.SURVIVORS_SIGNED,
    ),
    "more answers after wrong shares": (
        at(Step.UNMASK, arrived=4, awaited=1, needed=5, target=5, tried=4), BEFORE, None,
    ),
    "fewer of them than hoped for are tried all the same when the time is over": (
        at(Step.UNMASK, arrived=5, awaited=1, needed=6, target=6, tried=4), NOON, RoundEvent.UNMASKED,
    ),
    "but not before": (at(Step.UNMASK, arrived=5, awaited=1, needed=6, target=6, tried=4), BEFORE, None),
    "those that were tried are not tried again": (
        at(Step.UNMASK, arrived=4, awaited=1, needed=5, target=5, tried=4), NOON, GIVEN_UP,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("state", "now", "event"), BUT.values(), ids=BUT)
def test_what_is_due_in_some_steps_alone(state: SecuredState, now: datetime, event: RoundEvent | None) -> None:
    assert due_secured_event(state, now) is event


@pytest.mark.parametrize("step", STEPS)
def test_an_attempt_is_given_up_for_want_of_what_its_step_asks_for(step: Step) -> None:
    assert abort_reason(at(step, arrived=2), MUCH_LATER) is LACKING[step]
    assert abort_reason(at(step, arrived=4), MUCH_LATER) is None
    assert abort_reason(at(step, arrived=3), BEFORE) is None


def test_more_answers_than_there_are_members_mean_wrong_shares() -> None:
    assert abort_reason(at(Step.UNMASK, arrived=5, awaited=0, needed=6, target=6), BEFORE) is AbortReason.WRONG_SHARES


# --- What must always hold --------------------------------------------------------------------------------------------

moments = st.integers(-50, 50).map(lambda seconds: NOON + timedelta(seconds=seconds))
counts = st.integers(0, 8)


@st.composite
def states(draw: st.DrawFn) -> SecuredState:
    """Any state that there can be."""
    step = draw(st.sampled_from(STEPS))
    needed = draw(st.integers(2, 8))
    target = needed if step in (Step.SURVIVORS, Step.UNMASK) else draw(st.integers(needed, 10))
    return SecuredState(
        phase=PHASE_OF[step],
        step=step,
        paused=draw(st.booleans()),
        arrived=draw(counts),
        awaited=draw(counts),
        needed=needed,
        target=target,
        tried=draw(counts) if step is Step.UNMASK else 0,
        attempt=draw(st.integers(1, 4)),
        attempts=draw(st.integers(1, 4)),
        bound=draw(st.booleans()),
        staying=draw(counts),
        again=draw(counts),
        able=draw(counts),
        min_updates=draw(st.integers(3, 6)),
        step_closes_at=None if step is Step.UPDATE else draw(moments),
        closes_at=draw(moments),
        uploading_until=draw(st.none() | moments) if step is Step.UPDATE else None,
    )


@given(states(), moments)
def test_what_is_due_happens_to_a_round_in_that_phase(state: SecuredState, now: datetime) -> None:
    event = due_secured_event(state, now)

    assert event is None or (state.phase, event) in ROUND_TRANSITIONS


@given(states(), moments)
def test_a_step_never_closes_with_fewer_than_are_needed(state: SecuredState, now: datetime) -> None:
    if due_secured_event(state, now) is CLOSES[state.step]:
        assert state.arrived >= (min(state.needed, state.tried + 1) if state.tried else state.needed)


@given(states(), moments)
def test_a_roster_shrinks_only_to_as_many_as_the_job_asks_for(state: SecuredState, now: datetime) -> None:
    if due_secured_event(state, now) is RoundEvent.ROSTER_SHRUNK:
        assert state.step is Step.KEYS
        assert state.min_updates <= min(state.staying, state.arrived)
        assert not state.bound
        assert not state.paused


@given(states(), moments)
def test_a_bound_round_has_no_other_attempt_than_of_those_it_is_bound_to(state: SecuredState, now: datetime) -> None:
    if state.bound and state.again == 0:
        assert due_secured_event(state, now) in (None, CLOSES[state.step], RoundEvent.ATTEMPTS_EXHAUSTED)


@given(states(), moments)
def test_an_attempt_with_enough_is_never_given_up(state: SecuredState, now: datetime) -> None:
    if due_secured_event(state, now) in ENDS:
        assert state.arrived < state.needed
        assert not state.paused


@given(states(), moments, moments)
def test_what_is_due_stays_due_until_it_is_done(state: SecuredState, now: datetime, later: datetime) -> None:
    assume(now <= later)
    event = due_secured_event(state, now)
    if event is not None:
        assert due_secured_event(state, later) is event


@given(states())
def test_no_step_waits_for_ever(state: SecuredState) -> None:
    assert state.paused or due_secured_event(state, MUCH_LATER) is not None


@given(states(), moments)
def test_one_more_message_never_turns_a_close_into_a_wait_nor_gives_an_attempt_up(
    state: SecuredState, now: datetime
) -> None:
    assume(state.awaited > 0)
    more = replace(state, arrived=state.arrived + 1, awaited=state.awaited - 1)
    if due_secured_event(state, now) is CLOSES[state.step]:
        assert due_secured_event(more, now) is CLOSES[state.step]
    if due_secured_event(more, now) in ENDS:
        assert due_secured_event(state, now) in ENDS


@given(states(), moments)
def test_attempts_come_to_an_end(state: SecuredState, now: datetime) -> None:
    given_up = 0
    while due_secured_event(state, now) is RoundEvent.ATTEMPT_ABORTED:
        state = replace(state, attempt=state.attempt + 1)
        given_up += 1
    assert given_up <= state.attempts
