"""The organization's own rules, and offers that contradict themselves."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from isthmus.wire.jobs import JobSpec
from isthmus.wire.privacy import PrivacyUnit
from isthmus.wire.rounds import TaskOffer
from isthmus_worker.offers import contradictions
from isthmus_worker.policy import objections, resource_objections
from isthmus_worker.settings import Policy, Resources, Settings, announced_policy
from tests.worker.factories import (
    BUDGET,
    DATASET,
    LOCAL,
    OPEN_POLICY,
    ORGANIZATION,
    RECORD,
    make_local_spec,
    make_offer,
    make_record_spec,
    make_secured_spec,
    make_spec,
)


def _objections(offer: TaskOffer, *, budget: Mapping[str, float] | None = BUDGET, **changes: Any) -> list[str]:
    settings = Settings.model_validate(
        {
            "service_url": "http://127.0.0.1",
            "state_dir": "state",
            "datasets": [{"name": DATASET, "source": {"kind": "csv", "path": "p.csv"}, "budget": budget}],
            "policy": {**OPEN_POLICY, **changes},
        }
    )
    return objections(announced_policy(settings, settings.datasets[0]), settings.policy, offer)


CLIPPED = {"privacy": {"unit": "none", "clip_norm": 2.0}}
ENTRY_POINT = {"model": {"entry_point": "hospital.models:net"}}


@pytest.mark.parametrize(
    ("spec", "clause", "value", "passing"),
    [
        ({}, "principals", [], ["rosa"]),
        ({}, "purposes", ["billing"], ["heart-research"]),
        ({}, "modes", ["record", "organization-local"], ["none"]),
        (RECORD, "modes", ["none", "organization-local"], ["record"]),
        (LOCAL, "modes", ["none", "record", "organization-central"], ["organization-local"]),
        ({}, "model_kinds", ["entry_point"], ["declarative"]),
        ({}, "max_clip_norm", 1.0, None),
        (CLIPPED, "max_clip_norm", 1.9, 2.0),
        (RECORD, "max_epsilon", 2.9, 3.0),
        (RECORD, "max_delta", 9e-6, 1e-5),
        (RECORD, "min_cohort", 4, 3),
        (RECORD, "max_rounds", 2, 3),
        ({}, "allow_exact_metrics", False, True),
        ({}, "allow_exact_statistics", False, True),
        ({}, "require_secure_aggregation", True, False),
        (RECORD, "require_secure_aggregation", True, False),
        ({}, "min_cohort", 4, 3),
        ({}, "max_rounds", 2, 3),
        ({}, "max_model_bytes", 100, 10_000),
    ],
)
def test_each_clause_refuses_alone_and_says_what_would_pass(
    spec: dict[str, Any], clause: str, value: Any, passing: Any
) -> None:
    offer = make_offer(make_spec(**spec))

    found = _objections(offer, **{clause: value})

    assert [one.split(":")[0] for one in found] == [clause]
    assert _objections(offer, **{clause: passing}) == []


@pytest.mark.parametrize("clause", ["allow_exact_metrics", "allow_exact_statistics", "max_clip_norm"])
def test_a_job_with_a_privacy_unit_needs_no_leave_for_what_leaves_noised(clause: str) -> None:
    closed = {"allow_exact_metrics": False, "allow_exact_statistics": False, "max_clip_norm": 1e-6}

    for number in (0, 1, 4):
        assert _objections(make_offer(make_record_spec(), number), **{clause: closed[clause]}) == []


@pytest.mark.parametrize("number", [1, 2, 4])
def test_where_secure_aggregation_is_required_only_jobs_under_it_pass_in_every_task(number: int) -> None:
    unsecured = make_secured_spec(secure_aggregation=None)

    assert _objections(make_offer(make_secured_spec(), number), require_secure_aggregation=True) == []
    assert _objections(make_offer(unsecured, number), require_secure_aggregation=True) == [
        "require_secure_aggregation: the job has no secure aggregation; write secure_aggregation: true."
    ]


def test_a_dataset_without_a_budget_serves_no_job_with_a_privacy_unit() -> None:
    assert "budget:" in _objections(make_offer(make_record_spec()), budget=None)[0]
    assert "max_epsilon:" in _objections(make_offer(make_record_spec()), budget={"epsilon": 2.0})[0]
    assert _objections(make_offer(), budget=None) == []  # mode none was listed, and no budget counts it


def test_a_privacy_unit_without_a_plan_is_refused_by_the_policy_alone() -> None:
    assert "modes:" in _objections(make_offer(make_record_spec(), plan=None))[0]


def test_an_entry_point_passes_only_if_its_kind_and_its_name_are_listed() -> None:
    offer = make_offer().model_copy(update={"spec": make_spec(**ENTRY_POINT)})

    assert [one.split(":")[0] for one in _objections(offer)] == ["model_kinds", "entry_points"]
    assert [one.split(":")[0] for one in _objections(offer, model_kinds=["entry_point"])] == ["entry_points"]
    assert _objections(offer, model_kinds=["entry_point"], entry_points=["hospital.models:net"]) == []


def test_the_purpose_of_the_grant_and_that_of_the_job_must_both_pass() -> None:
    offer = make_offer().model_copy(update={"purpose": "marketing"})

    assert "marketing" in _objections(offer, purposes=["heart-research"])[0]


def test_the_policy_as_it_stands_in_a_new_file_refuses_everything() -> None:
    policy = Policy().model_dump(mode="json", exclude_none=True)
    refused = {one.split(":")[0] for one in _objections(make_offer(), budget=None, **policy)}
    assert refused == {"principals", "purposes", "modes", "allow_exact_metrics", "allow_exact_statistics"}
    refused = {one.split(":")[0] for one in _objections(make_offer(make_record_spec()), budget=None, **policy)}
    assert refused == {"principals", "purposes", "budget"}


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


def _planned(offer: TaskOffer, **changes: Any) -> TaskOffer:
    assert offer.plan is not None
    return offer.model_copy(update={"plan": offer.plan.model_copy(update=changes)})


@pytest.mark.parametrize("number", [0, 1, 4])
@pytest.mark.parametrize("spec", [make_record_spec(), make_local_spec(), make_record_spec(evaluation={
    "holdout": 0.2, "release": "noised"})])  # fmt: skip
def test_an_honest_plan_agrees_with_its_job(spec: JobSpec, number: int) -> None:
    if number > 0 or spec.measures_statistics:
        assert _contradictions(make_offer(spec, number)) == []


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"noise_multiplier": 2.2}, "costs epsilon 3.1"),
        ({"noise_multiplier": 0.0}, "no possible noise"),
        ({"noise_multiplier": math.nan}, "no possible noise"),
        ({"statistics_noise_multiplier": 2.0}, "it promises 3"),
        ({"statistics_noise_multiplier": None}, "noise for statistics"),
        ({"evaluation_noise_multiplier": 5.0}, "noise for evaluations"),
        ({"epsilon": 2.0}, "not 2 as it says"),
        ({"sampling_probability": 0.5}, "costs epsilon"),
        ({"sampling_probability": 0.2}, "batch_size and epochs never give"),
        ({"sampling_probability": 5e-324}, "batch_size and epochs never give"),
        ({"expected_batch": 1e-9}, "batch_size and epochs never give"),
        ({"steps_per_round": 9}, "costs epsilon"),
        ({"steps_per_round": 7}, "batch_size and epochs never give"),
        ({"steps_per_round": 0}, "number of steps"),
        ({"clip_norm": 5.0}, "another unit, place, clip_norm or delta"),
        ({"delta": 1e-3}, "another unit, place, clip_norm or delta"),
        ({"unit": PrivacyUnit.ORGANIZATION}, "another unit, place, clip_norm or delta"),
    ],
)
def test_a_plan_that_does_not_keep_the_jobs_promise_is_found(change: dict[str, Any], word: str) -> None:
    found = _contradictions(_planned(make_offer(make_record_spec()), **change))

    assert any(word in one for one in found), found


def test_less_noise_than_the_job_names_is_found_and_so_is_a_plan_too_many_or_too_few() -> None:
    local = make_offer(make_local_spec())

    assert any("noise multiplier is 0.9" in one for one in _contradictions(_planned(local, noise_multiplier=0.9)))
    assert any("no privacy plan" in one for one in _contradictions(local.model_copy(update={"plan": None})))
    assert any("claims no privacy" in one for one in _contradictions(make_offer(plan=local.plan)))
