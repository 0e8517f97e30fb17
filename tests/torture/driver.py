"""Carries a plan out on a ground: gives the orders, does what a process cannot do to itself, and starts what died."""

import asyncio
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final
from uuid import UUID

import psycopg

from app.blobs import DirectoryBlobStore
from app.database import open_engine, open_sessions
from app.retention import collect_orphans
from isthmus.wire.jobs import JobState, JobView
from tests.acceptance.island import Program
from tests.torture.ground import Ground, freeze, thaw
from tests.torture.invariants import check_everything, check_job, digests_of, unreferred_files
from tests.torture.plans import (
    CLOCK_BACK,
    CLOCK_FORWARD,
    CUT,
    EXACT,
    FREEZE,
    KILL,
    KILL_AGENT,
    KILL_SERVER,
    POSTGRES_FAST,
    POSTGRES_IMMEDIATE,
    STALL,
    WALL_BACK,
    WALL_FORWARD,
    Plan,
    Step,
    spec_of,
)
from tests.torture.points import POINTS, WIRE
from tests.torture.wire import Line, WireOrder

PATIENCE_S: Final = 240.0
"""Far more than any plan needs; a machine that does other things besides may take a minute to import torch."""
SETTLING_S: Final = 30.0
"""So long after a job a worker may take to fetch the receipt that it missed."""
LONGER_THAN_A_LEASE_S: Final = 3.0
HOUR_S: Final = 3600.0
UNREFERRED_A_KILL: Final = 8
"""Files that a killed service can leave: a draft and a body an upload, drafts and results of an aggregation."""


@dataclass
class Outcome:
    """What came of a plan."""

    plan: Plan
    happened: list[Step] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    same_model: bool | None = None
    """Whether the checkpoints are those of an undisturbed job; None where they need not be."""
    completed: bool = False
    took_s: float = 0.0
    recovery_s: list[float] = field(default_factory=list)
    """From each step that happened until the round was over that was open then."""

    @property
    def ok(self) -> bool:
        """Whether everything held."""
        return not self.wrong


