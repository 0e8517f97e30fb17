"""Models as files: streamed, verified by their SHA-256, durable before they have their name."""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import IO, Final

import httpx

from isthmus.client._answers import Answer, failure_of
from isthmus.client._retry import backoff_s
from isthmus.client._service import Service, raise_translated
from isthmus.client.errors import BadResponse, Refused, TimedOut, Unreachable
from isthmus.wire.base import parse_repr_digest
from isthmus.wire.version import DIGEST_HEADER, TENSORS_MEDIA_TYPE
from isthmus.writeback import Writeback

PIECE_BYTES: Final = 2**20

Progress = Callable[[int, int | None], None]
"""Called with the bytes so far, and all bytes if their number is known."""


@dataclass(frozen=True, slots=True)
class Incoming:
    """A response of 2xx whose body is on its way. A piece is good until the next one is asked for."""

    address: str
    status: int
    headers: Mapping[str, str]
    pieces: Iterator[bytes | memoryview]


Open = Callable[[str, Mapping[str, str]], AbstractContextManager[Incoming | Answer]]
"""GETs an address with headers: a body on its way, or an answer outside of 2xx."""

_CONTENT_RANGE: Final = re.compile(r"^bytes (\d+)-\d+/(?:\d+|\*)$")
_DIGEST: Final = re.compile(r'^(?:W/)?"?([0-9a-f]{64})"?$')


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pieces(source: Path | bytes, progress: Progress | None) -> Iterator[bytes]:
    """The content, 1 MiB at a time."""
    if isinstance(source, bytes):
        total = len(source)
        for start in range(0, total, PIECE_BYTES):
            yield source[start : start + PIECE_BYTES]
            _tell(progress, min(start + PIECE_BYTES, total), total)
        return
    with source.open("rb") as file:
        total = os.fstat(file.fileno()).st_size
        done = 0
        while piece := file.read(PIECE_BYTES):
            yield piece
            done += len(piece)
            _tell(progress, done, total)


def download(
    service: Service,
    path: str,
    target: Path,
    *,
    digest: str | None = None,
    max_bytes: int | None = None,
    progress: Progress | None = None,
    durable: bool = True,
    opened: Open | None = None,
) -> str:
    """Fetch `path` into `target`; the SHA-256 of the file.

    The bytes go to a hidden file beside `target`, which is synced, if it is to be `durable`, and renamed once they are
    all there and have the digest that was asked for (`digest`, or else the one that the response names). A cut is
    resumed with `Range`, as long as each attempt brings something or the client's retries last. `opened`: how to ask,
    if not through the client's pool of connections.

    Raises:
        BadResponse: the bytes have another digest, the response names none, or there are more than `max_bytes`.
        Refused, Unreachable, TimedOut: as any call.
    """
    partial = target.with_name(f".{target.name}.{token_hex(4)}.part")
    fetch = _Download(service, path, digest, max_bytes, progress, durable=durable, opened=opened)
    try:
        with partial.open("xb") as file:
            found = fetch.into(file)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        partial.replace(target)
    except BaseException:
        with suppress(FileNotFoundError):
            partial.unlink()
        raise
    if durable:
        sync_directory(target.parent)
    return found


