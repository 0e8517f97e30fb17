"""What tasks uploaded."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import BigInteger, ForeignKey
from sqlalchemy.orm import Mapped, mapped_column

from app.models.base import Base, uuid7


class Update(Base):
    """The task's one accepted body. `position` is its place in the frozen set; None outside of it."""

    __tablename__ = "updates"

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid7)
    task_id: Mapped[UUID] = mapped_column(ForeignKey("tasks.id"), unique=True)
    round_id: Mapped[UUID] = mapped_column(ForeignKey("rounds.id"), index=True)
    participation_id: Mapped[UUID] = mapped_column(ForeignKey("participations.id"), index=True)
    blob_key: Mapped[str | None]  # None: deleted when its round ended, as central noise and masks ask for
    digest: Mapped[str]
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    weight: Mapped[float]
    l2_norm: Mapped[float | None]  # None: masked, so nobody knows
    released: Mapped[dict[str, Any]]  # metrics/... and statistics/... by name, as float64 numbers
    position: Mapped[int | None]
    excluded: Mapped[bool] = mapped_column(default=False)  # the grant was withdrawn before the freeze
    received_at: Mapped[datetime]
    signature: Mapped[str]
