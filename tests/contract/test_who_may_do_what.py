"""Every operation against every kind of caller. A new operation fails here until somebody says whose it is.

Asked for by: vantage6 GHSA-gc57-xhh5-m94r (a nested route skipped the second permission), NVFlare GHSA-jqp3-qrgh-4846
(user management without a key), OWASP API1 and API5.
"""

import asyncio
from typing import Any, Final, NamedTuple
from uuid import UUID

import httpx
import pytest

from app.database import clock, open_engine, open_sessions
from app.models import Checkpoint, Participation, Round, Task
from isthmus.client import Client
from isthmus.testing import sample_spec
from isthmus.wire.datasets import DatasetView
from isthmus.wire.organizations import ROLE_SCOPES, CreateApiKey, Role, Scope
from isthmus.wire.problems import PROBLEMS, ProblemCode
from isthmus.wire.rounds import RoundPhase, TaskKind
from isthmus.wire.version import PROBLEM_MEDIA_TYPE
from tests.running import Platform

ADMIN, RESEARCHER, STEWARD, WORKER = Role.ADMIN, Role.RESEARCHER, Role.STEWARD, Role.WORKER
READERS: Final = (ADMIN, RESEARCHER, STEWARD)


class Door(NamedTuple):
    """Whom an operation lets in: these roles, with a key that has one of these scopes (none: any key)."""

    roles: tuple[Role, ...]
    scopes: frozenset[Scope] = frozenset()


def door(roles: tuple[Role, ...], *scopes: Scope) -> Door:
    return Door(roles, frozenset(scopes))


ANYBODY: Final = door(tuple(Role))
PLATFORM: Final = door((ADMIN,), Scope.PLATFORM)
JOBS_READ: Final = door(READERS, Scope.JOBS_READ)
JOBS_WRITE: Final = door((RESEARCHER,), Scope.JOBS_WRITE)
DATASETS_READ: Final = door(READERS, Scope.DATASETS_READ)
EITHER_SIDE: Final = door(READERS, Scope.DATASETS_READ, Scope.JOBS_READ)
BOOKS: Final = door((ADMIN, STEWARD), Scope.DATASETS_READ)
DATASETS_WRITE: Final = door((STEWARD,), Scope.DATASETS_WRITE)
GRANTS_WRITE: Final = door((STEWARD,), Scope.GRANTS_WRITE)
TASKS: Final = door((WORKER,), Scope.TASKS)

DIGEST: Final = "1" * 64
WITHOUT_A_KEY: Final = frozenset({"GET /healthz", "GET /readyz", "GET /v1/service", "POST /v1/workers"})
DOORS: Final = {
    "POST /v1/organizations": PLATFORM,
    "GET /v1/organizations": PLATFORM,
    "GET /v1/organizations/{}": PLATFORM,
    "POST /v1/organizations/{}/enrollment-tokens": door((ADMIN, STEWARD), Scope.PLATFORM, Scope.DATASETS_WRITE),
    "POST /v1/principals": PLATFORM,
    "GET /v1/principals": PLATFORM,
    "GET /v1/principals/{}": PLATFORM,
    "POST /v1/principals/{}/disable": PLATFORM,
    "GET /v1/me": ANYBODY,
    "POST /v1/api-keys": door(READERS),
    "GET /v1/api-keys": ANYBODY,
    "POST /v1/api-keys/{}/rotate": ANYBODY,
    "POST /v1/api-keys/{}/revoke": ANYBODY,
    "GET /metrics": door((ADMIN,), Scope.PLATFORM),
    "GET /v1/events": door((ADMIN, STEWARD), Scope.PLATFORM, Scope.DATASETS_READ),
    "GET /v1/workers": BOOKS,
    "GET /v1/workers/{}": BOOKS,
    "POST /v1/workers/{}/revoke": DATASETS_WRITE,
    "PUT /v1/datasets/{}": TASKS,
    "GET /v1/datasets": DATASETS_READ,
    "GET /v1/datasets/{}": DATASETS_READ,
    "POST /v1/datasets/{}/confirm": DATASETS_WRITE,
    "POST /v1/datasets/{}/retire": DATASETS_WRITE,
    "PUT /v1/datasets/{}/policy": DATASETS_WRITE,
    "GET /v1/datasets/{}/ledger": BOOKS,
    "GET /v1/participations": EITHER_SIDE,
    "GET /v1/participations/{}": EITHER_SIDE,
    "POST /v1/participations/{}/approve": GRANTS_WRITE,
    "POST /v1/participations/{}/reject": GRANTS_WRITE,
    "POST /v1/participations/{}/withdraw": GRANTS_WRITE,
    "POST /v1/jobs": JOBS_WRITE,
    "GET /v1/jobs": JOBS_READ,
    "GET /v1/jobs/{}": JOBS_READ,
    "PUT /v1/jobs/{}/model": JOBS_WRITE,
    "GET /v1/jobs/{}/model": JOBS_READ,
    "POST /v1/jobs/{}/start": JOBS_WRITE,
    "POST /v1/jobs/{}/pause": JOBS_WRITE,
    "POST /v1/jobs/{}/resume": JOBS_WRITE,
    "POST /v1/jobs/{}/cancel": JOBS_WRITE,
    "GET /v1/jobs/{}/participations": JOBS_READ,
    "GET /v1/jobs/{}/rounds": JOBS_READ,
    "GET /v1/jobs/{}/rounds/{}": JOBS_READ,
    "GET /v1/jobs/{}/metrics": JOBS_READ,
    "GET /v1/jobs/{}/privacy": JOBS_READ,
    "GET /v1/jobs/{}/checkpoints": JOBS_READ,
    "GET /v1/jobs/{}/events": JOBS_READ,
    "GET /v1/checkpoints/{}": door(tuple(Role), Scope.JOBS_READ, Scope.TASKS),
    "POST /v1/tasks/claim": TASKS,
    "GET /v1/tasks/{}": TASKS,
    "POST /v1/tasks/{}/heartbeat": TASKS,
    "PUT /v1/tasks/{}/update": TASKS,
    "POST /v1/tasks/{}/steps/{}": TASKS,
    "POST /v1/tasks/{}/refuse": TASKS,
    "POST /v1/tasks/{}/fail": TASKS,
}


