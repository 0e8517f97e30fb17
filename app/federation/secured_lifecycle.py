"""What the passing of time and messages asks of a round under secure aggregation.

Theory of operation. An attempt has five steps. While the round *collects*, members send `keys`, then `shares`, then
their masked `update`; a step closes when all that still may have sent theirs, when there are as many as the round
wants, or when its time has come, and whoever is missing then has left. With the updates the set is frozen: its members
sign it (*survivors*), and as soon as the threshold has, they tell shares of what has to be taken off the sum
(*unmasking*); as soon as the threshold has told, the round *aggregates*. Shares that do not fit together take it back
to unmasking, where two more answers are waited for.

Where fewer are left than are needed nothing was learned, and nothing will be: the attempt is given up
(`ATTEMPT_ABORTED`) and a new one begins, with new keys, those who may be asked now, and nothing kept. Keys alone are
cheap and hide nothing: where fewer than needed have sent theirs in time, but enough for a smaller roster, a new attempt
begins among those at once (`ROSTER_SHRUNK`), which uses none of the attempts up; with fewer still the step waits on, up
to the round's own deadline.

Once a share was told, members tell shares again only for the very same sum: whoever saw two sums of a round could
subtract them. So from then on the round is *bound*: every new attempt asks exactly the survivors of that one and needs
them all, and where that cannot be the round fails at once.
"""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final

from app.federation.lifecycle import RoundEvent
from isthmus.wire.rounds import RoundPhase
from isthmus.wire.secured import Step

STEPS: Final = tuple(Step)
"""In their order."""


class AbortReason(StrEnum):
    """Why an attempt is given up: what there are too few of."""

    KEYS = "too-few-keys"
    SHARES = "too-few-shares"
    UPDATES = "too-few-updates"
    SIGNATURES = "too-few-signatures"
    ANSWERS = "too-few-answers"
    WRONG_SHARES = "wrong-shares"


_LACKING: Final = {
    Step.KEYS: AbortReason.KEYS,
    Step.SHARES: AbortReason.SHARES,
    Step.UPDATE: AbortReason.UPDATES,
    Step.SURVIVORS: AbortReason.SIGNATURES,
    Step.UNMASK: AbortReason.ANSWERS,
}
_CLOSES: Final = {
    Step.KEYS: RoundEvent.KEYS_CLOSED,
    Step.SHARES: RoundEvent.SHARES_CLOSED,
    Step.UPDATE: RoundEvent.SURVIVORS_FIXED,
    Step.SURVIVORS: RoundEvent.SURVIVORS_SIGNED,
    Step.UNMASK: RoundEvent.UNMASKED,
}


@dataclass(frozen=True, slots=True)
class SecuredState:
    """All that decides what is due.

    Attributes:
        phase, step: where the round and its attempt stand.
        paused: the job is paused: deadlines stand still.
        arrived: messages of this step, or updates, that are in and count.
        awaited: members whose message may still come.
        needed: with fewer the attempt does not go on: members up to the freeze, then signatures, then answers.
        target: with so many the step closes at once; at least `needed`. Keys and shares wait for everybody.
        tried: so many answers did not fit together; 0 before that.
        attempt, attempts: of the round.
        bound: shares were told, so a new attempt is of the same survivors, or there is none.
        staying: those whose keys are in and who may be asked anew. Looked at only where a smaller roster is due.
        again: who would be asked in a new attempt. Looked at only where this one cannot go on; 0 where the round is
            bound to members who cannot all be asked.
        able: participations of the job that may be asked now. Looked at only where this attempt cannot go on.
        min_updates: a new attempt needs so many.
        step_closes_at: until then the step waits for everybody; None: until the round's deadline.
        closes_at: the deadline of the attempt's keys and updates.
        uploading_until: until when uploads that make progress hold the set open; None if there are none.
    """

    phase: RoundPhase
    step: Step
    paused: bool
    arrived: int
    awaited: int
    needed: int
    target: int
    tried: int
    attempt: int
    attempts: int
    bound: bool
    staying: int
    again: int
    able: int
    min_updates: int
    step_closes_at: datetime | None
    closes_at: datetime
    uploading_until: datetime | None

    @property
    def enough(self) -> bool:
        """Whether the attempt could go on with what is in."""
        return self.arrived >= self.needed

    @property
    def hopeless(self) -> bool:
        """Whether it cannot go on, whoever still comes."""
        return self.arrived + self.awaited < self.needed

    @property
    def enough_for_fewer(self) -> bool:
        """Whether those whose keys are in can make an attempt of their own."""
        return self.step is Step.KEYS and not self.bound and not self.enough and self.arrived >= self.min_updates


