"""Where `isthmus login` keeps addresses and keys: one TOML file that nobody else can read."""

import os
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex


class NotLoggedIn(Exception):
    """There is no address, or no key for it."""


class CredentialsInvalid(Exception):
    """The credentials file cannot be used as it is."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """One profile: an address and the key for it."""

    url: str
    key: str

    def __repr__(self) -> str:
        return f"Credentials(url={self.url!r}, key=...)"


def credentials_file(environ: Mapping[str, str]) -> Path:
    """`$XDG_CONFIG_HOME/isthmus/credentials.toml`, by default below `~/.config`."""
    home = environ.get("XDG_CONFIG_HOME")
    return (Path(home) if home else Path.home() / ".config") / "isthmus" / "credentials.toml"


def current(environ: Mapping[str, str], profile: str) -> Credentials:
    """What a command uses: ISTHMUS_URL and ISTHMUS_API_KEY, and what they leave out from the profile.

    A stored key is never sent to another address than the one it was stored for.

    Raises:
        NotLoggedIn: something is missing; the message says what.
        CredentialsInvalid: see `read_profiles`.
    """
    url, key = environ.get("ISTHMUS_URL"), environ.get("ISTHMUS_API_KEY")
    if url and key:
        return Credentials(url, key)
    stored = read_profiles(credentials_file(environ)).get(profile)
    if url and (stored is None or stored.url.rstrip("/") != url.rstrip("/")):
        raise NotLoggedIn(f"ISTHMUS_URL is {url}, but there is no key for it: set ISTHMUS_API_KEY too.")
    if stored is None:
        named = "" if profile == "default" else f" as profile {profile!r}"
        raise NotLoggedIn(f"You are not logged in{named}.")
    return Credentials(stored.url, key or stored.key)


def read_profiles(path: Path) -> dict[str, Credentials]:
    """All profiles, by name; none if there is no file.

    Raises:
        CredentialsInvalid: others may read the file, or it is not what `write_profiles` writes.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise CredentialsInvalid(f"Others may read {path}, which holds keys. Run: chmod 600 {path}")
            held = tomllib.load(file).get("profiles", {})
    except FileNotFoundError:
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CredentialsInvalid(f"{path} is no TOML: {error}") from None
    try:
        return {name: Credentials(str(entry["url"]), str(entry["key"])) for name, entry in held.items()}
    except (KeyError, TypeError, AttributeError):
        raise CredentialsInvalid(f"{path} does not hold `url` and `key` for each profile.") from None


def write_profiles(path: Path, profiles: Mapping[str, Credentials]) -> None:
    """Replace the file, readable by its owner only from its first moment on."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{token_hex(4)}")
    text = "".join(
        f"[profiles.{_quoted(name)}]\nurl = {_quoted(held.url)}\nkey = {_quoted(held.key)}\n\n"
        for name, held in sorted(profiles.items())
    )
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _quoted(text: str) -> str:
    """A TOML basic string."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(char if char.isprintable() else f"\\U{ord(char):08x}" for char in escaped) + '"'
