"""Cells, tables and lists of fields. Every word of a user passes `printable`: no markup, no escape sequences."""

from collections.abc import Iterable, Sequence
from datetime import datetime

from rich import box
from rich.table import Table
from rich.text import Text

Cell = str | int | float | datetime | bool | Text | None


def printable(text: str) -> str:
    """`text` with whatever could move the cursor or colour the terminal made visible; line breaks stay."""
    return "".join(char if char.isprintable() or char in "\n\t" else f"\\x{ord(char):02x}" for char in text)


def cell(value: Cell) -> Text:
    """One value as text that is shown as it is."""
    match value:
        case Text():
            return value
        case None:
            return Text("-", style="dim")
        case bool():
            return Text("yes" if value else "no")
        case datetime():
            return Text(moment(value))
        case float():
            return Text(number(value))
    return Text(printable(str(value)))


def moment(at: datetime) -> str:
    """A time to the second, in UTC."""
    return f"{at:%Y-%m-%d %H:%M:%S}Z"


def ago(then: datetime, now: datetime) -> str:
    """How long ago, roughly."""
    return f"{span((now - then).total_seconds())} ago"


def span(seconds: float) -> str:
    """A span of time, roughly; nothing below zero."""
    seconds = max(0.0, seconds)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def number(value: float) -> str:
    """A figure to four places."""
    return f"{value:.4g}" if abs(value) < 1e-3 or abs(value) >= 1e6 else f"{value:.4f}".rstrip("0").rstrip(".")


def table(columns: Sequence[str], rows: Iterable[Sequence[Cell]], title: str | None = None) -> Table:
    """A plain table."""
    made = Table(*columns, box=box.SIMPLE_HEAD, title=title, title_justify="left", header_style="bold")
    for column in made.columns:
        column.overflow = "fold"
    for row in rows:
        made.add_row(*map(cell, row))
    return made


def fields(pairs: Iterable[tuple[str, Cell]]) -> Table:
    """Names and values, one below the other."""
    made = Table.grid(padding=(0, 2))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in pairs:
        made.add_row(Text(name), cell(value))
    return made
