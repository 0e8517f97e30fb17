"""A running job at a glance: where it stands, and one line a round."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from isthmus.commands.rendering.diagnosis import waits_for
from isthmus.commands.rendering.jobs import state_text
from isthmus.commands.rendering.text import number, printable, table
from isthmus.wire.jobs import JobView, ParticipationState, ParticipationView
from isthmus.wire.rounds import RoundView

SHOWN_ROUNDS = 12
SHOWN_SENTENCES = 6


@dataclass
class Progress:
    """What is known of a job that is being watched."""

    job: JobView
    participations: list[ParticipationView] = field(default_factory=list)
    current: RoundView | None = None
    done: list[RoundView] = field(default_factory=list)
    """The training rounds that were completed, in their order."""


def progress_view(progress: Progress, now: datetime) -> Group:
    """The live view."""
    job = progress.job
    approved = [view for view in progress.participations if view.state is ParticipationState.APPROVED]
    head = Table.grid(padding=(0, 2))
    head.add_row(Text(printable(job.name), style="bold"), state_text(job.state), Text(str(job.id), style="dim"))
    who = ", ".join(f"{view.organization} ({view.grant.granted_by})" for view in approved if view.grant)
    parts: list[Table | Text | ProgressBar] = [head]
    if who:
        parts.append(Text(printable(f"approved: {who}")))
    parts.append(Text(f"round {job.rounds_completed}/{job.spec.rounds}"))
    parts.append(ProgressBar(total=job.spec.rounds, completed=job.rounds_completed, width=60))
    if progress.done:
        parts.append(rounds_table(progress.done[-SHOWN_ROUNDS:]))
    waits = waits_for(job, progress.participations, progress.current, now)
    parts.extend(Text(f"  {printable(sentence)}", style="dim") for sentence in waits[:SHOWN_SENTENCES])
    if len(waits) > SHOWN_SENTENCES:
        parts.append(Text(f"  and {len(waits) - SHOWN_SENTENCES} more", style="dim"))
    return Group(*parts)


def rounds_table(rounds: Sequence[RoundView]) -> Table:
    """One line a round: updates, seconds, loss and accuracy."""
    return table(
        ["ROUND", "UPDATES", "SECONDS", "LOSS", "ACCURACY"],
        [
            (
                view.number,
                f"{view.accepted}/{view.cohort_size}",
                seconds(view),
                figure(view, "loss"),
                figure(view, "accuracy"),
            )
            for view in rounds
        ],
    )


def round_line(view: RoundView, rounds: int) -> str:
    """A completed round as one line."""
    words = [f"round {view.number}/{rounds}", f"updates {view.accepted}/{view.cohort_size}"]
    for name, value in (
        ("seconds", seconds(view)),
        ("loss", figure(view, "loss")),
        ("accuracy", figure(view, "accuracy")),
    ):
        if value is not None:
            words.append(f"{name} {number(value)}")
    return "  ".join(words)


def seconds(view: RoundView) -> float | None:
    """How long a round took."""
    return (view.completed_at - view.opened_at).total_seconds() if view.completed_at is not None else None


def figure(view: RoundView, name: str) -> float | None:
    """A metric on the hold-out, or else of the local training."""
    return view.metrics.get(f"holdout/{name}", view.metrics.get(f"train/{name}"))
