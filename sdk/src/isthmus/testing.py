"""For the tests of organizations: a service that answers what it was told to, and samples of what it could answer.

    service = FakeService()
    service.answer("GET", "/v1/me", sample_me())
    service.refuse("POST", "/v1/tasks/claim", ProblemCode.KEY_EXPIRED)
    with service.client() as client:
        client.me()
    assert service.requests[0].path == "/v1/me"

It stands where the network would be, so that the real client with its retries and errors is what runs.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple, TypeVar
from uuid import UUID

import httpx
from pydantic import BaseModel

from isthmus.client import Client, Clock, Retries
from isthmus.privacy.chain import entry_hash
from isthmus.privacy.rdp import ORDERS, ORDERS_VERSION
from isthmus.wire.data import ColumnKind, ColumnSchema, DatasetSchema
from isthmus.wire.datasets import DatasetState, DatasetView, UsePolicy
from isthmus.wire.events import GENESIS, EventKind, EventView, event_hash
from isthmus.wire.jobs import GrantView, JobSpec, JobState, JobView, ParticipationState, ParticipationView
from isthmus.wire.ledger import LedgerEntryView, LedgerKind
from isthmus.wire.manifest import Manifest
from isthmus.wire.organizations import ROLE_SCOPES, ApiKeyView, Me, OrganizationView, PrincipalView, Role
from isthmus.wire.privacy import DatasetPrivacy, PrivacyMode, PrivacyPlan, PrivacyReport, PrivacyUnit
from isthmus.wire.problems import ProblemCode, problem
from isthmus.wire.rounds import (
    ModelReference,
    RoundMetrics,
    RoundPhase,
    RoundView,
    TaskKind,
    TaskOffer,
    TaskState,
    TaskView,
    task_manifest,
)
from isthmus.wire.version import EVENTS_MEDIA_TYPE, PROBLEM_MEDIA_TYPE, TENSORS_MEDIA_TYPE
from isthmus.wire.workers import WorkerView

BASE_URL: Final = "https://isthmus.test"
NOW: Final = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)
SEED: Final = "5e" * 32

Respond = Callable[[httpx.Request], httpx.Response]
Canned = BaseModel | Sequence[BaseModel] | bytes | Respond | None
View = TypeVar("View", bound=BaseModel)


class Received(NamedTuple):
    """One request as the fake saw it. `body` is empty where it was refused before it was read."""

    method: str
    path: str
    query: dict[str, str]
    headers: httpx.Headers
    body: bytes

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


class FakeService(httpx.BaseTransport):
    """Answers by method and path; `*` in a path stands for one segment. What nobody told it of is not found.

    Several answers to the same question are given in turn, the last one for ever.
    """

    def __init__(self) -> None:
        self.requests: list[Received] = []
        self._answers: dict[tuple[str, str], list[Respond]] = defaultdict(list)
        self._refused_unread: set[Respond] = set()

    def answer(
        self, method: str, path: str, *canned: Canned, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        """Answer with models, lists (one page), bytes (a model file), nothing (204), or what a function makes."""
        for body in canned:
            self._answers[method, path].append(body if callable(body) else _respond(body, status, headers))

    def refuse(
        self, method: str, path: str, code: ProblemCode, detail: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        """Answer with a problem of the catalogue, without reading the body: an update is then not admitted."""
        document = problem(code, detail or f"The fake was told to answer {code}.")
        respond = _respond(document, document.status, {"Content-Type": PROBLEM_MEDIA_TYPE, **(headers or {})})
        self._refused_unread.add(respond)
        self._answers[method, path].append(respond)

    def stream(self, path: str, events: Sequence[EventView]) -> None:
        """Answer GET with server-sent events to whoever asks for them, else with a page."""
        page = _respond(events, 200, None)

        def respond(request: httpx.Request) -> httpx.Response:
            if request.headers.get("Accept") != EVENTS_MEDIA_TYPE:
                return page(request)
            after = int(request.headers.get("Last-Event-ID", "0"))
            sent = [
                f"id: {event.sequence}\nevent: {event.kind}\ndata: {event.model_dump_json()}\n\n"
                for event in events
                if event.sequence > after
            ]
            return httpx.Response(200, headers={"Content-Type": EVENTS_MEDIA_TYPE}, content="".join(sent).encode())

        self._answers["GET", path].append(respond)

    def client(self, api_key: str | None = "isk_test_key", retries: Retries | None = None) -> Client:
        """A client of this service that does not sleep between retries."""
        clock = Clock(sleep=lambda _seconds: None, chance=lambda: 0.0, now=lambda: NOW)
        return Client(BASE_URL, api_key, retries=retries, transport=self, clock=clock)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """The seam of httpx."""
        respond = self._next(request.method, request.url.path)
        body = b"" if respond in self._refused_unread else request.read()
        query = dict(request.url.params)
        self.requests.append(Received(request.method, request.url.path, query, request.headers, body))
        return respond(request)

    def _next(self, method: str, path: str) -> Respond:
        for (known, pattern), left in self._answers.items():
            if known == method and re.fullmatch(re.escape(pattern).replace(r"\*", "[^/]+"), path):
                return left.pop(0) if len(left) > 1 else left[0]
        missing = problem(ProblemCode.NOT_FOUND, f"The fake was told of no {method} {path}.")
        return _respond(missing, missing.status, {"Content-Type": PROBLEM_MEDIA_TYPE})


def _respond(
    body: BaseModel | Sequence[BaseModel] | bytes | None, status: int, headers: Mapping[str, str] | None
) -> Respond:
    more = dict(headers or {})
    if body is None:
        return lambda _request: httpx.Response(204 if status == 200 else status, headers=more)
    if isinstance(body, bytes):
        return lambda _request: httpx.Response(
            status, headers={"Content-Type": TENSORS_MEDIA_TYPE} | more, content=body
        )
    if isinstance(body, BaseModel):
        content = body.model_dump_json(by_alias=True).encode()
    else:
        items = [item.model_dump(mode="json", by_alias=True) for item in body]
        content = json.dumps({"items": items, "next_cursor": None}).encode()
    return lambda _request: httpx.Response(status, headers={"Content-Type": "application/json"} | more, content=content)


def _changed(view: View, changes: dict[str, Any]) -> View:
    """`view` with other values, checked as if they had come over the wire."""
    return type(view).model_validate({**{name: getattr(view, name) for name in type(view).model_fields}, **changes})


def sample_id(number: int) -> UUID:
    """An id that is easy to tell from others."""
    return UUID(int=(0x0197 << 112) | (0x7 << 76) | (0x8 << 60) | number)


def sample_spec(**changes: Any) -> JobSpec:
    """A small job: one linear layer on two features."""
    fields: dict[str, Any] = {
        "name": "heart",
        "model": {"layers": [{"linear": {"in": 2, "out": 2}}]},
        "data": {"task": "classification", "features": ["age", "bp"], "target": "disease", "classes": 2},
        "training": {"optimizer": {"sgd": {"lr": 0.1}}, "epochs": 1},
        "privacy": "none",
        "rounds": 2,
        "seed": SEED,
    }
    return JobSpec.model_validate({**fields, **changes})


def sample_organization(name: str = "charite", **changes: Any) -> OrganizationView:
    """An organization."""
    view = OrganizationView(id=sample_id(1), name=name, display_name=name.title(), created_at=NOW)
    return _changed(view, changes)


def sample_principal(role: Role = Role.RESEARCHER, **changes: Any) -> PrincipalView:
    """A principal."""
    view = PrincipalView(
        id=sample_id(2),
        name="ada",
        display_name="Ada",
        role=role,
        organization_id=sample_id(1) if role in (Role.STEWARD, Role.WORKER) else None,
        created_at=NOW,
        disabled_at=None,
    )
    return _changed(view, changes)


def sample_key(**changes: Any) -> ApiKeyView:
    """An API key without its secret."""
    view = ApiKeyView(
        id="k1",
        principal_id=sample_id(2),
        label="key",
        scopes=sorted(ROLE_SCOPES[Role.RESEARCHER]),
        created_at=NOW,
        expires_at=None,
        revoked_at=None,
        last_used_at=None,
    )
    return _changed(view, changes)


def sample_me(role: Role = Role.RESEARCHER) -> Me:
    """What `/v1/me` answers a principal of `role`."""
    principal = sample_principal(role)
    return Me(
        principal=principal,
        organization=sample_organization() if principal.organization_id is not None else None,
        key_id="k1",
        scopes=sorted(ROLE_SCOPES[role]),
        worker_id=None,
    )


def sample_worker(**changes: Any) -> WorkerView:
    """An enrolled worker."""
    view = WorkerView(
        id=sample_id(3),
        organization_id=sample_id(1),
        organization="charite",
        name="agent-1",
        public_key="ab" * 32,
        version="0.1.0",
        enrolled_at=NOW,
        last_seen_at=NOW,
        revoked_at=None,
    )
    return _changed(view, changes)


def sample_dataset(**changes: Any) -> DatasetView:
    """A confirmed dataset that fits `sample_spec`."""
    columns = [ColumnSchema(name=name, kind=ColumnKind.NUMBER) for name in ("age", "bp", "disease")]
    view = DatasetView(
        id=sample_id(4),
        organization_id=sample_id(1),
        organization="charite",
        name="heart",
        worker_id=sample_id(3),
        worker="agent-1",
        state=DatasetState.CONFIRMED,
        data_schema=DatasetSchema(columns=tuple(columns)),
        rows=303,
        task_kinds=["statistics", "train", "evaluate"],
        description="Heart disease",
        policy=UsePolicy(purposes=("research",), modes=(PrivacyMode.RECORD, PrivacyMode.NONE)),
        announced_policy=UsePolicy(purposes=("research",), modes=(PrivacyMode.RECORD, PrivacyMode.NONE)),
        lineage="1e" * 32,
        ledger_lineage="1e" * 32,
        budget=None,
        announced_at=NOW,
        confirmed_at=NOW,
    )
    return _changed(view, changes)


def sample_ledger(*kinds: LedgerKind) -> list[LedgerEntryView]:
    """A ledger of the sample dataset, one entry of each kind given, chained as the service chains them."""
    entries: list[LedgerEntryView] = []
    for sequence, kind in enumerate(kinds, start=1):
        spend = kind is LedgerKind.SPEND
        entry = LedgerEntryView(
            id=sample_id(100 + sequence),
            sequence=sequence,
            kind=kind,
            lineage="1e" * 32,
            dataset_id=sample_id(4),
            job_id=sample_id(5),
            participation_id=sample_id(6),
            round_number=sequence if spend else None,
            release="train" if spend else None,
            mode="record",
            event={"kind": "gaussian", "noise_multiplier": 4.0, "sensitivity": 1.0},
            orders_version=ORDERS_VERSION,
            rdp_nano=[62_500_000 * sequence] * len(ORDERS),
            draws=6,
            elements=6,
            digest="ab" * 32 if spend else None,
            reserved_epsilon=2.5,
            spent_epsilon=0.25 * sequence,
            created_at=NOW,
            previous_hash=entries[-1].hash if entries else GENESIS,
            hash="",
        )
        entries.append(entry.model_copy(update={"hash": entry_hash(entry)}))
    return entries


def sample_report(**changes: Any) -> PrivacyReport:
    """A privacy report of the sample job, with privacy of records."""
    plan = PrivacyPlan(
        unit=PrivacyUnit.RECORD,
        where=None,
        epsilon=2.999,
        budget_epsilon=2.999,
        delta=1e-5,
        clip_norm=1.0,
        noise_multiplier=2.841,
        sampling_probability=0.132,
        expected_batch=32.0,
        steps_per_round=8,
        statistics_noise_multiplier=None,
        evaluation_noise_multiplier=None,
    )
    site = DatasetPrivacy(
        organization="charite",
        dataset="heart",
        state=ParticipationState.APPROVED,
        declared_rows=303,
        plan=plan,
        epsilon_spent=1.25,
        epsilon_person=2.999,
        epsilon_reference=2.61,
        rounds_released=5,
        releases=6,
    )
    view = PrivacyReport(
        job_id=sample_id(5),
        job="heart",
        job_state=JobState.RUNNING,
        unit=PrivacyUnit.RECORD,
        where=None,
        mechanism="DP-SGD",
        adjacency="one record more or less",
        guarantee="Nobody can tell whether one record was there.",
        accountant="Renyi divergences",
        delta=1e-5,
        max_orgs_per_person=1,
        assumptions=["the worker is honest"],
        not_protected=["what is true of everybody"],
        released=["the update of each round"],
        datasets=[site],
    )
    return _changed(view, changes)


def sample_job(state: JobState = JobState.RUNNING, **changes: Any) -> JobView:
    """A job over `sample_spec`."""
    spec = sample_spec()
    view = JobView(
        id=sample_id(5),
        name=spec.name,
        owner="ada",
        state=state,
        reason=None,
        detail=None,
        spec=spec,
        spec_digest="cd" * 32,
        manifest=sample_manifest(),
        rounds_completed=0,
        current_round=1 if state is JobState.RUNNING else None,
        model_digest="ef" * 32,
        statistics=None,
        created_at=NOW,
        started_at=NOW,
        ended_at=None,
    )
    return _changed(view, changes)


def sample_manifest() -> Manifest:
    """The manifest of `sample_spec`'s model."""
    spec = sample_spec()
    return spec.model.plan(spec.data.input_shape).manifest