def sync_directory(path: Path) -> None:
    """Make a rename within `path` durable."""
    if os.name != "posix":
        return  # Windows cannot open a directory, and renames durably by itself
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _Download:
    def __init__(
        self,
        service: Service,
        path: str,
        digest: str | None,
        max_bytes: int | None,
        progress: Progress | None,
        *,
        durable: bool,
        opened: Open | None,
    ) -> None:
        self.service = service
        self.path = path
        self.address = service.address(path)
        self.asked = digest
        self.named: str | None = None
        self.max_bytes = max_bytes
        self.progress = progress
        self.durable = durable
        self.opened = opened or self._pooled
        self.etag: str | None = None
        self.done = 0
        self.hash = hashlib.sha256()

    def into(self, file: IO[bytes]) -> str:
        retries, clock = self.service.retries, self.service.clock
        failures = 0
        while True:
            before = self.done
            try:
                self._read_on(file)
                break
            except (httpx.TransportError, Unreachable, TimedOut, Refused) as error:
                if isinstance(error, Refused) and error.status == 416 and self.done:
                    self.etag = None  # what we have is not the beginning of what there is now: begin again
                elif isinstance(error, Refused) and error.status not in (429, 503):
                    raise
                failures = 1 if self.done > before else failures + 1
                if failures >= retries.attempts:
                    if isinstance(error, httpx.HTTPError):
                        raise_translated(error, self.address)
                    raise
                asked_s = error.retry_after_s if isinstance(error, Refused) else None
                wait_s = max(asked_s or 0.0, backoff_s(retries, failures, clock.chance()))
                if wait_s > retries.total_s:
                    raise
                clock.sleep(wait_s)
        found = self.hash.hexdigest()
        wanted = self.asked or self.named
        if wanted is None:
            raise BadResponse(f"{self.address} names no digest of its content, so it cannot be verified")
        if found != wanted:
            raise BadResponse(f"{self.address} gave bytes of digest {found}, not {wanted}")
        return found

    def _read_on(self, file: IO[bytes]) -> None:
        headers = {"Accept": TENSORS_MEDIA_TYPE, "Accept-Encoding": "identity"}
        if self.done and self.etag is not None:
            headers |= {"Range": f"bytes={self.done}-", "If-Range": self.etag}
        with self.opened(self.address, {**self.service.headers, **headers}) as response:
            if isinstance(response, Answer):
                raise failure_of(response, self.address, self.service.clock.now())
            if response.headers.get("content-encoding", "identity") != "identity":
                raise BadResponse(f"{self.address} compresses what was asked for as it is")
            if not self._continues(response):
                file.seek(0)
                file.truncate()
                self.done = 0
                self.hash = hashlib.sha256()
            self.etag = response.headers.get("etag")
            self.named = _named_digest(response) or self.named
            length = response.headers.get("content-length", "")
            total = self.done + int(length) if length.isascii() and length.isdigit() else None
            writeback = Writeback(file.fileno(), self.done) if self.durable else None
            for piece in response.pieces:  # as they come: what waits to fill a piece would be lost by a cut
                if self.max_bytes is not None and self.done + len(piece) > self.max_bytes:
                    raise BadResponse(f"{self.address} gave more than the {self.max_bytes} bytes expected")
                file.write(piece)
                if writeback is not None:
                    writeback.wrote(len(piece))
                self.hash.update(piece)
                self.done += len(piece)
                _tell(self.progress, self.done, total)

    @contextmanager
    def _pooled(self, _address: str, headers: Mapping[str, str]) -> Iterator[Incoming]:
        with self.service.stream(self.path, headers=headers) as response:
            yield Incoming(str(response.request.url), response.status_code, response.headers, response.iter_bytes())

    def _continues(self, response: Incoming) -> bool:
        if response.status != 206:
            self.named = None
            return False
        found = _CONTENT_RANGE.match(response.headers.get("content-range", ""))
        if found is None or int(found.group(1)) != self.done:
            raise BadResponse(f"{self.address} answered a range that was not asked for")
        return True


def _named_digest(response: Incoming) -> str | None:
    """The digest of the whole content, by `Repr-Digest`, or by our `ETag`, which is the digest."""
    value = response.headers.get(DIGEST_HEADER.lower())
    if value is not None:
        try:
            return parse_repr_digest(value)
        except ValueError as error:
            raise BadResponse(f"{response.address}: {error}") from None
    found = _DIGEST.match(response.headers.get("etag", ""))
    return found.group(1) if found else None


def _tell(progress: Progress | None, done: int, total: int | None) -> None:
    if progress is not None:
        progress(done, total)
