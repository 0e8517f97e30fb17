"""A dataset keeps its budget under whatever lineage its worker announces, unless a steward says: other records."""

from typing import Any

import pytest

from isthmus.client import Client, Refused
from isthmus.wire.datasets import Budget, DatasetState, DatasetView
from isthmus.wire.jobs import JobState
from isthmus.wire.ledger import BudgetView
from isthmus.wire.problems import ProblemCode
from tests.federation import OPEN, RECORD, Federation, Site, initial, job_spec
from tests.running import refused
from tests.standing import assert_problem

ROWS = 100
FRESH = "5e" * 32
"""What a worker without the journal of the one before calls the same data."""


def spent_by_a_job(federation: Federation) -> float:
    """Run a private job to its end; the epsilon that it spent at the first site."""
    job = federation.start(job_spec(privacy=RECORD))
    for site in federation.sites:
        site.hand_in(site.claim(), initial())
    federation.finish(job)
    spent = budget_of(federation.sites[0]).spent_epsilon
    assert spent > 0
    return spent


def budget_of(site: Site, dataset: DatasetView | None = None) -> BudgetView:
    """The budget of a site's dataset, as its steward sees it."""
    found = site.steward.datasets.get((dataset or site.dataset).id).budget
    assert found is not None
    return found


def replace_worker(site: Site) -> None:
    """The worker is lost with all that it knew, and another one serves the site."""
    site.steward.workers.revoke(site.dataset.worker_id)
    site.worker = site.platform.worker(site.organization)


def announced_by_another(site: Site) -> DatasetView:
    """The site's dataset, announced by a worker that does not know its lineage."""
    replace_worker(site)
    told = site.announce(lineage=FRESH, rows=ROWS)
    assert (told.id, told.state, told.lineage) == (site.dataset.id, DatasetState.ANNOUNCED, FRESH)
    return told


def ledgers(site: Site) -> dict[str, str]:
    """The lineage that the ledger of each of the site's datasets began with."""
    found = site.platform.execute(
        "SELECT d.name, l.lineage FROM datasets d JOIN ledgers l ON l.id = d.ledger_id WHERE d.organization_id = %s",
        [site.organization.id],
    )
    return dict(found)


def confirmations(site: Site) -> list[tuple[Any, Any]]:
    """Lineage and ledger of every confirmation, as the events tell them."""
    events = site.platform.admin.events.list(f"organization:{site.organization.id}")
    return [(event.data["lineage"], event.data["ledger"]) for event in events if event.kind == "dataset-confirmed"]


def test_what_was_spent_survives_a_lost_worker_and_a_new_lineage(federation: Federation) -> None:
    site = federation.sites[0]
    spent = spent_by_a_job(federation)
    told = announced_by_another(site)
    assert told.budget is not None
    assert (told.ledger_lineage, told.budget.spent_epsilon) == (site.dataset.lineage, spent)

    confirmed = site.steward.datasets.confirm(site.dataset.id)

    assert (confirmed.state, confirmed.lineage) == (DatasetState.CONFIRMED, FRESH)
    assert confirmed.ledger_lineage == site.dataset.lineage
    assert budget_of(site).spent_epsilon == spent
    assert confirmations(site) == [(site.dataset.lineage, "kept"), (FRESH, "kept")]
    assert site.announce(lineage=FRESH, rows=ROWS + 1).state is DatasetState.CONFIRMED, "it is not put back again"
    assert spent_by_a_job(federation) > spent, "and what is spent next comes on top"


@pytest.mark.parametrize("body", [{}, {"json": {}}, {"json": {"other_records": False}}], ids=str)
def test_whoever_says_nothing_keeps_the_budget(federation: Federation, body: dict[str, Any]) -> None:
    site = federation.sites[0]
    announced_by_another(site)

    answer = site.platform.http(site.steward).post(f"/v1/datasets/{site.dataset.id}/confirm", **body)

    assert answer.status_code == 200, answer.text
    assert ledgers(site) == {"heart": site.dataset.lineage}


