"""A second opinion on epsilons, by privacy loss distributions. It takes seconds, so it is computed beside all else."""

import asyncio
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Final

import structlog

from isthmus.privacy.events import Event
from isthmus.privacy.reporting import NoReference, pld_epsilon

log = structlog.get_logger(__name__)

Question = tuple[Event, float]
"""What was released, and at which delta."""

KEPT: Final = 4096
PATIENCE_S: Final = 5.0


class References:
    """The figures that were asked for, and those that are being computed: one after another, in one thread.

    The thread ends when nothing is asked for, and does not hold up the end of the process.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[Question, Future[float | None]] = {}
        self._waiting: deque[Question] = deque()
        self._works = False

    async def answers(
        self, questions: Sequence[Question], *, patience_s: float = PATIENCE_S
    ) -> dict[Question, float | None]:
        """Every figure that is known within `patience_s`; None where there is none, or none yet: ask again later."""
        futures = {question: self._ask(question) for question in dict.fromkeys(questions)}
        pending = [asyncio.wrap_future(future) for future in futures.values() if not future.done()]
        if pending:
            await asyncio.wait(pending, timeout=patience_s)
        return {question: future.result() if future.done() else None for question, future in futures.items()}

    def _ask(self, question: Question) -> Future[float | None]:
        with self._lock:
            known = self._known.get(question)
            if known is not None:
                return known
            self._forget_one()
            future = self._known[question] = Future()
            future.set_running_or_notify_cancel()  # whoever stops waiting does not stop the others
            self._waiting.append(question)
            if not self._works:
                self._works = True
                threading.Thread(target=self._work, name="references", daemon=True).start()
            return future

    def _forget_one(self) -> None:
        """Make place for another figure by the oldest that is computed."""
        if len(self._known) >= KEPT:
            oldest = next((question for question, future in self._known.items() if future.done()), None)
            if oldest is not None:
                del self._known[oldest]

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._works = False
                    return
                question = self._waiting.popleft()
                future = self._known[question]
            future.set_result(_computed(question))


def _computed(question: Question) -> float | None:
    event, delta = question
    try:
        return pld_epsilon(event, delta)
    except NoReference:
        return None
    except Exception:  # a figure beside the promise: none is no harm, and whoever asks next must find the thread alive
        log.exception("no_second_opinion", mechanism=event.to_json(), delta=delta)
        return None


references: Final = References()
"""Of this process. An event's figure never changes."""
