"""A federation of real processes: one service, one agent an organization, each with a folder of its own."""

import contextlib
import csv
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import psycopg

from isthmus.client import Client, Unreachable
from isthmus.submission import submit
from isthmus.wire.datasets import AutomaticApproval, Budget, UsePolicy
from isthmus.wire.jobs import JobSpec, JobState, JobView
from isthmus.wire.organizations import CreateApiKey, CreateOrganization, CreatePrincipal, Role
from isthmus.wire.privacy import LARGEST_EPSILON, PrivacyMode
from tests.running import first_admin

PATIENCE_S = 180.0
Thing = TypeVar("Thing")

WORKER = """
service_url = "{url}"
state_dir = "state"

[[datasets]]
name = "patients"
description = "made for a test"
source = {{ kind = "csv", path = "patients.csv" }}
budget = {{ epsilon = 100.0, delta = 1e-5 }}

[policy]
principals = ["ada"]
purposes = ["research"]
modes = ["none", "record", "organization-central", "organization-local", "organization-distributed"]
allow_exact_metrics = true
allow_exact_statistics = true
{more}

[resources]
{resources}
"""

POLICY = UsePolicy(
    principals=("ada",),
    purposes=("research",),
    modes=tuple(PrivacyMode),
    budget=Budget(epsilon=LARGEST_EPSILON),
    allow_exact_metrics=True,
    allow_exact_statistics=True,
    automatic_approval=AutomaticApproval(),
)


def until(what: Callable[[], Thing], why: str, patience_s: float = PATIENCE_S) -> Thing:
    """The first true answer of `what`."""
    deadline = time.monotonic() + patience_s
    while not (answer := what()):
        assert time.monotonic() < deadline, f"it did not happen: {why}"
        time.sleep(0.05)
    return answer


def free_port() -> int:
    """A port that nobody listens on, below those that the kernel gives to outgoing connections: it stays free while
    the service is dead."""
    for port in random.sample(range(20_000, 32_000), 100):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")


