"""Secrets: how they are made, hashed and compared; and the key that signs receipts."""

import contextlib
import hashlib
import hmac
import os
import secrets
import string
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

BASE62: Final = string.digits + string.ascii_letters
KEY_PREFIX: Final = "isk"
TOKEN_PREFIX: Final = "iet"  # noqa: S105 -- the public beginning of a token
ID_LENGTH: Final = 16  # 95 bits: ids never collide
SECRET_LENGTH: Final = 43  # 256 bits
CHECKSUM_LENGTH: Final = 6


@dataclass(frozen=True, slots=True)
class Issued:
    """A new secret: what is shown once, what finds it again, and what is kept of it."""

    shown: str
    id: str
    secret_hash: bytes


def _random(length: int) -> str:
    return "".join(secrets.choice(BASE62) for _ in range(length))


def _checksum(text: str) -> str:
    """Six base62 digits of CRC-32: a typing error is told from a wrong key without a look-up. Not a protection."""
    number, digits = zlib.crc32(text.encode()), ""
    for _ in range(CHECKSUM_LENGTH):
        number, digit = divmod(number, 62)
        digits = BASE62[digit] + digits
    return digits


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def issue_key() -> Issued:
    """A new API key `isk_<id>_<secret and checksum>`. The secret has 256 bits, so one SHA-256 is enough to keep."""
    key_id, secret = _random(ID_LENGTH), _random(SECRET_LENGTH)
    body = f"{KEY_PREFIX}_{key_id}_{secret}"
    return Issued(shown=body + _checksum(body), id=key_id, secret_hash=_hash(secret))


def issue_token() -> Issued:
    """A new one-time enrolment token `iet_<secret and checksum>`."""
    secret = _random(SECRET_LENGTH)
    body = f"{TOKEN_PREFIX}_{secret}"
    return Issued(shown=body + _checksum(body), id="", secret_hash=_hash(secret))


@dataclass(frozen=True, slots=True)
class PresentedKey:
    """A key as it came with a request: well-formed, not yet looked up."""

    id: str
    secret: str

    def matches(self, secret_hash: bytes) -> bool:
        """Whether this is the secret behind `secret_hash`, compared in constant time."""
        return hmac.compare_digest(_hash(self.secret), secret_hash)


def _well_formed(text: str, lengths: tuple[int, ...], prefix: str) -> list[str] | None:
    body, checksum = text[:-CHECKSUM_LENGTH], text[-CHECKSUM_LENGTH:]
    parts = body.split("_")
    if parts[0] != prefix or tuple(map(len, parts[1:])) != lengths:
        return None
    if not text.isascii() or not hmac.compare_digest(_checksum(body), checksum):
        return None
    return parts[1:]


def parse_key(text: str) -> PresentedKey | None:
    """The key in `text`, or None if it is not one of ours by form and checksum."""
    parts = _well_formed(text, (ID_LENGTH, SECRET_LENGTH), KEY_PREFIX)
    return None if parts is None else PresentedKey(*parts)


def hash_token(text: str) -> bytes | None:
    """What is kept of the enrolment token in `text`, or None if it is not one of ours by form and checksum."""
    parts = _well_formed(text, (SECRET_LENGTH,), TOKEN_PREFIX)
    return None if parts is None else _hash(parts[0])


class Signer:
    """The service's Ed25519 key. Workers pin its public half when they enrol."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    @property
    def public_key(self) -> str:
        """32 bytes in hexadecimal."""
        return self._key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()

    def sign(self, message: bytes) -> str:
        """64 bytes in hexadecimal; the same for the same message."""
        return self._key.sign(message).hex()


def verify(public_key: str, message: bytes, signature: str) -> bool:
    """Whether `signature` is of `message` under `public_key`."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key)).verify(bytes.fromhex(signature), message)
    except (InvalidSignature, ValueError):
        return False
    return True


def load_signer(path: Path, *, create: bool) -> Signer:
    """The signing key in `path` (PEM); made there, readable by its owner alone, if there is none and `create` says so.

    Raises:
        ValueError: the file holds no Ed25519 key, or there is none and none may be made.
    """
    if not path.exists():
        if not create:
            raise ValueError(f"there is no signing key at {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        pem = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        draft = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):  # another process made one first: then that is the key
            os.link(draft, path)
        draft.unlink()
    key = load_pem_private_key(path.read_bytes(), password=None)
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(f"{path} holds a key of another kind than Ed25519")
    return Signer(key)
