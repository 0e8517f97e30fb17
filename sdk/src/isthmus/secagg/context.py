"""What all keys and signatures of one attempt are bound to."""

import hashlib
from typing import Final
from uuid import UUID

PROTOCOL: Final = b"isthmus/secagg/v1"
CONTEXT_BYTES: Final = 32


def context_of(
    *,
    round_id: UUID,
    spec_digest: str,
    model_digest: str,
    terms_digest: str,
    roster_digest: str,
    round_number: int,
    attempt: int,
) -> bytes:
    """32 bytes that differ as soon as anything differs that all members of an attempt have to agree on.

    Members that were shown different jobs, models, terms or rosters derive different keys: they cannot read each
    other's shares, their signatures do not hold for each other, and their masks do not cancel.

    Args:
        round_id: the round's.
        spec_digest: SHA-256 of the job's specification, in hex.
        model_digest: of the bytes of the round's model.
        terms_digest: of what else decides which numbers a member's vector holds: `isthmus.wire.secured.terms_digest`.
        roster_digest: of the roster's bytes.
        round_number: the round's number in the job.
        attempt: which attempt of the round.

    Raises:
        ValueError: a digest is not 64 hex digits, or a number is not in 0 to 2^32 - 1.
    """
    digests = b"".join(_digest(text) for text in (spec_digest, model_digest, terms_digest, roster_digest))
    try:
        numbers = round_number.to_bytes(4, "big") + attempt.to_bytes(4, "big")
    except OverflowError as error:
        raise ValueError("the numbers of a round and of its attempt are in 0 to 2^32 - 1") from error
    return hashlib.sha256(PROTOCOL + round_id.bytes + digests + numbers).digest()


def _digest(text: str) -> bytes:
    if len(text) != 64:
        raise ValueError(f"a digest has 64 hex digits, not {len(text)}")
    return bytes.fromhex(text)
