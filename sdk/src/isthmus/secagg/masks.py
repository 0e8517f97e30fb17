"""Masks as words: an AES-256-CTR keystream under the mask's key, added to a vector modulo 2^32.

Coordinate q is word q of the stream, little-endian: any part of a mask can be made by itself, so that a vector is
masked and a sum is unmasked block by block, in as many threads as there are cores.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

from isthmus.secagg.derivation import Mask

_CIPHER_BLOCK: Final = 16
_WORDS: Final = _CIPHER_BLOCK // 4  # in a block of the cipher
_CHUNK: Final = 1 << 15  # words that are worked on while they are in a core's cache
_ZEROS: Final = bytes(4 * _CHUNK)


def add_masks(block: NDArray[np.uint32], start: int, masks: Sequence[Mask]) -> None:
    """Add the masks to a part of a vector, in place, modulo 2^32; those with the sign -1 are taken off.

    Several threads may work on different blocks at once: making and adding words needs no lock.

    Args:
        block: uint32, one axis, contiguous; overwritten.
        start: the coordinate of the block's first element in the whole vector, from 0.
        masks: any number.

    Raises:
        ValueError: the block is of another kind, or `start` is negative.
    """
    if block.dtype != np.uint32 or block.ndim != 1 or not block.flags.c_contiguous or not block.flags.writeable:
        raise ValueError("masks are added to a contiguous, writeable array of uint32 with one axis")
    if start < 0:
        raise ValueError(f"there is no coordinate {start}")
    streams = [(_stream(mask.key, start), np.add if mask.sign > 0 else np.subtract) for mask in masks]
    made = bytearray(4 * _CHUNK + _CIPHER_BLOCK)
    words = np.frombuffer(made, "<u4", _CHUNK)
    zeros = memoryview(_ZEROS)
    for begin in range(0, block.size, _CHUNK):
        chunk = block[begin : begin + _CHUNK]
        wanted, found = zeros[: 4 * chunk.size], words[: chunk.size]
        for stream, apply in streams:
            stream.update_into(wanted, made)
            apply(chunk, found, out=chunk)


def _stream(key: bytes, start: int) -> CipherContext:
    """The mask's words from coordinate `start` on."""
    counter, ahead = divmod(start, _WORDS)
    stream = Cipher(algorithms.AES(key), modes.CTR(counter.to_bytes(_CIPHER_BLOCK, "big"))).encryptor()
    stream.update(bytes(4 * ahead))
    return stream
