"""Datasets as metadata, and the policy that says what they may be used for."""

from datetime import datetime
from enum import StrEnum
from uuid import UUID

from pydantic import Field

from isthmus.wire.base import Finite, Label, Name, Request, Response
from isthmus.wire.data import DatasetSchema
from isthmus.wire.jobs import JobSpec
from isthmus.wire.models import ModelKind
from isthmus.wire.rounds import TaskKind


class DatasetState(StrEnum):
    """Announced by its worker, then confirmed by a steward; only confirmed datasets take part in jobs."""

    ANNOUNCED = "announced"
    CONFIRMED = "confirmed"
    RETIRED = "retired"


class AutomaticApproval(Request):
    """Jobs within the policy are granted by rule, for so long and so many rounds."""

    grant_days: int = Field(default=30, ge=1, le=3660)
    max_rounds: int = Field(default=100, ge=1, le=1_000_000)


class UsePolicy(Request):
    """What a dataset may be used for. Closed by default: with no purpose listed, no job passes."""

    purposes: tuple[Label, ...] = Field(default=(), max_length=100)
    principals: tuple[Name, ...] | None = Field(default=None, max_length=1000)
    """Names of the researchers who may ask; None: any of this platform."""
    model_kinds: tuple[ModelKind, ...] = (ModelKind.DECLARATIVE,)
    min_noise_multiplier: Finite = Field(default=0.0, ge=0)
    max_clip_norm: Finite | None = Field(default=None, gt=0)
    min_cohort: int = Field(default=2, ge=2, le=100_000)
    max_rounds: int = Field(default=1000, ge=1, le=1_000_000)
    allow_exact_metrics: bool = False
    """Whether loss, accuracy and AUC of this dataset may leave it un-noised."""
    allow_exact_statistics: bool = False
    """Whether counts, means and variances may leave it un-noised for `standardize: federated`."""
    automatic_approval: AutomaticApproval | None = None


def policy_objections(policy: UsePolicy, spec: JobSpec, *, principal: str) -> list[str]:
    """The clauses of `policy` that refuse `spec`, each a sentence that says what would pass; empty if none does.

    `principal` is the name of the researcher who asks.
    """
    found = []
    if spec.purpose not in policy.purposes:
        allowed = ", ".join(policy.purposes) or "none yet"
        found.append(f"purposes: {spec.purpose!r} is not allowed (allowed: {allowed}).")
    if policy.principals is not None and principal not in policy.principals:
        found.append(f"principals: {principal!r} is not listed.")
    if spec.model.kind not in policy.model_kinds:
        found.append(f"model_kinds: {spec.model.kind.value!r} models are not allowed.")
    if spec.privacy.noise_multiplier < policy.min_noise_multiplier:
        noise = spec.privacy.noise_multiplier
        found.append(f"min_noise_multiplier: the job's {noise:g} is below {policy.min_noise_multiplier:g}.")
    if policy.max_clip_norm is not None and (
        spec.privacy.clip_norm is None or spec.privacy.clip_norm > policy.max_clip_norm
    ):
        has = "unbounded" if spec.privacy.clip_norm is None else f"{spec.privacy.clip_norm:g}"
        found.append(f"max_clip_norm: the job's clip norm is {has}; at most {policy.max_clip_norm:g} passes.")
    if spec.cohort.min_updates < policy.min_cohort:
        found.append(
            f"min_cohort: rounds may close with {spec.cohort.min_updates} updates; at least {policy.min_cohort} pass."
        )
    if spec.rounds > policy.max_rounds:
        found.append(f"max_rounds: the job has {spec.rounds} rounds; at most {policy.max_rounds} pass.")
    if spec.releases_exact_metrics and not policy.allow_exact_metrics:
        found.append("allow_exact_metrics: the job's evaluation.release is 'exact'; 'local' would pass.")
    if spec.data.standardize == "federated" and not policy.allow_exact_statistics:
        found.append("allow_exact_statistics: the job's data.standardize is 'federated'; 'none' would pass.")
    return found


class AnnounceDataset(Request):
    """A worker says which data it can read: the schema and the number of rows, no values."""

    data_schema: DatasetSchema
    rows: int = Field(ge=1, le=10**12)
    task_kinds: tuple[TaskKind, ...] = Field(default=tuple(TaskKind), min_length=1, max_length=10)
    description: Label = "no description"


class DatasetView(Response):
    """Metadata of data that a worker can read."""

    id: UUID
    organization_id: UUID
    organization: str
    name: str
    worker_id: UUID
    worker: str
    state: DatasetState
    data_schema: DatasetSchema
    rows: int
    task_kinds: list[str]
    description: str
    policy: UsePolicy
    announced_at: datetime
    confirmed_at: datetime | None
