"""Our optimizers against torch.optim's, bit by bit, over all options and parameters without gradients."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

from isthmus.wire.jobs import Adam, Sgd
from isthmus_worker.optimizers import AdamOptimizer, Optimizer, SgdOptimizer

STEPS = 7


class Model(nn.Module):
    """Two layers, one of which takes part in every second step only, and a parameter that is never used."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.always = nn.Linear(4, 3, dtype=dtype)
        self.sometimes = nn.Conv1d(1, 2, 3, dtype=dtype)
        self.never = nn.Parameter(torch.ones(2, dtype=dtype))

    def loss(self, inputs: torch.Tensor, step: int) -> torch.Tensor:
        total = self.always(inputs).square().sum()
        if step % 2:
            total = total + self.sometimes(inputs[:, None]).sin().sum()
        return total


def trained(make: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    model = Model(dtype)
    optimizer: Optimizer = make(model.parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        model.loss(torch.randn(5, 4, dtype=dtype), step).backward()
        optimizer.step()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


SGD = [
    Sgd(lr=lr, momentum=momentum, weight_decay=decay, nesterov=nesterov)
    for lr, momentum, decay, nesterov in product((0.07, 1e-4), (0.0, 0.9), (0.0, 0.03), (False, True))
    if momentum or not nesterov
]
ADAM = [
    Adam(kind=kind, lr=lr, beta1=beta1, beta2=beta2, weight_decay=decay)
    for kind, lr, beta1, beta2, decay in product(("adam", "adamw"), (1e-3, 0.2), (0.9, 0.0), (0.999, 0.5), (0.0, 0.03))
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spec", SGD, ids=str)
def test_our_sgd_gives_the_bits_of_torch_s(spec: Sgd, dtype: torch.dtype) -> None:
    theirs = trained(
        lambda parameters: torch.optim.SGD(
            parameters, lr=spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay, nesterov=spec.nesterov
        ),
        dtype,
    )

    assert same(trained(lambda parameters: SgdOptimizer(parameters, spec), dtype), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spec", ADAM, ids=str)
def test_our_adam_gives_the_bits_of_torch_s(spec: Adam, dtype: torch.dtype) -> None:
    kind = torch.optim.AdamW if spec.kind == "adamw" else torch.optim.Adam
    theirs = trained(
        lambda parameters: kind(parameters, lr=spec.lr, betas=(spec.beta1, spec.beta2), weight_decay=spec.weight_decay),
        dtype,
    )

    assert same(trained(lambda parameters: AdamOptimizer(parameters, spec), dtype), theirs)


def test_a_parameter_without_a_gradient_stays_even_where_weights_decay() -> None:
    for spec in (Sgd(lr=0.1, weight_decay=0.5), Adam(kind="adamw", lr=0.1, weight_decay=0.5)):
        parameter = nn.Parameter(torch.ones(3))
        make: Any = SgdOptimizer if isinstance(spec, Sgd) else AdamOptimizer
        make([parameter], spec).step()
        assert torch.equal(parameter, torch.ones(3))
