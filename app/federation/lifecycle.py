"""The life of jobs and rounds as tables, and what the passing of time and updates asks of a round.

Theory of operation. A round *collects*: its tasks are offered, claimed, uploaded. It closes in one of three ways:
enough updates are in (`TARGET_REACHED`); the deadline has come, or nobody can bring more, and the minimum is in
(`DEADLINE_WITH_ENOUGH`); or the missing cannot be made up (`ATTEMPTS_EXHAUSTED`). Before it gives up it offers the
missing tasks again (`OFFER_MISSING_AGAIN`) and keeps the updates that are in. A round that lost too many of those that
it asked asks the others (`REFILLED`); where there are none because grants lack, its job pauses (`GRANTS_LACKING`). A
closed round *aggregates* a frozen set; that ends in a checkpoint, or in a rejection if the set has no finite mean.
Rounds under secure aggregation have phases of their own in between: see `app.federation.secured_lifecycle`.

Nothing outside of these two files decides a phase. Nothing in them reads a clock: `now` is a parameter, and it is
Postgres's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from app.errors import StateConflict
from isthmus.wire.jobs import JobState
from isthmus.wire.rounds import RoundPhase, TaskState


class RoundEvent(StrEnum):
    """What can happen to a round."""

    TARGET_REACHED = "target-reached"
    DEADLINE_WITH_ENOUGH = "deadline-with-enough"
    OFFER_MISSING_AGAIN = "offer-missing-again"
    ATTEMPTS_EXHAUSTED = "attempts-exhausted"
    GRANTS_LACKING = "grants-lacking"
    REFILLED = "refilled"
    KEYS_CLOSED = "keys-closed"
    SHARES_CLOSED = "shares-closed"
    SURVIVORS_FIXED = "survivors-fixed"
    SURVIVORS_SIGNED = "survivors-signed"
    UNMASKED = "unmasked"
    SHARES_WRONG = "shares-wrong"
    ROSTER_SHRUNK = "roster-shrunk"
    ATTEMPT_ABORTED = "attempt-aborted"
    AGGREGATE_STORED = "aggregate-stored"
    AGGREGATE_REJECTED = "aggregate-rejected"
    JOB_CANCELLED = "job-cancelled"


class JobEvent(StrEnum):
    """What can happen to a job."""

    STARTED = "started"
    ENOUGH_APPROVED = "enough-approved"
    PAUSED = "paused"
    RESUMED = "resumed"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


ROUND_TRANSITIONS: Final[Mapping[tuple[RoundPhase, RoundEvent], RoundPhase]] = MappingProxyType(
    {
        (RoundPhase.COLLECTING, RoundEvent.TARGET_REACHED): RoundPhase.AGGREGATING,
        (RoundPhase.COLLECTING, RoundEvent.DEADLINE_WITH_ENOUGH): RoundPhase.AGGREGATING,
        (RoundPhase.COLLECTING, RoundEvent.OFFER_MISSING_AGAIN): RoundPhase.COLLECTING,  # attempt + 1
        (RoundPhase.COLLECTING, RoundEvent.GRANTS_LACKING): RoundPhase.COLLECTING,  # and the job pauses
        (RoundPhase.COLLECTING, RoundEvent.REFILLED): RoundPhase.COLLECTING,  # asks those that it did not ask
        (RoundPhase.COLLECTING, RoundEvent.ATTEMPTS_EXHAUSTED): RoundPhase.FAILED,
        (RoundPhase.COLLECTING, RoundEvent.JOB_CANCELLED): RoundPhase.CANCELLED,
        # Under secure aggregation, between the first update and the sum:
        (RoundPhase.COLLECTING, RoundEvent.KEYS_CLOSED): RoundPhase.COLLECTING,
        (RoundPhase.COLLECTING, RoundEvent.SHARES_CLOSED): RoundPhase.COLLECTING,
        (RoundPhase.COLLECTING, RoundEvent.SURVIVORS_FIXED): RoundPhase.SURVIVORS,
        (RoundPhase.COLLECTING, RoundEvent.ROSTER_SHRUNK): RoundPhase.COLLECTING,  # attempt + 1, with fewer
        (RoundPhase.COLLECTING, RoundEvent.ATTEMPT_ABORTED): RoundPhase.COLLECTING,  # attempt + 1, keeps nothing
        (RoundPhase.SURVIVORS, RoundEvent.SURVIVORS_SIGNED): RoundPhase.UNMASKING,
        (RoundPhase.SURVIVORS, RoundEvent.ATTEMPT_ABORTED): RoundPhase.COLLECTING,
        (RoundPhase.SURVIVORS, RoundEvent.GRANTS_LACKING): RoundPhase.SURVIVORS,
        (RoundPhase.SURVIVORS, RoundEvent.ATTEMPTS_EXHAUSTED): RoundPhase.FAILED,
        (RoundPhase.SURVIVORS, RoundEvent.AGGREGATE_REJECTED): RoundPhase.FAILED,  # a budget does not hold the noise
        (RoundPhase.SURVIVORS, RoundEvent.JOB_CANCELLED): RoundPhase.CANCELLED,
        (RoundPhase.UNMASKING, RoundEvent.UNMASKED): RoundPhase.AGGREGATING,
        (RoundPhase.UNMASKING, RoundEvent.ATTEMPT_ABORTED): RoundPhase.COLLECTING,
        (RoundPhase.UNMASKING, RoundEvent.GRANTS_LACKING): RoundPhase.UNMASKING,
        (RoundPhase.UNMASKING, RoundEvent.ATTEMPTS_EXHAUSTED): RoundPhase.FAILED,
        (RoundPhase.UNMASKING, RoundEvent.JOB_CANCELLED): RoundPhase.CANCELLED,
        (RoundPhase.AGGREGATING, RoundEvent.SHARES_WRONG): RoundPhase.UNMASKING,  # more answers are needed
        (RoundPhase.AGGREGATING, RoundEvent.AGGREGATE_STORED): RoundPhase.COMPLETED,
        (RoundPhase.AGGREGATING, RoundEvent.AGGREGATE_REJECTED): RoundPhase.FAILED,
        (RoundPhase.AGGREGATING, RoundEvent.JOB_CANCELLED): RoundPhase.CANCELLED,
    }
)

JOB_TRANSITIONS: Final[Mapping[tuple[JobState, JobEvent], JobState]] = MappingProxyType(
    {
        (JobState.DRAFT, JobEvent.STARTED): JobState.AWAITING_APPROVAL,
        (JobState.DRAFT, JobEvent.CANCELLED): JobState.CANCELLED,
        (JobState.AWAITING_APPROVAL, JobEvent.ENOUGH_APPROVED): JobState.RUNNING,
        (JobState.AWAITING_APPROVAL, JobEvent.FAILED): JobState.FAILED,  # too many said no
        (JobState.AWAITING_APPROVAL, JobEvent.CANCELLED): JobState.CANCELLED,
        (JobState.RUNNING, JobEvent.PAUSED): JobState.PAUSED,
        (JobState.RUNNING, JobEvent.COMPLETED): JobState.COMPLETED,
        (JobState.RUNNING, JobEvent.FAILED): JobState.FAILED,
        (JobState.RUNNING, JobEvent.CANCELLED): JobState.CANCELLED,
        (JobState.PAUSED, JobEvent.RESUMED): JobState.RUNNING,
        (JobState.PAUSED, JobEvent.COMPLETED): JobState.COMPLETED,  # its last round was under way when it was paused
        (JobState.PAUSED, JobEvent.FAILED): JobState.FAILED,
        (JobState.PAUSED, JobEvent.CANCELLED): JobState.CANCELLED,
    }
)

OPEN_TASKS: Final = (TaskState.OFFERED, TaskState.CLAIMED, TaskState.UPLOADING)
"""Tasks that may still bring an update in this attempt."""

OFFERED_AGAIN: Final = (TaskState.FAILED, TaskState.EXPIRED)
"""Tasks that ended without an update and are offered again in the next attempt. A refusal is final for its round."""

ENDED_JOBS: Final = frozenset({JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED})


class TransitionRefused(StateConflict):
    """The table has no such step."""


def advance_round(phase: RoundPhase, event: RoundEvent) -> RoundPhase:
    """The phase after `event`.

    Raises:
        TransitionRefused: the event does not happen to a round in this phase.
    """
    try:
        return ROUND_TRANSITIONS[phase, event]
    except KeyError:
        raise TransitionRefused(f"The round is {phase}; {event} does not happen to it any more.") from None


def advance_job(state: JobState, event: JobEvent) -> JobState:
    """The state after `event`.

    Raises:
        TransitionRefused: the event does not happen to a job in this state; the message is for its owner.
    """
    try:
        return JOB_TRANSITIONS[state, event]
    except KeyError:
        raise TransitionRefused(f"The job is {state.replace('_', ' ')}: it cannot be {event} now.") from None


@dataclass(frozen=True, slots=True)
class RoundState:
    """All that decides what is due.

    Attributes:
        phase: where the round stands.
        paused: the job is paused: its deadlines stand still.
        accepted: updates that are in.
        target_updates, min_updates, attempt, attempts: of the round.
        open_tasks: tasks that may still bring an update in this attempt.
        offered_again: tasks that ended without an update and may be offered once more.
        able: participations of the job that may be asked now. Looked at only where the round cannot be filled.
        unasked: those of them that the round did not ask. Looked at only where the round cannot be filled.
        closes_at: the deadline of this attempt.
        uploading_until: until when uploads that make progress hold the round open; None if there are none.
    """

    phase: RoundPhase
    paused: bool
    accepted: int
    target_updates: int
    min_updates: int
    attempt: int
    attempts: int
    open_tasks: int
    offered_again: int
    able: int
    unasked: int
    closes_at: datetime
    uploading_until: datetime | None

    @property
    def can_be_filled(self) -> bool:
        """Whether the tasks that it has could still bring the round to its minimum."""
        return self.possible >= self.min_updates

    @property
    def possible(self) -> int:
        """Updates that could be in, if every task that it has brought one."""
        return self.accepted + self.open_tasks + self.offered_again


def due_event(state: RoundState, now: datetime) -> RoundEvent | None:  # noqa: PLR0911 -- it reads as a list of cases
    """What the passing of time and updates asks of a round at `now`; None if it should wait.

    Args:
        state: the round as it stands under its lock.
        now: Postgres's clock, read after the lock.

    Edge cases:
        a round with `min_updates` 0 (an evaluation) completes with whatever is in once its deadline has come;
        a paused job's round may reach its target, but nothing else happens to it until the job is resumed;
        a round that cannot reach its minimum any more fails, or pauses its job, at once and not at its deadline.
    """
    if state.phase is not RoundPhase.COLLECTING:
        return None
    if state.accepted >= state.target_updates:
        return RoundEvent.TARGET_REACHED
    if state.paused:
        return None
    if not state.can_be_filled:
        if state.possible + state.unasked >= state.min_updates:
            return RoundEvent.REFILLED
        return RoundEvent.GRANTS_LACKING if state.able < state.min_updates else RoundEvent.ATTEMPTS_EXHAUSTED
    if now < state.closes_at and state.open_tasks:
        return None
    if state.uploading_until is not None and now < state.uploading_until:
        return None
    if state.accepted >= state.min_updates:
        return RoundEvent.DEADLINE_WITH_ENOUGH
    return RoundEvent.ATTEMPTS_EXHAUSTED if state.attempt >= state.attempts else RoundEvent.OFFER_MISSING_AGAIN
