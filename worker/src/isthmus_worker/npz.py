"""Records in a NumPy archive: arrays with one entry a record along their first side, checked before they are unpacked.

A file is looked at from outside first: what its headers and its directory say must agree and fit `max_mb`, and nothing
in it may be a pickle, which would run code. Only then is a byte unpacked.
"""

import hashlib
import io
import lzma
import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from isthmus.wire.data import ColumnKind, ColumnSchema, DatasetSchema
from isthmus_worker.data import FINGERPRINT_BYTES, Table, readable, stamp_of
from isthmus_worker.refusals import DataRefused, SchemaRefused
from isthmus_worker.settings import NpzSettings

_MB: Final = 1 << 20
_UNREADABLE: Final = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,  # a compression that is not built in
    RuntimeError,  # it is encrypted
    ValueError,
)
_SUFFIX: Final = ".npy"
_NUMBERS: Final = "biuf"
_WORDS: Final = "U"
_LONGEST: Final = 8
"""Bytes of the widest number that is read; what is wider does not fit float64."""
_ROWS_AT_ONCE: Final = 4096
_HEADER_BYTES: Final = 1 << 14
"""More than any header that NumPy reads; a header that says it is longer is not unpacked."""


@dataclass(frozen=True)
class _Member:
    """One array of an archive, as its header and the archive's directory tell of it."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass
class NpzSource:
    """Records in an `.npz` file.

    A vector of numbers is a number column, a vector of words a category column, and an array of more sides a column
    of kind `tensor`. Nothing may be missing: NaN and infinities are refused.
    """

    settings: NpzSettings
    _described: tuple[str, DatasetSchema, int] | None = field(default=None, repr=False)

    def schema(self) -> DatasetSchema:
        """The columns, in the order of their names."""
        return self._describe()[0]

    def rows(self) -> int:
        """Number of records."""
        return self._describe()[1]

    def stamp(self) -> str:
        """Size and time of change of the file."""
        return stamp_of(self.settings.path)

    def load(self, columns: Sequence[str]) -> Table:
        """These columns of all records, as arrays. All arrays are read once, for the fingerprints.

        Numbers and words keep the type they have on disk: images of bytes are not blown up here.
        """
        with self._reading() as archive:
            members = self._members(archive)
            for name in columns:
                if name not in members:
                    raise SchemaRefused(f"The dataset has no column {name!r}.", where=str(self.settings.path))
            arrays = {name: self._array(archive, members[name]) for name in sorted(members)}
        return Table(columns={name: arrays[name] for name in columns}, fingerprints=fingerprints_of(arrays))

    def _describe(self) -> tuple[DatasetSchema, int]:
        stamp = self.stamp()
        if self._described is not None and self._described[0] == stamp:
            return self._described[1:]
        with self._reading() as archive:
            members = self._members(archive)
            for member in members.values():
                if member.dtype.kind == "f":  # only these can hold what is refused: found out before it is announced
                    self._array(archive, member)
        try:
            schema = DatasetSchema(columns=tuple(_column_schema(members[name]) for name in sorted(members)))
        except ValidationError as error:
            raise DataRefused(
                "The dataset's arrays cannot be announced: too many of them, or a name or a shape is too large."
            ) from error
        rows = next(iter(members.values())).shape[0]
        self._described = (stamp, schema, rows)
        return schema, rows

    @contextmanager
    def _reading(self) -> Iterator[zipfile.ZipFile]:
        path = self.settings.path
        try:
            with readable(path), zipfile.ZipFile(path) as archive:
                yield archive
        except _UNREADABLE as error:
            raise DataRefused("The dataset's file is not a readable .npz archive.", where=str(path)) from error

    def _members(self, archive: zipfile.ZipFile) -> Mapping[str, _Member]:
        """The arrays of the archive, known from their headers; nothing is unpacked but these.

        Raises:
            DataRefused: an array is of a kind that is not read, sizes do not agree, or all together are too large.
        """
        where = str(self.settings.path)
        found: dict[str, _Member] = {}
        for info in archive.infolist():
            name = info.filename.removesuffix(_SUFFIX)
            if name == info.filename or name in found or not name.isprintable():
                raise DataRefused(
                    "The dataset's archive holds something that is no array, or two arrays of one name.", where=where
                )
            with archive.open(info) as file:
                shape, dtype, begins = _header(file.read(_HEADER_BYTES))
                member = _Member(name=name, shape=shape, dtype=dtype)
            _require_readable(member, where)
            if begins + member.size_bytes != info.file_size:
                raise DataRefused(f"Array {name!r} of the dataset is longer or shorter than it says.", where=where)
            found[name] = member
        if not found:
            raise DataRefused("The dataset's archive holds no arrays.", where=where)
        if len({member.shape[0] for member in found.values()}) > 1:
            raise DataRefused(
                "The dataset's arrays differ in their first side: it is the number of records, the same for all.",
                where=where,
            )
        if next(iter(found.values())).shape[0] == 0:
            raise DataRefused("The dataset has no records.", where=where)
        if sum(member.size_bytes for member in found.values()) > self.settings.max_mb * _MB:
            raise DataRefused("The dataset's arrays take more memory than its max_mb allows.", where=where)
        return found

    def _array(self, archive: zipfile.ZipFile, member: _Member) -> NDArray[Any]:
        with archive.open(member.name + _SUFFIX) as file:
            # Up to its last byte, where zipfile compares the checksum.
            array: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
        if array.shape != member.shape or array.dtype != member.dtype:
            raise DataRefused(f"Array {member.name!r} of the dataset changed while it was read.")
        if array.dtype.kind == "f" and not _all_finite(array):
            raise DataRefused(
                f"Array {member.name!r} of the dataset holds NaN or an infinity: nothing may be missing in it.",
                where=str(self.settings.path),
            )
        return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))


def fingerprints_of(arrays: Mapping[str, NDArray[Any]]) -> list[bytes]:
    """What stands for each record when rows are held out: 16 bytes over its entries in all `arrays`.

    Args:
        arrays: name -> array [records, ...] of numbers or words; at least one.

    Guarantees:
        Equal records have equal fingerprints, whatever else the arrays hold and in whatever order they are given: a
        vector of numbers counts as float64 and a word by its letters, since the type on disk depends on other records.
        0.0 and -0.0 are equal. An array of more sides counts in the type that it has.
    """
    names = sorted(arrays)
    rows = len(arrays[names[0]])
    found: list[bytes] = []
    for start in range(0, rows, _ROWS_AT_ONCE):
        parts = [_entries(arrays[name][start : start + _ROWS_AT_ONCE]) for name in names]
        for entries in zip(*parts, strict=True):
            digest = hashlib.blake2b(digest_size=FINGERPRINT_BYTES)
            for entry in entries:
                digest.update(len(entry).to_bytes(8, "big"))
                digest.update(entry)
            found.append(digest.digest())
    return found


def _entries(block: NDArray[Any]) -> list[bytes]:
    """One byte string a record."""
    if block.dtype.kind == _WORDS:
        return [word.encode("utf-8", "surrogatepass") for word in block.tolist()]  # NumPy stores any code point
    if block.ndim == 1:
        block = block.astype(np.float64)
    if block.dtype.kind == "f":
        block = block + 0.0  # -0.0 becomes 0.0
    flat = np.ascontiguousarray(block).reshape(len(block), -1)
    size = flat.shape[1] * flat.itemsize
    plain = flat.tobytes()
    return [plain[place : place + size] for place in range(0, len(plain), size)]


def _header(begins_with: bytes) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Shape, type, and the place where the data begins.

    Raises:
        ValueError: there is no header that is read here.
    """
    file = io.BytesIO(begins_with)
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, _fortran, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, _fortran, dtype = np.lib.format.read_array_header_2_0(file)
        else:
            raise ValueError("an unknown version of the format")
    except MemoryError:
        raise
    except Exception as error:  # a header is parsed as Python's literals: a bad one can raise about anything
        raise ValueError("no header of an array") from error
    return tuple(int(side) for side in shape), dtype, file.tell()


