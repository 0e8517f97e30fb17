"""Blobs that secured rounds leave behind are discarded once and deleted; and nobody waits who should not."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event as ThreadEvent
from typing import Any
from uuid import UUID

import httpx
import pytest

from app.wakeups import Wakeups
from isthmus.wire.jobs import CancelJob, JobState, ParticipationState, WithdrawParticipation
from isthmus.wire.secured import Step
from isthmus.wire.version import FENCE_HEADER, SECAGG_MEDIA_TYPE
from tests.app.test_grants import part_of
from tests.app.test_secured_aborts import until_attempt
from tests.federation import Federation
from tests.secured import STEPS, Masking, assert_forgotten, assert_published, enter, secured_spec, take

MakeFederation = Callable[..., Federation]


def test_updates_that_were_withdrawn_before_an_attempt_was_given_up_are_discarded_once(
    make_federation: MakeFederation,
) -> None:
    federation = make_federation(sites=6)
    job = federation.start(secured_spec())
    members = enter(federation.sites)
    take(members, Step.KEYS)
    take(members, Step.SHARES)
    for member in members[:3]:
        member.upload()
    for member in members[:2]:  # four are left of the five that are needed
        part = part_of(member.site, job)
        member.site.steward.participations.withdraw(part.id, WithdrawParticipation(note="a patient asked"))
    until_attempt(federation, job, 2)

    cancelled = federation.researcher.jobs.cancel(job.id, CancelJob(note="enough"))

    assert cancelled.state is JobState.CANCELLED
    assert_forgotten(federation)


def test_a_blob_that_cannot_be_deleted_keeps_no_other(make_federation: MakeFederation) -> None:
    federation = make_federation()
    stuck = [f"updates/a{number}/full" for number in range(3)]
    for key in stuck:  # a folder that is not empty, where a file should be
        (federation.folder / "data" / "blobs" / key / "inside").mkdir(parents=True)
        federation.platform.execute("INSERT INTO discarded_blobs VALUES (%s, now())", [key])
    job = federation.start(secured_spec())
    members = enter(federation.sites)
    for step in STEPS[:3]:
        take(members, step)
    assert len(federation.blobs("updates")) == 3

    federation.researcher.jobs.cancel(job.id)

    federation.until(lambda: not federation.blobs("updates"))
    left = federation.until(
        lambda: rows if len(rows := federation.platform.execute("SELECT key FROM discarded_blobs")) == 3 else None
    )
    assert sorted(key for (key,) in left) == stuck


def test_a_grant_that_expires_once_the_update_is_in_keeps_its_member_in_the_round(federation: Federation) -> None:
    job = federation.start(secured_spec())
    members = enter(federation.sites)
    take(members, Step.KEYS)
    take(members, Step.SHARES)
    members[0].upload()
    federation.platform.execute(
        "UPDATE grants SET expires_at = clock_timestamp() WHERE participation_id = %s",
        [members[0].offer.participation_id],
    )
    federation.until(lambda: part_of(members[0].site, job).state is ParticipationState.EXPIRED)

    assert members[0].exchange(Step.UPDATE) is None
    take(members[1:], Step.UPDATE)
    for step in (Step.UPDATE, Step.SURVIVORS):
        for member in members:
            member.exchange(step)
        for member in members:
            member.exchange(step)
    take(members, Step.UNMASK)

    assert federation.finish(job).state is JobState.COMPLETED
    assert_published(federation, job, members)


# --- Who waits for a step ---------------------------------------------------------------------------------------------


def test_who_asks_for_a_step_when_the_process_ends_is_answered_at_once(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation.start(secured_spec())
    member = enter(federation.sites)[0]
    step = Wakeups.step

    def ending(self: Wakeups, round_id: UUID, heard: int) -> Any:
        self.close()  # everybody who waits by now is woken; this one comes after
        return step(self, round_id, heard)

    monkeypatch.setattr(Wakeups, "step", ending)

    answered = _post(member, Step.KEYS, wait_s=300, patience_s=15)  # or it is not answered in time, and that is raised

    assert (answered.status_code, answered.headers["retry-after"]) == (202, "1")


def _post(member: Masking, step: Step, *, wait_s: int, patience_s: float) -> httpx.Response:
    http = member.site.platform.http(member.site.worker)
    return http.post(
        f"/v1/tasks/{member.offer.task_id}/steps/{step}?wait={wait_s}",
        content=member.message(step),
        headers={FENCE_HEADER: str(member.offer.fence), "content-type": SECAGG_MEDIA_TYPE},
        timeout=patience_s,
    )


def test_who_waits_for_a_step_that_nobody_heard_close_looks_once_more_before_it_goes(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation.start(secured_spec())
    members = enter(federation.sites)
    for member in members[1:-1]:
        member.exchange(Step.KEYS)
    waits, step = ThreadEvent(), Wakeups.step

    @contextlib.contextmanager
    def deaf(self: Wakeups, _round_id: UUID, _heard: int) -> Iterator[asyncio.Event]:
        monkeypatch.setattr(Wakeups, "step", step)
        self.connected.clear()  # the listener has lost its connection
        waits.set()
        yield asyncio.Event()

    monkeypatch.setattr(Wakeups, "step", deaf)
    with ThreadPoolExecutor(1) as calls:
        waiting = calls.submit(members[0].exchange, Step.KEYS, wait_s=3)
        assert waits.wait(15)
        assert members[-1].exchange(Step.KEYS) is not None

        assert waiting.result() == members[-1].answers[Step.KEYS]
