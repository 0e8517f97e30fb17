"""How well a model does: at one site, and over all of them."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


def accuracy(predictions: ArrayLike, labels: ArrayLike) -> float | None:
    """The share of predicted classes that are right; None if there are no examples.

    Raises:
        ValueError: predictions and labels are not vectors of one length.
    """
    predicted, true = np.asarray(predictions), np.asarray(labels)
    if predicted.ndim != 1 or predicted.shape != true.shape:
        raise ValueError("predictions and labels are vectors of one length")
    return int(np.count_nonzero(predicted == true)) / predicted.size if predicted.size else None


def pooled_mean(values: Sequence[float], examples: Sequence[float]) -> float | None:
    """The mean over all examples of a mean that each site took over its own: accuracy, loss.

    Args:
        values: each site's mean. One without examples is not looked at.
        examples: each site's number of examples.

    Returns:
        sum(values * examples) / sum(examples), with sums that do not depend on the order of the sites; None if there
        are no examples anywhere.

    Raises:
        ValueError: values and examples of different number, a number of examples that is none, or a value that is not
            finite, or too large, at a site that has examples.
    """
    if len(values) != len(examples):
        raise ValueError("there are not as many values as numbers of examples")
    for value, number in zip(values, examples, strict=True):
        if not (math.isfinite(number) and number >= 0):
            raise ValueError(f"a number of examples is {number}")
        if number > 0 and not math.isfinite(value):
            raise ValueError(f"the value of a site with examples is {value}")
    total = sum(examples)
    if total == 0:
        return None
    try:
        pooled = math.fsum(v * n for v, n in zip(values, examples, strict=True) if n > 0) / total
    except OverflowError:
        pooled = math.inf
    if not math.isfinite(pooled):
        raise ValueError("the values are too large to be pooled")
    return pooled


def auc(scores: ArrayLike, labels: ArrayLike) -> float | None:
    """Area under the receiver operating characteristic, exact, ties counted half.

    Args:
        scores: one an example; larger means rather positive.
        labels: 0 or 1 (or False, True).

    Returns:
        The probability that a positive example scores above a negative one, plus half that of a tie; None if one of
        the classes is missing.

    Raises:
        ValueError: scores and labels are not vectors of one length, a score is NaN, a label is neither 0 nor 1.

    Source:
        Mann and Whitney 1947; Hanley and McNeil 1982, "The Meaning and Use of the Area under a Receiver Operating
        Characteristic (ROC) Curve". https://doi.org/10.1148/radiology.143.1.7063747
    """
    score, label = np.asarray(scores, np.float64), np.asarray(labels)
    if score.ndim != 1 or score.shape != label.shape:
        raise ValueError("scores and labels are vectors of one length")
    if np.isnan(score).any():
        raise ValueError("a score is NaN")
    positive = label == 1
    if not (positive | (label == 0)).all():
        raise ValueError("a label is neither 0 nor 1")
    positives = int(positive.sum())
    negatives = int(score.size) - positives
    if positives == 0 or negatives == 0:
        return None
    _, place, ties = np.unique(score, return_inverse=True, return_counts=True)
    # Twice the mean rank of each group of ties is a whole number: first + last. Python's do not overflow.
    twice_rank = 2 * np.cumsum(ties) - ties + 1
    twice_sum = int(twice_rank[place][positive].sum(dtype=np.int64))
    return (twice_sum - positives * (positives + 1)) / (2 * positives * negatives)
