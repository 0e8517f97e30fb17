"""The present attempt of a round under secure aggregation."""

from datetime import datetime
from uuid import UUID

from sqlalchemy import CheckConstraint, ForeignKey, Index, Integer, String
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Mapped, mapped_column

from app.models.base import Base
from isthmus.wire.secured import Step


class SecuredAttempt(Base):
    """Who was asked, which step is open, and who has got how far. Changed under the lock of the round alone.

    A new attempt replaces it; with the round's end it goes. Lists of members hold their indices, ascending; None until
    the step that gives them has closed. What outlives an attempt has names: organization/dataset.
    """

    __tablename__ = "secured_attempts"
    __table_args__ = (
        CheckConstraint("threshold <= needed AND needed <= members", name="enough_can_stay"),
        Index("ix_secured_attempts_step_closes_at", "step_closes_at"),
    )

    round_id: Mapped[UUID] = mapped_column(ForeignKey("rounds.id"), primary_key=True)
    attempt: Mapped[int]
    step: Mapped[Step]
    roster: Mapped[bytes] = mapped_column(deferred=True)  # as `isthmus.secagg.roster` writes it
    roster_digest: Mapped[str]
    context: Mapped[bytes]
    members: Mapped[int]
    threshold: Mapped[int]
    needed: Mapped[int]  # the threshold, or the job's minimum where that is more
    target: Mapped[int]  # with so many the set is frozen at once
    step_closes_at: Mapped[datetime | None]  # None: the round's own deadline decides
    keyed: Mapped[list[int] | None] = mapped_column(ARRAY(Integer))
    shared: Mapped[list[int] | None] = mapped_column(ARRAY(Integer))
    survivors: Mapped[list[int] | None] = mapped_column(ARRAY(Integer))
    signed: Mapped[list[int] | None] = mapped_column(ARRAY(Integer))  # whose signatures opened unmasking
    answers_needed: Mapped[int]  # to unmask; two more every time that those which are in do not fit together
    answers_tried: Mapped[int | None]  # so many did not fit together
    suspects: Mapped[list[str] | None] = mapped_column(ARRAY(String))  # of wrong shares, in any attempt of the round
    bound_to: Mapped[list[str] | None] = mapped_column(ARRAY(String))  # shares were told before, for the sum of these
    progress: Mapped[float | None]  # share of the sum that is unmasked
