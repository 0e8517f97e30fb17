"""Metadata of data that workers can read."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, String, UniqueConstraint
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Mapped, mapped_column

from app.models.base import Base, uuid7
from isthmus.wire.datasets import DatasetState


class Dataset(Base):
    """Schema, rows and use policy; never rows of data. One worker serves it at a time."""

    __tablename__ = "datasets"
    __table_args__ = (
        UniqueConstraint("organization_id", "name"),
        CheckConstraint("rows > 0", name="rows_above_zero"),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid7)
    organization_id: Mapped[UUID] = mapped_column(ForeignKey("organizations.id"))
    name: Mapped[str]
    worker_id: Mapped[UUID] = mapped_column(ForeignKey("workers.id"), index=True)
    state: Mapped[DatasetState] = mapped_column(default=DatasetState.ANNOUNCED)
    data_schema: Mapped[dict[str, Any]]
    rows: Mapped[int] = mapped_column(BigInteger)
    task_kinds: Mapped[list[str]] = mapped_column(ARRAY(String))
    description: Mapped[str]
    policy: Mapped[dict[str, Any]]  # in force: the announced one, as the steward has tightened it
    policy_set_by: Mapped[UUID | None] = mapped_column(ForeignKey("principals.id"))
    announced_policy: Mapped[dict[str, Any]]
    policy_signature: Mapped[
        str
    ]  # the worker's, over policy, lineage and time; empty: announced before they were signed
    signed_at: Mapped[datetime]
    lineage: Mapped[str]
    ledger_id: Mapped[UUID] = mapped_column(ForeignKey("ledgers.id"), index=True)
    announced_at: Mapped[datetime]
    confirmed_at: Mapped[datetime | None]
