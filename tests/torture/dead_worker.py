"""What a worker that dies and stays dead costs a round, at the service's default settings; measured, not asserted here.

With over-selection the round needs the others only, and must not notice; without, it costs the worker's lease.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID

from isthmus.wire.jobs import JobState
from tests.acceptance.island import job_spec, until
from tests.torture.ground import DEFAULTS, Ground, ground

SITES: Final = 4
PROMISED_S: Final = 5.0
LEASE_S: Final = 15.0
OVER_SELECTED: Final = {"min_updates": 2, "fraction": 0.75, "over_selection": 1, "deadline_s": 600}
EVERYBODY: Final = {"min_updates": SITES, "deadline_s": 600}
DIES_AT: Final = {
    "task-in-hand": 2,
    "model-unfetched": 1,
    "training-ordered": 2,
    "trained": 2,
    "admitted": 2,
    "spent": 2,
}
"""Points of the agent, and the passage of each that belongs to the training round: statistics come first."""
WAITS: Final = "clinic-1"
HELD_AT: Final = "prepared"
"""Without this site's update the round cannot close before the first worker is dead."""


@dataclass(frozen=True)
class Cost:
    """One death, and what it cost."""

    point: str
    over_selected: bool
    seconds: float
    """Until the round was completed, from when the worker was dead and the last of the others could go on."""
    bound_s: float
    lease_lost: bool
    """Whether the dead worker's lease ended before the round did."""

    @property
    def ok(self) -> bool:
        """Whether it is within what is promised."""
        return self.seconds < self.bound_s


def measure(folder: Path, database_url: str) -> Iterator[Cost]:
    """Kill a worker at one point after the other. Yields each cost as it is known."""
    with ground(folder, database_url, SITES, settings=dict(DEFAULTS)) as opened:
        die_in(opened, "", over_selected=True)  # the training processes are warm from here on
        for point in DIES_AT:
            yield die_in(opened, point, over_selected=True)
        yield die_in(opened, "training-ordered", over_selected=False)


def die_in(opened: Ground, point: str, *, over_selected: bool) -> Cost:
    """Run a job of one round of training in which the first worker dies at `point`; it is started again afterwards.

    Where nobody was over-selected it is started again at once: the others wait for it.
    """
    agent, role = opened.agents[0], "clinic-0"
    spec = job_spec(
        rounds=1,
        cohort=OVER_SELECTED if over_selected else EVERYBODY,
        evaluation={"holdout": 0, "release": "local"},
    )
    job = opened.draft(spec)
    opened.take_all_back()
    if point:
        opened.give(role, point, DIES_AT[point], "kill")
        opened.give(WAITS, HELD_AT, 2, "hold")  # else the others may be done before it comes so far
    opened.start(job)
    began = time.monotonic()
    if point:
        until(lambda: opened.happened(role, point), f"{role} dies at {point}", 240)
        until(lambda: opened.happened(WAITS, HELD_AT), f"{WAITS} waits", 240)
        began = time.monotonic()
        opened.take_back(WAITS, HELD_AT)
        if not over_selected:
            _start_again(opened)
    until(lambda: _completed(opened, job.id), "the round is completed", 240)
    took_s = time.monotonic() - began
    lost = opened.watch.ask(
        "SELECT 1 FROM events WHERE stream = %s AND kind = 'lease-lost'", f"job:{job.id}"
    )  # fmt: skip
    if not agent.runs:
        _start_again(opened)
    until(lambda: _settled(opened), "everybody is ready", 240)
    return Cost(point, over_selected, took_s, PROMISED_S if over_selected else LEASE_S + 10, bool(lost))


def _completed(opened: Ground, job_id: UUID) -> bool:
    state = opened.watch_state(job_id)
    assert state not in (JobState.FAILED, JobState.CANCELLED), f"the job is {state}"
    return state is JobState.COMPLETED


def _start_again(opened: Ground) -> None:
    agent = opened.agents[0]
    assert agent.process is not None
    agent.process.wait(20)
    opened.started_at[agent] = agent.log.stat().st_size
    agent.start()


def _settled(opened: Ground) -> bool:
    """Every agent has said that it is ready since its last start."""
    return all(
        agent.runs and b"event=ready" in agent.log.read_bytes()[opened.started_at.get(agent, 0) :]
        for agent in opened.agents
    )
