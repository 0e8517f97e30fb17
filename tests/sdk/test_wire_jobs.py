"""What a job spec refuses because its parts do not go together."""

from typing import Any

import pytest
from pydantic import ValidationError

from isthmus.wire.jobs import EvaluationRelease, JobSpec
from isthmus.wire.privacy import PrivacyMode, PrivacySpec, PrivacyUnit

BATCH_NORM = {
    "layers": [{"linear": {"in": 2, "out": 4}}, {"batch_norm": {"features": 4}}, {"linear": {"in": 4, "out": 2}}]
}


def spec(**changes: Any) -> JobSpec:
    """A job whose model has a batch_norm."""
    parts: dict[str, Any] = {
        "name": "small",
        "model": BATCH_NORM,
        "data": {"task": "classification", "features": ["a", "b"], "target": "y", "classes": 2},
        "training": {"optimizer": {"sgd": {"lr": 0.1}}},
        "privacy": "none",
        "rounds": 1,
    }
    return JobSpec.model_validate({**parts, **changes})


@pytest.mark.parametrize("strategy", ["fedavg", {"fedavg": {"lr": 0.5}}])
def test_batch_norm_goes_with_plain_averaging(strategy: Any) -> None:
    assert spec(strategy=strategy).model.mixes_records


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"strategy": "fedavgm"}, "fedavg"),
        ({"strategy": "fedadam"}, "fedavg"),
        ({"strategy": {"fedavg": {"lr": 1.5}}}, "fedavg"),
        ({"privacy": {"unit": "record", "clip_norm": 1.0, "noise_multiplier": 0.1}}, "mixes the records"),
        (
            {
                "privacy": {"unit": "organization", "where": "local", "clip_norm": 1.0, "noise_multiplier": 0.1},
                "strategy": {"fedavg": {"weights": "uniform"}},
            },
            "noise",
        ),
    ],
)
def test_what_could_turn_a_running_variance_negative_is_refused(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ValidationError, match=rf"batch_norm.*{word}.*group_norm"):
        spec(**changes)


@pytest.mark.parametrize("holdout", [0.6, 0.999999])
def test_a_hold_out_may_not_leave_a_handful_to_train_on(holdout: float) -> None:
    with pytest.raises(ValidationError, match=r"less than or equal to 0\.5"):
        spec(evaluation={"holdout": holdout})


PLAIN = {"layers": [{"linear": {"in": 2, "out": 2}}]}
UNIFORM = {"fedavg": {"weights": "uniform"}}
RECORD = {"unit": "record", "clip_norm": 1.0, "epsilon": 3.0}


@pytest.mark.parametrize("section", ["none", {"unit": "none"}, {"unit": "none", "clip_norm": 2.0}])
def test_no_privacy_has_to_be_written_out(section: Any) -> None:
    privacy = spec(privacy=section).privacy

    assert (privacy.unit, privacy.mode, privacy.claimed_delta) == (PrivacyUnit.NONE, PrivacyMode.NONE, 0.0)


@pytest.mark.parametrize("section", [None, {}, "", "record", {"clip_norm": 1.0}, [], 0, False])
def test_what_names_no_unit_is_not_taken_for_none(section: Any) -> None:
    with pytest.raises(ValidationError, match="privacy"):
        spec(privacy=section)


def test_a_job_without_a_privacy_section_is_none() -> None:
    parts = spec().model_dump(mode="json")
    del parts["privacy"]
    with pytest.raises(ValidationError, match="privacy"):
        JobSpec.model_validate(parts)


@pytest.mark.parametrize(
    ("section", "mode", "delta"),
    [
        (RECORD, PrivacyMode.RECORD, 1e-5),
        ({**RECORD, "delta": 1e-7}, PrivacyMode.RECORD, 1e-7),
        ({**RECORD, "unit": "organization", "where": "central"}, PrivacyMode.CENTRAL, 1e-6),
        ({**RECORD, "unit": "organization", "where": "local"}, PrivacyMode.LOCAL, 1e-6),
    ],
)
def test_a_claim_has_a_mode_and_a_delta(section: Any, mode: PrivacyMode, delta: float) -> None:
    privacy = PrivacySpec.model_validate(section)
    assert (privacy.mode, privacy.claimed_delta) == (mode, delta)


@pytest.mark.parametrize(
    ("privacy", "release"),
    [("none", EvaluationRelease.EXACT), (RECORD, EvaluationRelease.LOCAL)],
)
def test_results_stay_at_the_site_wherever_something_is_claimed(privacy: Any, release: EvaluationRelease) -> None:
    assert spec(model=PLAIN, privacy=privacy).evaluation_release is release


@pytest.mark.parametrize("name", ["epsilon", "delta", "noise_multiplier", "clip_norm", "statistics_noise_multiplier"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), 1e12, "1e999", True, None])
def test_no_number_of_the_privacy_section_can_undo_it(name: str, value: Any) -> None:
    """What is refused, or else is a number that noise can be computed from."""
    section = {**RECORD, name: value}
    if name == "noise_multiplier" and value is not None:
        del section["epsilon"]
    try:
        privacy = spec(model=PLAIN, privacy=section).privacy
    except ValidationError:
        return
    assert value is None or value is True
    assert privacy.clip_norm is not None
    assert 0 < privacy.clip_norm <= 1e9
    assert (privacy.epsilon is None) != (privacy.noise_multiplier is None)
    assert 0 < privacy.claimed_delta <= 0.01


@pytest.mark.parametrize("where", ["central", "local"])
@pytest.mark.parametrize("kind", ["fedavg", "fedavgm", "fedadam"])
def test_organizations_are_hidden_only_where_each_counts_the_same(where: str, kind: str) -> None:
    section = {**RECORD, "unit": "organization", "where": where}
    with pytest.raises(ValidationError, match=rf"uniform weights.*{kind}: {{weights: uniform}}"):
        spec(model=PLAIN, privacy=section, strategy=kind)
    assert spec(model=PLAIN, privacy=section, strategy={kind: {"weights": "uniform"}}).privacy.where == where
