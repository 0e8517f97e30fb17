"""Python runs this at start where this folder is on PYTHONPATH: it notes when a task's parts begin and end.

Each call of a function of PARTS becomes a line `name begin end cpu` (seconds; of the monotonic clock, which all
processes of a machine share, and of the calling thread's processor time) in the folder `traces` beside the worker's
configuration. Training is made trivial, as in
`trivial_training`. Agent and child are traced alike; the service imports none of these modules. A worker with a file
`late` beside its configuration begins each task that many seconds late, so that it leaves the machine to the other.
"""

import functools
import importlib
import importlib.abc
import importlib.util
import os
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "trivial_training"))

PARTS = {
    "isthmus.client.tasks": ("Tasks.claim", "Tasks.download_model", "Tasks.submit_update"),
    "isthmus_worker.loop": (
        "Agent.serve", "Agent.objections", "Agent._model", "Agent.compute", "Agent._hand_in",
    ),
    "isthmus_worker.journal": (
        "Journal.pin", "Journal.retire_before", "Journal.find", "Journal.prepare", "Journal.note_asking",
        "Journal.mark_released", "Journal.mark_acknowledged",
    ),
    "isthmus_worker.trainer": ("Trainer.warm", "Trainer.work", "Trainer._send"),
    "isthmus_worker.heart": ("Heart.__enter__", "Heart.__exit__"),
    "isthmus_worker.work": (
        "Desk.perform", "Desk.split", "settle", "_model", "read", "loaded_module", "train", "difference",
        "protect", "_composed", "write",
    ),
}  # fmt: skip


def _site():
    """The folder of the worker's configuration; the child works below it."""
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / "worker.toml").is_file():
            return folder
    return None


def _trace_file():
    if _SITE is None:
        return None
    (_SITE / "traces").mkdir(exist_ok=True)
    return (_SITE / "traces" / f"{os.getpid()}").open("ab", buffering=0)


class _Traced(importlib.abc.Loader):
    def __init__(self, loader, names):
        self._loader, self._names = loader, names

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        self._loader.exec_module(module)
        for name in self._names:
            owner = module
            *path, last = name.split(".")
            for step in path:
                owner = getattr(owner, step)
            setattr(owner, last, _timed(name, getattr(owner, last)))


def _timed(name, function):
    @functools.wraps(function)
    def timed(*args, **kwargs):
        if name == "Agent.serve" and (_SITE / "late").exists():
            time.sleep(float((_SITE / "late").read_text()))
        cpu, began = time.thread_time(), time.monotonic()
        try:
            return function(*args, **kwargs)
        finally:
            ended, cpu = time.monotonic(), time.thread_time() - cpu
            _FILE.write(f"{name} {began!r} {ended!r} {cpu!r}\n".encode())

    return timed


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        names = _LEFT.pop(name, None)
        if names is None:
            return None
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Traced(spec.loader, names)
        return spec


_SITE = _site()
_FILE, _LEFT = _trace_file(), dict(PARTS)
_trivial = importlib.util.spec_from_file_location("trivial_training", sys.path[-1] + "/sitecustomize.py")
_trivial.loader.exec_module(importlib.util.module_from_spec(_trivial))
if _FILE is not None:
    sys.meta_path.insert(0, _Finder())
