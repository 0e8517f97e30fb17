"""Strategies against values worked out by hand, and across a restart."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from isthmus.codec import arrays
from isthmus.federation.aggregation import MemorySink, MemorySource, aggregate
from isthmus.federation.strategies import FedAdam, FedAvg, FedAvgM, Strategy, state_manifest, strategy_of
from isthmus.wire import strategies as specs
from isthmus.wire.manifest import DType

STATEFUL: list[Strategy] = [FedAvgM(lr=0.5, momentum=0.9), FedAdam(lr=0.1)]


def block(*values: float) -> NDArray[np.float64]:
    return np.array(values, np.float64)


def f32(value: float) -> float:
    return float(np.float32(value))


def test_fedavg_adds_the_mean_times_its_rate() -> None:
    model, mean = block(1, -2), block(0.5, 4)
    assert FedAvg(lr=0.5).step(model, mean, {}).tolist() == [1.25, 0.0]
    assert model.tolist() == [1, -2]
    assert mean.tolist() == [0.5, 4]


def test_momentum_by_hand() -> None:
    strategy = FedAvgM(lr=2.0, momentum=0.5)
    state = {"velocity": block(strategy.initial("velocity"))}
    model = strategy.step(block(10), block(1), state)  # v = 1
    assert (model[0], state["velocity"][0]) == (12, 1)
    model = strategy.step(model, block(3), state)  # v = 0.5 + 3
    assert (model[0], state["velocity"][0]) == (19, 3.5)
    model = strategy.step(model, block(0), state)  # v = 1.75
    assert (model[0], state["velocity"][0]) == (22.5, 1.75)


def test_adam_by_hand() -> None:
    strategy = FedAdam(lr=1.0, beta1=0.5, beta2=0.75, tau=0.5)
    state = {slot: block(strategy.initial(slot)) for slot in strategy.slots}
    assert (state["m"][0], state["v"][0]) == (0.0, 0.25)  # the paper: v_{-1} >= tau^2
    model = strategy.step(block(0), block(1.5), state)
    # m = 0.75; v = 0.75 * 0.25 + 0.25 * 2.25 = 0.75
    assert (state["m"][0], state["v"][0]) == (0.75, 0.75)
    assert model[0] == 0.75 / (np.sqrt(0.75) + 0.5)
    again = strategy.step(model, block(-1), state)
    # m = 0.375 - 0.5 = -0.125; v = 0.5625 + 0.25 = 0.8125
    assert (state["m"][0], state["v"][0]) == (-0.125, 0.8125)
    assert again[0] == model[0] - 0.125 / (np.sqrt(0.8125) + 0.5)


def test_the_model_is_computed_from_the_state_as_it_is_stored() -> None:
    state = {"velocity": block(0.0)}
    model = FedAvgM(lr=1.0, momentum=0.9).step(block(0), block(0.1), state)
    assert state["velocity"][0] == f32(0.1) != 0.1
    assert model[0] == f32(0.1)


def test_adam_hardly_moves_where_the_updates_are_zero() -> None:
    state = {slot: block(FedAdam().initial(slot)) for slot in FedAdam().slots}
    assert FedAdam().step(block(3), block(0), state)[0] == 3


def round_of(
    strategy: Strategy, model: dict[str, NDArray[Any]], state: dict[str, NDArray[Any]] | None, update: Any
) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    manifest = arrays.manifest_of(model)
    wanted = state_manifest(strategy, manifest)
    assert wanted is not None
    sink, state_sink = MemorySink(manifest.tensors), MemorySink(wanted.tensors)
    before = MemorySource(state) if state is not None else None
    source = MemorySource({"w": update})
    aggregate(manifest, MemorySource(model), [source], [1], strategy, sink=sink, state=before, state_sink=state_sink)
    return sink.arrays, state_sink.arrays


@pytest.mark.parametrize("strategy", STATEFUL, ids=lambda s: type(s).__name__)
def test_a_run_that_was_cut_goes_on_with_the_same_bits(strategy: Strategy) -> None:
    updates = np.random.default_rng(3).normal(size=(6, 50)).astype("<f4")

    def run(cut: bool) -> bytes:
        model: dict[str, NDArray[Any]] = {"w": np.ones(50, "<f4")}
        state: dict[str, NDArray[Any]] | None = None
        for update in updates:
            model, state = round_of(strategy, model, state, update)
            if cut:
                model, state = arrays.decode(arrays.encode(model)), arrays.decode(arrays.encode(state))
        assert state is not None
        return arrays.encode(model) + arrays.encode(state)

    assert run(cut=True) == run(cut=False)


def test_the_state_of_the_first_round_is_the_initial_one() -> None:
    strategy = FedAdam(tau=0.01)
    model: dict[str, NDArray[Any]] = {"w": np.ones(3, "<f4")}
    initial = {"m/w": np.zeros(3, "<f4"), "v/w": np.full(3, 0.01**2, "<f4")}
    update = np.array([0.1, 0, -5], "<f4")
    for without, with_state in zip(
        round_of(strategy, model, None, update), round_of(strategy, model, initial, update), strict=True
    ):
        assert arrays.encode(without) == arrays.encode(with_state)


def test_the_state_has_a_float32_tensor_per_slot_and_averaged_tensor() -> None:
    model = {"w": np.zeros((2, 3), "<f2"), "d": np.zeros(4), "n": np.array(1), "kept": np.zeros(1, "<f4")}
    manifest = arrays.manifest_of(model, keep={"kept"})
    wanted = state_manifest(FedAdam(), manifest)
    assert wanted is not None
    assert {name: (spec.dtype, spec.shape) for name, spec in wanted.tensors.items()} == {
        "m/d": (DType.F32, (4,)),
        "m/w": (DType.F32, (2, 3)),
        "v/d": (DType.F32, (4,)),
        "v/w": (DType.F32, (2, 3)),
    }
    assert state_manifest(FedAvg(), manifest) is None


def test_a_job_declares_its_strategy() -> None:
    assert strategy_of(specs.FedAvg(lr=0.5)) == FedAvg(lr=0.5)
    assert strategy_of(specs.FedAvgM(lr=0.5, momentum=0.3)) == FedAvgM(lr=0.5, momentum=0.3)
    assert strategy_of(specs.FedAdam(lr=0.5, beta1=0.1, beta2=0.2, tau=0.01)) == FedAdam(0.5, 0.1, 0.2, 0.01)
