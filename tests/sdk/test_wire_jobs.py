"""What a job spec refuses because its parts do not go together."""

from typing import Any

import pytest
from pydantic import ValidationError

from isthmus.wire.jobs import JobSpec

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
        ({"privacy": {"clip_norm": 1.0, "noise_multiplier": 0.1}}, "noise"),
    ],
)
def test_what_could_turn_a_running_variance_negative_is_refused(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ValidationError, match=rf"batch_norm.*{word}.*group_norm"):
        spec(**changes)


@pytest.mark.parametrize("holdout", [0.6, 0.999999])
def test_a_hold_out_may_not_leave_a_handful_to_train_on(holdout: float) -> None:
    with pytest.raises(ValidationError, match=r"less than or equal to 0\.5"):
        spec(evaluation={"holdout": holdout})
