"""Whether an announcement is what the dataset's worker signed, and when."""

from datetime import datetime, timedelta
from typing import Final

from app.credentials import verify
from app.errors import PolicySignatureInvalid
from isthmus.wire.datasets import AnnounceDataset, announcement_bytes

AHEAD: Final = timedelta(minutes=10)
"""How far a worker's clock may be ahead of the service's."""


def require_signature(
    body: AnnounceDataset, *, organization: str, dataset: str, public_key: str, now: datetime
) -> None:
    """Whether the policy and the lineage are signed for this dataset by the key that the worker enrolled with.

    Raises:
        PolicySignatureInvalid: they are not, or were signed in the future.
    """
    if not _signed(body, organization, dataset, public_key):
        raise PolicySignatureInvalid(
            f"The signature is not of this policy and lineage for dataset {dataset!r} of {organization!r}, by the key "
            "that this worker enrolled with. Sign with that key, and announce exactly what was signed."
        )
    if body.signed_at > now + AHEAD:
        raise PolicySignatureInvalid(
            f"The announcement was signed at {_told(body.signed_at)}, and here it is {_told(now)}. Set the worker's "
            "clock."
        )


def _signed(body: AnnounceDataset, organization: str, dataset: str, public_key: str) -> bool:
    try:
        signed = announcement_bytes(
            organization, dataset, policy=body.policy, lineage=body.lineage, signed_at=body.signed_at
        )
    except OverflowError:  # a moment in the year 1 or 9999 that no calendar has in UTC
        return False
    return verify(public_key, signed, body.signature)


def require_newer(body: AnnounceDataset, *, signed_at: datetime, signature: str) -> None:
    """Whether an announcement is not older than the one that stands: a former, looser policy is not to come back.

    Raises:
        PolicySignatureInvalid: it is older; or it is another one of the same moment, and nobody knows which came last.
    """
    if body.signed_at < signed_at or (body.signed_at == signed_at and body.signature != signature):
        raise PolicySignatureInvalid(
            f"This announcement was signed at {_told(body.signed_at)}, and the dataset's newest one at "
            f"{_told(signed_at)}: an older one is not taken. Sign anew; if the worker's clock went back, set it."
        )


def _told(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")