def sample_participation(
    state: ParticipationState = ParticipationState.APPROVED, organization: str = "charite", **changes: Any
) -> ParticipationView:
    """One dataset's part in `sample_job`."""
    grant = GrantView(
        purpose="research",
        expires_at=NOW + timedelta(days=30),
        rounds=2,
        rounds_used=0,
        granted_by="grace",
        granted_at=NOW,
        by_rule=False,
    )
    view = ParticipationView(
        id=sample_id(6),
        job_id=sample_id(5),
        job="heart",
        dataset_id=sample_id(4),
        dataset="heart",
        organization=organization,
        state=state,
        detail=None,
        declared_rows=303,
        grant=grant if state is ParticipationState.APPROVED else None,
        requested_by="ada",
        purpose="research",
        created_at=NOW,
    )
    return _changed(view, changes)


def sample_task(state: TaskState = TaskState.OFFERED, organization: str = "charite", **changes: Any) -> TaskView:
    """One organization's task in `sample_round`."""
    held = state in (TaskState.CLAIMED, TaskState.UPLOADING)
    view = TaskView(
        id=sample_id(7),
        kind=TaskKind.TRAIN,
        state=state,
        round_number=1,
        attempt=1,
        fence=1,
        organization=organization,
        dataset="heart",
        worker="agent-1" if held else None,
        detail=None,
        offered_at=NOW,
        lease_expires_at=NOW + timedelta(seconds=15) if held else None,
    )
    return _changed(view, changes)


