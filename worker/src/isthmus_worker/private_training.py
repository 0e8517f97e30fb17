"""The local steps under privacy of records (DP-SGD): read it from top to bottom.

Abadi et al. 2016, "Deep Learning with Differential Privacy" (https://arxiv.org/abs/1607.00133), with two differences:
gradients are summed as whole numbers on a public lattice, and the noise is the exact discrete Gaussian. What leaves is
a function of the noised sums, of public numbers, and of nothing else.
"""

import math
import secrets
from collections.abc import Collection
from fractions import Fraction
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from isthmus.privacy.discrete_gaussian import Noise
from isthmus.privacy.keystream import MAX_TAKEN_BYTES, Keystream
from isthmus.privacy.lattice import SAMPLE_SCALE, Lattice
from isthmus.privacy.scales import noised_lattice
from isthmus.wire.jobs import TrainingSpec
from isthmus.wire.privacy import PrivacyPlan
from isthmus_worker.features import Examples
from isthmus_worker.gradients import RecordGradients, records_at_once, require_private, trained_parameters
from isthmus_worker.record_clipping import ClippedSum
from isthmus_worker.refusals import ModelRefused
from isthmus_worker.training import Tell, as_tensors, loss_of, make_optimizer

_COINS_AT_ONCE: Final = MAX_TAKEN_BYTES // 8
_ALL: Final = 1 << 64


def train_privately(
    model: nn.Module,
    examples: Examples,
    spec: TrainingSpec,
    plan: PrivacyPlan,
    *,
    averaged: Collection[str],
    record_shape: tuple[int, ...],
    tell: Tell,
) -> float:
    """Train `model` in place for `plan.steps_per_round` noised steps.

    In each step every record takes part by an independent coin; the gradients of those that do are clipped, each as one
    vector over all tensors, and summed; discrete Gaussian noise is added; the sum is divided by the batch that was to
    be expected, and the job's own optimizer makes its step with that.

    Args:
        model: the round's model.
        examples: the training rows; those held out are not among them. Any number, also none.
        spec: optimizer and loss. Batches and epochs are the plan's.
        plan: sampling probability, steps, clip and noise.
        averaged: names of the tensors that leave.
        record_shape: what the inputs of one record are folded into.
        tell: hears of progress, whole steps only.

    Returns:
        The mean loss a record as the steps saw it, or NaN. It is exact, so it stays at the site.

    Raises:
        ModelRefused: see `isthmus_worker.gradients`.

    Guarantees:
        One record more or less changes each step's sum by at most the sensitivity that the noise is scaled with, in
        whole numbers. The sum that the noise is added to is all that the step knows of the records: weights are put
        back to what they were before the records were looked at.
        Coins and noise come from keys that the operating system gave to this call; nobody else learns them, and no seed
        of the job has a part in them. Neither has it in dropout: who knew its masks could follow how records move
        from place to place.

    Edge cases:
        a step without records is a step with noise alone;
        a record whose gradient is NaN or infinite adds nothing to its step: to fail would tell of it.
    """
    require_private(model, averaged)
    elements = sum(parameter.numel() for parameter in trained_parameters(model).values())
    if not elements:
        raise ModelRefused("Unit record: the model has no parameter that is trained.")
    lattice, variance = noised_lattice(plan.clip_norm, plan.noise_multiplier, elements, finest=SAMPLE_SCALE)
    inputs, targets = as_tensors(examples, record_shape)
    coins, noise = Keystream(), Noise(variance, Keystream())
    gradient_sum = ClippedSum(lattice)
    torch.manual_seed(secrets.randbits(63))
    total, seen = 0.0, 0

    def loss(outputs: Tensor, wanted: Tensor) -> Tensor:
        return loss_of(outputs, wanted, spec.loss, reduction="none")

    with RecordGradients(model, loss, record_shape, records_at_once(elements, plan.expected_batch)) as gradients:
        gradients.try_out(targets[:0])
        optimizer = make_optimizer(model, spec.optimizer)
        kept = [parameter.detach().clone() for parameter in gradients.parameters]
        for step in range(plan.steps_per_round):
            drawn = chosen_records(len(examples), plan.sampling_probability, coins)
            for part in np.split(drawn, np.cumsum(gradients.portions(len(drawn)))[:-1]):
                batch = torch.from_numpy(part)
                found, lost = gradients.of(inputs[batch], targets[batch])
                gradient_sum.add(found)
                del found  # its room is used for the next ones
                total, seen = total + lost, seen + len(batch)
                tell(step / plan.steps_per_round)
            sums = gradient_sum.take()
            noise.add_to(sums)
            _put(gradients.parameters, kept, sums, lattice, plan.expected_batch)
            gradients.keep_still()
            optimizer.step()
            optimizer.zero_grad()
            torch._foreach_copy_(kept, [parameter.detach() for parameter in gradients.parameters])
            tell((step + 1) / plan.steps_per_round)
    return total / seen if seen else math.nan


def chosen_records(records: int, probability: float, coins: Keystream) -> NDArray[np.int64]:
    """Which records take part in a step: each by a coin of its own.

    Args:
        records: how many there are.
        probability: of each; 0 < probability <= 1. The coins' own is lower by less than 2^-64.
        coins: moved on by 64 bits a record.

    Returns:
        Their places, ascending.
    """
    threshold = math.floor(Fraction(probability) * _ALL)
    if threshold >= _ALL:
        return np.arange(records)
    found = [np.zeros(0, np.int64)]
    for start in range(0, records, _COINS_AT_ONCE):
        words = coins.take(min(_COINS_AT_ONCE, records - start), np.uint64)
        found.append(start + np.flatnonzero(words < np.uint64(threshold)))
    return np.concatenate(found)


@torch.no_grad()
def _put(
    parameters: list[nn.Parameter], kept: list[Tensor], sums: NDArray[np.int64], lattice: Lattice, batch: float
) -> None:
    """The noised sums as the parameters' gradients, and the parameters as they were before the step."""
    with np.errstate(over="ignore"):
        means = torch.from_numpy(sums * (lattice.step / batch))
    place = 0
    for parameter, before in zip(parameters, kept, strict=True):
        part = means[place : place + parameter.numel()]
        parameter.copy_(before)
        parameter.grad = part.reshape(parameter.shape).to(parameter.dtype)
        place += parameter.numel()
