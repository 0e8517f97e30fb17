"""Masked vectors look like nothing, masks have whole keys, and any part of one can be made by itself."""

import sys
import threading
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from isthmus.secagg.derivation import Mask
from isthmus.secagg.masks import add_masks
from tests.sdk.secagg.driver import Attempt

EVERYBODY = (0, 1, 2, 3)
ELEMENTS = 200_000


def uniformity(words: NDArray[np.uint32]) -> float:
    """The smallest p-value of chi-square tests: the four bytes, the top bits of neighbours together, and the range."""
    raw = words.view(np.uint8).reshape(-1, 4)
    top = words >> np.uint32(28)
    tables = [np.bincount(raw[:, place], minlength=256) for place in range(4)]
    tables.append(np.bincount(top[:-1:2] * 16 + top[1::2], minlength=256))
    tables.append(np.bincount(words >> np.uint32(22), minlength=1024))
    return min(float(stats.chisquare(table).pvalue) for table in tables)


@pytest.fixture(scope="module")
def of_zeros() -> tuple[Attempt, NDArray[np.uint32]]:
    """Four members whose vectors are all zeros, and what they upload."""
    attempt = Attempt(4, elements=ELEMENTS, seed="zeros")
    attempt.vectors[:] = 0
    return attempt, attempt.masked(EVERYBODY, EVERYBODY)


def test_each_upload_of_zeros_is_uniform_noise(of_zeros: tuple[Attempt, NDArray[np.uint32]]) -> None:
    _, rows = of_zeros
    assert min(uniformity(row) for row in rows) > 1e-4
    assert uniformity(rows[0] - rows[1]) > 1e-4
    assert uniformity(rows[0] + rows[1] + rows[2]) > 1e-4
    assert uniformity(np.arange(ELEMENTS, dtype=np.uint32)) < 1e-12  # the test can fail


def test_the_sum_stays_noise_while_one_own_mask_is_left_on(of_zeros: tuple[Attempt, NDArray[np.uint32]]) -> None:
    attempt, rows = of_zeros
    masks = attempt.rebuild(EVERYBODY, EVERYBODY, attempt.reveals(EVERYBODY, EVERYBODY, EVERYBODY, EVERYBODY)).masks
    assert not attempt.unmasked(rows, EVERYBODY, masks).any()
    for left_on in range(4):
        some = [mask for place, mask in enumerate(masks) if place != left_on]
        assert uniformity(attempt.unmasked(rows, EVERYBODY, some)) > 1e-4


def test_the_sum_stays_noise_without_the_masks_with_one_that_left(of_zeros: tuple[Attempt, NDArray[np.uint32]]) -> None:
    attempt, rows = of_zeros
    stayed = (0, 1, 3)
    masks = attempt.rebuild(EVERYBODY, stayed, attempt.reveals(EVERYBODY, EVERYBODY, stayed, stayed)).masks
    assert len(masks) == 6
    assert not attempt.unmasked(rows, stayed, masks).any()
    for left_on in range(6):
        some = [mask for place, mask in enumerate(masks) if place != left_on]
        assert uniformity(attempt.unmasked(rows, stayed, some)) > 1e-4


def test_what_one_upload_hides_nobody_finds_with_the_reveals_of_the_round(
    of_zeros: tuple[Attempt, NDArray[np.uint32]],
) -> None:
    """The service takes everything off a single upload that it can: the masks among the survivors remain."""
    attempt, rows = of_zeros
    stayed = (0, 1, 3)
    masks = attempt.rebuild(EVERYBODY, stayed, attempt.reveals(EVERYBODY, EVERYBODY, stayed, stayed)).masks
    mine = {mask.key for mask in attempt.masks(EVERYBODY, EVERYBODY, 0)}
    single = rows[0].copy()
    add_masks(single, 0, [mask for mask in masks if mask.key in mine])
    assert uniformity(single) > 1e-4


def test_keys_that_are_equal_when_folded_to_32_bits_give_different_masks() -> None:
    key = bytes(range(32))
    other = bytearray(key)
    other[0] ^= 0x5A
    other[4] ^= 0x5A

    def folded(key: bytes) -> int:
        return int(np.bitwise_xor.reduce(np.frombuffer(key, ">u4")))

    assert folded(key) == folded(bytes(other))
    words = np.zeros((2, 4096), np.uint32)
    add_masks(words[0], 0, [Mask(key, 1)])
    add_masks(words[1], 0, [Mask(bytes(other), 1)])
    assert (words[0] == words[1]).sum() < 3
    assert uniformity(words[0] - words[1]) > 1e-4


