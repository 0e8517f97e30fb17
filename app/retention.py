"""What nobody refers to any more: half-written drafts and blobs that a killed process left behind."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Final

import structlog
from sqlalchemy import select

from app.blobs import BlobStore, checkpoint_key
from app.database import Sessions
from app.models import Checkpoint, Update

log = structlog.get_logger(__name__)

ORPHANED_AFTER: Final = timedelta(hours=24)
"""Longer than any upload or aggregation lasts: what is younger may still be on its way to its row."""
EVERY: Final = timedelta(hours=1)


async def collect_orphans(sessions: Sessions, blobs: BlobStore, *, older_than: timedelta = ORPHANED_AFTER) -> int:
    """Delete blobs that no row names, once they are old; how many there were. Running it twice or never is harmless.

    A database without a single checkpoint is not believed: it is rather the wrong one than all models' end.
    """
    async with sessions() as session:
        if await session.scalar(select(Checkpoint.id).limit(1)) is None:
            return 0
    deleted = 0
    async for keys in blobs.list_old(older_than):
        referred = await _referred(sessions, keys)
        for key in keys:
            if key not in referred:
                await blobs.delete(key, unless_younger_than=older_than)
                deleted += 1
    if deleted:
        log.info("orphaned blobs were deleted", count=deleted)
    return deleted


async def _referred(sessions: Sessions, keys: Sequence[str]) -> set[str]:
    digests = {key.rpartition("/")[2]: key for key in keys if key.startswith("checkpoints/")}
    async with sessions() as session:
        updates = await session.scalars(
            select(Update.blob_key).where(Update.blob_key.in_(keys), Update.excluded.is_(False))
        )
        models = await session.execute(
            select(Checkpoint.digest, Checkpoint.state_digest).where(
                Checkpoint.digest.in_(digests) | Checkpoint.state_digest.in_(digests)
            )
        )
        named = {digest for row in models for digest in row if digest is not None}
    return {key for key in updates if key is not None} | {checkpoint_key(digest) for digest in named}
