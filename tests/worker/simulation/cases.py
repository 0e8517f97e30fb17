"""Clients and jobs for the tests of simulation: small, made up, and quickly trained."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.wire.jobs import JobSpec
from isthmus_worker.data import Table
from isthmus_worker.simulation.clients import Client
from isthmus_worker.simulation.engine import Simulation, simulate
from isthmus_worker.simulation.pool import Pool

SEED = "5e" * 32
POOLS: dict[int, Pool] = {}
"""By how many processes: started once for all tests, since importing torch takes longer than they do."""


def simulated(spec: JobSpec, clients: Sequence[Client], *, processes: int = 2, **options: Any) -> Simulation:
    """`simulate`, in processes that are there already."""
    if processes not in POOLS:
        POOLS[processes] = Pool(processes)
    return simulate(spec, clients, pool=POOLS[processes], **options)


def job_spec(**changes: Any) -> JobSpec:
    """Three classes of points in four dimensions, and a small network; no noise."""
    spec: dict[str, Any] = {
        "name": "points",
        "model": {"layers": [{"linear": {"in": 4, "out": 8}}, "relu", {"linear": {"in": 8, "out": 3}}]},
        "data": {
            "task": "classification",
            "features": ["a", "b", "c", "d"],
            "target": "kind",
            "classes": 3,
            "standardize": "federated",
        },
        "training": {"optimizer": {"sgd": {"lr": 0.1, "momentum": 0.9}}, "batch_size": 8, "epochs": 1},
        "privacy": "none",
        "rounds": 3,
        "cohort": {"min_updates": 2},
        "evaluation": {"holdout": 0.25},
        "seed": SEED,
    }
    return JobSpec.model_validate({**spec, **changes})


def points(rows: int, seed: int = 0, *, classes: int = 3) -> Table:
    """Points around one centre a class; every record is another one."""
    chance = np.random.default_rng(seed)
    kinds = chance.permutation(np.arange(rows) % classes)
    values = 3.0 * np.eye(4)[kinds] + chance.normal(size=(rows, 4))
    return table_of({name: values[:, place] for place, name in enumerate("abcd")} | {"kind": kinds})


def table_of(columns: Mapping[str, NDArray[Any]]) -> Table:
    """A table whose fingerprints tell different records apart."""
    rows = len(next(iter(columns.values())))
    return Table(
        columns=columns,
        fingerprints=[
            hashlib.blake2b(
                b"".join(np.ascontiguousarray(column[row]).tobytes() for _, column in sorted(columns.items())),
                digest_size=16,
            ).digest()
            for row in range(rows)
        ],
    )


def some_clients(count: int = 4, rows: Sequence[int] = (40, 64, 52, 48)) -> list[Client]:
    """Clients of different sizes."""
    return [
        Client(f"clinic-{number}", "points", points(rows[number % len(rows)], seed=number + 1))
        for number in range(count)
    ]


def write_npz(path: Path, table: Table) -> Path:
    """The records as a file."""
    np.savez(path, **{name: np.asarray(column) for name, column in table.columns.items()})  # type: ignore[arg-type]
    return path


def searched(*first: Path) -> str:
    """A PYTHONPATH with these folders, the tests', and whatever is searched now."""
    return os.pathsep.join(map(str, filter(None, [*first, Path(__file__).parents[3], os.environ.get("PYTHONPATH")])))


JOB = f"""
name: points
model:
  layers:
    - linear: {{in: 4, out: 8}}
    - relu
    - linear: {{in: 8, out: 3}}
data: {{task: classification, features: [a, b, c, d], target: kind, classes: 3}}
training: {{optimizer: {{sgd: {{lr: 0.1}}}}, batch_size: 8}}
privacy: none
rounds: 3
cohort: {{min_updates: 2, fraction: 0.5}}
evaluation: {{holdout: 0.2}}
seed: {SEED}
"""
"""A job file."""
