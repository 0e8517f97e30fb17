"""Rounds, tasks and updates: what passes between the service and a worker while a job runs."""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Final
from uuid import UUID

from pydantic import ConfigDict, Field, StringConstraints

from isthmus.wire.base import Digest, Finite, Request, Response, canonical_json
from isthmus.wire.data import FeatureStatistics
from isthmus.wire.jobs import EvaluationRelease, JobSpec
from isthmus.wire.manifest import AggregationRule, DType, Manifest, TensorSpec, update_manifest
from isthmus.wire.privacy import PrivacyPlan
from isthmus.wire.secured import MASKED, SecuredOffer, SecuredRound

LARGEST_FENCE: Final = 1 << 53
Span = Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)]
"""Seconds, as the service tells them to a worker."""
METRICS_PREFIX = "metrics/"
STATISTICS_PREFIX = "statistics/"


class TaskKind(StrEnum):
    """What a round's tasks do. Round 0 gathers statistics, 1 to `rounds` train, one more evaluates the final model."""

    STATISTICS = "statistics"
    TRAIN = "train"
    EVALUATE = "evaluate"


class RoundPhase(StrEnum):
    """Where a round stands."""

    COLLECTING = "collecting"
    SURVIVORS = "survivors"  # secured: all sign the one set of those who are in the sum
    UNMASKING = "unmasking"  # secured: shares of what has to be taken off the sum come in
    AGGREGATING = "aggregating"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


OPEN_PHASES: Final = (RoundPhase.COLLECTING, RoundPhase.SURVIVORS, RoundPhase.UNMASKING, RoundPhase.AGGREGATING)
"""A round in one of these is not over."""


class TaskState(StrEnum):
    """Where one participation's part in a round stands."""

    OFFERED = "offered"
    CLAIMED = "claimed"
    UPLOADING = "uploading"
    SUBMITTED = "submitted"
    REFUSED = "refused"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


def kind_of_round(number: int, rounds: int) -> TaskKind:
    """The task kind of round `number` of a job of `rounds` training rounds."""
    if number == 0:
        return TaskKind.STATISTICS
    return TaskKind.TRAIN if number <= rounds else TaskKind.EVALUATE


def evaluates_in_round(spec: JobSpec, number: int) -> bool:
    """Whether a training round also measures, before training, the model that it starts from."""
    every = spec.evaluation.every
    return spec.evaluation.holdout > 0 and every > 0 and (number - 1) % every == 0


def _scalar(optional: bool = False) -> TensorSpec:
    return TensorSpec(dtype=DType.F64, shape=(), optional=optional)


def _measures(spec: JobSpec, prefix: str) -> dict[str, TensorSpec]:
    found = {f"{prefix}examples": _scalar(), f"{prefix}loss": _scalar()}
    if spec.data.task == "classification":
        found[f"{prefix}accuracy"] = _scalar()
        if spec.data.outputs == 2:
            found[f"{prefix}auc"] = _scalar(optional=True)  # undefined where one class is missing
    return found


def _released_measures(spec: JobSpec) -> dict[str, TensorSpec]:
    """What a site tells of a model's quality: everything, noised counts, or nothing."""
    prefix = f"{METRICS_PREFIX}holdout/"
    if spec.evaluation_release is EvaluationRelease.EXACT:
        return _measures(spec, prefix)
    if spec.evaluation_release is EvaluationRelease.NOISED:
        return {f"{prefix}examples": _scalar(), f"{prefix}accuracy": _scalar()}
    return {}


def task_manifest(kind: TaskKind, spec: JobSpec, number: int, model: Manifest) -> Manifest:
    """What the body of a task's upload holds, exactly; `metrics/...` only as far as the job releases them."""
    if kind is TaskKind.STATISTICS:
        numbers = (len(spec.data.numbers()),)
        axis = TensorSpec(dtype=DType.F64, shape=numbers)
        tensors = {f"{STATISTICS_PREFIX}{name}": axis for name in ("count", "mean", "m2")}
        return Manifest(tensors={**tensors, f"{STATISTICS_PREFIX}rows": _scalar()})
    if kind is TaskKind.EVALUATE:
        return Manifest(tensors=_released_measures(spec))
    if spec.secure_aggregation is None:
        tensors = dict(update_manifest(model).tensors)
    else:
        shape = (model.averaged_elements,)
        tensors = {MASKED: TensorSpec(dtype=DType.U32, shape=shape, rule=AggregationRule.KEEP)}
    if spec.releases_exact_metrics:
        tensors[f"{METRICS_PREFIX}train/loss"] = _scalar()
        tensors[f"{METRICS_PREFIX}train/examples"] = _scalar()
    if evaluates_in_round(spec, number):
        tensors.update(_released_measures(spec))
    return Manifest(tensors=tensors)


class ClaimTask(Request):
    """A worker asks for work. `datasets` limits it to those that it can serve just now; None: all of its own."""

    model_config = ConfigDict(json_schema_extra={"examples": [{}, {"datasets": ["heart"], "holding": []}]})

    datasets: tuple[str, ...] | None = Field(default=None, max_length=10_000)
    holding: tuple[UUID, ...] | None = Field(default=None, max_length=1_000)
    """The tasks that the worker is at. Others that it had claimed are lost to it (it was killed, or the answer went
    astray): it gets them again at once, under the next fence. None: it does not say, and leases decide."""


