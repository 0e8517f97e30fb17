"""Fashion-MNIST: 60,000 images of clothes to train on and 10,000 to test on, from the Debian package of that name.

Source: Xiao, Rasul, Vollgraf 2017, "Fashion-MNIST", MIT licence. https://arxiv.org/abs/1708.07747
"""

import gzip
import math
import zlib
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from examples.images.labelled import DataMissing, Labelled, Parts

ROOT: Final = Path("/usr/share/datasets/fashion-mnist")
CLASSES: Final = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
HOW_TO_GET: Final = """\
On Debian and Ubuntu: apt install dataset-fashion-mnist
Without root:         apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb DIR
                      and name DIR/usr/share/datasets/fashion-mnist with --from"""

_LARGEST: Final = 1 << 28
_UNSIGNED_BYTES: Final = 8


def fashion_mnist(root: Path = ROOT) -> Parts:
    """The official parts.

    Args:
        root: the directory with the four `.gz` files.

    Raises:
        DataMissing: a file is not there, or is not one of images or labels.
    """
    return Parts(train=_part(root, "train"), test=_part(root, "t10k"))


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array of bytes in a compressed IDX file, as MNIST and its successors are published.

    Raises:
        DataMissing: the file is not there, or is not such a file.
    """
    try:
        with gzip.open(path) as file:
            content = file.read(_LARGEST)
    except FileNotFoundError:
        raise DataMissing(f"There is no {path}.\n{HOW_TO_GET}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataMissing(f"{path} cannot be read: {error}.") from None
    sides = content[3] if len(content) >= 4 and content[:3] == bytes([0, 0, _UNSIGNED_BYTES]) else 0
    begins = 4 + 4 * sides
    shape = tuple(int.from_bytes(content[4 * side : 4 * side + 4], "big") for side in range(1, sides + 1))
    if not sides or len(content) != begins + math.prod(shape):
        raise DataMissing(f"{path} is not an IDX file of bytes.")
    return np.frombuffer(content, np.uint8, offset=begins).reshape(shape)


def _part(root: Path, name: str) -> Labelled:
    images = read_idx(root / f"{name}-images-idx3-ubyte.gz")
    labels = read_idx(root / f"{name}-labels-idx1-ubyte.gz")
    if images.ndim != 3 or labels.shape != (len(images),) or (len(labels) and labels.max() >= len(CLASSES)):
        raise DataMissing(f"{root} does not hold images with a label from 0 to {len(CLASSES) - 1} each.")
    return Labelled(images=images[:, np.newaxis], labels=labels.astype(np.int64))