def sample_round(phase: RoundPhase = RoundPhase.COLLECTING, **changes: Any) -> RoundView:
    """The first round of `sample_job`."""
    view = RoundView(
        id=sample_id(8),
        job_id=sample_id(5),
        number=1,
        kind=TaskKind.TRAIN,
        phase=phase,
        attempt=1,
        cohort_seed=SEED,
        cohort_size=3,
        target_updates=3,
        min_updates=2,
        accepted=0,
        detail=None,
        model_digest="ef" * 32,
        result_digest=None,
        metrics={},
        opened_at=NOW,
        closes_at=NOW + timedelta(minutes=10),
        completed_at=None,
        tasks=[],
        updates=[],
    )
    return _changed(view, changes)


def sample_metrics(number: int = 1, **changes: Any) -> RoundMetrics:
    """What a round of `sample_job` measured."""
    view = RoundMetrics(
        round_number=number,
        kind=TaskKind.TRAIN,
        measured_round=number - 1,
        duration_s=0.5,
        accepted=3,
        pooled={"holdout/loss": 0.7 / number, "holdout/accuracy": 1 - 0.5 / number},
        sites=[],
    )
    return _changed(view, changes)


def sample_offer(**changes: Any) -> TaskOffer:
    """A training task as a worker gets it."""
    spec = sample_spec()
    model = sample_manifest()
    view = TaskOffer(
        task_id=sample_id(7),
        kind=TaskKind.TRAIN,
        fence=1,
        lease_s=15,
        heartbeat_s=5,
        job_id=sample_id(5),
        job=spec.name,
        spec=spec,
        spec_digest="cd" * 32,
        requested_by="ada",
        purpose="research",
        grant_expires_at=NOW + timedelta(days=30),
        grant_rounds=2,
        participation_id=sample_id(6),
        organization="charite",
        dataset="heart",
        round_number=1,
        attempt=1,
        closes_at=NOW + timedelta(minutes=10),
        job_seed=SEED,
        model=ModelReference(url=f"/v1/checkpoints/{'ef' * 32}", digest="ef" * 32, size_bytes=1000),
        model_manifest=model,
        upload_manifest=task_manifest(TaskKind.TRAIN, spec, 1, model),
        statistics=None,
        plan=None,
    )
    return _changed(view, changes)


def sample_events(*kinds: EventKind) -> Iterator[EventView]:
    """A chain of events of `sample_job`, one of each kind given."""
    stream = f"job:{sample_id(5)}"
    previous = GENESIS
    for sequence, kind in enumerate(kinds, start=1):
        found = event_hash(
            stream=stream, sequence=sequence, kind=kind, at=NOW, actor="service", data={}, previous_hash=previous
        )
        yield EventView(
            id=sample_id(100 + sequence),
            stream=stream,
            sequence=sequence,
            kind=kind,
            at=NOW,
            actor="service",
            data={},
            previous_hash=previous,
            hash=found,
        )
        previous = found
