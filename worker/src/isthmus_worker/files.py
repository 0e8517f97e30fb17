"""Files that survive a power cut: contents are on the disk before a name points at them, the name before we go on."""

import hashlib
import os
from pathlib import Path
from typing import Final

_CHUNK: Final = 1 << 20


def sync_directory(path: Path) -> None:
    """Have the names in a directory on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Have the contents of a file on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_durably(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read, whole or not at all."""
    draft = path.with_name(f"{path.name}.draft")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    move_durably(draft, path)


def move_durably(source: Path, target: Path) -> None:
    """Give a file that is on the disk already its name there."""
    source.replace(target)
    sync_directory(target.parent)


class VerifiedFiles:
    """Files whose digest this process has seen to be right, and that nobody has touched since."""

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[str, tuple[int, ...]]] = {}

    def note(self, path: Path, digest: str) -> None:
        """The file was written, or read, under our eyes, and has this digest."""
        self._seen[path] = digest, _identity(path)

    def delete(self, path: Path) -> None:
        """Delete the file, and forget it: an agent that runs for years meets many."""
        path.unlink(missing_ok=True)
        self._seen.pop(path, None)

    def holds(self, path: Path, digest: str) -> bool:
        """Whether there is such a file with this digest. It is read only if it is not the one that was noted.

        Another inode, length, time of change or of its last metadata makes it another file: whoever writes into it
        changes one of these.
        """
        try:
            identity = _identity(path)
            if self._seen.get(path) == (digest, identity):
                return True
            if digest_of_file(path)[0] != digest:
                return False
            self._seen[path] = digest, identity  # as it was before it was read: a write meanwhile makes it another
        except FileNotFoundError:
            self._seen.pop(path, None)
            return False
        return True


def _identity(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def digest_of_file(path: Path) -> tuple[str, int]:
    """SHA-256 and length of a file, read in pieces."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
            size += len(piece)
    return digest.hexdigest(), size
