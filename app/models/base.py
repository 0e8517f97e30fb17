"""What all tables share: ids made by us, times in UTC, enumerations as text, constraints with stable names."""

import enum
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import JSON, DateTime, Dialect, Enum, Interval, MetaData, TypeDecorator
from sqlalchemy.orm import DeclarativeBase
from sqlalchemy.sql.operators import OperatorType
from sqlalchemy.types import TypeEngine
from uuid_utils import compat


def uuid7() -> UUID:
    """A new id: a UUIDv7, so that ids grow with time."""
    return compat.uuid7()


class UtcDateTime(TypeDecorator[datetime]):
    """An aware time, always handed out in UTC whatever the session's time zone is."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is not None and value.tzinfo is None:
            raise ValueError("a time without a zone was given to the database")
        return value

    def coerce_compared_value(self, op: OperatorType | None, value: Any) -> TypeEngine[Any]:
        """A time plus or minus a timedelta: the timedelta is an interval, not a time."""
        return Interval() if isinstance(value, timedelta) else self

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)


def _values(members: type[enum.Enum]) -> list[str]:
    return [str(member.value) for member in members]


_enum_values: Callable[[Any], list[str]] = _values


class Base(DeclarativeBase):
    """The only description of the schema; migrations are compared with it in a test."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 -- read once by SQLAlchemy, never changed
        datetime: UtcDateTime,
        dict[str, Any]: JSON,  # not JSONB, which rewrites numbers (1e16, -0.0): what is hashed must come back as it was
        enum.StrEnum: Enum(enum.StrEnum, native_enum=False, length=40, values_callable=_enum_values),
    }
