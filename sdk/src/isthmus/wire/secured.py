"""Secure aggregation: how a job asks for it, its steps, and what a worker and an admin are told of them.

The messages of the steps are bytes, not JSON: `isthmus.secagg` has their formats.
"""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Final
from uuid import UUID

from pydantic import BeforeValidator, Field

from isthmus.wire.base import Digest, Finite, Request, Response, digest_of
from isthmus.wire.data import FeatureStatistics
from isthmus.wire.manifest import Manifest
from isthmus.wire.privacy import PrivacyPlan, PrivacyUnit

SMALLEST_COHORT: Final = 3
"""The sum of two updates tells each of the two the other's."""
LARGEST_COHORT: Final = 512
"""Everybody shares secrets with everybody, so messages grow with the cohort; and so many updates never overflow."""
MASKED: Final = "masked"
"""The one tensor of a masked update: U32, all averaged elements in canonical order."""


class SecureAggregationSpec(Request):
    """Secure aggregation of a job's training rounds: the service learns the sum of the updates and nothing else."""

    clip_norm: Annotated[Finite, Field(ge=1e-9, le=1e9)] | None = None
    """L2 bound on the whole update, which becomes whole numbers. None: `privacy.clip_norm`. Needed with `unit: record`,
    where that one bounds gradients; not for `unit: organization`, where it is the bound."""
    max_colluding: int = Field(default=0, ge=0, le=LARGEST_COHORT)
    """So many organizations of a round may work together with the service. Shares of noise (`where: distributed`) are
    sized so that the claim holds against them too. Below a third of `min_updates`."""
    step_s: Annotated[Finite, Field(ge=1, le=86400)] = 60.0
    """A step waits so long for those who have not sent their message, and goes on without them."""


def _yes_or_no(value: Any) -> Any:
    """`true` is a section with its defaults, `false` none."""
    if value is True:
        return {}
    return None if value is False else value


SecureAggregation = Annotated[SecureAggregationSpec | None, BeforeValidator(_yes_or_no)]


class Step(StrEnum):
    """The steps of a secured training round, in their order. `keys` and `shares` go on while workers train."""

    KEYS = "keys"  # fresh public keys, signed
    SHARES = "shares"  # shares of the secrets, encrypted for each of the others
    UPDATE = "update"  # the masked update, by the ordinary upload; its answer is who is in the sum
    SURVIVORS = "survivors"  # each signs the one set of those who are in the sum
    UNMASK = "unmask"  # shares of what has to be taken off the sum


class SecuredOffer(Response):
    """What a worker needs to know of a secured round before it sends its keys. The roster comes with the keys."""

    round_id: UUID
    roster_digest: Digest
    """SHA-256 of the roster's bytes."""
    members: int = Field(ge=SMALLEST_COHORT, le=LARGEST_COHORT)
    """In the roster; the threshold follows from it."""
    index: int = Field(ge=0, lt=LARGEST_COHORT)
    """This participation's place in the roster."""


def terms_digest(model_manifest: Manifest, statistics: FeatureStatistics | None, plan: PrivacyPlan | None) -> str:
    """The digest of what all members of a cohort must have been told alike, beside the job, its model and the roster.

    It goes into the context of an attempt (`isthmus.secagg.context`), so that members who were told different things
    have no keys in common. Else a service could pick one of them out of the sum. If that one is told to average other
    tensors than the rest, its numbers stand in the sum where the others, whose tensors there never move, have zeros.
    Statistics that turn the inputs of all others into zeros do much the same. And who is told of more noise than was
    agreed has a coarser lattice: the steps of the sum are no longer the same, and less noise than promised hides it.

    Args:
        model_manifest: of the job's model: which tensors there are, and which of them are averaged.
        statistics: of the job's features; None: it has none.
        plan: a participation's; None for a job without a privacy unit. Only what the lattice follows from counts:
            place, multiplier and bound of the noise of `unit: organization`, the same at all datasets of a job. Plans
            of `unit: record` differ with the records of their datasets, and the lattice does not follow from them.

    Returns:
        SHA-256 over the canonical JSON of the three, in hex.
    """
    noise = None
    if plan is not None and plan.unit is PrivacyUnit.ORGANIZATION:
        noise = {"where": plan.where, "noise_multiplier": plan.noise_multiplier, "clip_norm": plan.clip_norm}
    terms = {
        "model_manifest": model_manifest.model_dump(mode="json"),
        "statistics": None if statistics is None else statistics.model_dump(mode="json"),
        "noise": noise,
    }
    return digest_of(terms)


class SecuredRound(Response):
    """Where a secured round stands, as people see it."""

    step: Step
    attempt: int
    members: int
    """That were asked in this attempt."""
    threshold: int
    """So many have to stay until the end, or the sum stays hidden and the attempt is given up."""
    needed: int
    """The threshold, or the job's `min_updates` where that is more."""
    arrived: int
    """Messages of the present step that are in."""
    missing: list[str]
    """organization/dataset of those whose message the present step waits for."""
    dropped: list[str]
    """organization/dataset of those who left in an earlier step of this attempt."""
    step_closes_at: datetime | None
    progress: float | None
    """Share of the sum that is unmasked; None: not begun."""
