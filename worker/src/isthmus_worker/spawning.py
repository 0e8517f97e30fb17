"""Starting the training process. Apart from the rest, so that an agent can start it before it has imported the rest."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from isthmus_worker.settings import Resources

log = logging.getLogger(__name__)

_ENVIRONMENT: Final = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH")
"""What a child may see of the agent's environment, besides what the configuration passes."""


def start_child(resources: Resources, scratch: Path) -> "subprocess.Popen[bytes]":
    """A training process in an emptied directory. To be called from the main thread: it dies with its caller's thread.

    No module is looked for in its working directory.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(mode=0o700)
    process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
        [sys.executable, "-P", "-m", "isthmus_worker.child", str(os.getpid()), str(resources.max_memory_mb)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=scratch,
        env=_environment(resources, scratch),
        process_group=0,
        bufsize=0,
    )
    log.info("training process started", extra={"pid": process.pid})
    return process


def _environment(resources: Resources, scratch: Path) -> dict[str, str]:
    """No secret of the agent's reaches the child: it gets what is listed and what the configuration passes."""
    passed = {name: os.environ[name] for name in (*_ENVIRONMENT, *resources.pass_environment) if name in os.environ}
    threads = str(resources.max_threads)
    passed |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONDONTWRITEBYTECODE": "1"}
    passed |= {"HOME": str(scratch), "TMPDIR": str(scratch)}
    if paths := os.environ.get("PYTHONPATH"):
        passed["PYTHONPATH"] = os.pathsep.join(str(Path(path).resolve()) for path in paths.split(os.pathsep) if path)
    return passed
