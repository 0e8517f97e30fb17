"""The keystream: AES-256-CTR to the letter, and never the same twice by accident."""

import copy
import os
import pickle

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from isthmus.privacy.keystream import MAX_TAKEN_BYTES, Keystream, KeystreamForked

KEY = bytes(range(32))


def blocks(first: int, count: int) -> bytes:
    """AES of the counters, one after the other: what counter mode is."""
    cipher = Cipher(algorithms.AES(KEY), modes.ECB()).encryptor()
    return b"".join(cipher.update((first + number).to_bytes(16, "big")) for number in range(count))


def test_the_stream_is_aes_of_a_counter_from_zero() -> None:
    stream = Keystream(KEY)
    assert stream.take(8, np.uint32).tobytes() == blocks(0, 2)
    assert stream.take(3, np.uint64).tobytes() + stream.take(8, np.uint8).tobytes() == blocks(2, 2)
    assert stream.position == 64


def test_what_lies_aside_depends_on_the_place_alone_and_begins_alike() -> None:
    stream = Keystream(KEY)
    first = stream.aside(4, 256)
    stream.take(100, np.uint32)
    assert first == stream.aside(4, 256) == int.from_bytes(blocks((1 << 127) + (4 << 64), 2), "big")
    assert stream.aside(4, 64) == first >> 192
    assert stream.position == 400
    assert len({stream.aside(place, 64) for place in range(0, 400, 4)}) == 100
    assert stream.take(4, np.uint32).tobytes() == blocks(25, 1)


def test_streams_without_a_key_share_nothing() -> None:
    one, other = Keystream(), Keystream()
    assert one.take(1000, np.uint8).tobytes() != other.take(1000, np.uint8).tobytes()


def test_a_key_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        Keystream(bytes(16))


@pytest.mark.parametrize("dtype", [np.int32, np.float64])
def test_only_unsigned_integers_come_out(dtype: type) -> None:
    with pytest.raises(ValueError, match="unsigned"):
        Keystream(KEY).take(1, dtype)


def test_no_more_comes_out_than_the_buffer_holds() -> None:
    stream = Keystream(KEY)
    assert stream.take(MAX_TAKEN_BYTES, np.uint8).size == MAX_TAKEN_BYTES
    with pytest.raises(ValueError, match="at once"):
        stream.take(MAX_TAKEN_BYTES + 1, np.uint8)


def test_a_keystream_cannot_be_doubled() -> None:
    for double in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be copied"):
            double(Keystream(KEY))


def test_a_forked_process_cannot_go_on_with_its_parents_stream() -> None:
    stream = Keystream()
    child = os.fork()
    if not child:
        refused = 0
        for use in (lambda: stream.take(1, np.uint8), lambda: stream.aside(0, 8)):
            try:
                use()
            except KeystreamForked:
                refused += 1
        os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert stream.take(1, np.uint8).size == 1
