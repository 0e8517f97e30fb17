"""What a worker remembers of secured rounds over attempts, restarts and versions, and what it must not keep."""

import logging
import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID

import pytest

import tests.worker.fake_service as fake_service_module
from isthmus.privacy.cost import Cost, Limit, fits
from isthmus.secagg.client import Keyed
from isthmus.secagg.roster import Member, Roster
from isthmus.wire.datasets import Budget
from isthmus.wire.problems import ProblemCode
from isthmus.wire.rounds import TaskOffer
from isthmus.wire.secured import Step
from isthmus_worker.journal import KEEP_BYTES, Journal, Release, ReleaseState, key_of
from isthmus_worker.ledger import Account, charge_for
from isthmus_worker.loop import Agent, Outcome
from isthmus_worker.secured.checks import other_sum_objections, summed_of
from isthmus_worker.secured.records import Sessions, session_key
from tests.worker.factories import DATASET, DISTRIBUTED, LINEAGE, ORGANIZATION, make_offer, make_secured_spec
from tests.worker.fake_service import FakeService
from tests.worker.secured_round import SecuredRound
from tests.worker.stepping import finish, identity_of, reborn, until

DECLARED = {"strategy": {"fedavg": {"weights": "declared"}}}


def release_of(agent: Agent, offer: TaskOffer) -> Release:
    found = agent.journal.find(key_of(offer))
    assert found is not None
    return found


def is_on_disk(root: Path, secrets: bytes) -> bool:
    return any(secrets in path.read_bytes() for path in root.glob("journal.sqlite*"))


# --- Two sums of one round --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "leaving"),
    [
        ({"basel": 80, ORGANIZATION: 40}, {"basel": 80, ORGANIZATION: 60}, frozenset[str]()),
        ({"basel": 80, "chur": 40}, {"basel": 80, "chur": 60}, frozenset[str]()),
        ({"basel": 80}, {"basel": 160}, frozenset({"basel"})),
    ],
    ids=["its own", "another's", "the largest, of one who has left"],
)
def test_once_shares_are_revealed_a_later_attempt_in_which_somebody_counts_otherwise_is_not_signed(
    agent: Agent,
    service: FakeService,
    caplog: pytest.LogCaptureFixture,
    before: dict[str, int],
    after: dict[str, int],
    leaving: frozenset[str],
) -> None:
    """The same survivors twice: what changed between the two sums is the update of whoever's weight did."""
    agent.journal.sessions.note_rows(DATASET, 60)  # it was announced with 60 records as well
    first = SecuredRound(identity_of(agent), make_secured_spec(**DECLARED), members=6, weights=before, leaving=leaving)
    service.offer_secured(first)
    assert Outcome.SUMMED in finish(agent, service)

    other = first.next_attempt(weights=after)
    service.offer_secured(other)
    finish(agent, service)

    assert other.messages(Step.SURVIVORS) == other.messages(Step.UNMASK) == []
    assert other.total is None
    reasons = " ".join(str(getattr(record, "reason", "")) for record in caplog.records)
    assert "another key or weight or for another largest weight" in reasons
    assert agent.journal.sessions.find(session_key(other.offer())) is None

    same = other.next_attempt(weights=before)
    service.offer_secured(same)
    assert Outcome.SUMMED in finish(agent, service)


def test_a_sum_of_members_with_another_key_is_another_sum() -> None:
    members = [Member(name, DATASET, bytes([number]) * 32, 1) for number, name in enumerate(("basel", "chur", "jena"))]
    stolen = [*members[:2], Member("jena", DATASET, bytes([9]) * 32, 1)]

    def told(of: list[Member], survivors: tuple[int, ...] = (0, 1, 2)) -> str:
        return summed_of(cast(Keyed, SimpleNamespace(roster=Roster(of))), survivors)

    assert other_sum_objections([told(members)], told(members)) == []
    assert len(other_sum_objections([told(members)], told(stolen))) == 1
    assert other_sum_objections([told(members, (0, 1))], told(stolen, (0, 1))) == []  # whoever is not in it


