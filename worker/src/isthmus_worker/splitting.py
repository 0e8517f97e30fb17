"""Which rows are held out of training and kept for measuring. The same ones for all rounds, jobs and statistics.

`held_out` keeps the shares of the labels exact. Its choice hangs on all rows, so that one row more may move another one
into training: under privacy of records, `held_out_apart` decides for each row by itself.
"""

import hmac
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Final

import numpy as np
from numpy.typing import NDArray

_HASHES: Final = 1 << 256


def held_out(labels: NDArray[np.int64], fingerprints: Sequence[bytes], share: float, key: bytes) -> NDArray[np.bool_]:
    """Mark the rows that are never trained on.

    Of each label's rows, the first floor(share * n) are held out in the order of HMAC-SHA-256(key, fingerprint).

    Args:
        labels: one whole number a row; for regression, all alike.
        fingerprints: one a row, over the whole record (`isthmus_worker.data.fingerprint`).
        share: the part to hold out, 0 <= share < 1, taken as the decimal number that is written.
        key: a secret of this worker, so that nobody who knows a record can tell whether it was trained on.

    Returns:
        One mark a row, True where it is held out.

    Guarantees:
        a label keeps at least one row for training;
        rows held out with a smaller share are held out with a larger one, while the data stays the same;
        reordering the records does not change which *records* are held out.

    Edge cases:
        equal records have equal hashes; those that come first in the table go first;
        a label with fewer than 1 / share rows has none held out: training goes before measuring.
    """
    marks = np.zeros(len(labels), dtype=np.bool_)
    if share == 0:
        return marks
    order = [hmac.digest(key, one, "sha256") for one in fingerprints]
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label).tolist()
        rows.sort(key=lambda row: (order[row], row))
        marks[rows[: math.floor(Fraction(str(share)) * len(rows))]] = True
    return marks


def held_out_apart(fingerprints: Sequence[bytes], share: float, key: bytes) -> NDArray[np.bool_]:
    """Mark the rows that are never trained on, each by itself: those whose keyed hash is below the share.

    Args:
        fingerprints, share, key: as for `held_out`.

    Returns:
        One mark a row, True where it is held out.

    Guarantees:
        whether a row is held out depends on its own record and the key: one row more or less changes nothing about the
        others, so whatever is summed over the rows of one part changes by that row's own share at most;
        rows held out with a smaller share are held out with a larger one.

    Edge cases:
        equal records are held out together; all rows of a small dataset, or none, may be.
    """
    threshold = math.floor(Fraction(str(share)) * _HASHES)
    hashes = (int.from_bytes(hmac.digest(key, one, "sha256")) for one in fingerprints)
    return np.fromiter((found < threshold for found in hashes), np.bool_, len(fingerprints))
