"""Policies: what refuses, what is stricter, and what a worker signs."""

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from isthmus.wire.datasets import (
    AutomaticApproval,
    Budget,
    UsePolicy,
    announcement_bytes,
    loosened,
    policy_objections,
    strictest,
)
from isthmus.wire.jobs import JobSpec
from isthmus.wire.models import ModelKind
from isthmus.wire.privacy import PrivacyMode, PrivacyPlan, PrivacyUnit
from isthmus.wire.secured import SecureAggregationSpec

NAMES = st.sampled_from(["ada", "grace", "alan", "*"])
LISTS = st.lists(NAMES, max_size=3, unique=True).map(tuple)
EPSILONS = st.sampled_from([0.1, 1.0, 3.0, 100.0])
DELTAS = st.sampled_from([1e-9, 1e-6, 1e-5, 0.01])
POLICIES = st.builds(
    UsePolicy,
    purposes=LISTS,
    principals=st.none() | LISTS,
    model_kinds=st.lists(st.sampled_from(list(ModelKind)), unique=True).map(tuple),
    modes=st.lists(st.sampled_from(list(PrivacyMode)), unique=True).map(tuple),
    budget=st.none() | st.builds(Budget, epsilon=EPSILONS, delta=DELTAS),
    max_epsilon=st.none() | EPSILONS,
    max_delta=DELTAS,
    max_clip_norm=st.none() | st.sampled_from([0.5, 1.0, 2.0]),
    min_cohort=st.integers(2, 5),
    max_rounds=st.integers(1, 5),
    allow_exact_metrics=st.booleans(),
    allow_exact_statistics=st.booleans(),
    require_secure_aggregation=st.booleans(),
    automatic_approval=st.none() | st.just(AutomaticApproval()),
)

LOOSEST = UsePolicy(
    purposes=("*",),
    model_kinds=tuple(ModelKind),
    modes=tuple(PrivacyMode),
    budget=Budget(epsilon=100.0, delta=0.01),
    max_delta=0.01,
    max_rounds=100,
    allow_exact_metrics=True,
    allow_exact_statistics=True,
)
NEARLY_OPEN = st.builds(
    lambda policy, clauses: LOOSEST.model_copy(update={clause: getattr(policy, clause) for clause in clauses}),
    POLICIES,
    st.sets(st.sampled_from(sorted(UsePolicy.model_fields)), max_size=2),
)
"""Policies that refuse for a reason or two."""


def job(**changes: Any) -> JobSpec:
    """A small job."""
    parts: dict[str, Any] = {
        "name": "small",
        "purpose": "ada",
        "model": {"layers": [{"linear": {"in": 2, "out": 2}}]},
        "data": {"task": "classification", "features": ["a", "b"], "target": "y", "classes": 2},
        "training": {"optimizer": {"sgd": {"lr": 0.1}}},
        "privacy": "none",
        "rounds": 2,
        "cohort": {"min_updates": 3},
    }
    return JobSpec.model_validate({**parts, **changes})


def plan(spec: JobSpec, epsilon: float) -> PrivacyPlan | None:
    """A plan that costs so much."""
    if spec.privacy.unit is PrivacyUnit.NONE:
        return None
    return PrivacyPlan(
        unit=spec.privacy.unit,
        where=spec.privacy.where,
        epsilon=epsilon,
        budget_epsilon=epsilon,
        delta=spec.privacy.claimed_delta,
        clip_norm=1.0,
        noise_multiplier=1.0,
        sampling_probability=1.0,
        expected_batch=0.0,
        steps_per_round=1,
        statistics_noise_multiplier=None,
        evaluation_noise_multiplier=None,
    )


RECORD = {"unit": "record", "clip_norm": 1.0, "epsilon": 3.0}
NUMBERS = {"task": "classification", "features": ["a", "b"], "target": "y", "classes": 2, "standardize": "federated"}
JOBS = st.sampled_from(
    [
        job(),
        job(privacy={"unit": "none", "clip_norm": 1.0}, evaluation={"release": "local"}),
        job(purpose="alan", rounds=4, data=NUMBERS),
        job(privacy=RECORD),
        job(privacy={"unit": "none", "clip_norm": 1.0}, secure_aggregation=True, evaluation={"release": "local"}),
        job(privacy={**RECORD, "delta": 1e-6}, cohort={"min_updates": 2}),
        job(model={"entry_point": "a.b:c"}, privacy=RECORD),
        job(
            privacy={**RECORD, "unit": "organization", "where": "local"},
            strategy={"fedavg": {"weights": "uniform"}},
        ),
    ]
)


@settings(max_examples=500, deadline=None)
@example(  # a budget below `max_epsilon` bounds a single job as well
    one=LOOSEST.model_copy(update={"max_epsilon": 1.0}),
    other=LOOSEST.model_copy(update={"budget": Budget(epsilon=0.1)}),
    spec=job(privacy={"unit": "record", "clip_norm": 1.0, "epsilon": 3.0}),
    epsilon=1.0,
    principal="ada",
)
@given(NEARLY_OPEN, NEARLY_OPEN, JOBS, EPSILONS, st.sampled_from(["ada", "grace"]))
def test_what_the_stricter_of_two_policies_lets_pass_both_let_pass(
    one: UsePolicy, other: UsePolicy, spec: JobSpec, epsilon: float, principal: str
) -> None:
    asked = {"principal": principal, "plan": plan(spec, epsilon)}
    both = strictest(one, other)

    passes = not policy_objections(both, spec, **asked)
    each = not policy_objections(one, spec, **asked) and not policy_objections(other, spec, **asked)
    if passes:
        assert each
    if each and spec.privacy.unit is PrivacyUnit.NONE:
        assert passes, "nothing is refused that both allow"


