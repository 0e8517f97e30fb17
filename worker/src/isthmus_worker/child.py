"""The training process. It reads records, trains, protects and writes files; it has no key and hears only the agent.

It ends when its standard input ends or its parent dies, whatever it is doing: an agent that is killed leaves nothing
behind.
"""

import ctypes
import os
import queue
import resource
import signal
import sys
import threading
import time
import traceback
from functools import cache
from typing import TYPE_CHECKING, BinaryIO, Final

from isthmus.allocator import LARGEST_BYTES, keep_freed
from isthmus.wire.privacy import PrivacyUnit
from isthmus_worker.contents import content_of
from isthmus_worker.data import open_source
from isthmus_worker.messages import (
    ORDERS,
    Alive,
    Answer,
    Cancel,
    Cancelled,
    Describe,
    Described,
    Failure,
    Mask,
    Order,
    Refusal,
    Warm,
    Work,
)
from isthmus_worker.refusals import DataRefused, ModelRefused, SchemaRefused, WorkBroken

if TYPE_CHECKING:
    from isthmus_worker.work import Desk

ALIVE_EVERY_S: Final = 0.2
OVERHEAD_MB: Final = 512
"""Address space that libraries reserve and never touch; the agent watches what is really used."""

KEPT_MB: Final = 256
"""What a batch needs stays for the next one, up to so much, and up to an eighth of what is allowed."""

_PR_SET_PDEATHSIG: Final = 1
_MB: Final = 1 << 20


class _Stopped(Exception):
    """The order was cancelled."""


class Line:
    """The pipe to the agent, from the side of the child."""

    def __init__(self, orders: BinaryIO, answers: BinaryIO) -> None:
        self._answers = answers
        self._queue: queue.SimpleQueue[Order] = queue.SimpleQueue()
        self._cancelled = -1
        self._last_alive = 0.0
        threading.Thread(target=self._listen, args=(orders,), daemon=True, name="orders").start()

    def next_order(self) -> Order:
        """The next order, as soon as there is one."""
        return self._queue.get()

    def say(self, answer: Answer) -> None:
        """Answer the agent."""
        self._answers.write(answer.model_dump_json().encode() + b"\n")
        self._answers.flush()

    def tell(self, number: int, progress: float) -> None:
        """Say that the work goes on, at most every ALIVE_EVERY_S.

        Raises:
            _Stopped: the agent asked for that.
        """
        if number <= self._cancelled:
            raise _Stopped
        now = time.monotonic()
        if now - self._last_alive >= ALIVE_EVERY_S:
            self._last_alive = now
            self.say(Alive(progress=min(1.0, max(0.0, progress))))

    def _listen(self, orders: BinaryIO) -> None:
        for line in orders:
            order = ORDERS.validate_json(line)
            if isinstance(order, Cancel):
                self._cancelled = order.number
            else:
                self._queue.put(order)
        os._exit(0)


def answer_to(order: Work | Mask | Describe, line: Line) -> Answer:
    """Do what is asked. Whatever goes wrong becomes an answer, and no answer for the service quotes data.

    Under privacy of records a refusal is for what is public already; all else is a failure, of which the agent tells
    nothing but `UNTOLD`.
    """
    try:
        if isinstance(order, Describe):
            source = open_source(order.dataset.source)
            content = content_of(order.dataset.source, order.known)
            return Described(data_schema=source.schema(), rows=source.rows(), content=content)
        if isinstance(order, Mask):
            from isthmus_worker.secured.masking import write_masked  # noqa: PLC0415 - not every job is secured

            return write_masked(order, lambda progress: line.tell(order.number, progress))
        return _desk().perform(order, lambda progress: line.tell(order.number, progress))
    except (DataRefused, ModelRefused, WorkBroken) as told:
        kind = Refusal if isinstance(told, _refusals(order)) else Failure
        return kind(reason=told.told(_tells_counts(order)), where=told.where)
    except _Stopped:
        return Cancelled()
    except Exception as error:  # a bug, ours or an entry point's: it must not end the child, nor quote data
        return Failure(reason=_unexpected(error), where=_frames(error))


def _tells_counts(order: Work | Mask | Describe) -> bool:
    return isinstance(order, Work) and order.tell_counts


def _refusals(order: Work | Mask | Describe) -> tuple[type[Exception], ...]:
    """What is a refusal; the others are failures."""
    apart = isinstance(order, Work) and order.offer.spec.privacy.unit is PrivacyUnit.RECORD
    return (SchemaRefused if apart else DataRefused, ModelRefused)


@cache
def _desk() -> "Desk":
    """What does the work. Imported when there is some: torch costs a second and 200 MB."""
    from isthmus_worker.work import Desk  # noqa: PLC0415

    return Desk()


def _unexpected(error: Exception) -> str:
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "The training process ran out of the memory that this worker allows."
    return f"An unexpected {type(error).__name__} ended the work; the worker's log says where."


def _frames(error: Exception) -> str:
    """Where it happened, without the message: messages of libraries quote values."""
    return " < ".join(
        f"{frame.name} ({frame.filename}:{frame.lineno})"
        for frame in reversed(traceback.extract_tb(error.__traceback__))
    )


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we could ask
        os._exit(0)


def _limit(memory_mb: int) -> None:
    bound = (memory_mb + OVERHEAD_MB) * _MB
    resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would hold records


def main() -> None:
    """`python -m isthmus_worker.child PARENT_PID MEMORY_MB`, started by `isthmus_worker.trainer` only."""
    parent, memory_mb = (int(argument) for argument in sys.argv[1:])
    _die_with(parent)
    _limit(memory_mb)
    keep_freed(blocks_bytes=LARGEST_BYTES, at_most_bytes=min(KEPT_MB, memory_mb // 8) * _MB)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the agent's business
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not look like an answer
    line = Line(sys.stdin.buffer, answers)
    while True:
        order = line.next_order()
        if isinstance(order, Warm):
            _desk()
        elif isinstance(order, Work | Mask | Describe):
            line.say(answer_to(order, line))


if __name__ == "__main__":
    main()
