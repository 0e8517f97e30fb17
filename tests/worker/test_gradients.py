"""Each record's own gradient: right for every layer that can be declared, and refused where there is none."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from isthmus.torch import build, to_arrays
from isthmus.wire.models import ModelSpec
from isthmus_worker.gradients import RecordGradients, records_at_once, require_private, trained_parameters
from isthmus_worker.refusals import ModelRefused, WorkBroken
from isthmus_worker.training import loss_of

LAYERS: dict[str, tuple[tuple[int, ...], list[Any]]] = {
    "linear": ((5,), [{"linear": {"in": 5, "out": 4}}, "tanh", {"linear": {"in": 4, "out": 2, "bias": False}}]),
    "linear over steps": ((3, 5), [{"linear": {"in": 5, "out": 4}}, "flatten", {"linear": {"in": 12, "out": 2}}]),
    "conv2d": (
        (2, 8, 8),
        [{"conv2d": {"in": 2, "out": 4, "kernel": 3, "padding": "same", "groups": 2}}, "gelu",
         {"max_pool": {"kernel": 2}},
         {"conv2d": {"in": 4, "out": 4, "kernel": 2, "stride": 2, "padding": 1, "dilation": 2, "bias": False}},
         {"adaptive_avg_pool": {"output": 1}}, "flatten", {"linear": {"in": 4, "out": 2}}],
    ),
    "conv1d": (
        (3, 12),
        [{"conv1d": {"in": 3, "out": 6, "kernel": 3, "padding": "same", "dilation": 2}}, "silu",
         {"avg_pool": {"kernel": 3}}, {"conv1d": {"in": 6, "out": 4, "kernel": 2, "groups": 2, "stride": 2}}, "flatten",
         {"linear": {"in": 8, "out": 2}}],
    ),
    "norms": (
        (6,),
        [{"linear": {"in": 6, "out": 8}}, {"group_norm": {"groups": 2, "features": 8}}, {"layer_norm": {"shape": [8]}},
         {"dropout": {"p": 0.0}}, {"leaky_relu": {}}, {"linear": {"in": 8, "out": 2}}],
    ),
    "residual": (
        (6,),
        [{"residual": {"layers": [{"linear": {"in": 6, "out": 4}}, "elu"],
                       "shortcut": [{"linear": {"in": 6, "out": 4}}]}},
         {"linear": {"in": 4, "out": 2}}],
    ),
    "embedding": (
        (4,),
        [{"embedding": {"num": 7, "dim": 3, "padding_idx": 0}}, "flatten", {"linear": {"in": 12, "out": 2}}],
    ),
    "gru": ((5, 3), [{"gru": {"in": 3, "hidden": 4, "layers": 2}}, {"linear": {"in": 4, "out": 2}}]),
    "lstm": ((5, 3), [{"lstm": {"in": 3, "hidden": 4, "bidirectional": True}}, {"linear": {"in": 8, "out": 2}}]),
    "rnn": ((5, 3), [{"rnn": {"in": 3, "hidden": 4, "take": "all"}}, "flatten", {"linear": {"in": 20, "out": 2}}]),
}  # fmt: skip


def entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """The loss of each record."""
    return loss_of(outputs, targets, "cross_entropy", reduction="none")


def all_of(gradients: RecordGradients, records: Tensor, targets: Tensor) -> tuple[list[Any], float]:
    """The gradients of any number of records, and the sum of their losses."""
    numbers = gradients.portions(len(records))
    assert sum(numbers) == len(records)
    found = [gradients.of(*both) for both in zip(records.split(numbers), targets.split(numbers), strict=True)]
    return [np.concatenate(parts) for parts in zip(*(one for one, _ in found), strict=True)], sum(
        loss for _, loss in found
    )


def made(layers: list[Any]) -> nn.Module:
    """A declared model; always the same weights."""
    torch.manual_seed(3)
    return build(ModelSpec.model_validate({"layers": layers}))


@pytest.mark.parametrize("kind", LAYERS)
def test_a_records_gradient_is_what_torch_gives_for_that_record_alone(kind: str) -> None:
    shape, layers = LAYERS[kind]
    model, reference = made(layers), made(layers).train()
    before = to_arrays(model)
    records = torch.randn(7, *shape) if kind != "embedding" else torch.randint(0, 7, (7, *shape)).float()
    targets = torch.tensor([0, 1, 0, 1, 1, 0, 1])
    require_private(model, list(before))

    with RecordGradients(model, entropy, shape, 16) as gradients:
        gradients.try_out(targets[:0])
        found, loss = all_of(gradients, records, targets)

    names = list(trained_parameters(reference))
    assert names == sorted(names)
    total = 0.0
    for row in range(7):
        reference.zero_grad()
        alone = entropy(reference(records[row : row + 1]), targets[row : row + 1]).sum()
        alone.backward()  # type: ignore[no-untyped-call]
        total += alone.item()
        for name, array in zip(names, found, strict=True):
            grad = trained_parameters(reference)[name].grad
            assert grad is not None
            assert array[row] == pytest.approx(grad.reshape(-1).numpy(), abs=2e-5), name
    assert loss == pytest.approx(total, rel=1e-4)
    after = to_arrays(model)
    assert [type(layer) for layer in model.modules()] == [type(layer) for layer in reference.modules()]
    assert list(after) == list(before)
    assert all(np.array_equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_records_gradient_does_not_hang_on_how_many_others_there_are_nor_on_its_place(kind: str) -> None:
    shape, layers = LAYERS[kind]
    records = torch.randn(23, *shape) if kind != "embedding" else torch.randint(0, 7, (23, *shape)).float()
    targets = torch.arange(23) % 2
    with RecordGradients(made(layers), entropy, shape, 32) as gradients:
        gradients.try_out(targets[:0])
        whole, _ = all_of(gradients, records, targets)
        for some in ([4], [22, 3], list(range(12)), list(range(22, 0, -1))):
            part, _ = all_of(gradients, records[some], targets[some])
            for array, of_whole in zip(part, whole, strict=True):
                assert np.array_equal(array, of_whole[some])


class Holds(nn.Module):
    """A layer within layers."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), inner, nn.Linear(4, 2))

    def forward(self, values: Tensor) -> Tensor:
        found: Tensor = self.inner(values)
        return found


