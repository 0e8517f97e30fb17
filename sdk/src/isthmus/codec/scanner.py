"""A body in flight: checked chunk by chunk, in bounded memory, while something else stores and digests it."""

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from isthmus.codec.dtypes import NUMPY_DTYPE, check_booleans
from isthmus.codec.errors import LengthMismatch, NonFinite, NotSafetensors, shown
from isthmus.codec.header import (
    PREFIX_BYTES,
    Header,
    TensorPlace,
    check_length,
    check_manifest,
    header_length,
    header_limit,
    parse_header,
)
from isthmus.wire.manifest import FLOATS, AggregationRule, DType, Manifest

MEASUREMENTS: Final = ("metrics/", "statistics/")
"""Tensors whose names begin so are results, not parts of the model."""
MAX_CAPTURED_BYTES: Final = 16 << 20

_BLOCK: Final = 1 << 15
_LARGE_SQUARES: Final = 1e290  # larger sums of squares could overflow when they are added up


class UpdateScanner:
    """Takes a body as it arrives and judges it: first the header, then every element.

    `feed` every chunk before keeping it, then `finish`. A refusal is final: feed nothing after it.

    Args:
        manifest: what the body must hold, exactly; its optional tensors may be absent.
        content_length: the length that was declared, in bytes.
        max_captured_bytes: how many bytes of results (as float64) are captured in memory.

    Attributes:
        header: the body's header, once it has passed; None before.
        captured: name -> the tensors `metrics/...` and `statistics/...`, as float64. Complete after `finish`.

    Raises:
        ValueError: the results that `manifest` asks for are larger than `max_captured_bytes`.

    Guarantees:
        `feed` raises a `CodecError` or nothing, whatever the bytes and wherever chunks are cut. Names, types, shapes
        and the length are judged with the chunk that completes the header, before any of the data is kept.
        Memory: the header, the captured results and one block of 2^15 elements, whatever the model.
    """

    def __init__(self, manifest: Manifest, content_length: int, max_captured_bytes: int = MAX_CAPTURED_BYTES) -> None:
        results = sum(8 * s.elements for name, s in manifest.tensors.items() if name.startswith(MEASUREMENTS))
        if results > max_captured_bytes:
            raise ValueError(f"the manifest's results take {results} bytes; at most {max_captured_bytes} are captured")
        self.header: Header | None = None
        self.captured: dict[str, NDArray[np.float64]] = {}
        self._manifest = manifest
        self._content_length = content_length
        self._received = 0
        self._head = bytearray()
        self._head_needs = PREFIX_BYTES
        self._limit = header_limit(manifest)
        self._places: list[tuple[str, TensorPlace]] = []
        self._at = 0  # index of the tensor that the next byte of data belongs to
        self._done = 0  # bytes of that tensor seen, those in _edge included
        self._edge = bytearray()  # the beginning of an element that a chunk's end has cut
        self._squares = 0.0
        self._huge = 0.0  # norm of blocks whose squares overflow
        self._values = np.empty(_BLOCK, np.float64)
        self._scratch = np.empty(_BLOCK, np.float64)

    @property
    def l2_norm(self) -> float:
        """Euclidean norm over all averaged tensors of the model, summed in float64. Final after `finish`.

        The last bits may depend on where chunks were cut: compare with a tolerance.
        """
        return math.hypot(math.sqrt(self._squares), self._huge)

    def feed(self, chunk: bytes | bytearray | memoryview) -> None:
        """Judge the next bytes of the body.

        Raises:
            NotSafetensors, TensorsMismatch, NonFinite, LengthMismatch: the body is refused.
        """
        view = memoryview(chunk).cast("B")
        self._received += len(view)
        if self._received > self._content_length:
            raise LengthMismatch(f"The body is longer than the {self._content_length} bytes declared.")
        if self.header is None:
            view = self._feed_header(view)
        while view:
            view = self._feed_data(view)

    def finish(self) -> None:
        """The body has ended.

        Raises:
            LengthMismatch: before it was complete.
            NotSafetensors: it was so short that it has no header.
        """
        if self._received < self._content_length:
            raise LengthMismatch(f"The body ended after {self._received} of {self._content_length} bytes.")
        if self.header is None:
            raise NotSafetensors(f"The body ends after {self._received} bytes, within its header.")

    def _feed_header(self, view: memoryview) -> memoryview:
        while self.header is None:
            take = self._head_needs - len(self._head)
            self._head += view[:take]
            view = view[take:]
            if len(self._head) < self._head_needs:
                break
            if len(self._head) == PREFIX_BYTES:
                length = header_length(bytes(self._head), self._limit)
                if PREFIX_BYTES + length > self._content_length:
                    raise LengthMismatch(f"The header is longer than the {self._content_length} bytes declared.")
                self._head_needs += length
            else:
                self._accept(parse_header(bytes(self._head[PREFIX_BYTES:])))
        return view

    def _accept(self, header: Header) -> None:
        check_manifest(header, self._manifest)
        check_length(header, self._content_length)
        self._head.clear()
        self._places = [(name, place) for name, place in header.tensors.items() if place.end > place.begin]
        for name, place in header.tensors.items():
            if name.startswith(MEASUREMENTS):
                self.captured[name] = np.zeros(place.shape, np.float64)
        self.header = header

    def _feed_data(self, view: memoryview) -> memoryview:
        """Judge what of `view` belongs to the present tensor; returns the rest."""
        name, place = self._places[self._at]
        size = NUMPY_DTYPE[place.dtype].itemsize
        take = min(len(view), place.end - place.begin - self._done)
        part, rest = view[:take], view[take:]
        start = self._done - len(self._edge)
        if self._edge:
            missing = size - len(self._edge)
            self._edge += part[:missing]
            part = part[missing:]
            if len(self._edge) == size:
                self._judge(name, place.dtype, start // size, np.frombuffer(bytes(self._edge), np.uint8))
                self._edge.clear()
                start += size
        whole = len(part) - len(part) % size
        if whole:
            self._judge(name, place.dtype, start // size, np.frombuffer(part[:whole], np.uint8))
        self._edge += part[whole:]
        self._done += take
        if self._done == place.end - place.begin:
            self._at += 1
            self._done = 0
        return rest

    def _judge(self, name: str, dtype: DType, start: int, raw: NDArray[np.uint8]) -> None:
        if dtype is DType.BOOL:
            check_booleans(name, raw)
        values: NDArray[Any] = raw.view(NUMPY_DTYPE[dtype])
        if dtype in FLOATS:
            for begin in range(0, values.size, _BLOCK):
                self._measure(name, values[begin : begin + _BLOCK])
        if name in self.captured:
            self.captured[name].reshape(-1)[start : start + values.size] = values

    def _measure(self, name: str, values: NDArray[Any]) -> None:
        block, squared = self._values[: values.size], self._scratch[: values.size]
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            np.copyto(block, values)
            squares = float(np.square(block, out=squared).sum())  # not np.dot: it would start threads
        if not math.isfinite(squares) and not np.isfinite(block).all():
            raise NonFinite(f"Tensor {shown(name)} holds NaN or an infinity.")
        if name.startswith(MEASUREMENTS) or self._manifest.tensors[name].rule is not AggregationRule.MEAN:
            return
        if squares < _LARGE_SQUARES:
            self._squares += squares
            return
        largest = float(np.abs(block, out=squared).max())
        with np.errstate(under="ignore"):
            block /= largest
            root = math.sqrt(float(np.square(block, out=squared).sum()))
        self._huge = math.hypot(self._huge, largest * root)
