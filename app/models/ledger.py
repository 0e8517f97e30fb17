"""What all jobs together may learn of a dataset's records, and what they have."""

from uuid import UUID

from sqlalchemy import BigInteger, CheckConstraint, Double, ForeignKey, UniqueConstraint
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Mapped, mapped_column

from app.models.base import Base, uuid7
from isthmus.privacy.rdp import ORDERS, ORDERS_VERSION
from isthmus.wire.events import GENESIS


def nothing() -> list[int]:
    """The sum of no costs: a zero at every order."""
    return [0] * len(ORDERS)


class Ledger(Base):
    """The budget of one organization's data, under whatever names and lineages it is announced.

    `lineage` is that of its first dataset and stands in all its entries. Sums and head change only with an entry, as a
    trigger sees; Postgres itself refuses an entry after which no order would keep the budget. Costs are Rényi
    divergences in billionths at the orders of `orders_version`.
    """

    __tablename__ = "ledgers"
    __table_args__ = (
        UniqueConstraint("organization_id", "lineage"),
        CheckConstraint(
            "closed OR isthmus_within_budget("
            "limit_nano, limit_draws, reserved_nano, reserved_draws, spent_nano, spent_draws)",
            name="within_budget",
        ),
        CheckConstraint(
            "isthmus_not_negative(reserved_nano, reserved_draws) AND isthmus_not_negative(spent_nano, spent_draws)",
            name="sums_not_negative",
        ),
        CheckConstraint("(epsilon IS NULL) = (limit_nano IS NULL)", name="budget_whole"),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid7)
    organization_id: Mapped[UUID] = mapped_column(ForeignKey("organizations.id"))
    lineage: Mapped[str]
    epsilon: Mapped[float | None]  # None: no budget was ever set, and nothing that costs is reserved or spent
    delta: Mapped[float | None]
    orders_version: Mapped[str] = mapped_column(default=ORDERS_VERSION)
    limit_nano: Mapped[list[int] | None] = mapped_column(ARRAY(BigInteger))
    limit_draws: Mapped[int | None] = mapped_column(BigInteger)  # -1: the budget was taken away, and nothing fits
    conversion: Mapped[list[float] | None] = mapped_column(ARRAY(Double))  # epsilon less the divergence, at each order
    reserved_nano: Mapped[list[int]] = mapped_column(ARRAY(BigInteger), default=nothing)  # promised and not spent
    reserved_draws: Mapped[int] = mapped_column(BigInteger, default=0)
    spent_nano: Mapped[list[int]] = mapped_column(ARRAY(BigInteger), default=nothing)
    spent_draws: Mapped[int] = mapped_column(BigInteger, default=0)
    unaccounted_releases: Mapped[int] = mapped_column(BigInteger, default=0)  # of jobs that claim no privacy
    head_sequence: Mapped[int] = mapped_column(default=0)
    head_hash: Mapped[str] = mapped_column(default=GENESIS)
    closed: Mapped[bool] = mapped_column(default=False)  # the budget was lowered below what was promised
