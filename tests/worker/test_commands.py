"""The command line, and the agent as a process."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

import isthmus_worker.preflight
from isthmus.wire.problems import ProblemCode
from isthmus_worker.commands import app
from isthmus_worker.contents import content_of
from isthmus_worker.journal import Journal
from isthmus_worker.ledger import Account, charge_for
from isthmus_worker.settings import EXAMPLE, read_settings
from isthmus_worker.state import StateDir
from tests.worker.conftest import credentials_for
from tests.worker.factories import make_local_spec, make_offer, make_settings, toml_of, write_patients
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


def _served(config: Path) -> tuple[StateDir, str]:
    """What an agent would have left behind after one round: a lineage, a release, its cost and its results."""
    settings = read_settings(config)
    state = StateDir.open(settings.state_dir)
    dataset, offer = settings.datasets[0], make_offer(make_local_spec())
    with closing(Journal.open(state)) as journal:
        lineage = journal.lineages.of(dataset, content_of(dataset.source, None))
        journal.ledgers.note_budget(Account(lineage, dataset.budget))
        journal.pin(offer)
        draft = state.scratch / "upload.safetensors"
        draft.write_bytes(b"noised")
        release = journal.prepare(
            offer, draft, digest="ab" * 32, size_bytes=6, account=Account(lineage, dataset.budget),
            metrics={"train/loss": 0.51, "holdout/examples": 7.0, "holdout/accuracy": 0.857142, "train/examples": 33.0},
        )  # fmt: skip
        journal.mark_released(release)
        journal.connection.execute("UPDATE releases SET state = 'acknowledged', file = NULL")
    return state, lineage


def _said(config: Path, *arguments: str, code: int = 0) -> str:
    found = CliRunner().invoke(app, [*arguments, "--config", str(config)], env={"COLUMNS": "140"})
    assert found.exit_code == code, found.output
    return found.output


def test_status_shows_the_public_key_and_what_is_spent_of_each_budget(enrolled: Path) -> None:
    state, lineage = _served(enrolled)
    key = state.identity().public_key().public_bytes_raw().hex()

    told = json.loads(_said(enrolled, "status", "--json"))
    assert told["public_key"] == key
    (dataset,) = told["datasets"]
    assert (dataset["lineage"], dataset["epsilon"], dataset["delta"], dataset["releases"]) == (lineage, 10.0, 1e-5, 1)
    assert dataset["spent_epsilon"] == charge_for(make_offer(make_local_spec()), lineage).cost.epsilon(1e-5)
    text = _said(enrolled, "status")
    assert f"public key    {key}" in text
    assert f"patients: epsilon {dataset['spent_epsilon']:.4g} of 10 spent (delta 1e-05), 1 releases" in text


def test_the_ledger_is_shown_entry_by_entry(enrolled: Path) -> None:
    _served(enrolled)

    (told,) = json.loads(_said(enrolled, "ledger", "--json"))
    (entry,) = told["entries"]
    told_of = tuple(entry[name] for name in ("sequence", "kind", "mode", "job"))
    assert told_of == (1, "train", "organization-local", "heart")
    assert len(entry["nano"]) == 76
    row = next(line for line in _said(enrolled, "ledger", "patients").splitlines() if "heart" in line)
    assert "organization-local" in row
    assert f"{told['spent_epsilon']:.4g}" in row
    assert json.loads(_said(enrolled, "ledger", "nothing", "--json"))[0]["entries"] == []


def test_results_are_told_by_job_dataset_and_round(enrolled: Path) -> None:
    assert "Nothing was measured here yet" in _said(enrolled, "results")
    _served(enrolled)

    text = _said(enrolled, "results", "heart")
    heading, row = [line for line in text.splitlines() if "holdout/accuracy" in line or "0.8571" in line]
    columns = [cell.strip() for cell in heading.split("┃")[1:-1]]
    cells = [cell.strip() for cell in row.split("│")[1:-1]]
    assert "heart at patients" in text
    assert dict(zip(columns, cells, strict=True)) == {
        "round": "1", "task": "train", "model after round": "0", "holdout/examples": "7", "holdout/accuracy": "0.8571",
        "train/examples": "33", "train/loss": "0.5100",
    }  # fmt: skip
    (told,) = json.loads(_said(enrolled, "results", str(make_offer().job_id), "--json"))
    assert (told["job"], told["dataset"], told["round_number"], told["measured_round"]) == ("heart", "patients", 1, 0)
    assert told["metrics"]["holdout/accuracy"] == 0.857142
    assert json.loads(_said(enrolled, "results", "another", "--json")) == []
    assert "Nothing was measured here for job 'another'" in _said(enrolled, "results", "another")


def test_a_dataset_is_handed_from_worker_to_worker_on_the_command_line(
    enrolled: Path, tmp_path: Path, service: FakeService
) -> None:
    old, lineage = _served(enrolled)
    other = tmp_path / "other"
    other.mkdir()
    config = other / "worker.toml"
    config.write_text(toml_of(make_settings(other, service_url=service.url)))
    new = StateDir.open(other / "state")
    new.keep_credentials(credentials_for(service))
    keys = [state.identity().public_key().public_bytes_raw().hex() for state in (old, new)]
    document = tmp_path / "handover.json"

    with old.locked():
        busy = _said(enrolled, "dataset", "move", "patients", "--to", keys[1], "--output", str(document), code=2)
    assert "another agent holds" in busy
    given = _said(enrolled, "dataset", "move", "patients", "--to", keys[1], "--output", str(document))
    assert f"--from {keys[0]}" in given
    assert document.stat().st_mode & 0o777 == 0o600
    assert "not signed" in _said(config, "dataset", "receive", str(document), "--from", "ab" * 32, code=2)
    assert "with 1 releases" in _said(config, "dataset", "receive", str(document), "--from", keys[0])

    assert f"handed on to the worker {keys[1]}" in _said(enrolled, "status")
    (told,) = json.loads(_said(config, "status", "--json"))["datasets"]
    assert (told["lineage"], told["releases"], told["handed_to"]) == (lineage, 1, None)
    assert told["spent_epsilon"] > 0
    assert "handed on to" in _said(config, "ledger")


def test_an_agent_whose_ledger_was_changed_ends_with_a_code_of_its_own(enrolled: Path, run: Run) -> None:
    state, _lineage = _served(enrolled)
    with closing(Journal.open(state)) as journal:
        journal.connection.execute("UPDATE ledgers SET draws = 0")

    agent = run(enrolled)

    assert agent.wait(20) == 6
    assert agent.stderr is not None
    assert "was changed by hand or is damaged" in agent.stderr.read()


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
        "✓ policy: modes none, record",
        "✓ budget: patients epsilon 10 at delta 1e-05",
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
