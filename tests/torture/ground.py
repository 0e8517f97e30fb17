"""The ground of the torture: a federation of real processes whose every process can be hit at a named point.

Two layouts. `one`: a single service that also coordinates. `spread`: two servers on one database and two coordinators
that race, with the agents spread over the servers; an agent whose server is dead is led to the other one, as a load
balancer would.
"""

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Final
from uuid import UUID

import psycopg

from isthmus.client import IsthmusError
from isthmus.submission import draw_model
from isthmus.wire.jobs import JobSpec, JobState, JobView
from tests.acceptance.island import Island, Program, free_port, program_path
from tests.torture.invariants import Record
from tests.torture.passages import ORDERS
from tests.torture.plans import ONE, SPREAD
from tests.torture.points import AGENT, CHILD, COORDINATOR, POINTS
from tests.torture.postgres import JumpingClock, OwnPostgres, Watch
from tests.torture.wire import Relay

STARTUP: Final = Path(__file__).parent / "startup"
SHORT_LEASES: Final = {"ISTHMUS_LEASE": "PT2S", "ISTHMUS_HEARTBEAT": "PT0.5S", "ISTHMUS_SWEEP": "PT0.3S"}
"""So that a dead worker costs seconds; what is promised at the defaults is measured at the defaults."""
DEFAULTS: Final = {
    "ISTHMUS_LEASE": "15",
    "ISTHMUS_HEARTBEAT": "5",
    "ISTHMUS_SWEEP": "1",
    "ISTHMUS_AGGREGATION_RETRY": "5",
}


