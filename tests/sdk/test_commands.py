"""The command line: what it prints, what it keeps to itself, and its exit codes."""

import io
import json
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from rich.console import Console

from isthmus.commands import run
from isthmus.commands.credentials import Credentials, NotLoggedIn, current, read_profiles
from isthmus.commands.durations import parse_duration
from isthmus.commands.exits import ExitCode
from isthmus.commands.session import Surroundings
from isthmus.testing import (
    NOW,
    SEED,
    FakeService,
    sample_dataset,
    sample_events,
    sample_id,
    sample_job,
    sample_key,
    sample_me,
    sample_metrics,
    sample_organization,
    sample_participation,
    sample_principal,
    sample_round,
    sample_task,
    sample_worker,
)
from isthmus.wire.data import ColumnKind, ColumnSchema, DatasetSchema
from isthmus.wire.datasets import DatasetState, UsePolicy
from isthmus.wire.events import EventKind
from isthmus.wire.jobs import JobState, ParticipationState
from isthmus.wire.ledger import BudgetView
from isthmus.wire.organizations import ApiKeyIssued, EnrollmentTokenIssued, Role
from isthmus.wire.problems import ProblemCode
from isthmus.wire.rounds import RoundPhase, SiteMetrics, TaskKind, TaskState

JOB = str(sample_job().id)
JOB_FILE = """\
name: heart
model: {layers: [{linear: {in: 2, out: 2}}]}
data: {task: classification, features: [age, bp], target: disease, classes: 2}
training: {optimizer: {sgd: {lr: 0.1}}}
privacy: none
rounds: 2
"""


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)

    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


class Terminal:
    """Runs command lines against a fake service."""

    def __init__(self, service: FakeService, home: Path) -> None:
        self.service = service
        self.environ = {
            "XDG_CONFIG_HOME": str(home),
            "ISTHMUS_URL": "https://isthmus.test",
            "ISTHMUS_API_KEY": "isk_test_key",
        }

    def __call__(self, *arguments: str, terminal: bool = False) -> Ran:
        out, err = io.StringIO(), io.StringIO()
        around = Surroundings(
            environ=self.environ,
            transport=self.service,
            out=Console(file=out, width=200, highlight=False, markup=False, force_terminal=terminal or None),
            err=Console(file=err, width=200, highlight=False, markup=False),
            now=lambda: NOW,
        )
        code = run(arguments, around)
        return Ran(code, out.getvalue(), err.getvalue())


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def isthmus(service: FakeService, tmp_path: Path) -> Terminal:
    return Terminal(service, tmp_path)


@pytest.fixture
def job_file(tmp_path: Path) -> str:
    path = tmp_path / "job.yaml"
    path.write_text(JOB_FILE)
    return str(path)


def issued() -> ApiKeyIssued:
    return ApiKeyIssued(**sample_key().model_dump(), key="isk_k1_secret")


# --- Logging in ------------------------------------------------------------------------------------------------------


