"""Secured rounds from the first key to the published sum: who is in it, who may drop out when, and what is left."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from app.rounds import aggregation
from app.rounds.secured import unmasking
from isthmus.wire.events import EventKind
from isthmus.wire.jobs import JobState, JobView
from isthmus.wire.privacy import PrivacyMode
from isthmus.wire.problems import ProblemCode
from isthmus.wire.rounds import STATISTICS_PREFIX, RoundPhase, TaskState
from isthmus.wire.secured import Step
from tests.federation import OPEN, RECORD, Federation, job_spec
from tests.running import refused
from tests.secured import (
    STEPS,
    Masking,
    assert_forgotten,
    assert_published,
    enter,
    go,
    pass_round,
    pass_step,
    secured_spec,
    take,
    view_of,
)

MakeFederation = Callable[..., Federation]


def kinds(federation: Federation, job: JobView) -> list[str]:
    """What the record tells of the job's rounds, in order."""
    told = (
        EventKind.ROUND_OPENED, EventKind.ROUND_REOPENED, EventKind.KEYS_CLOSED, EventKind.SHARES_CLOSED,
        EventKind.ROUND_FROZEN, EventKind.SURVIVORS_SIGNED, EventKind.UNMASKED, EventKind.SHARES_WRONG,
        EventKind.ATTEMPT_ABORTED, EventKind.ROUND_COMPLETED, EventKind.ROUND_FAILED, EventKind.ROUND_CANCELLED,
    )  # fmt: skip
    events = federation.researcher.jobs.events(job.id, follow=False)
    return [event.kind.value for event in events if event.kind in told]


WHOLE = [
    "round-opened",
    "keys-closed",
    "shares-closed",
    "round-frozen",
    "survivors-signed",
    "unmasked",
    "round-completed",
]


@pytest.mark.parametrize("count", [3, 4, 5])
def test_what_is_published_is_the_sum_to_the_last_bit_and_nothing_else_is_kept(
    make_federation: MakeFederation, count: int
) -> None:
    federation = make_federation(sites=count)
    job = federation.start(secured_spec())
    members = enter(federation.sites)

    go(members)

    done = federation.finish(job)
    assert done.state is JobState.COMPLETED, done.detail
    assert_published(federation, job, members)
    assert kinds(federation, job) == WHOLE
    assert_forgotten(federation)


def leave(federation: Federation, job: JobView, members: list[Masking], gone: Masking, step: Step) -> list[Masking]:
    """All but one take a step, and its time passes; those that stay."""
    stay = [member for member in members if member is not gone]
    for member in stay:
        if step is Step.UPDATE:
            member.upload()
        else:
            member.exchange(step)
    if step in (Step.KEYS, Step.SHARES):
        pass_step(federation)
    elif step is Step.UPDATE:
        pass_round(federation)
    if step is not Step.UNMASK:
        for member in stay:
            federation.until(lambda member=member: step in member.answers or member.exchange(step, wait_s=5))
    return stay


@pytest.mark.parametrize("step", STEPS)
def test_who_leaves_in_any_step_is_left_behind_and_the_sum_is_right_without_its_help(
    make_federation: MakeFederation, step: Step
) -> None:
    federation = make_federation(sites=5)
    job = federation.start(secured_spec())
    members = enter(federation.sites)
    before = STEPS[: STEPS.index(step)]
    for one in before:
        take(members, one)

    stay = leave(federation, job, members, members[2], step)
    for one in STEPS[STEPS.index(step) + 1 :]:
        take(stay, one)

    done = federation.finish(job)
    assert done.state is JobState.COMPLETED, done.detail
    summed = stay if step in (Step.KEYS, Step.SHARES, Step.UPDATE) else members
    assert_published(federation, job, summed)
    assert_forgotten(federation)
    left = federation.sites[2].worker.tasks.get(members[2].offer.task_id)
    assert left.state is (TaskState.EXPIRED if summed is stay else TaskState.SUBMITTED)


