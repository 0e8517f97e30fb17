"""Datasets as metadata, and the policy that says what they may be used for."""

from collections.abc import Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Final
from uuid import UUID

from pydantic import AwareDatetime, Field, StringConstraints

from isthmus.wire.base import Digest, Finite, Label, Request, Response, canonical_json
from isthmus.wire.data import DatasetSchema
from isthmus.wire.jobs import JobSpec
from isthmus.wire.ledger import BudgetView
from isthmus.wire.models import ModelKind
from isthmus.wire.privacy import Delta, Epsilon, PrivacyMode, PrivacyPlan, PrivacyUnit
from isthmus.wire.rounds import TaskKind

ANY: Final = "*"
Signature = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{128}$")]


class DatasetState(StrEnum):
    """Announced by its worker, then confirmed by a steward; only confirmed datasets take part in jobs."""

    ANNOUNCED = "announced"
    CONFIRMED = "confirmed"
    RETIRED = "retired"


class AutomaticApproval(Request):
    """Jobs within the policy are granted by rule, for so long and so many rounds."""

    grant_days: int = Field(default=30, ge=1, le=3660)
    max_rounds: int = Field(default=100, ge=1, le=1_000_000)


class Budget(Request):
    """What all jobs together may ever learn of a single record of the dataset."""

    epsilon: Epsilon
    delta: Delta = 1e-5


class UsePolicy(Request):
    """What a dataset may be used for. Closed by default: no purpose, no privacy budget, and never without noise.

    It is written in the configuration of the worker beside the data and announced under that worker's signature. A
    steward may tighten it here; only the worker's own configuration can loosen it.
    """

    purposes: tuple[Label, ...] = Field(default=(), max_length=100)
    """Purposes that pass; `*` stands for any."""
    principals: tuple[Label, ...] | None = Field(default=None, max_length=1000)
    """Names of the researchers who may ask; None or `*`: any of this platform."""
    model_kinds: tuple[ModelKind, ...] = (ModelKind.DECLARATIVE,)
    modes: tuple[PrivacyMode, ...] = Field(default=(PrivacyMode.RECORD,), max_length=len(PrivacyMode))
    """How a job may protect the records. `none` has to be listed to pass."""
    budget: Budget | None = None
    """Over all jobs, for ever. None: no job with a privacy unit passes."""
    max_epsilon: Epsilon | None = None
    """Largest epsilon of one job; None: as far as the budget reaches."""
    max_delta: Delta = 1e-5
    max_clip_norm: Finite | None = Field(default=None, gt=0)
    """Largest clip_norm of a job without a privacy unit; an unclipped one does not pass either. None: any."""
    min_cohort: int = Field(default=2, ge=2, le=100_000)
    max_rounds: int = Field(default=1000, ge=1, le=1_000_000)
    allow_exact_metrics: bool = False
    """Whether loss, accuracy and AUC of this dataset may leave it un-noised, in jobs without a privacy unit."""
    allow_exact_statistics: bool = False
    """Whether counts, means and variances may leave it un-noised, in jobs without a privacy unit."""
    require_secure_aggregation: bool = False
    """Whether updates of training leave masked only: a job without secure aggregation does not pass."""
    automatic_approval: AutomaticApproval | None = None
    """The steward's own decision: whether a person is asked for each job."""


_YOUNGER: Final = ("require_secure_aggregation",)
"""Clauses that came when policies were signed already: see `announcement_bytes`."""


def allows(allowed: Sequence[str] | None, value: str) -> bool:
    """Whether a list of a policy names `value`, or says `*`."""
    return allowed is None or ANY in allowed or value in allowed


