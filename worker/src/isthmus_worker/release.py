"""Journal, admission, upload, receipt: the only place where something of the data leaves this machine."""

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Final, Protocol
from uuid import UUID

from isthmus.client import BadResponse, Client, Refused, TimedOut, Unreachable
from isthmus.client.receipts import ReceiptInvalid, verify_receipt
from isthmus.wire.problems import ProblemCode
from isthmus.wire.rounds import UpdateReceipt
from isthmus_worker.journal import Journal, Release, ReleaseState

log = logging.getLogger(__name__)

Sleep = Callable[[float], None]

PASSING: Final = frozenset(
    {
        ProblemCode.TOO_MANY_REQUESTS,
        ProblemCode.NOT_READY,
        ProblemCode.INTERNAL,
        ProblemCode.DIGEST_MISMATCH,  # damaged on the way
        ProblemCode.LENGTH_MISMATCH,
    }
)
"""Refusals that say nothing about the release: the same bytes are sent again, a few times."""

LATER: Final = frozenset(
    {
        ProblemCode.LEASE_LOST,
        ProblemCode.TASK_NOT_CLAIMED,
        ProblemCode.UNAUTHENTICATED,
        ProblemCode.KEY_EXPIRED,
        ProblemCode.KEY_REVOKED,
        ProblemCode.FORBIDDEN,
    }
)
"""Refusals that leave the round open: the same bytes answer its next offer. They may have been admitted already, by a
service whose `100 Continue` a killed agent never recorded; other bytes would then be refused for good."""

ATTEMPTS: Final = 5
LONGEST_WAIT_S: Final = 15.0
LONGEST_PAUSE_S: Final = 300.0
"""Whatever the service asks for, we look again after so long."""


class HandedIn(StrEnum):
    """What became of a release."""

    ACKNOWLEDGED = "acknowledged"
    DISCARDED = "discarded"  # never admitted
    KEPT = "kept"  # for a later offer of the same round


class VectorNeverLeaves(Exception):
    """What is released under secure aggregation leaves masked, by `secured.sending`, and in no other way."""


class Books(Protocol):
    """What is written down while bytes are handed in: a worker killed at any moment knows what may have left."""

    def asking(self) -> None:
        """Admission is about to be asked for."""
        ...

    def admitted(self) -> None:
        """The service has admitted the bytes, and none of them is sent yet. May be called again."""
        ...

    def answered(self, refusal: Refused) -> None:
        """The service refused, whether or not it is asked again."""
        ...

    def refused(self, refusal: Refused) -> HandedIn:
        """It is not asked again: what becomes of the bytes."""
        ...

    def received(self, receipt: UpdateReceipt) -> None:
        """The service has the bytes, and has signed for them; the signature was verified."""
        ...


@dataclass(frozen=True)
class Outgoing:
    """Bytes that are handed in for a task."""

    task_id: UUID
    fence: int
    path: Path
    digest: str


def hand_in(
    client: Client,
    journal: Journal,
    release: Release,
    *,
    service_public_key: str,
    sleep: Sleep = time.sleep,
    on_progress: Callable[[], None] = lambda: None,
    wanted: Callable[[], bool] = lambda: True,
) -> tuple[HandedIn, str]:
    """Have the bytes of `release` admitted, send them and keep the receipt; what became of them, and why.

    A service that cannot be reached is tried again with the same bytes until it answers, or `wanted` says that the
    task is lost: then they wait for a later offer, or for the next start.

    Raises:
        ReceiptInvalid: the receipt was not signed by the pinned key. The bytes are kept.
        VectorNeverLeaves: the release is of a secured round.
    """
    if release.secured:
        raise VectorNeverLeaves(f"release {release.id} is the vector of a secured round")
    assert release.path is not None, "the caller has looked whether the bytes are held"
    outgoing = Outgoing(UUID(release.task_id), release.fence, release.path, release.digest)
    return send(
        client,
        outgoing,
        PlainBooks(journal, release),
        service_public_key=service_public_key,
        sleep=sleep,
        on_progress=on_progress,
        wanted=wanted,
    )


