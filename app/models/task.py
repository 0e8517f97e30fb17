"""One participation's part in a round."""

from datetime import datetime
from uuid import UUID

from sqlalchemy import ForeignKey, Index, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from app.models.base import Base, uuid7
from isthmus.wire.rounds import TaskKind, TaskState


class Task(Base):
    """Offered to the worker that serves the dataset, held under a lease with a fence that grows with every offer."""

    __tablename__ = "tasks"
    __table_args__ = (
        UniqueConstraint("round_id", "participation_id"),
        Index("ix_tasks_to_claim", "worker_id", "offered_at", postgresql_where=text("state IN ('offered', 'claimed')")),
        Index("ix_tasks_leased", "lease_expires_at", postgresql_where=text("state IN ('claimed', 'uploading')")),
        Index("ix_tasks_unfinished", "round_id", postgresql_where=text("state IN ('offered', 'claimed', 'uploading')")),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid7)
    job_id: Mapped[UUID] = mapped_column(ForeignKey("jobs.id"))
    round_id: Mapped[UUID] = mapped_column(ForeignKey("rounds.id"))
    participation_id: Mapped[UUID] = mapped_column(ForeignKey("participations.id"), index=True)
    worker_id: Mapped[UUID] = mapped_column(ForeignKey("workers.id"))
    kind: Mapped[TaskKind]
    state: Mapped[TaskState] = mapped_column(default=TaskState.OFFERED)
    fence: Mapped[int] = mapped_column(default=1)
    attempt: Mapped[int] = mapped_column(default=1)
    detail: Mapped[str | None]
    admitted_digest: Mapped[str | None]  # what the ledger was charged for in this round, for ever
    offered_at: Mapped[datetime]
    lease_expires_at: Mapped[datetime | None]
    progress_until: Mapped[datetime | None]  # an upload brought bytes a short while ago; a heartbeat is none
