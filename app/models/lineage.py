"""Which ledger a lineage of data draws on."""

from uuid import UUID

from sqlalchemy import ForeignKey
from sqlalchemy.orm import Mapped, mapped_column

from app.models.base import Base


class Lineage(Base):
    """A number that a worker of the organization gave to data, and the one ledger that these data draw on.

    Several lineages draw on one ledger where a worker that knows nothing of the one before serves the same dataset.
    """

    __tablename__ = "lineages"

    organization_id: Mapped[UUID] = mapped_column(ForeignKey("organizations.id"), primary_key=True)
    lineage: Mapped[str] = mapped_column(primary_key=True)
    ledger_id: Mapped[UUID] = mapped_column(ForeignKey("ledgers.id"), index=True)