def test_login_checks_the_key_and_keeps_it_where_nobody_else_reads(
    isthmus: Terminal, service: FakeService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.answer("GET", "/v1/me", sample_me())
    isthmus.environ = {"XDG_CONFIG_HOME": str(tmp_path)}
    monkeypatch.setattr("sys.stdin", io.StringIO("isk_k1_typed\n"))
    ran = isthmus("login", "https://isthmus.test/")

    assert ran.code == ExitCode.OK
    assert "ada (Ada)" in ran.out
    assert "isk_k1_typed" not in ran.out + ran.err
    path = tmp_path / "isthmus" / "credentials.toml"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert read_profiles(path) == {"default": Credentials("https://isthmus.test", "isk_k1_typed")}

    assert isthmus("whoami").code == ExitCode.OK
    assert service.requests[-1].headers["authorization"] == "Bearer isk_k1_typed"
    assert isthmus("logout").code == ExitCode.OK
    assert isthmus("whoami").code == ExitCode.NOT_ALLOWED


def test_profiles_live_side_by_side(isthmus: Terminal, service: FakeService, tmp_path: Path) -> None:
    service.answer("GET", "/v1/me", sample_me())
    isthmus.environ = {"XDG_CONFIG_HOME": str(tmp_path)}
    isthmus("login", "https://one.test", "--key", 'k"1\\')
    isthmus("login", "https://two.test", "--key", "k2", "--profile", "two")
    assert isthmus("--profile", "two", "whoami", "--json").code == ExitCode.OK
    assert service.requests[-1].headers["authorization"] == "Bearer k2"
    isthmus.environ["ISTHMUS_PROFILE"] = "default"
    isthmus("whoami")
    assert service.requests[-1].headers["authorization"] == 'Bearer k"1\\'


def test_a_wrong_key_is_not_kept(isthmus: Terminal, service: FakeService, tmp_path: Path) -> None:
    service.refuse("GET", "/v1/me", ProblemCode.UNAUTHENTICATED)
    ran = isthmus("login", "https://isthmus.test", "--key", "isk_wrong")
    assert ran.code == ExitCode.NOT_ALLOWED
    assert "isthmus login URL" in ran.err
    assert not (tmp_path / "isthmus").exists()


def test_a_credentials_file_that_others_read_is_refused(
    isthmus: Terminal, service: FakeService, tmp_path: Path
) -> None:
    service.answer("GET", "/v1/me", sample_me())
    isthmus("login", "https://isthmus.test", "--key", "k")
    (tmp_path / "isthmus" / "credentials.toml").chmod(0o644)
    isthmus.environ = {"XDG_CONFIG_HOME": str(tmp_path)}
    ran = isthmus("whoami")
    assert ran.code == ExitCode.USAGE
    assert "chmod 600" in ran.err


def test_a_stored_key_goes_to_no_other_address(isthmus: Terminal, service: FakeService, tmp_path: Path) -> None:
    service.answer("GET", "/v1/me", sample_me())
    isthmus("login", "https://isthmus.test", "--key", "k")
    environ = {"XDG_CONFIG_HOME": str(tmp_path), "ISTHMUS_URL": "https://other.test"}
    with pytest.raises(NotLoggedIn, match="set ISTHMUS_API_KEY too"):
        current(environ, "default")
    assert current({**environ, "ISTHMUS_API_KEY": "n"}, "default") == Credentials("https://other.test", "n")
    assert "key=..." in repr(Credentials("u", "secret"))


# --- Exit codes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "code", "hint"),
    [
        (ProblemCode.KEY_EXPIRED, ExitCode.NOT_ALLOWED, "has expired"),
        (ProblemCode.FORBIDDEN, ExitCode.NOT_ALLOWED, "isthmus whoami"),
        (ProblemCode.NOT_FOUND, ExitCode.NOT_FOUND, ""),
        (ProblemCode.JOB_NOT_DRAFT, ExitCode.REFUSED, ""),
        (ProblemCode.MODEL_MISSING, ExitCode.REFUSED, "isthmus job submit"),
        (ProblemCode.INTERNAL, ExitCode.FAILED, "log"),
        (ProblemCode.TOO_MANY_REQUESTS, ExitCode.UNREACHABLE, "Try again"),
    ],
)
def test_a_refusal_has_an_exit_code_and_a_hint(
    isthmus: Terminal, service: FakeService, problem: ProblemCode, code: ExitCode, hint: str
) -> None:
    service.refuse("POST", f"/v1/jobs/{JOB}/start", problem, headers={"Retry-After": "60"})
    ran = isthmus("job", "start", JOB, "--json")
    assert ran.code == code
    assert ran.out == ""
    assert hint in ran.err


