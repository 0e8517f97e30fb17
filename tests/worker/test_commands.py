"""The command line, and the agent as a process."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import isthmus_worker.preflight
from isthmus.wire.problems import ProblemCode
from isthmus_worker.commands import app
from isthmus_worker.journal import Journal
from isthmus_worker.settings import EXAMPLE
from isthmus_worker.state import StateDir
from tests.worker.conftest import credentials_for
from tests.worker.factories import make_offer, make_settings, toml_of, write_patients
from tests.worker.fake_service import FakeService

Run = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def config(tmp_path: Path, service: FakeService) -> Path:
    """A configuration file beside its data."""
    write_patients(tmp_path / "patients.csv")
    path = tmp_path / "worker.toml"
    path.write_text(
        toml_of(make_settings(tmp_path, service_url=service.url, resources={"max_memory_mb": 1500, "idle_s": 0.5}))
    )
    return path


@pytest.fixture
def enrolled(config: Path, service: FakeService) -> Path:
    """The same, enrolled."""
    StateDir.open(config.parent / "state").keep_credentials(credentials_for(service))
    return config


@pytest.fixture
def run() -> Iterator[Run]:
    """Agents as processes, all ended afterwards."""
    running: list[subprocess.Popen[str]] = []

    def start(config: Path) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "ISTHMUS_TEST_SECRET": "s"}
        command = [sys.executable, "-m", "isthmus_worker", "run", "--config", str(config)]
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment))
        return running[-1]

    yield start
    for process in running:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


def _until(condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _resident_mb(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 2**20


def test_the_agent_works_ends_its_idle_child_stays_small_and_stops_at_once(
    enrolled: Path, service: FakeService, run: Run
) -> None:
    offer = make_offer()
    service.offer(offer)
    agent = run(enrolled)
    _until(lambda: offer.task_id in service.updates)
    _until(lambda: not _children(agent.pid))

    assert _resident_mb(agent.pid) < 60
    assert "numpy" not in Path(f"/proc/{agent.pid}/maps").read_text()
    assert service.authorizations == {"Bearer isk_made_up"}

    service.offer(make_offer(number=2))
    _until(lambda: bool(_children(agent.pid)))  # stopped in the middle of a task
    began = time.monotonic()
    agent.send_signal(signal.SIGTERM)
    assert agent.wait(10) == 0
    assert time.monotonic() - began < 15
    assert agent.stderr is not None
    assert "isk_" not in agent.stderr.read()


def test_the_agents_own_process_imports_no_arrays_and_no_command_line() -> None:
    heavy = ("numpy", "torch", "typer", "click", "rich")
    parts = ", ".join(f"isthmus_worker.{name}" for name in ("agent", "connect", "journal", "loop", "trainer"))
    program = f"import sys, {parts}; sys.exit(str([name for name in {heavy} if name in sys.modules]))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False
    )

    assert found.stderr.strip() == "[]"


def test_a_second_agent_on_the_same_state_directory_and_a_revoked_key_end_with_their_own_codes(
    enrolled: Path, service: FakeService, run: Run
) -> None:
    first = run(enrolled)
    _until(lambda: service.claims > 0)
    second = run(enrolled)
    assert second.wait(10) == 4
    service.claim_refusal = ProblemCode.KEY_REVOKED
    assert first.wait(10) == 3
    assert first.stderr is not None
    assert "new enrolment token" in first.stderr.read()


def test_an_agent_that_is_not_enrolled_says_so(config: Path, run: Run) -> None:
    agent = run(config)

    assert agent.wait(10) == 2
    assert agent.stderr is not None
    assert "isthmus-worker enroll" in agent.stderr.read()


def test_enrolment_keeps_its_secrets_for_the_owner_and_happens_once(config: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("iet_token\n")
    arguments = ["enroll", "--config", str(config), "--token-file", str(tmp_path / "token"), "--name", "ward-3"]

    first, second = CliRunner().invoke(app, arguments), CliRunner().invoke(app, arguments)

    assert (first.exit_code, second.exit_code) == (0, 2)
    assert "ward-3 of geneva" in first.output
    assert "enrolled already" in second.output
    state = StateDir(tmp_path / "state")
    assert state.credentials().api_key == "isk_made_up"
    assert (state.root / "credentials.json").stat().st_mode & 0o777 == 0o600


def test_enrolling_again_replaces_the_key_and_keeps_the_account_of_what_left(config: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("iet_token\n")
    arguments = ["enroll", "--config", str(config), "--token-file", str(tmp_path / "token"), "--name"]
    CliRunner().invoke(app, [*arguments, "ward-3"])
    state = StateDir(tmp_path / "state")
    Journal.open(state).close()
    kept = state.holdout_key(), state.journal.read_bytes()
    identity = state.identity().private_bytes_raw()

    again = CliRunner().invoke(app, [*arguments, "ward-4", "--again"])

    assert again.exit_code == 0, again.output
    assert state.credentials().worker == "ward-4"
    assert state.identity().private_bytes_raw() != identity  # the service enrols no public key twice
    assert (state.holdout_key(), state.journal.read_bytes()) == kept


def test_status_tells_who_and_what_without_the_key(enrolled: Path) -> None:
    found = CliRunner().invoke(app, ["status", "--config", str(enrolled), "--json"])

    assert json.loads(found.output)["enrolled"]["organization"] == "geneva"
    assert json.loads(found.output)["last_contact"] is None
    assert "isk_" not in found.output


def test_preflight_looks_at_everything_and_fails_where_something_is_wrong(
    enrolled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = CliRunner().invoke(app, ["preflight", "--config", str(enrolled)])
    (tmp_path / "patients.csv").write_text("age,ill\n1\n")
    monkeypatch.setattr(isthmus_worker.preflight, "_machine", lambda _settings: iter(()))  # torch takes its time
    bad = CliRunner().invoke(app, ["preflight", "--config", str(enrolled)])

    assert good.exit_code == 0, good.output
    for words in (
        "✓ configuration",
        "✓ torch 2",
        "40 records of age number, pressure number?",
        "✓ the service's key",
        "✓ key of worker",
    ):
        assert words in good.output
    assert bad.exit_code == 1
    assert "✗ dataset patients: Some records" in bad.output


def test_a_configuration_that_is_wrong_is_named_on_every_command(tmp_path: Path) -> None:
    (tmp_path / "worker.toml").write_text("service_url = 3\n")

    found = CliRunner().invoke(app, ["status", "--config", str(tmp_path / "worker.toml")])

    assert found.exit_code == 2
    assert "worker.toml: service_url" in found.output


def test_the_example_is_printed_as_it_is() -> None:
    assert CliRunner().invoke(app, ["example-config"]).output == EXAMPLE
