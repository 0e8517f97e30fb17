"""The official archive of CIFAR-10, for those who have the file: cifar-10-python.tar.gz, read without unpickling code.

The archive holds six pickles. A pickle can name any function and have it called, so they are not unpickled as they
stand: the only names that they may use are the three with which an array is written, and these lead to stand-ins of
ours, which keep what they are given and compute nothing. Anything else is refused before it is looked up.

Source: Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images".
https://www.cs.toronto.edu/~kriz/cifar.html
"""

import io
import math
import pickle
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from examples.images.labelled import DataMissing, Labelled, Parts

FOLDER: Final = "cifar-10-batches-py"
TRAIN: Final = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST: Final = "test_batch"
CLASSES: Final = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SHAPE: Final = (3, 32, 32)
HOW_TO_GET: Final = "The archive is called cifar-10-python.tar.gz; its authors publish it at the University of Toronto."

_LARGEST_MEMBER: Final = 1 << 26
"""A batch takes 31 MB."""


def cifar_10(archive: Path) -> Parts:
    """50,000 images to train on and 10,000 to test on, as the archive parts them.

    Raises:
        DataMissing: there is no such file, it is not laid out like the official one, or a pickle in it holds anything
            but bytes, whole numbers, lists, dictionaries and arrays of bytes.
    """
    batches = {name: _batch(name, content) for name, content in _members(archive).items()}
    train = [batches[name] for name in TRAIN]
    return Parts(
        train=Labelled(
            images=np.concatenate([batch.images for batch in train]),
            labels=np.concatenate([batch.labels for batch in train]),
        ),
        test=batches[TEST],
    )


def _members(archive: Path) -> Mapping[str, bytes]:
    """Name of a batch -> its bytes. Nothing is written to the disk."""
    wanted = {f"{FOLDER}/{name}": name for name in (*TRAIN, TEST)}
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                name = wanted.get(member.name)
                if name is None or name in found:
                    continue
                file = tar.extractfile(member) if member.isfile() else None
                if file is None or member.size > _LARGEST_MEMBER:
                    raise DataMissing(f"{member.name} in {archive} is no file of the size of a batch.")
                found[name] = file.read(_LARGEST_MEMBER)
    except FileNotFoundError:
        raise DataMissing(f"There is no {archive}. {HOW_TO_GET}") from None
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise DataMissing(f"{archive} cannot be read as a .tar.gz: {error}.") from None
    if missing := sorted(set(wanted.values()) - set(found)):
        raise DataMissing(f"{archive} holds no {', '.join(missing)} under {FOLDER}/. {HOW_TO_GET}")
    return found


def _batch(name: str, content: bytes) -> Labelled:
    try:
        told = _Plain(io.BytesIO(content), encoding="bytes").load()
    except DataMissing as refusal:
        raise DataMissing(f"{name}: {refusal}") from None
    except Exception as error:  # a pickle is a program: one that is no batch fails in any way there is
        raise DataMissing(f"{name} cannot be read as a batch of CIFAR-10 ({type(error).__name__}).") from None
    data, labels = (told.get(b"data"), told.get(b"labels")) if isinstance(told, dict) else (None, None)
    if not isinstance(data, _Array) or not isinstance(labels, list):
        raise DataMissing(f"{name} has no array `data` and list `labels`.")
    if not all(type(label) is int and 0 <= label < len(CLASSES) for label in labels):
        raise DataMissing(f"{name} has a label that is no whole number from 0 to {len(CLASSES) - 1}.")
    pixels = data.values(name)
    if pixels.shape != (len(labels), math.prod(SHAPE)):
        raise DataMissing(f"{name} holds {len(labels)} labels and an array of shape {list(pixels.shape)}.")
    return Labelled(images=pixels.reshape(-1, *SHAPE), labels=np.array(labels, dtype=np.int64))


class _DType:
    """What a pickle tells of the type of an array."""

    def __init__(self, code: Any, *_options: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        """Byte order and fields: for an array of bytes there is nothing to keep."""


class _Array:
    """What a pickle tells of an array: kept, checked in `values`, and never handed to NumPy's own unpickling."""

    def __init__(self, *_options: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        """Version, shape, type, whether columns come first, and the bytes."""
        self.state = state

    def values(self, name: str) -> NDArray[np.uint8]:
        """The array.

        Raises:
            DataMissing: it is not one of bytes, two sides, row by row.
        """
        match self.state:
            case (1, (int(rows), int(columns)), _DType(code=b"u1" | "u1"), False | 0, bytes(content)):
                if rows >= 0 and columns >= 0 and len(content) == rows * columns:
                    return np.frombuffer(content, np.uint8).reshape(rows, columns)
        raise DataMissing(f"{name} holds an array that is not one of bytes, row by row.")


def _array_type(*_: Any) -> Any:
    """Stands for `numpy.ndarray`, which is only ever named as an argument."""
    raise pickle.UnpicklingError("an array is not made like this")


_STAND_INS: Final[Mapping[tuple[str, str], Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _array_type,
    ("numpy", "dtype"): _DType,
}


class _Plain(pickle.Unpickler):
    """Knows no name but those with which an array is written, and no thing behind them but our stand-ins."""

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a name.

        Raises:
            DataMissing: it is any other name.
        """
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise DataMissing("names something that no batch of CIFAR-10 needs. It was not run.") from None
