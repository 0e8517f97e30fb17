"""The parts of the demo put together: a service, four organizations with their workers, and everybody's keys."""

import random
import socket
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self
from uuid import UUID

from examples.heart import database
from examples.heart.hospitals import DATASET, HOSPITALS, RESEARCHER, Hospital, Site, furnish, use_policy
from examples.heart.processes import SERVICE, ProcessDied, Processes, command
from examples.heart.stage import undisturbed
from isthmus.client import Client
from isthmus.wire.datasets import DatasetState, DatasetView
from isthmus.wire.jobs import JobSpec
from isthmus.wire.organizations import CreateApiKey, CreateOrganization, CreatePrincipal, Role

HOST: Final = "127.0.0.1"
PORTS: Final = range(20_000, 32_000)
"""Below those that systems give to outgoing connections: what is free now still is when the service listens."""


@dataclass
class Federation:
    """A running service and who takes part. Leaving it ends every process, unless they are to be kept."""

    folder: Path
    processes: Processes
    url: str = ""
    sites: list[Site] = field(default_factory=list)
    keys: dict[str, str] = field(default_factory=dict)
    """Name of a principal -> its API key."""
    kept: bool = False
    _organizations: dict[str, UUID] = field(default_factory=dict)
    _clients: ExitStack = field(default_factory=ExitStack)
    _connected: dict[str, Client] = field(default_factory=dict)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with undisturbed():
            died = self._who_died() if isinstance(error, Exception) else None
            self._clients.close()
            if not self.kept:
                self.processes.stop()
                database.clear(self.folder)
        if died is not None and died is not error:
            raise died from error  # the cause of whatever we have noticed of it

    def start_service(self) -> None:
        """Start the service on a free port of this machine; it takes a few seconds until it answers."""
        port = free_port()
        self.url = f"http://{HOST}:{port}"
        environment = {
            "ISTHMUS_HOST": HOST,
            "ISTHMUS_PORT": str(port),
            "ISTHMUS_DATA_DIR": str(self._service),
            **database.settings_for(self.folder),
        }
        self._service.mkdir(mode=0o700)
        self.processes.start(
            SERVICE, [command("isthmus-server"), "serve"], folder=self._service, environment=environment
        )

    def await_service(self) -> None:
        """Wait until the service can work, and take the first admin's key."""
        self.processes.await_that(self._is_ready, "the service is ready")
        self.keys["admin"] = (self._service / "admin.key").read_text().strip()

    def admit(self, hospitals: Sequence[Hospital] = HOSPITALS) -> None:
        """What an admin does: an organization and a steward for each hospital, and a researcher of none."""
        for hospital in hospitals:
            body = CreateOrganization(name=hospital.name, display_name=hospital.title)
            self._organizations[hospital.name] = self.client("admin").organizations.create(body).id
            self._principal(hospital.steward, f"Steward of {hospital.short}", Role.STEWARD, hospital.name)
        self._principal(RESEARCHER, "Researcher", Role.RESEARCHER)

    def start_workers(self, spec: JobSpec, hospitals: Sequence[Hospital] = HOSPITALS) -> None:
        """What the hospitals do: a folder with their own rows, a worker enrolled with a one-time token, and started."""
        for hospital in hospitals:
            site = furnish(hospital, self.folder, service_url=self.url, spec=spec)
            token = self.client(hospital.steward).organizations.issue_enrollment_token(
                self._organizations[hospital.name]
            )
            words: list[str | Path] = [
                "enroll",
                "--config",
                site.config,
                "--name",
                f"{hospital.name}-worker",
                "--token-file",
                "-",
            ]
            self.processes.start(
                f"{hospital.name}-enroll", [command("isthmus-worker"), *words], folder=site.folder, text=token.token
            )
            self.sites.append(site)
        for site in self.sites:
            name = site.hospital.name
            self.processes.await_end(f"{name}-enroll")
            self.processes.start(name, [command("isthmus-worker"), "run", "--config", site.config], folder=site.folder)

    def open_datasets(self) -> list[DatasetView]:
        """What the stewards do once their workers have announced the data: confirm it, and say what it is for."""
        opened = []
        for site in self.sites:
            steward = self.client(site.hospital.steward)
            found: list[DatasetView] = []

            def is_announced(steward: Client = steward, found: list[DatasetView] = found) -> bool:
                found.extend(view for view in steward.datasets.list() if view.name == DATASET)
                return bool(found)

            self.processes.await_that(is_announced, f"{site.hospital.name} announces its data")
            if found[0].state is DatasetState.ANNOUNCED:
                steward.datasets.confirm(found[0].id)
            opened.append(steward.datasets.set_policy(found[0].id, use_policy(found[0].announced_policy)))
        return opened

    def client(self, principal: str) -> Client:
        """A client with a principal's key."""
        if principal not in self._connected:
            client = Client(self.url, self.keys[principal])
            self._connected[principal] = self._clients.enter_context(client)
        return self._connected[principal]

    def _who_died(self) -> ProcessDied | None:
        try:
            self.processes.require_all()
        except ProcessDied as died:
            return died
        return None

    @property
    def _service(self) -> Path:
        return self.folder / SERVICE

    def _is_ready(self) -> bool:
        import httpx  # noqa: PLC0415 - loaded by our client anyway

        try:
            return httpx.get(f"{self.url}/readyz", timeout=5.0).is_success
        except httpx.TransportError:
            return False

    def _principal(self, name: str, title: str, role: Role, organization: str | None = None) -> None:
        admin = self.client("admin")
        of = None if organization is None else self._organizations[organization]
        principal = admin.principals.create(
            CreatePrincipal(name=name, display_name=title, role=role, organization_id=of)
        )
        self.keys[name] = admin.keys.create(CreateApiKey(principal_id=principal.id, label="demo")).key


def free_port(ports: Iterable[int] = PORTS) -> int:
    """A port of this machine that nobody listens on."""
    for port in random.sample(list(ports), k=100):
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise OSError(f"No free port was found on {HOST}.")
