"""Events: what they cost, and that they survive a ledger."""

import json
import math
from typing import Any

import pytest

from isthmus.privacy.events import (
    MAX_DEPTH,
    DistributedGaussianRelease,
    Event,
    GaussianRelease,
    PoissonGaussianRelease,
    Repeated,
    Together,
    event_from_json,
    rdp_of,
)
from isthmus.privacy.rdp import distributed_gaussian_rdp, gaussian_rdp, poisson_gaussian_rdp

GAUSSIAN = GaussianRelease(1.3)
POISSON = PoissonGaussianRelease(0.01, 1.1)
SHARES = DistributedGaussianRelease(1 << 20, 10**12, 4, 1000)


def test_each_kind_costs_what_its_mechanism_does() -> None:
    assert rdp_of(GAUSSIAN) == gaussian_rdp(1.3)
    assert rdp_of(POISSON) == poisson_gaussian_rdp(0.01, 1.1)
    assert rdp_of(SHARES) == distributed_gaussian_rdp(1 << 20, 10**12, 4, 1000)


def test_replacing_instead_of_removing_doubles_the_sensitivity_and_quadruples_the_cost() -> None:
    assert rdp_of(GaussianRelease(2.0, sensitivity=2.0)) == gaussian_rdp(1.0)


def test_costs_of_what_follows_each_other_add_up() -> None:
    expected = [one + 7 * other for one, other in zip(rdp_of(GAUSSIAN), rdp_of(POISSON), strict=True)]
    assert rdp_of(Together((GAUSSIAN, Repeated(POISSON, 7)))) == pytest.approx(expected, rel=1e-14)


def test_nothing_costs_nothing() -> None:
    assert set(rdp_of(Together(()))) == {0.0}


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (GAUSSIAN, '{"kind": "gaussian", "noise_multiplier": 1.3, "sensitivity": 1.0}'),
        (POISSON, '{"kind": "poisson-gaussian", "sampling_probability": 0.01, "noise_multiplier": 1.1}'),
        (
            SHARES,
            '{"kind": "distributed-gaussian", "sensitivity": 1048576, "local_variance": 1000000000000, "shares": 4,'
            ' "dimension": 1000}',
        ),
        (
            Repeated(GAUSSIAN, 3),
            '{"kind": "repeated", "event": {"kind": "gaussian", "noise_multiplier": 1.3, "sensitivity": 1.0},'
            ' "times": 3}',
        ),
        (
            Together((GAUSSIAN,)),
            '{"kind": "together", "events": [{"kind": "gaussian", "noise_multiplier": 1.3, "sensitivity": 1.0}]}',
        ),
    ],
)
def test_an_event_in_a_ledger_reads_back_as_it_was(event: Event, text: str) -> None:
    """The texts are literal: what a ledger holds must still be read in years to come."""
    assert json.dumps(event.to_json()) == text
    assert event_from_json(json.loads(text)) == event


def test_a_parameter_with_a_default_may_be_missing_from_an_old_ledger() -> None:
    assert event_from_json({"kind": "gaussian", "noise_multiplier": 2.0}) == GaussianRelease(2.0)


def nested(depth: int) -> dict[str, Any]:
    found: dict[str, Any] = GAUSSIAN.to_json()
    for _ in range(depth - 1):
        found = {"kind": "repeated", "event": found, "times": 1}
    return found


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        [],
        "gaussian",
        {},
        {"kind": 1},
        {"kind": ["gaussian"]},
        {"kind": "laplace", "scale": 1.0},
        {"kind": "gaussian"},
        {"kind": "gaussian", "noise_multiplier": 1.0, "extra": 1},
        {"kind": "gaussian", "noise_multiplier": "1.0"},
        {"kind": "gaussian", "noise_multiplier": True},
        {"kind": "gaussian", "noise_multiplier": 0},
        {"kind": "gaussian", "noise_multiplier": math.nan},
        {"kind": "gaussian", "noise_multiplier": 1.0, "sensitivity": -1.0},
        {"kind": "poisson-gaussian", "noise_multiplier": 1.0, "sampling_probability": 1.5},
        {"kind": "poisson-gaussian", "noise_multiplier": 1.0, "sampling_probability": None},
        {"kind": "distributed-gaussian", "sensitivity": 1.5, "local_variance": 1, "shares": 1, "dimension": 1},
        {"kind": "distributed-gaussian", "sensitivity": 1, "local_variance": 1, "shares": 0, "dimension": 1},
        {"kind": "repeated", "event": {"kind": "gaussian", "noise_multiplier": 1.0}, "times": 0},
        {"kind": "repeated", "event": {"kind": "gaussian", "noise_multiplier": 1.0}, "times": 1.5},
        {"kind": "repeated", "event": {"kind": "gaussian", "noise_multiplier": 1.0}},
        {"kind": "repeated", "event": 1, "times": 1},
        {"kind": "together", "events": {"kind": "gaussian", "noise_multiplier": 1.0}},
        nested(MAX_DEPTH + 1),
    ],
)
def test_what_is_no_event_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"event|must be|probability"):
        event_from_json(wrong)


def test_events_stand_within_events_as_deep_as_is_said() -> None:
    assert rdp_of(event_from_json(nested(MAX_DEPTH))) == rdp_of(GAUSSIAN)
