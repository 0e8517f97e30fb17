"""The header of a safetensors file: parsed under limits, checked against a manifest, written in canonical form.

No NumPy here: the agent's own process uses this module.
"""

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final, NoReturn, Protocol

from isthmus.codec.errors import LengthMismatch, NotSafetensors, TensorsMismatch, shown
from isthmus.wire.manifest import (
    FLOATS,
    ITEM_SIZE,
    MAX_RANK,
    MAX_TENSORS,
    AggregationRule,
    DType,
    Manifest,
    TensorSpec,
)

PREFIX_BYTES: Final = 8
MAX_HEADER_BYTES: Final = 1 << 20
"""The longest JSON header that is read where no manifest asks for more."""
HIGHEST_HEADER_BYTES: Final = 16 << 20
"""The longest JSON header that any manifest can ask for."""

_METADATA: Final = "__metadata__"
_FIELDS: Final = frozenset({"dtype", "shape", "data_offsets"})
_LISTED: Final = 3
_NUMBER_DIGITS: Final = 20
_ENTRY_BYTES: Final = 96  # {"dtype":"BOOL","shape":[],"data_offsets":[20 digits,20 digits]}, quotes, colon and comma


class TensorType(Protocol):
    """Whatever has an element type and a shape: a place in a file, or a manifest's entry."""

    @property
    def dtype(self) -> DType: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """One tensor in a file: its type, and where its data begins and ends, counted from the end of the header."""

    dtype: DType
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def elements(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself.

    Attributes:
        tensors: name -> place, in the order of the data, without overlap or hole.
        metadata: free text that travels along; we never act on it.
        header_bytes: where the data begins: the 8 bytes and the JSON.
        data_bytes: length of the data.
    """

    tensors: dict[str, TensorPlace]
    metadata: dict[str, str] = field(default_factory=dict)
    header_bytes: int = PREFIX_BYTES
    data_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Length of the whole file."""
        return self.header_bytes + self.data_bytes


def header_limit(manifest: Manifest | None = None) -> int:
    """The longest JSON header worth reading for `manifest`, in bytes.

    Returns:
        1 MiB, or more where the names and shapes of the manifest need it, up to 16 MiB.
    """
    if manifest is None:
        return MAX_HEADER_BYTES
    needed = sum(_ENTRY_BYTES + len(json.dumps(name)) + len(str(spec.shape)) for name, spec in manifest.tensors.items())
    return min(max(MAX_HEADER_BYTES, needed + (1 << 16)), HIGHEST_HEADER_BYTES)


def length_bounds(manifest: Manifest) -> tuple[int, int]:
    """The shortest and the longest file that can fit `manifest`, in bytes.

    For the answer to a Content-Length before a byte of the body is read: what lies outside cannot fit.
    """
    least = sum(spec.size_bytes for spec in manifest.tensors.values() if not spec.optional)
    return PREFIX_BYTES + len(b"{}") + least, PREFIX_BYTES + header_limit(manifest) + manifest.size_bytes


def header_length(prefix: bytes, limit: int = MAX_HEADER_BYTES) -> int:
    """Length of the JSON header, judged before a byte of it is read.

    Args:
        prefix: the first 8 bytes of the file.
        limit: the longest header that is accepted, in bytes.

    Raises:
        NotSafetensors: fewer than 8 bytes, or a header that is too short to be one or longer than `limit`.
    """
    if len(prefix) < PREFIX_BYTES:
        raise NotSafetensors(f"The file ends after {len(prefix)} bytes, before the length of its header.")
    length = int.from_bytes(prefix[:PREFIX_BYTES], "little")
    if length < len(b"{}"):
        raise NotSafetensors(f"The header is said to be {length} bytes long; the shortest has 2.")
    if length > limit:
        raise NotSafetensors(f"The header is said to be {length} bytes long; at most {limit} are read.")
    return length


def parse_header(text: bytes, max_tensors: int = MAX_TENSORS) -> Header:
    """The header in `text`: the JSON alone, without the 8 bytes before it.

    Args:
        text: as many bytes as `header_length` said.
        max_tensors: how many tensors a file may hold.

    Raises:
        NotSafetensors: anything that is not exactly a header: not UTF-8, not JSON, a key twice, a field of another
            type, missing or unknown, an unknown element type, offsets that overlap, leave a hole, do not begin at 0
            or do not fit the shape, too many tensors or sides, metadata that is not text, names that are not text.

    Guarantees:
        No other exception, whatever the bytes; no memory beyond a small multiple of `text`. In the result, places
        follow each other from 0 to `data_bytes`, and each is as long as its shape and element type say.
    """
    entries = _json_object(text)
    metadata = _metadata(entries.pop(_METADATA, {}))
    if len(entries) > max_tensors:
        raise NotSafetensors(f"The header lists {len(entries)} tensors; at most {max_tensors} are accepted.")
    places = sorted(
        ((name, _place(name, entry)) for name, entry in entries.items()),
        key=lambda item: (item[1].begin, item[1].end, item[0]),
    )
    position = 0
    for name, place in places:
        if place.begin != position:
            what = "overlaps the one before it" if place.begin < position else "leaves a hole before it"
            raise NotSafetensors(f"Tensor {shown(name)} {what}: it begins at {place.begin}, not at {position}.")
        position = place.end
    return Header(dict(places), metadata, PREFIX_BYTES + len(text), position)


def read_header(source: Path | BinaryIO, limit: int = MAX_HEADER_BYTES) -> Header:
    """The header of a file on disk; nothing else of the file is read.

    Raises:
        NotSafetensors: as `header_length` and `parse_header`.
        LengthMismatch: the file ends within the header, or is not as long as the header says.
    """
    if isinstance(source, Path):
        with source.open("rb") as file:
            return read_header(file, limit)
    size = source.seek(0, 2)
    source.seek(0)
    length = header_length(source.read(PREFIX_BYTES), limit)
    text = source.read(length) if size >= PREFIX_BYTES + length else b""
    if len(text) < length:
        raise LengthMismatch(f"The file ends after {size} bytes, within its header.")
    header = parse_header(text)
    check_length(header, size)
    return header


def check_length(header: Header, length: int) -> None:
    """Whether a file of `length` bytes is as long as its header says.

    Raises:
        LengthMismatch: it is not.
    """
    if header.total_bytes != length:
        raise LengthMismatch(f"The header describes a file of {header.total_bytes} bytes, not of {length}.")


def check_manifest(header: Header, manifest: Manifest) -> None:
    """Whether a file holds exactly the tensors of `manifest`; its optional ones may be absent.

    Raises:
        TensorsMismatch: a tensor is missing or is not in the manifest, or has another element type or shape.
            The message names it (a few of them, if there are many).
    """
    missing = [n for n in manifest.names() if n not in header.tensors and not manifest.tensors[n].optional]
    if missing:
        raise TensorsMismatch(f"Tensors that the manifest asks for are missing: {_few(missing)}.")
    check_types({n: manifest.tensors[n] for n in manifest.names() if n in header.tensors}, header.tensors)


def check_types(expected: Mapping[str, TensorType], found: Mapping[str, TensorType]) -> None:
    """Whether the tensors found are exactly those expected, by name, element type and shape.

    Raises:
        TensorsMismatch: they are not. The message names a tensor.
    """
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise TensorsMismatch(f"Tensors are missing: {_few(missing)}.")
    extra = sorted(found.keys() - expected.keys())
    if extra:
        raise TensorsMismatch(f"Tensors that are not in the manifest: {_few(extra)}.")
    for name, spec in expected.items():
        other = found[name]
        if other.dtype != spec.dtype:
            raise TensorsMismatch(f"Tensor {shown(name)} has element type {other.dtype}, not {spec.dtype}.")
        if other.shape != spec.shape:
            raise TensorsMismatch(f"Tensor {shown(name)} has shape {list(other.shape)}, not {list(spec.shape)}.")


def manifest_of(header: Header, keep: Collection[str] = ()) -> Manifest:
    """The manifest that a model's file fits: floats are averaged, everything else is kept.

    Args:
        header: of the model's file.
        keep: names of floating-point tensors that the updates do not move either.
    """
    return Manifest(tensors={name: _spec(place, name in keep) for name, place in sorted(header.tensors.items())})


def canonical_order(tensors: Mapping[str, TensorType]) -> list[str]:
    """Names in the order of the data in our files: widest elements first, then by name."""
    return sorted(tensors, key=lambda name: (-ITEM_SIZE[tensors[name].dtype], name))


def layout(tensors: Mapping[str, TensorType]) -> dict[str, TensorPlace]:
    """Where each tensor lies in a file that we write, in canonical order."""
    places = {}
    position = 0
    for name in canonical_order(tensors):
        dtype, shape = tensors[name].dtype, tuple(tensors[name].shape)
        end = position + math.prod(shape) * ITEM_SIZE[dtype]
        places[name] = TensorPlace(dtype, shape, position, end)
        position = end
    return places


def encode_header(tensors: Mapping[str, TensorType], metadata: Mapping[str, str] | None = None) -> bytes:
    """The beginning of a file that will hold `tensors` in canonical order: the 8 bytes and the JSON.

    Args:
        tensors: name -> element type and shape: a manifest's tensors, or another file's places.
        metadata: free text that travels along.

    Returns:
        The same bytes for the same arguments, whatever their order, padded with spaces to a multiple of 8.

    Raises:
        ValueError: a name is `__metadata__`, or a name or a text cannot be written as UTF-8.
    """
    if _METADATA in tensors:
        raise ValueError(f"{_METADATA!r} is not a tensor's name: the format keeps it for free text")
    entries: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
    for name, place in layout(tensors).items():
        entries[name] = {
            "dtype": place.dtype.value,
            "shape": list(place.shape),
            "data_offsets": [place.begin, place.end],
        }
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(PREFIX_BYTES, "little") + text


def _json_object(text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise NotSafetensors("The header does not begin with '{'.")
    try:
        entries = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_refuse_number,
            parse_constant=_refuse_number,
        )
    except NotSafetensors:
        raise
    except UnicodeDecodeError as error:
        raise NotSafetensors("The header is not UTF-8.") from error
    except RecursionError as error:
        raise NotSafetensors("The header nests too deeply.") from error
    except ValueError as error:
        raise NotSafetensors("The header is not JSON.") from error
    assert isinstance(entries, dict)  # it began with '{' and parsed to its end
    return entries


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise NotSafetensors("The header has a key twice.")
    for key in found:
        _check_text(key)
    return found


def _integer(digits: str) -> int:
    if len(digits) > _NUMBER_DIGITS:
        raise NotSafetensors("The header holds a number that is too long.")
    return int(digits)


def _refuse_number(digits: str) -> NoReturn:
    raise NotSafetensors(f"The header holds {digits[:20]}, which is not a whole number.")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # "\\ud800": half a surrogate pair, valid JSON but no text
        raise NotSafetensors("The header holds text that is not Unicode.") from error


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise NotSafetensors("The header's metadata is not a mapping of text to text.")
    for text in value.values():
        _check_text(text)
    return value


def _place(name: str, entry: Any) -> TensorPlace:
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise NotSafetensors(f"Tensor {shown(name)} is not described by exactly dtype, shape and data_offsets.")
    dtype = _dtype(name, entry["dtype"])
    shape = _whole_numbers(name, "shape", entry["shape"])
    offsets = _whole_numbers(name, "data_offsets", entry["data_offsets"])
    if len(shape) > MAX_RANK:
        raise NotSafetensors(f"Tensor {shown(name)} has {len(shape)} sides; at most {MAX_RANK} are accepted.")
    if len(offsets) != 2:
        raise NotSafetensors(f"Tensor {shown(name)} has {len(offsets)} data_offsets; there must be 2.")
    begin, end = offsets
    needed = math.prod(shape) * ITEM_SIZE[dtype]  # whole numbers of Python do not overflow
    if end - begin != needed:
        raise NotSafetensors(f"Tensor {shown(name)} has {end - begin} bytes of data; its shape needs {needed}.")
    return TensorPlace(dtype, shape, begin, end)


def _dtype(name: str, value: Any) -> DType:
    if not isinstance(value, str) or value not in DType.__members__:
        known = ", ".join(DType.__members__)
        raise NotSafetensors(
            f"Tensor {shown(name)} has element type {shown(str(value), 20)}, which is none of {known}."
        )
    return DType(value)


def _whole_numbers(name: str, what: str, value: Any) -> tuple[int, ...]:
    # type(...) is int: True and False are whole numbers to isinstance
    if not isinstance(value, list) or not all(type(number) is int and number >= 0 for number in value):
        raise NotSafetensors(f"Tensor {shown(name)}: {what} is not a list of whole numbers from 0.")
    return tuple(value)


def _spec(place: TensorPlace, keep: bool) -> TensorSpec:
    rule = AggregationRule.MEAN if place.dtype in FLOATS and not keep else AggregationRule.KEEP
    return TensorSpec(dtype=place.dtype, shape=place.shape, rule=rule)


def _few(names: Iterable[str]) -> str:
    every = list(names)
    listed = ", ".join(shown(name) for name in every[:_LISTED])
    return listed if len(every) <= _LISTED else f"{listed} and {len(every) - _LISTED} more"
