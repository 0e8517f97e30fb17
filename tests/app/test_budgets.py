"""A dataset's budget over all jobs: reserved at approval, spent at admission, given back when a grant or job is over.

A job that would overdraw is refused where it is submitted, where it is approved and where an update is admitted; each
of these is tested with the others out of the way. The worker's own refusal is tested with the worker.
"""

import threading
from collections.abc import Callable
from typing import Any

import pytest

import app.participations.service
from isthmus.client import Refused
from isthmus.privacy.chain import verify
from isthmus.privacy.cost import Cost
from isthmus.privacy.planning import grant_cost, plan_of, round_cost
from isthmus.wire.datasets import Budget, UsePolicy
from isthmus.wire.jobs import JobSpec, JobState, JobView, ParticipationState, WithdrawParticipation
from isthmus.wire.ledger import LedgerEntryView, LedgerKind, LedgerPage
from isthmus.wire.privacy import PrivacyMode
from isthmus.wire.problems import ProblemCode
from tests.app.test_grants import approve, part_of
from tests.federation import BY_HAND, OPEN, RECORD, Federation, Site, filled, job_spec
from tests.running import refused

MakeFederation = Callable[..., Federation]
ROWS, ELEMENTS = 100, 6
DELTA = 1e-5


def record_spec(**changes: Any) -> JobSpec:
    """A job of two rounds with a privacy unit."""
    return job_spec(**{"privacy": RECORD, "rounds": 2, **changes})


def cost_of(spec: JobSpec, rounds: int | None = None) -> Cost:
    """What a grant of the job costs at a site."""
    plan = plan_of(spec, ROWS, ELEMENTS)
    assert plan is not None
    return grant_cost(spec, plan, ELEMENTS, rounds or spec.rounds, ledger=True)


def holding(cost: Cost, policy: UsePolicy = OPEN) -> UsePolicy:
    """A policy whose budget holds this, and next to nothing more."""
    return policy.model_copy(update={"budget": Budget(epsilon=1.001 * cost.epsilon(DELTA), delta=DELTA)})


def ledger(site: Site) -> LedgerPage:
    """The site's ledger, verified."""
    page = site.steward.datasets.ledger_page(site.dataset.id, limit=500)
    verify(page.items)
    return page


def entries(site: Site, kind: LedgerKind | None = None) -> list[LedgerEntryView]:
    """The site's entries, of one kind if given."""
    return [entry for entry in ledger(site).items if kind in (None, entry.kind)]


def total(site: Site, kind: LedgerKind) -> Cost:
    """What the site's entries of a kind add up to."""
    found = Cost.zero()
    for entry in entries(site, kind):
        found = found + Cost(tuple(entry.rdp_nano), entry.draws)
    return found


def train(federation: Federation, rounds: int = 1) -> None:
    """Every site hands in an update a round."""
    for _ in range(rounds):
        for site in federation.sites:
            site.hand_in(site.claim(), filled(1.0))


def test_a_job_s_whole_cost_is_reserved_and_each_round_spends_its_slice(federation: Federation) -> None:
    spec = record_spec()
    federation.start(spec)
    site = federation.sites[0]

    (reserve,) = entries(site)
    assert reserve.kind is LedgerKind.RESERVE
    assert reserve.mode == "record"
    assert Cost(tuple(reserve.rdp_nano), reserve.draws) == cost_of(spec)
    train(federation)

    plan = plan_of(spec, ROWS, ELEMENTS)
    assert plan is not None
    (spend,) = entries(site, LedgerKind.SPEND)
    assert Cost(tuple(spend.rdp_nano), spend.draws) == round_cost(spec, plan, 1, ELEMENTS, ledger=True)
    assert (spend.round_number, spend.release) == (1, "train")
    budget = ledger(site).budget
    assert budget is not None
    assert 0 < budget.spent_epsilon < budget.reserved_epsilon


def test_the_offer_carries_the_plan_that_was_frozen_when_the_dataset_was_asked(federation: Federation) -> None:
    federation.start(record_spec())

    assert federation.sites[0].claim().plan == plan_of(record_spec(), ROWS, ELEMENTS)


def test_a_job_that_claims_nothing_costs_nothing_and_is_counted(federation: Federation) -> None:
    federation.start(job_spec())
    train(federation)

    page = ledger(federation.sites[0])
    assert [(entry.kind, entry.mode) for entry in page.items] == [(LedgerKind.SPEND, "none")]
    assert page.budget is not None
    assert (page.budget.unaccounted_releases, page.budget.reserved_epsilon) == (1, 0.0)


def test_what_was_never_admitted_goes_back_when_the_job_is_over(federation: Federation) -> None:
    spec = record_spec(rounds=3)
    job = federation.start(spec)
    train(federation)
    federation.until(lambda: federation.job(job).current_round == 2)
    federation.researcher.jobs.cancel(job.id)

    for site in federation.sites:
        federation.until(lambda site=site: entries(site, LedgerKind.REFUND))
        spent = total(site, LedgerKind.SPEND)
        assert spent + total(site, LedgerKind.REFUND) == total(site, LedgerKind.RESERVE) == cost_of(spec)
        budget = ledger(site).budget
        assert budget is not None
        assert budget.reserved_epsilon == budget.spent_epsilon == pytest.approx(spent.epsilon(DELTA))
    assert federation.platform.execute("SELECT count(*) FROM participations WHERE reserved_nano IS NOT NULL") == [(0,)]


