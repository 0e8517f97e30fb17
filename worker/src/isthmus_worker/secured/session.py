"""One attempt of a secured round, from the keys to the shares that are revealed, in a thread of its own.

The thread speaks to the service and does the pure protocol. It writes nothing down: pieces of that are handed to the
main thread (`Office.ask`), which does them between other things, and no message leaves before the piece that it
follows from is done. It does no work on arrays either: once the masks are known it waits until the main thread has had
the update masked and handed in.
"""

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from isthmus.client import BadResponse, Client, Refused, TimedOut, Unreachable
from isthmus.secagg.violations import ProtocolViolation
from isthmus.wire.problems import ProblemCode
from isthmus.wire.secured import Step
from isthmus_worker.heart import Heart
from isthmus_worker.release import LATER, LONGEST_PAUSE_S, PASSING, backoff_s
from isthmus_worker.secured.records import Record, SessionState

if TYPE_CHECKING:
    from isthmus_worker.secured.standing import Standing

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

SHORTEST_WAIT_S: Final = 40
WAIT_S: Final = 50
"""Length of a long poll for a step to close, at most."""
QUICK_S: Final = 0.5
"""A poll that answers sooner than that, and with nothing, is not repeated at once."""
TICK_S: Final = 0.5
"""How often a session that waits for its upload looks whether it is still wanted."""


class Ending(StrEnum):
    """How a session ended."""

    DONE = "done"  # our shares are revealed
    BROKEN = "broken"  # a rule is broken: we leave, and reveal nothing
    SPOILT = "spoilt"  # the same, and a peer may have done it: another attempt, with other keys, may go well
    OVER = "over"  # the service goes on without us, or not at all: these keys are of no use any more
    LOST = "lost"  # the lease is lost, work broke, or we stop: what is kept may go on with the same attempt


@dataclass(frozen=True)
class Ended:
    """How a session ended, and why."""

    how: Ending
    reason: str


class Office(Protocol):
    """What a session asks the main thread for. Each call returns once it is on the disk."""

    def keys_came(self, session: "Session", answer: bytes) -> None:
        """Check whose keys they are against what is pinned, and keep them."""
        ...

    def shares_came(self, session: "Session", answer: bytes) -> None:
        """Keep whose shares came."""
        ...

    def survivors_came(self, session: "Session", answer: bytes) -> None:
        """Check the set against what was revealed before, and keep it as the one that is signed."""
        ...

    def about_to_reveal(self, session: "Session") -> None:
        """Charge what is charged now, and keep for whom shares are revealed."""
        ...

    def wake(self) -> None:
        """Have the main thread look at its sessions."""
        ...


class _Left(Exception):
    """The session ends here."""

    def __init__(self, ended: Ended) -> None:
        super().__init__(ended.reason)
        self.ended = ended


