"""Images with their labels, as every loader gives them, and what the experiments do to them."""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]
"""[images, channels, height, width]"""

_PAD: Final = 2


class DataMissing(Exception):
    """The data is not on this machine, or is not what its name says. The message says how to get it."""


@dataclass(frozen=True)
class Labelled:
    """Images and their labels, in one order."""

    images: Images
    labels: NDArray[np.int64]
    """[images], from 0"""

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != np.uint8:
            raise ValueError("images are bytes in four dimensions: images, channels, height, width")
        if self.labels.shape != (len(self.images),):
            raise ValueError(f"there are {len(self.images)} images and labels of shape {list(self.labels.shape)}")

    def __len__(self) -> int:
        return len(self.images)

    def only(self, rows: NDArray[Any]) -> "Labelled":
        """These images, in this order."""
        return Labelled(images=self.images[rows], labels=self.labels[rows])


@dataclass(frozen=True)
class Parts:
    """What is trained on, and what is only ever measured on. They share no image."""

    train: Labelled
    test: Labelled


def as_cifar_shape(images: Images) -> Images:
    """Grey images [n, 1, 28, 28] as [n, 3, 32, 32]: two dark pixels around, the same in all three channels.

    A model for CIFAR-10 then runs on them unchanged.

    Raises:
        ValueError: they have another shape.
    """
    if images.shape[1:] != (1, 28, 28):
        raise ValueError(f"images of shape {list(images.shape[1:])} are not 1 x 28 x 28")
    padded = np.pad(images, ((0, 0), (0, 0), (_PAD, _PAD), (_PAD, _PAD)))
    return np.repeat(padded, 3, axis=1)


def without_images_of(images: Labelled, other: Labelled) -> Labelled:
    """Those of `images` whose picture `other` does not hold, whatever its label: some collections repeat themselves."""
    seen = {image.tobytes() for image in other.images}
    fresh = [place for place, image in enumerate(images.images) if image.tobytes() not in seen]
    return images.only(np.array(fresh, dtype=np.int64))
