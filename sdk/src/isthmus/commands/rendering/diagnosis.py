"""Why does it not go on? What a job waits for, as sentences."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final

from isthmus.commands.rendering.secured import secured_sentence
from isthmus.commands.rendering.text import ago, span
from isthmus.wire.jobs import JobReason, JobState, JobView, ParticipationState, ParticipationView
from isthmus.wire.rounds import OPEN_PHASES, RoundPhase, RoundView, TaskState, TaskView

ENDED = frozenset({JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED})


def waits_for(
    job: JobView, participations: Sequence[ParticipationView], current: RoundView | None, now: datetime
) -> list[str]:
    """What has to happen before the job goes on, the most important first. Empty: it waits for nothing."""
    if job.state in ENDED:
        return [job.detail] if job.detail and job.state is not JobState.COMPLETED else []
    if job.state is JobState.DRAFT:
        missing = "It has no initial model yet; then start it" if job.model_digest is None else "Start it"
        return [f"The job is a draft. {missing}: isthmus job start {job.id}"]
    if job.state is JobState.AWAITING_APPROVAL:
        return _approvals(job, participations)
    found = []
    if job.state is JobState.PAUSED:
        why = job.detail or job.reason or "no reason was given"
        found.append(f"The job is paused: {why.removesuffix('.')}.")
        if job.reason is JobReason.TOO_FEW_PARTICIPATIONS:
            return [*found, *_approvals(job, participations)]
        found.append(f"Nothing new is offered until: isthmus job resume {job.id}")
    if current is None:
        return found or ["The next round is about to be opened."]
    return [*found, *_round(current, now)]


def _approvals(job: JobView, participations: Sequence[ParticipationView]) -> list[str]:
    approved = sum(view.state is ParticipationState.APPROVED for view in participations)
    found = [f"{approved} of {job.spec.cohort.min_updates} approvals that it needs are given."]
    for view in participations:
        name = f"{view.organization}/{view.dataset}"
        because = f": {view.detail}" if view.detail else "."
        if view.state is ParticipationState.PENDING:
            found.append(f"{name} waits for a steward of {view.organization}{because}")
        elif view.state is not ParticipationState.APPROVED:
            found.append(f"{name} was {view.state}{because}")
    if not participations:
        found.append("No dataset was asked.")
    return found


def _round(current: RoundView, now: datetime) -> list[str]:
    name = f"Round {current.number} ({current.kind})"
    if current.secured is not None and current.phase in OPEN_PHASES:
        told = [secured_sentence(current, current.secured, now)]
        if current.phase is RoundPhase.COLLECTING:
            told += [_task(task, now) for task in current.tasks if task.state is not TaskState.SUBMITTED]
        return told
    if current.phase is RoundPhase.AGGREGATING:
        return [f"{name} has its updates; the next model is being computed."]
    if current.phase is not RoundPhase.COLLECTING:
        return [f"{name} is {current.phase}" + (f": {current.detail}" if current.detail else ".")]
    left = (current.closes_at - now).total_seconds()
    until = f"until {span(left)} from now" if left > 0 else "and its deadline has passed"
    attempt = f", attempt {current.attempt}" if current.attempt > 1 else ""
    head = (
        f"{name} has {current.accepted} of {current.target_updates} updates "
        f"(at least {current.min_updates}), {until}{attempt}."
    )
    return [head, *(_task(task, now) for task in current.tasks if task.state is not TaskState.SUBMITTED)]


def _task(task: TaskView, now: datetime) -> str:
    name = f"{task.organization}/{task.dataset}"
    because = f": {task.detail}" if task.detail else "."
    if task.state is TaskState.OFFERED:
        again = f" (offered {task.fence} times)" if task.fence > 1 else ""
        offered = f"{name} was offered its task {ago(task.offered_at, now)}{again}"
        return f"{offered} and has not claimed it: is its worker running?"
    if task.state is TaskState.CLAIMED:
        return f"{name} is at work{_lease(task, now)}"
    if task.state is TaskState.UPLOADING:
        return f"{name} was admitted and is sending its update{_lease(task, now)}"
    return f"{name} {_OVER.get(task.state, f'is {task.state}')}{because}"


_OVER: Final[Mapping[TaskState, str]] = {
    TaskState.REFUSED: "refused this round",
    TaskState.FAILED: "failed",
    TaskState.EXPIRED: "was not heard of in time",
}


def _lease(task: TaskView, now: datetime) -> str:
    by = f" by {task.worker}" if task.worker else ""
    if task.lease_expires_at is None:
        return f"{by}."
    left = (task.lease_expires_at - now).total_seconds()
    return f"{by}; its lease ends in {span(left)} unless renewed." if left > 0 else f"{by}; its lease has passed."