class Session(threading.Thread):
    """A thread that goes through the steps. The main thread starts it, reads its state and ends it."""

    def __init__(
        self, client: Client, record: Record, standing: Callable[[], "Standing"], office: Office, heart: Heart | None
    ) -> None:
        """Prepare a session.

        Args:
            client: safe to share between threads.
            record: what is kept; the session goes on from there.
            standing: makes the standing of `record`; called in the thread.
            office: the main thread.
            heart: beats for the task until the masked update is handed in; None: it was before.
        """
        super().__init__(daemon=True, name=f"secured {record.offer.job} {record.key.round_number}")
        self.record: Final = record
        self.offer: Final = record.offer
        self.heart = heart
        """None from when the masked update was handed in."""
        self.is_handing_in = False
        """The main thread looks after the lease."""
        self.ended: Ended | None = None
        """Set once, at the end."""
        self.masks_known = False
        """The update can be masked."""
        self._make_standing = standing
        self._standing: Standing | None = None
        self._client = client
        self._office = office
        self._uploaded = threading.Event()
        self._stopped = threading.Event()
        self._stop_reason = Ended(Ending.LOST, "the worker stops")
        self._pause = threading.Event()

    @property
    def standing(self) -> "Standing":
        """What is known of the attempt. For the main thread once `masks_known`."""
        assert self._standing is not None, "it is made when the thread begins"
        return self._standing

    def uploaded(self) -> None:
        """The service has signed for the masked update: go on with the survivors."""
        self._uploaded.set()

    def stop(self, how: Ending, reason: str) -> None:
        """Send nothing more, whatever comes."""
        if not self._stopped.is_set():
            self._stop_reason = Ended(how, reason)
            self._stopped.set()
        self._pause.set()
        self._uploaded.set()

    def run(self) -> None:
        """All steps that are left."""
        try:
            self._go()
            self.ended = Ended(Ending.DONE, "")
        except _Left as left:
            self.ended = left.ended
        except ProtocolViolation as violation:
            how = Ending.BROKEN if violation.peer is None else Ending.SPOILT
            self.ended = Ended(how, violation.reason)
        except Exception as error:
            log.exception("unexpected", extra={"job": self.offer.job, "task": self.offer.task_id})
            self.ended = Ended(Ending.BROKEN, f"An unexpected {type(error).__name__} ended the session.")
        finally:
            self._office.wake()

    def _go(self) -> None:
        standing = self._standing = self._make_standing()
        state = self.record.state
        if state is SessionState.KEYS:
            answer = self._exchange(Step.KEYS, standing.keys_message())
            standing.open_keys(answer)
            self._written(lambda: self._office.keys_came(self, answer))
        if state in (SessionState.KEYS, SessionState.SHARES):
            shares = self._exchange(Step.SHARES, standing.shares_message())
            standing.open_shares(shares)
            self._written(lambda: self._office.shares_came(self, shares))
        if state not in (SessionState.SUBMITTED, SessionState.SIGNED, SessionState.REVEALED):
            self.masks_known = True
            self._office.wake()
            while not self._uploaded.wait(TICK_S):
                self._check_wanted()
            self._check_wanted()
        if state not in (SessionState.SIGNED, SessionState.REVEALED):
            survivors = self._exchange(Step.UPDATE, b"")
            standing.open_survivors(survivors)
            self._written(lambda: self._office.survivors_came(self, survivors))
        if state is not SessionState.REVEALED:
            standing.open_confirmations(self._exchange(Step.SURVIVORS, standing.survivors_message()))
            self._written(lambda: self._office.about_to_reveal(self))
        self._exchange(Step.UNMASK, standing.unmask_message(), waits=False)

    def _written(self, piece: Callable[[], None]) -> None:
        self._check_wanted()
        piece()
        self._check_wanted()

    def _exchange(self, step: Step, message: bytes, *, waits: bool = True) -> bytes:
        """Send a message until it has arrived, and wait for what the closing of its step gives."""
        attempt = 0
        while True:
            self._check_wanted()
            began = time.monotonic()
            try:
                answer = self._client.tasks.exchange(
                    self.offer.task_id, step, message, fence=self.offer.fence, wait_s=self._poll_s() if waits else 0
                )
            except (Unreachable, TimedOut, BadResponse) as error:
                attempt += 1
                self._rest(backoff_s(attempt), str(error))
            except Refused as refusal:
                attempt += 1
                self._rest(max(backoff_s(attempt), self._bear(refusal)), str(refusal))
            else:
                attempt = 0
                self._sign_of_life()
                if answer is not None or not waits:
                    self._check_wanted()
                    return answer or b""
                if time.monotonic() - began < QUICK_S:
                    self._pause.wait(QUICK_S)

    def _bear(self, refusal: Refused) -> float:
        """So long to wait after a refusal that says nothing about this attempt."""
        code = refusal.code if isinstance(refusal.code, ProblemCode) else ProblemCode.INTERNAL
        if code in PASSING:
            return min(LONGEST_PAUSE_S, refusal.retry_after_s or 0.0)
        if code in LATER:
            raise _Left(Ended(Ending.LOST, refusal.detail))
        raise _Left(Ended(Ending.OVER, refusal.detail))

    def _rest(self, seconds: float, why: str) -> None:
        log.debug("step not answered", extra={"task": self.offer.task_id, "reason": why, "again_in_s": seconds})
        until = time.monotonic() + min(seconds, LONGEST_PAUSE_S)
        while (left_s := until - time.monotonic()) > 0 and not self._pause.is_set():
            self._sign_of_life()
            self._pause.wait(min(left_s, TICK_S))

    def _poll_s(self) -> int:
        """Short enough that a heart hears of this thread between any two polls."""
        heart = self.heart
        return _a_poll_s() if heart is None else min(_a_poll_s(), int(heart.max_silence_s / 2))

    def _sign_of_life(self) -> None:
        heart = self.heart
        if heart is not None:
            heart.alive()

    def _check_wanted(self) -> None:
        self._sign_of_life()
        if self._stopped.is_set():
            raise _Left(self._stop_reason)
        heart = self.heart
        if heart is not None and not self.is_handing_in and heart.lost is not None:
            raise _Left(Ended(Ending.LOST, heart.lost))


def _a_poll_s() -> int:
    """Not always the same: those who wait for the same step are woken by its closing, not by their clocks."""
    return random.randint(SHORTEST_WAIT_S, WAIT_S)  # noqa: S311 - jitter