def policy_objections(policy: UsePolicy, spec: JobSpec, *, principal: str, plan: PrivacyPlan | None) -> list[str]:
    """The clauses of `policy` that refuse `spec`, each a sentence that says what would pass; empty if none does.

    `principal` is the name of the researcher who asks. `plan` is what the job's privacy section becomes at the dataset
    (`isthmus.privacy.planning.plan_of`); None for a job without a privacy unit.
    """
    found, privacy, bound = [], spec.privacy, spec.update_bound
    if not allows(policy.purposes, spec.purpose):
        allowed = ", ".join(policy.purposes) or "none yet"
        found.append(f"purposes: {spec.purpose!r} is not allowed (allowed: {allowed}).")
    if not allows(policy.principals, principal):
        found.append(f"principals: {principal!r} is not listed.")
    if spec.model.kind not in policy.model_kinds:
        kinds = ", ".join(kind.value for kind in policy.model_kinds) or "none"
        found.append(f"model_kinds: {spec.model.kind.value!r} models are not allowed (allowed: {kinds}).")
    if privacy.mode not in policy.modes:
        modes = ", ".join(mode.value for mode in policy.modes) or "none at all"
        found.append(f"modes: privacy {privacy.mode.value!r} is not allowed (allowed: {modes}).")
    if privacy.unit is not PrivacyUnit.NONE:
        found += _claim_objections(policy, plan)
    elif policy.max_clip_norm is not None and (bound is None or bound > policy.max_clip_norm):
        has = "unbounded" if bound is None else f"{bound:g}"
        found.append(f"max_clip_norm: the job's clip norm is {has}; at most {policy.max_clip_norm:g} passes.")
    if spec.cohort.min_updates < policy.min_cohort:
        found.append(
            f"min_cohort: rounds may close with {spec.cohort.min_updates} updates; at least {policy.min_cohort} pass."
        )
    if spec.rounds > policy.max_rounds:
        found.append(f"max_rounds: the job has {spec.rounds} rounds; at most {policy.max_rounds} pass.")
    if spec.releases_exact_metrics and not policy.allow_exact_metrics:
        found.append("allow_exact_metrics: the job's evaluation.release is 'exact'; 'local' would pass.")
    if privacy.unit is PrivacyUnit.NONE and spec.data.standardize == "federated" and not policy.allow_exact_statistics:
        found.append("allow_exact_statistics: the job's data.standardize is 'federated'; 'none' would pass.")
    if policy.require_secure_aggregation and spec.secure_aggregation is None:
        found.append("require_secure_aggregation: the job has no secure aggregation; write secure_aggregation: true.")
    return found


def _claim_objections(policy: UsePolicy, plan: PrivacyPlan | None) -> list[str]:
    assert plan is not None, "a job with a privacy unit has a plan at every dataset"
    if policy.budget is None:
        return ["budget: the dataset has no privacy budget; its worker's configuration sets one."]
    found = []
    largest = policy.budget.epsilon if policy.max_epsilon is None else min(policy.budget.epsilon, policy.max_epsilon)
    if plan.budget_epsilon > largest:
        counted = "" if plan.budget_epsilon == plan.epsilon else ", counted for single records"
        found.append(
            f"max_epsilon: the job's epsilon at this dataset is {plan.budget_epsilon:.4g}{counted}; at most "
            f"{largest:g} passes (more noise, or fewer rounds)."
        )
    if plan.delta > policy.max_delta:
        found.append(f"max_delta: the job's delta is {plan.delta:g}; at most {policy.max_delta:g} passes.")
    return found


def loosened(announced: UsePolicy, wanted: UsePolicy) -> list[str]:
    """The clauses in which `wanted` allows more than `announced` does, one sentence each; empty if none does."""
    narrowed = strictest(announced, wanted)
    found = []
    for clause in UsePolicy.model_fields:
        if clause != "automatic_approval" and getattr(narrowed, clause) != getattr(wanted, clause):
            found.append(f"{clause}: the worker's own policy says {_told(getattr(announced, clause))}.")
    return found


def strictest(one: UsePolicy, other: UsePolicy) -> UsePolicy:
    """What both policies allow. `automatic_approval` and the order of lists are those of `other`."""
    return UsePolicy(
        purposes=_both(one.purposes, other.purposes) or (),
        principals=_both(one.principals, other.principals),
        model_kinds=tuple(kind for kind in other.model_kinds if kind in one.model_kinds),
        modes=tuple(mode for mode in other.modes if mode in one.modes),
        budget=_smaller_budget(one.budget, other.budget),
        max_epsilon=_least(one.max_epsilon, other.max_epsilon),
        max_delta=min(one.max_delta, other.max_delta),
        max_clip_norm=_least(one.max_clip_norm, other.max_clip_norm),
        min_cohort=max(one.min_cohort, other.min_cohort),
        max_rounds=min(one.max_rounds, other.max_rounds),
        allow_exact_metrics=one.allow_exact_metrics and other.allow_exact_metrics,
        allow_exact_statistics=one.allow_exact_statistics and other.allow_exact_statistics,
        require_secure_aggregation=one.require_secure_aggregation or other.require_secure_aggregation,
        automatic_approval=other.automatic_approval,
    )


