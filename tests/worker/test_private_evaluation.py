"""Noised counts instead of exact quality."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from isthmus.wire.data import DataSpec
from isthmus_worker.evaluation import evaluate, right_answers
from isthmus_worker.features import Examples
from isthmus_worker.private_evaluation import noised_quality, sensitivity
from isthmus_worker.work import holdout_measures
from tests.worker.factories import make_offer, make_record_spec


def test_the_counts_are_noised_by_sqrt_2_times_the_multiplier_afresh() -> None:
    found = [noised_quality(1000, 700, 2.0) for _ in range(1500)]
    examples = np.array([one["examples"] for one in found])
    right = np.array([one["accuracy"] * one["examples"] for one in found])
    for noised, exact in ((examples, 1000), (right, 700)):
        assert noised.mean() == pytest.approx(exact, abs=0.5)
        assert noised.std() == pytest.approx(2.0 * math.sqrt(2.0), rel=0.12)
        assert len(set(noised)) > 10
    assert abs(np.corrcoef(examples, right)[0, 1]) < 0.15


@pytest.mark.parametrize(
    ("examples", "right", "noise"), [(0, 0, 0.01), (0, 0, 100.0), (5, 5, 10_000.0), (10**6, 0, 1.0)]
)
def test_what_leaves_is_such_as_some_records_could_give(examples: int, right: int, noise: float) -> None:
    for _ in range(50):
        found = noised_quality(examples, right, noise)
        assert set(found) == {"examples", "accuracy"}
        assert found["examples"] >= 1
        assert found["examples"].is_integer()
        assert 0.0 <= found["accuracy"] <= 1.0


def test_little_noise_tells_the_counts_nearly_and_the_sensitivity_is_never_below_its_bound() -> None:
    assert noised_quality(200, 150, 0.01) == {"examples": 200.0, "accuracy": pytest.approx(0.75, abs=0.001)}
    for scale in (1, 2, 3, 1024, 1 << 20):
        assert sensitivity(scale) ** 2 >= 2 * scale**2 > (sensitivity(scale) - 1) ** 2


class LastDigits(nn.Module):
    """Logits that are tied but for a last digit, which hangs on how many records a batch has, as a processor's may."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        digits = torch.full((len(inputs),), len(inputs) % 2 * 1e-7)
        return torch.stack([torch.full((len(inputs),), 0.5e-7), digits], dim=1)


@pytest.mark.parametrize("by_processor", [False, True])
def test_one_record_changes_the_right_answers_by_one_even_where_logits_are_tied(by_processor: bool) -> None:
    """Where a processor's digits show it hangs on the processor, so there is a model that always shows it."""
    model, examples, data = _tied() if by_processor else LastDigits(), _patients(70), _data()

    def alone(rows: np.ndarray[Any, Any]) -> int:
        return right_answers(model, examples.only(rows), data, lambda: None)

    def batched(rows: np.ndarray[Any, Any]) -> int:
        found = evaluate(model, examples.only(rows), data, "cross_entropy", lambda: None)
        return round(found["accuracy"] * found["examples"])

    single = [alone(np.arange(70) == row) for row in range(70)]
    apart = []
    for count in range(2, 70):
        rows = np.arange(70) < count
        assert alone(rows) == sum(single[:count])
        assert alone(rows & (np.arange(70) > 0)) == sum(single[1:count])
        apart.append(abs(batched(rows) - batched(rows & (np.arange(70) > 0))))
    assert by_processor or max(apart) > 1  # the trap is there


def test_what_is_told_counts_the_answers_of_records_by_themselves() -> None:
    spec = make_record_spec(evaluation={"holdout": 0.2, "release": "noised"})
    plan = make_offer(spec).plan
    assert plan is not None
    plan = plan.model_copy(update={"evaluation_noise_multiplier": 0.01})
    examples = Examples(inputs=np.zeros((20, 5), np.float32), targets=np.ones(20, np.int64))
    found = holdout_measures(LastDigits(), examples, spec, plan, lambda _share: None)
    assert found.local["holdout/accuracy"] == 0.0  # in one batch of 20
    assert found.told["holdout/accuracy"] == pytest.approx(1.0, abs=0.01)


def test_chance_in_a_model_is_the_same_for_every_record() -> None:
    class Coin(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return torch.rand(len(inputs), 2)

    model, examples, data = Coin(), _patients(20), _data()
    assert right_answers(model, examples, data, lambda: None) in (0, 20)


def _data() -> DataSpec:
    features = [f"f{place}" for place in range(64)]
    return DataSpec.model_validate({"task": "classification", "features": features, "target": "y", "classes": 2})


def _patients(rows: int) -> Examples:
    inputs = np.random.default_rng(1).standard_normal((rows, 64)).astype(np.float32)
    return Examples(inputs=inputs, targets=np.ones(rows, np.int64))


def _tied() -> nn.Module:
    """Its second output sums what the first does, in another order."""
    generator = torch.Generator().manual_seed(0)
    first, second = nn.Linear(64, 128, bias=False), nn.Linear(128, 2, bias=False)
    weights, sums = torch.randn(64, 64, generator=generator), torch.randn(64, generator=generator)
    order = torch.randperm(64, generator=generator)
    with torch.no_grad():
        first.weight.copy_(torch.cat([weights, weights[order]]))
        second.weight.zero_()
        second.weight[0, :64] = sums
        second.weight[1, 64:] = sums[order]
    return nn.Sequential(first, nn.ReLU(), second)
