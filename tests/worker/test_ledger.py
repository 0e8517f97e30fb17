"""The worker's own ledger: what it refuses whatever the service says, and that nobody changes it unseen."""

import json
import sqlite3
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from isthmus.privacy.cost import Cost, Limit, fits
from isthmus.privacy.planning import grant_cost, round_cost
from isthmus.wire.datasets import Budget
from isthmus.wire.jobs import JobSpec
from isthmus.wire.rounds import TaskOffer
from isthmus_worker.journal import Journal, Release, ReleaseState, key_of
from isthmus_worker.ledger import (
    Account,
    BudgetRefused,
    LedgerDamaged,
    accounts,
    budget_objections,
    charge_for,
)
from isthmus_worker.settings import CsvSettings, DatasetSettings
from isthmus_worker.state import StateDir
from tests.worker.factories import (
    ACCOUNT,
    LINEAGE,
    make_local_spec,
    make_offer,
    make_record_spec,
)

SPEC = make_record_spec()
CENTRAL = make_local_spec(
    privacy={"unit": "organization", "where": "central", "clip_norm": 1.0, "noise_multiplier": 2.0}
)


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    """An empty state directory."""
    return StateDir.open(tmp_path / "state")


@pytest.fixture
def journal(state: StateDir) -> Journal:
    """Its journal."""
    return Journal.open(state)


def _prepare(journal: Journal, state: StateDir, offer: TaskOffer, account: Account = ACCOUNT) -> Release:
    content = f"{offer.participation_id} {offer.round_number}".encode()
    draft = state.scratch / "upload.safetensors"
    draft.write_bytes(content)
    return journal.prepare(
        offer, draft, digest=sha256(content).hexdigest(), size_bytes=len(content), metrics={}, account=account
    )


def _release(journal: Journal, state: StateDir, offer: TaskOffer, account: Account = ACCOUNT) -> None:
    assert journal.ledger_objections(offer, 1000, account) == []
    journal.pin(offer)
    journal.mark_released(_prepare(journal, state, offer, account))


def _other(offer: TaskOffer, number: int) -> TaskOffer:
    """The same offer, of another job."""
    return offer.model_copy(update={"job_id": UUID(int=100 + number), "participation_id": UUID(int=200 + number)})


@pytest.mark.parametrize("spec", [SPEC, CENTRAL, make_local_spec(), make_record_spec(
    evaluation={"holdout": 0.2, "every": 2, "release": "noised"})])  # fmt: skip
def test_all_releases_of_a_job_cost_what_its_grant_does_and_no_more(
    journal: Journal, state: StateDir, spec: JobSpec
) -> None:
    first = 0 if spec.measures_statistics else 1
    for number in range(first, spec.rounds + 2):
        _release(journal, state, make_offer(spec, number), Account(LINEAGE, Budget(epsilon=50)))

    offer = make_offer(spec)
    assert offer.plan is not None
    elements = offer.model_manifest.averaged_elements
    whole = grant_cost(spec, offer.plan, elements, spec.rounds, ledger=True)
    assert journal.ledgers.total(LINEAGE).cost == whole
    claimed = journal.ledgers.claimed(str(offer.participation_id))
    assert claimed == grant_cost(spec, offer.plan, elements, spec.rounds)
    assert claimed.epsilon(offer.plan.delta) == offer.plan.epsilon
    journal.verify()


def test_noise_that_the_service_adds_once_hides_a_record_half_as_well_and_is_charged_so(journal: Journal) -> None:
    offer = make_offer(CENTRAL)
    assert offer.plan is not None
    charge = charge_for(offer, LINEAGE)

    assert charge.event == {"kind": "gaussian", "noise_multiplier": 2.0, "sensitivity": 2.0}
    assert charge.claimed == round_cost(CENTRAL, offer.plan, 1, charge.elements)
    assert charge.cost.nano > charge.claimed.nano


