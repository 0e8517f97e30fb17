"""Judging an initial model while it arrives: against the manifest of its layers, or making one from its header."""

from isthmus.codec.header import PREFIX_BYTES, header_length, manifest_of, parse_header
from isthmus.codec.scanner import UpdateScanner
from isthmus.wire.manifest import Manifest


class ModelInspector:
    """Takes a model's bytes as they arrive. A declared model must fit its manifest; an entry point's defines one.

    Attributes:
        manifest: what the model fits; known once its header has passed.
    """

    def __init__(self, manifest: Manifest | None, length: int) -> None:
        self.manifest = manifest
        self._length = length
        self._head = bytearray()
        self._scanner = None if manifest is None else UpdateScanner(manifest, length)

    def feed(self, chunk: bytes | memoryview) -> None:
        """The next bytes; raises a `CodecError` as soon as they cannot be the model."""
        if self._scanner is not None:
            self._scanner.feed(chunk)
            return
        self._head += chunk
        if len(self._head) < PREFIX_BYTES:
            return
        ends = PREFIX_BYTES + header_length(bytes(self._head[:PREFIX_BYTES]))
        if len(self._head) < ends:
            return
        self.manifest = manifest_of(parse_header(bytes(self._head[PREFIX_BYTES:ends])))
        self._scanner = UpdateScanner(self.manifest, self._length)
        self._scanner.feed(memoryview(self._head))
        self._head = bytearray()

    def finish(self) -> None:
        """There are no more bytes; raises a `CodecError` if some are missing."""
        scanner = self._scanner or UpdateScanner(Manifest(tensors={}), self._length)
        if self._scanner is None:
            scanner.feed(memoryview(self._head))
        scanner.finish()