def test_a_job_that_ran_to_its_end_has_nothing_to_give_back(federation: Federation) -> None:
    job = federation.start(record_spec())
    train(federation, 2)
    assert federation.finish(job).state is JobState.COMPLETED

    for site in federation.sites:
        kinds = [entry.kind.value for entry in entries(site)]
        assert kinds == ["reserve", "spend", "spend"]
        assert total(site, LedgerKind.SPEND) == total(site, LedgerKind.RESERVE)


def test_a_grant_that_is_withdrawn_gives_back_and_nothing_is_admitted_under_it_any_more(
    federation: Federation,
) -> None:
    job = federation.start(record_spec())
    site = federation.sites[0]
    offer = site.claim()

    site.steward.participations.withdraw(part_of(site, job).id, WithdrawParticipation(note="a patient asked"))

    federation.until(lambda: entries(site, LedgerKind.REFUND))
    assert total(site, LedgerKind.REFUND) == cost_of(record_spec())
    with refused(ProblemCode.GRANT_WITHDRAWN):
        site.hand_in(offer, filled(1.0))
    assert len(entries(site)) == 2


def test_a_renewed_grant_reserves_again_for_what_the_job_still_has(make_federation: MakeFederation) -> None:
    federation = make_federation(policy=BY_HAND)
    spec = record_spec(rounds=3)
    job = federation.start(spec)
    site = federation.sites[0]
    approve(site, job, rounds=1)
    for other in federation.sites[1:]:
        approve(other, job)
    train(federation)
    federation.until(lambda: part_of(site, job).state is ParticipationState.EXHAUSTED)

    approve(site, job)

    first, second = entries(site, LedgerKind.RESERVE)
    assert Cost(tuple(first.rdp_nano), first.draws) == cost_of(spec, 1)
    assert Cost(tuple(second.rdp_nano), second.draws) == cost_of(spec, 2)


def test_a_job_that_would_overdraw_is_refused_when_it_is_submitted(make_federation: MakeFederation) -> None:
    """No grant is asked for by then: the policy wants a person to decide."""
    budget = cost_of(record_spec()) + cost_of(record_spec(), 1)
    federation = make_federation(policy=holding(budget))
    federation.start(record_spec())
    for site in federation.sites:
        site.steward.datasets.set_policy(site.dataset.id, holding(budget, BY_HAND))

    with refused(ProblemCode.NO_MATCHING_DATASET) as answer:
        federation.start(record_spec())

    detail = answer[0].problem.detail
    assert "clinic-00/heart: budget: The dataset's privacy budget is epsilon" in detail
    assert "At most 1 of its rounds would pass" in detail
    federation.start(record_spec(rounds=1))
    assert len(entries(federation.sites[0])) == 1


def test_a_dataset_without_a_budget_names_the_clause(make_federation: MakeFederation) -> None:
    federation = make_federation(policy=OPEN.model_copy(update={"budget": None}))

    with refused(ProblemCode.NO_MATCHING_DATASET) as answer:
        federation.start(record_spec())

    assert "budget: the dataset has no privacy budget" in answer[0].problem.detail


def test_a_dataset_whose_budget_is_used_up_is_left_out_and_the_others_go_on(federation: Federation) -> None:
    federation.start(record_spec())
    short = federation.sites[0]
    short.steward.datasets.set_policy(short.dataset.id, holding(cost_of(record_spec(), 3)))

    job = federation.start(record_spec())

    part = part_of(short, job)
    assert part.state is ParticipationState.REJECTED
    assert part.detail is not None
    assert "budget" in part.detail
    assert federation.job(job).state is JobState.RUNNING
    assert federation.researcher.jobs.round(job.id, 1).cohort_size == 2


def two_jobs_for_one_slot(make_federation: MakeFederation) -> tuple[Federation, list[JobView]]:
    """Two jobs wait for their grants at datasets whose budgets hold one of them."""
    federation = make_federation(policy=holding(cost_of(record_spec()), BY_HAND))
    return federation, [federation.start(record_spec(name=name)) for name in ("first", "second")]


def test_a_job_that_would_overdraw_is_refused_when_it_is_approved(make_federation: MakeFederation) -> None:
    """When it was submitted, there was room for it."""
    federation, (first, second) = two_jobs_for_one_slot(make_federation)
    site = federation.sites[0]
    approve(site, first)

    with refused(ProblemCode.BUDGET_EXHAUSTED) as answer:
        approve(site, second)

    detail = answer[0].problem.detail
    assert "is spent, and with what is promised" in detail
    assert "Not one of its rounds would pass" in detail
    assert part_of(site, second).state is ParticipationState.PENDING
    site.steward.participations.withdraw(part_of(site, first).id, WithdrawParticipation(note="not this one"))
    federation.until(lambda: entries(site, LedgerKind.REFUND))
    approve(site, second)