@settings(deadline=None)
@given(POLICIES, POLICIES)
def test_a_policy_that_is_not_looser_is_in_force_as_it_was_wanted(announced: UsePolicy, wanted: UsePolicy) -> None:
    looser = loosened(announced, wanted)

    assert (strictest(announced, wanted) == wanted) == (not looser)
    assert loosened(announced, strictest(announced, wanted)) == []
    assert loosened(announced, announced) == []
    assert all(any(line.startswith(f"{clause}: ") for clause in UsePolicy.model_fields) for line in looser)


@settings(deadline=None)
@given(POLICIES)
def test_the_default_policy_is_closed_and_no_announcement_refuses_any_job_less(policy: UsePolicy) -> None:
    for spec in (job(), job(privacy=RECORD)):
        assert policy_objections(UsePolicy(), spec, principal="ada", plan=plan(spec, 0.1))


@pytest.mark.parametrize("privacy", [RECORD, {"unit": "none", "clip_norm": 1.0}], ids=["record", "none"])
def test_who_requires_secure_aggregation_is_asked_by_no_other_job_and_looser_is_only_to_require_it_no_more(
    privacy: dict[str, Any],
) -> None:
    plain = job(privacy=privacy, evaluation={"release": "local"})
    secured = plain.model_copy(update={"secure_aggregation": SecureAggregationSpec(clip_norm=5.0)})
    required = LOOSEST.model_copy(update={"require_secure_aggregation": True})

    def refuses(policy: UsePolicy, spec: JobSpec) -> list[str]:
        return policy_objections(policy, spec, principal="ada", plan=plan(spec, 1.0))

    assert refuses(required, plain) == [
        "require_secure_aggregation: the job has no secure aggregation; write secure_aggregation: true."
    ]
    assert refuses(required, secured) == refuses(LOOSEST, plain) == refuses(LOOSEST, secured) == []
    assert strictest(required, LOOSEST) == strictest(LOOSEST, required) == strictest(required, required) == required
    assert loosened(LOOSEST, required) == []
    assert loosened(required, LOOSEST) == ["require_secure_aggregation: the worker's own policy says True."]


# --- What is signed ---------------------------------------------------------------------------------------------------

NOW = datetime(2026, 1, 31, 12, 0, 0, 123456, tzinfo=UTC)


def signed(**changes: Any) -> bytes:
    """The bytes of one announcement, with changes."""
    told: dict[str, Any] = {"policy": UsePolicy(), "lineage": "5e" * 32, "signed_at": NOW, **changes}
    return announcement_bytes(told.pop("organization", "clinic"), told.pop("dataset", "heart"), **told)


OTHER_CLAUSES: dict[str, Any] = {
    "purposes": ("research",),
    "principals": (),
    "model_kinds": tuple(ModelKind),
    "modes": tuple(PrivacyMode),
    "budget": Budget(epsilon=1.0),
    "max_epsilon": 1.0,
    "max_delta": 1e-6,
    "max_clip_norm": 1.0,
    "min_cohort": 3,
    "max_rounds": 10,
    "allow_exact_metrics": True,
    "allow_exact_statistics": True,
    "require_secure_aggregation": True,
    "automatic_approval": AutomaticApproval(),
}


def test_every_clause_is_under_the_signature() -> None:
    assert OTHER_CLAUSES.keys() == UsePolicy.model_fields.keys()
    messages = [signed(policy=UsePolicy(**{name: value})) for name, value in OTHER_CLAUSES.items()]
    assert len({signed(), *messages}) == len(OTHER_CLAUSES) + 1


@pytest.mark.parametrize(
    "changes",
    [
        {"organization": "clinic2"},
        {"organization": "clin", "dataset": "icheart"},
        {"dataset": "lungs"},
        {"lineage": "5f" * 32},
        {"signed_at": NOW + timedelta(microseconds=1)},
    ],
    ids=str,
)
def test_everything_else_of_an_announcement_is_under_the_signature(changes: dict[str, Any]) -> None:
    assert signed(**changes) != signed()


def test_one_moment_is_signed_as_one_whatever_the_worker_s_time_zone() -> None:
    assert signed(signed_at=NOW.astimezone(timezone(timedelta(hours=9)))) == signed()


def test_a_clause_that_came_later_is_under_the_signature_where_it_says_more_than_its_default() -> None:
    required = signed(policy=UsePolicy(require_secure_aggregation=True))

    assert b'"purposes":[],"require_secure_aggregation":true}' in required
    assert required.replace(b',"require_secure_aggregation":true', b"") == signed()


def test_the_signed_bytes_never_change() -> None:
    """A signature that was given stays one: workers and services of other versions compute the same bytes."""
    assert signed() == (
        b'isthmus/announcement/v1{"dataset":"heart","lineage":"' + b"5e" * 32 + b'","organization":"clinic","policy":'
        b'{"allow_exact_metrics":false,"allow_exact_statistics":false,"automatic_approval":null,"budget":null,'
        b'"max_clip_norm":null,"max_delta":1e-05,"max_epsilon":null,"max_rounds":1000,"min_cohort":2,'
        b'"model_kinds":["declarative"],"modes":["record"],"principals":null,"purposes":[]},'
        b'"signed_at":"2026-01-31T12:00:00.123456+00:00"}'
    )
