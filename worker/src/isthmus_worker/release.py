"""Journal, admission, upload, receipt: the only place where something of the data leaves this machine."""

import logging
import random
import time
from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from functools import partial
from typing import Final
from uuid import UUID

from isthmus.client import BadResponse, Client, Refused, TimedOut, Unreachable
from isthmus.client.receipts import ReceiptInvalid, verify_receipt
from isthmus.wire.problems import ProblemCode
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
    """
    path, task_id, attempt = release.path, UUID(release.task_id), 0
    assert path is not None, "the caller has looked whether the bytes are held"
    while True:
        attempt += 1
        was_unanswered = release.unanswered
        if not was_unanswered:
            journal.note_asking(release, unanswered=True)
            release = replace(release, unanswered=True)
        try:
            receipt = client.tasks.submit_update(
                task_id,
                path,
                digest=release.digest,
                fence=release.fence,
                on_admitted=partial(_record_spend, journal, release),
                progress=lambda _done, _all: on_progress(),
            )
        except (Unreachable, TimedOut) as error:
            if not wanted():
                return HandedIn.KEPT, str(error)
            wait_s = backoff_s(attempt)
            log.warning(
                "upload interrupted", extra={"task": task_id, "reason": str(error), "again_in_s": round(wait_s, 1)}
            )
            sleep(wait_s)
        except Refused as refusal:
            code = _known(refusal)
            if not was_unanswered and code is not ProblemCode.INTERNAL:
                journal.note_asking(release, unanswered=False)
                release = replace(release, unanswered=False)
            if code in PASSING and attempt < ATTEMPTS:
                sleep(min(LONGEST_PAUSE_S, max(backoff_s(attempt), refusal.retry_after_s or 0.0)))
                continue
            return _refused(journal, release, refusal)
        except BadResponse as error:
            return HandedIn.KEPT, str(error)
        else:
            verify_receipt(receipt, service_public_key)
            _record_spend(journal, release)  # it has the bytes, even where it did not ask for them again
            journal.mark_acknowledged(release, receipt)
            return HandedIn.ACKNOWLEDGED, ""


def backoff_s(attempt: int) -> float:
    """The wait after failed attempt number `attempt` (from 1): doubling, with jitter, bounded."""
    full: float = min(LONGEST_WAIT_S, 0.25 * 2.0 ** min(attempt - 1, 10))
    return full * random.uniform(0.5, 1.0)  # noqa: S311 - jitter


def _known(refusal: Refused) -> ProblemCode:
    """A code that we do not know tells nothing of what the service did: it counts as a failure of its own."""
    return refusal.code if isinstance(refusal.code, ProblemCode) else ProblemCode.INTERNAL


def _refused(journal: Journal, release: Release, refusal: Refused) -> tuple[HandedIn, str]:
    """Only what was prepared and never released may be forgotten, and only where its round is over for us."""
    waits = _state(journal, release) is ReleaseState.PREPARED
    if (
        waits
        and (code := _known(refusal)) not in LATER | PASSING
        and journal.give_up(release, code) is ReleaseState.DISCARDED
    ):
        return HandedIn.DISCARDED, refusal.detail
    return HandedIn.KEPT, refusal.detail


def _record_spend(journal: Journal, release: Release) -> None:
    if _state(journal, release) is ReleaseState.PREPARED:
        journal.mark_released(release)


def _state(journal: Journal, release: Release) -> ReleaseState | None:
    found = journal.find(release.key)
    return found.state if found is not None and found.id == release.id else None


__all__ = ["ATTEMPTS", "LATER", "LONGEST_PAUSE_S", "PASSING", "HandedIn", "ReceiptInvalid", "backoff_s", "hand_in"]
