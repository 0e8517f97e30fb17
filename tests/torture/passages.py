"""Inside a program under torture: counts how often its points are passed, and hits it where it was told to.

The orders are files in the folder that the environment variable TORTURE_ORDERS names, one a point, holding
"<passages left> <action>", so that they can be given while the program runs and outlast it when it is killed:

    kill    write a line to `happened`, then SIGKILL ourselves
    hold    write a line to `happened`, then wait until the order is taken back; who gave it does something meanwhile

`passed/<point>` is touched at the first passage in every process. `wall` holds seconds by which the process sees the
time of day wrongly. Only the standard library is imported here, and nothing of the program.
"""

import datetime as datetime_module
import fcntl
import functools
import importlib.abc
import importlib.machinery
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

ORDERS = "TORTURE_ORDERS"
LONGEST_HOLD_S = 90.0
TICK_S = 0.01
READS_THE_WALL = ("isthmus_worker.journal", "isthmus.client._retry")
"""Modules that ask `datetime` for the time of day; everybody else asks `time.time`."""

_is_coroutine = 0x80  # inspect.CO_COROUTINE, without importing inspect
_real_time = time.time


class Orders:
    """The folder with the orders for one program."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._passed: set[str] = set()

    def pass_by(self, name: str) -> str | None:
        """Count a passage; the action that is due, if any. The file's lock makes two processes count as one."""
        if name not in self._passed:
            self._passed.add(name)
            (self.folder / "passed" / name).touch()
        try:
            descriptor = os.open(self.folder / name, os.O_RDWR)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            left, _, action = os.read(descriptor, 100).decode().partition(" ")
            if int(left) < 1:
                return None
            os.pwrite(descriptor, f"{int(left) - 1:04} {action}".encode(), 0)
            return action if int(left) == 1 else None
        finally:
            os.close(descriptor)

    def tell(self, name: str) -> None:
        """Say that an order was carried out, just before it is."""
        line = json.dumps({"point": name, "pid": os.getpid(), "at": time.monotonic()}) + "\n"
        descriptor = os.open(self.folder / "happened", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(descriptor, line.encode())
        os.close(descriptor)

    def held(self, name: str) -> bool:
        """Whether the order still stands."""
        return (self.folder / name).exists()


def die() -> None:
    """Nothing is said good-bye to."""
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # the kernel is about to end us


def _begin(orders: Orders, name: str) -> bool:
    """Pass by; whether to hold."""
    action = orders.pass_by(name)
    if action is None:
        return False
    orders.tell(name)
    if action == "kill":
        die()
    return True


def _hold(orders: Orders, name: str) -> None:
    if _begin(orders, name):
        deadline = time.monotonic() + LONGEST_HOLD_S
        while orders.held(name) and time.monotonic() < deadline:
            time.sleep(TICK_S)


async def _hold_alone(orders: Orders, name: str) -> None:
    """As `_hold`, while the event loop serves everybody else."""
    if _begin(orders, name):
        import asyncio

        deadline = time.monotonic() + LONGEST_HOLD_S
        while orders.held(name) and time.monotonic() < deadline:
            await asyncio.sleep(TICK_S)


def wrap(function: Callable[..., Any], name: str, when: str, orders: Orders) -> Callable[..., Any]:
    """The function, with the point before or after it."""
    if function.__code__.co_flags & _is_coroutine:

        @functools.wraps(function)
        async def passing_async(*arguments: Any, **named: Any) -> Any:
            if when == "before":
                await _hold_alone(orders, name)
            answer = await function(*arguments, **named)
            if when == "after":
                await _hold_alone(orders, name)
            return answer

        return passing_async

    @functools.wraps(function)
    def passing(*arguments: Any, **named: Any) -> Any:
        if when == "before":
            _hold(orders, name)
        answer = function(*arguments, **named)
        if when == "after":
            _hold(orders, name)
        return answer

    return passing


def place_in(module: Any, attribute: str) -> tuple[Any, str]:
    """What holds a point's function, and by which name.

    Raises:
        AttributeError: the program has no such function any more.
    """
    *path, last = attribute.split(".")
    holder = functools.reduce(getattr, path, module)
    getattr(holder, last)
    return holder, last


def put_points(module: Any, points: Iterable[Any], orders: Orders) -> None:
    """Put points into a module that was just imported."""
    for point in points:
        holder, name = place_in(module, point.attribute)
        setattr(holder, name, wrap(getattr(holder, name), point.name, point.when, orders))


class _Finder(importlib.abc.MetaPathFinder):
    """Lets every module be found as ever, and does something to some of them as soon as they were executed."""

    def __init__(self, after: dict[str, list[Callable[[ModuleType], None]]]) -> None:
        self._after = after

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """See importlib."""
        if name not in self._after:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                self._follow(spec.loader, name)
                return spec
        return None

    def _follow(self, loader: Any, name: str) -> None:
        execute = loader.exec_module

        def execute_then(module: ModuleType) -> None:
            execute(module)
            for act in self._after[name]:
                act(module)

        loader.exec_module = execute_then


class _Wall:
    """The time of day as this process shall see it."""

    def __init__(self, orders: Orders) -> None:
        self._file = orders.folder / "wall"
        self._offset_s = 0.0
        self._read_at = 0.0

    def offset_s(self) -> float:
        """By how much it is wrong; looked up ten times a second at most."""
        now = time.monotonic()
        if now - self._read_at > 0.1:
            self._read_at = now
            try:
                text = self._file.read_text()
            except FileNotFoundError:
                text = ""
            with suppress(ValueError):
                self._offset_s = float(text or "0")
        return self._offset_s


def _mislead(module: ModuleType, wall: _Wall) -> None:
    class Misled(datetime_module.datetime):
        """`now` is wrong by as much as `time.time`."""

        @classmethod
        def now(cls, tz: datetime_module.tzinfo | None = None) -> Any:
            return datetime_module.datetime.now(tz) + datetime_module.timedelta(seconds=wall.offset_s())

    module.datetime = Misled  # type: ignore[attr-defined]


def install(points: Iterable[Any], folder: Path) -> None:
    """Put points into modules as they are imported, and give this process a wall clock that can be moved."""
    orders, wall = Orders(folder), _Wall(Orders(folder))
    (folder / "passed").mkdir(exist_ok=True)
    after: dict[str, list[Callable[[ModuleType], None]]] = {}
    for point in points:
        after.setdefault(point.module, []).append(
            lambda module, point=point: put_points(module, [point], orders)  # type: ignore[misc]  # bound now
        )
    for name in READS_THE_WALL:
        after.setdefault(name, []).append(lambda module: _mislead(module, wall))
    sys.meta_path.insert(0, _Finder(after))
    time.time = lambda: _real_time() + wall.offset_s()
