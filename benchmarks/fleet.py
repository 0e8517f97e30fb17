"""A fleet of workers on a real service: each enrolled, with a key of its own, and taking part in one running job.

Enrolling ten thousand workers one by one would take minutes that measure nothing, so their rows are put into the
database at once. They are what enrolment, announcement and approval leave behind, and the keys are real ones. The job
is begun by the API over two sites whose agents are stopped; so its first round stays open.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncSession

from app.credentials import issue_key
from app.models import ApiKey, Base, Dataset, Grant, Ledger, Participation, Principal, Worker, uuid7
from app.wakeups import OFFERS
from isthmus.wire.datasets import AutomaticApproval, DatasetState, UsePolicy
from isthmus.wire.jobs import JobSpec, JobView, ParticipationState
from isthmus.wire.organizations import Role, Scope
from isthmus.wire.privacy import PrivacyMode
from isthmus.wire.rounds import TaskKind, TaskState
from tests.acceptance.island import Island

_OPEN = UsePolicy(purposes=("research",), modes=(PrivacyMode.NONE,), automatic_approval=AutomaticApproval())
_SPEC: dict[str, Any] = {
    "name": "waited-for",
    "model": {"layers": [{"linear": {"in": 1, "out": 2}}]},
    "data": {
        "task": "classification",
        "features": ["age"],
        "target": "disease",
        "classes": 2,
    },
    "training": {"optimizer": {"sgd": {"lr": 0.1}}},
    "privacy": "none",
    "rounds": 1,
    "cohort": {"min_updates": 2, "deadline_s": 86400},
    "evaluation": {"holdout": 0, "release": "local"},
}


@dataclass(frozen=True, slots=True)
class Member:
    """A worker of the fleet: its key as it is shown, and its part in the job."""

    worker_id: UUID
    participation_id: UUID
    api_key: str


@dataclass(frozen=True, slots=True)
class Fleet:
    """All of them, and where their tasks go."""

    job_id: UUID
    round_id: UUID
    members: tuple[Member, ...]

    async def offer(self, connection: psycopg.AsyncConnection[Any], members: Sequence[Member]) -> None:
        """Offer each of `members` a task and announce the change, within the caller's transaction."""
        rows = [(uuid7(), self.job_id, self.round_id, one.participation_id, one.worker_id) for one in members]
        async with connection.cursor() as cursor:
            await cursor.executemany(
                "INSERT INTO tasks (id, job_id, round_id, participation_id, worker_id, kind, state, fence, attempt,"
                f" offered_at) VALUES (%s, %s, %s, %s, %s, '{TaskKind.TRAIN}', '{TaskState.OFFERED}', 1, 1,"
                " clock_timestamp())",
                rows,
            )
        await connection.execute("SELECT pg_notify(%s, %s)", (OFFERS, str(self.job_id)))

    async def withdraw(self, connection: psycopg.AsyncConnection[Any], members: Sequence[Member]) -> None:
        """Remove the tasks again, so that their leases do not lapse and the same workers can be offered more."""
        await connection.execute(
            "DELETE FROM tasks WHERE round_id = %s AND participation_id = ANY(%s)",
            (self.round_id, [one.participation_id for one in members]),
        )


def begin_job(island: Island) -> JobView:
    """A running job over the island's sites, whose agents are stopped: they never ask for work."""
    for agent in island.agents:
        agent.stop()
    job: JobView = island.submit(JobSpec.model_validate(_SPEC))
    return job


async def add_members(session: AsyncSession, organization_id: UUID, job_id: UUID, number: int) -> tuple[Member, ...]:
    """So many workers of the organization, each with a key, a confirmed dataset and a grant for the job."""
    now = datetime.now(UTC)
    rows: dict[type[Base], list[dict[str, Any]]] = {
        model: [] for model in (Principal, Worker, ApiKey, Ledger, Dataset, Participation, Grant)
    }
    members = []
    for index in range(number):
        key, principal, worker, dataset, participation = issue_key(), uuid7(), uuid7(), uuid7(), uuid7()
        ledger, lineage = uuid7(), secrets.token_hex(32)
        name = f"agent-{index}"
        rows[Principal].append(
            {
                "id": principal,
                "name": f"worker:fleet/{name}",
                "display_name": name,
                "role": Role.WORKER,
                "organization_id": organization_id,
                "created_at": now,
            }
        )
        rows[Worker].append(
            {
                "id": worker,
                "organization_id": organization_id,
                "principal_id": principal,
                "name": name,
                "public_key": secrets.token_hex(32),
                "version": "0",
                "enrolled_at": now,
            }
        )
        rows[ApiKey].append(
            {
                "id": key.id,
                "principal_id": principal,
                "label": "enrolment",
                "secret_hash": key.secret_hash,
                "scopes": [Scope.TASKS.value],
                "created_at": now,
            }
        )
        rows[Ledger].append({"id": ledger, "organization_id": organization_id, "lineage": lineage})
        rows[Dataset].append(
            {
                "id": dataset,
                "organization_id": organization_id,
                "name": f"patients-{index}",
                "worker_id": worker,
                "state": DatasetState.CONFIRMED,
                "data_schema": {"columns": []},
                "rows": 300,
                "task_kinds": [TaskKind.TRAIN.value],
                "description": "made for a benchmark",
                "policy": _OPEN.model_dump(mode="json"),
                "announced_policy": _OPEN.model_dump(mode="json"),
                "policy_signature": "",
                "signed_at": now,
                "lineage": lineage,
                "ledger_id": ledger,
                "announced_at": now,
                "confirmed_at": now,
            }
        )
        rows[Participation].append(
            {
                "id": participation,
                "job_id": job_id,
                "dataset_id": dataset,
                "state": ParticipationState.APPROVED,
                "declared_rows": 300,
                "created_at": now,
            }
        )
        rows[Grant].append(
            {
                "participation_id": participation,
                "purpose": "research",
                "expires_at": now + timedelta(days=1),
                "rounds": 10,
                "granted_by": principal,
                "granted_at": now,
                "by_rule": True,
            }
        )
        members.append(Member(worker, participation, key.shown))
    for model, values in rows.items():
        await session.execute(insert(model), values)
    return tuple(members)
