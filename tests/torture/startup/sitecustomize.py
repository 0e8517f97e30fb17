"""Python runs this at the start of every program that has this folder on its PYTHONPATH: the programs under torture.

So the real commands are run, unchanged, and nothing in them knows of points.
"""

import os
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType


def _load(name: str) -> ModuleType:
    """A file of `tests/torture` by its path: the folder of the repository need not be on the program's path."""
    spec = spec_from_file_location(f"_torture_{name}", Path(__file__).parent.parent / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


if orders := os.environ.get("TORTURE_ORDERS"):
    _load("passages").install(_load("points").POINTS.values(), Path(orders))
