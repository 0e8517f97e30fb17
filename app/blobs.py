"""Bodies at rest: models and updates. Spooled and checked beside the stream; durable before they are spoken of."""

import asyncio
import contextlib
import hashlib
import os
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Final, Protocol

import anyio.to_thread

from app.errors import DigestMismatch, LengthMismatch, NotFound
from isthmus.writeback import Writeback

PIECE_BYTES: Final = 1 << 20
SHARED_BYTES: Final = 1 << 16
"""Pieces from this size on are worth a second thread."""
LISTED_AT_ONCE: Final = 500
STALL_S: Final = 60.0
"""A body that brings nothing for so long is given up."""


class Inspector(Protocol):
    """Judges a body while it arrives; raises a refusal. Called in a thread, one call at a time."""

    def feed(self, chunk: bytes | memoryview) -> None:
        """The next bytes."""
        ...

    def finish(self) -> None:
        """There are no more."""
        ...


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """Bytes that are durable: where they are, and what they are."""

    key: str
    digest: str
    size_bytes: int


class BlobStore(Protocol):
    """Where bodies are kept, by key. A key is written once and never changes its content."""

    async def receive(
        self,
        key: str,
        stream: AsyncIterator[bytes],
        *,
        length: int,
        digest: str,
        inspector: Inspector,
        on_progress: Callable[[], Awaitable[None]] | None = None,
    ) -> StoredBlob:
        """Take a body from the network under `key`. When this returns the bytes are durable; when it raises, gone."""
        ...

    async def adopt(self, key: str, path: Path, digest: str) -> StoredBlob:
        """Take over a finished, synced file made beside the store (see `draft`)."""
        ...

    def draft(self) -> Path:
        """A path for a new file that `adopt` can take over without copying."""
        ...

    async def open_path(self, key: str) -> Path:
        """A local file with the bytes of `key`.

        Raises:
            NotFound: there are none.
        """
        ...

    async def delete(self, key: str, *, unless_younger_than: timedelta | None = None) -> None:
        """Forget `key`; forgetting what is not there, or was written again lately, is harmless."""
        ...

    def list_old(self, older_than: timedelta) -> AsyncIterator[list[str]]:
        """Keys last written longer ago than that, some hundreds at a time; old drafts are deleted on the way."""
        ...


class DirectoryBlobStore:
    """Blobs in a directory: written beside it, synced, renamed, and the directory synced."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._drafts = root / "drafts"
        self._drafts.mkdir(parents=True, exist_ok=True, mode=0o700)

    async def receive(
        self,
        key: str,
        stream: AsyncIterator[bytes],
        *,
        length: int,
        digest: str,
        inspector: Inspector,
        on_progress: Callable[[], Awaitable[None]] | None = None,
    ) -> StoredBlob:
        """See `BlobStore`. The next megabyte is received while threads check, write and digest the one before."""
        spool = _Spool(self.draft(), length, inspector)
        writing: asyncio.Future[None] | None = None
        try:
            async for piece in _pieces(stream):
                if writing is not None:
                    await asyncio.shield(writing)
                    if on_progress is not None:
                        await on_progress()
                writing = asyncio.ensure_future(anyio.to_thread.run_sync(spool.write, piece))
            if writing is not None:
                await asyncio.shield(writing)
            writing = asyncio.ensure_future(anyio.to_thread.run_sync(spool.finish, digest, self._path(key)))
            await asyncio.shield(writing)
        except BaseException:
            if writing is not None:
                with contextlib.suppress(BaseException):
                    await asyncio.shield(writing)
            spool.discard()
            raise
        return StoredBlob(key=key, digest=digest, size_bytes=length)

    def draft(self) -> Path:
        """A new path beside the blobs, on the same file system."""
        return self._drafts / secrets.token_hex(16)

    async def adopt(self, key: str, path: Path, digest: str) -> StoredBlob:
        """See `BlobStore`."""
        size = await anyio.to_thread.run_sync(_publish, path, self._path(key))
        return StoredBlob(key=key, digest=digest, size_bytes=size)

    async def open_path(self, key: str) -> Path:
        """See `BlobStore`."""
        path = self._path(key)
        if not path.is_file():
            raise NotFound("blob", key)
        return path

    async def delete(self, key: str, *, unless_younger_than: timedelta | None = None) -> None:
        """See `BlobStore`."""
        await anyio.to_thread.run_sync(self._delete, self._path(key), unless_younger_than)

    def _delete(self, path: Path, unless_younger_than: timedelta | None) -> None:
        with contextlib.suppress(FileNotFoundError):
            if unless_younger_than is None or _age_s(path) >= unless_younger_than.total_seconds():
                path.unlink()

    async def list_old(self, older_than: timedelta) -> AsyncIterator[list[str]]:
        """See `BlobStore`."""
        for draft in await anyio.to_thread.run_sync(lambda: list(self._drafts.iterdir())):
            await anyio.to_thread.run_sync(self._delete, draft, older_than)
        keys = await anyio.to_thread.run_sync(self._keys, older_than.total_seconds())
        for start in range(0, len(keys), LISTED_AT_ONCE):
            yield keys[start : start + LISTED_AT_ONCE]

    def _keys(self, age_s: float) -> list[str]:
        found = []
        for path in self._root.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # deleted a moment ago
                if path.is_file() and self._drafts not in path.parents and _age_s(path) >= age_s:
                    found.append(path.relative_to(self._root).as_posix())
        return sorted(found)

    def _path(self, key: str) -> Path:
        parts = key.split("/")
        if any(part in ("", ".", "..") or not part.replace("-", "").isalnum() for part in parts):
            raise ValueError(f"{key!r} is not a key of a blob")
        return self._root.joinpath(*parts)


def _age_s(path: Path) -> float:
    """Seconds since the file was written."""
    return time.time() - path.stat().st_mtime


class BodyDigest:
    """SHA-256 of a body as it arrives."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, piece: bytes | bytearray | memoryview) -> None:
        """The next bytes."""
        self._hash.update(piece)

    def require(self, digest: str) -> None:
        """There are no more.

        Raises:
            DigestMismatch: they have another digest.
        """
        if self._hash.hexdigest() != digest:
            raise DigestMismatch(
                "The bytes that arrived do not have the digest declared in Repr-Digest: send them again."
            )


