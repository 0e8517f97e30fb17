"""Where the attempts of secured rounds stand, as people see them: who is in, who is missing, who has left."""

from collections import defaultdict
from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.models import SecuredAttempt
from app.rounds.secured.queries import Place, list_places, stage_of
from isthmus.wire.secured import SecuredRound, Step


async def list_secured(
    session: AsyncSession, round_ids: Sequence[UUID], organization: str | None = None
) -> dict[UUID, SecuredRound]:
    """The secured ones of some rounds that are open, by round.

    Args:
        round_ids: any rounds.
        organization: of others no names are told, if one is given.
    """
    attempts = (await session.scalars(select(SecuredAttempt).where(SecuredAttempt.round_id.in_(round_ids)))).all()
    views = {}
    for attempt in attempts:  # one, as a job has one open round
        places = await list_places(session, attempt.round_id, attempt.step)
        views[attempt.round_id] = _view(attempt, places, organization)
    return views


def _view(attempt: SecuredAttempt, places: Sequence[Place], organization: str | None) -> SecuredRound:
    stage = set(stage_of(attempt))
    collecting = attempt.step in (Step.KEYS, Step.SHARES, Step.UPDATE)
    groups: dict[str, list[str]] = defaultdict(list)
    for place in places:
        # Before the freeze only an open task can bring more; afterwards, whoever is in the sum is asked to the end.
        left = place.index not in stage or (collecting and not place.open and not (place.sent and _kept(attempt)))
        group = "dropped" if left else "arrived" if place.sent else "missing"
        groups[group].append(place.name if organization in (None, place.organization) else "")
    return SecuredRound(
        step=attempt.step,
        attempt=attempt.attempt,
        members=attempt.members,
        threshold=attempt.threshold,
        needed=attempt.needed,
        arrived=len(groups["arrived"]),
        missing=[name for name in groups["missing"] if name],
        dropped=[name for name in groups["dropped"] if name],
        step_closes_at=attempt.step_closes_at,
        progress=attempt.progress,
    )


def _kept(attempt: SecuredAttempt) -> bool:
    """Whether what is in stays in when its task is over: an update does, keys and shares alone do not."""
    return attempt.step is Step.UPDATE
