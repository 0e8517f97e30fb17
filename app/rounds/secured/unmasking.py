"""The sum of what is masked: read in the roster's order, unmasked off the event loop, and never kept.

Secrets of members that were rebuilt from shares are in memory only. What is written is the sum, beside the blobs and
under no name, until the next model is made of it.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID

import structlog
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import undefer

from app.database import Sessions
from app.models import Participation, SecuredAttempt, SecuredMember
from app.rounds.queries import Contribution
from app.rounds.specs import plan_of
from isthmus.codec.blocks import TensorFile, TensorFileWriter
from isthmus.federation.secured import sum_bound, sum_tensors, unmask
from isthmus.secagg.roster import Roster
from isthmus.secagg.server import rebuild
from isthmus.wire.jobs import JobSpec
from isthmus.wire.privacy import PrivacyPlan

log = structlog.get_logger(__name__)

NOTED_EVERY_S: Final = 1.0
"""How often it is written down how far an unmasking has come."""


class SumTooLong(ValueError):
    """The sum is longer than updates within their bound, and their noise, can make it."""


@dataclass(frozen=True, slots=True)
class Masked:
    """All that unmasks the sum of a frozen set, as its attempt has it."""

    attempt: int
    context: bytes
    roster: Roster
    advertisements: Mapping[int, bytes]
    shared: Sequence[int]
    survivors: Sequence[int]
    reveals: Mapping[int, bytes]
    plan: PrivacyPlan | None
    """Of one participation: all agree in what counts for the sum."""

    @property
    def weight_shares(self) -> list[float]:
        """What each survivor counts for, of the largest weight in the roster."""
        largest = max(member.weight for member in self.roster.members)
        return [self.roster[index].weight / largest for index in self.survivors]


async def read_masked(session: AsyncSession, round_id: UUID, contributions: Sequence[Contribution]) -> Masked | None:
    """What came in for the unmasking of a round; None if that is over."""
    found = await session.scalars(
        select(SecuredAttempt).where(SecuredAttempt.round_id == round_id).options(undefer(SecuredAttempt.roster))
    )
    attempt = found.one_or_none()
    if attempt is None or not contributions:
        return None
    members = await session.execute(
        select(SecuredMember.index, SecuredMember.keys, SecuredMember.reveal).where(SecuredMember.round_id == round_id)
    )
    rows = members.all()
    part = await session.get_one(Participation, contributions[0].update.participation_id)
    return Masked(
        attempt=attempt.attempt,
        context=attempt.context,
        roster=Roster.from_bytes(attempt.roster),
        advertisements={index: keys for index, keys, _ in rows if keys is not None},
        shared=attempt.shared or (),
        survivors=attempt.survivors or (),
        reveals={index: reveal for index, _, reveal in rows if reveal is not None},
        plan=plan_of(part),
    )


def write_sum(
    masked: Masked,
    spec: JobSpec,
    elements: int,
    updates: Sequence[Path],
    draft: Path,
    *,
    threads: int,
    progress: Callable[[float], None],
) -> None:
    """Unmask the sum of `updates` into the file `draft`. Blocks a thread.

    Raises:
        SharesWrong, TooFewShares: the answers that are in do not open what they should.
        SumTooLong: no honest updates have this sum.
        CodecError: an update cannot be read.
    """
    rebuilt = rebuild(
        masked.context, masked.roster, masked.advertisements, masked.shared, masked.survivors, masked.reveals
    )
    if rebuilt.suspects:
        names = [masked.roster[index].organization for index in rebuilt.suspects]
        log.warning("shares that do not fit were left out of an unmasking", organizations=names)
    with contextlib.ExitStack() as stack:
        sources = [stack.enter_context(TensorFile(path)) for path in updates]
        sink = stack.enter_context(TensorFileWriter(draft, sum_tensors(elements), durable=False))
        squares = unmask(sources, rebuilt.masks, elements, sink=sink, threads=threads, progress=progress)
    bound = sum_bound(spec, masked.plan, elements, masked.weight_shares)
    if squares > bound * bound:
        raise SumTooLong(
            f"the sum of the {len(updates)} updates is {squares**0.5 / bound:.3g} times as long as updates within "
            f"clip_norm {spec.update_bound:g} can make it, so at least one organization did not keep to that. Which it "
            "was is hidden: name in data.datasets whom you trust, and submit the job anew"
        )


@contextlib.asynccontextmanager
async def noting_progress(sessions: Sessions, round_id: UUID, masked: Masked) -> AsyncIterator[Callable[[float], None]]:
    """Write down about once a second how far an unmasking has come, while the block runs."""
    share = [0.0]

    def note(done: float) -> None:
        share[0] = done

    async def write() -> None:
        while True:
            await asyncio.sleep(NOTED_EVERY_S)
            async with sessions() as session:
                await session.execute(
                    update(SecuredAttempt)
                    .where(SecuredAttempt.round_id == round_id, SecuredAttempt.attempt == masked.attempt)
                    .values(progress=share[0])
                )

    task = asyncio.create_task(write())
    try:
        yield note
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
