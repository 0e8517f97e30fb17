"""What secured rounds cost a dataset: once a round whatever the attempt; shares of noise when unmasking opens."""

from collections.abc import Callable
from typing import Any

import pytest

import app.participations.service
from isthmus.privacy.planning import grant_cost, plan_of, round_cost
from isthmus.wire.jobs import JobReason, JobSpec, JobState, WithdrawParticipation
from isthmus.wire.ledger import LedgerKind
from isthmus.wire.privacy import PrivacyMode
from isthmus.wire.problems import ProblemCode
from isthmus.wire.rounds import RoundPhase
from isthmus.wire.secured import Step
from tests.app.test_budgets import ELEMENTS, ROWS, entries, holding, total
from tests.app.test_grants import part_of
from tests.app.test_handed_on_tasks import sweep_once
from tests.app.test_secured_aborts import until_attempt
from tests.federation import LOCAL, OPEN, RECORD, UNIFORM, Federation
from tests.running import refused
from tests.secured import assert_forgotten, assert_published, enter, go, pass_step, secured_spec, take

MakeFederation = Callable[..., Federation]
DISTRIBUTED: dict[str, Any] = {**LOCAL, "where": "distributed"}
ANY_MODE = OPEN.model_copy(update={"modes": tuple(PrivacyMode)})


def shared_noise(**changes: Any) -> JobSpec:
    """A job whose noise its members add in shares."""
    return secured_spec(**{"privacy": DISTRIBUTED, "strategy": UNIFORM, "rounds": 2, **changes})


def slice_of(spec: JobSpec) -> Any:
    """What a round of it costs a dataset."""
    plan = plan_of(spec, ROWS, ELEMENTS)
    assert plan is not None
    return round_cost(spec, plan, 1, ELEMENTS, ledger=True)


def whole_of(spec: JobSpec) -> Any:
    """What a grant of it promises."""
    plan = plan_of(spec, ROWS, ELEMENTS)
    assert plan is not None
    return grant_cost(spec, plan, ELEMENTS, spec.rounds, ledger=True)


@pytest.fixture
def noisy(make_federation: MakeFederation) -> Federation:
    """Four sites that allow every mode."""
    return make_federation(sites=4, policy=ANY_MODE)


def test_shares_of_noise_are_spent_for_when_unmasking_opens_and_for_those_in_the_sum(noisy: Federation) -> None:
    job = noisy.start(shared_noise())
    members = enter(noisy.sites)
    take(members, Step.KEYS)
    stay, gone = members[:3], members[3]
    for member in stay:
        member.exchange(Step.SHARES)
    pass_step(noisy)
    for member in stay:
        noisy.until(lambda member=member: member.exchange(Step.SHARES, wait_s=5))
    digests = {member.site: member.upload().digest for member in stay}
    for member in stay:
        member.exchange(Step.UPDATE)
    stay[0].exchange(Step.SURVIVORS)
    stay[1].exchange(Step.SURVIVORS)
    assert all(entries(site, LedgerKind.SPEND) == [] for site in noisy.sites)

    take(stay, Step.SURVIVORS)

    assert noisy.researcher.jobs.round(job.id, 1).phase is RoundPhase.UNMASKING
    for site, digest in digests.items():
        (spend,) = entries(site, LedgerKind.SPEND)
        assert (spend.mode, spend.round_number, spend.release, spend.digest) == (
            "organization-distributed", 1, "train", digest,
        )  # fmt: skip
        assert total(site, LedgerKind.SPEND) == slice_of(shared_noise())
    assert entries(gone.site, LedgerKind.SPEND) == []
    take(stay, Step.UNMASK)
    noisy.until(lambda: noisy.job(job).current_round == 2)
    noisy.researcher.jobs.cancel(job.id)
    noisy.until(lambda: all(entries(site, LedgerKind.REFUND) for site in noisy.sites))
    assert total(gone.site, LedgerKind.REFUND) == whole_of(shared_noise())
    assert all(total(s, LedgerKind.SPEND) + total(s, LedgerKind.REFUND) == whole_of(shared_noise()) for s in digests)