@pytest.mark.parametrize("body", [{"other": True}, {"other_records": "perhaps"}, {"other_records": None}], ids=str)
def test_what_cannot_be_understood_confirms_nothing(federation: Federation, body: dict[str, Any]) -> None:
    site = federation.sites[0]
    told = announced_by_another(site)

    answer = site.platform.http(site.steward).post(f"/v1/datasets/{told.id}/confirm", json=body)

    assert_problem(answer, ProblemCode.INVALID_REQUEST)
    assert site.steward.datasets.get(told.id) == told


def test_other_records_begin_anew_and_the_old_ledger_stays(federation: Federation) -> None:
    site = federation.sites[0]
    spent = spent_by_a_job(federation)
    announced_by_another(site)

    confirmed = federation.until(lambda: _anew(site.steward, site.dataset))

    assert (confirmed.state, confirmed.lineage, confirmed.ledger_lineage) == (DatasetState.CONFIRMED, FRESH, FRESH)
    assert (budget_of(site).spent_epsilon, budget_of(site).entries) == (0, 0)
    assert confirmations(site) == [(site.dataset.lineage, "kept"), (FRESH, "new")]
    assert site.steward.datasets.confirm(site.dataset.id, other_records=True) == confirmed, "saying it again is safe"
    old = site.announce("the-old-heart", lineage=site.dataset.lineage, rows=ROWS, policy=OPEN)
    assert budget_of(site, old).spent_epsilon == spent, "the records of before have spent what they spent"


@pytest.mark.parametrize("early", [False, True], ids=["after", "before"])
def test_a_second_name_shares_under_either_lineage_before_and_after_it_is_confirmed(
    federation: Federation, early: bool
) -> None:
    site = federation.sites[0]
    spent = spent_by_a_job(federation)
    announced_by_another(site)
    if not early:
        site.steward.datasets.confirm(site.dataset.id)

    new = site.announce("cardiology", lineage=FRESH, rows=ROWS, policy=OPEN)
    old = site.announce("angiography", lineage=site.dataset.lineage, rows=ROWS, policy=OPEN)

    assert budget_of(site, new) == budget_of(site, old) == budget_of(site)
    assert budget_of(site).spent_epsilon == spent
    assert set(ledgers(site).values()) == {site.dataset.lineage}


def test_other_records_take_their_lineage_along_and_a_second_name_waits_for_its_own_steward(
    federation: Federation,
) -> None:
    site = federation.sites[0]
    announced_by_another(site)
    second = site.announce("cardiology", lineage=FRESH, rows=ROWS, policy=OPEN)

    site.steward.datasets.confirm(site.dataset.id, other_records=True)
    assert ledgers(site) == {"heart": FRESH, "cardiology": site.dataset.lineage}
    third = site.announce("lungs", lineage=FRESH, rows=ROWS)
    site.steward.datasets.confirm(second.id, other_records=True)

    assert ledgers(site) == {"heart": FRESH, "cardiology": FRESH, "lungs": FRESH}
    assert third.ledger_lineage == FRESH


def test_a_dataset_keeps_its_own_ledger_where_the_new_lineage_came_under_another_name_first(
    federation: Federation,
) -> None:
    site = federation.sites[0]
    spent = spent_by_a_job(federation)
    replace_worker(site)
    site.announce("cardiology", lineage=FRESH, rows=ROWS, policy=OPEN)

    site.announce(lineage=FRESH, rows=ROWS)
    site.steward.datasets.confirm(site.dataset.id)

    assert ledgers(site) == {"heart": site.dataset.lineage, "cardiology": FRESH}
    assert budget_of(site).spent_epsilon == spent


def test_the_lineage_of_before_cannot_be_called_other_records(federation: Federation) -> None:
    site = federation.sites[0]
    site.steward.datasets.retire(site.dataset.id)

    with refused(ProblemCode.STATE_CONFLICT) as refusals:
        site.steward.datasets.confirm(site.dataset.id, other_records=True)

    assert "these are the records of before" in refusals[0].detail
    assert site.steward.datasets.get(site.dataset.id).state is DatasetState.RETIRED


