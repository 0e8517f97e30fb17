"""What benchmarks put in the place of the product's own functions, or around them, is there to be replaced."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRACED = """
import importlib, sitecustomize
for module in sitecustomize.PARTS:
    importlib.import_module(module)
assert not sitecustomize._LEFT, sitecustomize._LEFT
"""


def ran(folder: Path, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """A Python process of this environment, with the repository's own folder first."""
    path = os.pathsep.join(filter(None, (variables.pop("PYTHONPATH", ""), str(ROOT))))
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, **variables, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_the_traced_worker_has_all_functions_that_are_timed(tmp_path: Path) -> None:
    (tmp_path / "worker.toml").touch()
    done = ran(tmp_path, "-c", TRACED, PYTHONPATH=str(ROOT / "benchmarks" / "traced_worker"))
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "traces").iterdir())


@pytest.mark.parametrize("module", ["unchecked_service", "profiled_service"])
def test_the_changed_services_start(tmp_path: Path, module: str) -> None:
    given = [str(tmp_path / "stats")] if module == "profiled_service" else []
    done = ran(tmp_path, "-m", f"benchmarks.{module}", *given, "--help")
    assert done.returncode == 0, done.stderr
    assert "serve" in done.stdout
