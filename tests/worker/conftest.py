"""A worker on a disk of its own, beside a fake service."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from isthmus.client import Client, Retries
from isthmus_worker.journal import Journal
from isthmus_worker.ledger import Account
from isthmus_worker.loop import Agent
from isthmus_worker.settings import Resources, Settings
from isthmus_worker.state import Credentials, StateDir
from isthmus_worker.trainer import Trainer
from tests.worker.factories import LINEAGE, ORGANIZATION, ROWS, make_settings, write_patients
from tests.worker.fake_service import FakeService, fake_service


@pytest.fixture
def service() -> Iterator[FakeService]:
    """A service without tasks."""
    with fake_service() as running:
        yield running


@pytest.fixture
def settings(tmp_path: Path, service: FakeService) -> Settings:
    """The configuration of a worker that serves 40 patients."""
    write_patients(tmp_path / "patients.csv")
    return make_settings(tmp_path, service_url=service.url)


def credentials_for(service: FakeService) -> Credentials:
    """What enrolment would have given."""
    return Credentials(
        service_url=service.url, worker_id="w", worker="w", organization=ORGANIZATION, api_key="isk_made_up",
        service_public_key=service.public_key,
    )  # fmt: skip


@pytest.fixture(scope="session")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    """One child for all tests: importing torch takes longer than they do."""
    shared = Trainer(Resources(max_memory_mb=1500), tmp_path_factory.mktemp("trainer") / "scratch")
    yield shared
    shared.stop()


@pytest.fixture
def agent(settings: Settings, service: FakeService, trainer: Trainer) -> Iterator[Agent]:
    """The agent in this process; its child is a real one."""
    state = StateDir.open(settings.state_dir)
    client = Client(service.url, "isk_made_up", retries=Retries(attempts=1))
    journal = Journal.open(state)
    made = Agent(settings, state, credentials_for(service), client, journal, trainer, sleep=lambda _s: None)
    for dataset in settings.datasets:
        journal.sessions.note_rows(dataset.name, ROWS)
    made._served = [dataset.name for dataset in settings.datasets]
    made._accounts = {dataset.name: Account(LINEAGE, dataset.budget) for dataset in settings.datasets}
    yield made
    made.close()
    journal.close()
    client.close()
