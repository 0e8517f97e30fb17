"""Datasets: announced by their worker, decided on by their stewards, seen by those whom they concern."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from isthmus.client import Client, Refused
from isthmus.wire.datasets import AnnounceDataset, DatasetState, UsePolicy
from isthmus.wire.organizations import OrganizationView
from isthmus.wire.problems import ProblemCode
from tests.running import Platform, announcement, missing_id, refused


class Clinic(NamedTuple):
    """A data holder with a steward and a worker."""

    organization: OrganizationView
    steward: Client
    worker: Client
    key: Ed25519PrivateKey

    def announcement(self, dataset: str = "heart", **told: Any) -> AnnounceDataset:
        """What its worker signs."""
        return announcement(self.key, self.organization.name, dataset, **told)


@pytest.fixture
def clinic(platform: Platform) -> Clinic:
    """A data holder."""
    return found(platform)


def found(platform: Platform) -> Clinic:
    organization = platform.organization()
    worker = platform.worker(organization)
    return Clinic(organization, platform.steward(organization), worker, platform.signing[worker][0])


def test_a_new_dataset_is_closed_until_its_steward_opens_it(platform: Platform, clinic: Clinic) -> None:
    announced = clinic.worker.datasets.announce("heart", clinic.announcement(policy=UsePolicy()))

    assert announced.state is DatasetState.ANNOUNCED
    assert announced.policy == announced.announced_policy == UsePolicy()
    assert announced.budget is None
    assert announced.organization == clinic.organization.name
    assert announced.confirmed_at is None
    assert clinic.steward.datasets.get(announced.id) == announced


def test_announcing_what_is_known_changes_nothing(platform: Platform, clinic: Clinic) -> None:
    confirmed = platform.dataset(clinic.worker, confirmed_by=clinic.steward)

    assert platform.announce(clinic.worker) == confirmed
    kinds = [event.kind.value for event in platform.admin.events.list(f"organization:{clinic.organization.id}")]
    assert kinds.count("dataset-announced") == 1


def test_more_rows_keep_a_dataset_confirmed_and_other_columns_do_not(platform: Platform, clinic: Clinic) -> None:
    confirmed = platform.dataset(clinic.worker, confirmed_by=clinic.steward)

    grown = platform.announce(clinic.worker, rows=304)
    assert (grown.id, grown.rows, grown.state) == (confirmed.id, 304, DatasetState.CONFIRMED)

    reordered = platform.announce(clinic.worker, rows=304, columns=("chol", "age", "disease"))
    assert reordered.state is DatasetState.CONFIRMED

    reshaped = platform.announce(clinic.worker, rows=304, columns=("age", "disease"))
    assert (reshaped.state, reshaped.confirmed_at) == (DatasetState.ANNOUNCED, None)


def test_a_dataset_stored_before_columns_had_shapes_stays_confirmed_when_it_is_announced_again(
    platform: Platform, clinic: Clinic
) -> None:
    confirmed = platform.dataset(clinic.worker, confirmed_by=clinic.steward)
    platform.execute(
        "UPDATE datasets SET data_schema = jsonb_build_object('columns', (SELECT jsonb_agg(one - 'shape')"
        " FROM jsonb_array_elements(data_schema::jsonb -> 'columns') AS one))"
    )
    ((stored,),) = platform.execute("SELECT data_schema FROM datasets")
    assert all(column.keys() == {"name", "kind", "missing"} for column in stored["columns"])

    again = platform.announce(clinic.worker)

    assert (again.state, again.confirmed_at) == (DatasetState.CONFIRMED, confirmed.confirmed_at)


def test_a_dataset_is_served_by_one_worker(platform: Platform, clinic: Clinic) -> None:
    platform.dataset(clinic.worker)
    other = platform.worker(clinic.organization)

    with refused(ProblemCode.DATASET_SERVED_ELSEWHERE):
        platform.announce(other)


def test_another_worker_takes_over_when_the_first_is_revoked_and_the_steward_confirms_anew(
    platform: Platform, clinic: Clinic
) -> None:
    before = platform.dataset(clinic.worker, confirmed_by=clinic.steward)
    clinic.steward.datasets.set_policy(before.id, UsePolicy(purposes=("research",)))
    other = platform.worker(clinic.organization, "agent-2")
    clinic.steward.workers.revoke(before.worker_id)

    after = platform.announce(other)

    assert (after.id, after.worker, after.state) == (before.id, "agent-2", DatasetState.ANNOUNCED)
    assert after.policy.purposes == ("research",)
    with refused(ProblemCode.DATASET_SERVED_ELSEWHERE):
        platform.announce(platform.worker(clinic.organization))


def test_two_organizations_may_use_one_name(platform: Platform, clinic: Clinic) -> None:
    other = found(platform)

    assert platform.dataset(clinic.worker).id != platform.dataset(other.worker).id


def test_of_two_workers_that_announce_one_name_at_once_one_serves_it(platform: Platform, clinic: Clinic) -> None:
    workers = [clinic.worker, platform.worker(clinic.organization), platform.worker(clinic.organization)]

    def announce(worker: Client) -> str:
        try:
            platform.announce(worker)
        except Refused as refusal:
            return str(refusal.code)
        return "served"

    with ThreadPoolExecutor(3) as pool:
        answers = sorted(pool.map(announce, workers))

    assert answers == ["dataset-served-elsewhere", "dataset-served-elsewhere", "served"]
    assert platform.execute("SELECT count(*) FROM datasets") == [(1,)]


def test_a_retired_dataset_stays_so_until_its_steward_confirms_it(platform: Platform, clinic: Clinic) -> None:
    dataset = platform.dataset(clinic.worker, confirmed_by=clinic.steward)

    assert clinic.steward.datasets.retire(dataset.id).state is DatasetState.RETIRED
    assert clinic.steward.datasets.retire(dataset.id).state is DatasetState.RETIRED
    assert platform.announce(clinic.worker, rows=400).state is DatasetState.RETIRED
    back = clinic.steward.datasets.confirm(dataset.id)
    assert (back.id, back.state, back.rows) == (dataset.id, DatasetState.CONFIRMED, 400)


def test_only_stewards_of_its_organization_decide_on_a_dataset(platform: Platform, clinic: Clinic) -> None:
    dataset = platform.dataset(clinic.worker)
    stranger = found(platform).steward

    for client, code in (
        (stranger, ProblemCode.NOT_FOUND),
        (platform.admin, ProblemCode.FORBIDDEN),
        (platform.researcher(), ProblemCode.FORBIDDEN),
        (clinic.worker, ProblemCode.FORBIDDEN),
    ):
        with refused(code):
            client.datasets.confirm(dataset.id)
        with refused(code):
            client.datasets.retire(dataset.id)
        with refused(code):
            client.datasets.set_policy(dataset.id, UsePolicy(purposes=("anything",)))

    assert clinic.steward.datasets.get(dataset.id) == dataset


def test_everybody_sees_the_datasets_that_concern_them(platform: Platform, clinic: Clinic) -> None:
    other = found(platform)
    open_one = platform.dataset(clinic.worker, "open", confirmed_by=clinic.steward)
    announced = platform.dataset(clinic.worker, "announced")
    foreign = platform.dataset(other.worker, "foreign", confirmed_by=other.steward)
    retired = platform.dataset(other.worker, "retired", confirmed_by=other.steward)
    other.steward.datasets.retire(retired.id)
    everything = {open_one.id, announced.id, foreign.id, retired.id}

    for client, visible in (
        (platform.admin, everything),
        (clinic.steward, {open_one.id, announced.id}),
        (other.steward, {foreign.id, retired.id}),
        (platform.researcher(), {open_one.id, foreign.id}),
    ):
        assert {dataset.id for dataset in client.datasets.list()} == visible
        for dataset_id in visible:
            assert client.datasets.get(dataset_id).id == dataset_id
        for dataset_id in (everything - visible) | {missing_id()}:
            with refused(ProblemCode.NOT_FOUND):
                client.datasets.get(dataset_id)
    with refused(ProblemCode.FORBIDDEN):
        clinic.worker.datasets.page()


def test_datasets_are_listed_in_pages_without_gaps(platform: Platform, clinic: Clinic) -> None:
    announced = [platform.dataset(clinic.worker, f"part-{number}").id for number in range(5)]

    first = clinic.steward.datasets.page(limit=3)
    second = clinic.steward.datasets.page(limit=3, cursor=first.next_cursor)

    assert [item.id for item in (*first.items, *second.items)] == announced
    assert second.next_cursor is None


def test_a_policy_is_kept_as_it_was_set(platform: Platform, clinic: Clinic) -> None:
    dataset = platform.dataset(clinic.worker)
    policy = UsePolicy(
        purposes=("heart disease research",),
        principals=("ada",),
        max_epsilon=0.5,
        max_clip_norm=1e16,
        min_cohort=3,
    )

    assert clinic.steward.datasets.set_policy(dataset.id, policy).policy == policy
    assert clinic.steward.datasets.get(dataset.id).policy == policy
    assert platform.announce(clinic.worker, rows=400).policy == policy


def test_a_researcher_is_not_told_who_else_a_policy_lists(platform: Platform, clinic: Clinic) -> None:
    dataset = platform.dataset(clinic.worker, confirmed_by=clinic.steward)
    clinic.steward.datasets.set_policy(dataset.id, UsePolicy(principals=("ada", "grace")))

    assert platform.researcher("ada").datasets.get(dataset.id).policy.principals == ("ada",)
    assert platform.researcher("alan").datasets.get(dataset.id).policy.principals == ()
    assert clinic.steward.datasets.get(dataset.id).policy.principals == ("ada", "grace")


@pytest.mark.parametrize(
    "name", ["Heart", "a" * 64, ".heart", "heart%00", "he art", "%2e%2e", "01890a5d-ac96-774b-bcce-b302099a8057/"]
)
def test_a_name_that_does_not_fit_is_refused(platform: Platform, clinic: Clinic, name: str) -> None:
    body = clinic.announcement().model_dump(mode="json")

    answer = platform.http(clinic.worker).put(f"/v1/datasets/{name}", json=body)

    assert answer.status_code in (307, 404, 405, 422)
    assert platform.execute("SELECT count(*) FROM datasets") == [(0,)]


def test_a_name_that_looks_like_an_id_is_not_taken_for_one(platform: Platform, clinic: Clinic) -> None:
    real = platform.dataset(clinic.worker, "heart")
    twin = platform.dataset(clinic.worker, str(real.id))

    assert twin.id != real.id
    assert clinic.steward.datasets.get(real.id).name == "heart"


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 0},
        {"rows": 10**30},
        {"rows": float("1e400")},
        {"description": "nul \x00"},
        {"task_kinds": ["nul \x00"]},
        {"task_kinds": []},
        {"data_schema": {"columns": []}},
        {"data_schema": {"columns": [{"name": "a\x00", "kind": "number"}]}},
        {"data_schema": {"columns": [{"name": "a", "kind": "number"}] * 2}},
        {"policy": {"anything": "goes"}},
        {"lineage": "of good family"},
        {"signature": "AB" * 64},
        {"signed_at": "yesterday"},
        {"signed_at": None},
        {"state": "confirmed"},
    ],
    ids=str,
)
def test_an_announcement_that_does_not_fit_is_refused(
    platform: Platform, clinic: Clinic, change: dict[str, object]
) -> None:
    import json

    body = json.dumps({**clinic.announcement().model_dump(mode="json"), **change})
    headers = {"Content-Type": "application/json"}

    answer = platform.http(clinic.worker).put("/v1/datasets/heart", content=body, headers=headers)

    assert answer.status_code == 422
    assert answer.json()["code"] == "invalid-request"
    assert platform.execute("SELECT count(*) FROM datasets") == [(0,)]
