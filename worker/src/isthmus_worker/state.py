"""The state directory: the worker's keys, its journal and its caches. Mode 0700; one agent at a time."""

import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pydantic import BaseModel, ConfigDict

from isthmus_worker.files import write_durably

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_SECRET_BYTES: Final = 32


class StateInUse(Exception):
    """Another agent works in this state directory."""

    def __init__(self, root: Path) -> None:
        super().__init__(
            f"{root}: another agent holds this state directory. Two of them would release the same data twice."
        )


class NotEnrolled(Exception):
    """The state directory holds no credentials."""

    def __init__(self, root: Path) -> None:
        super().__init__(f"{root}: this worker is not enrolled yet. Run `isthmus-worker enroll` first.")


class Credentials(BaseModel):
    """What enrolment gave us. The service's public key is pinned: receipts signed by any other are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    service_url: str
    worker_id: str
    worker: str
    organization: str
    api_key: str
    service_public_key: str


@dataclass(frozen=True)
class StateDir:
    """Where everything is. `open` makes the directory; the rest only names what is in it."""

    root: Path

    @property
    def journal(self) -> Path:
        """The journal of releases, an SQLite database."""
        return self.root / "journal.sqlite"

    @property
    def releases(self) -> Path:
        """Noised bytes that were journalled and are not acknowledged yet."""
        return self.root / "releases"

    @property
    def masked(self) -> Path:
        """Masked updates of secured rounds, until the service has signed for them. They can be made again."""
        return self.root / "masked"

    @property
    def models(self) -> Path:
        """Checkpoints by digest."""
        return self.root / "models"

    @property
    def scratch(self) -> Path:
        """The child's working directory; emptied at every start."""
        return self.root / "scratch"

    @property
    def last_contact(self) -> Path:
        """A file whose time of change is when the service last answered."""
        return self.root / "last-contact"

    @property
    def _identity(self) -> Path:
        return self.root / "identity.key"

    @property
    def _credentials(self) -> Path:
        return self.root / "credentials.json"

    @property
    def _holdout_key(self) -> Path:
        return self.root / "holdout.key"

    @classmethod
    def open(cls, root: Path) -> "StateDir":
        """The state directory at `root`, made if need be."""
        state = cls(root)
        for path in (root, state.releases, state.masked, state.models, state.scratch):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return state

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory alone.

        Raises:
            StateInUse: another process holds it.
        """
        descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StateInUse(self.root) from error
            yield
        finally:
            os.close(descriptor)

    def identity(self) -> "Ed25519PrivateKey":
        """The worker's own key, made at first use."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import (  # noqa: PLC0415 - most commands do without
            Ed25519PrivateKey,
        )

        return Ed25519PrivateKey.from_private_bytes(_secret(self._identity))

    def public_key(self) -> str | None:
        """The worker's own public key in hexadecimal, by which other workers and the service know it; None: no key."""
        return self.identity().public_key().public_bytes_raw().hex() if self._identity.exists() else None

    def renew_identity(self) -> "Ed25519PrivateKey":
        """A fresh key in place of the worker's own: the service enrols no public key twice."""
        self._identity.unlink(missing_ok=True)
        return self.identity()

    def holdout_key(self) -> bytes:
        """The key that decides which rows are held out, made at first use. It never leaves this machine."""
        return _secret(self._holdout_key)

    def credentials(self) -> Credentials:
        """Who we are to the service.

        Raises:
            NotEnrolled: there are none yet.
        """
        try:
            return Credentials.model_validate_json(self._credentials.read_bytes())
        except FileNotFoundError:
            raise NotEnrolled(self.root) from None

    def is_enrolled(self) -> bool:
        """Whether there are credentials."""
        return self._credentials.exists()

    def keep_credentials(self, credentials: Credentials) -> None:
        """Store them for the owner's eyes only."""
        write_durably(self._credentials, json.dumps(credentials.model_dump(), indent=2).encode())

    def note_contact(self) -> None:
        """Remember that the service answered just now."""
        self.last_contact.touch()


def _secret(path: Path) -> bytes:
    if not path.exists():
        write_durably(path, secrets.token_hex(_SECRET_BYTES).encode())
    return bytes.fromhex(path.read_text(encoding="ascii"))
