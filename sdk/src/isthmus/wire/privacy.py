"""What a job promises about the records behind it, and what that becomes at one dataset."""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Annotated, Any, Final
from uuid import UUID

from pydantic import Field, model_validator

from isthmus.wire.base import Finite, Request, Response

LARGEST_EPSILON: Final = 100.0
SMALLEST_EPSILON: Final = 0.01
"""Below, no order can promise so little at the usual deltas: nothing would ever fit into such a budget."""
LARGEST_DELTA: Final = 0.01
NoiseMultiplier = Annotated[Finite, Field(ge=0.01, le=10_000)]
"""Standard deviation of the noise in units of the sensitivity."""
Epsilon = Annotated[Finite, Field(ge=SMALLEST_EPSILON, le=LARGEST_EPSILON)]
Delta = Annotated[Finite, Field(gt=0, le=LARGEST_DELTA)]


class PrivacyUnit(StrEnum):
    """Whose presence nobody can tell from what is released."""

    NONE = "none"  # no claim; must be written out
    RECORD = "record"  # one record more or less
    ORGANIZATION = "organization"  # everything of one organization


class NoisePlace(StrEnum):
    """Who adds the noise of `unit: organization`."""

    CENTRAL = "central"  # the service, once a round, to the sum; it is trusted with the single updates
    LOCAL = "local"  # each worker, to its own update
    DISTRIBUTED = "distributed"  # a share at each worker, under secure aggregation


class PrivacyMode(StrEnum):
    """Unit and place in one word, as policies list them."""

    NONE = "none"
    RECORD = "record"
    CENTRAL = "organization-central"
    LOCAL = "organization-local"
    DISTRIBUTED = "organization-distributed"


DEFAULT_DELTA: Final[Mapping[PrivacyUnit, float]] = MappingProxyType(
    {PrivacyUnit.RECORD: 1e-5, PrivacyUnit.ORGANIZATION: 1e-6}
)


class PrivacySpec(Request):
    """The privacy section of a job. `none` must be written out; everything else is a claim that is accounted for.

    The strength is given as a target (`epsilon`, with the job's rounds: the noise is computed) or as
    `noise_multiplier` (epsilon is computed).
    """

    unit: PrivacyUnit
    where: NoisePlace | None = None
    """Of `unit: organization` only, and needed there."""
    epsilon: Epsilon | None = None
    """For the whole job, at every dataset, over everything that it releases."""
    delta: Delta | None = None
    """None: 1e-5 for records, 1e-6 for organizations."""
    noise_multiplier: NoiseMultiplier | None = None
    """Noise of training in units of the sensitivity: of every step for records, of every round for organizations."""
    clip_norm: Annotated[Finite, Field(ge=1e-9, le=1e9)] | None = None
    """L2 bound: on each record's gradient for `unit: record`, else on the whole update. None: not clipped."""
    statistics_noise_multiplier: NoiseMultiplier | None = None
    """Noise of `standardize: federated`, for `unit: record`. None: a tenth of the job's target goes to it."""
    max_orgs_per_person: int = Field(default=1, ge=1, le=1000)
    """In how many organizations one person's records may lie: the report multiplies by it."""

    @model_validator(mode="before")
    @classmethod
    def _none_in_a_word(cls, value: Any) -> Any:
        if value == "none":
            return {"unit": "none"}
        if value is None:
            raise ValueError("privacy is missing: name a unit, or write `none` out")
        if isinstance(value, dict) and "unit" not in value:
            raise ValueError(
                "privacy.unit is missing: `record`, `organization`, or `none` if there shall be no privacy"
            )
        return value

    @model_validator(mode="after")
    def _parts_fit_together(self) -> "PrivacySpec":
        if self.unit is PrivacyUnit.NONE:
            self._claims_nothing()
        else:
            self._can_be_claimed()
        return self

    def _claims_nothing(self) -> None:
        for name in ("where", "epsilon", "delta", "noise_multiplier", "statistics_noise_multiplier"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"privacy.{name} goes with a claim, and unit none makes none: leave it out, or write unit: record"
                )

    def _can_be_claimed(self) -> None:
        if self.clip_norm is None:
            raise ValueError(f"unit {self.unit.value} needs a clip_norm: without a bound no noise hides anything")
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("give either epsilon (the noise is computed) or noise_multiplier (epsilon is computed)")
        if self.unit is PrivacyUnit.RECORD and self.where is not None:
            raise ValueError("where is for unit organization: noise for records is added by each worker, in every step")
        if self.unit is PrivacyUnit.ORGANIZATION:
            if self.where is None:
                raise ValueError(
                    "unit organization needs where: central (the service adds the noise), local (each worker), or "
                    "distributed (a share at each worker, with secure_aggregation: true)"
                )
            if self.statistics_noise_multiplier is not None:
                raise ValueError("statistics_noise_multiplier is for unit record")

    @property
    def mode(self) -> PrivacyMode:
        """Unit and place in one word."""
        if self.unit is PrivacyUnit.ORGANIZATION and self.where is not None:
            return PrivacyMode(f"organization-{self.where.value}")
        return PrivacyMode(self.unit.value)

    @property
    def claimed_delta(self) -> float:
        """The delta of the claim; 0 where nothing is claimed."""
        if self.unit is PrivacyUnit.NONE:
            return 0.0
        return self.delta if self.delta is not None else DEFAULT_DELTA[self.unit]


class PrivacyPlan(Response):
    """What a job's privacy section becomes at one dataset: the mechanisms, and what they add up to.

    The service computes it when the dataset is asked and freezes it with the participation; the worker computes the
    cost of every release again, from this and from the job's spec, before anything is noised.
    """

    unit: PrivacyUnit
    where: NoisePlace | None
    epsilon: float
    """What the whole job is claimed to cost here, at `delta`; by RDP of the discrete noise, rounded up."""
    budget_epsilon: float
    """What it takes of the dataset's budget, which counts records: more than `epsilon` under `where: central`."""
    delta: float
    clip_norm: float
    noise_multiplier: float
    sampling_probability: float
    """With which each training record enters each step (`unit: record`); else 1."""
    expected_batch: float
    """Records that a step is divided by: a public number, whatever the coins said. 0 for organizations."""
    steps_per_round: int
    """Noised steps of one training round (`unit: record`); else 1."""
    statistics_noise_multiplier: float | None
    evaluation_noise_multiplier: float | None


class DatasetPrivacy(Response):
    """What one dataset gives to a job."""

    organization: str
    dataset: str
    state: str
    """Of the participation."""
    declared_rows: int
    plan: PrivacyPlan | None
    epsilon_spent: float | None
    """Of what this job released of the dataset until now, at the job's delta; None: nothing bounds it."""
    epsilon_person: float | None
    """`plan.epsilon` for a person whose records lie in `max_orgs_per_person` organizations."""
    epsilon_reference: float | None
    """The same plan by privacy loss distributions and continuous noise (dp-accounting): beside, not enforced."""
    rounds_released: int
    releases: int


class PrivacyReport(Response):
    """What a job's privacy section promises, to whom, and what it does not."""

    job_id: UUID
    job: str
    job_state: str
    unit: PrivacyUnit
    where: NoisePlace | None
    mechanism: str
    adjacency: str
    guarantee: str
    """The promise in words that a data protection officer can sign."""
    accountant: str
    delta: float
    max_orgs_per_person: int
    assumptions: list[str]
    """What has to be true for the promise to hold."""
    not_protected: list[str]
    released: list[str]
    """Everything that leaves a worker, and how it is charged."""
    datasets: list[DatasetPrivacy]
    """Those that the caller may see."""
