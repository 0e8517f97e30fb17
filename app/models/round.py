"""Passes of a job."""

from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import CheckConstraint, ForeignKey, Index, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from app.models.base import Base, uuid7
from isthmus.wire.rounds import RoundPhase, TaskKind

_OPEN: Final = "phase IN ('collecting', 'survivors', 'unmasking', 'aggregating')"  # OPEN_PHASES


class Round(Base):
    """One pass of a job: updates arrive until the target or the deadline, then one aggregate is published."""

    __tablename__ = "rounds"
    __table_args__ = (
        UniqueConstraint("job_id", "number"),
        Index(
            "uq_rounds_one_open_a_job",
            "job_id",
            unique=True,
            postgresql_where=text(_OPEN),
        ),
        Index("ix_rounds_open", "phase", "closes_at", postgresql_where=text(_OPEN)),
        CheckConstraint("min_updates >= 0", name="min_updates_not_negative"),
        CheckConstraint("kind <> 'train' OR min_updates >= 2", name="min_updates_of_two"),
        CheckConstraint("accepted >= 0 AND accepted <= cohort_size", name="accepted_within_cohort"),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid7)
    job_id: Mapped[UUID] = mapped_column(ForeignKey("jobs.id"))
    number: Mapped[int]
    kind: Mapped[TaskKind]
    phase: Mapped[RoundPhase] = mapped_column(default=RoundPhase.COLLECTING)
    attempt: Mapped[int] = mapped_column(default=1)
    attempts: Mapped[int]
    cohort_seed: Mapped[str]
    cohort_size: Mapped[int]
    target_updates: Mapped[int]
    min_updates: Mapped[int]
    accepted: Mapped[int] = mapped_column(default=0)  # the serialisation point, under the row's lock
    model_digest: Mapped[str]
    result_digest: Mapped[str | None]
    metrics: Mapped[dict[str, Any]] = mapped_column(default=dict)
    detail: Mapped[str | None]
    opened_at: Mapped[datetime]
    closes_at: Mapped[datetime]
    grace_s: Mapped[float]
    frozen_at: Mapped[datetime | None]
    deferred_at: Mapped[datetime | None]  # when its aggregation was last asked for
    completed_at: Mapped[datetime | None]
    noise_key: Mapped[bytes | None] = mapped_column(deferred=True)  # of central noise, while the round aggregates
