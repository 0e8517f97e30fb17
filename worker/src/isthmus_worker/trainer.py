"""The training process, seen from the agent: started when there is work, watched while it works, then ended.

The agent imports neither NumPy nor torch; it says what is to be done (`messages`) and hears what came of it. A child
that dies, takes too much memory or too long, or says nothing for too long fails its task with a reason, and the next
task gets a new child.
"""

import logging
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from isthmus_worker.messages import (
    ANSWERS,
    Alive,
    Answer,
    Cancel,
    Cancelled,
    Describe,
    Described,
    Done,
    Failure,
    Mask,
    Order,
    Refusal,
    Warm,
    Work,
)
from isthmus_worker.settings import DatasetSettings, Resources
from isthmus_worker.spawning import start_child

log = logging.getLogger(__name__)

TICK_S: Final = 0.1
"""How often a working child is looked at."""
CANCEL_S: Final = 2.0
"""So long a child may take to stop by itself."""
_MB: Final = 1 << 20
_READ_BYTES: Final = 1 << 16
_LONGEST_ANSWER: Final = 16 << 20
_NO_ANSWER: Final = "The training process said something that is no answer."


class WorkRefused(Exception):
    """The data cannot serve the task. The message is for the service, `where` for the log."""

    def __init__(self, reason: str, where: str = "") -> None:
        super().__init__(reason)
        self.where = where


class WorkFailed(Exception):
    """The work broke. The message is for the service, `where` for the log."""

    def __init__(self, reason: str, where: str = "") -> None:
        super().__init__(reason)
        self.where = where


class WorkCancelled(Exception):
    """The work was stopped because nobody wants it any more."""


