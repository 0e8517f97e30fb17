"""Jobs."""

from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from isthmus.commands.rendering.secured import EVENT_WORDS, named, secured_fields
from isthmus.commands.rendering.text import Cell, fields, printable, table
from isthmus.wire.events import EventView
from isthmus.wire.jobs import JobState, JobView, ParticipationView
from isthmus.wire.rounds import RoundView

STYLES = {
    JobState.COMPLETED: "green",
    JobState.RUNNING: "cyan",
    JobState.FAILED: "red",
    JobState.CANCELLED: "red",
    JobState.PAUSED: "yellow",
}


def jobs_table(views: list[JobView]) -> Table:
    """Jobs."""
    return table(
        ["JOB", "STATE", "ROUNDS", "OWNER", "CREATED", "ID"],
        [
            (
                view.name,
                state_text(view.state),
                f"{view.rounds_completed}/{view.spec.rounds}",
                view.owner,
                view.created_at,
                str(view.id),
            )
            for view in views
        ],
    )


def state_text(state: JobState) -> Text:
    """A state in its colour."""
    return Text(state.value, style=STYLES.get(state, ""))


def job_text(view: JobView) -> Table:
    """One job."""
    pairs: list[tuple[str, Cell]] = [
        ("job", view.name),
        ("id", str(view.id)),
        ("state", state_text(view.state)),
        ("detail", view.detail or view.reason),
        ("rounds", f"{view.rounds_completed} of {view.spec.rounds}"),
        ("owner", f"{view.owner}, for: {view.spec.purpose}"),
        ("spec digest", view.spec_digest),
        ("model digest", view.model_digest),
        ("started", view.started_at),
        ("ended", view.ended_at),
    ]
    return fields([pair for pair in pairs if pair[1] is not None])


def job_report(
    view: JobView, participations: Sequence[ParticipationView], current: RoundView | None, waits: Sequence[str]
) -> Group:
    """A job with who takes part, where its round stands, and what it waits for."""
    parts: list[Table | Text] = [job_text(view)]
    if participations:
        parts.append(
            table(
                ["DATASET", "STATE", "ROWS", "APPROVED BY", "GRANT", "DETAIL"],
                [
                    (
                        f"{part.organization}/{part.dataset}",
                        part.state,
                        part.declared_rows,
                        part.grant.granted_by if part.grant else None,
                        f"{part.grant.rounds_used} of {part.grant.rounds} rounds" if part.grant else None,
                        part.detail,
                    )
                    for part in participations
                ],
            )
        )
    if current is not None:
        parts.append(tasks_table(current))
        if current.secured is not None:
            parts.append(secured_fields(current, current.secured))
            parts.append(Text())
    if waits:
        parts.append(Text("What it waits for" if view.ended_at is None else "What happened", style="bold"))
        parts.extend(Text(f"  {printable(sentence)}") for sentence in waits)
    return Group(*parts)


def tasks_table(current: RoundView) -> Table:
    """The tasks of a round."""
    return table(
        ["TASK OF", "STATE", "WORKER", "ATTEMPT", "OFFERS", "DETAIL"],
        [
            (f"{task.organization}/{task.dataset}", task.state, task.worker, task.attempt, task.fence, task.detail)
            for task in current.tasks
        ],
        title=f"Round {current.number} ({current.kind}): {current.phase}, {current.accepted} of "
        f"{current.target_updates} updates",
    )


def event_line(event: EventView) -> str:
    """One event as a line: when, what, and its plain details."""
    secured = event.kind in EVENT_WORDS
    details = " ".join(
        f"{name}={_short(value)}"
        for name, value in event.data.items()
        if isinstance(value, str | int | float | bool) or (secured and _are_names(value))
    )
    by = "" if event.actor == "service" else f" by {event.actor}"
    words = f": {EVENT_WORDS[event.kind]};" if secured else ""
    return printable(f"{event.at:%H:%M:%S} {event.kind}{by}{words} {details}").rstrip(" ;").replace("\n", " ")


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def _short(value: str | float | bool | list[str]) -> str:
    """A digest or seed by its beginning, some of many names, anything else as it is."""
    if isinstance(value, list):
        return named(value)
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 and text.isalnum() else text
