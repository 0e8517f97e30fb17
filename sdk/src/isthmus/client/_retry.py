"""When a call is made again, and after how long. No I/O of its own: the clock and the sleep come in."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import httpx

from isthmus.client._answers import Answer, retry_after_s

RETRIED_STATUSES: Final = frozenset({429, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class Retries:
    """How often and how long a call is repeated.

    A call that does nothing twice (GET, PUT, a creation with its idempotency key, a claim) is repeated after a cut
    connection, a timeout and the answers 429, 502, 503 and 504. Any other call is repeated only where it cannot have
    begun: no connection was made, or the answer was 429.
    """

    attempts: int = 5
    first_wait_s: float = 0.25
    """Doubles with every attempt, less a random part of up to a half."""
    longest_wait_s: float = 10.0
    total_s: float = 60.0
    """Waiting stops where it would end later than this after the first attempt, whatever Retry-After says."""


NO_RETRIES: Final = Retries(attempts=1)


@dataclass(frozen=True, slots=True)
class Clock:
    """The time as the client sees it; tests bring their own."""

    monotonic: Callable[[], float] = time.monotonic
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    sleep: Callable[[float], None] = time.sleep
    chance: Callable[[], float] = random.random
    """A number from 0 to 1 for the jitter."""


def backoff_s(retries: Retries, attempt: int, chance: float) -> float:
    """The wait after failed attempt number `attempt` (from 1): exponential, at least half of it, at most all of it."""
    full = min(retries.longest_wait_s, retries.first_wait_s * 2.0 ** min(attempt - 1, 60))
    return full * (1 + chance) / 2


def with_retries(attempt_once: Callable[[], Answer], *, retries: Retries, repeatable: bool, clock: Clock) -> Answer:
    """The first answer that is final, or the last one there was.

    Raises:
        httpx.TransportError: the last attempt ended so.
    """
    began = clock.monotonic()
    attempt = 0
    while True:
        attempt += 1
        answer: Answer | None = None
        failure: httpx.TransportError | None = None
        try:
            answer = attempt_once()
        except httpx.TransportError as error:
            failure = error
        if answer is not None and not (answer.status == 429 or (repeatable and answer.status in RETRIED_STATUSES)):
            return answer
        wait_s = backoff_s(retries, attempt, clock.chance())
        if answer is not None:
            wait_s = max(wait_s, retry_after_s(answer.headers, clock.now()) or 0.0)
        may = failure is None or repeatable or isinstance(failure, httpx.ConnectError | httpx.ConnectTimeout)
        late = clock.monotonic() - began + wait_s > retries.total_s
        if not may or late or attempt >= retries.attempts:
            if failure is not None:
                raise failure
            assert answer is not None
            return answer
        clock.sleep(wait_s)
