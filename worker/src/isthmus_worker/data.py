"""Where records come from. A source describes its columns and reads them; nothing here looks at a job.

Organizations bring a source of their own as a function that returns a `DataSource`, installed beside the worker and
listed in `allowed_sources`. Everything in this file runs in the child process: the agent's own never opens the data.
"""

import csv
import hashlib
import importlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias, cast

from pydantic import ValidationError

from isthmus.wire.data import ColumnKind, ColumnSchema, DatasetSchema
from isthmus_worker.refusals import DataRefused, SchemaRefused
from isthmus_worker.settings import CsvSettings, NpzSettings, SourceSettings

if TYPE_CHECKING:  # a worker that only serves CSV files describes them without NumPy
    import numpy as np
    from numpy.typing import NDArray

Cell: TypeAlias = str | float | int | bool | None
"""One value of a record; None where it is missing."""

Column: TypeAlias = "Sequence[Cell] | NDArray[Any]"
"""The values of a column: cells, or an array [records, ...] of numbers or words, where NaN in a vector is missing."""

FINGERPRINT_BYTES: Final = 16


@dataclass(frozen=True)
class Table:
    """Records by column. All columns and the fingerprints have the same length."""

    columns: Mapping[str, Column]
    fingerprints: Sequence[bytes]
    """One for each record, over *all* its cells, also those of columns that were not asked for: see `fingerprint`."""

    @property
    def rows(self) -> int:
        """Number of records."""
        return len(self.fingerprints)

    def only(self, rows: "NDArray[np.integer[Any]]") -> "Table":
        """These records, in this order.

        Args:
            rows: places of records, from 0; a record that is named twice is there twice.

        Raises:
            IndexError: there is no such record.
        """
        places = rows.tolist()
        return Table(
            columns={name: _cells_at(column, rows, places) for name, column in self.columns.items()},
            fingerprints=[self.fingerprints[place] for place in places],
        )


class DataSource(Protocol):
    """Where a dataset's records come from."""

    def schema(self) -> DatasetSchema:
        """The columns, with their kinds and whether values are missing. This is announced to the service."""
        ...

    def rows(self) -> int:
        """Number of records. This is announced to the service."""
        ...

    def load(self, columns: Sequence[str]) -> Table:
        """All records, with these columns only.

        Raises:
            DataRefused: a column is missing, or the records cannot be read.
        """
        ...

    def stamp(self) -> str | None:
        """A text that changes whenever the records do, so that they may be kept between tasks; None: never kept."""
        ...


def fingerprint(cells: Iterable[Cell]) -> bytes:
    """What stands for a record when rows are held out: 16 bytes over all its cells, in one fixed order of columns.

    Equal records have equal fingerprints. They never leave the worker.
    """
    digest = hashlib.blake2b(digest_size=FINGERPRINT_BYTES)
    for cell in cells:
        plain = b"" if cell is None else str(cell).encode()
        digest.update(len(plain).to_bytes(8, "big") if cell is not None else b"\xff" * 8)
        digest.update(plain)
    return digest.digest()


def parse_number(cell: Cell) -> float | None:
    """The finite number that a cell holds, or None if it holds none."""
    if cell is None or (isinstance(cell, str) and "_" in cell):
        return None
    try:
        value = float(cell)
    except (ValueError, TypeError):  # TypeError: a source of an organization's own gave what is no cell
        return None
    return value if math.isfinite(value) else None


def open_source(settings: SourceSettings) -> DataSource:
    """The source that the configuration names. Entry points were checked against `allowed_sources` when it was read."""
    if isinstance(settings, CsvSettings):
        return CsvSource(settings)
    if isinstance(settings, NpzSettings):
        from isthmus_worker.npz import NpzSource  # noqa: PLC0415 - NumPy is loaded only where arrays are read

        return NpzSource(settings)
    module, _, name = settings.function.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise DataRefused("The dataset's source is not installed.", where=settings.function) from error
    return cast(DataSource, function(**settings.options))


def _cells_at(column: Column, rows: "NDArray[np.integer[Any]]", places: list[int]) -> Column:
    if hasattr(column, "dtype"):
        return cast("NDArray[Any]", cast("NDArray[Any]", column)[rows])
    return [column[place] for place in places]


class _Reader(Protocol):
    """What `csv.reader` gives."""

    @property
    def line_num(self) -> int: ...
    def __iter__(self) -> Iterator[list[str]]: ...


@dataclass
class _Found:
    """What one pass over a file tells of a column."""

    number: bool = True
    missing: bool = False