class ModelReference(Response):
    """Where the round's model is. The address never changes its content."""

    url: str
    digest: Digest
    size_bytes: int = Field(ge=0)


class TaskOffer(Response):
    """One participation's part in a round, with all that the worker needs to decide on it and to do it."""

    task_id: UUID
    kind: TaskKind
    fence: int = Field(ge=1, le=LARGEST_FENCE)
    lease_s: Span
    """The lease ends so long after this answer unless renewed by heartbeat."""
    heartbeat_s: Span
    job_id: UUID
    job: str
    spec: JobSpec
    spec_digest: Digest
    requested_by: str
    purpose: str
    grant_expires_at: datetime
    grant_rounds: int
    participation_id: UUID
    organization: str
    dataset: str
    round_number: int = Field(ge=0, le=LARGEST_FENCE)
    attempt: int
    closes_at: datetime
    job_seed: Digest
    """32 bytes in hexadecimal. The task's own seed is derived from it (`isthmus.federation.cohort.round_seed`)."""
    model: ModelReference
    model_manifest: Manifest
    upload_manifest: Manifest
    statistics: FeatureStatistics | None
    plan: PrivacyPlan | None
    """How the job's privacy section is met at this dataset; None: the job claims none."""
    secured: SecuredOffer | None = None
    """Of a training round under secure aggregation."""


class TaskView(Response):
    """A task as people see it."""

    id: UUID
    kind: TaskKind
    state: TaskState
    round_number: int
    attempt: int
    fence: int
    organization: str
    dataset: str
    worker: str | None
    detail: str | None
    offered_at: datetime
    lease_expires_at: datetime | None


class Heartbeat(Request):
    """The training process of this task is alive."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"fence": 1, "progress": 0.5}]})

    fence: int = Field(ge=1)
    progress: Annotated[Finite, Field(ge=0, le=1)] | None = None


class HeartbeatReceipt(Response):
    """The lease is renewed, or the task is over and the work should stop."""

    held: bool
    lease_s: float
    reason: str | None = None


class RefuseTask(Request):
    """The worker's policy or data says no: final for this round."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"fence": 1, "reason": "our policy asks for a clip_norm of at most 1"}]}
    )

    fence: int = Field(ge=1)
    reason: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=1000)]


class FailTask(Request):
    """The work broke. The task may be offered again in the round's next attempt."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"fence": 1, "reason": "the training process ran out of memory"}]}
    )

    fence: int = Field(ge=1)
    reason: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=1000)]


class UpdateReceipt(Response):
    """Proof that the service holds an update: the digest of the bytes it stored, signed by its Ed25519 key."""

    task_id: UUID
    digest: Digest
    received_at: datetime
    signature: str
    """Over `receipt_bytes`, 64 bytes in hexadecimal."""


def receipt_bytes(task_id: UUID, digest: str, received_at: datetime) -> bytes:
    """What the service signs in a receipt."""
    return b"isthmus/receipt/v1" + canonical_json(
        {"task_id": str(task_id), "digest": digest, "received_at": received_at.isoformat()}
    )


class UpdateView(Response):
    """An update as recorded: what went into the aggregate, and in which order."""

    organization: str
    dataset: str
    digest: str | None
    """None: hidden. Under central noise updates are un-noised, and whoever knows what one may have been could tell by
    its digest or its norm; only the service's operator and the organization itself see them."""
    size_bytes: int
    weight: float
    l2_norm: float | None
    position: int | None
    """Place in the canonical order of the frozen set; None: not in the aggregate."""
    received_at: datetime
    metrics: dict[str, float]


class RoundView(Response):
    """One pass of a job."""

    id: UUID
    job_id: UUID
    number: int
    kind: TaskKind
    phase: RoundPhase
    attempt: int
    cohort_seed: str
    cohort_size: int
    target_updates: int
    min_updates: int
    accepted: int
    detail: str | None
    model_digest: str
    """The checkpoint that the round starts from."""
    result_digest: str | None
    metrics: dict[str, float]
    """Pooled over the sites, weighted by examples."""
    opened_at: datetime
    closes_at: datetime
    completed_at: datetime | None
    secured: SecuredRound | None = None
    """Of a training round under secure aggregation, while it is open."""
    tasks: list[TaskView]
    updates: list[UpdateView]


class SiteMetrics(Response):
    """What one site measured."""

    organization: str
    dataset: str
    metrics: dict[str, float]


class RoundMetrics(Response):
    """What a round measured: `holdout/...` is of the model it started from, `train/...` of its local training."""

    round_number: int
    kind: TaskKind
    measured_round: int
    """The round whose checkpoint `holdout/...` measures; 0 is the initial model."""
    duration_s: float | None
    accepted: int
    pooled: dict[str, float]
    sites: list[SiteMetrics]


class CheckpointView(Response):
    """The model after a round; round 0 is the initial one."""

    job_id: UUID
    round_number: int
    digest: str
    size_bytes: int
    created_at: datetime
