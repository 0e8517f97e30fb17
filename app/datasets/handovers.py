"""A dataset changes its worker without anybody being revoked, when the old worker and the new one have signed it."""

from datetime import datetime

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit.service import append, organization_stream
from app.credentials import verify
from app.datasets.announcements import AHEAD
from app.errors import DatasetServedElsewhere, PolicySignatureInvalid
from app.models import Dataset, Worker
from isthmus.wire.datasets import Handover, handover_bytes
from isthmus.wire.events import EventKind


async def take_over(
    session: AsyncSession, dataset: Dataset, handover: Handover, *, organization: str, taker: Worker, now: datetime
) -> None:
    """Let a worker serve a dataset that the one before has handed on to it. It stays confirmed, with its ledger.

    A handover of a dataset that the worker serves already changes nothing. One from a worker that was revoked meanwhile
    counts for nothing either: whoever announces the dataset then is confirmed anew.

    Args:
        dataset: locked.
        handover: as the new worker sent it.
        organization: name of the one that both belong to.
        taker: the worker that announces the dataset now.

    Raises:
        PolicySignatureInvalid: it is not signed by both, for this dataset and its lineage, after the last announcement.
        DatasetServedElsewhere: it is from another worker than the one that serves the dataset.
    """
    giver = (await session.scalars(select(Worker).where(Worker.id == dataset.worker_id))).one()
    if giver.id == taker.id or giver.revoked_at is not None:
        return
    if (handover.giver, handover.taker) != (giver.public_key, taker.public_key):
        raise DatasetServedElsewhere(
            f"Worker {giver.name!r} of your organization serves dataset {dataset.name!r}, and the handover is not from "
            f"that one to {taker.name!r}. Have it hand the dataset on to this worker's own public key."
        )
    if not _signed(handover, organization, dataset.name):
        raise PolicySignatureInvalid(
            f"The handover of dataset {dataset.name!r} is not signed by both workers. Take the document over anew."
        )
    if handover.lineage != dataset.lineage:
        raise PolicySignatureInvalid(f"The handover is of other data than those of dataset {dataset.name!r}.")
    if not dataset.signed_at < handover.signed_at <= now + AHEAD:
        raise PolicySignatureInvalid(
            f"The handover of dataset {dataset.name!r} was signed before the dataset's newest announcement, or in the "
            "future: an old one is not taken. Hand it on anew; if a worker's clock is wrong, set it."
        )
    dataset.worker_id, dataset.signed_at, dataset.announced_at = taker.id, handover.signed_at, now
    append(
        session,
        organization_stream(dataset.organization_id),
        EventKind.DATASET_MOVED,
        at=now,
        actor=giver.name,
        dataset_id=str(dataset.id),
        name=dataset.name,
        worker_id=str(taker.id),
        former_worker_id=str(giver.id),
        lineage=handover.lineage,
        entries=handover.entries,
        head=handover.head,
        document=handover.document,
    )
    await session.flush()


def _signed(handover: Handover, organization: str, dataset: str) -> bool:
    try:
        said = handover_bytes(
            organization,
            dataset,
            giver=handover.giver,
            taker=handover.taker,
            lineage=handover.lineage,
            entries=handover.entries,
            head=handover.head,
            document=handover.document,
            signed_at=handover.signed_at,
        )
    except OverflowError:  # a moment in the year 1 or 9999 that no calendar has in UTC
        return False
    return verify(handover.giver, said, handover.given) and verify(handover.taker, said, handover.taken)
