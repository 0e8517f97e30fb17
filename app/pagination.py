"""Lists in pages: `?limit=&cursor=` answer `items` and `next_cursor`."""

import base64
import binascii
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar
from uuid import UUID

from fastapi import Depends, Query
from pydantic import TypeAdapter, ValidationError
from sqlalchemy import Select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute

from app.errors import CursorInvalid

Key = TypeVar("Key", UUID, int, str)


class Paging:
    """Which page is asked for."""

    def __init__(
        self,
        limit: Annotated[int, Query(ge=1, le=500, description="How many items at most.")] = 50,
        cursor: Annotated[
            str | None, Query(max_length=400, description="`next_cursor` of the page before; none for the first page.")
        ] = None,
    ) -> None:
        self.limit = limit
        self.cursor = cursor


Page = Annotated[Paging, Depends()]


def _encode(key: UUID | int | str) -> str:
    return base64.urlsafe_b64encode(str(key).encode()).decode().rstrip("=")


def _decode(cursor: str, kind: type[Key]) -> Key:
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode()
        key = TypeAdapter(kind).validate_python(text)
    except (binascii.Error, UnicodeDecodeError, ValidationError, ValueError) as error:
        raise CursorInvalid from error
    if (isinstance(key, int) and not 0 <= key < 2**31) or (isinstance(key, str) and "\0" in key):
        raise CursorInvalid  # well-formed, but nothing that the database could hold
    return key


def begins_after(paging: Paging, kind: type[Key]) -> Key | None:
    """The key of the last item before a page; None for the first page.

    Raises:
        CursorInvalid: the cursor is not one that this list gave out.
    """
    return None if paging.cursor is None else _decode(paging.cursor, kind)


async def paginate(
    session: AsyncSession,
    statement: Select[*tuple[Any, ...]],
    key: InstrumentedAttribute[Key],
    kind: type[Key],
    paging: Paging,
    *,
    newest_first: bool = False,
) -> tuple[Sequence[Any], str | None]:
    """One page of `statement`'s rows in the order of the unique column `key`, and the cursor of the next.

    Rows are returned as SQLAlchemy rows; `key` must be of the first entity selected.

    Raises:
        CursorInvalid: the cursor is not one that this list gave out.
    """
    if paging.cursor is not None:
        after = _decode(paging.cursor, kind)
        statement = statement.where(key < after if newest_first else key > after)
    ordered = statement.order_by(key.desc() if newest_first else key.asc()).limit(paging.limit + 1)
    rows = (await session.execute(ordered)).all()
    shown = rows[: paging.limit]
    if len(rows) <= paging.limit:
        return shown, None
    return shown, _encode(getattr(shown[-1][0], key.key))
