"""The fold of a round: its value, its bits, its refusals."""

import itertools
import math
import threading
import tracemalloc
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from isthmus.codec import arrays
from isthmus.codec.blocks import TensorFile, TensorFileWriter
from isthmus.codec.errors import TensorsMismatch
from isthmus.federation.aggregation import (
    MemorySink,
    MemorySource,
    NonFiniteAggregate,
    aggregate,
    normalised_weights,
)
from isthmus.federation.strategies import FedAdam, FedAvg, FedAvgM, Strategy, state_manifest
from isthmus.wire.manifest import Manifest, update_manifest

Arrays = dict[str, NDArray[Any]]

RANDOM = np.random.default_rng(7)
MODEL: Arrays = {
    "w": RANDOM.normal(size=(13, 11)).astype("<f4"),
    "b": RANDOM.normal(size=11).astype("<f4"),
    "half": RANDOM.normal(size=9).astype("<f2"),
    "double": RANDOM.normal(size=5),
    "scalar": np.array(1.5, "<f4"),
    "empty": np.zeros((0, 3), "<f4"),
    "running_mean": RANDOM.normal(size=4).astype("<f4"),
    "batches": np.array(12, "<i8"),
    "mask": np.array([True, False, True]),
}
MANIFEST = arrays.manifest_of(MODEL, keep={"running_mean"})
WEIGHTS = [303, 261, 130.0]


def an_update(seed: int) -> Arrays:
    random = np.random.default_rng(seed)
    return {
        name: (random.normal(size=spec.shape) * 0.1).astype("<f8" if spec.dtype == "F64" else "<f4")
        for name, spec in update_manifest(MANIFEST).tensors.items()
    }


UPDATES = [an_update(seed) for seed in (1, 2, 3)]


def folded(
    updates: Sequence[Arrays] = UPDATES,
    weights: Sequence[float] = WEIGHTS,
    *,
    model: Arrays = MODEL,
    manifest: Manifest = MANIFEST,
    strategy: Strategy | None = None,
    state: Arrays | None = None,
    block_elements: int = 1 << 16,
    threads: int = 1,
) -> tuple[Arrays, Arrays]:
    """The next model and the strategy's next state."""
    strategy = strategy or FedAvg()
    wanted = state_manifest(strategy, manifest)
    sink = MemorySink(manifest.tensors)
    state_sink = MemorySink(wanted.tensors) if wanted else None
    aggregate(
        manifest,
        MemorySource(model),
        [MemorySource(update) for update in updates],
        weights,
        strategy,
        sink=sink,
        state=MemorySource(state) if state is not None else None,
        state_sink=state_sink,
        block_elements=block_elements,
        threads=threads,
    )
    return sink.arrays, state_sink.arrays if state_sink else {}


def one(values: Any, dtype: str = "<f4") -> Arrays:
    return {"x": np.array(values, dtype)}


def test_the_mean_is_weighted_and_added_to_the_model() -> None:
    model = one([10.0, 20.0])
    after, _ = folded([one([1, 2]), one([4, 8])], [1, 3], model=model, manifest=arrays.manifest_of(model))
    assert after["x"].tolist() == [10 + 0.25 + 3.0, 20 + 0.5 + 6.0]


def test_each_element_is_the_exact_mean_rounded_to_its_type() -> None:
    after, _ = folded()
    total = Fraction(sum(Fraction(weight) for weight in WEIGHTS))
    for name in ("w", "b", "scalar"):
        for index in np.ndindex(MODEL[name].shape):
            exact = Fraction(float(MODEL[name][index])) + sum(
                Fraction(weight) / total * Fraction(float(update[name][index]))
                for weight, update in zip(WEIGHTS, UPDATES, strict=True)
            )
            assert abs(Fraction(float(after[name][index])) - exact) <= Fraction(
                float(abs(np.spacing(after[name][index])))
            ) * Fraction(51, 100)


