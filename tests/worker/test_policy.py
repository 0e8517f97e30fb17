"""The organization's own rules, and offers that contradict themselves."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from isthmus.wire.rounds import TaskOffer
from isthmus_worker.offers import contradictions
from isthmus_worker.policy import objections, resource_objections
from isthmus_worker.settings import Policy, Resources
from tests.worker.factories import DATASET, OPEN_POLICY, ORGANIZATION, make_offer, make_spec


def _policy(**changes: Any) -> Policy:
    return Policy.model_validate({**OPEN_POLICY, **changes})


PRIVATE = {"privacy": {"clip_norm": 2.0, "noise_multiplier": 0.5}}
ENTRY_POINT = {"model": {"entry_point": "hospital.models:net"}}


@pytest.mark.parametrize(
    ("spec", "clause", "value", "passing"),
    [
        ({}, "principals", [], ["rosa"]),
        ({}, "purposes", ["billing"], ["heart-research"]),
        ({}, "require_clipping", True, False),
        ({}, "max_clip_norm", 1.0, "unbounded"),
        (PRIVATE, "max_clip_norm", 1.9, 2.0),
        (PRIVATE, "min_noise_multiplier", 0.6, 0.5),
        ({}, "allow_exact_metrics", False, True),
        ({}, "allow_exact_statistics", False, True),
        ({}, "min_cohort", 4, 3),
        ({}, "max_rounds", 2, 3),
        ({}, "max_model_bytes", 100, 10_000),
    ],
)
def test_each_clause_refuses_alone_and_says_what_would_pass(
    spec: dict[str, Any], clause: str, value: Any, passing: Any
) -> None:
    offer = make_offer(make_spec(**spec))

    found = objections(_policy(**{clause: value}), offer)

    assert [one.split(":")[0] for one in found] == [clause]
    assert objections(_policy(**{clause: passing}), offer) == []


def test_an_entry_point_passes_only_if_its_kind_and_its_name_are_listed() -> None:
    offer = make_offer().model_copy(update={"spec": make_spec(**ENTRY_POINT)})

    assert [one.split(":")[0] for one in objections(_policy(), offer)] == ["model_kinds", "entry_points"]
    assert [one.split(":")[0] for one in objections(_policy(model_kinds=["entry_point"]), offer)] == ["entry_points"]
    allowed = _policy(model_kinds=["entry_point"], entry_points=["hospital.models:net"])
    assert objections(allowed, offer) == []


def test_the_purpose_of_the_grant_and_that_of_the_job_must_both_pass() -> None:
    offer = make_offer().model_copy(update={"purpose": "marketing"})

    assert "marketing" in objections(_policy(purposes=["heart-research"]), offer)[0]


def test_the_policy_as_it_stands_in_a_new_file_refuses_everything() -> None:
    assert len(objections(Policy(), make_offer())) >= 4


def test_more_threads_than_this_machine_gives_are_refused() -> None:
    offer = make_offer(make_spec(training={"optimizer": "adam", "threads": 4}))

    assert "max_threads" in resource_objections(Resources(max_threads=2), offer)[0]
    assert resource_objections(Resources(max_threads=4), offer) == []


def _contradictions(offer: TaskOffer) -> list[str]:
    return contradictions(offer, organization=ORGANIZATION, datasets=[DATASET])


@pytest.mark.parametrize("number", [0, 1, 2, 3, 4])
def test_what_an_honest_service_offers_agrees_with_itself(number: int) -> None:
    assert _contradictions(make_offer(number=number)) == []


def test_a_column_that_is_constant_over_all_sites_is_no_lie() -> None:
    offer = make_offer()
    assert offer.statistics is not None
    constant = offer.statistics.model_copy(update={"variance": [0.0, 1.0]})

    assert _contradictions(offer.model_copy(update={"statistics": constant})) == []


@pytest.mark.parametrize(
    ("lie", "word"),
    [
        (lambda offer: {"spec_digest": "0" * 64}, "digest"),
        (lambda offer: {"dataset": "staff"}, "staff"),
        (lambda offer: {"organization": "zurich"}, "zurich"),
        (lambda offer: {"round_number": 0}, "kind"),
        (lambda offer: {"round_number": 9}, "kind"),
        (lambda offer: {"spec": make_spec(rounds=2)}, "digest"),
        (
            lambda offer: {
                "model_manifest": make_offer(
                    make_spec(model={"layers": [{"linear": {"in": 5, "out": 2}}]})
                ).model_manifest
            },
            "layers",
        ),
        (lambda offer: {"upload_manifest": make_offer(number=0).upload_manifest}, "manifest"),
        (lambda offer: {"statistics": None}, "statistics"),
        (lambda offer: {"statistics": offer.statistics.model_copy(update={"names": ["age", "ill"]})}, "statistics"),
        (lambda offer: {"statistics": offer.statistics.model_copy(update={"variance": [-1.0, 1.0]})}, "statistics"),
        (lambda offer: {"statistics": offer.statistics.model_copy(update={"variance": [1e-25, 1.0]})}, "no records"),
        (lambda offer: {"statistics": offer.statistics.model_copy(update={"variance": [1e-23, 1.0]})}, "no records"),
        (lambda offer: {"statistics": offer.statistics.model_copy(update={"variance": [math.inf, 1.0]})}, "no records"),
        (lambda offer: {"statistics": offer.statistics.model_copy(update={"mean": [1.0, math.nan]})}, "no records"),
    ],
)
def test_a_lie_in_an_offer_is_found(lie: Callable[[TaskOffer], dict[str, Any]], word: str) -> None:
    offer = make_offer()

    found = _contradictions(offer.model_copy(update=lie(offer)))

    assert any(word in one for one in found), found
