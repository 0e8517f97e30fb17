"""What a job under secure aggregation cannot be: what would need, or show, a single update."""

from typing import Any, ClassVar

import pytest
from pydantic import ValidationError

from isthmus.wire.jobs import JobSpec
from isthmus.wire.strategies import FedAvg

SECURED: dict[str, Any] = {
    "name": "secured",
    "model": {"layers": [{"linear": {"in": 2, "out": 2}}]},
    "data": {"task": "classification", "features": ["age", "chol"], "target": "ill", "classes": 2},
    "training": {"optimizer": {"sgd": {"lr": 0.1}}},
    "cohort": {"min_updates": 3},
    "privacy": {"unit": "none", "clip_norm": 1.0},
    "rounds": 1,
    "secure_aggregation": True,
}


class Median(FedAvg):
    """A strategy that looks at every update by itself."""

    needs_single_updates: ClassVar[bool] = True


def test_a_strategy_that_needs_the_single_updates_is_refused_with_the_reason() -> None:
    with pytest.raises(
        ValidationError, match="needs the single updates, of which secure aggregation shows only the sum"
    ):
        JobSpec.model_validate({**SECURED, "strategy": Median()})
    assert JobSpec.model_validate({**SECURED, "strategy": Median(), "secure_aggregation": False}).strategy == Median()


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm", "fedadam"])
def test_strategies_of_the_mean_are_secured(strategy: str) -> None:
    assert JobSpec.model_validate({**SECURED, "strategy": strategy}).secure_aggregation is not None
