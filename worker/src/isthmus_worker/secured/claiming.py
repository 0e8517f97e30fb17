"""A claim in a second thread, so that a long poll for work keeps no secured round waiting.

The main thread may be at a long upload when an offer comes: so there are heartbeats for it from the moment it is there.
"""

import logging
import threading
from collections.abc import Callable

from isthmus.client import NoWork
from isthmus.wire.rounds import TaskOffer
from isthmus_worker.heart import Heart

log = logging.getLogger(__name__)

Claimed = TaskOffer | NoWork


class Claims:
    """At most one claim at a time. To be used from the main thread."""

    def __init__(self, post: Callable[[Callable[[], None]], None], heart_of: Callable[[TaskOffer], Heart]) -> None:
        """Nothing is asked yet.

        Args:
            post: has the main thread do something, from any thread.
            heart_of: makes the heart that beats for an offer until it is taken.
        """
        self._post = post
        self._heart_of = heart_of
        self._heart: Heart | None = None
        self._closed = threading.Event()
        self._asking = False
        self._answer: Claimed | Exception | None = None

    @property
    def are_open(self) -> bool:
        """Whether a claim is on its way, or its answer was not taken yet."""
        return self._asking or self._answer is not None

    def ask(self, claim: Callable[[], Claimed]) -> None:
        """Have `claim` called, unless a claim is open; its answer is there to be taken later."""
        if self.are_open:
            return
        self._asking = True
        threading.Thread(target=self._call, args=(claim,), daemon=True, name="claim").start()

    def take(self) -> Claimed | None:
        """The answer, if it is there and still holds. Whoever takes an offer beats for it.

        Raises:
            Exception: what the claim raised.
        """
        if self._answer is None:
            return None
        (answer, self._answer), (heart, self._heart) = (self._answer, None), (self._heart, None)
        if isinstance(answer, Exception):
            raise answer
        if heart is not None:
            heart.end()
            if heart.lost is not None:
                log.info("claimed and lost", extra={"reason": heart.lost})
                return None
        return answer

    def alive(self) -> None:
        """The main thread goes on, and will take what is claimed."""
        if self._heart is not None:
            self._heart.alive()

    def close(self) -> None:
        """Beat no more."""
        self._closed.set()
        if self._heart is not None:
            self._heart.end()

    def _call(self, claim: Callable[[], Claimed]) -> None:
        found: Claimed | Exception
        try:
            found = claim()
        except Exception as error:  # the main thread's to bear
            found = error
        heart = self._heart_of(found) if isinstance(found, TaskOffer) else None
        self._heart = heart
        if heart is not None and not self._closed.is_set():
            heart.begin()
        self._post(lambda: self._keep(found))

    def _keep(self, answer: Claimed | Exception) -> None:
        self._asking, self._answer = False, answer
