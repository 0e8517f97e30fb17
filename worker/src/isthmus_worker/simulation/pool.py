"""The processes of a simulation, seen from where it is conducted. They start at once, while data is still read."""

import os
import selectors
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Final

from isthmus_worker.simulation.messages import ANSWERS, Answer, Begin, Failed, Finished, Order
from isthmus_worker.simulation.regions import Region

_PATIENCE_S: Final = 5.0
_READ_BYTES: Final = 1 << 16


class TaskFailed(Exception):
    """A task cannot be done. `task` is its place among those that were asked."""

    def __init__(self, task: int, reason: str) -> None:
        super().__init__(reason)
        self.task = task


class ProcessEnded(Exception):
    """A process ended though nobody asked it to."""

    def __init__(self) -> None:
        super().__init__(
            "A process of the simulation ended in the middle of its work; perhaps the system ran out of memory. "
            "Fewer --processes need less."
        )


class Pool:
    """So many processes and the memory that they share.

    Attributes:
        records, model, slots: the regions. The processes can write to slots only, and once, when the initial model is
            drawn, to the model.
    """

    def __init__(self, processes: int) -> None:
        """Start them; they need a second or two until they take orders, which are kept for them.

        Raises:
            ValueError: fewer than one process.
        """
        if processes < 1:
            raise ValueError("a simulation needs at least one process")
        self.records, self.model, self.slots = Region.make(), Region.make(), Region.make()
        self._under_way = False
        pairs = [socket.socketpair() for _ in range(processes)]
        self._lines = [_Line(ours) for ours, _ in pairs]
        given = [self.records.descriptor, self.model.descriptor, self.slots.descriptor]
        given += [theirs.fileno() for _, theirs in pairs]
        self._first = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            # -P: the working directory is not searched for modules.
            [sys.executable, "-P", "-m", "isthmus_worker.simulation.process", *map(str, given)],
            stdin=subprocess.DEVNULL,
            pass_fds=given,
            # One thread until a task says otherwise: processes are made by copying one that must have no other.
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            process_group=0,
        )
        for _, theirs in pairs:
            theirs.close()

    def begin(self, order: Begin) -> None:
        """Tell every process the job, and wait until all of them have everything. A second job replaces the first.

        Raises:
            ProcessEnded: one did not come up.
            ValueError: an earlier simulation was broken off, so that its tasks are under way still.
        """
        self.perform([order] * len(self._lines))

    def perform(self, orders: Sequence[Order], on_done: Callable[[int], None] = lambda _done: None) -> list[Finished]:
        """Have all orders done, each by whichever process is free next.

        Args:
            orders: begun in this order: those that take longest first, to be done soonest.
            on_done: hears, after each, how many are done.

        Returns:
            The answers, in the order of the orders.

        Raises:
            TaskFailed: one of them cannot be done; nothing new was begun then, and what was begun has ended.
            ProcessEnded: a process is gone.
        """
        if self._under_way:
            raise ValueError("these processes are in the middle of a simulation that was broken off: start new ones")
        self._under_way = True
        waiting = deque(enumerate(orders))
        answers: dict[int, Answer] = {}
        with selectors.DefaultSelector() as selector:
            busy = 0
            for line in self._lines:
                if waiting:
                    line.ask(*waiting.popleft())
                    selector.register(line, selectors.EVENT_READ)
                    busy += 1
            while busy:
                for key, _events in selector.select():
                    at = key.fileobj
                    assert isinstance(at, _Line), "nothing else was registered"
                    answer = at.hear()
                    if answer is None:
                        continue
                    answers[at.task] = answer
                    on_done(len(answers))
                    if isinstance(answer, Failed):
                        waiting.clear()
                    if waiting:
                        at.ask(*waiting.popleft())
                    else:
                        selector.unregister(at)
                        busy -= 1
        self._under_way = False
        for task in sorted(answers):
            if isinstance(failed := answers[task], Failed):
                raise TaskFailed(task, failed.reason)
        return [answer for _task, answer in sorted(answers.items()) if isinstance(answer, Finished)]

    def close(self) -> None:
        """End all processes, whatever they are doing, and give the memory back. A second call does nothing."""
        for line in self._lines:
            line.close()
        try:
            self._first.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self._first.pid, signal.SIGKILL)
            self._first.wait()
        if self._lines:
            self._lines = []
            for region in (self.records, self.model, self.slots):
                region.close()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The first process; the others are its children."""
        return self._first.pid


class _Line:
    """The socket to one process, with the task that it is at."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._heard = b""
        self.task = -1

    def fileno(self) -> int:
        """For selectors."""
        return self._line.fileno()

    def ask(self, task: int, order: Order) -> None:
        """Send an order."""
        self.task = task
        try:
            self._line.sendall(order.model_dump_json(by_alias=True).encode() + b"\n")
        except (BrokenPipeError, ConnectionResetError):
            raise ProcessEnded from None

    def hear(self) -> Answer | None:
        """The answer, if it is all there."""
        try:
            piece = self._line.recv(_READ_BYTES)
        except ConnectionResetError:
            piece = b""
        if not piece:
            raise ProcessEnded
        self._heard += piece
        if not self._heard.endswith(b"\n"):
            return None
        whole, self._heard = self._heard, b""
        return ANSWERS.validate_json(whole)

    def close(self) -> None:
        """Hang up: the process ends."""
        self._line.close()