def test_postgres_refuses_an_approval_that_the_service_would_have_let_through(
    make_federation: MakeFederation, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing_lacks(*_: Any, **__: Any) -> None:
        return None

    federation, (first, second) = two_jobs_for_one_slot(make_federation)
    site = federation.sites[0]
    approve(site, first)
    monkeypatch.setattr(app.participations.service, "shortfall", nothing_lacks)

    with refused(ProblemCode.BUDGET_EXHAUSTED):
        approve(site, second)

    assert part_of(site, second).state is ParticipationState.PENDING
    assert len(entries(site)) == 1


def test_of_two_approvals_at_once_for_the_last_slot_one_wins(make_federation: MakeFederation) -> None:
    federation, jobs = two_jobs_for_one_slot(make_federation)
    for site in federation.sites:
        together, answers = threading.Barrier(2), []
        parts = [part_of(site, job).id for job in jobs]

        def decide(part_id: Any, site: Site = site, together: Any = together, answers: Any = answers) -> None:
            client = federation.platform.client(federation.platform.keys[site.steward])
            together.wait()
            try:
                answers.append(client.participations.approve(part_id).state.value)
            except Refused as no:
                answers.append(no.code.value if no.code is not None else "")

        threads = [threading.Thread(target=decide, args=(part_id,)) for part_id in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert sorted(answers) == ["approved", "budget-exhausted"]
        assert len(entries(site)) == 1


def test_a_release_beyond_what_was_reserved_is_refused_at_the_round(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the submission nor the approval did its part: nothing was reserved."""

    async def skip(*_: Any, **__: Any) -> None:
        return None

    monkeypatch.setattr(app.participations.service, "shortfall", skip)
    monkeypatch.setattr(app.participations.service, "reserve", skip)
    federation.start(record_spec())
    site = federation.sites[0]

    with refused(ProblemCode.BUDGET_EXHAUSTED):
        site.hand_in(site.claim(), filled(1.0))

    assert entries(site) == []
    assert federation.platform.execute("SELECT sum(rounds_used) FROM grants") == [(0,)]


def test_a_budget_that_was_lowered_below_what_is_promised_refuses_the_next_round(federation: Federation) -> None:
    job = federation.start(record_spec())
    train(federation)
    federation.until(lambda: federation.job(job).current_round == 2)
    site = federation.sites[0]
    site.steward.datasets.set_policy(site.dataset.id, holding(cost_of(record_spec(), 1)))

    with refused(ProblemCode.BUDGET_EXHAUSTED):
        site.hand_in(site.claim(), filled(1.0))

    budget = ledger(site).budget
    assert budget is not None
    assert budget.closed
    assert budget.reserved_epsilon > budget.epsilon
    for other in federation.sites[1:]:
        other.hand_in(other.claim(), filled(1.0))


def test_two_datasets_of_the_same_data_share_their_budget(make_federation: MakeFederation) -> None:
    federation = make_federation(policy=holding(cost_of(record_spec())))
    for site in federation.sites:
        other = site.announce("heart-again", rows=ROWS, lineage=site.dataset.lineage)
        site.steward.datasets.confirm(other.id)
        site.steward.datasets.set_policy(other.id, holding(cost_of(record_spec())))

    job = federation.start(record_spec())

    for site in federation.sites:
        parts = list(site.steward.participations.list(job_id=job.id))
        assert sorted(part.state.value for part in parts) == ["approved", "rejected"]


def test_no_noise_reaches_the_target_at_a_dataset_and_says_so(federation: Federation) -> None:
    tiny = {"unit": "record", "clip_norm": 1.0, "epsilon": 0.01, "delta": 1e-9}

    with refused(ProblemCode.NO_MATCHING_DATASET) as answer:
        federation.start(record_spec(privacy=tiny, rounds=1000))

    assert "no noise reaches epsilon 0.01" in answer[0].problem.detail


def test_a_dataset_that_has_grown_since_it_was_asked_is_planned_anew(make_federation: MakeFederation) -> None:
    federation = make_federation(policy=BY_HAND)
    job = federation.start(record_spec())
    site = federation.sites[0]
    site.announce(rows=10 * ROWS)

    approve(site, job)
    for other in federation.sites[1:]:
        approve(other, job)

    plan = site.claim().plan
    assert plan == plan_of(record_spec(), 10 * ROWS, ELEMENTS)
    assert plan != plan_of(record_spec(), ROWS, ELEMENTS)
    assert part_of(site, job).declared_rows == 10 * ROWS


def test_mode_none_is_for_those_who_allow_it(make_federation: MakeFederation) -> None:
    federation = make_federation(policy=OPEN.model_copy(update={"modes": (PrivacyMode.RECORD,)}))

    with refused(ProblemCode.NO_MATCHING_DATASET) as answer:
        federation.start(job_spec())

    assert "modes" in answer[0].problem.detail