def test_a_third_may_leave_one_after_the_other(make_federation: MakeFederation) -> None:
    federation = make_federation(sites=10)
    job = federation.start(secured_spec())
    members = stay = enter(federation.sites)

    for step, gone in zip(STEPS, (members[0], members[4], members[9]), strict=False):
        stay = leave(federation, job, stay, gone, step)
    assert (view_of(federation, job).threshold, len(stay)) == (7, 7)
    for step in (Step.SURVIVORS, Step.UNMASK):
        take(stay, step)

    assert federation.finish(job).state is JobState.COMPLETED
    assert_published(federation, job, stay)


def test_weights_are_declared_rows_where_the_job_says_so(make_federation: MakeFederation) -> None:
    federation = make_federation(sites=0)
    federation.add(3, rows=lambda number: (70, 300, 150)[number])
    job = federation.start(secured_spec(strategy="fedavg"))
    members = enter(federation.sites)

    go(members)

    assert federation.finish(job).state is JobState.COMPLETED
    assert members[0].keyed is not None
    assert [member.weight for member in members[0].keyed.roster.members] == [70, 300, 150]
    assert_published(federation, job, members)
    updates = federation.researcher.jobs.round(job.id, 1).updates
    assert [update.weight for update in updates] == [70, 300, 150]


def test_a_round_after_statistics_binds_its_keys_to_them(make_federation: MakeFederation) -> None:
    federation = make_federation(sites=3, policy=OPEN.model_copy(update={"modes": tuple(PrivacyMode)}))
    data = job_spec().data.model_dump(mode="json")
    features = [{"name": feature["name"], "range": [0, 300]} for feature in data["features"]]
    spec = secured_spec(
        privacy={**RECORD, "statistics_noise_multiplier": 4.0},
        secure_aggregation={"clip_norm": 1.0},
        data={**data, "features": features, "standardize": "federated"},
    )
    job = federation.start(spec)
    measured = {"count": [100.0, 90.0], "mean": [-0.0, 200.1], "m2": [1e16, 0.0], "rows": 100.0}
    for site in federation.sites:
        site.hand_in(site.claim(), {f"{STATISTICS_PREFIX}{name}": np.array(of) for name, of in measured.items()})
    members = enter(federation.sites)
    for member in members:
        assert member.offer.statistics is not None
        other = member.offer.statistics.model_copy(update={"sites": 2})
        assert Masking(member.site, member.offer.model_copy(update={"statistics": other})).context != member.context

    go(members)

    assert federation.finish(job).state is JobState.COMPLETED
    assert_published(federation, job, members)


def test_the_strategy_s_state_goes_on_from_round_to_round(federation: Federation) -> None:
    job = federation.start(secured_spec(rounds=2, strategy={"fedavgm": {"weights": "uniform"}}))
    vector = np.arange(6, dtype=np.int32) * 1024
    for _ in range(2):
        go(enter(federation.sites, dict.fromkeys(range(3), vector)))

    assert federation.finish(job).state is JobState.COMPLETED
    model = federation.model(job)
    flat = np.concatenate([model[name].reshape(-1) for name in sorted(model)])
    assert np.array_equal(flat, (vector * (1 + 1.9) / 2**20).astype(np.float32))


# --- What people see --------------------------------------------------------------------------------------------------