class Program:
    """One process that can be killed and started again."""

    def __init__(self, name: str, command: list[str], folder: Path, environment: dict[str, str]) -> None:
        self.name, self._command, self._folder = name, command, folder
        self._environment = {
            key: value for key, value in os.environ.items() if not key.startswith(("ISTHMUS_", "PYTEST_", "COV_"))
        } | environment
        self.log = folder / f"{name}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, or start it again."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, cwd=self._folder, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def kill(self) -> None:
        """SIGKILL: nothing is said good-bye to."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        return self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> int:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(20)

    @property
    def runs(self) -> bool:
        """Whether it does."""
        return self.process is not None and self.process.poll() is None


class Island:
    """The service, the organizations' agents, and everybody's keys."""

    def __init__(self, folder: Path, database_url: str, **settings: str) -> None:
        self.folder, self.database_url = folder, database_url
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        environment = {
            "ISTHMUS_DATABASE_URL": database_url,
            "ISTHMUS_PORT": str(port),
            "ISTHMUS_DATA_DIR": str(folder / "service"),
            "ISTHMUS_LEASE": "PT3S",
            "ISTHMUS_HEARTBEAT": "PT1S",
            "ISTHMUS_SWEEP": "PT0.3S",
            "ISTHMUS_AGGREGATION_RETRY": "PT1S",
            **settings,
        }
        (folder / "service").mkdir(parents=True)
        (folder / "service" / "admin.key").write_text("made by the test")
        self.environment = environment
        self.service = Program(
            "service",
            [program_path("isthmus-server"), "serve", "--no-migrate"],
            folder,
            environment | self.environment_of("service"),
        )
        self.agents: list[Program] = []
        self.admin = Client(self.url, first_admin(database_url))
        self.researcher: Client | None = None
        self._clients = [self.admin]

    def environment_of(self, name: str) -> dict[str, str]:
        """What the program of that name (`service`, or an organization's) finds in its environment besides."""
        return {}

    def url_for(self, name: str) -> str:
        """Where the agent of an organization reaches the service."""
        return self.url

    resources = "idle_s = 30"
    """The section of that name in the workers' configuration."""

    def open(self, sites: int, *, more: str = "") -> None:
        """Start the service, enrol so many organizations and start their agents."""
        self.service.start()
        until(self._ready, "the service is ready")
        self.researcher = self._principal("ada", Role.RESEARCHER)
        for number in range(sites):
            self._site(f"clinic-{number}", number, more)
        for agent in self.agents:
            agent.start()
        self._confirm(sites)

    def _ready(self) -> bool:
        assert self.service.runs, self.service.log.read_text()[-3000:]
        try:
            return bool(self.admin.me())
        except Unreachable:
            return False

    def _principal(self, name: str, role: Role, organization_id: Any = None) -> Client:
        principal = self.admin.principals.create(
            CreatePrincipal(name=name, display_name=name, role=role, organization_id=organization_id)
        )
        client = Client(self.url, self.admin.keys.create(CreateApiKey(principal_id=principal.id)).key)
        self._clients.append(client)
        return client

    def _site(self, name: str, number: int, more: str) -> None:
        organization = self.admin.organizations.create(CreateOrganization(name=name, display_name=name))
        self.__dict__.setdefault("stewards", []).append(
            self._principal(f"{name}-steward", Role.STEWARD, organization.id)
        )
        folder = self.folder / name
        folder.mkdir()
        write_patients(folder / "patients.csv", number)
        (folder / "worker.toml").write_text(WORKER.format(url=self.url_for(name), more=more, resources=self.resources))
        token = self.admin.organizations.issue_enrollment_token(organization.id).token
        (folder / "token").write_text(token)
        subprocess.run(
            [program_path("isthmus-worker"), "enroll", "--config", "worker.toml", "--token-file", "token"],
            cwd=folder, check=True, capture_output=True, timeout=PATIENCE_S,
        )  # fmt: skip
        run = [program_path("isthmus-worker"), "run", "--config", "worker.toml"]
        self.agents.append(Program("agent", run, folder, self.environment_of(name)))

    def _confirm(self, sites: int) -> None:
        stewards: list[Client] = self.__dict__["stewards"]
        for steward, agent in zip(stewards[-sites:], self.agents[-sites:], strict=True):

            def announced(steward: Client = steward, agent: Program = agent) -> Any:
                assert agent.runs, agent.log.read_text()[-3000:]
                return next(iter(steward.datasets.list()), None)

            dataset = until(announced, "the dataset is announced")
            steward.datasets.set_policy(dataset.id, POLICY)
            steward.datasets.confirm(dataset.id)

    @property
    def stewards(self) -> list[Client]:
        """One an organization."""
        return list(self.__dict__["stewards"])

    def submit(self, spec: JobSpec) -> JobView:
        """A job on its way."""
        assert self.researcher is not None
        return submit(self.researcher, spec)

    def job(self, job: JobView) -> JobView:
        """The job as it stands now."""
        assert self.researcher is not None
        return self.researcher.jobs.get(job.id)

    def until_round(self, job: JobView, number: int) -> None:
        """Wait until so many rounds are completed, asking the database: the service may be dead."""

        def there() -> bool:
            with psycopg.connect(self.database_url) as connection:
                row = connection.execute("SELECT rounds_completed FROM jobs WHERE id = %s", [job.id]).fetchone()
            return row is not None and row[0] >= number

        until(there, f"round {number} is completed")

    def finish(self, job: JobView) -> JobView:
        """The job, once it has ended."""

        def ended() -> JobView | None:
            try:
                now = self.job(job)
            except Unreachable:
                assert self.service.runs, self.service.log.read_text()[-3000:]
                return None  # it was started a moment ago
            return now if now.state in (JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED) else None

        found = until(ended, "the job ends")
        assert found is not None
        return found

    def close(self) -> None:
        """End everything."""
        for program in (*self.agents, self.service):
            if program.process is not None:
                program.kill()
        for client in self._clients:
            client.close()


def program_path(name: str) -> str:
    """One of our commands, as it is installed here."""
    return str(Path(sys.executable).parent / name)


def write_patients(path: Path, number: int, rows: int = 80) -> None:
    """Rows of one organization, the same for the same number: two numbers with gaps, a category, a label."""
    chance = random.Random(f"patients of {number}")
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["age", "chol", "sex", "disease"])
        for row in range(rows):
            ill = row % 2
            age = round(chance.gauss(50 + 8 * ill + number, 9), 1)
            chol = round(chance.gauss(230 + 25 * ill, 40), 1) if chance.random() > 0.2 else ""
            out.writerow([age, chol, chance.choice(["Female", "Male"]), ill])


def job_spec(**changes: Any) -> JobSpec:
    """A job over the patients of `write_patients`, without clipping or noise, so that its model is one for its seed."""
    spec: dict[str, Any] = {
        "name": "patients",
        "model": {"layers": [{"linear": {"in": 5, "out": 4}}, "relu", {"linear": {"in": 4, "out": 2}}]},
        "data": {
            "task": "classification",
            "features": [
                "age",
                {"name": "chol", "missing": "indicate"},
                {"name": "sex", "categories": ["Female", "Male"]},
            ],
            "target": "disease",
            "classes": 2,
            "standardize": "federated",
        },
        "training": {"optimizer": {"sgd": {"lr": 0.1}}, "batch_size": 16},
        "privacy": "none",
        "rounds": 6,
        "cohort": {"min_updates": 3, "deadline_s": 60},
        "evaluation": {"holdout": 0.25, "release": "exact"},
        "seed": "a1" * 32,
    }
    return JobSpec.model_validate({**spec, **changes})


@contextmanager
def island(folder: Path, database_url: str, **settings: str) -> Iterator[Island]:
    """An island that leaves no process behind."""
    opened = Island(folder, database_url, **settings)
    try:
        yield opened
    finally:
        opened.close()
