"""What members of a cohort must have been told alike: whatever changes their vectors changes the digest."""

from typing import Any

import pytest

from isthmus.wire.data import FeatureStatistics
from isthmus.wire.manifest import AggregationRule, DType, Manifest, TensorSpec
from isthmus.wire.privacy import NoisePlace, PrivacyPlan, PrivacyUnit
from isthmus.wire.secured import terms_digest

WEIGHT = TensorSpec(dtype=DType.F32, shape=(2, 3))
MANIFEST = Manifest(tensors={"weight": WEIGHT, "bias": TensorSpec(dtype=DType.F32, shape=(2,))})
STATISTICS = FeatureStatistics(
    names=["age", "pressure"], count=[40.0, 34.0], mean=[54.0, 130.0], variance=[80.0, 640.0], rows=40.0, sites=3
)
PLAN = PrivacyPlan(
    unit=PrivacyUnit.ORGANIZATION,
    where=NoisePlace.DISTRIBUTED,
    epsilon=3.0,
    budget_epsilon=3.0,
    delta=1e-6,
    clip_norm=1.0,
    noise_multiplier=4.0,
    sampling_probability=1.0,
    expected_batch=0.0,
    steps_per_round=1,
    statistics_noise_multiplier=None,
    evaluation_noise_multiplier=None,
)


@pytest.mark.parametrize(
    "change",
    [
        {"rule": AggregationRule.KEEP},
        {"shape": (3, 2)},
        {"dtype": DType.F64},
        {"optional": True},
    ],
)
def test_every_field_of_a_tensor_counts(change: dict[str, Any]) -> None:
    other = Manifest(tensors={**MANIFEST.tensors, "weight": WEIGHT.model_copy(update=change)})
    assert terms_digest(other, STATISTICS, PLAN) != terms_digest(MANIFEST, STATISTICS, PLAN)


def test_tensors_count_by_name_and_in_no_order() -> None:
    turned = Manifest(tensors=dict(reversed(MANIFEST.tensors.items())))
    renamed = Manifest(tensors={"other": WEIGHT, "bias": MANIFEST.tensors["bias"]})
    assert terms_digest(turned, STATISTICS, PLAN) == terms_digest(MANIFEST, STATISTICS, PLAN)
    assert terms_digest(renamed, STATISTICS, PLAN) != terms_digest(MANIFEST, STATISTICS, PLAN)


@pytest.mark.parametrize(
    "change",
    [
        {"names": ["pressure", "age"]},
        {"count": [40.0, 35.0]},
        {"mean": [54.0, 130.00000000000003]},
        {"variance": [80.0, 1e30]},
        {"rows": 41.0},
        {"sites": 4},
    ],
)
def test_every_number_of_the_statistics_counts(change: dict[str, Any]) -> None:
    found = terms_digest(MANIFEST, STATISTICS.model_copy(update=change), PLAN)
    assert found not in {terms_digest(MANIFEST, STATISTICS, PLAN), terms_digest(MANIFEST, None, PLAN)}


@pytest.mark.parametrize("change", [{"where": NoisePlace.LOCAL}, {"noise_multiplier": 4.5}, {"clip_norm": 2.0}])
def test_noise_of_organizations_counts(change: dict[str, Any]) -> None:
    found = terms_digest(MANIFEST, STATISTICS, PLAN.model_copy(update=change))
    assert found not in {terms_digest(MANIFEST, STATISTICS, PLAN), terms_digest(MANIFEST, STATISTICS, None)}


def test_what_differs_between_honest_members_does_not_count() -> None:
    dearer = PLAN.model_copy(update={"epsilon": 2.0, "budget_epsilon": 2.5})
    assert terms_digest(MANIFEST, STATISTICS, dearer) == terms_digest(MANIFEST, STATISTICS, PLAN)
    of_records = PLAN.model_copy(update={"unit": PrivacyUnit.RECORD, "where": None})
    noisier = of_records.model_copy(update={"noise_multiplier": 9.0, "sampling_probability": 0.1})
    assert terms_digest(MANIFEST, STATISTICS, of_records) == terms_digest(MANIFEST, STATISTICS, noisier)


def test_what_went_through_json_gives_the_same() -> None:
    """The service computes it from what it has stored, a worker from what it was sent."""
    odd = STATISTICS.model_copy(update={"mean": [-0.0, 1e22], "variance": [5e-324, 1 / 3]})
    sent = [type(part).model_validate_json(part.model_dump_json()) for part in (MANIFEST, odd, PLAN)]
    assert terms_digest(*sent) == terms_digest(MANIFEST, odd, PLAN)