class OwnWeight(nn.Module):
    """A parameter that belongs to no layer of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, values: Tensor) -> Tensor:
        return values * self.weight


class Mixes(nn.Module):
    """No parameter at all, but each record sees the others."""

    def forward(self, values: Tensor) -> Tensor:
        return values - values.mean(0)


class Counts(nn.Module):
    """Keeps something of what it has seen."""

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(4), persistent=persistent)

    def forward(self, values: Tensor) -> Tensor:
        self.seen += values.detach().sum(0)
        return values


class Elsewhere(nn.Module):
    """A layer's weight that is used outside of the layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, values: Tensor) -> Tensor:
        found: Tensor = self.layer(values) + values @ self.layer.weight
        return found


class Packs(nn.Module):
    """Leaves out the zeros at the end of a record, as models of sequences do."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.layer = kind(1, 4, batch_first=True)

    def forward(self, values: Tensor) -> Tensor:
        lengths = (values != 0).sum(1).clamp(min=1)
        packed = nn.utils.rnn.pack_padded_sequence(values[..., None], lengths, batch_first=True, enforce_sorted=False)
        found: Tensor = self.layer(packed)[1]
        return found[-1]


class Folds(nn.Module):
    """Applies a layer to the steps of all records as if each were one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, values: Tensor) -> Tensor:
        found: Tensor = self.layer(values.reshape(-1, 2)).reshape(-1, 4)
        return found


class Wastes(nn.Module):
    """Applies a layer once more, and nothing comes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, values: Tensor) -> Tensor:
        found: Tensor = self.layer(values)
        self.layer(found)
        return found


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "batch norm": (lambda: nn.BatchNorm1d(4), r"'inner.1' \(BatchNorm1d\) mixes .* use GroupNorm"),
    "deep batch norm": (lambda: nn.Sequential(nn.Sequential(nn.BatchNorm1d(4))), r"'inner.1.0.0' \(BatchNorm1d\)"),
    "batch norm without weights": (lambda: nn.BatchNorm1d(4, affine=False, track_running_stats=False), "GroupNorm"),
    "attention": (lambda: nn.MultiheadAttention(4, 2), "use opacus.layers.DPMultiheadAttention"),
    "own weight": (OwnWeight, r"\(OwnWeight\) has no gradient of its own"),
    "prelu": (nn.PReLU, "use LeakyReLU"),
    "cell": (lambda: nn.GRUCell(4, 4), "use GRU"),
    "circular": (lambda: nn.Conv1d(4, 4, 3, padding_mode="circular"), "padding_mode='zeros'"),
    "max norm": (lambda: nn.Embedding(4, 4, max_norm=1.0), "leave max_norm out"),
    "parametrized": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "ParametrizedLinear"),
    "mixing": (Mixes, "depends on the other records"),
    "buffer": (lambda: Counts(True), "'inner.1.seen' would leave without noise"),
    "buffer that stays": (lambda: Counts(False), "changes its tensor 'inner.1.seen'"),
    "elsewhere": (Elsewhere, "do not add up|outside of its layer"),
    "packed": (lambda: Packs(nn.GRU), "packed sequences; give it padded ones"),
    "folded": (Folds, "a Linear is not applied to all records at a time"),
    "wasted": (Wastes, "is also applied where nothing comes of it"),
    "in place": (lambda: nn.ReLU(inplace=True), "single records cannot be followed"),
}


def looked_at(model: nn.Module) -> None:
    """All that is done with a model before it sees a record."""
    require_private(model, list(model.state_dict()))
    with RecordGradients(model, entropy, (4,), 16) as gradients:
        gradients.try_out(torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_whose_records_cannot_be_told_apart_is_refused_by_name(kind: str) -> None:
    inner, said = REFUSED[kind]
    with pytest.raises(ModelRefused, match=said):
        looked_at(Holds(inner()))


def test_frozen_layers_need_no_gradient_and_tied_ones_have_one_for_both_uses() -> None:
    model = Holds(nn.Identity())
    model.inner[0].requires_grad_(False)
    assert list(trained_parameters(model)) == ["inner.2.bias", "inner.2.weight"]
    tied = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    with RecordGradients(tied, entropy, (4,), 8) as gradients:
        gradients.try_out(torch.zeros(0, dtype=torch.int64))  # which compares with torch's own


class Spoils(torch.autograd.Function):
    """Passes on what it is given, and writes over the gradient that it is given back."""

    @staticmethod
    def forward(_context: Any, given: Tensor) -> Tensor:
        return given.clone()

    @staticmethod
    def backward(_context: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.zero_()


class Branches(nn.Module):
    """Torch hands both branches of a sum the same gradient, in the same memory."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits of four classes."""
        held = self.first(inputs)
        spoilt: Tensor = Spoils.apply(held)  # type: ignore[no-untyped-call]
        return self.second(held) + spoilt


