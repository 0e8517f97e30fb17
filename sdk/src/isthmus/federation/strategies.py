"""How the mean of a round's updates moves the model, element by element."""

import dataclasses
from typing import Final, Protocol, assert_never

import numpy as np
from numpy.typing import NDArray

from isthmus.wire import strategies as specs
from isthmus.wire.manifest import DType, Manifest, TensorSpec

Block = NDArray[np.float64]


class Strategy(Protocol):
    """A strategy as the aggregation uses it.

    Everything is elementwise, in float64, with operations that IEEE 754 rounds correctly (+ - * / and square root): a
    model may be cut into blocks anywhere, and every machine computes the same bits.
    """

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the state that the strategy keeps, one number an element each; empty if it keeps none."""
        ...

    def initial(self, slot: str) -> float:
        """The value of every element of a slot before the first round."""
        ...

    def step(self, model: Block, mean: Block, state: dict[str, Block]) -> Block:
        """The next model.

        Args:
            model: elements of the present model. Not modified.
            mean: the same elements of the weighted mean of the updates. Not modified.
            state: slot -> the same elements of the state; its values are float32's. Moved on in place.

        Returns:
            The next model's elements, in float64.

        Guarantees:
            The new state is rounded to float32 *before* the model is computed from it. So the state that is stored is
            the state that was used, and a run that was cut between rounds goes on with the same bits.
        """
        ...


@dataclasses.dataclass(frozen=True)
class FedAvg:
    """model + lr * mean.

    Source:
        McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data".
        https://arxiv.org/abs/1602.05629
    """

    lr: float = 1.0
    slots: tuple[str, ...] = dataclasses.field(default=(), init=False)

    def initial(self, slot: str) -> float:
        """FedAvg keeps no state."""
        raise KeyError(slot)

    def step(self, model: Block, mean: Block, state: dict[str, Block]) -> Block:
        """See `Strategy.step`."""
        return model + self.lr * mean


@dataclasses.dataclass(frozen=True)
class FedAvgM:
    """v = momentum * v + mean; model + lr * v, with v = 0 before the first round.

    Source:
        Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
        Classification". https://arxiv.org/abs/1909.06335
    """

    lr: float = 1.0
    momentum: float = 0.9
    slots: tuple[str, ...] = dataclasses.field(default=("velocity",), init=False)

    def initial(self, slot: str) -> float:
        """Zero."""
        return {"velocity": 0.0}[slot]

    def step(self, model: Block, mean: Block, state: dict[str, Block]) -> Block:
        """See `Strategy.step`."""
        velocity = state["velocity"]
        velocity[...] = _stored(self.momentum * velocity + mean)
        return model + self.lr * velocity


@dataclasses.dataclass(frozen=True)
class FedAdam:
    """m = beta1 * m + (1 - beta1) * mean; v = beta2 * v + (1 - beta2) * mean^2; model + lr * m / (sqrt(v) + tau).

    There is no bias correction, as in the paper. Before the first round m = 0 and v = tau^2: Algorithm 2 asks for
    v >= tau^2, and this is the least it allows.

    Source:
        Reddi et al. 2021, "Adaptive Federated Optimization", Algorithm 2. https://arxiv.org/abs/2003.00295
    """

    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3
    slots: tuple[str, ...] = dataclasses.field(default=("m", "v"), init=False)

    def initial(self, slot: str) -> float:
        """m = 0, v = tau^2."""
        return {"m": 0.0, "v": self.tau * self.tau}[slot]

    def step(self, model: Block, mean: Block, state: dict[str, Block]) -> Block:
        """See `Strategy.step`."""
        m, v = state["m"], state["v"]
        m[...] = _stored(self.beta1 * m + (1.0 - self.beta1) * mean)
        v[...] = _stored(self.beta2 * v + (1.0 - self.beta2) * (mean * mean))
        return model + self.lr * m / (np.sqrt(v) + self.tau)


def strategy_of(spec: specs.StrategySpec) -> Strategy:
    """The strategy that a job declares."""
    match spec:
        case specs.FedAvg():
            return FedAvg(lr=spec.lr)
        case specs.FedAvgM():
            return FedAvgM(lr=spec.lr, momentum=spec.momentum)
        case specs.FedAdam():
            return FedAdam(lr=spec.lr, beta1=spec.beta1, beta2=spec.beta2, tau=spec.tau)
        case _:
            assert_never(spec)


STATE_DTYPE: Final = DType.F32


def state_name(slot: str, tensor: str) -> str:
    """The name of a slot's tensor in the file of the strategy's state."""
    return f"{slot}/{tensor}"


def state_manifest(strategy: Strategy, model: Manifest) -> Manifest | None:
    """What the file of the strategy's state holds: one F32 tensor per slot and averaged tensor; None without state."""
    if not strategy.slots:
        return None
    return Manifest(
        tensors={
            state_name(slot, name): TensorSpec(dtype=STATE_DTYPE, shape=spec.shape)
            for slot in strategy.slots
            for name, spec in model.averaged().items()
        }
    )


def _stored(values: Block) -> Block:
    """`values` as they will be read back: rounded to float32 (to an infinity where they are too large for it)."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32).astype(np.float64)