# --- What it counts as spent ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [ProblemCode.ROUND_NOT_COLLECTING, ProblemCode.LEASE_LOST])
def test_spread_noise_whose_masked_bytes_left_is_charged_whatever_the_service_answers_then(
    agent: Agent, service: FakeService, monkeypatch: pytest.MonkeyPatch, code: ProblemCode
) -> None:
    """It has the bytes; with the others' shares it may open a sum that they are in."""

    def refuse_the_body(handler: Any) -> None:
        handler.rfile.read(int(handler.headers["Content-Length"]))
        handler._refuse(code)

    spec = make_secured_spec(**DISTRIBUTED)
    first = SecuredRound(identity_of(agent), spec)
    offer = service.offer_secured(first)
    cost = charge_for(offer, LINEAGE).cost
    with monkeypatch.context() as patched:
        patched.setattr(fake_service_module._Handler, "do_PUT", refuse_the_body)
        finish(agent, service)
    assert len(service.admitted) == 1
    assert agent.journal.spent(LINEAGE) == cost
    service.admission = ProblemCode.ROUND_NOT_COLLECTING

    again = reborn(agent)
    try:
        service.offer_secured(first.next_attempt())  # admitted again? no: but the first bytes are still there
        finish(again, service)
        assert release_of(again, offer).state is ReleaseState.PREPARED
        assert again.journal.spent(LINEAGE) == cost

        service.offer_secured(SecuredRound(identity_of(again), spec, number=2))
        finish(again, service)
        assert again.journal.ledgers.total(LINEAGE).cost == cost
        again.journal.verify()
    finally:
        again.close()
        again.journal.close()


def test_spread_noise_that_was_refused_before_a_byte_left_costs_nothing(agent: Agent, service: FakeService) -> None:
    service.admission = ProblemCode.ROUND_NOT_COLLECTING
    service.offer_secured(SecuredRound(identity_of(agent), make_secured_spec(**DISTRIBUTED)))

    finish(agent, service)

    assert agent.journal.spent(LINEAGE) == Cost.zero()


def test_what_waits_for_its_others_leaves_no_room_in_the_budget_for_more_than_there_is(
    agent: Agent, service: FakeService
) -> None:
    spec = make_secured_spec(**DISTRIBUTED)
    one = charge_for(make_offer(spec), LINEAGE).cost
    budget = Budget(epsilon=(one + one).epsilon(1e-5) * 1.01, delta=1e-5)  # two of them
    account = agent._accounts[DATASET] = Account(LINEAGE, budget)
    rounds = [
        SecuredRound(
            identity_of(agent), spec, held={Step.SHARES},
            changes={"job_id": UUID(int=300 + job), "participation_id": UUID(int=400 + job)},
        )
        for job in range(3)
    ]  # fmt: skip
    offers = [service.offer_secured(secured) for secured in rounds]

    until(agent, lambda: bool(service.refused))

    assert service.refused[0].startswith("budget: by this worker's own ledger")
    assert len(agent._secured.held()) == 2
    assert agent.journal.spent(LINEAGE) == one + one
    for offer in offers[:2]:  # each of the two still fits beside the other, and is not counted twice
        assert agent.journal.ledger_objections(offer, 9, account) == []
    for secured in rounds:
        secured.held.clear()
    finish(agent, service)
    total = agent.journal.ledgers.total(LINEAGE)
    assert (total.cost, total.entries) == (one + one, 2)
    assert fits(agent.journal.spent(LINEAGE), Limit.of(budget.epsilon, budget.delta))


def test_what_waited_and_is_over_is_free_again_and_in_the_way_of_no_later_round_of_its_own(
    agent: Agent, service: FakeService
) -> None:
    spec = make_secured_spec(**DISTRIBUTED)
    one = charge_for(make_offer(spec), LINEAGE).cost
    account = agent._accounts[DATASET] = Account(LINEAGE, Budget(epsilon=one.epsilon(1e-5) * 1.01, delta=1e-5))
    secured = SecuredRound(identity_of(agent), spec, held={Step.SHARES})
    offer = service.offer_secured(secured)
    assert agent.step() is Outcome.PARKED
    another = make_offer(spec, job_id=UUID(int=50), participation_id=UUID(int=51))
    later = SecuredRound(identity_of(agent), spec, number=2).offer()
    assert "budget:" in agent.journal.ledger_objections(another, 9, account)[0]
    assert agent.journal.ledger_objections(later, 9, account) == []  # with it, the vector of round 1 is given up

    agent.journal.sessions.end(session_key(offer), "its round is over")

    assert agent.journal.spent(LINEAGE) == Cost.zero()
    assert agent.journal.ledger_objections(another, 9, account) == []


# --- What must not stay on the disk -----------------------------------------------------------------------------------


def test_while_somebody_reads_the_journal_deleted_secrets_stay_in_its_log_and_are_gone_soon_after(
    agent: Agent, service: FakeService
) -> None:
    secured = SecuredRound(identity_of(agent), held={Step.UPDATE})
    offer = service.offer_secured(secured)
    until(agent, lambda: bool(secured.messages(Step.UPDATE)))
    secrets = agent.journal.sessions.get(session_key(offer)).secrets
    reader = Journal.look_into(agent.state)
    reader.connection.execute("BEGIN")
    assert reader.connection.execute("SELECT count(*) FROM sessions").fetchone() == (1,)
    secured.held.clear()
    finish(agent, service)
    assert agent.journal.sessions.find(session_key(offer)) is None
    assert is_on_disk(agent.state.root, secrets)  # the reader still needs it
    reader.close()

    assert agent.step(1) is Outcome.IDLE

    assert not is_on_disk(agent.state.root, secrets)


