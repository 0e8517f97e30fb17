"""DP-SGD as the worker runs it: what the noised steps know of the records, and what they do not."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from isthmus.privacy.discrete_gaussian import Noise
from isthmus.privacy.keystream import Keystream
from isthmus.privacy.lattice import SAMPLE_SCALE
from isthmus.privacy.scales import noised_lattice
from isthmus.torch import build, to_arrays
from isthmus.wire.jobs import TrainingSpec
from isthmus.wire.models import ModelSpec
from isthmus.wire.privacy import PrivacyPlan, PrivacyUnit
from isthmus_worker import private_training
from isthmus_worker.features import Examples
from isthmus_worker.private_training import chosen_records, train_privately
from tests.worker.test_gradients import LAYERS

CLASSIFIER = [{"linear": {"in": 3, "out": 8}}, "tanh", {"dropout": {"p": 0.1}}, {"linear": {"in": 8, "out": 2}}]
UNSHAKEN = [layer for layer in CLASSIFIER if "dropout" not in layer]
WIDE = [{"linear": {"in": 3, "out": 20_000}}, {"linear": {"in": 20_000, "out": 2}}]


def plan_of(
    noise: float = 1.0, *, clip: float = 1.0, share: float = 1.0, batch: float = 16.0, steps: int = 1
) -> PrivacyPlan:
    """A plan for `train_privately`."""
    return PrivacyPlan(
        unit=PrivacyUnit.RECORD, where=None, epsilon=1.0, budget_epsilon=1.0, delta=1e-5, clip_norm=clip,
        noise_multiplier=noise,
        sampling_probability=share, expected_batch=batch, steps_per_round=steps, statistics_noise_multiplier=None,
        evaluation_noise_multiplier=None,
    )  # fmt: skip


def spec_of(**changes: Any) -> TrainingSpec:
    """Plain gradient steps of learning rate 1."""
    return TrainingSpec.model_validate({"optimizer": {"sgd": {"lr": 1.0}}, "batch_size": 16, **changes})


def examples_of(rows: int, shape: tuple[int, ...] = (3,), seed: int = 1) -> Examples:
    """Records of two classes that can be told apart."""
    inputs = np.random.default_rng(seed).standard_normal((rows, math.prod(shape))).astype(np.float32)
    return Examples(inputs=inputs, targets=(inputs[:, 0] > 0).astype(np.int64))


def trained(
    examples: Examples,
    plan: PrivacyPlan,
    *,
    layers: list[Any] = CLASSIFIER,
    shape: tuple[int, ...] = (3,),
    **training: Any,
) -> tuple[NDArray[np.float64], float]:
    """How all parameters moved, sorted by the names of their tensors, and the loss."""
    torch.manual_seed(5)
    model = build(ModelSpec.model_validate({"layers": layers}))
    before = to_arrays(model)
    loss = train_privately(
        model, examples, spec_of(**training), plan, averaged=list(before), record_shape=shape, tell=lambda _share: None
    )
    after = to_arrays(model)
    return np.concatenate([(after[name].astype(np.float64) - before[name]).ravel() for name in sorted(before)]), loss


class _Silent(Noise):
    """Adds nothing, and keeps what it was to be added to."""

    sums: list[NDArray[np.int64]]

    def add_to(self, out: NDArray[np.int64]) -> None:
        type(self).sums.append(out.copy())


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[NDArray[np.int64]]:
    """What the noise would have been added to, step by step."""
    found: list[NDArray[np.int64]] = []
    monkeypatch.setattr(_Silent, "sums", found, raising=False)
    monkeypatch.setattr(private_training, "Noise", _Silent)
    return found


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "embedding"])
@pytest.mark.parametrize("extreme", [0.0, 1.0, 1e4, 1e30, math.inf])
def test_the_sums_of_neighbouring_datasets_differ_by_the_sensitivity_at_most(
    kind: str, extreme: float, sums: list[NDArray[np.int64]]
) -> None:
    """From the records to the integers that the noise is added to, by the function that production uses."""
    shape, layers = LAYERS[kind]
    many = examples_of(61, shape, seed=8)
    with np.errstate(invalid="ignore"):
        added = np.random.default_rng(9).standard_normal((1, math.prod(shape))).astype(np.float32) * np.float32(extreme)
    for place, clip in ((0, 1e-3), (30, 1.0), (61, 30.0)):
        neighbour = Examples(np.insert(many.inputs, place, added, axis=0), np.insert(many.targets, place, 1))
        plan = plan_of(clip=clip, batch=40.0)
        for one in (many, neighbour):
            trained(one, plan, layers=layers, shape=shape)
        difference = sums[-1] - sums[-2]
        lattice, _variance = noised_lattice(clip, plan.noise_multiplier, len(difference), finest=SAMPLE_SCALE)
        assert sum(int(value) ** 2 for value in difference) <= lattice.sensitivity**2
    assert any(one.any() for one in sums)


def test_a_step_without_records_is_noise_alone_and_exactly_the_noise_that_is_charged() -> None:
    """Noise conformance: whole numbers on the lattice, of the right variance, uncorrelated, never the same twice."""
    noise, batch = 0.02, 16.0  # small enough for float32 to hold every lattice point exactly
    moves = [trained(examples_of(0), plan_of(noise, batch=batch), layers=WIDE)[0] for _ in range(2)]
    elements = len(moves[0])
    lattice, variance = noised_lattice(1.0, noise, elements, finest=SAMPLE_SCALE)
    for move in moves:
        # The weights are float32: what was added can be read to half of their last place.
        found = move * batch / lattice.step
        assert np.var(found) / variance == pytest.approx(1.0, abs=7 * math.sqrt(2 / elements) + 0.002)
        assert abs(found.mean()) < 6 * math.sqrt(variance / elements)
        assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 7 / math.sqrt(elements)
    assert (moves[0] != moves[1]).mean() > 0.99


def test_the_gradient_of_a_step_lies_on_the_lattice() -> None:
    taken: list[NDArray[np.float32]] = []
    real = private_training._put

    def put(parameters: Any, *others: Any) -> None:
        real(parameters, *others)
        taken.append(np.concatenate([parameter.grad.reshape(-1).numpy() for parameter in parameters]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(private_training, "_put", put)
        trained(examples_of(40), plan_of(0.02, steps=3))
    lattice, _ = noised_lattice(1.0, 0.02, len(taken[0]), finest=SAMPLE_SCALE)
    assert len(taken) == 3
    for gradient in taken:
        steps = gradient.astype(np.float64) * 16.0 / lattice.step
        small = np.abs(steps) < 2**24  # what float32 holds exactly
        assert small.any()
        assert np.array_equal(steps[small], np.rint(steps[small]))


def test_noise_is_another_one_in_every_step() -> None:
    moves = [trained(examples_of(0), plan_of(steps=steps), layers=WIDE)[0] for steps in (1, 4)]
    assert moves[1].std() / moves[0].std() == pytest.approx(2.0, rel=0.05)  # the same noise four times would be 4


def test_neither_the_seed_nor_torchs_generator_decides_noise_coins_or_dropout() -> None:
    plan = plan_of(share=0.5, batch=20.0)
    one, other = (trained(examples_of(40), plan)[0] for _ in range(2))  # the generator is seeded alike before both
    assert (one != other).mean() > 0.99
    one, other = (trained(examples_of(40), plan_of(), layers=UNSHAKEN)[0] for _ in range(2))  # nothing but noise
    assert (one != other).mean() > 0.99


def test_coins_are_secret_too(sums: list[NDArray[np.int64]]) -> None:
    for _ in range(2):
        trained(examples_of(40), plan_of(share=0.5, batch=20.0), layers=UNSHAKEN)
    assert not np.array_equal(*sums)


def test_dropout_is_secret_too(sums: list[NDArray[np.int64]]) -> None:
    for _ in range(2):
        trained(examples_of(40), plan_of())
    assert not np.array_equal(*sums)


def test_without_noise_and_with_a_wide_clip_a_step_is_plain_gradient_descent(sums: list[NDArray[np.int64]]) -> None:
    layers = [{"linear": {"in": 3, "out": 2}}]
    examples = examples_of(24)
    move, loss = trained(examples, plan_of(clip=1e4, batch=24.0), layers=layers)
    torch.manual_seed(5)
    assert loss > 0
    found = sums[0] * noised_lattice(1e4, 1.0, len(move), finest=SAMPLE_SCALE)[0].step / 24.0
    model = build(ModelSpec.model_validate({"layers": layers}))
    torch.manual_seed(5)
    model = build(ModelSpec.model_validate({"layers": layers}))
    mean = torch.nn.functional.cross_entropy(
        model(torch.from_numpy(examples.inputs)), torch.from_numpy(examples.targets)
    )
    mean.backward()  # type: ignore[no-untyped-call]
    wanted = np.concatenate([p.grad.reshape(-1).numpy() for _, p in sorted(model.named_parameters())])
    assert found == pytest.approx(wanted, abs=1e-3)


class Sneaks(torch.nn.Module):
    """Behaves while it is looked at; later it writes what it sees into its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = torch.nn.Linear(3, 2), 0

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls > 100:
            self.layer.weight.data += values.detach()[0].sum()
        found: torch.Tensor = self.layer(values)
        return found