def send(
    client: Client,
    outgoing: Outgoing,
    books: Books,
    *,
    service_public_key: str,
    sleep: Sleep,
    on_progress: Callable[[], None],
    wanted: Callable[[], bool],
) -> tuple[HandedIn, str]:
    """Admission, upload and receipt of some bytes, written down in `books`; otherwise as `hand_in`."""
    attempt = 0
    while True:
        attempt += 1
        books.asking()
        try:
            receipt = client.tasks.submit_update(
                outgoing.task_id,
                outgoing.path,
                digest=outgoing.digest,
                fence=outgoing.fence,
                on_admitted=books.admitted,
                progress=lambda _done, _all: on_progress(),
            )
        except (Unreachable, TimedOut) as error:
            if not wanted():
                return HandedIn.KEPT, str(error)
            wait_s = backoff_s(attempt)
            log.warning(
                "upload interrupted",
                extra={"task": outgoing.task_id, "reason": str(error), "again_in_s": round(wait_s, 1)},
            )
            sleep(wait_s)
        except Refused as refusal:
            books.answered(refusal)
            if known(refusal) in PASSING and attempt < ATTEMPTS:
                sleep(min(LONGEST_PAUSE_S, max(backoff_s(attempt), refusal.retry_after_s or 0.0)))
                continue
            return books.refused(refusal), refusal.detail
        except BadResponse as error:
            return HandedIn.KEPT, str(error)
        else:
            verify_receipt(receipt, service_public_key)
            books.received(receipt)
            return HandedIn.ACKNOWLEDGED, ""


class PlainBooks:
    """The books of bytes that were noised once and leave as they are."""

    def __init__(self, journal: Journal, release: Release) -> None:
        self.journal = journal
        self.release = release
        self._asked_before = release.unanswered

    def asking(self) -> None:
        """See `Books`."""
        self._asked_before = self.release.unanswered
        self._note(unanswered=True)

    def admitted(self) -> None:
        """Record the spend, once."""
        if state_of(self.journal, self.release) is ReleaseState.PREPARED:
            self.journal.mark_released(self.release)

    def answered(self, refusal: Refused) -> None:
        """Nothing was admitted, unless an earlier question went unanswered."""
        if not self._asked_before and known(refusal) is not ProblemCode.INTERNAL:
            self._note(unanswered=False)

    def refused(self, refusal: Refused) -> HandedIn:
        """Only what was prepared and never released may be forgotten, and only where its round is over for us."""
        code = known(refusal)
        waits = state_of(self.journal, self.release) is ReleaseState.PREPARED
        if not waits or code in LATER | PASSING:
            return HandedIn.KEPT
        given_up = self.journal.give_up(self.release, code)
        return HandedIn.DISCARDED if given_up is ReleaseState.DISCARDED else HandedIn.KEPT

    def received(self, receipt: UpdateReceipt) -> None:
        """Keep the receipt; the bytes can go."""
        self.admitted()  # it has the bytes, even where it did not ask for them again
        self.journal.mark_acknowledged(self.release, receipt)

    def _note(self, *, unanswered: bool) -> None:
        if self.release.unanswered is not unanswered:
            self.journal.note_asking(self.release, unanswered=unanswered)
            self.release = replace(self.release, unanswered=unanswered)


def backoff_s(attempt: int) -> float:
    """The wait after failed attempt number `attempt` (from 1): doubling, with jitter, bounded."""
    full: float = min(LONGEST_WAIT_S, 0.25 * 2.0 ** min(attempt - 1, 10))
    return full * random.uniform(0.5, 1.0)  # noqa: S311 - jitter


def known(refusal: Refused) -> ProblemCode:
    """A code that we do not know tells nothing of what the service did: it counts as a failure of its own."""
    return refusal.code if isinstance(refusal.code, ProblemCode) else ProblemCode.INTERNAL


def state_of(journal: Journal, release: Release) -> ReleaseState | None:
    """Where a release stands now; None: it was discarded."""
    found = journal.find(release.key)
    return found.state if found is not None and found.id == release.id else None


__all__ = ["ATTEMPTS", "LATER", "LONGEST_PAUSE_S", "PASSING", "HandedIn", "ReceiptInvalid", "backoff_s", "hand_in"]
