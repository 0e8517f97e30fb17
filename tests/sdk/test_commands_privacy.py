"""What a terminal tells of privacy: a plan before anybody is asked, a report afterwards, a ledger that is checked."""

import json
from pathlib import Path

import pytest
from rich.text import Text

from isthmus.commands.exits import ExitCode
from isthmus.testing import (
    FakeService,
    sample_dataset,
    sample_job,
    sample_ledger,
    sample_report,
)
from isthmus.wire.data import ColumnKind, ColumnSchema, DatasetSchema
from isthmus.wire.datasets import Budget, DatasetState, UsePolicy
from isthmus.wire.ledger import BudgetView, LedgerKind, LedgerPage
from isthmus.wire.privacy import PrivacyMode, PrivacyUnit
from tests.sdk.test_commands import Terminal

JOB = str(sample_job().id)
JOB_FILE = """\
name: heart
model: {{layers: [{{linear: {{in: 2, out: 2}}}}]}}
data: {{task: classification, features: [age, bp], target: disease, classes: 2}}
training: {{optimizer: {{sgd: {{lr: 0.1}}}}}}
privacy: {privacy}
rounds: 20
"""
RECORD = "{unit: record, epsilon: 3, clip_norm: 1.0}"
BUDGET = BudgetView(
    epsilon=10,
    delta=1e-5,
    spent_epsilon=0.5,
    reserved_epsilon=2.5,
    unaccounted_releases=3,
    entries=2,
    closed=False,
)


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def isthmus(service: FakeService, tmp_path: Path) -> Terminal:
    return Terminal(service, tmp_path)


def job_file(tmp_path: Path, privacy: str = RECORD) -> str:
    path = tmp_path / "job.yaml"
    path.write_text(JOB_FILE.format(privacy=privacy))
    return str(path)


def test_a_plan_needs_no_service_where_the_sites_are_given(
    isthmus: Terminal, service: FakeService, tmp_path: Path
) -> None:
    ran = isthmus("privacy", "plan", job_file(tmp_path), "--rows", "303", "--rows", "123", "--budget", "10")
    assert ran.code == ExitCode.OK
    assert service.requests == []
    for told in ("one record", "epsilon 3 at delta 1e-05", "303 rows", "123 rows", "of the clip", "AFTER ROUND"):
        assert told in ran.out
    shown = isthmus("privacy", "plan", job_file(tmp_path), "--rows", "303", "--budget", "10", "--json").json()
    (site,) = shown["datasets"]
    assert site["plan"]["noise_multiplier"] > 1
    assert site["jobs_in_budget"] >= 3
    assert site["epsilon_by_round"][-1][1] == site["plan"]["epsilon"]


def test_a_plan_asks_the_confirmed_datasets_that_fit(isthmus: Terminal, service: FakeService, tmp_path: Path) -> None:
    columns = (ColumnSchema(name="other", kind=ColumnKind.NUMBER),)
    service.answer(
        "GET",
        "/v1/datasets",
        [
            sample_dataset(policy=UsePolicy(purposes=("research",), budget=Budget(epsilon=5))),
            sample_dataset(organization="unfit", data_schema=DatasetSchema(columns=columns)),
            sample_dataset(organization="unconfirmed", state=DatasetState.ANNOUNCED),
        ],
    )
    found = isthmus("privacy", "plan", job_file(tmp_path), "--json").json()
    assert [site["name"] for site in found["datasets"]] == ["charite/heart"]
    assert found["datasets"][0]["jobs_in_budget"] >= 1
    assert {request.method for request in service.requests} == {"GET"}


