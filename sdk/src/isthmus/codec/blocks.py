"""A file on disk, read and written a block at a time, so that memory does not grow with the model.

No memory maps: their pages count as resident memory, and a file that is cut while it is mapped kills the process.
"""

import hashlib
import math
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from isthmus.codec.dtypes import NUMPY_DTYPE
from isthmus.codec.errors import LengthMismatch, shown
from isthmus.codec.header import MAX_HEADER_BYTES, Header, TensorPlace, TensorType, encode_header, layout, read_header
from isthmus.writeback import STRETCH_BYTES, Writeback

_COPY_BYTES: Final = 1 << 20
_SHARED_BYTES: Final = 1 << 20
"""Blocks from this size on are digested in a second thread."""


class TensorFile:
    """A safetensors file that is open for reading. Use it in a `with` statement.

    Raises:
        NotSafetensors, LengthMismatch: the header is not well-formed, or the file is not as long as it says.
    """

    def __init__(self, path: Path, max_header_bytes: int = MAX_HEADER_BYTES) -> None:
        self._file = path.open("rb", buffering=0)
        try:
            self.header: Header = read_header(self._file, max_header_bytes)
        except BaseException:
            self._file.close()
            raise

    @property
    def tensors(self) -> Mapping[str, TensorPlace]:
        """Name -> element type, shape and place."""
        return self.header.tensors

    def read_block(self, name: str, start: int, out: NDArray[Any]) -> None:
        """Fill `out` with the elements of a tensor from index `start` on, in row order.

        Args:
            name: the tensor.
            start: index of the first element, counted over the flattened tensor.
            out: contiguous, of the tensor's element type; its size says how many elements are read.

        Raises:
            ValueError: `out` has another element type, or the elements lie outside of the tensor.
            LengthMismatch: the file was cut after it was opened.
        """
        place = self.header.tensors[name]
        check_block(name, place, start, out)
        self.read_bytes(place.begin + start * out.itemsize, out)

    def read_bytes(self, begin: int, out: NDArray[Any]) -> None:
        """Fill contiguous `out` with data bytes, counted from the end of the header."""
        view = out.reshape(-1).view(np.uint8).data
        position = self.header.header_bytes + begin
        while view:
            count = os.preadv(self._file.fileno(), [view], position)
            if count == 0:
                raise LengthMismatch(f"The file ends at {position} bytes; it was longer when it was opened.")
            view = view[count:]
            position += count

    def close(self) -> None:
        """Close the file. Closing twice is harmless."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class TensorFileWriter:
    """Writes a safetensors file block by block. Use it in a `with` statement.

    The header is written at once. Blocks of one tensor come in order; blocks of different tensors may alternate. The
    SHA-256 grows along with blocks that follow each other in the file, and is completed from the file if some do not.
    Leaving the statement without an error makes the file durable (`fsync`), if asked; with one, it removes the file.
    Whether the *name* is durable is the caller's affair, who renames the file and syncs the directory.

    Args:
        path: an existing file is overwritten.
        tensors: what will be written: name -> element type and shape.
        metadata: free text that travels along.
        durable: whether to sync the file at its end.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, TensorType],
        metadata: Mapping[str, str] | None = None,
        *,
        durable: bool = True,
    ) -> None:
        head = encode_header(tensors, metadata)
        self._path = path
        self._durable = durable
        self._places = layout(tensors)
        self._written = dict.fromkeys(self._places, 0)
        self._head_bytes = len(head)
        self._hash = hashlib.sha256(head)
        self._hashed = len(head)  # how many bytes from the beginning of the file the hash has seen
        self._digest: str | None = None
        self._file = path.open("w+b", buffering=0)
        self._writeback = Writeback(self._file.fileno())
        self._pwrite(memoryview(head), 0)

    @property
    def digest(self) -> str:
        """SHA-256 of the file in hexadecimal, once it is closed."""
        if self._digest is None:
            raise ValueError("the file is not finished: its digest is not known")
        return self._digest

    @property
    def size_bytes(self) -> int:
        """Length of the finished file."""
        return self._head_bytes + max((place.end for place in self._places.values()), default=0)

    def write_block(self, name: str, start: int, block: NDArray[Any]) -> None:
        """Write the elements of a tensor from index `start` on, in row order.

        Raises:
            ValueError: another element type, outside of the tensor, or not where the tensor's last block ended.
        """
        place = self._places[name]
        check_block(name, place, start, block)
        if start * block.itemsize != self._written[name]:
            raise ValueError(f"a block of tensor {shown(name)} is written at {start}, out of turn")
        view = np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
        position = self._head_bytes + place.begin + self._written[name]
        if position != self._hashed:
            self._pwrite(view, position)
        elif len(view) < _SHARED_BYTES:
            self._append(view, position)
            self._hash.update(view)
            self._hashed += len(view)
        else:
            digesting = threading.Thread(target=self._hash.update, args=(view,), name="digest")
            digesting.start()
            try:
                self._append(view, position)
            finally:
                digesting.join()
            self._hashed += len(view)
        self._written[name] += len(view)

    def close(self) -> None:
        """Finish the file: complete the digest and make the bytes durable.

        Raises:
            ValueError: elements of some tensor were never written.
        """
        for name, place in self._places.items():
            if self._written[name] != place.end - place.begin:
                raise ValueError(f"tensor {shown(name)} was not written to its end")
        self._file.seek(self._hashed)
        while piece := self._file.read(_COPY_BYTES):
            self._hash.update(piece)
        if self._durable:
            os.fsync(self._file.fileno())
        self._file.close()
        self._digest = self._hash.hexdigest()

    def discard(self) -> None:
        """Give up: close and remove the file."""
        self._file.close()
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None:
            self.discard()
            return
        try:
            self.close()
        except BaseException:
            self.discard()
            raise

    def _append(self, view: memoryview, position: int) -> None:
        for start in range(0, len(view), STRETCH_BYTES):
            stretch = view[start : start + STRETCH_BYTES]
            self._pwrite(stretch, position + start)
            self._writeback.wrote(len(stretch))

    def _pwrite(self, view: memoryview, position: int) -> None:
        while view:
            count = os.pwrite(self._file.fileno(), view, position)
            view = view[count:]
            position += count


def check_block(name: str, tensor: TensorType, start: int, block: NDArray[Any]) -> None:
    """Whether `block` is a stretch of the tensor beginning at element `start`.

    Raises:
        ValueError: another element type, or outside of the tensor. That is a mistake of ours, not of a file.
    """
    if block.dtype != NUMPY_DTYPE[tensor.dtype]:
        raise ValueError(f"a block of {block.dtype} does not fit tensor {shown(name)} of {tensor.dtype}")
    if start < 0 or start + block.size > math.prod(tensor.shape):
        raise ValueError(f"elements {start} to {start + block.size} lie outside of tensor {shown(name)}")