def test_secrets_that_a_killed_worker_left_in_the_log_are_gone_at_the_next_start(
    agent: Agent, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer = service.offer_secured(SecuredRound(identity_of(agent), held={Step.SHARES}))
    assert agent.step() is Outcome.PARKED
    secrets = agent.journal.sessions.get(session_key(offer)).secrets
    reader = Journal.look_into(agent.state)  # as long as somebody has it open, closing empties no log
    assert reader.counts()["prepared"] == 1
    agent.close()
    with monkeypatch.context() as killed:
        killed.setattr(Sessions, "clean_log", lambda _self: None)
        agent.journal.sessions.end(session_key(offer), "killed right after")
    agent.journal.close()
    assert is_on_disk(agent.state.root, secrets)

    opened = Journal.open(agent.state)

    assert not is_on_disk(agent.state.root, secrets)
    reader.close()
    opened.close()


@pytest.mark.parametrize("days", [KEEP_BYTES.days - 1, KEEP_BYTES.days + 1])
def test_the_vector_of_a_job_that_is_over_is_deleted_while_the_agent_runs(
    agent: Agent, service: FakeService, days: int
) -> None:
    offer = service.offer_secured(SecuredRound(identity_of(agent)))
    finish(agent, service)
    vector = release_of(agent, offer).vector
    assert vector is not None
    then = (datetime.now(UTC) - timedelta(days=days)).isoformat()
    agent.journal.connection.execute("UPDATE releases SET acknowledged_at = ?", (then,))

    assert agent.step(1) is Outcome.IDLE

    assert vector.exists() is (days < KEEP_BYTES.days)
    assert (release_of(agent, offer).vector is None) is (days > KEEP_BYTES.days)


# --- Other versions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [Step.SHARES, Step.SURVIVORS])
def test_a_session_whose_offer_this_version_cannot_read_is_over_and_stops_no_agent(
    agent: Agent, service: FakeService, caplog: pytest.LogCaptureFixture, step: Step
) -> None:
    secured = SecuredRound(identity_of(agent), held={step})
    offer = service.offer_secured(secured)
    until(agent, lambda: bool(secured.messages(step)))
    agent.close()
    agent.journal.connection.execute("UPDATE sessions SET offer = json_remove(offer, '$.requested_by')")

    with caplog.at_level(logging.ERROR):
        again = reborn(agent)

    try:
        assert not again._secured.are_open
        (line,) = [record for record in caplog.records if "its offer cannot be read" in record.message]
        assert "requested_by" in str(getattr(line, "reason", ""))
        rows = again.journal.connection.execute("SELECT state, secrets, offer FROM sessions").fetchall()
        assert rows == [("over", None, None)]
        service.offer_secured(secured.next_attempt(held=set()))
        assert Outcome.SUMMED in finish(again, service)
        assert release_of(again, offer).vector is not None
    finally:
        again.close()
        again.journal.close()


def test_an_agent_of_a_version_that_knows_no_vectors_finds_no_bytes_to_send(agent: Agent, service: FakeService) -> None:
    """It takes what the column `file` names for noised bytes, and hands them in as they are."""
    offer = service.offer_secured(SecuredRound(identity_of(agent), held={Step.SHARES}))
    assert agent.step() is Outcome.PARKED
    release = release_of(agent, offer)
    assert release.vector is not None

    def files() -> list[tuple[str | None]]:
        with sqlite3.connect(agent.state.journal) as connection:
            return connection.execute("SELECT file FROM releases").fetchall()

    assert files() == [(None,)]
    agent.journal.note_asking(release, unanswered=True)
    agent.journal.mark_released(release)
    assert files() == [(None,)]
    agent.journal.recover()
    assert release.vector.exists()


def test_a_journal_that_was_made_before_there_were_vectors_gets_a_column_for_them(
    agent: Agent, service: FakeService
) -> None:
    agent.journal.connection.execute("DROP INDEX held_releases")
    agent.journal.connection.execute("ALTER TABLE releases DROP COLUMN vector")
    again = reborn(agent)
    try:
        offer = service.offer_secured(SecuredRound(identity_of(again)))
        assert Outcome.SUMMED in finish(again, service)
        assert release_of(again, offer).vector is not None
    finally:
        again.close()
        again.journal.close()
