"""A dataset's policy comes from its worker, signed; stewards tighten it; its budget belongs to the lineage."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from isthmus.client import Client
from isthmus.wire.datasets import AnnounceDataset, AutomaticApproval, Budget, DatasetState, DatasetView, UsePolicy
from isthmus.wire.jobs import JobState
from isthmus.wire.ledger import BudgetView
from isthmus.wire.models import ModelKind
from isthmus.wire.organizations import OrganizationView
from isthmus.wire.privacy import PrivacyMode
from isthmus.wire.problems import ProblemCode
from tests.federation import OPEN, RECORD, Federation, initial, job_spec
from tests.running import LOOSEST, Platform, announcement, lineage_of, refused
from tests.standing import assert_problem

SIGNATURE = ProblemCode.POLICY_SIGNATURE_INVALID
NARROW = UsePolicy(
    purposes=("research",),
    principals=("ada",),
    model_kinds=(ModelKind.DECLARATIVE,),
    modes=(PrivacyMode.RECORD,),
    budget=Budget(epsilon=3.0, delta=1e-6),
    max_epsilon=1.0,
    max_delta=1e-6,
    max_clip_norm=1.0,
    min_cohort=3,
    max_rounds=50,
    require_secure_aggregation=True,
)


def but(policy: UsePolicy, **changes: Any) -> UsePolicy:
    """The policy with other clauses."""
    return UsePolicy.model_validate({**policy.model_dump(), **changes})


class Clinic(NamedTuple):
    """A data holder with a steward and a worker that signs."""

    platform: Platform
    organization: OrganizationView
    steward: Client
    worker: Client
    key: Ed25519PrivateKey

    def signed(self, dataset: str = "heart", **told: Any) -> AnnounceDataset:
        return announcement(self.key, self.organization.name, dataset, **told)

    def announce(self, dataset: str = "heart", **told: Any) -> DatasetView:
        return self.platform.announce(self.worker, dataset, **told)

    def confirmed(self, dataset: str = "heart", **told: Any) -> DatasetView:
        return self.steward.datasets.confirm(self.announce(dataset, **told).id)

    def budget_of(self, dataset: DatasetView) -> BudgetView:
        found = self.steward.datasets.get(dataset.id).budget
        assert found is not None
        return found

    def events(self, kind: str) -> list[dict[str, Any]]:
        found = self.platform.admin.events.list(f"organization:{self.organization.id}")
        return [event.data for event in found if event.kind == kind]


@pytest.fixture
def clinic(platform: Platform) -> Clinic:
    """A data holder."""
    organization = platform.organization()
    worker = platform.worker(organization)
    return Clinic(platform, organization, platform.steward(organization), worker, platform.signing[worker][0])


# --- The signature ----------------------------------------------------------------------------------------------------


def other_key(clinic: Clinic) -> AnnounceDataset:
    return announcement(Ed25519PrivateKey.generate(), clinic.organization.name)


def colleagues_key(clinic: Clinic) -> AnnounceDataset:
    colleague = clinic.platform.worker(clinic.organization)
    return announcement(*clinic.platform.signing[colleague])


def other_dataset(clinic: Clinic) -> AnnounceDataset:
    return clinic.signed("lungs")


def other_organization(clinic: Clinic) -> AnnounceDataset:
    return announcement(clinic.key, "another-clinic")


def other_policy(clinic: Clinic) -> AnnounceDataset:
    return clinic.signed(policy=NARROW).model_copy(update={"policy": LOOSEST})


def other_lineage(clinic: Clinic) -> AnnounceDataset:
    return clinic.signed().model_copy(update={"lineage": "5e" * 32})


def other_moment(clinic: Clinic) -> AnnounceDataset:
    signed = clinic.signed()
    return signed.model_copy(update={"signed_at": signed.signed_at + timedelta(microseconds=1)})


def tomorrow(clinic: Clinic) -> AnnounceDataset:
    return clinic.signed(signed_at=datetime.now(UTC) + timedelta(days=1))


def a_moment_without_utc(clinic: Clinic) -> AnnounceDataset:
    return clinic.signed().model_copy(update={"signed_at": datetime.fromisoformat("0001-01-01T00:00:00+14:00")})


def nobody(clinic: Clinic) -> AnnounceDataset:
    return clinic.signed().model_copy(update={"signature": "00" * 64})


FORGED = [
    other_key, colleagues_key, other_dataset, other_organization, other_policy, other_lineage, other_moment, tomorrow,
    a_moment_without_utc, nobody,
]  # fmt: skip


@pytest.mark.parametrize("forged", FORGED, ids=lambda found: found.__name__)
@pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
def test_what_its_worker_did_not_sign_is_refused_and_changes_nothing(
    clinic: Clinic, forged: Callable[[Clinic], AnnounceDataset], known: bool
) -> None:
    before = clinic.confirmed(policy=NARROW, rows=100) if known else None
    body = forged(clinic)

    with refused(SIGNATURE) as refusals:
        clinic.worker.datasets.announce("heart", body)

    assert ("Set the worker's clock" if forged is tomorrow else "is not of this policy") in refusals[0].detail
    assert list(clinic.steward.datasets.list()) == ([] if before is None else [before])
    assert len(clinic.platform.execute("SELECT id FROM ledgers")) == known


def test_an_older_looser_policy_does_not_come_back(clinic: Clinic) -> None:
    older = clinic.signed(policy=LOOSEST)
    clinic.worker.datasets.announce("heart", older)
    newer = clinic.confirmed(policy=NARROW)

    with refused(SIGNATURE) as refusals:
        clinic.worker.datasets.announce("heart", older)

    assert "an older one is not taken" in refusals[0].detail
    assert clinic.steward.datasets.get(newer.id) == newer


def test_of_two_policies_of_one_moment_the_first_stays(clinic: Clinic) -> None:
    now = datetime.now(UTC)
    first = clinic.signed(policy=NARROW, signed_at=now)
    stands = clinic.worker.datasets.announce("heart", first)

    with refused(SIGNATURE):
        clinic.announce(policy=LOOSEST, signed_at=now)

    assert clinic.worker.datasets.announce("heart", first) == stands, "the same one again is safe"


def test_a_new_worker_signs_with_its_own_key_and_by_its_own_clock(clinic: Clinic) -> None:
    dataset = clinic.confirmed(signed_at=datetime.now(UTC) + timedelta(minutes=9))
    clinic.steward.workers.revoke(dataset.worker_id)
    other = clinic.platform.worker(clinic.organization)

    with refused(SIGNATURE):
        other.datasets.announce("heart", clinic.signed())
    moved = clinic.platform.announce(other)

    assert (moved.id, moved.lineage, moved.state) == (dataset.id, dataset.lineage, DatasetState.ANNOUNCED)


# --- Tighter and looser -----------------------------------------------------------------------------------------------

LOOSER = {
    "purposes": {"purposes": ("research", "marketing")},
    "any-purpose": {"purposes": ("*",)},
    "principals": {"principals": ("ada", "grace")},
    "anybody": {"principals": None},
    "model_kinds": {"model_kinds": tuple(ModelKind)},
    "modes": {"modes": (PrivacyMode.RECORD, PrivacyMode.NONE)},
    "budget": {"budget": Budget(epsilon=3.5, delta=1e-6)},
    "budgets-delta": {"budget": Budget(epsilon=1.0, delta=1e-5)},
    "max_epsilon": {"max_epsilon": 2.0},
    "no-max_epsilon": {"max_epsilon": None},
    "max_delta": {"max_delta": 1e-5},
    "max_clip_norm": {"max_clip_norm": 2.0},
    "min_cohort": {"min_cohort": 2},
    "max_rounds": {"max_rounds": 51},
    "allow_exact_metrics": {"allow_exact_metrics": True},
    "allow_exact_statistics": {"allow_exact_statistics": True},
    "require_secure_aggregation": {"require_secure_aggregation": False},
}


@pytest.mark.parametrize("changes", LOOSER.values(), ids=LOOSER)
def test_a_steward_cannot_loosen_any_clause(clinic: Clinic, changes: dict[str, Any]) -> None:
    dataset = clinic.confirmed(policy=NARROW)

    with refused(ProblemCode.POLICY_LOOSENED) as refusals:
        clinic.steward.datasets.set_policy(dataset.id, but(NARROW, **changes))

    (clause,) = changes
    assert f"{clause}: the worker's own policy says" in refusals[0].detail
    assert "configuration of the worker" in refusals[0].detail
    assert clinic.steward.datasets.get(dataset.id) == dataset


IMPOSSIBLE: list[dict[str, Any]] = [
    {"budget": {"epsilon": 0}},
    {"budget": {"epsilon": -1}},
    {"budget": {"epsilon": float("nan")}},
    {"budget": {"epsilon": float("inf")}},
    {"budget": {"epsilon": 1e9}},
    {"budget": {"epsilon": 1, "delta": 0}},
    {"budget": {"epsilon": 1, "delta": 1}},
    {"budget": {}},
    {"budget": 3},
    {"max_epsilon": 0},
    {"max_epsilon": float("nan")},
    {"max_delta": 1},
    {"max_delta": None},
    {"modes": ["homomorphic"]},
    {"modes": ["record"] * 6},
    {"modes": "record"},
    {"purposes": ["nul \x00"]},
    {"purposes": None},
    {"min_cohort": 1},
    {"max_rounds": 0},
    {"require_secure_aggregation": "sometimes"},
    {"require_secure_aggregation": None},
    {"max_clip_norm": 0},
    {"max_clip_norm": float("inf")},
    {"min_noise_multiplier": 0.5},
    {"require_clipping": True},
]


@pytest.mark.parametrize("changes", IMPOSSIBLE, ids=str)
def test_a_policy_that_means_nothing_is_refused_and_the_one_in_force_stays(
    clinic: Clinic, changes: dict[str, Any]
) -> None:
    dataset = clinic.confirmed(policy=NARROW)
    body = json.dumps({**NARROW.model_dump(mode="json"), **changes})

    answer = clinic.platform.http(clinic.steward).put(
        f"/v1/datasets/{dataset.id}/policy", content=body, headers={"content-type": "application/json"}
    )

    problem = assert_problem(answer, ProblemCode.INVALID_REQUEST)
    assert all(error.field.startswith(next(iter(changes))) for error in problem.errors)
    assert clinic.steward.datasets.get(dataset.id) == dataset


TIGHTER = {
    "no-purposes": {"purposes": ()},
    "nobody": {"principals": ()},
    "no-modes": {"modes": ()},
    "no-budget": {"budget": None},
    "budget": {"budget": Budget(epsilon=0.5, delta=1e-7)},
    "max_epsilon": {"max_epsilon": 0.1},
    "max_delta": {"max_delta": 1e-9},
    "max_clip_norm": {"max_clip_norm": 0.5},
    "min_cohort": {"min_cohort": 10},
    "max_rounds": {"max_rounds": 1},
    "by-rule": {"automatic_approval": AutomaticApproval()},
}


@pytest.mark.parametrize("changes", TIGHTER.values(), ids=TIGHTER)
def test_a_steward_tightens_any_clause_and_decides_on_approval_by_rule(clinic: Clinic, changes: dict[str, Any]) -> None:
    dataset = clinic.confirmed(policy=NARROW)
    wanted = but(NARROW, **changes)

    told = clinic.steward.datasets.set_policy(dataset.id, wanted)

    assert (told.policy, told.announced_policy, told.state) == (wanted, NARROW, DatasetState.CONFIRMED)
    again = clinic.announce(policy=NARROW)
    assert again.policy == wanted, "announced again, what the steward said holds"


def test_what_a_steward_tightened_may_be_given_back_up_to_the_worker_s_own_policy(clinic: Clinic) -> None:
    dataset = clinic.confirmed(policy=NARROW)
    clinic.steward.datasets.set_policy(dataset.id, but(NARROW, max_delta=1e-9, min_cohort=5, principals=()))

    assert clinic.steward.datasets.set_policy(dataset.id, NARROW).policy == NARROW


def test_nobody_approves_by_rule_unless_the_steward_says_so(clinic: Clinic) -> None:
    by_rule = but(NARROW, automatic_approval=AutomaticApproval())

    dataset = clinic.confirmed(policy=by_rule)

    assert dataset.policy == NARROW
    clinic.steward.datasets.set_policy(dataset.id, by_rule)
    looser = clinic.announce(policy=but(NARROW, max_rounds=60))
    assert looser.policy.automatic_approval == AutomaticApproval()


def test_a_tighter_announcement_is_in_force_at_once(clinic: Clinic) -> None:
    dataset = clinic.confirmed(policy=LOOSEST)
    clinic.steward.datasets.set_policy(dataset.id, but(OPEN, max_rounds=10))

    told = clinic.announce(policy=but(LOOSEST, max_epsilon=0.5, min_cohort=7, require_secure_aggregation=True))

    assert told.state is DatasetState.CONFIRMED
    assert told.policy == but(OPEN, max_rounds=10, max_epsilon=0.5, min_cohort=7, require_secure_aggregation=True)


@pytest.mark.parametrize("set_by_steward", [False, True])
def test_a_looser_announcement_waits_for_the_steward(clinic: Clinic, set_by_steward: bool) -> None:
    dataset = clinic.confirmed(policy=NARROW)
    if set_by_steward:
        clinic.steward.datasets.set_policy(dataset.id, but(NARROW, max_rounds=5))

    looser = clinic.announce(policy=but(NARROW, max_rounds=60, min_cohort=4))

    assert (looser.state, looser.confirmed_at) == (DatasetState.ANNOUNCED, None)
    assert (looser.policy.max_rounds, looser.policy.min_cohort) == (5 if set_by_steward else 60, 4)
    confirmed = clinic.steward.datasets.confirm(dataset.id)
    assert (confirmed.state, confirmed.policy) == (DatasetState.CONFIRMED, looser.policy)


# --- Whose business it is ---------------------------------------------------------------------------------------------


def test_a_researcher_sees_neither_lineage_nor_budget_nor_who_else_is_listed(clinic: Clinic) -> None:
    listed = but(LOOSEST, principals=("ada", "grace"))
    dataset = clinic.confirmed(policy=listed)
    seen = clinic.platform.researcher("ada").datasets.get(dataset.id)

    assert (seen.lineage, seen.budget) == ("", None)
    assert seen.announced_policy.principals == seen.policy.principals == ("ada",)
    for client in (clinic.steward, clinic.platform.admin):
        known = client.datasets.get(dataset.id)
        assert known.lineage == lineage_of(clinic.organization.name, "heart")
        assert known.budget is not None
        assert known.announced_policy == listed
    assert dataset.lineage not in clinic.platform.http(clinic.platform.researcher()).get("/v1/datasets").text


# --- The budget -------------------------------------------------------------------------------------------------------


def test_a_budget_is_that_of_the_policy_in_force(clinic: Clinic) -> None:
    dataset = clinic.confirmed(policy=but(LOOSEST, budget=Budget(epsilon=8.0, delta=1e-5)))
    whole = BudgetView(
        epsilon=8.0, delta=1e-5, spent_epsilon=0, reserved_epsilon=0, unaccounted_releases=0, entries=0, closed=False
    )
    assert clinic.budget_of(dataset) == whole

    tighter = but(LOOSEST, budget=Budget(epsilon=2.0, delta=1e-6))
    clinic.steward.datasets.set_policy(dataset.id, tighter)

    assert clinic.budget_of(dataset) == whole.model_copy(update={"epsilon": 2.0, "delta": 1e-6})
    assert [(told["epsilon"], told["delta"], told["closed"]) for told in clinic.events("dataset-budget-set")] == [
        (8.0, 1e-5, False),
        (2.0, 1e-6, False),
    ]


def test_a_budget_taken_away_is_closed_and_comes_back(clinic: Clinic) -> None:
    dataset = clinic.confirmed(policy=LOOSEST)

    clinic.steward.datasets.set_policy(dataset.id, but(LOOSEST, budget=None))
    assert clinic.budget_of(dataset).closed
    clinic.steward.datasets.set_policy(dataset.id, LOOSEST)
    assert not clinic.budget_of(dataset).closed


def test_data_keeps_its_budget_under_another_name(clinic: Clinic) -> None:
    heart = clinic.confirmed(policy=but(LOOSEST, budget=Budget(epsilon=8.0)))

    renamed = clinic.announce("cardiology", lineage=heart.lineage, policy=but(LOOSEST, budget=Budget(epsilon=50.0)))

    assert clinic.budget_of(renamed).epsilon == 8.0, "the smaller budget of the two holds for both"
    assert clinic.platform.execute("SELECT count(*) FROM ledgers") == [(1,)]
    clinic.steward.datasets.retire(heart.id)
    assert clinic.budget_of(renamed).epsilon == 50.0, "a name that is retired asks for nothing"


def test_two_organizations_never_share_a_ledger(clinic: Clinic, platform: Platform) -> None:
    heart = clinic.confirmed()
    other = platform.worker(platform.organization())

    platform.announce(other, lineage=heart.lineage)

    assert platform.execute("SELECT count(*) FROM ledgers") == [(2,)]


def test_a_budget_lowered_below_what_is_promised_is_closed_until_it_is_raised(federation: Federation) -> None:
    site = federation.sites[0]
    federation.start(job_spec(privacy=RECORD, rounds=5))
    reserved = budget_of(federation)
    assert reserved.reserved_epsilon > 0.1

    lowered = site.steward.datasets.set_policy(site.dataset.id, but(OPEN, budget=Budget(epsilon=0.1)))
    assert lowered.budget is not None
    assert lowered.budget.closed
    raised = site.steward.datasets.set_policy(site.dataset.id, OPEN)

    assert raised.budget == reserved
    assert not raised.budget.closed


def test_what_was_spent_is_spent_under_any_name(federation: Federation) -> None:
    site = federation.sites[0]
    job = federation.start(job_spec(privacy=RECORD))
    for each in federation.sites:
        offer = each.claim()
        each.hand_in(offer, initial())
    assert federation.finish(job).state is JobState.COMPLETED
    spent = budget_of(federation).spent_epsilon
    assert spent > 0

    renamed = site.announce("cardiology", lineage=site.dataset.lineage, rows=100)

    assert renamed.budget is not None
    assert renamed.budget.spent_epsilon == spent


def budget_of(federation: Federation, number: int = 0) -> BudgetView:
    """The budget of a site, as its steward sees it."""
    site = federation.sites[number]
    found = site.steward.datasets.get(site.dataset.id).budget
    assert found is not None
    return found
