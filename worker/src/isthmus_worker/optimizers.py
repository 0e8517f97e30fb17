"""Stochastic gradient descent and Adam: the same bits as torch.optim's, in fewer lines and seconds.

torch.optim imports torch's compiler as soon as an optimizer is made: a second of work and 100 MB in every training
process, for nothing that is used here. The tests compare every option with torch.optim bit by bit.
"""

from collections.abc import Iterable, Sequence
from typing import Final, Protocol

import torch
from torch import Tensor, nn

from isthmus.wire.jobs import Adam, Sgd

_EPS: Final = 1e-8
"""torch.optim's own."""


class Optimizer(Protocol):
    """What the training loop asks of an optimizer."""

    def zero_grad(self) -> None:
        """Forget the gradients."""
        ...

    def step(self) -> None:
        """Move the parameters by their gradients; one without a gradient stays."""
        ...


class SgdOptimizer:
    """As torch.optim.SGD without dampening."""

    def __init__(self, parameters: Iterable[nn.Parameter], spec: Sgd) -> None:
        self._parameters = list(parameters)
        self._spec = spec
        self._velocity: dict[Tensor, Tensor] = {}

    def zero_grad(self) -> None:
        """See `Optimizer.zero_grad`."""
        _forget_gradients(self._parameters)

    @torch.no_grad()
    def step(self) -> None:
        """See `Optimizer.step`."""
        spec = self._spec
        moved, gradients = _with_gradients(self._parameters)
        if not moved:
            return
        if spec.weight_decay:
            gradients = list(torch._foreach_add(gradients, moved, alpha=spec.weight_decay))
        if spec.momentum:
            velocities = [self._accelerated(*pair) for pair in zip(moved, gradients, strict=True)]
            ahead = torch._foreach_add(gradients, velocities, alpha=spec.momentum) if spec.nesterov else velocities
            gradients = list(ahead)
        torch._foreach_add_(moved, gradients, alpha=-spec.lr)

    def _accelerated(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        velocity = self._velocity.get(parameter)
        if velocity is None:
            velocity = self._velocity[parameter] = gradient.clone()
        else:
            velocity.mul_(self._spec.momentum).add_(gradient)
        return velocity


class AdamOptimizer:
    """As torch.optim.Adam and torch.optim.AdamW."""

    def __init__(self, parameters: Iterable[nn.Parameter], spec: Adam) -> None:
        self._parameters = list(parameters)
        self._spec = spec
        self._state: dict[Tensor, _AdamState] = {}

    def zero_grad(self) -> None:
        """See `Optimizer.zero_grad`."""
        _forget_gradients(self._parameters)

    @torch.no_grad()
    def step(self) -> None:
        """See `Optimizer.step`."""
        spec = self._spec
        for parameter, gradient in zip(*_with_gradients(self._parameters), strict=True):
            state = self._state.get(parameter)
            if state is None:
                state = self._state[parameter] = _AdamState(parameter)
            state.steps += 1
            if spec.weight_decay and spec.kind == "adamw":
                parameter.mul_(1 - spec.lr * spec.weight_decay)
            elif spec.weight_decay:
                gradient = gradient.add(parameter, alpha=spec.weight_decay)  # noqa: PLW2901 - the loop's is not used again
            state.mean.lerp_(gradient, 1 - spec.beta1)
            state.square.mul_(spec.beta2).addcmul_(gradient, gradient, value=1 - spec.beta2)
            unbiased = (1 - spec.beta2**state.steps) ** 0.5
            scale = (state.square.sqrt() / unbiased).add_(_EPS)
            parameter.addcdiv_(state.mean, scale, value=-(spec.lr / (1 - spec.beta1**state.steps)))


class _AdamState:
    """What Adam keeps of one parameter."""

    def __init__(self, parameter: Tensor) -> None:
        self.steps = 0
        self.mean = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        self.square = torch.zeros_like(parameter, memory_format=torch.preserve_format)


def _forget_gradients(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _with_gradients(parameters: Sequence[nn.Parameter]) -> tuple[list[Tensor], list[Tensor]]:
    having = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
    return [parameter for parameter, _ in having], [gradient for _, gradient in having]