def test_a_second_attempt_is_the_same_release_and_spent_for_once(noisy: Federation) -> None:
    job = noisy.start(shared_noise(rounds=1))
    members = enter(noisy.sites)
    go(members, through=Step.SURVIVORS)
    pass_step(noisy)
    until_attempt(noisy, job, 2)

    anew = enter(noisy.sites)
    go(anew)

    assert noisy.finish(job).state is JobState.COMPLETED
    assert_published(noisy, job, anew)
    for site in noisy.sites:
        assert len(entries(site, LedgerKind.SPEND)) == 1
        assert total(site, LedgerKind.SPEND) == slice_of(shared_noise(rounds=1))


def test_who_withdraws_before_unmasking_opened_in_any_attempt_gets_all_of_it_back(noisy: Federation) -> None:
    job = noisy.start(shared_noise())
    members = enter(noisy.sites)
    go(members, through=Step.UPDATE)
    pass_step(noisy)
    until_attempt(noisy, job, 2)
    site = noisy.sites[0]

    site.steward.participations.withdraw(part_of(site, job).id, WithdrawParticipation(note="a patient asked"))

    noisy.until(lambda: entries(site, LedgerKind.REFUND))
    assert total(site, LedgerKind.REFUND) == whole_of(shared_noise())


def test_an_update_with_a_share_of_noise_that_nothing_was_promised_for_is_not_admitted(
    noisy: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def skip(*_: Any, **__: Any) -> None:
        return None

    monkeypatch.setattr(app.participations.service, "reserve", skip)
    noisy.start(shared_noise())
    members = enter(noisy.sites)
    go(members, through=Step.SHARES)

    with refused(ProblemCode.BUDGET_EXHAUSTED):
        members[0].upload()


def test_a_ledger_closed_before_unmasking_opens_ends_the_round_with_nothing_told(
    make_federation: MakeFederation,
) -> None:
    federation = make_federation(policy=ANY_MODE, coordinate=False)
    job = federation.start(shared_noise())
    members = enter(federation.sites)
    go(members, through=Step.UPDATE)
    site = federation.sites[0]
    site.steward.datasets.set_policy(site.dataset.id, holding(slice_of(shared_noise()), ANY_MODE))

    for member in members[:2]:
        member.exchange(Step.SURVIVORS)
    with refused(ProblemCode.JOB_NOT_RUNNING):
        members[2].exchange(Step.SURVIVORS)

    ended = federation.job(job)
    assert (ended.state, ended.reason) == (JobState.FAILED, JobReason.AGGREGATE_REJECTED)
    assert ended.detail is not None
    assert "budget" in ended.detail
    assert all(entries(each, LedgerKind.SPEND) == [] for each in federation.sites)
    sweep_once(federation)
    assert_forgotten(federation)


@pytest.mark.parametrize("privacy", [LOCAL, RECORD], ids=["local", "record"])
def test_noise_of_each_member_s_own_is_spent_for_when_it_is_admitted_once_whatever_the_attempt(
    noisy: Federation, privacy: dict[str, Any]
) -> None:
    bound = {"clip_norm": 5.0} if privacy is RECORD else True
    spec = secured_spec(privacy=privacy, strategy=UNIFORM, secure_aggregation=bound)
    job = noisy.start(spec)
    members = enter(noisy.sites)
    go(members, through=Step.UPDATE)
    first = [entries(site, LedgerKind.SPEND) for site in noisy.sites]
    pass_step(noisy)
    until_attempt(noisy, job, 2)

    anew = enter(noisy.sites)
    go(anew)

    assert noisy.finish(job).state is JobState.COMPLETED
    assert_published(noisy, job, anew)
    assert [entries(site, LedgerKind.SPEND) for site in noisy.sites] == first
    assert [len(spends) for spends in first] == [1] * 4
    assert total(noisy.sites[0], LedgerKind.SPEND) == slice_of(spec)
