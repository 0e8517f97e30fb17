"""What a run stands on: a folder of its own, and an end that leaves nothing behind, however it comes."""

import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from examples.heart import database
from examples.heart.processes import record_in, recorded, stop

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, the end that a system asks for, and a closed terminal."""


class FolderInUse(Exception):
    """The folder cannot be wiped."""


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let nothing interrupt what is being ended."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def clear(folder: Path) -> None:
    """Make `folder` an empty one.

    Raises:
        FolderInUse: a demo runs there, or it holds something that no demo has made.
    """
    if recorded(folder):
        raise FolderInUse(f"A demo runs in {folder} already. Stop it first: {how_to_stop(folder)}")
    if folder.exists() and any(folder.iterdir()) and not record_in(folder).exists():
        raise FolderInUse(f"{folder} holds files, and they are not a demo's. Name another folder with --dir.")
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(mode=0o700, parents=True)
    except OSError as error:
        raise FolderInUse(f"{folder} cannot be made anew: {error.strerror}.") from error


def stop_kept(folder: Path) -> bool:
    """End what a demo left running in `folder`; says whether there was anything."""
    running = recorded(folder)
    stop(running)
    if record_in(folder).exists():
        database.clear(folder)
    return bool(running)


def how_to_stop(folder: Path) -> str:
    """The command that ends a demo."""
    if folder == DEFAULT:
        return "make demo-stop"
    return f"{sys.executable} -m examples.heart.demo --stop --dir {folder}"


DEFAULT: Final = Path(__file__).parents[2] / ".demo"
"""Where the demo plays unless told otherwise."""
