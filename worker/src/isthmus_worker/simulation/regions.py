"""Memory that the processes of a simulation share: records, the round's model, the updates. Arrays, never objects."""

import math
import mmap
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from isthmus.codec.dtypes import NUMPY_DTYPE
from isthmus.wire.manifest import Manifest

Arrays = Mapping[str, NDArray[Any]]
_ALIGNED: Final = 64
"""Where an array may begin: at the start of a cache line."""


@dataclass(frozen=True)
class Place:
    """Where an array lies in a region."""

    begin: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.begin + math.prod(self.shape) * np.dtype(self.dtype).itemsize


class Layout:
    """Hands out places in a region, one behind the other.

    Attributes:
        size: bytes that all of them take.
    """

    def __init__(self) -> None:
        self.size = 0

    def add(self, dtype: np.dtype[Any], shape: Iterable[int]) -> Place:
        """Room for one more array."""
        begin = -(-self.size // _ALIGNED) * _ALIGNED
        place = Place(begin, dtype.str, tuple(shape))
        self.size = place.end
        return place

    def add_all(self, manifest: Manifest) -> dict[str, Place]:
        """Room for every tensor of a manifest."""
        return {
            name: self.add(np.dtype(NUMPY_DTYPE[manifest.tensors[name].dtype]), manifest.tensors[name].shape)
            for name in manifest.names()
        }


class Region:
    """Anonymous memory behind a file descriptor: it has no name on any disk, and goes with the last process."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @classmethod
    def make(cls) -> "Region":
        """A new one, empty. Processes that are to see it must be given its descriptor."""
        if hasattr(os, "memfd_create"):
            return cls(os.memfd_create("isthmus-simulation"))
        with tempfile.TemporaryFile() as file:  # where the system has no memory without a name: a file without one
            return cls(os.dup(file.fileno()))

    def make_room(self, size: int) -> None:
        """Make room for at least `size` bytes. It never shrinks: what somebody has mapped stays there."""
        if max(1, size) > os.fstat(self.descriptor).st_size:
            os.ftruncate(self.descriptor, max(1, size))

    def map(self, *, writable: bool) -> mmap.mmap:
        """See it in this process. What is not mapped to be written cannot be, whatever code tries."""
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        return mmap.mmap(self.descriptor, 0, access=access)

    def close(self) -> None:
        """Let go of the descriptor; what is mapped stays mapped."""
        os.close(self.descriptor)


def array_at(memory: mmap.mmap, place: Place) -> NDArray[Any]:
    """The array at a place, sharing the region's memory."""
    count = math.prod(place.shape)
    return np.frombuffer(memory, np.dtype(place.dtype), count, place.begin).reshape(place.shape)


def arrays_at(memory: mmap.mmap, places: Mapping[str, Place]) -> dict[str, NDArray[Any]]:
    """All arrays of a group, by name."""
    return {name: array_at(memory, place) for name, place in places.items()}