class Trainer:
    """At most one child at a time. To be used from the main thread: a child dies with the thread that started it."""

    def __init__(self, resources: Resources, scratch: Path, process: "subprocess.Popen[bytes] | None" = None) -> None:
        """`process`: a child that `start_child` has started and nobody has told anything yet."""
        self._resources = resources
        self._scratch = scratch
        self._process = process
        self._heard = b""
        self._number = 0
        self._used_at = time.monotonic()

    def warm(self) -> None:
        """Start a child, if there is none, and have it import torch while the agent fetches the model."""
        if self._process is None or self._process.poll() is not None:
            self._start()
            self._send(Warm())
        self._used_at = time.monotonic()

    def describe(
        self, dataset: DatasetSettings, known: str | None = None, meanwhile: Callable[[], None] = lambda: None
    ) -> Described:
        """The columns and the number of records of a dataset, read by a child.

        Args:
            dataset: as the configuration names it.
            known: the stamp of its file when its content was taken last.
            meanwhile: called all the time, and once at least, however soon the child answers.

        Raises:
            WorkRefused, WorkFailed: it cannot be read.
        """
        meanwhile()

        def never() -> bool:
            meanwhile()
            return False

        answer = self._ask(Describe(dataset=dataset, known=known), lambda _progress: None, never)
        if not isinstance(answer, Described):
            raise WorkFailed(_NO_ANSWER)
        return answer

    def work(self, order: Work, on_alive: Callable[[float], None], cancelled: Callable[[], bool]) -> Done:
        """Have a task done.

        Args:
            order: what to do; its number is set here.
            on_alive: called with the share done whenever the child's working thread says that it is alive.
            cancelled: asked all the time whether the work is still wanted.

        Raises:
            WorkRefused, WorkFailed, WorkCancelled
        """
        return self._done(order, on_alive, cancelled)

    def mask(self, order: Mask, on_alive: Callable[[float], None], cancelled: Callable[[], bool]) -> Done:
        """Have a masked update written; otherwise as `work`.

        Raises:
            WorkFailed, WorkCancelled
        """
        return self._done(order, on_alive, cancelled)

    @property
    def pid(self) -> int | None:
        """The child's process id, while there is one."""
        return self._process.pid if self._process is not None else None

    def idle_s(self) -> float | None:
        """How long the child has had nothing to do; None if there is no child."""
        return time.monotonic() - self._used_at if self._process is not None else None

    def stop(self) -> None:
        """End the child at once, if there is one, and forget what it left in its directory."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        log.info("training process ended", extra={"pid": process.pid})

    def _done(self, order: Work | Mask, on_alive: Callable[[float], None], cancelled: Callable[[], bool]) -> Done:
        self._number += 1
        answer = self._ask(order.model_copy(update={"number": self._number}), on_alive, cancelled)
        if not isinstance(answer, Done):
            raise WorkFailed(_NO_ANSWER)
        return answer

    def _start(self) -> None:
        self.stop()
        self._heard = b""
        self._process = start_child(self._resources, self._scratch)

    def _ask(
        self, order: Work | Mask | Describe, on_alive: Callable[[float], None], cancelled: Callable[[], bool]
    ) -> Answer:
        if self._process is None or self._process.poll() is not None:
            self._start()
        try:
            self._send(order)
            answer = self._await(order, on_alive, cancelled)
        except BaseException:  # also the agent's own end: a child in the middle of an order is of no use
            self.stop()
            raise
        finally:
            self._used_at = time.monotonic()
        if isinstance(answer, Refusal):
            raise WorkRefused(answer.reason, answer.where)
        if isinstance(answer, Failure):
            raise WorkFailed(answer.reason, answer.where)
        if isinstance(answer, Cancelled):
            raise WorkCancelled
        return answer

    def _await(
        self, order: Work | Mask | Describe, on_alive: Callable[[float], None], cancelled: Callable[[], bool]
    ) -> Answer:
        began = heard = time.monotonic()
        give_up: float | None = None
        while True:
            for answer in self._hear():
                if not isinstance(answer, Alive):
                    return answer
                heard = time.monotonic()
                on_alive(answer.progress)
            now = time.monotonic()
            self._check_limits(now - began, now - heard)
            if give_up is None and cancelled():
                give_up = now + CANCEL_S
                if isinstance(order, Work | Mask):
                    self._send(Cancel(number=order.number))
            if give_up is not None and now > give_up:
                raise WorkCancelled

    def _check_limits(self, took_s: float, silent_s: float) -> None:
        limits = self._resources
        assert self._process is not None
        used_mb = _resident_bytes(self._process.pid) // _MB
        if used_mb > limits.max_memory_mb:
            raise WorkFailed(f"The training process used {used_mb} MB; max_memory_mb is {limits.max_memory_mb}.")
        if took_s > limits.max_task_s:
            raise WorkFailed(f"The task took longer than max_task_s = {limits.max_task_s:g} seconds.")
        if silent_s > limits.max_silence_s:
            raise WorkFailed(
                f"The training process gave no sign of life for max_silence_s = {limits.max_silence_s:g} seconds."
            )

    def _send(self, order: Order) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(order.model_dump_json(by_alias=True).encode() + b"\n")
        except BrokenPipeError:
            self._raise_ended()

    def _hear(self) -> list[Answer]:
        """What the child said, after waiting at most TICK_S for something."""
        assert self._process is not None
        assert self._process.stdout is not None
        pipe = self._process.stdout
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        if not poll.poll(TICK_S * 1000):
            return []
        piece = os.read(pipe.fileno(), _READ_BYTES)
        if not piece:
            self._raise_ended()
        *lines, self._heard = (self._heard + piece).split(b"\n")
        if len(self._heard) > _LONGEST_ANSWER:
            raise WorkFailed(_NO_ANSWER)
        try:
            return [ANSWERS.validate_json(line) for line in lines]
        except ValidationError:
            raise WorkFailed(_NO_ANSWER) from None

    def _raise_ended(self) -> None:
        assert self._process is not None
        code = self._process.wait()
        how = (
            f"was killed by signal {-code} ({signal.Signals(-code).name})"
            if code < 0
            else f"ended with exit code {code}"
        )
        hint = "; perhaps the system ran out of memory" if code == -signal.SIGKILL else ""
        raise WorkFailed(f"The training process {how}{hint}.")


def _resident_bytes(pid: int) -> int:
    """Memory that a process really uses; 0 where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()
    except OSError:
        return 0
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") if len(fields) > 1 else 0
