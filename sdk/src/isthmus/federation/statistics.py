"""Count, mean and variance of columns over many sites, without their rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Vector = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Moments:
    """What a set of rows says of its columns: one entry a column in each vector.

    Attributes:
        count: values that are not missing.
        mean: their mean; 0 where there are none.
        m2: the sum of their squared distances from the mean; 0 where there are none.

    Raises:
        ValueError: the vectors have different lengths, or hold what no rows can give: NaN, an infinity, a negative
            count, a count that is no whole number, a negative m2.
    """

    count: Vector
    mean: Vector
    m2: Vector

    def __post_init__(self) -> None:
        for name in ("count", "mean", "m2"):
            vector = np.asarray(getattr(self, name), np.float64)
            if vector.ndim != 1 or vector.shape != np.shape(self.count):
                raise ValueError("count, mean and m2 are vectors of one length")
            if not np.isfinite(vector).all():
                raise ValueError(f"{name} holds NaN or an infinity")
            object.__setattr__(self, name, vector)
        if (self.count < 0).any() or (self.count != np.floor(self.count)).any():
            raise ValueError("count holds what is not a number of values")
        if (self.m2 < 0).any():
            raise ValueError("m2 holds a negative number")


def moments(rows: ArrayLike) -> Moments:
    """The moments of an array's columns.

    Args:
        rows: two dimensions, one row a record; NaN where a value is missing.

    Raises:
        ValueError: not two dimensions, or a value is infinite or so large that its square is.

    Guarantees:
        Values are measured from the column's first one, and the mean of what is left is taken out again before
        squaring: a large common offset costs no digits, and a constant column has an m2 of exactly 0.

    Source:
        Chan, Golub, LeVeque 1983, "Algorithms for Computing the Sample Variance" (shifted, corrected two-pass).
        https://doi.org/10.1080/00031305.1983.10483115
    """
    values = np.asarray(rows, np.float64)
    if values.ndim != 2:
        raise ValueError(f"rows have two dimensions, not {values.ndim}")
    if np.isinf(values).any():
        raise ValueError("some value is infinite")
    present = ~np.isnan(values)
    count = present.sum(axis=0).astype(np.float64)
    some = np.maximum(count, 1.0)
    first = np.zeros(values.shape[1])
    if values.shape[0]:
        first = np.where(count > 0, values[present.argmax(axis=0), np.arange(values.shape[1])], 0.0)
    with np.errstate(over="ignore", invalid="ignore"):
        shifted = np.where(present, values - first, 0.0)
        offset = shifted.sum(axis=0) / some
        rest = np.where(present, shifted - offset, 0.0)
        left = rest.sum(axis=0)
        m2 = np.maximum((rest * rest).sum(axis=0) - left * left / some, 0.0)
        mean = first + (offset + left / some)
    if not (np.isfinite(m2).all() and np.isfinite(mean).all()):
        raise ValueError("some value is too large to be squared")
    return Moments(count, mean, m2)


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of the rows of `a` and `b` together.

    Raises:
        ValueError: they have different numbers of columns, or the result is too large.

    Guarantees:
        Where one side has no values the other's moments come back unchanged, bit for bit. Means are float64, so a site
        adds a relative error of about (2^-53 * mean / standard deviation) to the variance: none that shows at an
        offset of 1e9, some 1e-5 at 1e12.

    Source:
        Chan, Golub, LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances".
        http://i.stanford.edu/pub/cstr/reports/cs/tr/79/773/CS-TR-79-773.pdf
    """
    if a.count.shape != b.count.shape:
        raise ValueError(f"moments of {a.count.size} and of {b.count.size} columns cannot be merged")
    count = a.count + b.count
    some = np.maximum(count, 1.0)
    with np.errstate(over="ignore", invalid="ignore"):
        delta = b.mean - a.mean
        mean = a.mean + delta * (b.count / some)
        m2 = a.m2 + b.m2 + delta * delta * (a.count * (b.count / some))
    only_a, only_b = b.count == 0, a.count == 0
    return Moments(
        count,
        np.where(only_a, a.mean, np.where(only_b, b.mean, mean)),
        np.where(only_a, a.m2, np.where(only_b, b.m2, m2)),
    )


def merge_all(sites: Sequence[Moments]) -> Moments:
    """The moments over all sites, merged from left to right: give them in the cohort's canonical order.

    Raises:
        ValueError: there are no sites, or see `merge`.
    """
    if not sites:
        raise ValueError("there are no sites to merge")
    merged = sites[0]
    for site in sites[1:]:
        merged = merge(merged, site)
    return merged


def variance(of: Moments) -> Vector:
    """Population variance of each column; 0 where it has no values."""
    return of.m2 / np.maximum(of.count, 1.0)
