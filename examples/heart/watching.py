"""The job while it runs, from its event stream: one line that moves on a terminal, one line a round elsewhere."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from isthmus.wire.events import EventKind, EventView
from isthmus.wire.rounds import TaskKind

WHERE = len("final model")
MIN_BAR = 6


@dataclass
class Progress:
    """What the events have told so far."""

    rounds: int
    cohort: int = 0
    number: int = 0
    """Of the round that runs, or ran last."""
    kind: TaskKind = TaskKind.STATISTICS
    updates: int = 0
    seconds: list[float] = field(default_factory=list)
    """Of each training round that was completed."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The newest that the sites reported, pooled over them: of the model that the last round started from."""
    _opened_at: datetime | None = None

    def hear(self, event: EventView) -> bool:
        """Take in an event; says whether it completed a round."""
        match event.kind:
            case EventKind.ROUND_OPENED:
                self.number, self.kind = event.data["round"], TaskKind(event.data["task"])
                self.cohort, self.updates, self._opened_at = len(event.data["cohort"]), 0, event.at
            case EventKind.UPDATE_ACCEPTED:
                self.updates = event.data["accepted"]
            case EventKind.ROUND_COMPLETED:
                if self.kind is TaskKind.TRAIN and self._opened_at is not None:
                    self.seconds.append((event.at - self._opened_at).total_seconds())
                self.metrics.update(event.data["metrics"])
                return True
        return False

    @property
    def pace_s(self) -> float | None:
        """Seconds a round: the median so far."""
        return statistics.median(self.seconds) if self.seconds else None

    def words(self, seconds: float | None) -> tuple[str, str]:
        """Where the job is, and how it does. `seconds` is what is said of the time a round takes."""
        match self.kind:
            case TaskKind.STATISTICS:
                where = "scales"
            case TaskKind.TRAIN:
                where = f"round {self.number}/{self.rounds}"
            case TaskKind.EVALUATE:
                where = "final model"
        told = [f"{seconds:.2f} s a round"] if seconds is not None else []
        told.append(f"updates {self.updates}/{self.cohort}")
        told += [f"{name} {self.metrics[key]:.3f}" for name, key in _SHOWN if key in self.metrics]
        return where, "  ".join(told)


_SHOWN = (("loss", "holdout/loss"), ("accuracy", "holdout/accuracy"))


def watch(events: Iterable[EventView], rounds: int, console: Console) -> Progress:
    """Show a job's events until its last one."""
    progress = Progress(rounds)
    if not console.is_terminal:
        for event in events:
            if progress.hear(event):
                last = progress.seconds[-1] if progress.kind is TaskKind.TRAIN else None
                where, how = progress.words(last)
                console.print(f"  {where:<{WHERE}}  {how}")
        return progress
    with Live(_line(progress, console), console=console, refresh_per_second=12) as live:
        for event in events:
            progress.hear(event)
            live.update(_line(progress, console))
    return progress


def _line(progress: Progress, console: Console) -> RenderableType:
    where, how = progress.words(progress.pace_s)
    line = Table.grid(padding=(0, 2, 0, 0))
    line.add_column(no_wrap=True, width=WHERE + 2)
    line.add_column(no_wrap=True)
    line.add_column(no_wrap=True)
    room = console.width - WHERE - len(how) - 8
    done = len(progress.seconds)
    bar: RenderableType = Text("")
    if room >= MIN_BAR:
        bar = ProgressBar(total=progress.rounds, completed=done, width=min(room, 24))
    line.add_row(Text(f"  {where}", style="bold"), bar, Text(how))
    return line