def test_kept_tensors_are_copied_byte_for_byte() -> None:
    after, _ = folded()
    for name in ("running_mean", "batches", "mask", "empty"):
        assert after[name].tobytes() == MODEL[name].tobytes()
        assert after[name].dtype == MODEL[name].dtype


def test_kept_tensors_may_hold_what_is_not_finite() -> None:
    model = {"x": np.ones(1, "<f4"), "running": np.array([np.nan, np.inf], "<f4")}
    after, _ = folded([one([1])], [1], model=model, manifest=arrays.manifest_of(model, keep={"running"}))
    assert after["running"].tobytes() == model["running"].tobytes()


@pytest.mark.parametrize("strategy", [FedAvg(lr=0.7), FedAvgM(), FedAdam()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("block_elements", [1, 2, 3, 7, 8, 64, 143, 1 << 16])
def test_the_block_size_does_not_change_a_bit(strategy: Strategy, block_elements: int) -> None:
    reference, state = folded(strategy=strategy)
    again, state_again = folded(strategy=strategy, block_elements=block_elements)
    assert arrays.encode(again) == arrays.encode(reference)
    assert arrays.encode(state_again) == arrays.encode(state)


@pytest.mark.parametrize("strategy", [FedAvg(lr=0.7), FedAdam()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("block_elements", [1, 3, 7, 143])
def test_the_number_of_threads_does_not_change_a_bit(
    strategy: Strategy, threads: int, block_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, state = folded(strategy=strategy)
    monkeypatch.setattr("isthmus.federation.aggregation.SHARED_ELEMENTS", 0)
    again, state_again = folded(strategy=strategy, block_elements=block_elements, threads=threads)
    assert arrays.encode(again) == arrays.encode(reference)
    assert arrays.encode(state_again) == arrays.encode(state)


def test_threads_share_the_stretches_and_the_caller_takes_them_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.federation.aggregation.SHARED_ELEMENTS", 0)
    model = one(np.zeros(64))
    both = threading.Barrier(2, timeout=20)
    readers, order = set[str](), list[int]()

    class Meeting(MemorySource):
        def read_block(self, name: str, start: int, out: NDArray[Any]) -> None:
            readers.add(threading.current_thread().name)
            both.wait()  # nobody gets on alone
            super().read_block(name, start, out)

    class Ordered(MemorySink):
        def write_block(self, name: str, start: int, block: NDArray[Any]) -> None:
            assert threading.current_thread() is threading.main_thread()
            order.append(start)
            super().write_block(name, start, block)

    manifest = arrays.manifest_of(model)
    source = Meeting(one(np.arange(64.0)))
    sink = Ordered(manifest.tensors)
    aggregate(
        manifest, MemorySource(model), [source], [1], FedAvg(), sink=sink, block_elements=8, threads=2
    )  # fmt: skip
    assert len(readers) == 2
    assert order == list(range(0, 64, 8))
    assert sink.arrays["x"].tolist() == list(range(64))


def test_with_threads_the_first_tensor_that_is_not_finite_is_named_and_nobody_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("isthmus.federation.aggregation.SHARED_ELEMENTS", 0)
    bad = {"a": np.zeros(40, "<f4"), "b": np.full(40, np.inf, "<f4"), "c": np.full(40, np.nan, "<f4")}
    model = {name: np.zeros(40, "<f4") for name in bad}
    with pytest.raises(NonFiniteAggregate, match="'b'"):
        folded([bad], [1], model=model, manifest=arrays.manifest_of(model), block_elements=3, threads=3)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fold")]


def test_files_and_memory_give_the_same_bytes(tmp_path: Path) -> None:
    strategy = FedAdam()
    arrays.write(tmp_path / "model", MODEL)
    for index, update in enumerate(UPDATES):
        arrays.write(tmp_path / str(index), {**update, "metrics/loss": np.array([0.5])})
    wanted = state_manifest(strategy, MANIFEST)
    assert wanted is not None
    sources = [TensorFile(tmp_path / str(index)) for index in range(3)]
    with (
        TensorFile(tmp_path / "model") as model,
        TensorFileWriter(tmp_path / "next", MANIFEST.tensors) as sink,
        TensorFileWriter(tmp_path / "state", wanted.tensors) as state_sink,
    ):
        aggregate(MANIFEST, model, sources, WEIGHTS, strategy, sink=sink, state_sink=state_sink, block_elements=16)
    for source in sources:
        source.close()
    after, state = folded(strategy=strategy)
    assert (tmp_path / "next").read_bytes() == arrays.encode(after)
    assert (tmp_path / "state").read_bytes() == arrays.encode(state)
    assert arrays.manifest_of(arrays.read(tmp_path / "state")) == wanted


def test_the_order_of_updates_is_the_callers_and_matters_only_in_the_last_bit() -> None:
    reference, _ = folded()
    for order in itertools.permutations(range(3)):
        other, _ = folded([UPDATES[i] for i in order], [WEIGHTS[i] for i in order])
        for name in ("w", "double"):
            assert other[name] == pytest.approx(reference[name], rel=1e-6)


def test_every_sum_is_rounded_from_left_to_right() -> None:
    model = one([0.0], "<f8")
    updates = [one([1e16], "<f8"), one([1.0], "<f8"), one([-1e16], "<f8"), one([0.5], "<f8")]
    after, _ = folded(updates, [1, 1, 1, 1], model=model, manifest=arrays.manifest_of(model))
    assert after["x"][0] == (((0.25 * 1e16 + 0.25) + 0.25 * -1e16) + 0.125)


def test_a_half_precision_model_takes_its_mean_in_double() -> None:
    model = one([2048.0], "<f2")  # its spacing is 2: in half precision, each update alone would be lost
    updates = [one([0.9]), one([1.5])]
    after, _ = folded(updates, [1, 1], model=model, manifest=arrays.manifest_of(model))
    assert after["x"].dtype == np.dtype("<f2")
    assert after["x"][0] == 2050.0


@pytest.mark.parametrize(
    ("dtype", "model", "update"), [("<f2", 65000, 600), ("<f4", 3.4e38, 3e37), ("<f8", 1.7e308, 1e308)]
)
def test_an_aggregate_that_overflows_names_its_tensor(dtype: str, model: float, update: float) -> None:
    arrays_of_model = {"good": np.zeros(3, dtype), "x": np.array([1, model], dtype)}
    kind = "<f8" if dtype == "<f8" else "<f4"
    body = {"good": np.zeros(3, kind), "x": np.array([0, update], kind)}
    with pytest.raises(NonFiniteAggregate, match="'x'") as refusal:
        folded([body], [1], model=arrays_of_model, manifest=arrays.manifest_of(arrays_of_model))
    assert refusal.value.tensor == "x"


def test_a_state_that_overflows_names_its_tensor() -> None:
    model = one([0.0])
    with pytest.raises(NonFiniteAggregate, match="'v/x'"):
        folded([one([1e30])], [1], model=model, manifest=arrays.manifest_of(model), strategy=FedAdam())


def test_an_update_that_is_not_finite_never_becomes_a_model() -> None:
    model = one([0.0])
    for bad in (math.nan, math.inf):
        with pytest.raises(NonFiniteAggregate):
            folded([one([bad]), one([1])], [1, 1], model=model, manifest=arrays.manifest_of(model))


@pytest.mark.parametrize(
    ("updates", "weights"),
    [([], []), (UPDATES, [1, 1]), (UPDATES, [1, 1, 0]), (UPDATES, [1, 1, -1]), (UPDATES, [1, 1, math.nan]),
     (UPDATES, [1, 1, math.inf]), (UPDATES, [1e308] * 3)],
)  # fmt: skip
def test_weights_that_give_no_mean_are_refused(updates: Sequence[Arrays], weights: Sequence[float]) -> None:
    with pytest.raises(ValueError, match=r"weight|updates"):
        folded(updates, weights)


def test_a_block_holds_an_element_at_least_and_somebody_computes_it() -> None:
    with pytest.raises(ValueError, match="block"):
        folded(block_elements=0)
    with pytest.raises(ValueError, match="thread"):
        folded(threads=0)


@pytest.mark.parametrize(
    "change",
    [{"w": np.zeros((11, 13), "<f4")}, {"w": np.zeros((13, 11), "<f8")}, {"half": np.zeros(9, "<f2")}],
)
def test_an_update_that_does_not_fit_is_refused(change: Arrays) -> None:
    with pytest.raises(TensorsMismatch, match=repr(next(iter(change)))):
        folded([UPDATES[0], {**UPDATES[1], **change}, UPDATES[2]])


def test_an_update_with_a_tensor_missing_is_refused() -> None:
    less = {name: array for name, array in UPDATES[0].items() if name != "scalar"}
    with pytest.raises(TensorsMismatch, match="scalar"):
        folded([less], [1])


def test_a_model_that_does_not_fit_is_refused() -> None:
    with pytest.raises(TensorsMismatch, match="extra"):
        folded(model={**MODEL, "extra": np.zeros(1)})


def test_a_state_is_asked_for_exactly_where_there_is_one() -> None:
    model = one([0.0])
    manifest = arrays.manifest_of(model)
    source, sink = MemorySource(model), MemorySink(manifest.tensors)
    with pytest.raises(ValueError, match="nowhere to write"):
        aggregate(manifest, source, [source], [1], FedAvgM(), sink=sink)
    with pytest.raises(ValueError, match="keeps no state"):
        aggregate(manifest, source, [source], [1], FedAvg(), sink=sink, state=source)
    with pytest.raises(TensorsMismatch, match="velocity/x"):
        aggregate(manifest, source, [source], [1], FedAvgM(), sink=sink, state=source, state_sink=sink)


@settings(deadline=None)
@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=8), st.randoms())
def test_normalised_weights_add_to_one_and_do_not_depend_on_the_order(weights: list[float], random: Any) -> None:
    shares = normalised_weights(weights)
    assert math.fsum(shares) == pytest.approx(1)
    order = list(range(len(weights)))
    random.shuffle(order)
    assert normalised_weights([weights[i] for i in order]) == [shares[i] for i in order]


def test_an_update_seen_twice_counts_as_one_of_twice_the_weight() -> None:
    twice, _ = folded([UPDATES[0], UPDATES[0], UPDATES[1]], [1, 1, 2])
    once, _ = folded([UPDATES[0], UPDATES[1]], [2, 2])
    assert arrays.encode(twice) == arrays.encode(once)


def test_memory_grows_neither_with_the_model_nor_with_the_updates(tmp_path: Path) -> None:
    model = {"w": np.ones(1 << 20, "<f4")}
    manifest = arrays.manifest_of(model)
    arrays.write(tmp_path / "model", model)
    with TensorFile(tmp_path / "model") as source, TensorFileWriter(tmp_path / "next", manifest.tensors) as sink:
        tracemalloc.start()
        aggregate(manifest, source, [source] * 20, [1] * 20, FedAvg(), sink=sink)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2 << 20  # the model has 4 MiB, the updates 80
    assert arrays.read(tmp_path / "next")["w"].tolist() == [2.0] * (1 << 20)


@pytest.mark.parametrize("updates", [1, 2])
def test_negative_zeros_are_added_to_zero(updates: int) -> None:
    zero = MemorySource({"a": np.array([-0.0], np.float32)})
    sink = MemorySink(zero.tensors)

    aggregate(arrays.manifest_of(zero.arrays), zero, [zero] * updates, [1] * updates, FedAvg(), sink=sink)

    assert not np.signbit(sink.arrays["a"])  # -0 + (0 + -0)
