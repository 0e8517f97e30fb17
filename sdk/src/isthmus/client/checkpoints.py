"""Models by their digest."""

from pathlib import Path

from isthmus.client._service import Service, segment
from isthmus.client._transfer import Progress, download


class Checkpoints:
    """`client.checkpoints`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def download(
        self, digest: str, path: Path, *, max_bytes: int | None = None, progress: Progress | None = None
    ) -> str:
        """Write the checkpoint to `path`, durably, once its bytes have this digest; the digest. A cut is resumed."""
        return download(
            self._service,
            f"checkpoints/{segment(digest)}",
            path,
            digest=digest,
            max_bytes=max_bytes,
            progress=progress,
        )
