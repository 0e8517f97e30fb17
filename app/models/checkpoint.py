"""Models after rounds."""

from datetime import datetime
from uuid import UUID

from sqlalchemy import BigInteger, ForeignKey, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from app.models.base import Base, uuid7


class Checkpoint(Base):
    """The model after a round (0: the initial one), named by its digest, with the strategy's state beside it."""

    __tablename__ = "checkpoints"
    __table_args__ = (UniqueConstraint("job_id", "round_number"),)

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid7)
    job_id: Mapped[UUID] = mapped_column(ForeignKey("jobs.id"))
    round_number: Mapped[int]
    digest: Mapped[str] = mapped_column(index=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    state_digest: Mapped[str | None]
    created_at: Mapped[datetime]
