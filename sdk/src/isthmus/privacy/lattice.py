"""Clipping onto a lattice of integers, where the bound on the norm is checked and not merely computed.

Floats leak: what can come out of `x + noise` depends on x down to its last bits (Mironov 2012,
https://doi.org/10.1145/2382196.2382264). So an update becomes integers first, on a grid that is public and the same
whatever the update is; noise is added to integers; and back to floats it goes only then, which reveals nothing more.

One step of the grid is C / S: S (the scale) integers stand for the clipping bound C. Rounding to the nearest moves a
vector of d elements by at most sqrt(d) / 2 steps, so two neighbours differ by at most D = S + ceil(sqrt(d) / 2) steps,
and that is the sensitivity to which noise is added. Whether it holds is checked in exact arithmetic for every vector.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from isthmus.privacy.clipping import Tensors, check_clip_norm, global_norm
from isthmus.privacy.discrete_gaussian import MAX_VARIANCE, Integers, Noise
from isthmus.privacy.keystream import Keystream
from isthmus.privacy.sensitivity import rounding_reach, share_of_variance

UPDATE_SCALE: Final = 1 << 20
"""Steps in the bound of a whole update: for a million elements, rounding adds 0.05 % to the sensitivity."""
SAMPLE_SCALE: Final = 1 << 24
"""Steps in the bound of one record's gradient, which are summed a batch at a time."""
MAX_SENSITIVITY: Final = 1 << 26

_BLOCK: Final = 1 << 14
_SHRINK: Final = 1 - 2.0**-20
_NOISE_REACH: Final = 40  # sigmas that no noise reaches, in float32's range


class Lattice:
    """The grid of one job: public, and fixed before any data is looked at."""

    def __init__(self, clip_norm: float, scale: int, dimension: int) -> None:
        """Choose a grid.

        Args:
            clip_norm: the clipping bound C, in the units of the parameters; finite, > 0.
            scale: S, the steps that stand for C; from 1. `UPDATE_SCALE` or `SAMPLE_SCALE` unless there is a reason.
            dimension: elements of the whole vector, over all tensors; from 1.

        Raises:
            ValueError: an argument outside of its range, a sensitivity above `MAX_SENSITIVITY`, or a step that float64
                cannot hold.
        """
        check_clip_norm(clip_norm)
        if scale < 1 or dimension < 1:
            raise ValueError(f"a lattice of scale {scale} and dimension {dimension}: both must be 1 at least")
        self.clip_norm = float(clip_norm)
        self.scale = scale
        self.dimension = dimension
        self.sensitivity = scale + rounding_reach(dimension)
        """D: the largest norm of an encoded vector, in steps."""
        self.step = self.clip_norm / scale
        """What one step is worth, in the units of the parameters."""
        if self.sensitivity > MAX_SENSITIVITY:
            raise ValueError(
                f"a sensitivity of {self.sensitivity} steps is above {MAX_SENSITIVITY}: take a smaller scale"
            )
        if self.step < np.finfo(np.float64).tiny or not math.isfinite(scale / self.clip_norm):
            raise ValueError(f"clip_norm is {clip_norm}; with {scale} steps, one step would be too small for float64")

    def reach(self, share: float) -> int:
        """The largest norm, in steps, of a vector that is counted by `share` (above 0, up to 1) before it is rounded.

        That of share 1 is the sensitivity.
        """
        if not 0 < share <= 1:
            raise ValueError(f"a vector's share is {share}; it must be above 0, and 1 at most")
        return math.ceil(share * self.scale) + rounding_reach(self.dimension)

    def bound_holds(self, squares: int) -> bool:
        """Whether a vector whose squares sum up to `squares` keeps the sensitivity: in whole numbers."""
        return squares <= self.sensitivity**2

    def factor_of(self, norm: float) -> float:
        """What an update of this norm is multiplied with before it is rounded: steps per unit, less if it is too long.

        Args:
            norm: the update's, as `clipping.global_norm` says; not negative. Infinite stands for what is beyond
                float64, and gives 0.
        """
        return self.scale / max(norm, self.clip_norm)

    def encode(self, update: Tensors) -> Integers:
        """An update as one vector of integers, its tensors in the order of their names, clipped as a whole.

        Args:
            update: tensor name -> float array of any shape; together they have `dimension` elements. Not modified.

        Returns:
            int64, one-dimensional: min(1, C / norm) times the update, in steps, rounded to the nearest.

        Raises:
            NonFiniteUpdate: some element is NaN or infinite.
            ValueError: some tensor does not hold floats, or the number of elements is another.

        Guarantees:
            The sum of the squares is at most sensitivity^2, in exact arithmetic, whatever the update holds.
        """
        found = np.empty(self.dimension, np.int64)
        for start, integers in self.encoded(update):
            found[start : start + integers.size] = integers
        return found

    def encoded(self, update: Tensors, share: float = 1.0) -> Iterator[tuple[int, Integers]]:
        """As `encode`, in blocks, each with its place; and times `share`, before anything is rounded.

        Args:
            update: as for `encode`.
            share: above 0, up to 1.

        Raises:
            NonFiniteUpdate, ValueError: as for `encode`.

        Guarantees:
            The sum of the squares of all blocks is at most reach(share)^2, in exact arithmetic.
        """
        factor = self._safe_factor(update, share)
        for start, block in _blocks(update):
            yield start, to_lattice(block, factor)

    def decode(self, integers: Integers, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, NDArray[np.float32]]:
        """Integers, with their noise, in the units of the parameters.

        Args:
            integers: one-dimensional, `dimension` elements, as `encode` orders them.
            shapes: tensor name -> shape.

        Returns:
            The same names; float32.

        Raises:
            ValueError: the shapes have another number of elements.
        """
        if integers.shape != (self.dimension,) or sum(map(math.prod, shapes.values())) != self.dimension:
            raise ValueError(f"the lattice has {self.dimension} elements, which are not those of the shapes")
        found, start = {}, 0
        for name in sorted(shapes):
            array = np.empty(math.prod(shapes[name]), np.float32)
            for inner in range(0, array.size, _BLOCK):
                part = array[inner : inner + _BLOCK]
                np.multiply(integers[start : start + part.size], self.step, out=part, casting="unsafe")
                start += part.size
            found[name] = array.reshape(shapes[name])
        return found

    def noised(self, update: Tensors, variance: int, keystream: Keystream) -> dict[str, NDArray[np.float32]]:
        """Clip, encode, add exact noise, decode: what may leave.

        Args:
            update: as for `encode`.
            variance: sigma^2 of the noise, in steps; see `variance_of`.
            keystream: a new one, used for nothing else.

        Returns:
            The same names and shapes; float32.

        Raises:
            NonFiniteUpdate, ValueError: as for `encode`; or the noise does not fit into float32.

        Guarantees:
            One vector with discrete Gaussian noise on integers of norm at most `sensitivity`: an
            `events.GaussianRelease` of multiplier sqrt(variance) / sensitivity.

        Memory: the result, and some 2 MiB. The update is encoded twice rather than kept as integers.
        """
        noise = Noise(variance, keystream)
        if (self.sensitivity + _NOISE_REACH * math.sqrt(variance)) * self.step > float(np.finfo(np.float32).max):
            raise ValueError(
                f"noise of sigma^2 {variance} with a clip_norm of {self.clip_norm} is too large for float32"
            )
        factor = self._safe_factor(update)
        found = {name: np.empty(update[name].shape, np.float32) for name in sorted(update)}
        for name, array in found.items():
            flat = array.reshape(-1)
            for start, block in _blocks({name: update[name]}):
                integers = to_lattice(block, factor)
                noise.add_to(integers)
                np.multiply(integers, self.step, out=flat[start : start + block.size], casting="unsafe")
        return found

    def _safe_factor(self, update: Tensors, share: float = 1.0) -> float:
        """The factor with which the update keeps the bound: the one for its norm, or a millionth less."""
        elements = sum(array.size for array in update.values())
        if elements != self.dimension:
            raise ValueError(f"the update has {elements} elements, the lattice {self.dimension}")
        allowed = self.reach(share) ** 2
        factor = self.factor_of(global_norm(update)) * share
        while sum(sum_of_squares(to_lattice(block, factor)) for _, block in _blocks(update)) > allowed:
            factor *= _SHRINK
        return factor