def test_jobs_together_never_pass_the_budget_however_many_the_service_approves(
    journal: Journal, state: StateDir
) -> None:
    account = Account(LINEAGE, Budget(epsilon=4.0))
    offer, done = make_offer(SPEC), 0
    while done < 50 and not journal.ledger_objections(_other(offer, done), 1000, account):
        _release(journal, state, _other(offer, done), account)
        done += 1

    assert 2 < done < 50
    found = journal.ledger_objections(_other(offer, done), 1000, account)
    assert len(found) == 1
    assert found[0].startswith("budget: by this worker's own ledger epsilon")
    assert "of 4 (at delta 1e-05) is spent of these records, and round 1 would make it 4." in found[0]
    limit = Limit.of(4.0, 1e-5)
    total = journal.ledgers.total(LINEAGE).cost
    assert fits(total, limit)
    assert not fits(total + charge_for(offer, LINEAGE).cost, limit)
    with pytest.raises(BudgetRefused, match="own ledger"):  # and once more, where it was computed all the same
        _prepare(journal, state, _other(offer, done), account)
    assert {*state.releases.iterdir()} == {one.path for one in journal._releases("file IS NOT NULL")}
    assert not list(state.scratch.iterdir())


def test_what_was_asked_for_and_never_answered_counts_as_spent(journal: Journal, state: StateDir) -> None:
    offer = make_offer(SPEC)
    cost = charge_for(offer, LINEAGE).cost
    account = Account(LINEAGE, Budget(epsilon=cost.epsilon(1e-5) * 1.05))
    release = _prepare(journal, state, offer, account)
    assert journal.ledger_objections(_other(offer, 1), 9, account) == []  # only prepared: nothing was spent

    journal.note_asking(release, unanswered=True)

    assert journal.spent(LINEAGE) == cost
    assert "budget:" in journal.ledger_objections(_other(offer, 1), 9, account)[0]
    assert journal.ledger_objections(offer, 9, account) == []  # the same bytes again cost nothing more
    journal.mark_released(release)
    assert journal.spent(LINEAGE) == cost
    assert journal.ledger_objections(offer, 9, account) == []
    assert journal.ledger_objections(offer, 9, Account(LINEAGE, None)) == []


def test_a_job_never_costs_more_than_it_claims_whatever_rounds_are_offered(journal: Journal, state: StateDir) -> None:
    spec = make_record_spec(rounds=2, evaluation={"holdout": 0.2, "every": 1, "release": "noised"})
    for number in (0, 1, 2, 3):
        _release(journal, state, make_offer(spec, number))
    fourth = make_offer(spec, 2).model_copy(update={"round_number": 17})

    found = journal.ledger_objections(fourth, 1000, ACCOUNT)

    assert len(found) == 1
    assert found[0].startswith("budget: with round 17 the job would have cost epsilon 3.0")
    assert "it claims 2.99" in found[0]


def test_a_dataset_without_a_budget_releases_nothing_that_is_claimed_to_be_private(journal: Journal) -> None:
    closed = Account(LINEAGE, None)

    assert "no privacy budget" in journal.ledger_objections(make_offer(SPEC), 9, closed)[0]
    assert journal.ledger_objections(make_offer(), 9, closed) == []  # claims nothing: the policy's modes decide
    assert journal.ledger_objections(make_offer(SPEC, 4), 9, closed) == []  # results stay here: nothing leaves


def test_what_no_budget_bounds_is_counted_beside_it(journal: Journal, state: StateDir) -> None:
    for number in (0, 1):
        _release(journal, state, make_offer(number=number))

    total = journal.ledgers.total(LINEAGE)
    assert (total.cost, total.unaccounted, total.entries) == (Cost.zero(), 2, 2)
    assert [entry.plain["mode"] for entry in journal.ledgers.entries(LINEAGE)] == ["none", "none"]


def test_a_plan_that_changes_in_mid_job_is_another_participation(journal: Journal) -> None:
    offer = make_offer(SPEC)
    assert offer.plan is not None
    journal.pin(offer)
    more = offer.plan.model_copy(update={"noise_multiplier": 50.0})

    found = journal.ledger_objections(offer.model_copy(update={"plan": more}), 9, ACCOUNT)

    assert "another privacy plan" in found[0]