def test_who_confirmed_by_mistake_retires_it_first(federation: Federation) -> None:
    site = federation.sites[0]
    announced_by_another(site)
    site.steward.datasets.confirm(site.dataset.id)

    with refused(ProblemCode.STATE_CONFLICT) as refusals:
        site.steward.datasets.confirm(site.dataset.id, other_records=True)
    assert "retire it" in refusals[0].detail
    assert ledgers(site) == {"heart": site.dataset.lineage}

    site.steward.datasets.retire(site.dataset.id)
    assert site.steward.datasets.confirm(site.dataset.id, other_records=True).ledger_lineage == FRESH


def test_a_dataset_does_not_begin_anew_under_running_jobs(federation: Federation) -> None:
    site = federation.sites[0]
    job = federation.start(job_spec(privacy=RECORD))
    reserved = budget_of(site)
    site.announce(lineage=FRESH, rows=ROWS)

    with refused(ProblemCode.STATE_CONFLICT) as refusals:
        site.steward.datasets.confirm(site.dataset.id, other_records=True)

    assert "Withdraw it from them" in refusals[0].detail
    assert (ledgers(site), budget_of(site)) == ({"heart": site.dataset.lineage}, reserved)
    assert site.steward.datasets.get(site.dataset.id).state is DatasetState.ANNOUNCED
    federation.researcher.jobs.cancel(job.id)
    assert federation.until(lambda: _anew(site.steward, site.dataset)).ledger_lineage == FRESH


def test_a_dataset_that_keeps_its_budget_goes_on_with_what_was_promised(federation: Federation) -> None:
    site = federation.sites[0]
    federation.start(job_spec(privacy=RECORD))
    reserved = budget_of(site)
    assert reserved.reserved_epsilon > 0
    site.announce(lineage=FRESH, rows=ROWS)

    confirmed = site.steward.datasets.confirm(site.dataset.id)

    assert (confirmed.state, confirmed.budget) == (DatasetState.CONFIRMED, reserved)


def test_a_budget_that_was_kept_is_the_smallest_of_all_names_that_draw_on_it(federation: Federation) -> None:
    site = federation.sites[0]
    announced_by_another(site)
    small = OPEN.model_copy(update={"budget": Budget(epsilon=0.5)})

    site.announce("cardiology", lineage=FRESH, rows=ROWS, policy=small)

    assert budget_of(site).epsilon == 0.5


def test_a_small_budget_counts_once_its_dataset_is_confirmed_and_takes_nothing_from_others_before(
    federation: Federation,
) -> None:
    site = federation.sites[0]
    running = federation.start(job_spec(privacy=RECORD))
    before = budget_of(site)
    assert before.reserved_epsilon > 0
    tiny = OPEN.model_copy(update={"budget": Budget(epsilon=0.01)})
    another = site.platform.worker(site.organization)

    second = site.platform.announce(another, "cardiology", lineage=site.dataset.lineage, rows=ROWS, policy=tiny)

    assert (second.state, set(ledgers(site).values())) == (DatasetState.ANNOUNCED, {site.dataset.lineage})
    assert budget_of(site) == budget_of(site, second) == before
    assert not before.closed
    for each in federation.sites:
        each.hand_in(each.claim(), initial())
    assert federation.finish(running).state is JobState.COMPLETED
    spent = spent_by_a_job(federation)
    assert spent > 0.01

    site.steward.datasets.confirm(second.id)

    lowered = budget_of(site)
    assert (lowered.epsilon, lowered.closed, lowered.spent_epsilon) == (0.01, True, spent)
    site.steward.datasets.retire(second.id)
    assert (budget_of(site).epsilon, budget_of(site).closed) == (before.epsilon, False)


def test_a_researcher_is_not_told_with_which_lineage_a_ledger_began(federation: Federation) -> None:
    site = federation.sites[0]

    seen = federation.researcher.datasets.get(site.dataset.id)

    assert (seen.lineage, seen.ledger_lineage, seen.budget) == ("", "", None)


def _anew(steward: Client, dataset: DatasetView) -> DatasetView | None:
    """The dataset with a new ledger, if its steward may have one by now."""
    try:
        return steward.datasets.confirm(dataset.id, other_records=True)
    except Refused as refusal:
        if refusal.code is not ProblemCode.STATE_CONFLICT:
            raise
        return None