class _Spool:
    """One body on its way to the disk. Used by one thread at a time."""

    def __init__(self, path: Path, length: int, inspector: Inspector) -> None:
        self._path = path
        self._length = length
        self._inspector = inspector
        self._received = 0
        self._digest = BodyDigest()
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._writeback = Writeback(self._file)

    def write(self, piece: bytes) -> None:
        """Judge and then write the next bytes: nothing is kept of what is refused. A second thread digests them."""
        self._received += len(piece)
        if self._received > self._length:
            raise LengthMismatch(f"The body goes on after the {self._length} bytes that its header declared.")
        digesting = _digesters().submit(self._digest.update, piece) if len(piece) >= SHARED_BYTES else None
        try:
            view = memoryview(piece)
            self._inspector.feed(view)
            if digesting is None:
                self._digest.update(view)
            while view:
                view = view[os.write(self._file, view) :]
            self._writeback.wrote(len(piece))
        finally:
            if digesting is not None:
                digesting.result()  # pieces are digested one after the other

    def finish(self, digest: str, target: Path) -> None:
        """Check the whole and give it its name, durably."""
        if self._received != self._length:
            raise LengthMismatch(f"The body ended after {self._received} of {self._length} declared bytes.")
        self._inspector.finish()
        self._digest.require(digest)
        os.fsync(self._file)
        os.close(self._file)
        self._file = -1
        _publish(self._path, target)

    def discard(self) -> None:
        """Leave nothing behind."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._path.unlink(missing_ok=True)


@cache
def _digesters() -> ThreadPoolExecutor:
    """Threads for SHA-256, which lets go of the interpreter's lock: it takes longer than all else of a body."""
    return ThreadPoolExecutor(thread_name_prefix="digest")


def _publish(path: Path, target: Path) -> int:
    """Give a synced file its name so that the name survives a power cut as well; how long the file is."""
    missing = [parent for parent in (target.parent, *target.parent.parents) if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.replace(target)
    for directory in (target.parent, *(made.parent for made in missing)):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return target.stat().st_size


async def _pieces(stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The stream in pieces of about a megabyte, so that a thread is called once a piece and not once a packet.

    Raises:
        LengthMismatch: nothing came for STALL_S.
    """
    gathered: list[bytes] = []
    size = 0
    chunks = aiter(stream)
    while True:
        try:
            async with asyncio.timeout(STALL_S):
                chunk = await anext(chunks, None)
        except TimeoutError:
            raise LengthMismatch(f"The body stalled: nothing came for {STALL_S:g} seconds.") from None
        if chunk is None:
            break
        gathered.append(chunk)
        size += len(chunk)
        if size >= PIECE_BYTES:
            yield b"".join(gathered)
            gathered.clear()
            size = 0
    if gathered:
        yield b"".join(gathered)


def checkpoint_key(digest: str) -> str:
    """Where a checkpoint, or a strategy's state, is kept: content-addressed."""
    return f"checkpoints/{digest[:2]}/{digest}"


def update_key(task_id: object) -> str:
    """A new place for an upload of a task. Every upload has its own, so that a refused one takes nothing with it."""
    return f"updates/{task_id}/{secrets.token_hex(8)}"