def test_a_gradient_is_kept_apart_from_memory_that_torch_goes_on_with() -> None:
    records, targets = torch.randn(2, 3), torch.tensor([0, 3])
    reference = Branches()
    entropy(reference(records[1:]), targets[1:]).sum().backward()  # type: ignore[no-untyped-call]

    with RecordGradients(Branches(), entropy, (3,), 8) as gradients:
        gradients.try_out(targets[:0])
        found, _loss = gradients.of(records, targets)

    for (name, parameter), array in zip(trained_parameters(reference).items(), found, strict=True):
        assert parameter.grad is not None
        assert array[1] == pytest.approx(parameter.grad.reshape(-1).numpy(), abs=2e-5), name


class Breaks(torch.autograd.Function):
    """Passes on what it is given, and breaks on the way back if it is told to."""

    breaks = False

    @staticmethod
    def forward(_context: Any, given: Tensor) -> Tensor:
        return given.clone()

    @staticmethod
    def backward(_context: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        if Breaks.breaks:
            raise MemoryError
        return gradient


class Breakable(nn.Module):
    """Has gradients for its second layer before it breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, values: Tensor) -> Tensor:
        """Logits of two classes."""
        found: Tensor = self.second(Breaks.apply(self.first(values)))  # type: ignore[no-untyped-call]
        return found


def test_what_a_batch_that_broke_had_given_is_not_added_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = torch.zeros(8, dtype=torch.int64)
    with RecordGradients(Breakable(), entropy, (3,), 8) as gradients:
        gradients.try_out(targets[:0])
        with monkeypatch.context() as broken:
            broken.setattr(Breaks, "breaks", True)
            with pytest.raises(MemoryError):
                gradients.of(torch.randn(8, 3), targets)
        with pytest.raises(WorkBroken):  # Opacus has kept some of it
            gradients.of(torch.randn(8, 3), targets)


def test_a_record_whose_gradient_depends_on_the_lengths_of_others_is_not_worked_on() -> None:
    """A model that packs only now and then was not seen to do so when it was tried out."""

    class NowAndThen(Packs):
        def forward(self, values: Tensor) -> Tensor:
            if (values == 0).any():
                return super().forward(values)
            found: Tensor = self.layer(values[..., None])[1]
            return found[-1]

    model = Holds(nn.Identity())
    model.inner = nn.Sequential(NowAndThen(nn.GRU), nn.Linear(4, 2))
    records = torch.randn(8, 4)
    records[1:, 2:] = 0.0
    with RecordGradients(model, entropy, (4,), 8) as gradients:
        gradients.try_out(torch.zeros(0, dtype=torch.int64))
        with pytest.raises(WorkBroken, match="packed sequences"):
            gradients.of(records, torch.zeros(8, dtype=torch.int64))


def test_how_many_are_worked_on_at_once_hangs_on_public_numbers_and_memory() -> None:
    assert records_at_once(52_138, 64.0) >= 64
    assert records_at_once(52_138, 100_000.0) == 128
    assert records_at_once(10**9, 64.0) == 1
    assert records_at_once(10, 1.0) == 8


@pytest.mark.parametrize("at_once", [1, 3, 8, 56, 96, 104, 128])
def test_any_number_of_records_can_be_worked_on(at_once: int) -> None:
    with RecordGradients(made(LAYERS["norms"][1]), entropy, (6,), at_once) as gradients:
        gradients.try_out(torch.zeros(0, dtype=torch.int64))
        for records in (1, 2, 7, 50, at_once, at_once + 1, 3 * at_once):
            found, _ = all_of(gradients, torch.randn(records, 6), torch.zeros(records, dtype=torch.int64))
            assert all(len(array) == records for array in found)