def test_datasets_of_the_same_records_share_the_smallest_budget() -> None:
    def dataset(name: str, budget: Budget | None) -> DatasetSettings:
        return DatasetSettings(name=name, source=CsvSettings(path=Path("p.csv")), budget=budget)

    found = accounts(
        [
            (dataset("a", Budget(epsilon=5, delta=1e-6)), "l1"),
            (dataset("b", Budget(epsilon=3, delta=1e-5)), "l1"),
            (dataset("c", None), "l1"),
            (dataset("d", Budget(epsilon=9)), "l2"),
        ]
    )

    shared = Budget(epsilon=3, delta=1e-6)
    assert {name: account.budget for name, account in found.items()} == {
        "a": shared, "b": shared, "c": None, "d": Budget(epsilon=9),
    }  # fmt: skip


def _body_of(journal: Journal, number: int) -> dict[str, Any]:
    return journal.ledgers.entries(LINEAGE)[number - 1].plain


def _change(statement: str, *values: object) -> Callable[[Journal], None]:
    return lambda journal: journal.connection.execute(statement, values) and None


def _cheaper(journal: Journal) -> None:
    body = {**_body_of(journal, 2), "nano": [0] * 76}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    journal.connection.execute("UPDATE ledger_entries SET body = ? WHERE sequence = 2", (text,))


@pytest.mark.parametrize(
    ("tamper", "word"),
    [
        (_cheaper, "entry 2 does not have the hash"),
        (_change("DELETE FROM ledger_entries WHERE sequence = 2"), "entry 2 is missing"),
        (_change("DELETE FROM ledger_entries WHERE sequence = 3"), "its sum"),
        (_change("UPDATE ledgers SET draws = draws - 1"), "its sum"),
        (_change("UPDATE ledgers SET head = ?", "0" * 64), "its sum"),
        (_change("DELETE FROM ledgers"), "its sum"),
        (
            lambda journal: journal.connection.executescript("DELETE FROM ledgers; DELETE FROM ledger_entries"),
            "the entry of round 0 of job 'heart' is missing",
        ),
    ],
)
def test_a_ledger_that_was_changed_by_hand_is_found_at_the_start(
    journal: Journal, state: StateDir, tamper: Callable[[Journal], object], word: str
) -> None:
    for number in (0, 1, 2):
        _release(journal, state, make_offer(SPEC, number))
    journal.verify()
    journal.connection.executescript("DROP TRIGGER entries_stay; DROP TRIGGER entries_remain")

    tamper(journal)

    with pytest.raises(LedgerDamaged, match=word):
        Journal.open(state).verify()


@pytest.mark.parametrize("statement", ["UPDATE ledger_entries SET body = '{}'", "DELETE FROM ledger_entries"])
def test_the_database_itself_refuses_to_change_an_entry(journal: Journal, state: StateDir, statement: str) -> None:
    _release(journal, state, make_offer(SPEC))

    with pytest.raises(sqlite3.IntegrityError, match="entries of a ledger are never"):
        journal.connection.execute(statement)


