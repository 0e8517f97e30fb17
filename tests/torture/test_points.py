"""The named points: that each is still a function of the program, and that orders given at them are carried out."""

import asyncio
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.torture import passages, points
from tests.torture.passages import Orders, place_in, wrap
from tests.torture.plans import LAYOUTS, draw, every_disturbance, every_point
from tests.torture.points import POINTS, WIRE

STARTUP = Path(__file__).parent / "startup"


@pytest.mark.parametrize("point", POINTS.values(), ids=POINTS.keys())
def test_every_point_is_a_function_of_the_program(point: points.Point) -> None:
    holder, name = place_in(importlib.import_module(point.module), point.attribute)
    assert callable(getattr(holder, name))
    assert point.when in ("before", "after")


def test_names_are_given_once() -> None:
    assert not POINTS.keys() & WIRE.keys()
    assert all(name == point.name for name, point in POINTS.items())


@pytest.fixture
def orders(tmp_path: Path) -> Orders:
    """A folder with no orders."""
    (tmp_path / "passed").mkdir()
    return Orders(tmp_path)


def test_an_action_is_due_at_its_passage_and_never_again(orders: Orders) -> None:
    assert orders.pass_by("spent") is None
    (orders.folder / "spent").write_text("0003 hold")
    assert [orders.pass_by("spent") for _ in range(5)] == [None, None, "hold", None, None]
    assert orders.pass_by("admitted") is None
    assert {path.name for path in (orders.folder / "passed").iterdir()} == {"spent", "admitted"}


def test_passages_of_two_processes_are_counted_together(orders: Orders) -> None:
    other = Orders(orders.folder)
    (orders.folder / "spent").write_text("0002 hold")
    assert orders.pass_by("spent") is None
    assert other.pass_by("spent") == "hold"


@pytest.mark.parametrize("when", ["before", "after"])
def test_who_is_held_goes_on_when_the_order_is_taken_back(orders: Orders, when: str) -> None:
    done: list[str] = []

    async def work() -> str:
        done.append("work")
        return "answer"

    async def scene() -> None:
        (orders.folder / "spent").write_text("0001 hold")
        working = asyncio.create_task(wrap(work, "spent", when, orders)())
        while not (orders.folder / "happened").exists():
            await asyncio.sleep(0.001)
        await asyncio.sleep(3 * passages.TICK_S)
        assert not working.done()
        assert done == ([] if when == "before" else ["work"])
        (orders.folder / "spent").unlink()
        assert await working == "answer"

    asyncio.run(scene())


def run_python(folder: Path, program: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """A Python with our startup folder, as the programs under torture are run."""
    return subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=60, check=False, cwd=folder,
        env={**os.environ, "PYTHONPATH": str(STARTUP), **environment},
    )  # fmt: skip


PASS_TWICE = """
from isthmus_worker.files import write_durably
import pathlib, isthmus_worker.journal as journal
for number in range(2):
    source = pathlib.Path(f"source-{number}"); source.write_bytes(b"bytes")
    journal.move_durably(source, pathlib.Path(f"target-{number}"))
    print("moved", number, flush=True)
"""


def test_a_program_is_killed_at_its_second_passage(orders: Orders) -> None:
    (orders.folder / "bytes-named").write_text("0002 kill")
    ended = run_python(orders.folder, PASS_TWICE, TORTURE_ORDERS=str(orders.folder))
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert ended.stdout == "moved 0\n"
    assert (orders.folder / "target-1").exists(), "the point is after the move"


def test_a_program_without_orders_is_as_it_was(tmp_path: Path) -> None:
    ask = "import time, isthmus_worker.journal as j;"
    ask += "print(hasattr(j.Journal.prepare, '__wrapped__'), j.datetime.__module__, type(time.time).__name__)"
    ended = run_python(tmp_path, ask)
    assert ended.stdout == "False datetime builtin_function_or_method\n", ended.stderr


def test_the_time_of_day_is_as_wrong_as_ordered(orders: Orders) -> None:
    (orders.folder / "wall").write_text("3600")
    ask = "import time, datetime, isthmus_worker.journal as j; now = datetime.datetime.now(datetime.UTC).timestamp();"
    ask += "print(round((time.time() - now) / 60), round((j.datetime.now(datetime.UTC).timestamp() - now) / 60))"
    ended = run_python(orders.folder, ask, TORTURE_ORDERS=str(orders.folder))
    assert ended.stdout == "60 60\n", ended.stderr


def test_a_seed_gives_the_same_plan_and_another_seed_another() -> None:
    plans = [draw(seed) for seed in range(200)]
    assert plans == [draw(seed) for seed in range(200)]
    assert len({plan.steps for plan in plans}) > 190
    assert {plan.layout for plan in plans} == set(LAYOUTS)
    drawn = {step.point for seed in range(2000) for step in draw(seed).steps}
    assert drawn == POINTS.keys() | WIRE.keys()


def test_every_point_and_every_disturbance_has_a_plan_in_both_layouts() -> None:
    named = [*every_point(), *every_disturbance()]
    assert {step.point for plan in named for step in plan.steps} == POINTS.keys() | WIRE.keys()
    for layout in LAYOUTS:
        kinds: set[Any] = {step.kind for plan in named if plan.layout == layout for step in plan.steps}
        assert len(kinds) == 13, kinds
