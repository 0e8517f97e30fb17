"""The random bits that noise is made of: an AES-256-CTR keystream under a key of the operating system's."""

import os
from typing import Final, NoReturn

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import DTypeLike, NDArray

KEY_BYTES: Final = 32
MAX_TAKEN_BYTES: Final = 1 << 18
"""What one call may take: the buffers stay in a core's cache."""

_BLOCK_BYTES: Final = 16
_ASIDE: Final = 1 << 127  # counters of `aside`; the stream itself would need 2^131 bytes to come there


class KeystreamForked(RuntimeError):
    """A keystream was used in another process than the one that made it, where it would repeat."""

    def __init__(self) -> None:
        super().__init__("A keystream belongs to the process that made it; make a new one after a fork.")


class Keystream:
    """Bits that nobody can tell from fair coins who does not know the key. One key serves one release.

    The same key gives the same bits for ever, on every machine. Not for several threads at once.
    """

    def __init__(self, key: bytes | None = None) -> None:
        """Begin a stream.

        Args:
            key: 32 bytes; None draws them from the operating system, which is right for whatever is not to be drawn
                again. A given key is a secret: who has it can take the noise away.

        Raises:
            ValueError: the key has another length.
        """
        chosen = os.urandom(KEY_BYTES) if key is None else key
        if len(chosen) != KEY_BYTES:
            raise ValueError(f"a keystream's key has {KEY_BYTES} bytes, not {len(chosen)}")
        self._algorithm = algorithms.AES(chosen)
        self._stream = self._from(0)
        self._process = os.getpid()
        self._zeros = memoryview(bytes(MAX_TAKEN_BYTES))
        self._taken = bytearray(MAX_TAKEN_BYTES + _BLOCK_BYTES)
        self._position = 0

    @property
    def position(self) -> int:
        """How many bytes have been taken."""
        return self._position

    def take(self, count: int, dtype: DTypeLike) -> NDArray[np.unsignedinteger]:
        """The next `count` unsigned integers, little-endian. They are overwritten by the next call.

        Raises:
            ValueError: they are more than `MAX_TAKEN_BYTES` bytes, or `dtype` is no unsigned integer.
            KeystreamForked: this process is a fork of the one that made the stream.
        """
        self.require_own_process()
        kind = np.dtype(dtype).newbyteorder("<")
        length = count * kind.itemsize
        if kind.kind != "u" or not 0 <= length <= MAX_TAKEN_BYTES:
            raise ValueError(f"a keystream gives up to {MAX_TAKEN_BYTES} bytes of unsigned integers at once")
        self._stream.update_into(self._zeros[:length], self._taken)
        self._position += length
        return np.frombuffer(self._taken, kind, count)

    def aside(self, position: int, bits: int) -> int:
        """So many more random bits that belong to the place `position`, without moving on.

        They refine what was taken there. They depend on nothing but the key and the place, so that it does not matter
        whether they were needed: what follows in the stream stays the same.

        Args:
            position: a byte's place in the stream; below 2^61.
            bits: a multiple of 8, up to 2^32.

        Raises:
            KeystreamForked: this process is a fork of the one that made the stream.
        """
        self.require_own_process()
        found = self._from(_ASIDE | position << 64).update(bytes(bits // 8))
        return int.from_bytes(found, "big")

    def require_own_process(self) -> None:
        """Goes on only in the process that made the stream; for those who keep some of what they took.

        Raises:
            KeystreamForked: this one is a fork of it.
        """
        if os.getpid() != self._process:
            raise KeystreamForked

    def __reduce__(self) -> NoReturn:
        """Refuses to be copied or pickled: two of the same would give two releases the same noise."""
        raise TypeError("a keystream cannot be copied or pickled")

    def _from(self, counter: int) -> CipherContext:
        return Cipher(self._algorithm, modes.CTR(counter.to_bytes(_BLOCK_BYTES, "big"))).encryptor()