@dataclass
class CsvSource:
    """Records in a CSV file, read as a stream.

    The header line must name every column once, and must not look like a record: a file without a header would
    otherwise announce its first record to the service. A column is of numbers if every value in it is a finite one.
    """

    settings: CsvSettings
    _described: tuple[str, DatasetSchema, int] | None = field(default=None, repr=False)

    def schema(self) -> DatasetSchema:
        """The columns in the order of the file."""
        return self._describe()[0]

    def rows(self) -> int:
        """Number of records; blank lines are none."""
        return self._describe()[1]

    def stamp(self) -> str:
        """Size and time of change of the file."""
        return stamp_of(self.settings.path)

    def load(self, columns: Sequence[str]) -> Table:
        """These columns of all records, as texts without surrounding blanks; None where a value is missing."""
        loaded: dict[str, list[Cell]] = {name: [] for name in columns}
        fingerprints: list[bytes] = []
        with self._reading() as (header, records):
            for name in columns:
                if name not in header:
                    raise SchemaRefused(f"The dataset has no column {name!r}.", where=str(self.settings.path))
            places = [(header.index(name), loaded[name]) for name in loaded]
            by_name = sorted(range(len(header)), key=header.__getitem__)
            for record in records:
                for place, values in places:
                    values.append(record[place])
                fingerprints.append(fingerprint(record[place] for place in by_name))
        return Table(columns=loaded, fingerprints=fingerprints)

    def _describe(self) -> tuple[DatasetSchema, int]:
        stamp = self.stamp()
        if self._described is not None and self._described[0] == stamp:
            return self._described[1:]
        rows = 0
        with self._reading() as (header, records):
            found = [_Found() for _ in header]
            for record in records:
                rows += 1
                for column, cell in zip(found, record, strict=True):
                    if cell is None:
                        column.missing = True
                    elif column.number and parse_number(cell) is None:
                        column.number = False
        if rows == 0:
            raise DataRefused("The dataset has no records.", where=str(self.settings.path))
        try:
            schema = DatasetSchema(
                columns=tuple(
                    ColumnSchema(
                        name=name,
                        kind=ColumnKind.NUMBER if column.number else ColumnKind.CATEGORY,
                        missing=column.missing,
                    )
                    for name, column in zip(header, found, strict=True)
                )
            )
        except ValidationError as error:
            raise DataRefused(
                "The dataset's header cannot be announced: too many columns, or names too long."
            ) from error
        self._described = (stamp, schema, rows)
        return schema, rows

    @contextmanager
    def _reading(self) -> Iterator[tuple[list[str], Iterator[list[str | None]]]]:
        path = self.settings.path
        with readable(path), path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=self.settings.delimiter, strict=True)
            try:
                header = self._header(next(reader, []))
                yield header, self._records(reader, len(header))
            except csv.Error as error:
                raise DataRefused(
                    "The dataset's file is not well-formed CSV.", where=f"{path}:{reader.line_num}"
                ) from error
            except UnicodeDecodeError as error:
                raise DataRefused(
                    "The dataset's file is not UTF-8.", where=f"{path}, after line {reader.line_num}"
                ) from error

    def _header(self, cells: list[str]) -> list[str]:
        header, where = [cell.strip() for cell in cells], f"{self.settings.path}:1"
        if not any(header):
            raise DataRefused("The dataset's file has no header line.", where=where)
        if "" in header:
            raise DataRefused(f"Column {header.index('') + 1} of the dataset's header has no name.", where=where)
        if any(parse_number(name) is not None for name in header):
            raise DataRefused(
                "The dataset's first line holds numbers: it looks like a record, not like a header.", where=where
            )
        if len(set(header)) != len(header):
            raise DataRefused("The dataset's header names a column twice.", where=where)
        if not all(name.isprintable() for name in header):
            raise DataRefused("The dataset's header holds characters that cannot be printed.", where=where)
        return header

    def _records(self, reader: "_Reader", width: int) -> Iterator[list[str | None]]:
        missing = {"", *self.settings.missing}
        uneven, first_uneven = 0, 0
        for cells in reader:
            if not cells:
                continue
            if len(cells) != width:
                first_uneven = first_uneven or reader.line_num
                uneven += 1
                continue
            stripped = [cell.strip() for cell in cells]
            yield [None if cell in missing else cell for cell in stripped]
        if uneven:
            raise DataRefused(
                "Some records of the dataset have more or fewer values than its header.",
                records=uneven,
                where=f"{self.settings.path}:{first_uneven} is the first; the delimiter is {self.settings.delimiter!r}",
            )


def stamp_of(path: Path) -> str:
    """Size and time of change of a file.

    Raises:
        DataRefused: it cannot be read.
    """
    with readable(path):
        status = path.stat()
    return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what the system says of a file that cannot be read into a refusal; the path stays in the log."""
    try:
        yield
    except OSError as error:
        raise DataRefused("The dataset's file cannot be read.", where=f"{path}: {error.strerror}") from error