class Operation(NamedTuple):
    """One operation of the OpenAPI document, with a request that names things of somebody else."""

    name: str
    method: str
    path: str
    sends: bool
    described: dict[str, Any]

    def send(self, http: httpx.Client) -> httpx.Response:
        if self.path.endswith("/update") or (self.method == "PUT" and self.path.endswith("/model")):
            headers = {
                "Content-Type": "application/vnd.safetensors",
                "Repr-Digest": f"sha-256=:{'A' * 43}=:",
                "Isthmus-Fence": "1",
            }
            return http.request(self.method, self.path, content=b"\0" * 8, headers=headers)
        if "/steps/" in self.path:
            headers = {"Content-Type": "application/vnd.isthmus.secagg", "Isthmus-Fence": "1"}
            return http.request(self.method, self.path, content=b"\0" * 8, headers=headers)
        params = {"/v1/events": {"stream": "platform"}, "/v1/tasks/claim": {"wait": "0"}}.get(self.path)
        return http.request(self.method, self.path, params=params, json={} if self.sends else None)


class World(NamedTuple):
    """A running service where everything there is belongs to somebody else."""

    platform: Platform
    operations: list[Operation]
    callers: dict[Role, Client]


async def take_part(platform: Platform, dataset: DatasetView, job_id: UUID) -> dict[str, UUID]:
    """A participation of the dataset in the job, a round with a task for it, and a checkpoint, as rows."""
    engine = open_engine(platform.database_url, connections=2)
    async with open_sessions(engine).begin() as session:
        now = await clock(session)
        participation = Participation(job_id=job_id, dataset_id=dataset.id, declared_rows=1, created_at=now)
        round_ = Round(
            job_id=job_id,
            number=1,
            kind=TaskKind.TRAIN,
            phase=RoundPhase.CANCELLED,
            attempts=1,
            cohort_seed=DIGEST,
            cohort_size=2,
            target_updates=2,
            min_updates=2,
            model_digest=DIGEST,
            opened_at=now,
            closes_at=now,
            grace_s=0.0,
        )
        session.add_all([participation, round_])
        session.add(Checkpoint(job_id=job_id, round_number=0, digest=DIGEST, size_bytes=1, created_at=now))
        await session.flush()
        task = Task(
            job_id=job_id,
            round_id=round_.id,
            participation_id=participation.id,
            worker_id=dataset.worker_id,
            kind=TaskKind.TRAIN,
            offered_at=now,
        )
        session.add(task)
        await session.flush()
        ids = {"participation_id": participation.id, "task_id": task.id}
    await engine.dispose()
    return ids


