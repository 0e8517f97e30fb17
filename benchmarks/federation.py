"""A federation as it runs in production, on one machine: Postgres, the service and the agents, all as processes.

    with federation(workers=5) as running:
        job = running.island.submit(trivial_job(0.25, rounds=12))

The settings are the service's own defaults (a lease of 15 s, a heartbeat of 5 s, a sweep every second) and Postgres
is durable. With `trivial=True` training returns at once (see `trivial_training`); all else is the product's own.
"""

import math
import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg
from psycopg import sql

from app.database import migrate
from app.embedded_postgres import embedded_postgres
from benchmarks.processes import cpu_s
from isthmus.interruption import Interruption
from isthmus.wire.jobs import JobSpec
from tests.acceptance.island import Island, Program, island, job_spec

TRIVIAL_TRAINING = Path(__file__).parent / "trivial_training"
DEFAULTS = {
    "ISTHMUS_LEASE": "PT15S",
    "ISTHMUS_HEARTBEAT": "PT5S",
    "ISTHMUS_SWEEP": "PT1S",
    "ISTHMUS_AGGREGATION_RETRY": "PT5S",
}
HIDDEN_LAYERS = 8


@dataclass(frozen=True)
class CpuTimes:
    """CPU seconds since each process began, by kind. `postgres_s` is None where Postgres is not on this machine."""

    service_s: float
    workers_s: float
    postgres_s: float | None


@dataclass
class Federation:
    """The processes, and what they have cost so far."""

    island: Island
    folder: Path
    postgres_pid: int | None

    @property
    def service_pid(self) -> int:
        """The service's process, as it was last started."""
        assert self.island.service.process is not None
        return int(self.island.service.process.pid)

    def cpu(self) -> CpuTimes:
        """CPU seconds so far: of the service, of all agents with their training processes, of Postgres."""
        agents = [agent.process.pid for agent in self.island.agents if agent.process is not None]
        return CpuTimes(
            service_s=cpu_s([self.service_pid]),
            workers_s=cpu_s(agents),
            postgres_s=cpu_s([self.postgres_pid]) if self.postgres_pid is not None else None,
        )

    def query(self, statement: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """What Postgres answers, past the service."""
        with psycopg.connect(self.island.database_url, autocommit=True) as connection:
            return connection.execute(statement.encode(), values).fetchall()


@contextmanager
def federation(
    workers: int,
    *,
    trivial: bool = True,
    service: Sequence[str] | None = None,
    under: Path | None = None,
    **settings: str,
) -> Iterator[Federation]:
    """A running federation with so many agents, each of an organization of its own; it leaves nothing behind.

    Args:
        workers: how many organizations with one agent each; 0 for the service alone.
        trivial: whether training returns at once.
        service: the service's command, if it is to run in another way, such as under a profiler.
        under: a folder on the disk that is to be measured; None: the system's temporary one.
        settings: further settings of the service, such as ISTHMUS_SWEEP="PT2S".
    """
    with ExitStack() as stack:
        stack.enter_context(ending_on_signals())
        folder = Path(tempfile.mkdtemp(prefix="isthmus-benchmark-", dir=under))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        url, postgres_pid = stack.enter_context(database(folder / "postgres"))
        opened = stack.enter_context(island(folder / "island", url, **DEFAULTS, **settings))
        if service is not None:
            opened.service = Program("service", list(service), opened.folder, opened.service._environment)
        with environment(PYTHONPATH=str(TRIVIAL_TRAINING) if trivial else os.environ.get("PYTHONPATH")):
            opened.__dict__.setdefault("stewards", [])  # where there is no organization, nobody would make the list
            opened.open(workers)
        yield Federation(opened, folder, postgres_pid)


@contextmanager
def database(folder: Path) -> Iterator[tuple[str, int | None]]:
    """A migrated database, and the process id of its server: an embedded one, or one in ISTHMUS_DATABASE_URL's server.

    That URL's role must be allowed to create databases; the one made here is dropped again.
    """
    given = os.environ.get("ISTHMUS_DATABASE_URL")
    if not given:
        with embedded_postgres(folder) as url:
            migrate(url)
            pid = int((folder / "server" / "postmaster.pid").read_text(encoding="ascii").split()[0])
            yield url, pid
        return
    given = given.replace("postgresql+psycopg:", "postgresql:", 1)
    name = sql.Identifier(f"isthmus_benchmark_{secrets.token_hex(6)}")
    with psycopg.connect(given, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(name))
        try:
            url = urlunsplit(urlsplit(given)._replace(path=f"/{name._obj[0]}"))
            migrate(url)
            yield url, None
        finally:
            connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(name))


def trivial_job(model_mb: float, rounds: int, workers: int, **changes: Any) -> JobSpec:
    """A job over the island's patients whose parameters take so many MB (10^6 bytes) of float32; no evaluation between.

    The model is a chain of linear layers of one width: twenty tensors, sixteen of them in eight hidden layers.
    """
    width = width_of(model_mb)
    layers: list[Any] = [{"linear": {"in": 1, "out": width}}]
    layers += [{"linear": {"in": width, "out": width}} for _ in range(HIDDEN_LAYERS)]
    layers += [{"linear": {"in": width, "out": 2}}]
    spec: dict[str, Any] = {
        "name": f"trivial-{model_mb:g}mb",
        "model": {"layers": layers},
        "data": {"task": "classification", "features": ["age"], "target": "disease", "classes": 2},
        "rounds": rounds,
        "cohort": {"min_updates": workers, "deadline_s": 600},
        "evaluation": {"holdout": 0.25, "every": 0, "release": "exact"},
        "seed": secrets.token_hex(32),
    }
    made: JobSpec = job_spec(**{**spec, **changes})
    return made


def width_of(model_mb: float) -> int:
    """The width of the hidden layers with which the parameters come closest to so many MB from below."""
    width = 1
    while parameters_of(width + 1) * 4 <= model_mb * 1e6:
        width += 1
    return width


def parameters_of(width: int) -> int:
    """How many numbers the model of `trivial_job` holds."""
    return sum(math.prod(shape) for shape in shapes_of(width))


def shapes_of(width: int) -> list[tuple[int, ...]]:
    """The shapes of its twenty tensors, as torch orders them."""
    sizes = [1, *[width] * (HIDDEN_LAYERS + 1), 2]
    return [shape for before, after in pairwise(sizes) for shape in ((after, before), (after,))]


@contextmanager
def environment(**values: str | None) -> Iterator[None]:
    """Set variables of this process's environment, or remove those that are None, for as long as the block lasts."""
    before = {name: os.environ.get(name) for name in values}
    _set(values)
    try:
        yield
    finally:
        _set(before)


def _set(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def ending_on_signals() -> Interruption:
    """Let SIGTERM leave through every `with`, so that a benchmark that is ended ends what it started."""
    return Interruption(signal.SIGTERM)