def test_a_plan_without_any_dataset_says_what_to_do(
    isthmus: Terminal, service: FakeService, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service.answer("GET", "/v1/datasets", [])
    assert isthmus("privacy", "plan", job_file(tmp_path)).code == ExitCode.USAGE
    assert "--rows" in capsys.readouterr().err


def test_epsilon_by_round_is_drawn(isthmus: Terminal, tmp_path: Path) -> None:
    picture = tmp_path / "epsilon.png"
    assert (
        isthmus("privacy", "plan", job_file(tmp_path), "--rows", "303", "--picture", str(picture)).code == ExitCode.OK
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    other = tmp_path / "none.png"
    assert isthmus("privacy", "plan", job_file(tmp_path, "none"), "--rows", "303", "--picture", str(other)).code == 2
    assert not other.exists()


def test_no_privacy_is_shown_in_red(isthmus: Terminal, tmp_path: Path) -> None:
    ran = isthmus("privacy", "plan", job_file(tmp_path, "none"), "--rows", "303", terminal=True)
    assert "\x1b[1;31mNo privacy is claimed" in ran.out
    assert "unit: record" in Text.from_ansi(ran.out).plain


@pytest.mark.parametrize(
    ("privacy", "told"),
    [
        ("{unit: record, epsilon: 0, clip_norm: 1}", "must be at least 0.01"),
        ("{unit: record, epsilon: 1000000000.0, clip_norm: 1}", "must be at most 100"),
        ("{unit: record, epsilon: 3}", "needs a clip_norm"),
        ("{unit: person, epsilon: 3, clip_norm: 1}", "'none', 'record' or 'organization'"),
        ("{epsilon: 3, clip_norm: 1}", "privacy.unit is missing"),
        ("{unit: organization, where: distributed, epsilon: 3, clip_norm: 1}", "write secure_aggregation: true"),
    ],
)
def test_a_section_that_cannot_hold_is_refused_with_its_line(
    isthmus: Terminal, tmp_path: Path, privacy: str, told: str
) -> None:
    ran = isthmus("privacy", "plan", job_file(tmp_path, privacy), "--rows", "303")
    assert ran.code == ExitCode.USAGE
    assert told in ran.err
    assert "job.yaml" in ran.err


def test_a_report_says_the_promise_what_was_spent_and_what_is_not_protected(
    isthmus: Terminal, service: FakeService, tmp_path: Path
) -> None:
    service.answer("GET", f"/v1/jobs/{JOB}/privacy", sample_report())
    ran = isthmus("job", "privacy", JOB)
    for told in ("Nobody can tell", "DP-SGD", "2.999", "1.25", "2.61", "Not protected", "what is true of everybody"):
        assert told in ran.out
    assert isthmus("job", "privacy", JOB, "--json").json()["datasets"][0]["epsilon_spent"] == 1.25


def test_a_report_without_privacy_is_red(isthmus: Terminal, service: FakeService) -> None:
    unbounded = (
        sample_report()
        .datasets[0]
        .model_copy(update={"plan": None, "epsilon_spent": None, "epsilon_person": None, "epsilon_reference": None})
    )
    report = sample_report(unit=PrivacyUnit.NONE, guarantee="No privacy is claimed.", datasets=[unbounded])
    service.answer("GET", f"/v1/jobs/{JOB}/privacy", report)
    ran = isthmus("job", "privacy", JOB, terminal=True)
    assert "\x1b[1;31mNo privacy is claimed." in ran.out
    assert "\x1b[31munbounded" in ran.out


def ledger_of(service: FakeService, entries: list[object], **dataset: object) -> None:
    service.answer("GET", "/v1/datasets", [sample_dataset()])
    service.answer("GET", "/v1/datasets/*", sample_dataset(budget=BUDGET, **dataset))
    page = LedgerPage(items=entries, next_cursor=None, budget=BUDGET)
    service.answer("GET", "/v1/datasets/*/ledger", page)


def test_a_ledger_shows_its_budget_and_every_entry(isthmus: Terminal, service: FakeService) -> None:
    ledger_of(service, [*sample_ledger(LedgerKind.RESERVE, LedgerKind.SPEND)])
    ran = isthmus("dataset", "ledger", "charite/heart")
    assert ran.code == ExitCode.OK
    for told in ("epsilon 10 at delta 1e-05", "epsilon 0.5", "epsilon 2.5", "reserve", "spend", "train", "3 releases"):
        assert told in ran.out
    found = isthmus("dataset", "ledger", "charite/heart", "--json").json()
    assert found["budget"]["epsilon"] == 10
    assert [entry["kind"] for entry in found["entries"]] == ["reserve", "spend"]


def test_a_ledger_whose_entry_was_changed_is_not_shown_as_if_nothing_were(
    isthmus: Terminal, service: FakeService
) -> None:
    first, second, third = sample_ledger(LedgerKind.RESERVE, LedgerKind.SPEND, LedgerKind.REFUND)
    cheaper = second.model_copy(update={"rdp_nano": [1] * len(second.rdp_nano)})
    ledger_of(service, [first, cheaper, third])
    ran = isthmus("dataset", "ledger", "charite/heart")
    assert ran.code == ExitCode.FAILED
    assert "tampered with at entry 2" in ran.err
    assert ran.out == ""
    ledger_of(service, [first, third])
    assert "tampered with at entry 2" in isthmus("dataset", "ledger", "charite/heart").err


def test_a_policy_is_tightened_by_modes_epsilon_and_budget(isthmus: Terminal, service: FakeService) -> None:
    policy = UsePolicy(purposes=("research",), budget=Budget(epsilon=10, delta=1e-6))
    service.answer("GET", "/v1/datasets", [sample_dataset()])
    service.answer("GET", "/v1/datasets/*", sample_dataset(policy=policy))
    service.answer("PUT", "/v1/datasets/*/policy", sample_dataset())
    isthmus(
        "dataset", "policy", "heart", "--mode", "record", "--max-epsilon", "2", "--max-delta", "1e-7", "--budget", "5"
    )
    sent = UsePolicy.model_validate(json.loads(service.requests[-1].body))
    assert sent.modes == (PrivacyMode.RECORD,)
    assert (sent.max_epsilon, sent.max_delta) == (2, 1e-7)
    assert sent.budget == Budget(epsilon=5, delta=1e-6)


def test_a_mode_of_no_privacy_stands_out_in_a_policy(isthmus: Terminal, service: FakeService) -> None:
    service.answer("GET", "/v1/datasets", [sample_dataset()])
    service.answer("GET", "/v1/datasets/*", sample_dataset(policy=UsePolicy(modes=(PrivacyMode.NONE,))))
    assert "\x1b[31mno privacy" in isthmus("dataset", "policy", "heart", terminal=True).out
