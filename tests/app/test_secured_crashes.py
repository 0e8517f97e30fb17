"""What breaks between two steps of a secured round, and two services that do the same at the same time."""

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest

from app.coordinator import sweep
from app.main import open_parts
from app.rounds import aggregation, discarding
from app.rounds.aggregation import aggregate_round
from app.rounds.secured import again, closing, steps
from app.settings import Settings
from isthmus.client import Client, Refused, Unreachable
from isthmus.wire.events import EventKind
from isthmus.wire.jobs import JobState, JobView
from isthmus.wire.problems import ProblemCode
from isthmus.wire.rounds import RoundPhase
from isthmus.wire.secured import Step
from tests.app.test_crash_windows import BOTH, Once, told
from tests.app.test_secured_rounds import WHOLE, kinds
from tests.federation import Federation, round_id_of
from tests.running import serving
from tests.secured import STEPS, Masking, assert_forgotten, assert_published, enter, go, secured_spec, take

MakeFederation = Callable[..., Federation]
CLOSING = {
    Step.KEYS: "_close_early_step",
    Step.SHARES: "_close_early_step",
    Step.UPDATE: "_freeze",
    Step.SURVIVORS: "_open_unmasking",
    Step.UNMASK: "_begin_aggregation",
}


def assert_done_once(federation: Federation, job: JobView, members: list[Masking]) -> None:
    """The round went through each of its steps once, and nothing of it is kept."""
    done = federation.finish(job)
    assert done.state is JobState.COMPLETED, done.detail
    assert_published(federation, job, members)
    assert kinds(federation, job) == WHOLE
    assert_forgotten(federation)


def last(member: Masking, step: Step) -> None:
    """The message that closes a step."""
    if step is Step.UPDATE:
        member.upload()
    else:
        member.exchange(step)


@BOTH
@pytest.mark.parametrize("step", STEPS)
def test_a_step_whose_closing_breaks_takes_its_last_message_back_and_closes_once_when_it_comes_again(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, step: Step, when: str
) -> None:
    job = federation.start(secured_spec())
    members = enter(federation.sites)
    for one in STEPS[: STEPS.index(step)]:
        take(members, one)
    for member in members[:2]:
        last(member, step)
    broken = Once(getattr(closing, CLOSING[step]), when)
    monkeypatch.setattr(closing, CLOSING[step], broken)

    with pytest.raises(Refused) as refusal:
        last(members[2], step)
    assert refusal.value.code is ProblemCode.INTERNAL
    with contextlib.suppress(Unreachable):  # the service closes a connection on which something broke
        members[2].site.heartbeat(members[2].offer)

    assert federation.platform.execute("SELECT step FROM secured_attempts") == [(step.value,)]
    assert federation.platform.execute("SELECT count(*) FROM procrastinate_jobs") == [(0,)]
    for one in STEPS[STEPS.index(step) :]:
        take(members, one)
    assert len(broken.calls) == (2 if step is not Step.KEYS else 3)  # the closing of shares is the same function
    assert_done_once(federation, job, members)


@BOTH
@pytest.mark.parametrize("step", [step for step in STEPS if step is not Step.UPDATE])
def test_a_message_whose_answer_was_lost_is_sent_again_and_counts_once(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, step: Step, when: str
) -> None:
    job = federation.start(secured_spec())
    members = enter(federation.sites)
    for one in STEPS[: STEPS.index(step)]:
        take(members, one)
    message = members[0].message(step)
    monkeypatch.setattr(steps, "take_message", Once(steps.take_message, when))
    with pytest.raises(Refused):
        members[0].exchange(step, message)

    with contextlib.suppress(Unreachable):  # the service closes a connection on which something broke
        members[0].exchange(step, message)
    for one in STEPS[STEPS.index(step) :]:
        take(members, one)

    assert_done_once(federation, job, members)


@BOTH
@pytest.mark.parametrize("name", ["_next_model", "_unmasked", "_complete", "forget_inputs"])
def test_an_unmasking_that_was_killed_is_done_again_with_the_same_result(
    make_federation: MakeFederation, monkeypatch: pytest.MonkeyPatch, name: str, when: str
) -> None:
    broken = Once(getattr(aggregation, name), when)
    monkeypatch.setattr(aggregation, name, broken)
    federation = make_federation(aggregation_retry=timedelta(seconds=0.3))
    job = federation.start(secured_spec())
    members = enter(federation.sites)

    go(members)

    assert_done_once(federation, job, members)
    assert len(broken.calls) == 2