def test_a_spend_that_cannot_be_written_leaves_the_release_unreleased(
    journal: Journal, state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = _prepare(journal, state, make_offer(SPEC))
    real = journal.ledgers.append
    assert journal.ledgers.claimed(release.key.participation_id) == Cost.zero()

    def full(*given: Any) -> None:
        real(*given)
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(journal.ledgers, "append", full)
    with pytest.raises(sqlite3.OperationalError):
        journal.mark_released(release)

    found = journal.find(release.key)
    assert found is not None
    assert found.state is ReleaseState.PREPARED
    assert journal.ledgers.claimed(release.key.participation_id) == Cost.zero()
    assert (journal.ledgers.total(LINEAGE).entries, journal.ledgers.entries(LINEAGE)) == (0, [])


OLD_SCHEMA = """
CREATE TABLE participations (
    participation_id TEXT PRIMARY KEY, job_id TEXT NOT NULL, dataset TEXT NOT NULL, spec_digest TEXT NOT NULL,
    job_seed TEXT NOT NULL, statistics_digest TEXT, seen_at TEXT NOT NULL, UNIQUE (dataset, job_id)
) STRICT;
CREATE TABLE releases (
    id INTEGER PRIMARY KEY,
    participation_id TEXT NOT NULL, round_number INTEGER NOT NULL,
    model_digest TEXT NOT NULL, spec_digest TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('statistics', 'train', 'evaluate')),
    state TEXT NOT NULL CHECK (state IN ('prepared', 'released', 'acknowledged', 'discarded')),
    job TEXT NOT NULL, dataset TEXT NOT NULL, task_id TEXT NOT NULL, fence INTEGER NOT NULL,
    digest TEXT NOT NULL, size_bytes INTEGER NOT NULL, unanswered INTEGER NOT NULL DEFAULT 0, file TEXT,
    clip_norm REAL, noise_multiplier REAL NOT NULL,
    prepared_at TEXT NOT NULL, released_at TEXT, acknowledged_at TEXT, discarded_at TEXT, note TEXT, receipt TEXT
) STRICT;
INSERT INTO participations VALUES ('p', 'j', 'patients', 's', 'seed', NULL, '2026-01-01');
INSERT INTO releases (participation_id, round_number, model_digest, spec_digest, kind, state, job, dataset, task_id,
    fence, digest, size_bytes, unanswered, file, noise_multiplier, prepared_at)
    VALUES ('p', 1, 'm', 's', 'train', 'acknowledged', 'old', 'patients', 't', 1, 'd', 9, 0, NULL, 0.5, '2026-01-01'),
           ('p', 2, 'm', 's', 'train', 'prepared', 'old', 'patients', 't', 1, 'd', 9, 1, 'gone', 0.5, '2026-01-01');
"""


def test_a_journal_of_an_earlier_version_keeps_its_rows_and_goes_on(state: StateDir) -> None:
    with sqlite3.connect(state.journal) as old:
        old.executescript(OLD_SCHEMA)

    journal = Journal.open(state)
    journal.verify()
    journal.recover()  # counts what was asked for as released, without a charge that nobody knows
    assert journal.counts() == {"prepared": 0, "released": 1, "acknowledged": 1, "discarded": 0}
    _release(journal, state, make_offer(SPEC))
    Journal.open(state).verify()

    assert [row["mode"] for row in journal.spends()] == [None, "record"]
    assert journal.ledgers.total(LINEAGE).entries == 1


def test_a_charge_is_compared_with_a_limit_to_the_unit() -> None:
    """At the very limit a release fits; with a billionth less at every order it does not."""
    offer = make_offer(SPEC)
    charge, limit = charge_for(offer, LINEAGE), Limit.of(2.0, 1e-5)
    room = tuple(max(0, allowed - own) for allowed, own in zip(limit.nano, charge.cost.nano, strict=True))
    budget = Budget(epsilon=2.0)
    spent = Cost(room, 0)

    def found(spent: Cost) -> list[str]:
        return budget_objections(offer, charge, budget, spent=spent, claimed=Cost.zero())

    assert found(spent) == []
    assert len(found(Cost(tuple(value + 1 for value in room), 0))) == 1


def test_a_release_is_found_again_by_its_key_after_its_entry_was_written(journal: Journal, state: StateDir) -> None:
    offer = make_offer(SPEC)
    _release(journal, state, offer)
    body, release = _body_of(journal, 1), journal.find(key_of(offer))

    assert release is not None
    assert (body["digest"], body["round_number"], body["kind"], body["job_id"]) == (
        release.digest, 1, "train", str(offer.job_id),
    )  # fmt: skip
    assert body["mode"] == "record"
    assert body["event"]["event"]["sampling_probability"] == 0.25
