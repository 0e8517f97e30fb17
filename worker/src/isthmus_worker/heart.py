"""Heartbeats: they tell the service that the work goes on, and tell us when it is not wanted any more."""

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

from isthmus.client import Client, IsthmusError, Refused
from isthmus.wire.problems import ProblemCode
from isthmus.wire.rounds import Heartbeat, TaskOffer

log = logging.getLogger(__name__)

SHORTEST_S: Final = 0.1
"""Not oftener than so, whatever the service asks for."""

OVER: Final = frozenset(
    {
        ProblemCode.LEASE_LOST,
        ProblemCode.TASK_NOT_OPEN,
        ProblemCode.TASK_NOT_CLAIMED,
        ProblemCode.ROUND_NOT_COLLECTING,
        ProblemCode.GRANT_WITHDRAWN,
        ProblemCode.DATASET_NOT_CONFIRMED,
        ProblemCode.JOB_NOT_RUNNING,
        ProblemCode.NOT_FOUND,
    }
)
"""Refusals of a heartbeat after which there is nothing left to work for."""


class Heart:
    """Beats in a thread of its own as long as it is entered and what it beats for shows signs of life.

    A heartbeat says that the *work* lives, not that the agent does: after `max_silence_s` without `alive` it stops for
    good: the lease ends, and the task is `lost`.
    """

    def __init__(
        self, client: Client, offer: TaskOffer, max_silence_s: float, on_answer: Callable[[], None] = lambda: None
    ) -> None:
        self._client = client
        self._offer = offer
        self._max_silence_s = max_silence_s
        self._on_answer = on_answer
        self._alive_at = time.monotonic()
        self._progress = 0.0
        self._ended = threading.Event()
        self._lost: str | None = None
        self._thread = threading.Thread(target=self._beat, daemon=True, name="heart")

    def __enter__(self) -> Self:
        self.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def begin(self) -> None:
        """Beat from now on."""
        self._thread.start()

    def end(self) -> None:
        """Beat no more."""
        self._ended.set()

    def alive(self, progress: float | None = None) -> None:
        """The work goes on."""
        self._alive_at = time.monotonic()
        if progress is not None:
            self._progress = progress

    @property
    def max_silence_s(self) -> float:
        """It stops after so long without a sign of life."""
        return self._max_silence_s

    @property
    def lost(self) -> str | None:
        """Why the work is not wanted any more; None while it is."""
        return self._lost

    def _beat(self) -> None:
        while not self._ended.wait(max(SHORTEST_S, self._offer.heartbeat_s)):
            if time.monotonic() - self._alive_at > self._max_silence_s:
                self._lost = f"no sign of life for {self._max_silence_s:g} seconds"
                return
            body = Heartbeat(fence=self._offer.fence, progress=self._progress)
            try:
                receipt = self._client.tasks.heartbeat(self._offer.task_id, body)
            except Refused as refusal:
                if refusal.code in OVER:
                    self._lost = refusal.detail
                    return
            except IsthmusError as error:
                log.debug("heartbeat missed", extra={"task": self._offer.task_id, "reason": str(error)})
            else:
                self._on_answer()
                if not receipt.held:
                    self._lost = receipt.reason or "the task is over"
                    return
