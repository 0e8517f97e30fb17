"""How a round's updates become the next model, as a job declares it."""

from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from isthmus.wire.base import Finite, Request

Rate = Annotated[Finite, Field(gt=0, le=1000)]
Decay = Annotated[Finite, Field(ge=0, lt=1)]


class Weighting(StrEnum):
    """How updates count in the mean."""

    DECLARED = "declared"  # by the rows that the dataset declared, frozen when its participation was approved
    UNIFORM = "uniform"


class _OfTheMean(Request):
    """A strategy that moves the model by the mean of the updates, and never looks at a single one."""

    needs_single_updates: ClassVar[bool] = False
    """Whether the mean is not enough (a median, say): secure aggregation shows no more."""


class FedAvg(_OfTheMean):
    """model + lr * mean. Source: McMahan et al. 2017, https://arxiv.org/abs/1602.05629"""

    kind: Literal["fedavg"] = "fedavg"
    weights: Weighting = Weighting.DECLARED
    lr: Rate = 1.0


class FedAvgM(_OfTheMean):
    """Server momentum: v = momentum * v + mean; model + lr * v. Source: Hsu et al. 2019, https://arxiv.org/abs/1909.06335"""

    kind: Literal["fedavgm"] = "fedavgm"
    weights: Weighting = Weighting.DECLARED
    lr: Rate = 1.0
    momentum: Decay = 0.9


class FedAdam(_OfTheMean):
    """Server Adam over the mean update, without bias correction. Source: Reddi et al. 2021, https://arxiv.org/abs/2003.00295"""

    kind: Literal["fedadam"] = "fedadam"
    weights: Weighting = Weighting.DECLARED
    lr: Rate = 0.01
    beta1: Decay = 0.9
    beta2: Decay = 0.99
    tau: Annotated[Finite, Field(gt=0, le=1)] = 1e-3


def _short_form(value: Any) -> Any:
    """`fedavg`, or `{fedavgm: {momentum: 0.9}}`, or the long form with `kind`."""
    if isinstance(value, str):
        return {"kind": value}
    if isinstance(value, dict) and "kind" not in value and len(value) == 1:
        kind, options = next(iter(value.items()))
        if isinstance(options, dict) or options is None:
            return {"kind": kind, **(options or {})}
    return value


StrategySpec = Annotated[
    Annotated[FedAvg | FedAvgM | FedAdam, Field(discriminator="kind")],
    BeforeValidator(_short_form),
]
