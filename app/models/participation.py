"""One dataset's part in one job."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import JSON, BigInteger, CheckConstraint, ForeignKey, Index, UniqueConstraint, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Mapped, mapped_column

from app.models.base import Base, uuid7
from isthmus.wire.jobs import ParticipationState


class Participation(Base):
    """Asked for when a job starts, decided by the dataset's steward or policy; approved while its grant holds.

    What is reserved for it and not spent yet moves with the entries of its dataset's ledger, by their trigger.
    """

    __tablename__ = "participations"
    __table_args__ = (
        UniqueConstraint("job_id", "dataset_id"),
        Index("ix_participations_reserving", "id", postgresql_where=text("reserved_nano IS NOT NULL")),
        CheckConstraint("isthmus_not_negative(reserved_nano, reserved_draws)", name="within_reservation"),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid7)
    job_id: Mapped[UUID] = mapped_column(ForeignKey("jobs.id"))
    dataset_id: Mapped[UUID] = mapped_column(ForeignKey("datasets.id"), index=True)
    state: Mapped[ParticipationState] = mapped_column(default=ParticipationState.PENDING)
    detail: Mapped[str | None]
    declared_rows: Mapped[int] = mapped_column(BigInteger)
    plan: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))  # None: the job claims no privacy
    reserved_nano: Mapped[list[int] | None] = mapped_column(ARRAY(BigInteger), deferred=True)  # None: nothing
    reserved_draws: Mapped[int] = mapped_column(BigInteger, default=0)
    created_at: Mapped[datetime]