def test_weights_move_by_the_noised_sums_alone_whatever_the_model_does_to_them(sums: list[NDArray[np.int64]]) -> None:
    model, steps = Sneaks(), 300
    before = to_arrays(model)
    plan = plan_of(steps=steps, batch=40.0)
    train_privately(
        model, examples_of(40), spec_of(), plan, averaged=list(before), record_shape=(3,), tell=lambda _share: None
    )
    after, lattice = to_arrays(model), noised_lattice(1.0, 1.0, 8, finest=SAMPLE_SCALE)[0]
    assert model.calls > 250
    moved = np.concatenate([(after[name].astype(np.float64) - before[name]).ravel() for name in sorted(before)])
    assert moved == pytest.approx(-np.sum(sums, axis=0) * lattice.step / 40.0, abs=1e-4)


def test_it_learns_and_the_mean_is_over_the_expected_batch_whatever_the_coins_said(
    sums: list[NDArray[np.int64]],
) -> None:
    _, first = trained(examples_of(400), plan_of(share=0.25, batch=100.0), optimizer={"sgd": {"lr": 0.5}})
    _, last = trained(examples_of(400), plan_of(share=0.25, batch=100.0, steps=300), optimizer={"sgd": {"lr": 0.5}})
    assert last < first / 2
    del sums[:]
    whole, _ = trained(examples_of(64), plan_of(batch=64.0), layers=CLASSIFIER[:2] + CLASSIFIER[3:])
    half, _ = trained(examples_of(64), plan_of(batch=128.0), layers=CLASSIFIER[:2] + CLASSIFIER[3:])
    assert half == pytest.approx(whole / 2, abs=1e-6)