class Driver:
    """One ground, and one plan after another."""

    def __init__(self, ground: Ground) -> None:
        self.ground = ground
        self._undisturbed: dict[str, tuple[str, ...]] = {}
        self._died: dict[str, float] = {}  # program -> when it may be started again
        self._happened: dict[Step, float] = {}
        self._helpers: list[threading.Thread] = []
        self._finished_rounds: list[tuple[float, int]] = []
        self._kills = 0

    # --- plans

    def undisturbed(self, variant: str) -> tuple[str, ...]:
        """The checkpoints of a variant when nothing happens; found out once."""
        if variant not in self._undisturbed:
            outcome = self._run(Plan("undisturbed", self.ground.layout, variant, ()), compare=False)
            assert outcome.ok, outcome.wrong
        return self._undisturbed[variant]

    def run(self, plan: Plan) -> Outcome:
        """Carry it out; everything that is found wrong is in the outcome."""
        assert plan.layout == self.ground.layout
        self.undisturbed(plan.variant)
        return self._run(plan, compare=True)

    def _run(self, plan: Plan, *, compare: bool) -> Outcome:
        outcome, began = Outcome(plan), time.monotonic()
        self._happened, self._finished_rounds, self._died, self._helpers = {}, [], {}, []
        self._forget_models()
        job = self.ground.draft(spec_of(plan.variant))
        starting = threading.Thread(target=self._start, args=(job,), daemon=True)
        try:
            for step in plan.steps:
                self._order(step)
            starting.start()
            state = self._until_ended(job.id, plan)
        finally:
            self._heal(plan)
        starting.join(PATIENCE_S)
        outcome.took_s = time.monotonic() - began
        outcome.happened = list(self._happened)
        outcome.recovery_s = [self._recovery(at) for at in self._happened.values()]
        if state is not JobState.COMPLETED:
            outcome.wrong.append(f"the job is {state} after {outcome.took_s:.0f} s: {self._detail(job.id)}")
            self._cancel(job)
            return outcome
        outcome.completed = True
        outcome.wrong += self._settled(job)
        with self.ground.record() as record:
            digests = digests_of(record, job.id)
        if not compare:
            self._undisturbed[plan.variant] = digests
        elif plan.variant in EXACT:
            outcome.same_model = digests == self._undisturbed[plan.variant]
            if not outcome.same_model:
                outcome.wrong.append("the checkpoints are not those of an undisturbed job")
        return outcome

    def _forget_models(self) -> None:
        """Jobs of one seed have the same models: let the agents fetch them anew."""
        for state in self.ground.journals.values():
            for model in (state / "models").iterdir():
                model.unlink(missing_ok=True)

    def _start(self, job: JobView) -> None:
        self.ground.start(job)

    def _detail(self, job_id: UUID) -> str:
        rows = self.ground.watch.ask(
            "SELECT 'job: ' || coalesce(detail, '-') FROM jobs WHERE id = %s UNION ALL"
            " SELECT 'round ' || number || ' ' || phase || ' ' || accepted FROM rounds WHERE job_id = %s",
            job_id, job_id,
        )  # fmt: skip
        return "; ".join(str(row[0]) for row in rows or [])

    def _cancel(self, job: JobView) -> None:
        with suppress(Exception):
            assert self.ground.researcher is not None
            self.ground.researcher.jobs.cancel(job.id)

    def _settled(self, job: JobView) -> list[str]:
        """What is wrong once the workers had time to fetch what they missed; right at once is looked at first."""
        deadline = time.monotonic() + SETTLING_S
        while True:
            self._restart_dead()
            with self.ground.record() as record:
                wrong = check_job(record, job.id)
            if not wrong or time.monotonic() > deadline:
                return wrong
            time.sleep(0.5)

    def _until_ended(self, job_id: UUID, plan: Plan) -> JobState | None:
        deadline, state, finished = time.monotonic() + PATIENCE_S, None, 0
        while time.monotonic() < deadline:
            self._attend(plan)
            rows = self.ground.watch.ask(
                "SELECT state, (SELECT count(*) FROM rounds WHERE job_id = j.id AND phase = 'completed')"
                " FROM jobs j WHERE id = %s",
                job_id,
            )
            if rows:
                state = JobState(str(rows[0][0]))
                if int(str(rows[0][1])) > finished:
                    finished = int(str(rows[0][1]))
                    self._finished_rounds.append((time.monotonic(), finished))
                if state in (JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED):
                    return state
            time.sleep(0.02)
        return state

    def _recovery(self, at: float) -> float:
        later = [when for when, _ in self._finished_rounds if when > at]
        return (later[0] if later else time.monotonic()) - at

    # --- orders

    def _role(self, step: Step) -> str:
        if step.point in WIRE:
            return step.role
        return self.ground.role_of(POINTS[step.point].program, step.role)

    def _order(self, step: Step) -> None:
        if step.point in WIRE:
            relay = self.ground.relays[step.role]
            relay.give(WireOrder(WIRE[step.point], step.passage, lambda line: self._on_the_wire(step, line)))
        else:
            action = "kill" if step.action == KILL else "hold"
            self.ground.give(self._role(step), step.point, step.passage, action)

    def _on_the_wire(self, step: Step, line: Line) -> None:
        self._happened[step] = time.monotonic()
        if step.action == CUT:
            line.cut()
        elif step.action == STALL:
            line.stall(LONGER_THAN_A_LEASE_S)
        elif step.action == KILL_AGENT:
            self._kill(self.ground.programs[step.role], step)
        elif step.action == KILL_SERVER:
            port = self.ground.relays[step.role].upstream
            self._kill(next(one for one, its in self.ground.servers.items() if its == port), step)

    def _kill(self, program: Program, step: Step) -> None:
        self._died[program.name if program in self.ground.servers else step.role] = time.monotonic() + step.restart_s
        if program.runs:
            program.kill()
            self._kills += 1

    def _attend(self, plan: Plan) -> None:
        """Look whether a step is due that its process waits for, and start again what died long enough ago."""
        for step in plan.steps:
            if step in self._happened or step.point in WIRE:
                continue
            role = self._role(step)
            told = self.ground.happened(role, step.point)
            if told is None:
                continue
            at, pid = told
            self._happened[step] = at
            if step.action == KILL:
                self._kills += 1
                for name, program in self.ground.programs.items():
                    if program.process is not None and program.process.pid == pid:
                        self._died[name] = at + step.restart_s
            else:
                self._apart(lambda step=step, role=role, pid=pid: self._while_held(step, role, pid))  # type: ignore[misc]
        self._restart_dead()

    def _restart_dead(self) -> None:
        self.ground.lead_agents()
        for name, program in self.ground.programs.items():
            if not program.runs and time.monotonic() >= self._died.get(name, 0.0):
                self._died.pop(name, None)
                program.start()

    def _apart(self, act: Callable[[], None]) -> None:
        helper = threading.Thread(target=act, daemon=True)
        self._helpers.append(helper)
        helper.start()

    def _while_held(self, step: Step, role: str, pid: int) -> None:
        """What is done while the process waits at the point. It goes on afterwards, or in the middle of it."""
        try:
            if step.action == FREEZE:
                freeze(pid)
                self.ground.take_back(role, step.point)
                time.sleep(LONGER_THAN_A_LEASE_S)
                thaw(pid)
            elif step.action in (POSTGRES_FAST, POSTGRES_IMMEDIATE):
                assert self.ground.postgres is not None, "this ground has no Postgres of its own"
                self.ground.postgres.restart("fast" if step.action == POSTGRES_FAST else "immediate")
            elif step.action == CLOCK_FORWARD:
                self._jump(HOUR_S)
            elif step.action == CLOCK_BACK:
                self._jump(-HOUR_S)
                self.ground.take_back(role, step.point)
                time.sleep(LONGER_THAN_A_LEASE_S)
                self._jump(HOUR_S)
            elif step.action in (WALL_FORWARD, WALL_BACK):
                self.ground.set_wall(role, HOUR_S if step.action == WALL_FORWARD else -HOUR_S)
                time.sleep(0.2)  # it is looked up ten times a second
        finally:
            self.ground.take_back(role, step.point)

    def _jump(self, seconds: float) -> None:
        """Postgres may be restarting just now."""
        for _ in range(100):
            with suppress(psycopg.Error):
                self.ground.clock.jump(seconds)
                return
            time.sleep(0.1)

    def _heal(self, plan: Plan) -> None:
        """Take everything back, wait for what is still being done, and let everybody run."""
        self.ground.take_all_back()
        for helper in self._helpers:
            helper.join(PATIENCE_S)
        for step in plan.steps:
            if step.action in (WALL_FORWARD, WALL_BACK):
                self.ground.set_wall(self._role(step), 0.0)
        if any(step.action in (CLOCK_FORWARD, CLOCK_BACK) for step in plan.steps):
            self.ground.clock.right()
        self._died = {}
        self._restart_dead()

    # --- all of them

    def finale(self) -> list[str]:
        """What is wrong across all jobs, once everything is quiet; also after what nobody names was collected."""
        deadline = time.monotonic() + SETTLING_S
        while True:
            self._restart_dead()
            with self.ground.record() as record:
                wrong = check_everything(record, most_unreferred=UNREFERRED_A_KILL * self._kills)
            if not wrong or time.monotonic() > deadline:
                return wrong or self._collected()
            time.sleep(0.5)

    def _collected(self) -> list[str]:
        asyncio.run(self._collect())
        with self.ground.record() as record:
            wrong = [f"{path} was not collected" for path in unreferred_files(record)]
            for job in record.rows("SELECT id FROM jobs WHERE state = 'completed' ORDER BY id DESC LIMIT 5"):
                wrong += check_job(record, job["id"])
        return wrong

    async def _collect(self) -> None:
        engine = open_engine(self.ground.database_url, connections=2)
        try:
            store = DirectoryBlobStore(self.ground.blobs)
            await collect_orphans(open_sessions(engine), store, older_than=timedelta(0))
        finally:
            await engine.dispose()


def spread_of(values: list[float]) -> tuple[float, float, float]:
    """Median, the ninth decile, and the largest."""
    if not values:
        return 0.0, 0.0, 0.0
    ordered = sorted(values)
    return statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))], ordered[-1]