class Ground(Island):
    """An island with relays before its agents, orders for its processes, and a clock that jumps."""

    resources = f'idle_s = 3600\npass_environment = ["{ORDERS}"]'

    def __init__(
        self,
        folder: Path,
        database_url: str,
        *,
        layout: str = ONE,
        postgres: OwnPostgres | None = None,
        settings: dict[str, str] | None = None,
    ) -> None:
        self.layout, self.postgres = layout, postgres
        self._orders = folder / "orders"
        self._models: dict[str, bytes] = {}
        self.relays: dict[str, Relay] = {}
        self.started_at: dict[Program, int] = {}  # how long a program's log was when it was started again
        self.clock = JumpingClock(database_url)
        self.watch = Watch(database_url)
        chosen = dict(settings if settings is not None else SHORT_LEASES)
        if layout == SPREAD:
            chosen["ISTHMUS_COORDINATE"] = "false"
        super().__init__(folder, database_url, **chosen)
        self._port = int(self.environment["ISTHMUS_PORT"])
        self.servers = {self.service: self._port}
        self.coordinators: list[Program] = []
        if layout == SPREAD:
            self._spread(folder)

    def _spread(self, folder: Path) -> None:
        port = free_port()
        serve = [program_path("isthmus-server"), "serve", "--no-migrate"]
        environment = self.environment | self.environment_of("service")
        self.servers[Program("service-2", serve, folder, environment | {"ISTHMUS_PORT": str(port)})] = port
        coordinate = [program_path("isthmus-server"), "coordinate"]
        environment = self.environment | self.environment_of("coordinator")
        self.coordinators = [Program(f"coordinator-{number}", coordinate, folder, environment) for number in (1, 2)]

    # --- what the island asks

    def environment_of(self, name: str) -> dict[str, str]:
        """The folder with its orders, and ours on the path where Python looks at its start."""
        path = [str(STARTUP), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {ORDERS: str(self.orders_of(name)), "PYTHONPATH": os.pathsep.join(path)}

    def url_for(self, name: str) -> str:
        """Its relay."""
        if name not in self.relays:
            ports = list(self.servers.values())
            self.relays[name] = Relay(ports[len(self.relays) % len(ports)])
        return self.relays[name].url

    def open(self, sites: int, *, more: str = "") -> None:
        """Start everything."""
        for program in (*list(self.servers)[1:], *self.coordinators):
            program.start()
        super().open(sites, more=more)

    def close(self) -> None:
        """End everything; a frozen process too."""
        for program in self.programs.values():
            if program.runs:
                program.kill()
        super().close()
        for relay in self.relays.values():
            relay.close()
        self.watch.close()

    # --- programs

    @property
    def programs(self) -> dict[str, Program]:
        """All of them by their names: service, service-2, coordinator-1, clinic-0, ..."""
        others = {program.name: program for program in (*self.servers, *self.coordinators)}
        return others | {f"clinic-{number}": agent for number, agent in enumerate(self.agents)}

    def role_of(self, program: str, site: str) -> str:
        """Who passes a point: the name of the folder with its orders."""
        if program in (AGENT, CHILD):
            return site
        return "coordinator" if program == COORDINATOR and self.layout == SPREAD else "service"

    def orders_of(self, role: str) -> Path:
        """The folder with the orders for a role."""
        folder = self._orders / role
        (folder / "passed").mkdir(parents=True, exist_ok=True)
        return folder

    def give(self, role: str, point: str, passage: int, action: str) -> None:
        """Order an action (`kill`, `hold`) at the n-th passage of a point from now on."""
        draft = self.orders_of(role) / f".{point}"
        draft.write_text(f"{passage:04} {action}")
        draft.rename(self.orders_of(role) / point)

    def take_back(self, role: str, point: str) -> None:
        """Take an order back; who was held goes on."""
        (self.orders_of(role) / point).unlink(missing_ok=True)

    def take_all_back(self) -> None:
        """No orders any more, for anybody."""
        for folder in self._orders.iterdir():
            for point in POINTS:
                (folder / point).unlink(missing_ok=True)
            (folder / "happened").unlink(missing_ok=True)
        for relay in self.relays.values():
            relay.take_back()

    def happened(self, role: str, point: str) -> tuple[float, int] | None:
        """When (`time.monotonic`) an order was carried out, and in which process."""
        with contextlib.suppress(FileNotFoundError):
            for line in (self.orders_of(role) / "happened").read_text().splitlines():
                told = json.loads(line)
                if told["point"] == point:
                    return told["at"], told["pid"]
        return None

    def passed(self, *, forget: bool = False) -> set[str]:
        """The points that were passed by anybody."""
        found = {path for folder in self._orders.iterdir() for path in (folder / "passed").iterdir()}
        if forget:
            for path in found:
                path.unlink()
        return {path.name for path in found}

    def set_wall(self, role: str, seconds: float) -> None:
        """Move the time of day as the processes of a role see it."""
        draft = self.orders_of(role) / ".wall"
        draft.write_text(str(seconds))
        draft.rename(self.orders_of(role) / "wall")

    def lead_agents(self) -> None:
        """Send the agents of a dead server to a living one; home again when it is back."""
        ports = list(self.servers.values())
        alive = [port for program, port in self.servers.items() if program.runs] or ports
        for number, relay in enumerate(self.relays.values()):
            home = ports[number % len(ports)]
            relay.upstream = home if home in alive else alive[0]

    # --- jobs

    def draft(self, spec: JobSpec) -> JobView:
        """A job with its model, not started."""
        assert self.researcher is not None
        digest = spec.model_dump_json()
        if digest not in self._models:
            self._models[digest] = draw_model(spec)
        job = self.researcher.jobs.create(spec)
        return self.researcher.jobs.upload_model(job.id, self._models[digest])

    def start(self, job: JobView) -> None:
        """Ask for its start until it has begun; to be called by a thread: whoever answers may be killed."""
        assert self.researcher is not None
        for _ in range(200):
            with contextlib.suppress(IsthmusError):
                self.researcher.jobs.start(job.id)
            state = self.watch_state(job.id)
            if state is not None and state is not JobState.DRAFT:
                return
            time.sleep(0.1)
        raise AssertionError("the job could not be started")

    def watch_state(self, job_id: UUID) -> JobState | None:
        """The job's state by the database; None while that is away."""
        watch = Watch(self.database_url)
        try:
            rows = watch.ask("SELECT state FROM jobs WHERE id = %s", job_id)
        finally:
            watch.close()
        return JobState(str(rows[0][0])) if rows else None

    @contextmanager
    def record(self) -> Iterator[Record]:
        """Where the invariants look."""
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            yield Record(connection, self.blobs, self.journals, self.public_key)

    @property
    def blobs(self) -> Path:
        """The folder of the service's blob store."""
        return self.folder / "service" / "blobs"

    @property
    def journals(self) -> dict[str, Path]:
        """Organization -> its worker's state directory."""
        return {f"clinic-{number}": self.folder / f"clinic-{number}" / "state" for number in range(len(self.agents))}

    @cached_property
    def public_key(self) -> str:
        """The service's, as the first worker pinned it."""
        state = next(iter(self.journals.values()))
        return str(json.loads((state / "credentials.json").read_text())["service_public_key"])


def freeze(pid: int) -> None:
    """Stop a process where it stands."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)


def thaw(pid: int) -> None:
    """Let it go on."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


@contextmanager
def ground(folder: Path, database_url: str, sites: int = 3, **more: object) -> Iterator[Ground]:
    """A ground on which everything runs, and that leaves no process behind."""
    opened = Ground(folder, database_url, **more)  # type: ignore[arg-type]
    try:
        opened.open(sites)
        yield opened
    finally:
        opened.close()


def note_logs(opened: Ground) -> dict[str, int]:
    """How long everybody's log is."""
    return {name: program.log.stat().st_size for name, program in opened.programs.items() if program.log.exists()}


def keep_logs(opened: Ground, target: Path, since: dict[str, int]) -> None:
    """Copy what the processes said after `note_logs`."""
    target.mkdir(parents=True, exist_ok=True)
    for name, program in opened.programs.items():
        if program.log.exists():
            (target / f"{name}.log").write_bytes(program.log.read_bytes()[since.get(name, 0) :])
