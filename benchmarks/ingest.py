"""What it costs to take in an update, and to hand out a model: the real service beside plain sockets and SHA-256.

An update goes through our own client's `submit_update`: admission in one transaction, the body judged as it arrives
(SHA-256, header, every element finite, its norm), synced, renamed, the directory synced, the receipt in a second
transaction. The same server and route without the checks runs as a second process on the same database
(`benchmarks.unchecked_service`); the plain socket sends a file to a process that writes and syncs it.
"""

import hashlib
import multiprocessing
import os
import shutil
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from benchmarks.federation import DEFAULTS, database, ending_on_signals, trivial_job
from benchmarks.processes import cpu_s, forget_peak, peak_mb, resident_mb
from benchmarks.tables import Report, Spread, arguments
from isthmus.client import Client
from isthmus.client.tasks import NoWork
from isthmus.codec import arrays
from isthmus.wire.data import ColumnKind, ColumnSchema, DatasetSchema
from isthmus.wire.organizations import CreateOrganization, Role
from isthmus.wire.rounds import ClaimTask, TaskOffer
from tests.acceptance.island import POLICY, Island, Program, free_port, island, until
from tests.running import announcement, introduction

SITES: Final = 5
LOCAL: Final[dict[str, Any]] = {"holdout": 0, "release": "local"}
PIECE_BYTES: Final = 1 << 20
DATA: Final = DatasetSchema(
    columns=(ColumnSchema(name="age", kind=ColumnKind.NUMBER), ColumnSchema(name="disease", kind=ColumnKind.NUMBER))
)


@dataclass
class Samples:
    """Seconds, and CPU seconds of the server's process, of one way to move the same bytes."""

    seconds: list[float] = field(default_factory=list)
    server_cpu_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Server:
    """One process of the service, with a client for each worker."""

    name: str
    pid: int
    clients: tuple[Client, ...]


def main() -> None:
    """Measure what the command line asks for."""
    parser = arguments("ingest", __doc__)
    parser.add_argument("--size", type=float, default=100.0, help="MB of 10^6 bytes of the model (default: 100)")
    parser.add_argument("--rounds", type=int, default=4, help=f"{SITES} updates each (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where everything is kept meanwhile (default: the system's own)")
    options = parser.parse_args()
    with ExitStack() as stack:
        stack.enter_context(ending_on_signals())
        folder = Path(tempfile.mkdtemp(prefix="isthmus-benchmark-", dir=options.folder))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        url, _ = stack.enter_context(database(folder / "postgres"))
        opened = stack.enter_context(island(folder / "island", url, **DEFAULTS, ISTHMUS_COORDINATE="false"))
        Ingest(opened, stack, options.size).measure(options.rounds).finish(options.json)