def test_records_that_break_tell_nothing_and_neither_does_one_class() -> None:
    broken = examples_of(40)
    broken.inputs[7] = np.nan
    broken.inputs[9] = np.inf
    move, _ = trained(broken, plan_of())
    assert np.isfinite(move).all()
    alike = Examples(broken.inputs, np.zeros(40, np.int64))
    assert np.isfinite(trained(alike, plan_of())[0]).all()


def test_each_record_takes_part_by_a_coin_of_its_own() -> None:
    coins, rounds, share = Keystream(), 400, 0.3
    drawn = [chosen_records(1000, share, coins) for _ in range(rounds)]
    hits = np.zeros((rounds, 1000))
    for step, chosen in enumerate(drawn):
        assert (np.diff(chosen) > 0).all()
        hits[step, chosen] = 1
    counts, sizes = hits.sum(axis=0), hits.sum(axis=1)
    spread = math.sqrt(rounds * share * (1 - share))
    assert abs(counts.mean() - rounds * share) < 6 * spread / math.sqrt(1000)
    assert np.std(counts) == pytest.approx(spread, rel=0.15)
    assert np.std(sizes) == pytest.approx(math.sqrt(1000 * share * (1 - share)), rel=0.25)  # not batches of one size
    assert len(chosen_records(70_000, 0.5, coins)) == pytest.approx(35_000, abs=1000)
    assert chosen_records(5, 1.0, coins).tolist() == [0, 1, 2, 3, 4]
    assert chosen_records(0, 0.5, coins).size == 0
    assert chosen_records(100_000, 1e-300, coins).size == 0


def test_the_steps_of_training_are_drawn_by_those_coins_and_not_in_batches_of_one_size(
    sums: list[NDArray[np.int64]],
) -> None:
    layers, still, rows, steps = [{"linear": {"in": 3, "out": 2}}], {"sgd": {"lr": 1e-9}}, 40, 150
    alike = Examples(np.ones((rows, 3), np.float32), np.zeros(rows, np.int64))
    trained(Examples(alike.inputs[:1], alike.targets[:1]), plan_of(), layers=layers, optimizer=still)
    one = sums.pop().astype(np.float64)

    trained(alike, plan_of(share=0.5, batch=20.0, steps=steps), layers=layers, optimizer=still)

    sizes = np.array([taken @ one / (one @ one) for taken in sums])
    assert sizes == pytest.approx(np.rint(sizes), abs=0.01)
    spread = math.sqrt(rows * 0.5 * 0.5)
    assert sizes.mean() == pytest.approx(rows / 2, abs=6 * spread / math.sqrt(steps))
    assert sizes.std() == pytest.approx(spread, rel=6 / math.sqrt(2 * steps))


@pytest.mark.parametrize("optimizer", [{"sgd": {"lr": 0.1, "momentum": 0.9}}, "adam", {"adamw": {"weight_decay": 0.1}}])
def test_any_optimizer_of_a_job_makes_the_steps(optimizer: Any) -> None:
    move, _ = trained(examples_of(40), plan_of(steps=5), optimizer=optimizer)
    assert np.isfinite(move).all()
    assert (move != 0).mean() > 0.99


def test_a_row_that_is_not_trained_stays_where_it_is() -> None:
    shape, layers = LAYERS["embedding"]
    inputs = np.random.default_rng(0).integers(0, 7, (40, 4)).astype(np.float32)
    move, _ = trained(Examples(inputs, np.arange(40) % 2), plan_of(), layers=layers, shape=shape)
    rows = move[: 7 * 3].reshape(7, 3)  # "0.inner.weight" comes first
    assert not rows[0].any()
    assert rows[1:].all()


def test_progress_is_told_in_whole_steps_and_may_stop_the_work() -> None:
    told: list[float] = []
    model = build(ModelSpec.model_validate({"layers": CLASSIFIER}))
    train_privately(
        model, examples_of(900), spec_of(), plan_of(steps=4), averaged=[], record_shape=(3,), tell=told.append
    )
    assert sorted(told) == told
    assert set(told) == {0.0, 0.25, 0.5, 0.75, 1.0}
