"""Blobs that must not be kept."""

from datetime import datetime

from sqlalchemy.orm import Mapped, mapped_column

from app.models.base import Base


class DiscardedBlob(Base):
    """To be deleted as soon as the transaction is committed that made it nobody's. A killed process forgets none."""

    __tablename__ = "discarded_blobs"

    key: Mapped[str] = mapped_column(primary_key=True)
    discarded_at: Mapped[datetime]
