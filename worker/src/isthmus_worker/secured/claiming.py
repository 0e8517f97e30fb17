"""A claim in a second thread, so that a long poll for work keeps no secured round waiting."""

import threading
from collections.abc import Callable

from isthmus.client import NoWork
from isthmus.wire.rounds import TaskOffer

Claimed = TaskOffer | NoWork


class Claims:
    """At most one claim at a time. To be used from the main thread."""

    def __init__(self, post: Callable[[Callable[[], None]], None]) -> None:
        """`post` has the main thread do something, from any thread."""
        self._post = post
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
        """The answer, if it is there.

        Raises:
            Exception: what the claim raised.
        """
        answer, self._answer = self._answer, None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _call(self, claim: Callable[[], Claimed]) -> None:
        found: Claimed | Exception
        try:
            found = claim()
        except Exception as error:  # the main thread's to bear
            found = error
        self._post(lambda: self._keep(found))

    def _keep(self, answer: Claimed | Exception) -> None:
        self._asking, self._answer = False, answer