def to_lattice(block: NDArray[np.floating[Any]], factor: float) -> Integers:
    """Floats as integers: each times `factor`, in float64, rounded to the nearest (halves to even).

    Args:
        block: finite floats of any shape.
        factor: of `Lattice.factor_of`; not negative.

    Returns:
        int64, the same shape. The same block and factor give the same integers on every machine.

    Raises:
        ValueError: some product is NaN, or larger than any lattice allows.
    """
    with np.errstate(under="ignore", over="ignore", invalid="ignore"):
        product = np.multiply(block, factor, dtype=np.float64)
        if product.size and not max(float(product.max()), -float(product.min())) <= 2 * MAX_SENSITIVITY:
            raise ValueError("an element lies outside of the lattice: it is not finite, or it was not clipped")
    integers: Integers = np.rint(product, out=product).astype(np.int64)
    return integers


def sum_of_squares(integers: NDArray[np.signedinteger[Any]]) -> int:
    """The sum of the squares, exact wherever it matters.

    Args:
        integers: of any shape, each below 2^53 in magnitude.

    Returns:
        The sum if it is below 2^53; otherwise 2^53 or more, which no lattice's bound allows (it is 2^52 at most).

    Why it may be summed as float64, in any order: squares and partial sums below 2^53 are exact. Rounding is monotone:
    what is 2^53 or more, before rounding, is so afterwards, and adding to it takes nothing away.
    """
    flat = integers.reshape(-1).astype(np.float64)
    return int(np.multiply(flat, flat, out=flat).sum())  # `np.dot` would wake threads for so little


def variance_of(noise_multiplier: float, sensitivity: int) -> int:
    """sigma^2 in steps, for noise of `noise_multiplier` times the sensitivity: the next whole number, exactly.

    Args:
        noise_multiplier: z; finite, > 0.
        sensitivity: D, in steps (2 D where neighbours replace a unit); from 1.

    Raises:
        ValueError: an argument outside of its range, or sigma^2 above what can be sampled.
    """
    variance = share_of_variance(noise_multiplier, sensitivity, 1)
    if variance > MAX_VARIANCE:
        raise ValueError(f"a noise_multiplier of {noise_multiplier} on {sensitivity} steps is more than can be sampled")
    return variance


def _blocks(update: Tensors) -> Iterator[tuple[int, NDArray[np.floating[Any]]]]:
    """The elements in blocks, each with its place: the tensors by name, flattened."""
    start = 0
    for name in sorted(update):
        flat = update[name].reshape(-1)
        for inner in range(0, flat.size, _BLOCK):
            block = flat[inner : inner + _BLOCK]
            yield start, block
            start += block.size