def test_every_bit_of_a_key_changes_the_whole_mask() -> None:
    plain = np.zeros(64, np.uint32)
    add_masks(plain, 0, [Mask(bytes(32), 1)])
    seen = {plain.tobytes()}
    for bit in range(256):
        words = np.zeros(64, np.uint32)
        add_masks(words, 0, [Mask((1 << bit).to_bytes(32, "big"), 1)])
        assert not (words == plain).any()
        seen.add(words.tobytes())
    assert len(seen) == 257


@pytest.mark.parametrize("cuts", [(1, 2, 3, 5), (4, 8), (32_767, 32_768, 32_769, 65_541), (70_001,)])
def test_blocks_of_any_size_from_any_place_give_the_same_as_the_whole(cuts: tuple[int, ...]) -> None:
    masks = [Mask(bytes([which]) * 32, 1 if which % 2 else -1) for which in range(5)]
    whole = np.random.default_rng(1).integers(0, 1 << 32, 70_003, np.uint32)
    parts = whole.copy()
    add_masks(whole, 0, masks)
    edges = [0, *cuts, parts.size]
    for begin, end in reversed(list(pairwise(edges))):
        add_masks(parts[begin:end], begin, masks)
    assert np.array_equal(whole, parts)


def test_threads_may_work_on_different_blocks_at_once() -> None:
    masks = [Mask(bytes([which]) * 32, 1) for which in range(8)]
    alone, together = np.zeros(400_000, np.uint32), np.zeros(400_000, np.uint32)
    add_masks(alone, 0, masks)
    parts = [
        threading.Thread(target=add_masks, args=(together[begin : begin + 100_000], begin, masks))
        for begin in range(0, together.size, 100_000)
    ]
    for part in parts:
        part.start()
    for part in parts:
        part.join()
    assert np.array_equal(alone, together)


def test_a_mask_added_and_taken_off_leaves_what_was_there() -> None:
    before = np.random.default_rng(2).integers(0, 1 << 32, 1001, np.uint32)
    words = before.copy()
    add_masks(words, 7, [Mask(bytes(32), 1)])
    assert not np.array_equal(words, before)
    add_masks(words, 7, [Mask(bytes(32), -1)])
    assert np.array_equal(words, before)
    add_masks(words[:0], 0, [Mask(bytes(32), 1)])
    add_masks(words, 3, [])
    assert np.array_equal(words, before)


@pytest.mark.parametrize(
    "block",
    [
        np.zeros(4, np.int32),
        np.zeros(4, np.uint64),
        np.zeros((2, 2), np.uint32),
        np.zeros(8, np.uint32)[::2],
        np.zeros(4, np.dtype(np.uint32).newbyteorder(">" if sys.byteorder == "little" else "<")),
        np.frombuffer(bytes(16), np.uint32),
    ],
)
def test_other_arrays_are_refused(block: NDArray[np.uint32]) -> None:
    with pytest.raises(ValueError, match="contiguous, writeable array of uint32"):
        add_masks(block, 0, [Mask(bytes(32), 1)])


def test_impossible_masks_and_places_are_refused() -> None:
    with pytest.raises(ValueError, match="coordinate -1"):
        add_masks(np.zeros(4, np.uint32), -1, [])
    for key, sign in ((bytes(31), 1), (bytes(32), 0), (bytes(32), 2)):
        with pytest.raises(ValueError, match="a mask has a key of 32 bytes"):
            Mask(key, sign)  # type: ignore[arg-type]


def test_secrets_do_not_show_when_printed() -> None:
    attempt = Attempt(4)
    known = attempt.shared(EVERYBODY, EVERYBODY)[0]
    shown = repr((attempt.secrets[0], known, attempt.masks(EVERYBODY, EVERYBODY, 0), attempt.keyed(EVERYBODY)[0].peers))
    rebuilt = attempt.rebuild(EVERYBODY, EVERYBODY, attempt.reveals(EVERYBODY, EVERYBODY, EVERYBODY, EVERYBODY))
    shown += repr(rebuilt)
    for secret in (
        attempt.secrets[0].seed,
        attempt.secrets[0].mask,
        known.held[1][0],
        attempt.masks(EVERYBODY, EVERYBODY, 0)[0].key,
        rebuilt.masks[0].key,
    ):
        assert repr(secret)[2:-1] not in shown
        assert secret.hex() not in shown
