"""A dataset changes its worker when the old one and the new one have signed it, and not otherwise."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from isthmus.client import Client
from isthmus.wire.datasets import DatasetState, DatasetView, Handover, handover_bytes
from isthmus.wire.organizations import OrganizationView
from isthmus.wire.problems import ProblemCode
from tests.running import Platform, announcement, refused


class Clinic(NamedTuple):
    """A data holder with two workers, of which the first serves a confirmed dataset."""

    platform: Platform
    organization: OrganizationView
    steward: Client
    old: Client
    new: Client
    dataset: DatasetView

    def key(self, worker: Client) -> Ed25519PrivateKey:
        """A worker's private key."""
        return self.platform.signing[worker][0]

    def handover(self, giver: Client, taker: Client, **changes: Any) -> Handover:
        """What both sign; with changes that neither did."""
        terms: dict[str, Any] = {
            "giver": _public(self.key(giver)),
            "taker": _public(self.key(taker)),
            "lineage": self.dataset.lineage,
            "entries": 3,
            "head": "ab" * 32,
            "document": "cd" * 32,
            "signed_at": datetime.now(UTC),
            **changes,
        }
        said = handover_bytes(self.organization.name, "heart", **terms)
        return Handover(**terms, given=self.key(giver).sign(said).hex(), taken=self.key(taker).sign(said).hex())

    def announce(self, worker: Client, handover: Handover | None = None, **told: Any) -> DatasetView:
        """Announce the dataset as it is."""
        told = {"lineage": self.dataset.lineage, **told}
        body = announcement(self.key(worker), self.organization.name, "heart", **told)
        return worker.datasets.announce("heart", body.model_copy(update={"handover": handover}))


def _public(key: Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes_raw().hex()


@pytest.fixture
def clinic(platform: Platform) -> Clinic:
    """A data holder."""
    organization = platform.organization()
    old, new = platform.worker(organization, "old"), platform.worker(organization, "new")
    steward = platform.steward(organization)
    return Clinic(platform, organization, steward, old, new, platform.dataset(old, confirmed_by=steward))


def test_a_dataset_that_was_handed_on_stays_confirmed_under_its_new_worker(clinic: Clinic) -> None:
    moved = clinic.announce(clinic.new, clinic.handover(clinic.old, clinic.new), rows=304)

    assert (moved.id, moved.worker, moved.state, moved.rows) == (
        clinic.dataset.id, "new", DatasetState.CONFIRMED, 304,
    )  # fmt: skip
    assert moved.confirmed_at == clinic.dataset.confirmed_at
    with refused(ProblemCode.DATASET_SERVED_ELSEWHERE):
        clinic.announce(clinic.old)
    events = [
        event for event in clinic.platform.admin.events.list(f"organization:{clinic.organization.id}")
        if event.kind.value == "dataset-moved"
    ]  # fmt: skip
    assert len(events) == 1
    assert events[0].data["former_worker_id"] == str(clinic.dataset.worker_id)
    assert (events[0].data["entries"], events[0].data["head"]) == (3, "ab" * 32)


def test_announcing_it_again_with_the_same_handover_changes_nothing(clinic: Clinic) -> None:
    handover = clinic.handover(clinic.old, clinic.new)

    assert clinic.announce(clinic.new, handover) == clinic.announce(clinic.new, handover)


def test_a_looser_policy_of_the_new_worker_still_waits_for_the_steward(clinic: Clinic) -> None:
    looser = clinic.dataset.announced_policy.model_copy(update={"min_cohort": 2})
    tighter = looser.model_copy(update={"min_cohort": 5})
    clinic.announce(clinic.old, policy=tighter)

    moved = clinic.announce(clinic.new, clinic.handover(clinic.old, clinic.new), policy=looser)

    assert (moved.worker, moved.state) == ("new", DatasetState.ANNOUNCED)


def test_an_old_handover_is_not_played_again_after_the_dataset_came_back(clinic: Clinic) -> None:
    first = clinic.handover(clinic.old, clinic.new)
    clinic.announce(clinic.new, first)
    clinic.announce(clinic.old, clinic.handover(clinic.new, clinic.old))

    with refused(ProblemCode.POLICY_SIGNATURE_INVALID):
        clinic.announce(clinic.new, first)
    assert clinic.announce(clinic.old).worker == "old"


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda one: {"head": "ee" * 32}, ProblemCode.POLICY_SIGNATURE_INVALID),
        (lambda one: {"entries": 2}, ProblemCode.POLICY_SIGNATURE_INVALID),
        (lambda one: {"given": one.taken}, ProblemCode.POLICY_SIGNATURE_INVALID),
        (lambda one: {"taken": one.given}, ProblemCode.POLICY_SIGNATURE_INVALID),
        (lambda one: {"taken": "0" * 128}, ProblemCode.POLICY_SIGNATURE_INVALID),
        (lambda one: {"giver": one.taker}, ProblemCode.DATASET_SERVED_ELSEWHERE),
        (lambda one: {"taker": one.giver}, ProblemCode.DATASET_SERVED_ELSEWHERE),
    ],
)
def test_a_handover_that_is_not_what_both_signed_moves_nothing(
    clinic: Clinic, spoil: Callable[[Handover], dict[str, Any]], code: ProblemCode
) -> None:
    handover = clinic.handover(clinic.old, clinic.new)

    with refused(code):
        clinic.announce(clinic.new, handover.model_copy(update=spoil(handover)))

    assert clinic.steward.datasets.get(clinic.dataset.id).worker == "old"


@pytest.mark.parametrize(
    "change",
    [
        {"lineage": "77" * 32},
        {"signed_at": datetime.now(UTC) - timedelta(hours=1)},
        {"signed_at": datetime.now(UTC) + timedelta(days=1)},
    ],
)
def test_a_handover_of_other_data_or_of_another_time_moves_nothing(clinic: Clinic, change: dict[str, Any]) -> None:
    with refused(ProblemCode.POLICY_SIGNATURE_INVALID):
        clinic.announce(clinic.new, clinic.handover(clinic.old, clinic.new, **change))


def test_nobody_takes_a_dataset_that_another_organization_handed_on(clinic: Clinic, platform: Platform) -> None:
    stranger = platform.worker(platform.organization())

    with refused(ProblemCode.DATASET_SERVED_ELSEWHERE):
        clinic.announce(clinic.new, clinic.handover(clinic.old, stranger))
    with refused(ProblemCode.DATASET_SERVED_ELSEWHERE):
        clinic.announce(clinic.new, clinic.handover(stranger, clinic.new))


def test_what_a_revoked_worker_signed_moves_nothing_by_itself(clinic: Clinic) -> None:
    handover = clinic.handover(clinic.old, clinic.new)
    clinic.steward.workers.revoke(clinic.dataset.worker_id)

    moved = clinic.announce(clinic.new, handover)

    assert (moved.worker, moved.state) == ("new", DatasetState.ANNOUNCED)  # as any other worker's: confirmed anew
