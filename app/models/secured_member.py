"""One participation's part in the present attempt of a round under secure aggregation."""

from uuid import UUID

from sqlalchemy import BigInteger, ForeignKey
from sqlalchemy.orm import Mapped, mapped_column

from app.models.base import Base


class SecuredMember(Base):
    """A place in the roster, and the messages that came from it. Each is written once; all go with the attempt."""

    __tablename__ = "secured_members"

    round_id: Mapped[UUID] = mapped_column(ForeignKey("secured_attempts.round_id"), primary_key=True)
    index: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    task_id: Mapped[UUID] = mapped_column(ForeignKey("tasks.id"), unique=True)
    organization: Mapped[str]
    dataset: Mapped[str]
    identity: Mapped[bytes]  # the worker's public key, as it is in the roster
    weight: Mapped[int] = mapped_column(BigInteger)
    admitted_digest: Mapped[str | None]  # of the masked bytes; another attempt's are others
    keys: Mapped[bytes | None] = mapped_column(deferred=True)
    shares: Mapped[bytes | None] = mapped_column(deferred=True)
    signature: Mapped[bytes | None] = mapped_column(deferred=True)
    reveal: Mapped[bytes | None] = mapped_column(deferred=True)
