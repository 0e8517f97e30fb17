"""Bounding what one update can say: its global L2 norm."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from isthmus.privacy.sensitivity import check_noise_multiplier

Tensors = Mapping[str, NDArray[np.floating[Any]]]

_BLOCK: Final = 1 << 16
_RELATIVE: Final = 1e-6  # what rounding may add to a norm; the guarantee of `clip_by_global_norm`
_TAIL: Final = 10.0


class NonFiniteUpdate(ValueError):
    """An element of an update is NaN or infinite."""

    def __init__(self, tensor: str) -> None:
        super().__init__(f"Tensor {tensor!r} of the update holds NaN or an infinity.")
        self.tensor = tensor


def global_norm(update: Tensors) -> float:
    """Euclidean norm over all elements of all tensors.

    Args:
        update: tensor name -> array of floats of any shape.

    Returns:
        The norm, summed in float64; 0 without elements. Infinite only if the norm itself exceeds float64's range.

    Raises:
        NonFiniteUpdate: some element is NaN or infinite.
        ValueError: some tensor does not hold floats.

    Guarantees:
        Elements are divided by the largest before they are squared: nothing overflows or vanishes on the way.
    """
    largest, root = _norm_parts(update)
    return largest * root


def clip_by_global_norm(update: Tensors, clip_norm: float) -> dict[str, NDArray[np.floating[Any]]]:
    """Scale `update` down so that its global L2 norm is at most `clip_norm`.

    Args:
        update: tensor name -> float32 array of any shape (a local model minus the
            round's model). float64 is taken too, and stays float64. Not modified.
        clip_norm: the clipping bound C, in the units of the parameters; finite, > 0.

    Returns:
        The same names, shapes and element types. An update within the bound comes back with equal
        values: clipping never amplifies.

    Raises:
        ValueError: `clip_norm` is not a finite number above zero, or some tensor holds neither float32 nor float64.
        NonFiniteUpdate: some element is NaN or infinite, so no scaling can bound it.

    Guarantees:
        global_norm(result) <= clip_norm * (1 + 1e-6), for any finite input: scaled elements are rounded towards
        zero, so this also holds where they are denormal and rounding to nearest could double them.

    Edge cases:
        all zeros or no tensors -> returned as they are (no division by the norm);
        an element near float32's limit -> the norm is summed in float64.

    Source:
        McMahan et al. 2018, "Learning Differentially Private Recurrent Language
        Models" (FlatClip). https://arxiv.org/abs/1710.06963
    """
    check_clip_norm(clip_norm)
    for name, array in update.items():
        if array.dtype not in (np.float32, np.float64):
            raise ValueError(f"tensor {name!r} holds {array.dtype}; float32 or float64 can be clipped")
    largest, root = _norm_parts(update)
    if root == 0 or root <= clip_norm / largest:  # not largest * root: that may be denormal, and rounded down
        return dict(update)
    return {name: _scaled(array, largest, clip_norm / root) for name, array in update.items()}


def norm_bound(clip_norm: float, noise_multiplier: float, elements: int) -> float:
    """The largest norm that an honest update can have after clipping and noise, but for bad luck below e^-50.

    Args:
        clip_norm: the clipping bound C; finite, > 0.
        noise_multiplier: sigma, the noise's standard deviation in units of C; finite, >= 0.
        elements: number of elements of the update.

    Returns:
        C + sigma * C * (sqrt(elements) + 10), and a few millionths for rounding. A longer update was not made by the
        rules; a dishonest one may still be as long as this.

    Raises:
        ValueError: an argument outside of its range.

    Source:
        The norm of a standard normal vector of dimension d exceeds sqrt(d) + t with probability at most
        exp(-t^2 / 2): Boucheron, Lugosi, Massart 2013, "Concentration Inequalities", Theorem 5.6 (t = 10 here).
    """
    check_clip_norm(clip_norm)
    check_noise_multiplier(noise_multiplier)
    if elements < 0:
        raise ValueError("a number of elements is not negative")
    return clip_norm * (1.0 + noise_multiplier * (math.sqrt(elements) + _TAIL)) * (1.0 + 2.0 * _RELATIVE)


def check_clip_norm(clip_norm: float) -> None:
    """Whether C is a finite number above zero.

    Raises:
        ValueError: it is not.
    """
    if not (math.isfinite(clip_norm) and clip_norm > 0):
        raise ValueError(f"clip_norm is {clip_norm}; it must be finite and above zero")


def _norm_parts(update: Tensors) -> tuple[float, float]:
    """The largest magnitude m, and the norm divided by it, which is between 1 and sqrt(elements); (0, 0) for zeros."""
    largest = 0.0
    for name, array in update.items():
        if array.dtype.kind != "f":
            raise ValueError(f"tensor {name!r} holds {array.dtype}, not floats")
        if not array.size:
            continue
        for extreme in (float(array.max()), -float(array.min())):
            if not math.isfinite(extreme):  # a NaN anywhere is the maximum, to NumPy
                raise NonFiniteUpdate(name)
            largest = max(largest, extreme)
    if largest == 0.0:
        return 0.0, 0.0
    squares = 0.0
    with np.errstate(under="ignore"):
        for array in update.values():
            for block in _blocks(array):
                part = block / largest
                squares += float((part * part).sum())
    return largest, math.sqrt(squares)


def _blocks(array: NDArray[np.floating[Any]]) -> Iterator[NDArray[np.float64]]:
    flat = array.reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        yield flat[start : start + _BLOCK].astype(np.float64)


def _scaled(array: NDArray[np.floating[Any]], largest: float, factor: float) -> NDArray[np.floating[Any]]:
    """array / largest * factor, in the element type of `array`, rounded towards zero."""
    result = np.empty(array.size, array.dtype)
    start = 0
    with np.errstate(under="ignore", over="ignore"):
        for block in _blocks(array):
            exact = block / largest * factor
            # Where float64 itself is denormal it has no digits left to be rounded towards zero.
            exact[np.abs(exact) < np.finfo(np.float64).tiny] = 0.0
            near = exact.astype(array.dtype)
            above = np.abs(near.astype(np.float64)) > np.abs(exact)
            near[above] = np.nextafter(near[above], near.dtype.type(0))
            result[start : start + block.size] = near
            start += block.size
    return result.reshape(array.shape)
