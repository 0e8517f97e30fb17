"""Following a job: a live view on a terminal, lines elsewhere, JSON lines for machines."""

import queue
import threading
from typing import Final
from uuid import UUID

from rich.live import Live
from rich.text import Text

from isthmus.client import Client, Refused
from isthmus.commands.exits import ExitCode
from isthmus.commands.rendering.diagnosis import ENDED
from isthmus.commands.rendering.jobs import event_line, job_text
from isthmus.commands.rendering.metrics import last_with_sites, metrics_table, sites_table
from isthmus.commands.rendering.progress import Progress, progress_view, round_line
from isthmus.commands.session import Session, plain, write_json
from isthmus.wire.events import EventView
from isthmus.wire.jobs import JobState, JobView
from isthmus.wire.problems import ProblemCode
from isthmus.wire.rounds import RoundPhase

LOOK_S: Final = 2.0
"""Claims and heartbeats are no events: so often we look without one."""


def watch(at: Session, job_id: UUID, *, as_json: bool) -> ExitCode:
    """Follow a job to its end and tell how it went; OK only if it completed."""
    if as_json:
        for event in at.client.jobs.events(job_id):
            write_json(at.around, {"event": plain(event)})
        job = at.client.jobs.get(job_id)
        write_json(at.around, {"job": plain(job)})
        return exit_code(job)
    progress = Progress(at.client.jobs.get(job_id))
    follow = _live if at.around.out.is_terminal else _lines
    follow(at, progress)
    _conclude(at, progress.job)
    return exit_code(progress.job)


def exit_code(job: JobView) -> ExitCode:
    """What a job that has ended means for a script."""
    return ExitCode.OK if job.state is JobState.COMPLETED else ExitCode.JOB_UNSUCCESSFUL


def look(client: Client, progress: Progress) -> None:
    """Read where the job stands now."""
    job = client.jobs.get(progress.job.id)
    progress.participations = list(client.jobs.participations(job.id))
    progress.current = None
    if job.current_round is not None:
        progress.current = client.jobs.round(job.id, job.current_round)
    for number in range(len(progress.done) + 1, min(job.rounds_completed, job.spec.rounds) + 1):
        try:
            found = client.jobs.round(job.id, number)
        except Refused as error:
            if error.code is not ProblemCode.NOT_FOUND:
                raise
            break
        if found.phase is not RoundPhase.COMPLETED:
            break
        progress.done.append(found)
    progress.job = job


class _Follower:
    """The event stream, read by a thread of its own so that the view can move while nothing happens."""

    def __init__(self, client: Client, job_id: UUID) -> None:
        self._queue: queue.SimpleQueue[EventView | BaseException | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._pump, args=(client, job_id), daemon=True)
        self._thread.start()
        self.ended = False

    def _pump(self, client: Client, job_id: UUID) -> None:
        try:
            for event in client.jobs.events(job_id):
                self._queue.put(event)
        except BaseException as error:  # raised again by whoever waits
            self._queue.put(error)
        else:
            self._queue.put(None)

    def gather(self, patience_s: float) -> list[EventView]:
        """The events that are there, after waiting up to `patience_s` for a first one."""
        found: list[EventView] = []
        wait_s = patience_s
        while not self.ended:
            try:
                item = self._queue.get(timeout=wait_s)
            except queue.Empty:
                break
            wait_s = 0.01
            if isinstance(item, BaseException):
                raise item
            if item is None:
                self.ended = True
            else:
                found.append(item)
        return found


def _live(at: Session, progress: Progress) -> None:
    follower = _Follower(at.client, progress.job.id)
    look(at.client, progress)
    with Live(progress_view(progress, at.around.now()), console=at.around.out, refresh_per_second=4) as live:
        while not follower.ended:
            follower.gather(LOOK_S)
            look(at.client, progress)
            live.update(progress_view(progress, at.around.now()), refresh=True)


def _lines(at: Session, progress: Progress) -> None:
    follower = _Follower(at.client, progress.job.id)
    while not follower.ended:
        events = follower.gather(LOOK_S)
        for event in events:
            at.around.out.print(Text(event_line(event)), soft_wrap=True)
        if not events and not follower.ended:
            continue
        before = len(progress.done)
        look(at.client, progress)
        for view in progress.done[before:]:
            at.around.out.print(Text(round_line(view, progress.job.spec.rounds)), soft_wrap=True)


def _conclude(at: Session, job: JobView) -> None:
    if job.state not in ENDED:
        return
    at.around.out.print(job_text(job))
    measured = list(at.client.jobs.metrics(job.id))
    final = last_with_sites(measured)
    if final is not None:
        at.around.out.print(sites_table(final))
    elif any(view.pooled for view in measured):
        at.around.out.print(metrics_table(measured[-1:]))
