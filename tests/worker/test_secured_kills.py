"""An agent as a process of its own, killed by the system at every step of a secured round."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from isthmus.codec.arrays import read
from isthmus.wire.problems import ProblemCode
from isthmus.wire.secured import Step
from isthmus_worker.journal import Journal, key_of
from isthmus_worker.settings import Settings
from isthmus_worker.state import StateDir
from tests.worker.conftest import credentials_for
from tests.worker.factories import toml_of
from tests.worker.fake_service import FakeService
from tests.worker.secured_round import SecuredRound

LONG_S = 60.0

Start = Callable[[], subprocess.Popen[bytes]]


@pytest.fixture
def state(settings: Settings, service: FakeService) -> StateDir:
    """An enrolled worker's."""
    found = StateDir.open(settings.state_dir)
    found.keep_credentials(credentials_for(service))
    return found


@pytest.fixture
def start(settings: Settings, state: StateDir, tmp_path: Path) -> Iterator[Start]:
    """Agents as processes, all ended afterwards."""
    config = tmp_path / "worker.toml"
    config.write_text(toml_of(settings), encoding="utf-8")
    running: list[subprocess.Popen[bytes]] = []

    def begin() -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", "isthmus_worker", "run", "--config", str(config)]
        with (tmp_path / "log").open("ab") as heard:
            running.append(subprocess.Popen(command, stderr=heard, env=environment))
        return running[-1]

    yield begin
    for process in running:
        process.kill()
        process.wait()


def happens(found: Callable[[], bool]) -> None:
    """Wait until something is so."""
    ends = time.monotonic() + LONG_S
    while not found():
        assert time.monotonic() < ends, "it did not happen in time"
        time.sleep(0.01)


@pytest.mark.parametrize("step", list(Step))
def test_killed_at_any_step_the_next_process_finishes_the_same_round(
    service: FakeService, state: StateDir, start: Start, step: Step
) -> None:
    secured = SecuredRound(state.identity().public_key().public_bytes_raw())
    secured.refusals[step] = ProblemCode.NOT_READY
    offer = service.offer_secured(secured)
    first = start()
    happens(lambda: bool(secured.messages(step)))
    first.send_signal(signal.SIGKILL)
    first.wait()
    uploaded = offer.task_id in service.updates
    secured.refusals.clear()
    if not uploaded:
        secured.fence += 1
        service.offer_secured(secured)

    second = start()
    happens(lambda: secured.total is not None)
    happens(lambda: not _secrets(state))
    second.send_signal(signal.SIGTERM)
    assert second.wait(LONG_S) == 0

    for each in Step:
        assert len(set(secured.messages(each))) == 1, each
    journal = Journal.open(state)
    release = journal.find(key_of(offer))
    assert release is not None
    assert release.vector is not None
    assert np.array_equal(secured.mine().view(np.uint32), read(release.vector)["vector"])
    journal.verify()
    journal.close()


def _secrets(state: StateDir) -> bool:
    journal = Journal.look_into(state)
    try:
        return bool(journal.connection.execute("SELECT 1 FROM sessions WHERE secrets IS NOT NULL").fetchone())
    finally:
        journal.close()


def test_an_agent_with_a_parked_secured_task_stays_small_and_without_arrays(
    service: FakeService, state: StateDir, start: Start, settings: Settings
) -> None:
    secured = SecuredRound(state.identity().public_key().public_bytes_raw(), members=6, held={Step.SHARES})
    service.offer_secured(secured)
    agent = start()
    happens(lambda: bool(secured.messages(Step.SHARES)))
    happens(lambda: bool(list(state.releases.iterdir())) and service.claims > 1)

    resident = int(Path(f"/proc/{agent.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 2**20
    assert resident < 60
    assert "numpy" not in Path(f"/proc/{agent.pid}/maps").read_text()
    secured.held.clear()
    happens(lambda: secured.total is not None)