def test_blobs_that_a_killed_process_did_not_delete_are_deleted_by_the_next_sweep(
    make_federation: MakeFederation, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = make_federation(coordinate=False)
    job = federation.start(secured_spec())
    members = enter(federation.sites)
    go(members)
    monkeypatch.setattr(aggregation, "delete_blobs", Once(discarding.delete_blobs, "before"))
    settings = Settings(database_url=federation.platform.database_url, data_dir=federation.folder / "data")

    async def sum_it() -> None:
        async with open_parts(settings) as parts:
            await aggregate_round(parts, round_id_of(federation, job, 1))

    async def sweep_it() -> None:
        async with open_parts(settings) as parts:
            await sweep(parts, timedelta(hours=1))

    with pytest.raises(Exception):  # noqa: B017, PT011 -- whatever `Once` raises: the process is gone
        asyncio.run(sum_it())
    assert len(federation.blobs("updates")) == 3
    assert federation.job(job).state is JobState.COMPLETED

    asyncio.run(sweep_it())

    assert_forgotten(federation)


def test_an_attempt_whose_giving_up_breaks_is_given_up_once(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = federation.start(secured_spec())
    members = enter(federation.sites)
    go(members, through=Step.UPDATE)
    broken = Once(again.begin_again, "after")
    monkeypatch.setattr(closing, "begin_again", broken)

    federation.platform.execute("UPDATE secured_attempts SET step_closes_at = clock_timestamp()")
    federation.until(lambda: federation.researcher.jobs.round(job.id, 1).attempt == 2)

    assert len(broken.calls) == 2
    assert told(federation, job, EventKind.ATTEMPT_ABORTED) == 1
    anew = enter(federation.sites)
    go(anew)
    assert federation.finish(job).state is JobState.COMPLETED
    assert_published(federation, job, anew)


# --- Two services on one database -------------------------------------------------------------------------------------


def at_both(federation: Federation, address: str, members: list[Masking]) -> list[Client]:
    """Clients of the members at another service."""
    keys = federation.platform.keys
    return [Client(address, keys[member.site.worker]) for member in members]


def test_two_services_close_every_step_once_and_wake_who_waits_at_the_other(make_federation: MakeFederation) -> None:
    federation = make_federation(sites=4)
    settings = Settings(
        database_url=federation.platform.database_url,
        data_dir=federation.folder / "data",
        sweep=timedelta(milliseconds=100),
        lease=timedelta(minutes=10),
    )
    with serving(settings) as address, ThreadPoolExecutor(8) as pool:
        job = federation.start(secured_spec())
        members = enter(federation.sites)
        others = at_both(federation, address, members)
        for step in STEPS:

            def both(number: int, step: Step = step) -> None:
                """The same message to both services at the same time, and both wait for its answer."""
                member, message = members[number], members[number].message(step)
                if step is Step.UPDATE:
                    member.upload()

                def ask(client: Client) -> bytes | None:
                    task_id, fence = member.offer.task_id, member.offer.fence
                    return client.tasks.exchange(task_id, step, message, fence=fence, wait_s=20)

                answers = list(pool.map(ask, (member.site.worker, others[number])))
                assert answers[0] == answers[1]
                assert answers[0] is not None
                member.sent[step] = message
                member._open(step, answers[0])

            with ThreadPoolExecutor(len(members)) as drivers:
                for done in [drivers.submit(both, number) for number in range(len(members))]:
                    done.result()
        assert_done_once(federation, job, members)
        for client in others:
            client.close()


def test_two_coordinators_give_an_attempt_up_once(make_federation: MakeFederation) -> None:
    federation = make_federation()
    settings = Settings(
        database_url=federation.platform.database_url,
        data_dir=federation.folder / "data",
        sweep=timedelta(milliseconds=50),
    )

    async def sweep_twice() -> None:
        async with open_parts(settings) as one, open_parts(settings) as other:
            for _ in range(5):
                await asyncio.gather(sweep(one, timedelta(hours=1)), sweep(other, timedelta(hours=1)))

    job = federation.start(secured_spec())
    members = enter(federation.sites)
    go(members, through=Step.SURVIVORS)
    federation.platform.execute("UPDATE secured_attempts SET step_closes_at = clock_timestamp()")

    asyncio.run(sweep_twice())

    now = federation.researcher.jobs.round(job.id, 1)
    assert (now.attempt, now.phase) == (2, RoundPhase.COLLECTING)
    assert told(federation, job, EventKind.ATTEMPT_ABORTED) == 1


def test_who_waits_for_a_step_holds_no_connection(make_federation: MakeFederation) -> None:
    federation = make_federation(sites=5, database_connections=2)
    federation.start(secured_spec())
    members = enter(federation.sites)
    messages: list[Any] = [member.message(Step.KEYS) for member in members]

    with ThreadPoolExecutor(5) as pool:
        waiting = [
            pool.submit(member.exchange, Step.KEYS, message, wait_s=20)
            for member, message in zip(members[:4], messages[:4], strict=True)
        ]
        federation.until(
            lambda: federation.platform.execute("SELECT count(*) FROM secured_members WHERE keys IS NOT NULL") == [(4,)]
        )
        members[4].exchange(Step.KEYS, messages[4])
        assert all(done.result(timeout=15) is not None for done in waiting)
