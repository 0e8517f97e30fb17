"""One dataset's part in one job."""

from datetime import datetime
from uuid import UUID

from sqlalchemy import BigInteger, ForeignKey, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from app.models.base import Base, uuid7
from isthmus.wire.jobs import ParticipationState


class Participation(Base):
    """Asked for when a job starts, decided by the dataset's steward or policy; approved while its grant holds."""

    __tablename__ = "participations"
    __table_args__ = (UniqueConstraint("job_id", "dataset_id"),)

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid7)
    job_id: Mapped[UUID] = mapped_column(ForeignKey("jobs.id"))
    dataset_id: Mapped[UUID] = mapped_column(ForeignKey("datasets.id"), index=True)
    state: Mapped[ParticipationState] = mapped_column(default=ParticipationState.PENDING)
    detail: Mapped[str | None]
    declared_rows: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime]
