"""Deleting blobs that a committed transaction discarded."""

from collections.abc import Sequence

import structlog
from sqlalchemy import delete

from app.dependencies import Parts
from app.models import DiscardedBlob

log = structlog.get_logger(__name__)


async def delete_blobs(parts: Parts, keys: Sequence[str]) -> None:
    """Delete these discarded blobs, and forget those that are gone. One that cannot be deleted keeps no other.

    It is logged and stays discarded: the sweep tries again. So does whoever comes after a process that is killed here.
    """
    gone = []
    for key in keys:
        try:
            await parts.blobs.delete(key)
        except Exception as error:  # whatever it is, the other blobs must not be kept for it
            log.warning("a discarded blob was not deleted; it is tried again", key=key, error=repr(error))
        else:
            gone.append(key)
    if gone:
        async with parts.single_statements() as session:
            await session.execute(delete(DiscardedBlob).where(DiscardedBlob.key.in_(gone)))