def test_a_service_that_is_down_is_named(isthmus: Terminal) -> None:
    isthmus.service = None  # type: ignore[assignment]  # through the network
    isthmus.environ["ISTHMUS_URL"] = "http://127.0.0.1:9"
    ran = isthmus("job", "list")
    assert ran.code == ExitCode.UNREACHABLE
    assert "http://127.0.0.1:9" in ran.err
    assert "Is it running" in ran.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["jobb"],
        ["job", "show", "not-an-id"],
        ["job", "show"],
        ["org", "create", "Not A Name"],
        ["key", "create", "--expires-in", "soon"],
        ["job", "submit", "/nonexistent.yaml"],
        ["dataset", "policy", "heart", "--min-cohort", "1"],
        ["login", "not-an-address", "--key", "k"],
    ],
)
def test_a_wrong_command_line_is_told_as_such(
    isthmus: Terminal, service: FakeService, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    service.answer("GET", "/v1/datasets", [sample_dataset()])
    service.answer("GET", "/v1/datasets/*", sample_dataset())
    ran = isthmus(*arguments)
    assert ran.code == ExitCode.USAGE
    assert ran.err or capsys.readouterr().err
    assert ran.out == ""


def test_a_bug_is_one_sentence_unless_the_details_are_asked_for(
    isthmus: Terminal, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_request: object) -> Any:
        raise KeyError("oops")

    service.answer("GET", "/v1/me", broken)
    ran = isthmus("whoami")
    assert ran.code == ExitCode.FAILED
    assert "ISTHMUS_DEBUG=1" in ran.err
    isthmus.environ["ISTHMUS_DEBUG"] = "1"
    with pytest.raises(KeyError):
        isthmus("whoami")


def test_the_entry_point_runs_as_a_process() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", "from isthmus.commands import main; main()", "--version"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert ran.stdout.startswith("isthmus ")


# --- Nouns -----------------------------------------------------------------------------------------------------------


def test_every_command_takes_json(isthmus: Terminal) -> None:
    from isthmus.commands.app import app

    def check(typer_app: typer.Typer) -> int:
        count = 0
        for command in typer_app.registered_commands:
            assert command.callback is not None
            assert "as_json" in command.callback.__annotations__, command.callback
            count += 1
        return count + sum(check(group.typer_instance) for group in typer_app.registered_groups if group.typer_instance)

    assert check(app) >= 35


def test_an_organization_by_name_is_looked_up_and_by_id_is_not(isthmus: Terminal, service: FakeService) -> None:
    service.answer("GET", "/v1/me", sample_me(Role.ADMIN))
    service.answer("GET", "/v1/organizations", [sample_organization(), sample_organization("ucl", id=sample_id(9))])
    service.answer("GET", "/v1/organizations/*", sample_organization("ucl"))
    assert isthmus("org", "show", "ucl", "--json").json()["name"] == "ucl"
    assert service.requests[-1].path.endswith(str(sample_id(9)))
    before = len(service.requests)
    isthmus("org", "show", str(sample_id(77)))
    assert [request.path for request in service.requests[before:]] == [f"/v1/organizations/{sample_id(77)}"]
    assert isthmus("org", "show", "nobody").code == ExitCode.NOT_FOUND


def test_an_ambiguous_name_asks_for_the_id(isthmus: Terminal, service: FakeService) -> None:
    service.answer("GET", "/v1/workers", [sample_worker(), sample_worker(organization="ucl", id=sample_id(9))])
    service.answer("GET", "/v1/workers/*", sample_worker())
    ran = isthmus("worker", "show", "agent-1")
    assert ran.code == ExitCode.USAGE
    assert str(sample_id(9)) in ran.err
    assert isthmus("worker", "show", "ucl/agent-1").code == ExitCode.OK


def test_a_stewards_token_is_for_the_own_organization(isthmus: Terminal, service: FakeService) -> None:
    token = EnrollmentTokenIssued(
        id=sample_id(1), organization_id=sample_id(1), organization="charite", token="ist_once", expires_at=NOW
    )
    service.answer("GET", "/v1/me", sample_me(Role.STEWARD))
    service.answer("POST", "/v1/organizations/*/enrollment-tokens", token)
    ran = isthmus("org", "enrollment-token", "--expires-in", "2h")
    assert "ist_once" in ran.out
    assert service.requests[-1].json() == {"expires_in_s": 7200}
    assert service.requests[-1].path == f"/v1/organizations/{sample_id(1)}/enrollment-tokens"


def test_a_principal_can_come_with_its_first_key(isthmus: Terminal, service: FakeService) -> None:
    service.answer("GET", "/v1/me", sample_me(Role.ADMIN))
    service.answer("GET", "/v1/organizations", [sample_organization()])
    service.answer("POST", "/v1/principals", sample_principal(Role.STEWARD))
    service.answer("POST", "/v1/api-keys", issued())
    ran = isthmus("principal", "create", "grace", "--role", "steward", "--organization", "charite", "--key", "--json")
    assert ran.json()["key"]["key"] == "isk_k1_secret"
    assert service.requests[-2].json()["organization_id"] == str(sample_id(1))
    assert service.requests[-1].json()["principal_id"] == str(sample_id(2))


def test_keys_are_issued_rotated_and_revoked(isthmus: Terminal, service: FakeService) -> None:
    service.answer("POST", "/v1/api-keys", issued())
    service.answer("GET", "/v1/api-keys", [sample_key()])
    service.answer("POST", "/v1/api-keys/*/rotate", issued())
    service.answer("POST", "/v1/api-keys/*/revoke", sample_key(revoked_at=NOW))
    assert "isk_k1_secret" in isthmus("key", "create", "--scope", "jobs:read", "--expires-in", "30d").out
    assert service.requests[-1].json()["scopes"] == ["jobs:read"]
    assert service.requests[-1].json()["expires_in_s"] == 30 * 86400
    assert "secret" not in isthmus("key", "list").out
    isthmus("key", "rotate", "k1", "--overlap", "1h")
    assert service.requests[-1].json() == {"overlap_s": 3600}
    assert "2026-01-31" in isthmus("key", "revoke", "k1").out


def test_a_column_of_arrays_is_shown_with_their_shape(isthmus: Terminal, service: FakeService) -> None:
    scans = ColumnSchema(name="scan", kind=ColumnKind.TENSOR, shape=(3, 32, 64))
    label = ColumnSchema(name="label", kind=ColumnKind.NUMBER)
    service.answer("GET", "/v1/datasets", [sample_dataset()])
    service.answer("GET", "/v1/datasets/*", sample_dataset(data_schema=DatasetSchema(columns=(scans, label))))

    lines = isthmus("dataset", "show", "heart").out.splitlines()

    assert ["tensor 3 x 32 x 64" in line for line in lines if "scan" in line] == [True]
    assert ["tensor" in line for line in lines if "label" in line] == [False]


@pytest.mark.parametrize("state", DatasetState)
def test_a_steward_is_told_of_another_lineage_and_what_confirming_does(
    isthmus: Terminal, service: FakeService, state: DatasetState
) -> None:
    budget = BudgetView(
        epsilon=8, delta=1e-5, spent_epsilon=2.5, reserved_epsilon=3, unaccounted_releases=4, entries=9, closed=False
    )
    shown = sample_dataset(state=state, lineage="5e" * 32, budget=budget)
    service.answer("GET", "/v1/datasets", [shown])
    service.answer("GET", "/v1/datasets/*", shown)

    told = " ".join(isthmus("dataset", "show", "heart").out.split())

    for sentence in (
        "announced another lineage (5e5e5e5e5e5e, before 1e1e1e1e1e1e)",
        "Spent before: epsilon 2.5 of 8, and 4 releases of jobs without privacy.",
        "`--other-records` has it begin anew",
    ):
        assert (sentence in told) == (state is not DatasetState.CONFIRMED)
    assert ("the budget was kept" in told) == (state is DatasetState.CONFIRMED)


def test_nobody_is_told_of_a_lineage_that_is_the_ledger_s(isthmus: Terminal, service: FakeService) -> None:
    for shown in (sample_dataset(), sample_dataset(lineage="", ledger_lineage="")):
        service.answer("GET", "/v1/datasets", [shown])
        service.answer("GET", "/v1/datasets/*", shown)
        assert "lineage" not in isthmus("dataset", "show", "heart").out


@pytest.mark.parametrize("flags", [(), ("--other-records",)], ids=str)
def test_a_budget_begins_anew_only_on_demand(isthmus: Terminal, service: FakeService, flags: tuple[str, ...]) -> None:
    service.answer("GET", "/v1/datasets", [sample_dataset()])
    service.answer("POST", "/v1/datasets/*/confirm", sample_dataset())

    isthmus("dataset", "confirm", "heart", *flags)

    assert service.requests[-1].json() == {"other_records": bool(flags)}


def test_a_policy_changes_by_clauses_or_as_a_whole(isthmus: Terminal, service: FakeService, tmp_path: Path) -> None:
    service.answer("GET", "/v1/datasets", [sample_dataset()])
    service.answer("GET", "/v1/datasets/*", sample_dataset(policy=UsePolicy(purposes=("research",), min_cohort=5)))
    required = sample_dataset(policy=UsePolicy(require_secure_aggregation=True))
    service.answer("PUT", "/v1/datasets/*/policy", sample_dataset(), required)
    assert re.search("secure aggregation +not required", isthmus("dataset", "policy", "charite/heart").out)
    assert service.requests[-1].method == "GET"
    isthmus("dataset", "policy", "heart", "--exact-metrics", "--approve-by-rule", "--researcher", "ada")
    sent = UsePolicy.model_validate(service.requests[-1].json())
    assert not sent.require_secure_aggregation
    assert (sent.min_cohort, sent.allow_exact_metrics, sent.principals) == (5, True, ("ada",))
    assert sent.automatic_approval is not None
    told = isthmus("dataset", "policy", "heart", "--require-secure-aggregation").out
    assert re.search("secure aggregation +required", told)
    assert service.requests[-1].json()["require_secure_aggregation"] is True
    path = tmp_path / "policy.yaml"
    path.write_text("purposes: [audit]\n")
    isthmus("dataset", "policy", "heart", "--file", str(path))
    assert service.requests[-1].json() == UsePolicy(purposes=("audit",)).model_dump(mode="json")
    assert isthmus("dataset", "policy", "heart", "--file", str(path), "--min-cohort", "3").code == ExitCode.USAGE


def test_a_participation_goes_by_its_dataset_where_one_is_open(isthmus: Terminal, service: FakeService) -> None:
    pending = sample_participation(ParticipationState.PENDING)
    done = sample_participation(ParticipationState.REJECTED, id=sample_id(60))
    service.answer("GET", "/v1/participations", [pending, done])
    service.answer("POST", "/v1/participations/*/*", sample_participation())
    isthmus("participation", "approve", "charite/heart", "--rounds", "5")
    assert service.requests[-1].path == f"/v1/participations/{pending.id}/approve"
    assert service.requests[-1].json()["rounds"] == 5
    isthmus("participation", "withdraw", str(sample_id(6)), "--note", "no more")
    assert service.requests[-1].json() == {"note": "no more"}
    assert isthmus("participation", "reject", "charite/heart").code == ExitCode.USAGE, "a note is required"


@pytest.mark.parametrize("noun", ["org", "principal", "worker", "dataset", "participation", "job"])
def test_lists_are_tables_or_one_array(isthmus: Terminal, service: FakeService, noun: str) -> None:
    evil = "x[red]\x1b[31m"
    service.answer("GET", "/v1/organizations", [sample_organization(display_name=evil)])
    service.answer("GET", "/v1/principals", [sample_principal(display_name=evil)])
    service.answer("GET", "/v1/workers", [sample_worker(version=evil)])
    service.answer("GET", "/v1/datasets", [sample_dataset(worker=evil)])
    service.answer("GET", "/v1/participations", [sample_participation(detail=evil)])
    service.answer("GET", "/v1/jobs", [sample_job(owner=evil)])
    table = isthmus(noun, "list")
    assert table.code == ExitCode.OK
    assert "\x1b" not in table.out
    assert "x[red]\\x1b[31m" in table.out
    assert isinstance(isthmus(noun, "list", "--json").json(), list)


# --- Jobs ------------------------------------------------------------------------------------------------------------


def test_submitting_prints_the_job(isthmus: Terminal, service: FakeService, job_file: str, tmp_path: Path) -> None:
    model = tmp_path / "m.safetensors"
    model.write_bytes(b"own")
    service.answer("POST", "/v1/jobs", sample_job(JobState.DRAFT))
    service.answer("PUT", "/v1/jobs/*/model", sample_job(JobState.DRAFT))
    service.answer("POST", "/v1/jobs/*/start", sample_job(JobState.AWAITING_APPROVAL))
    ran = isthmus("job", "submit", job_file, "--model", str(model), "--json")
    assert ran.code == ExitCode.OK
    assert ran.json()["state"] == "awaiting_approval"
    assert service.requests[1].body == b"own"
    assert JOB in isthmus("job", "submit", job_file, "--model", str(model), "--draft").out
    assert service.requests[-1].path.endswith("/model")


def test_a_wrong_job_file_lists_its_mistakes_and_sends_nothing(
    isthmus: Terminal, service: FakeService, tmp_path: Path
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(JOB_FILE.replace("lr: 0.1", "lr: 0").replace("rounds: 2", "rounds: none"))
    ran = isthmus("job", "submit", str(path), "--json")
    assert ran.code == ExitCode.USAGE
    assert "training.optimizer.sgd.lr: must be greater than 0 (line 4)" in ran.err
    assert "rounds: must be a whole number (line 6)" in ran.err
    assert service.requests == []


def test_an_upload_that_fails_names_the_draft(
    isthmus: Terminal, service: FakeService, job_file: str, tmp_path: Path
) -> None:
    service.answer("POST", "/v1/jobs", sample_job(JobState.DRAFT))
    service.refuse("PUT", "/v1/jobs/*/model", ProblemCode.TENSORS_MISMATCH, "No 0.weight.")
    ran = isthmus("job", "submit", job_file, "--model", job_file)
    assert ran.code == ExitCode.REFUSED
    assert "No 0.weight." in ran.err
    assert JOB in ran.err


def finished(service: FakeService, state: JobState = JobState.COMPLETED) -> None:
    kinds = {JobState.COMPLETED: EventKind.JOB_COMPLETED, JobState.FAILED: EventKind.JOB_FAILED}
    done = sample_job(state, rounds_completed=2, detail="Two are one too few.", ended_at=NOW)
    service.answer("GET", "/v1/jobs/*", sample_job(), done)
    service.answer("GET", "/v1/jobs/*/participations", [sample_participation()])
    for number in (1, 2):
        completed = sample_round(
            RoundPhase.COMPLETED,
            number=number,
            accepted=3,
            completed_at=NOW,
            metrics={"holdout/loss": 0.5, "holdout/accuracy": 0.75},
        )
        service.answer("GET", f"/v1/jobs/*/rounds/{number}", completed)
    site = SiteMetrics(organization="charite", dataset="heart", metrics={"holdout/accuracy": 0.8125})
    final = sample_metrics(3, kind=TaskKind.EVALUATE, measured_round=2, sites=[site])
    service.answer("GET", "/v1/jobs/*/metrics", [sample_metrics(1), sample_metrics(2), final])
    service.stream(
        "/v1/jobs/*/events",
        list(sample_events(EventKind.JOB_STARTED, EventKind.ROUND_OPENED, EventKind.ROUND_COMPLETED, kinds[state])),
    )


def test_watching_without_a_terminal_prints_lines(isthmus: Terminal, service: FakeService) -> None:
    finished(service)
    ran = isthmus("job", "watch", JOB)
    assert ran.code == ExitCode.OK
    assert "12:00:00 round-opened" in ran.out
    assert "round 2/2  updates 3/3  seconds 0  loss 0.5  accuracy 0.75" in ran.out
    assert "charite/heart" in ran.out
    assert "0.8125" in ran.out
    assert "\x1b" not in ran.out


def test_watching_on_a_terminal_ends_with_the_sites(isthmus: Terminal, service: FakeService) -> None:
    finished(service)
    ran = isthmus("job", "watch", JOB, terminal=True)
    assert ran.code == ExitCode.OK
    assert "approved: charite (grace)" in ran.out
    assert "The final model at each site" in ran.out


def test_watching_for_machines_gives_a_line_for_each_event(isthmus: Terminal, service: FakeService) -> None:
    finished(service)
    lines = isthmus("job", "watch", JOB, "--json").lines()
    assert [line["event"]["kind"] for line in lines[:-1]] == [
        "job-started", "round-opened", "round-completed", "job-completed",
    ]  # fmt: skip
    assert lines[-1]["job"]["id"] == JOB


def test_a_watched_job_that_fails_has_its_own_exit_code(isthmus: Terminal, service: FakeService) -> None:
    finished(service, JobState.FAILED)
    ran = isthmus("job", "watch", JOB)
    assert ran.code == ExitCode.JOB_UNSUCCESSFUL
    assert "Two are one too few." in ran.out


def test_an_interrupted_watch_says_that_the_job_goes_on(
    isthmus: Terminal, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("isthmus.commands.jobs.watch", interrupt)
    ran = isthmus("job", "watch", JOB)
    assert ran.code == ExitCode.INTERRUPTED
    assert f"isthmus job watch {JOB}" in ran.err


def test_showing_a_job_says_what_it_waits_for(isthmus: Terminal, service: FakeService) -> None:
    tasks = [sample_task(TaskState.OFFERED), sample_task(TaskState.REFUSED, "ucl", detail="policy says no")]
    service.answer("GET", "/v1/jobs/*", sample_job())
    service.answer("GET", "/v1/jobs/*/participations", [sample_participation()])
    service.answer("GET", "/v1/jobs/*/rounds/1", sample_round(tasks=tasks))
    ran = isthmus("job", "show", JOB)
    assert "is its worker running?" in ran.out
    assert "ucl/heart refused this round: policy says no" in ran.out
    report = isthmus("job", "show", JOB, "--json").json()
    assert set(report) == {"job", "participations", "round", "waits_for"}


def test_a_download_is_a_model_and_what_it_is(isthmus: Terminal, service: FakeService, tmp_path: Path) -> None:
    from hashlib import sha256

    digest = sha256(b"model").hexdigest()
    service.answer("GET", "/v1/jobs/*", sample_job(JobState.COMPLETED, model_digest=digest))
    service.answer("GET", "/v1/jobs/*/metrics", [sample_metrics()])
    service.answer("GET", f"/v1/checkpoints/{digest}", b"model")
    ran = isthmus("job", "download", JOB, str(tmp_path / "out"), "--json")
    assert ran.json()["digest"] == digest
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"model"
    about = json.loads((tmp_path / "out" / "model.json").read_text())
    assert about["digest"] == digest
    assert about["spec"]["seed"] == SEED
    assert about["metrics"][0]["round_number"] == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.json", "model.safetensors"]


def test_metrics_and_events_are_told(isthmus: Terminal, service: FakeService) -> None:
    finished(service)
    assert "HOLDOUT/LOSS" in isthmus("job", "metrics", JOB).out
    assert "charite/heart" in isthmus("job", "metrics", JOB, "--sites").out
    assert "    2 12:00:00 round-opened" in isthmus("job", "events", JOB, "--after", "1").out
    assert [line["sequence"] for line in isthmus("job", "events", JOB, "--json", "--follow").lines()] == [1, 2, 3, 4]


@pytest.mark.parametrize("verb", ["start", "pause", "resume", "cancel"])
def test_the_life_of_a_job(isthmus: Terminal, service: FakeService, verb: str) -> None:
    service.answer("POST", f"/v1/jobs/*/{verb}", sample_job(JobState.PAUSED))
    assert isthmus("job", verb, JOB, "--json").json()["state"] == "paused"


# --- Parts -----------------------------------------------------------------------------------------------------------


def extend(monkeypatch: pytest.MonkeyPatch, name: str, load: Callable[[], object]) -> None:
    class Loaded(EntryPoint):
        def load(self) -> Any:
            return load()

    found = EntryPoints([Loaded(name, "some:thing", "isthmus.commands")])
    monkeypatch.setattr("isthmus.commands.extensions.entry_points", lambda group: found)


def test_other_distributions_bring_commands(
    isthmus: Terminal, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def audit(job: str) -> None:
        """Replay it."""
        typer.echo(f"audited {job}")

    extend(monkeypatch, "audit", lambda: audit)
    assert isthmus("audit", "x").code == ExitCode.OK
    assert "audited x" in capsys.readouterr().out
    isthmus("--help")
    assert "Replay it." in capsys.readouterr().out

    group = typer.Typer()
    group.command("one")(lambda: typer.echo("one"))
    group.command("two")(lambda: typer.echo("two"))
    extend(monkeypatch, "simulate", lambda: group)
    assert isthmus("simulate", "two").code == ExitCode.OK
    assert "two" in capsys.readouterr().out


def test_a_broken_extension_stops_only_itself(
    isthmus: Terminal, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise ImportError("no torch here")

    extend(monkeypatch, "simulate", broken)
    assert isthmus("--help").code == ExitCode.OK
    ran = isthmus("simulate")
    assert ran.code == ExitCode.FAILED
    assert "no torch here" in ran.err


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("15m", 900), ("1d12h", 129600), ("2W", 1209600)])
def test_spans_are_read(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "d", "1 d", "-1d", "1y", "1d,2h", "9999999999s"])
def test_other_spans_are_not(text: str) -> None:
    with pytest.raises(ValueError, match="span"):
        parse_duration(text)
