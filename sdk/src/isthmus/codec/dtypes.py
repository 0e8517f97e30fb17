"""Element types as NumPy's: little-endian, as on the wire."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from isthmus.codec.errors import NotSafetensors, shown
from isthmus.wire.manifest import DType

NUMPY_DTYPE: Final[dict[DType, np.dtype[Any]]] = {
    DType.F64: np.dtype("<f8"),
    DType.F32: np.dtype("<f4"),
    DType.F16: np.dtype("<f2"),
    DType.I64: np.dtype("<i8"),
    DType.I32: np.dtype("<i4"),
    DType.I16: np.dtype("<i2"),
    DType.I8: np.dtype("i1"),
    DType.U64: np.dtype("<u8"),
    DType.U32: np.dtype("<u4"),
    DType.U16: np.dtype("<u2"),
    DType.U8: np.dtype("u1"),
    DType.BOOL: np.dtype("?"),
}

_BY_NUMPY: Final = {dtype.str: name for name, dtype in NUMPY_DTYPE.items()}


def dtype_of(array: NDArray[Any]) -> DType:
    """The safetensors name of an array's element type.

    Raises:
        TypeError: there is none: complex numbers, objects, text, dates, long doubles.
    """
    found = _BY_NUMPY.get(array.dtype.newbyteorder("<").str)
    if found is None:
        raise TypeError(f"arrays of {array.dtype} cannot be written as safetensors")
    return found


def check_booleans(name: str, raw: NDArray[np.uint8]) -> None:
    """Whether the bytes of a BOOL tensor are 0 and 1; NumPy's behaviour is undefined for others.

    Raises:
        NotSafetensors: some byte is neither.
    """
    if raw.size and raw.max() > 1:
        raise NotSafetensors(f"Tensor {shown(name)} is of BOOL, but holds a byte other than 0 and 1.")
