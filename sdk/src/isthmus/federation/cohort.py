"""Which participations a round asks, and in which order they count. No NumPy here.

Both are functions of what the record holds (names and a seed), so that anyone can draw the same cohort again.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, Literal, NamedTuple


class TooFewParticipations(ValueError):
    """Fewer participations may be asked than a round needs."""


class ParticipationKey(NamedTuple):
    """What a participation is ordered and drawn by: names, which stay the same wherever the record is replayed."""

    organization: str
    dataset: str


class CohortSize(NamedTuple):
    """How many participations are asked, and how many updates close the round."""

    asked: int
    target_updates: int


@dataclass(frozen=True, slots=True)
class Cohort:
    """The participations that a round asks.

    Attributes:
        chosen: in canonical order: the order in which their updates are summed.
        target_updates: with so many updates the round closes before its deadline.
    """

    chosen: tuple[ParticipationKey, ...]
    target_updates: int


_COHORT_DOMAIN: Final = b"isthmus cohort v1"
_SEED_DOMAIN: Final = b"isthmus round seed v1"


def canonical_order(participations: Iterable[tuple[str, str]]) -> list[ParticipationKey]:
    """Sorted by organization name, then dataset name; both by code points."""
    return sorted(ParticipationKey(*key) for key in participations)


def cohort_size(
    available: int, *, fraction: float, over_selection: int, target: int | Literal["all"], min_updates: int
) -> CohortSize:
    """How many of `available` participations a round asks, and how many updates close it.

    Args:
        available: participations that may be asked now.
        fraction: the share of them that is wanted, above 0, at most 1. Taken as the decimal number it is written as
            (0.1 of 30 is 3) and rounded up.
        over_selection: how many more are asked, so that the round need not wait for the slowest; at least 0.
        target: how many updates close the round; "all": as many as were wanted, without the over-selected.
        min_updates: the round is worth nothing with fewer; at least 1. It lifts `fraction` and `target`.

    Raises:
        TooFewParticipations: fewer than `min_updates` are available.
        ValueError: an argument outside of its range.

    Guarantees:
        min_updates <= target_updates <= asked <= available.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}; it must be above 0 and at most 1")
    if over_selection < 0 or min_updates < 1 or (target != "all" and target < 1):
        raise ValueError("over_selection is at least 0, min_updates and target at least 1")
    if available < min_updates:
        raise TooFewParticipations(f"{available} participations may be asked; the round needs {min_updates}.")
    wanted = max(math.ceil(Fraction(repr(float(fraction))) * available), min_updates)
    asked = min(wanted + over_selection, available)
    updates = wanted if target == "all" else max(target, min_updates)
    return CohortSize(asked, min(updates, asked))


def draw_cohort(
    participations: Sequence[tuple[str, str]],
    *,
    seed: bytes,
    fraction: float = 1.0,
    over_selection: int = 0,
    target: int | Literal["all"] = "all",
    min_updates: int = 1,
) -> Cohort:
    """Draw a round's cohort: those whose hash under the seed is smallest.

    Args:
        participations: (organization name, dataset name) of all that may be asked, in any order.
        seed: recorded with the round; at least 16 bytes, fresh for every round.
        fraction, over_selection, target, min_updates: see `cohort_size`.

    Returns:
        The chosen ones in canonical order, and the number of updates that closes the round.

    Raises:
        TooFewParticipations: fewer than `min_updates` may be asked.
        ValueError: a participation is listed twice, the seed is too short, or see `cohort_size`.

    Guarantees:
        The same set and seed give the same cohort, in whatever order the set is listed. Over random seeds, every set
        of that size is equally likely, as far as SHA-256 is random.
    """
    if len(seed) < 16:
        raise ValueError("the seed of a cohort has at least 16 bytes")
    keys = canonical_order(participations)
    if len(set(keys)) != len(keys):
        raise ValueError("a participation is listed twice")
    size = cohort_size(
        len(keys), fraction=fraction, over_selection=over_selection, target=target, min_updates=min_updates
    )
    ranked = sorted(keys, key=lambda key: _hash(_COHORT_DOMAIN, seed, key.organization.encode(), key.dataset.encode()))
    return Cohort(tuple(canonical_order(ranked[: size.asked])), size.target_updates)


def round_seed(job_seed: str, number: int, organization: str, dataset: str) -> str:
    """The seed of one participation's local training in one round.

    Args:
        job_seed: the job's seed: 64 hexadecimal digits.
        number: the round's, from 0.
        organization: name of the data holder.
        dataset: name of the dataset.

    Returns:
        64 hexadecimal digits: SHA-256 over a domain and the four values, each behind its length in 8 bytes
        (big-endian), so that no two different quadruples are hashed as the same bytes. The round's number is written
        as 8 bytes, big-endian.

    Raises:
        ValueError: `job_seed` is not 64 hexadecimal digits, or `number` is negative.
    """
    seed = bytes.fromhex(job_seed)
    if len(job_seed) != 64 or len(seed) != 32:
        raise ValueError("the seed of a job has 64 hexadecimal digits")
    if number < 0:
        raise ValueError("the number of a round is not negative")
    return _hash(_SEED_DOMAIN, seed, number.to_bytes(8, "big"), organization.encode(), dataset.encode()).hex()


def _hash(*parts: bytes) -> bytes:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "big"))
        whole.update(part)
    return whole.digest()
