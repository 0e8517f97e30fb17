"""A federated training job, as a person writes it and as the service tells of it."""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Final, Literal
from uuid import UUID

from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from pydantic.config import JsonDict

from isthmus.wire.base import Digest, Finite, Label, Name, Request, Response
from isthmus.wire.data import DataSpec, FeatureStatistics
from isthmus.wire.manifest import Manifest
from isthmus.wire.models import ModelSpec
from isthmus.wire.privacy import NoiseMultiplier, NoisePlace, PrivacySpec, PrivacyUnit
from isthmus.wire.secured import SMALLEST_COHORT, SecureAggregation
from isthmus.wire.strategies import FedAvg, StrategySpec, Weighting

Seconds = Annotated[Finite, Field(ge=0, le=30 * 86400)]


class Sgd(Request):
    """Stochastic gradient descent, as torch.optim.SGD."""

    kind: Literal["sgd"] = "sgd"
    lr: Annotated[Finite, Field(gt=0, le=1000)]
    momentum: Annotated[Finite, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[Finite, Field(ge=0, le=100)] = 0.0
    nesterov: bool = False

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> "Sgd":
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class Adam(Request):
    """Adam, as torch.optim.Adam; `adamw` decouples the weight decay."""

    kind: Literal["adam", "adamw"] = "adam"
    lr: Annotated[Finite, Field(gt=0, le=100)] = 1e-3
    beta1: Annotated[Finite, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[Finite, Field(ge=0, lt=1)] = 0.999
    weight_decay: Annotated[Finite, Field(ge=0, le=100)] = 0.0


def _one_key(value: Any) -> Any:
    """`{sgd: {lr: 0.1}}` -> `{kind: sgd, lr: 0.1}`; `adam` -> `{kind: adam}`."""
    if isinstance(value, str):
        return {"kind": value}
    if isinstance(value, dict) and "kind" not in value and len(value) == 1:
        kind, options = next(iter(value.items()))
        if isinstance(options, dict) or options is None:
            return {"kind": kind, **(options or {})}
    return value


OptimizerSpec = Annotated[
    Annotated[Sgd | Adam, Field(discriminator="kind")],
    BeforeValidator(_one_key),
]


class TrainingSpec(Request):
    """What a worker does with its rows in one round."""

    optimizer: OptimizerSpec
    batch_size: int | Literal["all"] = 32
    epochs: int = Field(default=1, ge=1, le=10_000)
    loss: Literal["cross_entropy", "mse"] = "cross_entropy"
    threads: int = Field(default=1, ge=1, le=256)
    """Torch threads; more than one gives up bit-for-bit determinism over machines."""

    @model_validator(mode="after")
    def _batches_hold_something(self) -> "TrainingSpec":
        if isinstance(self.batch_size, int) and not 1 <= self.batch_size <= 10_000_000:
            raise ValueError("batch_size is a number from 1 to 10,000,000, or 'all'")
        return self


class CohortSpec(Request):
    """Who takes part in a round, and when it closes."""

    fraction: Annotated[Finite, Field(gt=0, le=1)] = 1.0
    """Share of the approved participations drawn for a round, rounded up."""
    target_updates: int | Literal["all"] = "all"
    """Updates at which the round closes at once; all: the cohort without the over-selected."""
    over_selection: int = Field(default=0, ge=0, le=100_000)
    """So many more participations are asked than needed, and the slowest are left behind."""
    min_updates: int = Field(default=2, ge=2, le=100_000)
    deadline_s: Annotated[Finite, Field(ge=1, le=30 * 86400)] = 600.0
    grace_s: Seconds = 5.0
    """An upload that makes progress at the deadline holds the round open for at most so long."""
    attempts: int = Field(default=3, ge=1, le=100)

    @model_validator(mode="after")
    def _target_reaches_the_minimum(self) -> "CohortSpec":
        if isinstance(self.target_updates, int) and self.target_updates < self.min_updates:
            raise ValueError(f"target_updates {self.target_updates} is below min_updates {self.min_updates}")
        return self


class EvaluationRelease(StrEnum):
    """What a site tells of its evaluation."""

    EXACT = "exact"
    LOCAL = "local"  # the results stay with the worker
    NOISED = "noised"  # counts with discrete Gaussian noise, charged to the dataset's ledger


class EvaluationSpec(Request):
    """How models are measured at the sites."""

    holdout: Annotated[Finite, Field(ge=0, le=0.5)] = 0.2
    """Share of each label's rows that is never trained on. At most a half: the rest must not be a single record."""
    every: int = Field(default=1, ge=0, le=1_000_000)
    """Measure the round's model at every so many rounds; 0: only the final model is measured."""
    release: EvaluationRelease | None = None
    """None: `exact` without privacy and secure aggregation, else `local`. `noised` releases counts of held-out records,
    and no loss."""
    noise_multiplier: NoiseMultiplier | None = None
    """Noise of `release: noised`. None: a tenth of the job's target epsilon goes to it."""

    @model_validator(mode="after")
    def _noise_is_for_noised_results(self) -> "EvaluationSpec":
        if self.noise_multiplier is not None and self.release is not EvaluationRelease.NOISED:
            raise ValueError("evaluation.noise_multiplier goes with release: noised")
        return self


class JobSpec(Request):
    """What a researcher asks for. Its digest, over the canonical JSON with all defaults filled in, names it."""

    name: Name
    purpose: Label = "research"
    description: str = Field(default="", max_length=4000)
    model: ModelSpec
    data: DataSpec
    training: TrainingSpec
    strategy: StrategySpec = FedAvg()
    cohort: CohortSpec = CohortSpec()
    privacy: PrivacySpec
    # Left out where there is none: so plain jobs keep the bytes, and with them the digest, that they had before there
    # was such a section, and workers that do not know it read them.
    secure_aggregation: SecureAggregation = Field(default=None, exclude_if=lambda section: section is None)
    rounds: int = Field(ge=1, le=1_000_000)
    evaluation: EvaluationSpec = EvaluationSpec()
    seed: Digest | None = None
    """32 bytes in hexadecimal from which cohorts, initial weights and batches derive; None: the service draws one."""

    @model_validator(mode="after")
    def _parts_fit_together(self) -> "JobSpec":
        if (self.training.loss == "cross_entropy") != (self.data.task == "classification"):
            raise ValueError(f"loss {self.training.loss!r} does not fit a {self.data.task} task")
        if self.model.layers is not None:
            if self.model.mixes_records:
                self._batch_norm_stays_sound()
            plan = self.model.plan(self.data.input_shape)
            if plan.output_shape != (self.data.outputs,):
                raise ValueError(
                    f"the model gives outputs of shape {list(plan.output_shape)}; "
                    f"the data section wants {[self.data.outputs]}"
                )
        return self

    @model_validator(mode="after")
    def _secure_aggregation_can_hide(self) -> "JobSpec":
        """What would show a single update, or cannot be summed, is refused here."""
        secured = self.secure_aggregation
        if secured is None:
            if self.privacy.where is NoisePlace.DISTRIBUTED:
                raise ValueError(
                    "where: distributed adds up shares of noise under secure aggregation: write "
                    "secure_aggregation: true beside privacy"
                )
            return self
        if self.privacy.where is NoisePlace.CENTRAL:
            raise ValueError(
                "where: central has the service clip every single update, which secure aggregation hides from it: use "
                "where: distributed"
            )
        if self.strategy.needs_single_updates:
            raise ValueError(
                f"strategy {self.strategy.kind!r} needs the single updates, of which secure aggregation shows only the "
                "sum: use fedavg, fedavgm or fedadam"
            )
        if self.evaluation.release is EvaluationRelease.EXACT:
            raise ValueError(
                "evaluation.release 'exact' sends every site's own numbers beside the hidden sum: use local (kept at "
                "the site), or noised with unit: record"
            )
        if self.privacy.unit is PrivacyUnit.NONE and self.measures_statistics:
            raise ValueError(
                "standardize: federated sends every site's own statistics beside the hidden sum: use standardize: none "
                "with numbers that are scaled before, or unit: record, which noises them"
            )
        if self.model.layers is not None and self.model.mixes_records:
            raise ValueError(
                "batch_norm does not go with secure aggregation: rounding to whole numbers can turn a variance "
                "negative; use group_norm"
            )
        if self.cohort.min_updates < SMALLEST_COHORT:
            raise ValueError(
                f"secure aggregation needs cohort.min_updates of {SMALLEST_COHORT} at least: the sum of two updates "
                "tells each of the two the other's"
            )
        if 3 * secured.max_colluding >= self.cohort.min_updates and secured.max_colluding:
            raise ValueError(
                f"secure_aggregation.max_colluding {secured.max_colluding} is not below a third of min_updates "
                f"{self.cohort.min_updates}: no such protocol holds against so many"
            )
        self._secured_updates_are_bounded()
        return self

    def _secured_updates_are_bounded(self) -> None:
        assert self.secure_aggregation is not None, "asked by the caller"
        own = self.secure_aggregation.clip_norm
        if self.privacy.unit is PrivacyUnit.ORGANIZATION and own is not None:
            raise ValueError(
                "secure_aggregation.clip_norm is for unit none and record: unit organization is clipped to "
                "privacy.clip_norm"
            )
        if self.privacy.unit is PrivacyUnit.RECORD and own is None:
            raise ValueError(
                "secure aggregation needs a bound on the whole update, and privacy.clip_norm of unit record bounds "
                "gradients: write secure_aggregation: {clip_norm: 10}, or what a round's update never exceeds"
            )
        if self.update_bound is None:
            raise ValueError(
                "secure aggregation needs a bound on the whole update: write privacy: {unit: none, clip_norm: 10}, or "
                "what a round's update never exceeds"
            )

    @property
    def update_bound(self) -> float | None:
        """L2 norm to which the whole update is clipped, where it is clipped at all."""
        if self.secure_aggregation is not None and self.secure_aggregation.clip_norm is not None:
            return self.secure_aggregation.clip_norm
        return None if self.privacy.unit is PrivacyUnit.RECORD else self.privacy.clip_norm

    @model_validator(mode="after")
    def _privacy_can_hold(self) -> "JobSpec":
        """What would leave un-noised, or make the claim untrue, is refused here, before anybody is asked."""
        privacy, release = self.privacy, self.evaluation.release
        if privacy.unit is PrivacyUnit.NONE:
            if release is EvaluationRelease.NOISED:
                raise ValueError(
                    "evaluation.release 'noised' needs a privacy unit to be charged for: use exact or local"
                )
            return self
        if release is EvaluationRelease.EXACT:
            raise ValueError(
                "evaluation.release 'exact' sends un-noised results, which nobody accounts for: "
                "use local (kept at the site), or noised"
            )
        if privacy.unit is PrivacyUnit.RECORD:
            self._records_stay_hidden()
        else:
            self._organizations_stay_hidden()
        return self

    def _records_stay_hidden(self) -> None:
        if self.data.standardize == "federated":
            for feature in self.data.numbers():
                if feature.range is None:
                    raise ValueError(
                        f"standardize: federated with unit record needs a range for every number: write "
                        f"{{name: {feature.name}, range: [lowest, highest]}}; values are clipped to it, so that the "
                        "noise covers them"
                    )
        if self.evaluation.release is EvaluationRelease.NOISED:
            if self.data.task != "classification":
                raise ValueError("evaluation.release 'noised' counts correct answers, which needs a classification")
            if self.privacy.epsilon is None and self.evaluation.noise_multiplier is None:
                raise ValueError("evaluation.noise_multiplier is needed where no epsilon is given to take a share of")
        if (
            self.data.standardize == "federated"
            and self.data.numbers()
            and self.privacy.epsilon is None
            and self.privacy.statistics_noise_multiplier is None
        ):
            raise ValueError(
                "privacy.statistics_noise_multiplier is needed where no epsilon is given to take a share of"
            )

    def _organizations_stay_hidden(self) -> None:
        if self.strategy.weights is not Weighting.UNIFORM:
            raise ValueError(
                "unit organization needs uniform weights, or the largest site would count for more than the noise "
                f"covers: write strategy: {{{self.strategy.kind}: {{weights: uniform}}}}"
            )
        if self.data.standardize == "federated" and self.data.numbers():
            raise ValueError(
                "standardize: federated releases an organization's statistics, which no noise for unit organization "
                "can cover: use standardize: none with numbers that are scaled before, or unit: record"
            )
        if self.evaluation.release is EvaluationRelease.NOISED:
            raise ValueError("evaluation.release 'noised' hides a record, not an organization: use local")

    def _batch_norm_stays_sound(self) -> None:
        """A running variance is averaged like a weight: what carries it beyond the sites' own can turn it negative."""
        if self.privacy.unit is PrivacyUnit.RECORD:
            raise ValueError(
                "layer batch_norm mixes the records of a batch, so no single record's part can be clipped: use "
                "group_norm"
            )
        if self.privacy.unit is PrivacyUnit.ORGANIZATION:
            raise ValueError("batch_norm does not go with noise: a variance can turn negative; use group_norm")
        if self.strategy.kind != "fedavg" or self.strategy.lr > 1:
            raise ValueError(
                "batch_norm goes with strategy fedavg and lr up to 1 only: others carry a variance beyond the sites' "
                "own, and it can turn negative; use group_norm"
            )

    @property
    def evaluation_release(self) -> EvaluationRelease:
        """What sites tell of their evaluations, with the default filled in."""
        if self.evaluation.release is not None:
            return self.evaluation.release
        exact = self.privacy.unit is PrivacyUnit.NONE and self.secure_aggregation is None
        return EvaluationRelease.EXACT if exact else EvaluationRelease.LOCAL

    @property
    def releases_exact_metrics(self) -> bool:
        """Whether sites send their metrics as they are."""
        return self.evaluation_release is EvaluationRelease.EXACT

    @property
    def measures_statistics(self) -> bool:
        """Whether a round 0 gathers the statistics of the number columns."""
        return self.data.standardize == "federated" and bool(self.data.numbers())


class JobState(StrEnum):
    """Where a job stands."""

    DRAFT = "draft"
    AWAITING_APPROVAL = "awaiting_approval"
    RUNNING = "running"
    PAUSED = "paused"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class JobReason(StrEnum):
    """Why a job is where it is."""

    BY_REQUEST = "by-request"
    TOO_FEW_PARTICIPATIONS = "too-few-participations"
    ROUND_FAILED = "round-failed"
    AGGREGATE_REJECTED = "aggregate-rejected"
    ALL_ROUNDS_DONE = "all-rounds-done"


EXAMPLE: Final[JsonDict] = {
    "name": "heart-disease",
    "model": {"layers": [{"linear": {"in": 3, "out": 16}}, "relu", {"linear": {"in": 16, "out": 2}}]},
    "data": {
        "task": "classification",
        "features": ["age", {"name": "chol", "missing": "impute"}, "thalach"],
        "target": "disease",
        "classes": 2,
        "standardize": "federated",
    },
    "training": {"optimizer": {"sgd": {"lr": 0.05, "momentum": 0.9}}, "batch_size": 32, "epochs": 2},
    "strategy": "fedavg",
    "cohort": {"min_updates": 3},
    "privacy": "none",
    "rounds": 20,
}
"""A job as a person writes it, for the documentation."""


class CreateJob(Request):
    """A new job, as a draft: upload the initial model, then start it."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"spec": EXAMPLE}]})

    spec: JobSpec


class CancelJob(Request):
    """Why the job is ended, for the record."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"note": "the data section was wrong"}]})

    note: Label = "cancelled by its owner"


class JobView(Response):
    """A job and where it stands."""

    id: UUID
    name: str
    owner: str
    """Name of the principal who created it."""
    state: JobState
    reason: JobReason | None
    detail: str | None
    """The reason in a sentence."""
    spec: JobSpec
    spec_digest: str
    manifest: Manifest | None
    rounds_completed: int
    current_round: int | None
    model_digest: str | None
    """The newest checkpoint."""
    statistics: FeatureStatistics | None
    """What `standardize: federated` found; the published model is used with it."""
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None


class ParticipationState(StrEnum):
    """Where one dataset stands in one job."""

    PENDING = "pending"
    APPROVED = "approved"
    REJECTED = "rejected"
    WITHDRAWN = "withdrawn"
    EXPIRED = "expired"
    EXHAUSTED = "exhausted"


class ApproveParticipation(Request):
    """The grant: for what, until when, for how many rounds. What is left out is taken from the job."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{}, {"purpose": "research", "expires_in_s": 2592000, "rounds": 20}]}
    )

    purpose: Label | None = None
    expires_in_s: int | None = Field(default=None, ge=1, le=3660 * 86400)
    rounds: int | None = Field(default=None, ge=1, le=1_000_000)


class RejectParticipation(Request):
    """A steward says no, and why."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"note": "our ethics board has not agreed yet"}]})

    note: Label


class WithdrawParticipation(Request):
    """A steward takes the grant back, in the middle of the job if need be."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"note": "a patient has withdrawn consent"}]})

    note: Label


class GrantView(Response):
    """A steward's approval of a participation."""

    purpose: str
    expires_at: datetime
    rounds: int
    rounds_used: int
    granted_by: str
    granted_at: datetime
    by_rule: bool


class ParticipationView(Response):
    """One dataset's part in one job."""

    id: UUID
    job_id: UUID
    job: str
    dataset_id: UUID
    dataset: str
    organization: str
    state: ParticipationState
    detail: str | None
    declared_rows: int
    grant: GrantView | None
    requested_by: str
    purpose: str
    created_at: datetime