def test_view_and_record_tell_the_same_story_of_every_step(make_federation: MakeFederation) -> None:
    federation = make_federation(sites=4)
    job = federation.start(secured_spec())
    members = enter(federation.sites)
    names = [member.name for member in members]

    seen = view_of(federation, job)
    assert (seen.step, seen.attempt, seen.members, seen.threshold, seen.needed) == (Step.KEYS, 1, 4, 3, 3)
    assert (seen.arrived, seen.missing, seen.dropped, seen.progress) == (0, names, [], None)
    stay = members
    for step, gone in ((Step.KEYS, members[3]), (Step.SHARES, None), (Step.UPDATE, None), (Step.SURVIVORS, None)):
        half = stay[0]
        if step is Step.UPDATE:
            half.upload()
        else:
            half.exchange(step)
        seen = view_of(federation, job)
        assert (seen.step, seen.arrived) == (step, 1)
        assert seen.missing == [member.name for member in stay if member is not half]
        assert seen.dropped == [name for name in names if name not in {member.name for member in stay}]
        assert (seen.step_closes_at is None) == (step is Step.UPDATE)
        if gone is None:
            for member in stay[1:]:
                if step is Step.UPDATE:
                    member.upload()
                else:
                    member.exchange(step)
            for member in stay:
                federation.until(lambda member=member, step=step: step in member.answers or member.exchange(step))
        else:
            stay = leave(federation, job, [half, *stay[1:]], gone, step)
    assert federation.researcher.jobs.round(job.id, 1).phase is RoundPhase.UNMASKING

    take(stay, Step.UNMASK)
    federation.finish(job)

    assert federation.researcher.jobs.round(job.id, 1).secured is None
    events = {event.kind: event.data for event in federation.researcher.jobs.events(job.id, follow=False)}
    first = {"round": 1, "attempt": 1}
    assert events[EventKind.KEYS_CLOSED] == {**first, "members": names[:3], "missing": names[3:]}
    assert events[EventKind.SHARES_CLOSED] == {**first, "members": names[:3], "missing": []}
    assert events[EventKind.SURVIVORS_SIGNED] == {**first, "members": names[:3], "missing": []}
    assert events[EventKind.UNMASKED] == {**first, "members": names[:3], "missing": []}
    frozen = events[EventKind.ROUND_FROZEN]
    assert frozen["attempt"] == 1
    updates = federation.researcher.jobs.round(job.id, 1).updates
    assert [item["digest"] for item in frozen["updates"]] == [update.digest for update in updates]
    assert [update.position for update in updates] == [0, 1, 2]
    assert all(update.l2_norm is None for update in updates)


def test_a_steward_sees_no_other_organization_s_name(federation: Federation) -> None:
    job = federation.start(secured_spec())
    enter(federation.sites)
    site = federation.sites[1]

    seen = site.steward.jobs.round(job.id, 1).secured

    assert seen is not None
    assert seen.missing == [f"{site.organization.name}/heart"]
    assert seen.members == 3
    admin = federation.platform.admin.jobs.round(job.id, 1).secured
    assert admin is not None
    assert len(admin.missing) == 3


# --- Who is asked -----------------------------------------------------------------------------------------------------


def test_one_dataset_of_each_organization_is_asked_and_the_others_are_told_why(federation: Federation) -> None:
    site = federation.sites[0]
    other = site.announce("attic")
    site.steward.datasets.confirm(other.id)

    job = federation.start(secured_spec())

    parts = {part.dataset: part for part in federation.researcher.jobs.participations(job.id)
             if part.organization == site.organization.name}  # fmt: skip
    assert "attic is asked" in (parts["heart"].detail or "")
    assert parts["attic"].detail is None


def test_a_cohort_too_large_to_hide_is_refused_at_the_start(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.participations.service.LARGEST_COHORT", 2)

    with refused(ProblemCode.INVALID_REQUEST) as refusals:
        federation.start(secured_spec())

    assert "would ask 3 participations" in refusals[0].detail


def test_how_far_the_unmasking_has_come_is_seen_while_it_lasts(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, write_sum = threading.Event(), aggregation.write_sum

    def halfway(*arguments: Any, progress: Callable[[float], None], **named: Any) -> None:
        progress(0.5)
        assert go_on.wait(20)
        write_sum(*arguments, progress=progress, **named)

    monkeypatch.setattr(unmasking, "NOTED_EVERY_S", 0.01)
    monkeypatch.setattr(aggregation, "write_sum", halfway)
    job = federation.start(secured_spec())
    members = enter(federation.sites)
    go(members)
    try:
        federation.until(lambda: view_of(federation, job).progress == 0.5)
        seen = view_of(federation, job)
        assert (seen.step, seen.arrived, seen.missing, seen.dropped) == (Step.UNMASK, 3, [], [])
        assert federation.researcher.jobs.round(job.id, 1).phase is RoundPhase.AGGREGATING
    finally:
        go_on.set()

    assert federation.finish(job).state is JobState.COMPLETED
    assert_published(federation, job, members)
