"""Environments of peers, each with a Python of its own under `.peers/`, so that they cannot disturb ours."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

PEERS: Final = Path(__file__).parent.parent.parent / ".peers"
INSTALL_S: Final = 900
MOST_RELAXED: Final = 10


class NotInstalled(RuntimeError):
    """A peer cannot be installed here."""


def environment_of(package: str, version: str) -> tuple[Path, list[str]]:
    """The folder with the programs of an environment that holds this version of a package; made if it is not there.

    If the package's own requirements cannot be met by the index, it is installed without them, and then each of them,
    the ones that cannot be met in whatever version there is.

    Returns:
        the folder of its programs, and the requirements that had to be relaxed.

    Raises:
        NotInstalled: neither way worked.
    """
    home = PEERS / f"{package}-{version}"
    stamp = home / "relaxed.txt"
    if not stamp.exists():
        _run([sys.executable, "-m", "venv", "--clear", str(home)])
        stamp.write_text("\n".join(_install(home / "bin" / "python", f"{package}=={version}")), encoding="utf-8")
    return home / "bin", stamp.read_text(encoding="utf-8").splitlines()


def _install(python: Path, pinned: str) -> list[str]:
    if not _pip(python, [pinned]):
        return []
    if failure := _pip(python, ["--no-deps", pinned]):
        raise NotInstalled(f"{pinned} cannot be installed: {failure}")
    name = pinned.partition("==")[0]
    script = (
        "import importlib.metadata as m; print(*(r for r in m.requires({!r}) or [] if 'extra ==' not in r), sep='\\n')"
    )
    wanted = _run([str(python), "-c", script.format(name)]).splitlines()
    return relax(wanted, lambda requirements: _pip(python, requirements))


def relax(wanted: list[str], install: Callable[[list[str]], str]) -> list[str]:
    """Install requirements, dropping the versions of those for which there is none; which these were.

    Args:
        wanted: requirements as pip takes them; changed in place to what was installed.
        install: tries to install all of them and returns pip's complaint, or nothing.

    Raises:
        NotInstalled: it complains of something else, or of the same one again.
    """
    relaxed: list[str] = []
    for _ in range(MOST_RELAXED):
        failure = install(wanted)
        if not failure:
            return relaxed
        missing = re.search(r"No matching distribution found for ([A-Za-z0-9._-]+)", failure)
        if missing is None:
            break
        named = [one for one in wanted if re.match(rf"{re.escape(missing[1])}(?![A-Za-z0-9._-])", one)]
        if not named or named[0] == missing[1]:
            break
        wanted[wanted.index(named[0])] = missing[1]
        relaxed.append(named[0])
    raise NotInstalled(f"its requirements cannot be met: {failure[-400:]}")


def _pip(python: Path, words: list[str]) -> str:
    """Pip's complaint, or nothing if it did what it was told."""
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S, check=False)
    except subprocess.TimeoutExpired:
        return f"pip took longer than {INSTALL_S} s"
    return "" if done.returncode == 0 else done.stderr.strip() or "pip failed without a word"


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S, check=True).stdout
    except (subprocess.SubprocessError, OSError) as error:
        raise NotInstalled(f"{' '.join(command[:4])} failed: {error}") from error
