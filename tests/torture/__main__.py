"""`python -m tests.torture`: attack a federation of real processes, and say in a table what survived."""

import argparse
import logging
import queue
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import structlog
from rich.console import Console

from tests.torture import dead_worker
from tests.torture.driver import Driver, Outcome
from tests.torture.ground import ground, keep_logs, note_logs
from tests.torture.plans import LAYOUTS, VARIANTS, Plan, draw, every_disturbance, every_point
from tests.torture.postgres import own_postgres
from tests.torture.report import costs, summary

PLANS_A_GROUND: Final = 60
"""After so many plans a fresh ground is opened, and the old one looked over as a whole."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; 1 if something did not survive."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="the one plan to run; with --plans, the first of them")
    parser.add_argument("--plans", type=int, help="every point and disturbance once, then so many random plans")
    parser.add_argument("--random-only", action="store_true", help="with --plans: only the random ones")
    parser.add_argument("--dead-workers", action="store_true", help="only measure what dead workers cost a round")
    parser.add_argument("--only", help="points and disturbances whose name holds this text, no random plans")
    parser.add_argument("--variant", choices=VARIANTS, action="append", help="only those that are done to this job")
    parser.add_argument("--logs", type=Path, help="where the logs of failed plans go")
    given = parser.parse_args(arguments)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    console = Console(width=180 if not sys.stdout.isatty() else None)
    return _Torture(console, given.logs or Path(tempfile.mkdtemp(prefix="isthmus-torture-logs-"))).run(
        _plans(given), measure=given.dead_workers or (given.plans is not None and not given.random_only)
    )


def _plans(given: argparse.Namespace) -> list[Plan]:
    named = [*every_point(), *every_disturbance()]
    if given.dead_workers:
        return []
    if given.only is not None or given.variant is not None:
        wanted, variants = given.only or "", given.variant or list(VARIANTS)
        return [plan for plan in named if wanted in plan.name and plan.variant in variants]
    if given.plans is None:
        return [draw(given.seed)]
    drawn = [draw(seed) for seed in range(given.seed, given.seed + given.plans)]
    return drawn if given.random_only else named + drawn


MOST_ACCIDENTS: Final = 3
"""After so many the rest of a layout's plans is not run: it cannot be, and the count says so."""


class _Torture:
    """Plans on two grounds at once, one a layout."""

    def __init__(self, console: Console, logs: Path) -> None:
        self._console, self._logs = console, logs
        self._outcomes: list[Outcome] = []
        self._wrong: list[str] = []
        self._lock = threading.Lock()
        self._total = 0
        self._stopping = False

    def run(self, plans: list[Plan], *, measure: bool) -> int:
        """Run them all and print what came of them; the exit code."""
        began, self._total = time.monotonic(), len(plans)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)
        if len(plans) == 1:
            self._console.print(str(plans[0]))
        workers = [
            threading.Thread(target=self._guarded, args=(layout, [plan for plan in plans if plan.layout == layout]))
            for layout in LAYOUTS
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        self._console.print(summary(self._outcomes))
        measured = self._dead_workers() if measure and not self._stopping else []
        if measured:
            self._console.print(costs(measured))
        for line in self._wrong:
            self._console.print(f"[red]{line}", highlight=False)
        failed = [outcome for outcome in self._outcomes if not outcome.ok]
        bad = bool(failed or self._wrong or any(not cost.ok for cost in measured))
        bad = bad or len(self._outcomes) < len(plans)
        took = f"{len(self._outcomes)} of {len(plans)} plans in {(time.monotonic() - began) / 60:.1f} minutes"
        self._console.print(f"{took}; " + (f"FAILED, logs in {self._logs}" if bad else "everything survived."))
        if not bad:
            shutil.rmtree(self._logs, ignore_errors=True)
        return int(bad)

    def _stop(self, *_: object) -> None:
        self._console.print("stopping: the plans that are going on are finished, then comes the table")
        self._stopping = True

    def _guarded(self, layout: str, plans: list[Plan]) -> None:
        """An accident of the torture itself is a failure too, and the plans after it are still run."""
        waiting: queue.SimpleQueue[Plan] = queue.SimpleQueue()
        for plan in plans:
            waiting.put(plan)
        accidents = 0
        while not waiting.empty() and not self._stopping and accidents < MOST_ACCIDENTS:
            try:
                self._on_one_ground(layout, waiting)
            except Exception:
                accidents += 1
                self._say_wrong(f"layout {layout}: {traceback.format_exc(limit=-4)}")

    def _on_one_ground(self, layout: str, waiting: "queue.SimpleQueue[Plan]") -> None:
        with _driver(layout) as driver:
            for _ in range(PLANS_A_GROUND):
                if waiting.empty() or self._stopping:
                    break
                plan, marks = waiting.get(), note_logs(driver.ground)
                try:
                    outcome = driver.run(plan)
                except Exception as error:
                    outcome = Outcome(plan, wrong=[f"the torture itself: {error!r}"])
                if not plan.drawn and len(outcome.happened) < len(plan.steps) and not outcome.wrong:
                    outcome.wrong.append("it did not happen: a point of it was not passed")
                self._note(outcome)
                if not outcome.ok:  # whatever it left behind must not be blamed on the next plan
                    keep_logs(driver.ground, self._logs / plan.name.replace(" ", "-"), marks)
                    return
            for wrong in driver.finale():
                self._say_wrong(f"layout {layout}, after all plans: {wrong}")
                keep_logs(driver.ground, self._logs / f"{layout}-finale", {})

    def _note(self, outcome: Outcome) -> None:
        with self._lock:
            self._outcomes.append(outcome)
            number = len(self._outcomes)
        mark = "ok" if outcome.ok else "FAILED"
        seconds = ", ".join(f"{taken:.1f}" for taken in outcome.recovery_s) or "-"
        self._console.print(
            f"{number:4}/{self._total} {mark:6} {outcome.plan.name} ({outcome.plan.layout}, {outcome.plan.variant}):"
            f" {len(outcome.happened)} of {len(outcome.plan.steps)} happened, recovered in {seconds} s",
            highlight=False,
        )
        if not outcome.ok:
            self._console.print(str(outcome.plan), *outcome.wrong[:20], sep="\n    ", highlight=False)

    def _say_wrong(self, line: str) -> None:
        with self._lock:
            self._wrong.append(line)

    def _dead_workers(self) -> list[dead_worker.Cost]:
        measured: list[dead_worker.Cost] = []
        try:
            with _folder() as folder, own_postgres(folder / "postgres") as postgres:
                for cost in dead_worker.measure(folder / "ground", postgres.open()):
                    measured.append(cost)
        except Exception:
            self._say_wrong(f"dead workers: {traceback.format_exc(limit=-4)}")
        return measured


@contextmanager
def _driver(layout: str) -> Iterator[Driver]:
    with ExitStack() as stack:
        folder = stack.enter_context(_folder())
        postgres = stack.enter_context(own_postgres(folder / "postgres"))
        opened = stack.enter_context(ground(folder / "ground", postgres.open(), layout=layout, postgres=postgres))
        assert opened.clock.is_obeyed(), "the service would not see the clock jump"
        yield Driver(opened)


@contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="isthmus-torture-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