def may_shrink(state: SecuredState, now: datetime) -> bool:
    """Whether a smaller roster is due at `now`: too few keys have come in time, but enough for that."""
    if state.paused or not state.enough_for_fewer:
        return False
    return state.awaited == 0 or now >= _keys_close_at(state)


def abort_reason(state: SecuredState, now: datetime) -> AbortReason | None:
    """Why the attempt has to be given up at `now`; None if it need not be."""
    if state.phase is RoundPhase.AGGREGATING or state.paused or state.enough or _tries_again(state, now):
        return None
    if state.enough_for_fewer and not may_shrink(state, now):
        return None  # there will be a smaller roster, if not all come
    if state.hopeless:
        # More answers are needed than there are members only where those that were in did not fit together.
        return AbortReason.WRONG_SHARES if state.step is Step.UNMASK else _LACKING[state.step]
    return _LACKING[state.step] if _waited_long_enough(state, now) else None


def _keys_close_at(state: SecuredState) -> datetime:
    return state.closes_at if state.step_closes_at is None else min(state.step_closes_at, state.closes_at)


def _tries_again(state: SecuredState, now: datetime) -> bool:
    """Whether answers that did not fit together are tried once more, with those that came since: no more will."""
    if state.step is not Step.UNMASK or state.paused:
        return False
    return 0 < state.tried < state.arrived and _waited_long_enough(state, now)


def _waited_long_enough(state: SecuredState, now: datetime) -> bool:
    """Whether a step that lacks messages gets no more time."""
    if state.step in (Step.KEYS, Step.UPDATE):
        return now >= state.closes_at and not _uploading(state, now)
    return state.step_closes_at is not None and now >= state.step_closes_at


def _uploading(state: SecuredState, now: datetime) -> bool:
    return state.uploading_until is not None and now < state.uploading_until


def due_secured_event(  # noqa: PLR0911 -- it reads as a list of cases
    state: SecuredState, now: datetime
) -> RoundEvent | None:
    """What the passing of time and messages asks of the round at `now`; None if it should wait.

    Args:
        state: the round as it stands under its lock.
        now: Postgres's clock, read after the lock.

    Edge cases:
        a paused job's steps close when all are in that they wait for, and by nothing else;
        an attempt that cannot go on is given up at once and not at its deadline;
        a round that is bound to survivors who cannot all be asked fails, whatever attempts it has left;
        there is no new attempt for want of grants: the job pauses, and what is in stays until it is resumed.
    """
    if state.phase is RoundPhase.AGGREGATING:
        return None
    if (state.enough and _closes(state, now)) or _tries_again(state, now):
        return _CLOSES[state.step]
    if may_shrink(state, now) and state.staying >= state.min_updates:
        return RoundEvent.ROSTER_SHRUNK
    if abort_reason(state, now) is None:
        return None
    if state.attempt >= state.attempts or (state.bound and state.again == 0):
        return RoundEvent.ATTEMPTS_EXHAUSTED
    if state.again >= state.min_updates:
        return RoundEvent.ATTEMPT_ABORTED
    return RoundEvent.GRANTS_LACKING if state.able < state.min_updates else RoundEvent.ATTEMPTS_EXHAUSTED


def _closes(state: SecuredState, now: datetime) -> bool:
    """Whether a step in which enough have come waits for nobody else."""
    if state.awaited == 0:
        return True
    if state.arrived >= state.target and state.step not in (Step.KEYS, Step.SHARES):
        return True
    if state.paused:
        return False
    closes_at = state.closes_at if state.step_closes_at is None else state.step_closes_at
    return now >= closes_at and not _uploading(state, now)
