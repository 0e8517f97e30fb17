"""What a round costs in SQL statements: bounds that whoever raises one must explain.

Statements of the queue and of advisory locks go past SQLAlchemy and are not counted; nor are BEGIN and COMMIT.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, event

from app.database import clock
from app.main import open_parts
from app.rounds.aggregation import aggregate_round
from app.settings import Settings
from isthmus.codec import arrays
from isthmus.wire.jobs import JobState
from isthmus.wire.rounds import RoundPhase
from isthmus.wire.secured import Step
from tests.federation import Federation, filled, job_spec
from tests.secured import Masking, enter, go, secured_spec
from tests.standing import Wire, update_headers

ADMISSION = 5
"""The key; task and all that decides about it, locked; the ledger; the grant, the task."""
ACCEPTANCE = 7
"""Task and all that decides about it, locked; clock; round, task, update; NOTIFY; the event."""
REPETITION = 3
"""The key, the task, the update."""
CLOSING = 9
"""An acceptance; the order of its set and the numbers in it; two events cost no more than one."""
AGGREGATION = 12
"""Two to read; job and round, clock; three to publish; candidates; round, tasks; NOTIFY; two events in one."""

MESSAGE = 4
"""Under secure aggregation. The key; task, attempt and member, locked; how it stands; the message."""
KEYS_MESSAGE = MESSAGE + 1
"""And whether somebody else has these keys."""
ANSWER = 2
"""Where the attempt stands; the answer, cut out in Postgres."""
MASKED_ADMISSION = ADMISSION + 2
"""And the member, locked; its digest."""


class Statements(list[str]):
    """What was sent to Postgres, each in a line."""

    def at_most(self, bound: int) -> None:
        """Compare with the bound, and show the statements if they are more."""
        listed = "\n".join(f"{number:3} {statement[:160]}" for number, statement in enumerate(self, start=1))
        assert len(self) <= bound, f"{len(self)} statements, not {bound}:\n{listed}"
        assert len(self) == bound, f"Only {len(self)} statements, not {bound}: lower the bound.\n{listed}"


@contextmanager
def counted() -> Iterator[Statements]:
    """The statements of every engine of this process, while the block runs."""
    found = Statements()

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        found.append(" ".join(statement.split()))

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield found
    finally:
        event.remove(Engine, "before_cursor_execute", note)


@pytest.fixture
def quiet(make_federation: Callable[..., Federation]) -> Federation:
    """Three sites on a service without a coordinator: nothing runs but what is asked for.

    Every key was used before. That is noted again after a while: never here, however slow the machine.
    """
    federation = make_federation(coordinate=False)
    for site in federation.sites:
        assert site.try_claim() is None
    federation.platform.execute("UPDATE api_keys SET last_used_at = clock_timestamp() + interval '1 hour'")
    return federation


def aggregated(federation: Federation, round_id: UUID) -> Statements:
    """The statements of an aggregation, run as a coordinator runs it."""
    settings = Settings(database_url=federation.platform.database_url, data_dir=federation.folder / "data")

    async def run() -> Statements:
        async with open_parts(settings) as parts:
            async with parts.sessions() as session:
                await clock(session)  # a new engine's first connection asks Postgres for its version
            with counted() as statements:
                await aggregate_round(parts, round_id)
            return statements

    return asyncio.run(run())


def test_a_claim_with_nothing_on_offer(quiet: Federation) -> None:
    with counted() as statements:
        assert quiet.sites[0].try_claim() is None

    statements.at_most(1)  # the key, and whether something is on offer


def test_a_claim_that_gets_a_task(quiet: Federation) -> None:
    quiet.start()

    with counted() as statements:
        assert quiet.sites[0].try_claim() is not None

    statements.at_most(2)  # the key; the claim, with all that the offer names


def test_a_heartbeat(quiet: Federation) -> None:
    quiet.start()
    offer = quiet.sites[0].claim()

    with counted() as statements:
        assert quiet.sites[0].heartbeat(offer).held

    statements.at_most(2)  # the key; the lease


def test_an_update_from_its_admission_to_its_receipt(quiet: Federation) -> None:
    quiet.start()
    site = quiet.sites[0]
    offer, body = site.claim(), arrays.encode(filled(1.0))

    with Wire(quiet, site.worker) as wire:
        with counted() as admission:
            wire.put(offer, {**update_headers(offer, body), "expect": "100-continue"})
            assert "100" in wire.first_line()
        with counted() as acceptance:
            wire.send(body)
            assert wire.answer().status_code == 200
    with counted() as repetition:
        site.hand_in(offer, filled(1.0))

    admission.at_most(ADMISSION)
    acceptance.at_most(ACCEPTANCE)
    repetition.at_most(REPETITION)


def test_a_round_from_its_last_update_to_the_opening_of_the_next(quiet: Federation) -> None:
    job = quiet.start(job_spec(rounds=2))
    for site in quiet.sites[:2]:
        site.hand_in(site.claim(), filled(1.0))
    site, body = quiet.sites[2], arrays.encode(filled(1.0))
    offer = site.claim()
    of = quiet.researcher.jobs.round(job.id, 1).id

    with Wire(quiet, site.worker) as wire:
        wire.put(offer, {**update_headers(offer, body), "expect": "100-continue"})
        assert "100" in wire.first_line()
        with counted() as closing:
            wire.send(body)
            assert wire.answer().status_code == 200

    aggregation, again = aggregated(quiet, of), aggregated(quiet, of)

    closing.at_most(CLOSING)
    aggregation.at_most(AGGREGATION)
    again.at_most(1)  # there is nothing to do
    assert quiet.researcher.jobs.round(job.id, 1).phase is RoundPhase.COMPLETED
    assert quiet.job(job).state is JobState.RUNNING
    assert quiet.job(job).current_round == 2


def test_a_cohort_twice_as_large_costs_no_more_statements_to_close_and_open(
    make_federation: Callable[..., Federation],
) -> None:
    def cost() -> int:
        job = federation.start(job_spec(rounds=2))
        for site in federation.sites:
            site.hand_in(site.claim(), filled(1.0))
        statements = aggregated(federation, federation.researcher.jobs.round(job.id, 1).id)
        federation.researcher.jobs.cancel(job.id)
        return len(statements)

    federation = make_federation(coordinate=False)
    three = cost()
    federation.add(3)

    assert cost() == three


# --- Secured rounds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [4, 7])
def test_a_message_and_its_answer_whatever_the_number_of_members(
    make_federation: Callable[..., Federation], count: int
) -> None:
    federation = make_federation(sites=count, coordinate=False)
    federation.start(secured_spec())
    members = enter(federation.sites)
    federation.platform.execute("UPDATE api_keys SET last_used_at = clock_timestamp() + interval '1 hour'")
    for step in (Step.KEYS, Step.SHARES, Step.UPDATE, Step.SURVIVORS):
        if step is Step.UPDATE:
            for member in members:
                member.upload()
        else:
            message = members[0].message(step)
            with counted() as sending:
                assert members[0].exchange(step, message) is None
            sending.at_most(KEYS_MESSAGE if step is Step.KEYS else MESSAGE)
            with counted() as again:
                assert members[0].exchange(step, message) is None
            again.at_most(2)  # the key; task, attempt and member
            for member in members[1:]:
                member.exchange(step)
        message = members[0].message(step)
        with counted() as answering:
            assert members[0].exchange(step, message) is not None
        answering.at_most(2 + (ANSWER if step is not Step.UPDATE else ANSWER - 1))
        for member in members[1:]:
            member.exchange(step)


def test_a_step_costs_no_more_statements_to_close_for_twice_as_many_members(
    make_federation: Callable[..., Federation],
) -> None:
    federation = make_federation(coordinate=False)

    def cost() -> list[int]:
        job = federation.start(secured_spec())
        members = enter(federation.sites)
        federation.platform.execute("UPDATE api_keys SET last_used_at = clock_timestamp() + interval '1 hour'")
        found = []
        for step in tuple(Step):
            for member in members[:-1]:
                last(member, step)
            with counted() as statements:
                last(members[-1], step)
            found.append(len(statements))
            if step is not Step.UNMASK:
                for member in members:
                    assert member.exchange(step, member.sent.get(step)) is not None
        of = federation.researcher.jobs.round(job.id, 1).id
        found.append(len(aggregated(federation, of)))
        assert federation.job(job).state is JobState.COMPLETED, federation.job(job).detail
        return found

    def last(member: Masking, step: Step) -> None:
        if step is Step.UPDATE:
            member.upload()
        elif federation.platform.execute(
            "SELECT 1 FROM rounds WHERE phase IN ('collecting', 'survivors', 'unmasking')"
        ):
            member.exchange(step)

    three = cost()
    federation.add(3)

    six = cost()
    # Keys, shares; the last upload and the freeze; then enough have signed or told before the last does.
    assert three[:3] == six[:3] == [12, 11, 22]
    assert three[-1] == six[-1]


def test_a_masked_update_from_its_admission_to_its_receipt(quiet: Federation) -> None:
    quiet.start(secured_spec())
    members = enter(quiet.sites)
    go(members, through=Step.SHARES)
    member, body = members[0], arrays.encode(members[0].masked())

    with Wire(quiet, member.site.worker) as wire:
        with counted() as admission:
            wire.put(member.offer, {**update_headers(member.offer, body), "expect": "100-continue"})
            assert "100" in wire.first_line()
        with counted() as acceptance:
            wire.send(body)
            assert wire.answer().status_code == 200

    admission.at_most(MASKED_ADMISSION)
    acceptance.at_most(ACCEPTANCE + 1)  # the member
