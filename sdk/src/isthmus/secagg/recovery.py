"""Rebuilds secrets from shares of which some may be wrong: each result is checked against what was promised."""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, islice
from typing import Final

from isthmus.secagg.decoding import decode
from isthmus.secagg.shamir import SECRET_BYTES, secret_from, values_at
from isthmus.secagg.violations import SharesWrong

Shares = dict[int, int]
"""Of one secret: the share by the index of its holder."""
TRIED_SUBSETS: Final = 400
"""So many sets of holders are tried in all when the first one did not do: members that lie cost bounded work."""


def recover(
    shares: Mapping[int, Shares], threshold: int, fits: Callable[[int, bytes], bool]
) -> tuple[dict[int, bytes], tuple[int, ...]]:
    """The secrets, and who was found to have told wrong shares.

    The first `threshold` holders do, as long as nobody lies. Else all shares of that secret are decoded together,
    which finds it if at most half of those beyond the threshold are wrong. Else holders are left out in turn.

    Args:
        shares: by dealer, whose secret it is; at least `threshold` of each.
        threshold: so many rebuild a secret.
        fits: whether these 32 bytes are what that dealer has promised.

    Raises:
        SharesWrong: a secret could not be found.
    """
    search = _Search(threshold, fits)
    secrets: dict[int, bytes] = {}
    for dealer, held in shares.items():
        found = search.secret_of(dealer, held)
        if found is not None:
            secrets[dealer] = found
    lost = shares.keys() - secrets.keys()
    if lost and not secrets:
        raise SharesWrong({holder for held in shares.values() for holder in held})
    if lost:
        raise SharesWrong(search.liars | lost)
    return secrets, tuple(sorted(search.liars))


class _Search:
    """What was learned from one secret helps with the next: holders that lied are asked last."""

    def __init__(self, threshold: int, fits: Callable[[int, bytes], bool]) -> None:
        self._threshold = threshold
        self._fits = fits
        self._left = TRIED_SUBSETS
        self.liars: set[int] = set()

    def secret_of(self, dealer: int, held: Shares) -> bytes | None:
        holders = sorted(held, key=lambda holder: (holder in self.liars, holder))
        return (
            self._checked(dealer, self._value(held, holders[: self._threshold]))
            or self._decoded(dealer, held)
            or self._by_leaving_out(dealer, held, holders)
        )

    def _decoded(self, dealer: int, held: Shares) -> bytes | None:
        if len(held) < self._threshold + 2:
            return None
        polynomial = decode({holder + 1: share for holder, share in held.items()}, self._threshold)
        if not polynomial:
            return None
        found = self._checked(dealer, polynomial[0])
        if found is not None:
            self.liars |= {holder for holder, share in held.items() if values_at(polynomial, [holder + 1]) != [share]}
        return found

    def _by_leaving_out(self, dealer: int, held: Shares, holders: Sequence[int]) -> bytes | None:
        spare = len(holders) - self._threshold
        subsets = combinations(reversed(holders), spare) if spare else ()
        for left_out in islice(subsets, self._left):
            self._left -= 1
            inside = [holder for holder in holders if holder not in left_out]
            found = self._checked(dealer, self._value(held, inside))
            if found is not None:
                self.liars |= {holder for holder in left_out if self._value(held, inside, at=holder) != held[holder]}
                return found
        return None

    def _value(self, held: Shares, inside: Sequence[int], at: int = -1) -> int:
        """Of the polynomial through these holders' shares: the share of another holder; by default the secret."""
        return secret_from([holder - at for holder in inside], [held[holder] for holder in inside])

    def _checked(self, dealer: int, number: int) -> bytes | None:
        """The secret that the number stands for, if it is the dealer's."""
        if number >> 8 * SECRET_BYTES:
            return None
        secret = number.to_bytes(SECRET_BYTES, "big")
        return secret if self._fits(dealer, secret) else None
