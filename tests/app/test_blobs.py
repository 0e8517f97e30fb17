"""Bodies on their way to the disk, in pieces large enough for a second thread."""

import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from app.blobs import PIECE_BYTES, DirectoryBlobStore
from app.errors import DigestMismatch, LengthMismatch
from isthmus.codec.errors import NonFinite

pytestmark = pytest.mark.anyio

BODY = os.urandom(3 * PIECE_BYTES + 12_345)
DIGEST = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Seen:
    """An inspector that keeps what it is shown, and refuses at some byte."""

    def __init__(self, refuses_at: int | None = None) -> None:
        self.shown = bytearray()
        self._refuses_at = refuses_at

    def feed(self, chunk: bytes | memoryview) -> None:
        self.shown += chunk
        if self._refuses_at is not None and len(self.shown) > self._refuses_at:
            raise NonFinite("no number")

    def finish(self) -> None:
        pass


async def stream(body: bytes, chunk: int = 200_000) -> AsyncIterator[bytes]:
    for start in range(0, len(body), chunk):
        yield body[start : start + chunk]


def files(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


@pytest.mark.parametrize("chunk", [1_000, 65_536, 262_143, len(BODY)])
async def test_a_body_is_shown_in_order_and_kept_as_it_came_however_it_was_cut(tmp_path: Path, chunk: int) -> None:
    store, inspector = DirectoryBlobStore(tmp_path), Seen()
    stored = await store.receive(
        "updates/1/2", stream(BODY, chunk), length=len(BODY), digest=DIGEST, inspector=inspector
    )
    assert bytes(inspector.shown) == BODY
    assert (await store.open_path("updates/1/2")).read_bytes() == BODY
    assert (stored.digest, stored.size_bytes) == (DIGEST, len(BODY))


@pytest.mark.parametrize("at", [0, PIECE_BYTES, 2 * PIECE_BYTES + 7, len(BODY) - 1])
async def test_one_byte_of_any_piece_that_differs_leaves_nothing(tmp_path: Path, at: int) -> None:
    body = bytearray(BODY)
    body[at] ^= 1
    with pytest.raises(DigestMismatch):
        await DirectoryBlobStore(tmp_path).receive(
            "updates/1/2", stream(bytes(body)), length=len(BODY), digest=DIGEST, inspector=Seen()
        )
    assert files(tmp_path) == []


async def test_what_the_inspector_refuses_in_mid_body_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(NonFinite):
        await DirectoryBlobStore(tmp_path).receive(
            "updates/1/2", stream(BODY), length=len(BODY), digest=DIGEST, inspector=Seen(refuses_at=2 * PIECE_BYTES)
        )
    assert files(tmp_path) == []


async def test_a_body_that_goes_on_or_ends_early_leaves_nothing(tmp_path: Path) -> None:
    for length in (len(BODY) - 1, len(BODY) + 1):
        with pytest.raises(LengthMismatch):
            await DirectoryBlobStore(tmp_path).receive(
                "updates/1/2", stream(BODY), length=length, digest=DIGEST, inspector=Seen()
            )
    assert files(tmp_path) == []