def _require_readable(member: _Member, where: str) -> None:
    kind = member.dtype.kind
    if member.dtype.hasobject:
        raise DataRefused(
            f"Array {member.name!r} of the dataset holds pickled objects, which are never read: save it as numbers or "
            "as text.",
            where=where,
        )
    if not (kind in _NUMBERS and member.dtype.itemsize <= _LONGEST) and not (kind == _WORDS and len(member.shape) == 1):
        raise DataRefused(
            f"Array {member.name!r} of the dataset holds neither numbers (of at most 64 bits) nor, as a vector, words.",
            where=where,
        )
    if not member.shape:
        raise DataRefused(
            f"Array {member.name!r} of the dataset is a single value: its first side is the number of records.",
            where=where,
        )
    if any(side < 0 for side in member.shape) or any(side == 0 for side in member.shape[1:]):
        raise DataRefused(f"Array {member.name!r} of the dataset has an empty side.", where=where)
    if kind == _WORDS and member.dtype.itemsize == 0:
        raise DataRefused(f"Array {member.name!r} of the dataset holds only empty words.", where=where)


def _column_schema(member: _Member) -> ColumnSchema:
    if member.dtype.kind == _WORDS:
        return ColumnSchema(name=member.name, kind=ColumnKind.CATEGORY)
    if len(member.shape) == 1:
        return ColumnSchema(name=member.name, kind=ColumnKind.NUMBER)
    return ColumnSchema(name=member.name, kind=ColumnKind.TENSOR, shape=member.shape[1:])


def _all_finite(array: NDArray[Any]) -> bool:
    return all(np.isfinite(array[start : start + _ROWS_AT_ONCE]).all() for start in range(0, len(array), _ROWS_AT_ONCE))
