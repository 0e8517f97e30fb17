"""Whole files as dictionaries of arrays: for models and updates that fit into memory, as in the worker's child."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.codec.blocks import TensorFile, TensorFileWriter
from isthmus.codec.dtypes import NUMPY_DTYPE, check_booleans, dtype_of
from isthmus.codec.errors import LengthMismatch
from isthmus.codec.header import (
    PREFIX_BYTES,
    Header,
    TensorPlace,
    canonical_order,
    check_length,
    check_manifest,
    encode_header,
    header_length,
    header_limit,
    layout,
    parse_header,
)
from isthmus.codec.header import manifest_of as _manifest_of_header
from isthmus.wire.manifest import Manifest

Tensors = Mapping[str, NDArray[Any]]


def types_of(tensors: Tensors) -> dict[str, TensorPlace]:
    """Element type, shape and place of every array, in canonical order.

    Raises:
        TypeError: an array has an element type that safetensors has no name for.
    """
    return layout({name: TensorPlace(dtype_of(array), array.shape, 0, 0) for name, array in tensors.items()})


def manifest_of(tensors: Tensors, keep: Collection[str] = ()) -> Manifest:
    """The manifest that a model fits: floats are averaged, everything else is kept.

    Args:
        tensors: the model.
        keep: names of floating-point tensors that the updates do not move either.
    """
    return _manifest_of_header(Header(types_of(tensors)), keep)


def encode(tensors: Tensors, metadata: Mapping[str, str] | None = None) -> bytes:
    """The file that holds `tensors`.

    Args:
        tensors: name -> array of any shape, memory order and byte order. Not modified.
        metadata: free text that travels along.

    Returns:
        The same bytes for the same values, whatever the order of the names.

    Raises:
        TypeError: an array has an element type that safetensors has no name for.
        ValueError: a name that cannot be written (see `encode_header`).

    Edge cases:
        scalars, tensors without elements and a file without tensors are files like any other.
    """
    types = types_of(tensors)
    parts = [encode_header(types, metadata)]
    parts.extend(_little_endian(tensors[name]).tobytes() for name in types)
    return b"".join(parts)


def write(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None, *, durable: bool = True) -> str:
    """Write `tensors` to `path`; the bytes are those of `encode`.

    Args:
        durable: False: the caller syncs the file, or does not need it to survive a power cut.

    Returns:
        The SHA-256 of the file, in hexadecimal.

    Raises:
        TypeError, ValueError: as `encode`.
    """
    types = types_of(tensors)
    with TensorFileWriter(path, types, metadata, durable=durable) as writer:
        for name in types:
            writer.write_block(name, 0, _little_endian(tensors[name]).reshape(-1))
    return writer.digest


def decode(data: bytes | memoryview, manifest: Manifest | None = None) -> dict[str, NDArray[Any]]:
    """The arrays of a file in memory.

    Args:
        data: the whole file.
        manifest: what it must hold, exactly; None: whatever it holds.

    Returns:
        Name -> array, in canonical order; writable copies that share no memory with `data`.

    Raises:
        NotSafetensors, TensorsMismatch, LengthMismatch: see `isthmus.codec.errors`. Nothing is allocated before the
            header has passed.
    """
    view = memoryview(data)
    length = header_length(bytes(view[:PREFIX_BYTES]), header_limit(manifest))
    if len(view) < PREFIX_BYTES + length:
        raise LengthMismatch(f"The file ends after {len(view)} bytes, within its header.")
    header = parse_header(bytes(view[PREFIX_BYTES : PREFIX_BYTES + length]))
    check_length(header, len(view))
    if manifest is not None:
        check_manifest(header, manifest)
    arrays = {}
    for name in canonical_order(header.tensors):
        place = header.tensors[name]
        raw = np.frombuffer(view[header.header_bytes + place.begin : header.header_bytes + place.end], dtype=np.uint8)
        arrays[name] = _array(name, place, raw.copy())
    return arrays


def read(path: Path, manifest: Manifest | None = None) -> dict[str, NDArray[Any]]:
    """The arrays of a file on disk; otherwise as `decode`."""
    with TensorFile(path, header_limit(manifest)) as file:
        if manifest is not None:
            check_manifest(file.header, manifest)
        arrays = {}
        for name in canonical_order(file.tensors):
            place = file.tensors[name]
            raw = np.empty(place.end - place.begin, np.uint8)
            file.read_bytes(place.begin, raw)
            arrays[name] = _array(name, place, raw)
        return arrays


def _array(name: str, place: TensorPlace, raw: NDArray[np.uint8]) -> NDArray[Any]:
    dtype = NUMPY_DTYPE[place.dtype]
    if dtype.kind == "b":
        check_booleans(name, raw)
    return raw.view(dtype).reshape(place.shape)


def _little_endian(array: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")
