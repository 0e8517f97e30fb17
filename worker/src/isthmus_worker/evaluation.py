"""How well a model does on the rows that are never trained on."""

import math
from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from torch import nn

from isthmus.federation.metrics import accuracy, auc
from isthmus.wire.data import DataSpec
from isthmus_worker.features import Examples
from isthmus_worker.training import as_tensors, loss_of

_BATCH: Final = 1024


_ANY_SEED: Final = 0


class NotMeasurable(Exception):
    """The model gives no finite loss here."""


def evaluate(
    model: nn.Module,
    examples: Examples,
    data: DataSpec,
    loss: str,
    tell: Callable[[], None],
    *,
    strict: bool = True,
) -> dict[str, float]:
    """Measure `model` on held-out rows.

    Args:
        model: is put into evaluation mode.
        examples: the rows.
        data, loss: of the job.
        tell: called after every batch.
        strict: whether a model without a finite loss is an error. Otherwise its loss and area are left out.

    Returns:
        `examples` and `loss`; for classification `accuracy`; for two classes `auc`, unless one of them is missing.
        Without rows: examples 0 and loss 0 (and accuracy 0), which count for nothing where they are pooled.

    Raises:
        NotMeasurable: outputs are NaN or infinite, and `strict`.
    """
    classifies = data.task == "classification"
    total, outputs = 0.0, []
    model.eval()
    with torch.no_grad():
        inputs, targets = as_tensors(examples, data.input_shape)
        for start in range(0, len(examples), _BATCH):
            predicted = model(inputs[start : start + _BATCH].clone())  # a model may work in place; the rows are kept
            total += loss_of(predicted, targets[start : start + _BATCH], loss, reduction="sum").item()
            outputs.append(predicted.double().numpy())
            tell()
    found = {"examples": float(len(examples)), "loss": total / max(1, len(examples))}
    diverged = not math.isfinite(found["loss"])
    if diverged and strict:
        raise NotMeasurable
    if diverged:
        del found["loss"]
    if classifies:
        logits = np.concatenate(outputs) if outputs else np.zeros((0, data.outputs))
        found["accuracy"] = accuracy(logits.argmax(axis=1), examples.targets) or 0.0
        if data.outputs == 2 and not diverged:
            area = auc(logits[:, 1] - logits[:, 0], examples.targets)
            if area is not None:
                found["auc"] = area
    return found


def right_answers(model: nn.Module, examples: Examples, data: DataSpec, tell: Callable[[], None]) -> int:
    """How many records a classifier answers right, each seen by itself.

    Args:
        model: is put into evaluation mode.
        examples: the rows.
        data: of the job.
        tell: called after every record.

    Guarantees:
        One record more or less changes the number by 1 at most, whatever the weights are: in a batch the last digits of
        what is computed for a record depend on how many there are and on where it stands, and where logits are tied
        such a digit decides. So every record is a batch of its own, in memory of its own, with torch's generator where
        it was for all others. That takes longer than batches do.
    """
    model.eval()
    right = 0
    with torch.no_grad():
        inputs, _targets = as_tensors(examples, data.input_shape)
        for row, target in enumerate(examples.targets.tolist()):
            torch.default_generator.manual_seed(_ANY_SEED)
            right += int(model(inputs[row : row + 1].clone()).numpy().argmax() == target)
            tell()
    return right
