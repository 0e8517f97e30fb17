"""The local epochs: read it from top to bottom."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from isthmus.wire.jobs import Adam, OptimizerSpec, TrainingSpec
from isthmus_worker.determinism import batch_generator
from isthmus_worker.features import Examples
from isthmus_worker.optimizers import AdamOptimizer, Optimizer, SgdOptimizer
from isthmus_worker.refusals import DataRefused

Tell = Callable[[float], None]
"""Called with the share of the work that is done, after every batch; may raise to stop the work."""


def train(
    model: nn.Module,
    examples: Examples,
    spec: TrainingSpec,
    *,
    record_shape: tuple[int, ...],
    seed: str,
    tell: Tell,
) -> float:
    """Train `model` in place for `spec.epochs` over `examples`.

    Args:
        model: the round's model.
        examples: the training rows; those held out are not among them.
        spec: optimizer, batches, epochs and loss.
        record_shape: what the inputs of one record are folded into.
        seed: the task's; decides the order of the batches.
        tell: hears of progress.

    Returns:
        The mean loss a record over the last epoch, as each batch saw it before its step.

    Raises:
        DataRefused: there are no training rows, or only one for a model with batch normalization.

    Edge cases:
        batches that do not fill up are used, but for a last batch of one record in a model with batch normalization:
        that record waits for the next epoch's order;
        the optimizer is made anew: no momentum comes from an earlier round.
    """
    fewest = 2 if _has_batch_norm(model) else 1
    if len(examples) < fewest:
        raise DataRefused(f"Too few records are left for training: this model needs {fewest}.", records=len(examples))
    inputs, targets = as_tensors(examples, record_shape)
    size = len(examples) if spec.batch_size == "all" else spec.batch_size
    if size < fewest:
        raise DataRefused("Batches of one record cannot be normalized: a model with batch normalization needs two.")
    generator = batch_generator(seed)
    optimizer = make_optimizer(model, spec.optimizer)
    steps, step = spec.epochs * -(-len(examples) // size), 0
    total, seen = 0.0, 0
    model.train()
    for _epoch in range(spec.epochs):
        total, seen = 0.0, 0
        for batch in _batches(len(examples), size, fewest, generator):
            optimizer.zero_grad()
            loss = loss_of(model(inputs[batch]), targets[batch], spec.loss)
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no type for it
            optimizer.step()
            total, seen = total + loss.item() * len(batch), seen + len(batch)
            step += 1
            tell(step / steps)
    return total / seen


def make_optimizer(model: nn.Module, spec: OptimizerSpec) -> Optimizer:
    """A fresh optimizer over the parameters that are not frozen."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return AdamOptimizer(parameters, spec) if isinstance(spec, Adam) else SgdOptimizer(parameters, spec)


def loss_of(outputs: Tensor, targets: Tensor, loss: str, reduction: str = "mean") -> Tensor:
    """Cross-entropy of logits [batch, classes] with classes [batch], or squared error of [batch, 1] with [batch, 1]."""
    if loss == "cross_entropy":
        return functional.cross_entropy(outputs, targets, reduction=reduction)
    if outputs.shape != targets.shape:
        raise ValueError("the model's outputs and the targets differ in shape")
    return functional.mse_loss(outputs, targets, reduction=reduction)


def as_tensors(examples: Examples, record_shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Inputs [records, *record_shape] and targets, sharing memory with the arrays."""
    inputs = torch.from_numpy(examples.inputs).reshape(len(examples), *record_shape)
    return inputs, torch.from_numpy(examples.targets)


def _batches(rows: int, size: int, fewest: int, generator: torch.Generator) -> Iterator[Tensor]:
    order = torch.randperm(rows, generator=generator)
    for start in range(0, rows, size):
        batch = order[start : start + size]
        if len(batch) >= fewest:
            yield batch


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