@pytest.fixture
def world(platform: Platform) -> World:
    """Two organizations: one owns what there is, the callers come from the other."""
    owner, other = platform.organization(), platform.organization()
    steward, worker = platform.steward(owner), platform.worker(owner)
    dataset = platform.dataset(worker)
    job = platform.researcher().jobs.create(sample_spec())
    ids = {
        **asyncio.run(take_part(platform, dataset, job.id)),
        "job_id": job.id,
        "organization_id": owner.id,
        "principal_id": steward.me().principal.id,
        "key_id": steward.me().key_id,
        "worker_id": worker.me().worker_id,
        "dataset_id": dataset.id,
        "digest": DIGEST,
        "number": 1,
        "name": "heart",
        "step": "keys",
    }
    document = platform.http().get("/openapi.json").json()
    operations = []
    for path, methods in document["paths"].items():
        named = {part.strip("{}") for part in path.split("/") if part.startswith("{")}
        filled = path.format(**{name: ids[name] for name in named})
        general = "/".join("{}" if part.startswith("{") else part for part in path.split("/"))
        for method, described in methods.items():
            name = f"{method.upper()} {general}"
            operations.append(Operation(name, method.upper(), filled, "requestBody" in described, described))
    callers = {
        ADMIN: platform.client_of(platform.principal(ADMIN)),
        RESEARCHER: platform.researcher(),
        STEWARD: platform.steward(other),
        WORKER: platform.worker(other),
    }
    return World(platform, operations, callers)


def code_of(answer: httpx.Response) -> str:
    """The problem's code; every refusal is a problem of the catalogue with its status."""
    assert answer.headers["content-type"] == PROBLEM_MEDIA_TYPE, answer.text
    code = ProblemCode(answer.json()["code"])
    assert PROBLEMS[code].status == answer.status_code
    return code.value


def test_somebody_said_whose_every_operation_is(world: World) -> None:
    found = {operation.name for operation in world.operations}

    assert found - set(DOORS) - WITHOUT_A_KEY == set()
    assert set(DOORS) - found == set()


def test_without_a_key_there_is_no_entry(world: World) -> None:
    http = world.platform.http()
    forged = world.platform.http()
    forged.headers["Authorization"] = f"Bearer isk_{'0' * 16}_{'0' * 49}"

    for operation in world.operations:
        if operation.name not in WITHOUT_A_KEY:
            for client in (http, forged):
                answer = operation.send(client)
                assert (code_of(answer), operation.name) == ("unauthenticated", operation.name)


@pytest.mark.parametrize("role", list(Role))
def test_a_key_of_another_role_gets_nothing(world: World, role: Role) -> None:
    http = world.platform.http(world.callers[role])

    for operation in world.operations:
        if operation.name in DOORS and role not in DOORS[operation.name].roles:
            answer = operation.send(http)
            assert answer.status_code in (403, 404), (operation.name, answer.status_code, answer.text)
            assert code_of(answer) in ("forbidden", "not-found")


@pytest.mark.parametrize("role", READERS)
def test_a_key_without_the_scope_gets_nothing(world: World, role: Role) -> None:
    """For every operation that the role may do: a key that has all the role's scopes but those that open it."""
    wide = world.callers[role]
    clients: dict[frozenset[Scope], httpx.Client] = {}

    for operation in world.operations:
        opens = DOORS.get(operation.name, ANYBODY)
        left = ROLE_SCOPES[role] - opens.scopes
        if role in opens.roles and opens.scopes and left:
            if left not in clients:
                issued = wide.keys.create(CreateApiKey(scopes=tuple(sorted(left))))
                clients[left] = world.platform.http(world.platform.client(issued.key))
            answer = operation.send(clients[left])
            assert (answer.status_code, operation.name) == (403, operation.name)
            assert code_of(answer) == "forbidden"


@pytest.mark.parametrize("role", [RESEARCHER, STEWARD, WORKER])
def test_what_belongs_to_others_is_not_there(world: World, role: Role) -> None:
    """The right role with an id of another organization: refused, and as if there were nothing of that id."""
    http = world.platform.http(world.callers[role])

    for operation in world.operations:
        if "{}" in operation.name and operation.name != "PUT /v1/datasets/{}":
            answer = operation.send(http)
            assert 400 <= answer.status_code < 500, (operation.name, answer.status_code)
            assert code_of(answer) in ("forbidden", "not-found", "invalid-request"), operation.name


def test_every_operation_says_what_it_does_and_what_it_refuses(world: World) -> None:
    for operation in world.operations:
        described = operation.described
        assert described.get("summary"), operation.name
        assert described.get("description", "").endswith("."), operation.name
        assert described.get("tags"), operation.name
        if operation.name in DOORS:
            assert {"401", "403", "422"} <= set(described["responses"]), operation.name
            assert described.get("security"), operation.name