class Ingest:
    """Sites that hand in one and the same update, round after round, to servers in turn."""

    def __init__(self, opened: Island, stack: ExitStack, size_mb: float) -> None:
        self._island, self._stack = opened, stack
        self._folder = opened.folder
        opened.researcher = None
        first = self._program("service", "app", "serve", "--no-migrate", port=urlsplit(opened.url).port or 0)
        opened.service = first
        first.start()
        until(opened._ready, "the service is ready")
        opened.researcher = opened._principal("ada", Role.RESEARCHER)
        self._keys = [self._enrol(number) for number in range(SITES)]
        self.checked = self._serves("the service", opened.url, first)
        self.unchecked = self._second("without checks", "benchmarks.unchecked_service")
        coordinator = self._program("coordinator", "app", "coordinate")
        coordinator.start()
        stack.callback(coordinator.kill)
        self._size_mb = size_mb
        self._update: Path | None = None
        self._digest = ""

    def _enrol(self, number: int) -> str:
        island = self._island
        name = f"clinic-{number}"
        organization = island.admin.organizations.create(CreateOrganization(name=name, display_name=name))
        steward = island._principal(f"{name}-steward", Role.STEWARD, organization.id)
        token = island.admin.organizations.issue_enrollment_token(organization.id).token
        with Client(island.url) as nobody:
            signing = Ed25519PrivateKey.generate()
            key = nobody.workers.enroll(introduction(token, name, key=signing)).api_key
        with Client(island.url, key) as worker:
            told = announcement(signing, name, "patients", rows=100, columns=DATA.columns)
            dataset = worker.datasets.announce("patients", told)
        steward.datasets.set_policy(dataset.id, POLICY)
        steward.datasets.confirm(dataset.id)
        return key

    def _program(self, name: str, module: str, *words: str, port: int = 0) -> Program:
        environment = {
            **self._island.service._environment,
            "ISTHMUS_PORT": str(port),
            "PYTHONPATH": os.pathsep.join(
                [str(Path(__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
            ),
        }
        return Program(name, [sys.executable, "-m", module, *words], self._folder, environment)

    def _second(self, name: str, module: str) -> Server:
        port = free_port()
        program = self._program(name, module, "serve", "--no-migrate", port=port)
        program.start()
        self._stack.callback(program.kill)
        url = f"http://127.0.0.1:{port}"

        def ready() -> bool:
            assert program.runs, program.log.read_text()[-3000:]
            with Client(url, self._keys[0]) as client:
                return bool(client.me())

        until(lambda: _quietly(ready), f"{name} is ready")
        return self._serves(name, url, program)

    def _serves(self, name: str, url: str, program: Program) -> Server:
        assert program.process is not None
        return Server(
            name, program.process.pid, tuple(self._stack.enter_context(Client(url, key)) for key in self._keys)
        )

    def measure(self, rounds: int) -> Report:
        """Take all samples and report."""
        self._island.submit(trivial_job(self._size_mb, rounds + 2, SITES, evaluation=LOCAL))
        offers = self._claim()
        self._make_update(offers[0])
        assert self._update is not None
        report = Report("ingest", f"One update of {self._size_mb:g} MB, durable", ["what", "s", "MB/s", "of", "share"])
        together = self._together(offers)  # first, on a service that has done nothing yet
        ways = {name: Samples() for name in (self.checked.name, self.unchecked.name, "socket", "sha256")}
        down = {name: Samples() for name in ("download", "socket")}
        with raw_receiver(self._folder / "received") as send:
            send(self._update)  # the first time makes the file
            self._sequential(self._claim(), {})
            for number in range(rounds):
                offers = self._claim()
                self._downloads(offers, down, send)
                self._sequential(offers, ways, reverse=number % 2 == 1)
                for _ in range(2):
                    ways["socket"].seconds.append(send(self._update))
                    ways["sha256"].seconds.append(_seconds(lambda: _sha256(self._update)))
        self._rows(report, ways)
        report.section(
            f"The model of {self._size_mb:g} MB to one worker, durable there", ["what", "s", "MB/s", "share"]
        )
        floor = statistics.median(down["socket"].seconds)
        for name, samples in down.items():
            spread = Spread.of(samples.seconds)
            report.row(name, spread, round(self._size_mb / spread.median), floor / spread.median)
        report.section(
            f"{SITES} updates of {self._size_mb:g} MB at once", ["server", "s", "MB/s", "idle MB", "peak MB above idle"]
        )
        report.row(*together)
        return report

    def _rows(self, report: Report, ways: dict[str, Samples]) -> None:
        medians = {name: statistics.median(samples.seconds) for name, samples in ways.items()}
        for name, samples in ways.items():
            spread = Spread.of(samples.seconds)
            for other in (self.unchecked.name, "socket") if name == self.checked.name else ("",):
                share = medians[other] / medians[name] if other else None
                report.row(name, spread, round(self._size_mb / spread.median), other or None, share)
        for name in (self.checked.name, self.unchecked.name):
            cpu = statistics.median(ways[name].server_cpu_s)
            report.note(f"{name}: {cpu:.3f} CPU seconds of the server's process for one update.")
        report.note("share: throughput divided by that of the way named under `of`.")

    def _claim(self) -> list[TaskOffer]:
        """The next round's offers, once it is open: the coordinator has done its work then."""
        offers = []
        for client in self.checked.clients:
            offer = client.tasks.claim(ClaimTask(), wait_s=60)
            assert not isinstance(offer, NoWork), "no round was opened in time"
            offers.append(offer)
        time.sleep(0.3)
        return offers

    def _make_update(self, offer: TaskOffer) -> None:
        random = np.random.default_rng(5)
        tensors = {
            name: random.standard_normal(spec.shape, dtype=np.float32) * np.float32(1e-3)
            for name, spec in offer.upload_manifest.tensors.items()
        }
        self._update = self._folder / "update.safetensors"
        self._digest = arrays.write(self._update, tensors)

    def _hand_in(self, client: Client, offer: TaskOffer) -> float:
        update = self._update
        assert update is not None
        return _seconds(
            lambda: client.tasks.submit_update(
                offer.task_id, update, digest=self._digest, fence=offer.fence, on_admitted=lambda: None
            )
        )

    def _sequential(self, offers: list[TaskOffer], ways: dict[str, Samples], *, reverse: bool = False) -> None:
        for number, offer in enumerate(offers):
            server = (self.checked, self.unchecked)[(number + reverse) % 2]
            before = cpu_s([server.pid])
            seconds = self._hand_in(server.clients[number], offer)
            if ways:
                ways[server.name].seconds.append(seconds)
                ways[server.name].server_cpu_s.append(cpu_s([server.pid]) - before)

    def _downloads(self, offers: list[TaskOffer], down: dict[str, Samples], send: Callable[[Path], float]) -> None:
        for client, offer in list(zip(self.checked.clients, offers, strict=True))[:2]:
            target = self._folder / "model.safetensors"
            down["download"].seconds.append(
                _seconds(lambda c=client, o=offer, t=target: c.tasks.download_model(o.model, t))  # type: ignore[misc]
            )
            down["socket"].seconds.append(send(target))

    def _together(self, offers: list[TaskOffer]) -> tuple[str, float, int, float, float]:
        pid = self.checked.pid
        time.sleep(1)
        idle_mb = resident_mb(pid)
        forget_peak(pid)
        threads = [
            threading.Thread(target=self._hand_in, args=pair) for pair in zip(self.checked.clients, offers, strict=True)
        ]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took_s = time.perf_counter() - began
        return self.checked.name, took_s, round(SITES * self._size_mb / took_s), idle_mb, peak_mb(pid) - idle_mb


@contextmanager
def raw_receiver(target: Path) -> Iterator[Callable[[Path], float]]:
    """A process that writes what a socket brings to `target` and syncs it; how to send it a file, and how long it took.

    The target is removed before every file: a new file is written, as the service does.
    """
    with socket.create_server(("127.0.0.1", 0)) as listening:
        process = multiprocessing.get_context("spawn").Process(
            target=_receive, args=(listening.getsockname()[1], str(target)), daemon=True
        )
        process.start()
        connection, _ = listening.accept()

        def send(source: Path) -> float:
            target.unlink(missing_ok=True)

            def once() -> None:
                with source.open("rb") as file:
                    connection.sendall(os.fstat(file.fileno()).st_size.to_bytes(8, "big"))
                    connection.sendfile(file)
                assert connection.recv(1) == b"!"

            return _seconds(once)

        try:
            yield send
        finally:
            connection.close()
            process.join(5)
            process.kill()
            process.join()


def _receive(port: int, target: str) -> None:
    connection = socket.create_connection(("127.0.0.1", port))
    buffer = memoryview(bytearray(PIECE_BYTES))
    while head := connection.recv(8, socket.MSG_WAITALL):
        left = int.from_bytes(head, "big")
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        while left:
            got = connection.recv_into(buffer, min(left, PIECE_BYTES))
            if not got:
                return
            os.write(descriptor, buffer[:got])
            left -= got
        os.fsync(descriptor)
        os.close(descriptor)
        connection.sendall(b"!")


def _sha256(path: Path | None) -> None:
    """One core's SHA-256 over a file in the page cache."""
    assert path is not None
    with path.open("rb", buffering=0) as file:
        hashlib.file_digest(file, "sha256")


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _quietly(call: Callable[[], bool]) -> bool:
    try:
        return call()
    except Exception:
        return False


if __name__ == "__main__":
    main()