def _both(one: tuple[str, ...] | None, other: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """What two lists name in common; None and `*` name everything."""
    if one is None or ANY in one:
        return other
    if other is None or ANY in other:
        return one
    return tuple(value for value in other if value in one)


def _least(one: float | None, other: float | None) -> float | None:
    given = [value for value in (one, other) if value is not None]
    return min(given) if given else None


def _smaller_budget(one: Budget | None, other: Budget | None) -> Budget | None:
    if one is None or other is None:
        return None
    return Budget(epsilon=min(one.epsilon, other.epsilon), delta=min(one.delta, other.delta))


def _told(clause: object) -> str:
    if isinstance(clause, tuple):
        return ", ".join(str(item) for item in clause) or "none"
    if isinstance(clause, Budget):
        return f"epsilon {clause.epsilon:g} at delta {clause.delta:g}"
    return "no bound" if clause is None else str(clause)


class Handover(Request):
    """That a worker handed a dataset on to another one together with its ledger: signed by both.

    The document itself, with the ledger, went from one worker to the other; here is what both have signed of it.
    """

    giver: Digest
    """Ed25519 public key of the worker that serves the dataset no more, in hexadecimal."""
    taker: Digest
    """That of the worker that serves it from now on."""
    lineage: Digest
    entries: int = Field(ge=1, le=1 << 53)
    """Length of the handed-on ledger."""
    head: Digest
    """Hash of its last entry."""
    document: Digest
    """Of all that was handed on."""
    signed_at: AwareDatetime
    given: Signature
    """Over `handover_bytes`, by the giver."""
    taken: Signature
    """Over the same, by the taker."""


def handover_bytes(
    organization: str,
    dataset: str,
    *,
    giver: str,
    taker: str,
    lineage: str,
    entries: int,
    head: str,
    document: str,
    signed_at: datetime,
) -> bytes:
    """What both workers sign when a dataset is handed on."""
    return b"isthmus/handover/v1" + canonical_json(
        {
            "organization": organization,
            "dataset": dataset,
            "giver": giver,
            "taker": taker,
            "lineage": lineage,
            "entries": entries,
            "head": head,
            "document": document,
            "signed_at": signed_at.astimezone(UTC).isoformat(),
        }
    )


class AnnounceDataset(Request):
    """A worker says which data it can read: the schema and the number of rows, no values."""

    data_schema: DatasetSchema
    rows: int = Field(ge=1, le=10**12)
    task_kinds: tuple[TaskKind, ...] = Field(default=tuple(TaskKind), min_length=1, max_length=10)
    description: Label = "no description"
    policy: UsePolicy = UsePolicy()
    """What the worker's own configuration allows."""
    lineage: Digest
    """Names the budget: the worker gives the same one to the same data under any name."""
    signed_at: AwareDatetime
    """When the worker signed; an announcement older than the last one is refused."""
    signature: Signature
    """Over `announcement_bytes`, by the worker's Ed25519 key: 64 bytes in hexadecimal."""
    handover: Handover | None = None
    """That the worker which served the dataset until now handed it on: it stays confirmed, and no one is revoked."""


def announcement_bytes(
    organization: str, dataset: str, *, policy: UsePolicy, lineage: str, signed_at: datetime
) -> bytes:
    """What a worker signs when it announces a dataset: the policy that travels with it, and the budget it draws on.

    A clause that is younger than the signature is under it only where it says more than its default: what a worker
    signs that has never heard of it stays signed.
    """
    clauses = policy.model_dump(mode="json")
    for younger in _YOUNGER:
        if clauses[younger] == UsePolicy.model_fields[younger].default:
            del clauses[younger]
    return b"isthmus/announcement/v1" + canonical_json(
        {
            "organization": organization,
            "dataset": dataset,
            "policy": clauses,
            "lineage": lineage,
            "signed_at": signed_at.astimezone(UTC).isoformat(),
        }
    )


class ConfirmDataset(Request):
    """A steward says that the announced data is the organization's, and which budget it draws on."""

    other_records: bool = False
    """Whether these are other records than those that were announced under this name before: then, and only then, the
    budget begins anew."""


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
    """What is in force: the worker's policy, as the steward has tightened it."""
    announced_policy: UsePolicy
    """What the worker's own configuration allows."""
    lineage: str
    """Names the data, as the worker announced them last."""
    ledger_lineage: str
    """The lineage that the ledger began with. Another one than `lineage`: the budget of before was kept, and stays
    unless a steward confirms the dataset with `other_records`."""
    budget: BudgetView | None
    """Of the organization's own people and workers; others see None."""
    announced_at: datetime
    confirmed_at: datetime | None
