"""The part of the service that a worker sees, in this process, with the moods that a real one may have."""

import base64
import json
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BaseModel

from isthmus.wire.problems import ProblemCode, problem
from isthmus.wire.rounds import TaskOffer, UpdateReceipt, receipt_bytes
from isthmus.wire.secured import Step
from isthmus.wire.version import FENCE_HEADER, SECAGG_MEDIA_TYPE
from tests.worker.factories import ORGANIZATION, make_model
from tests.worker.secured_round import SecuredRound

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)


@dataclass
class FakeService:
    """What the service knows and how it behaves. Tests set its moods and read what it heard."""

    url: str = ""
    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    offers: deque[TaskOffer] = field(default_factory=deque)
    models: dict[str, bytes] = field(default_factory=dict)
    secured: dict[UUID, SecuredRound] = field(default_factory=dict)
    """By task: the round that it is part of."""
    # moods
    admission: ProblemCode | None = None
    claim_refusal: ProblemCode | None = None
    held: bool = True
    cut_uploads: int = 0
    """So many admitted uploads are cut before their receipt."""
    forged: bool = False
    """Receipts are signed by another key."""
    # what was heard
    claims: int = 0
    holding: list[list[str]] = field(default_factory=list)
    """What each claim said that the worker is at."""
    announced: dict[str, Any] = field(default_factory=dict)
    heartbeats: list[dict[str, Any]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    admitted: list[str] = field(default_factory=list)
    """Digests, in the order of admission."""
    updates: dict[UUID, bytes] = field(default_factory=dict)
    authorizations: set[str] = field(default_factory=set)

    @property
    def public_key(self) -> str:
        """What workers pin."""
        return self.key.public_key().public_bytes_raw().hex()

    def offer(self, offer: TaskOffer) -> None:
        """Have this task claimed next."""
        model, _ = make_model(offer.spec)
        self.models[offer.model.digest] = model
        self.offers.append(offer)

    def offer_secured(self, round_: SecuredRound, **changes: Any) -> TaskOffer:
        """Have the real member's task of a secured round claimed next."""
        offer = round_.offer(**changes)
        self.secured[offer.task_id] = round_
        self.offer(offer)
        return offer

    def receipt(self, task_id: UUID, digest: str) -> UpdateReceipt:
        """A receipt for bytes that are here."""
        key = Ed25519PrivateKey.generate() if self.forged else self.key
        return UpdateReceipt(
            task_id=task_id,
            digest=digest,
            received_at=NOW,
            signature=key.sign(receipt_bytes(task_id, digest, NOW)).hex(),
        )


@contextmanager
def fake_service() -> Iterator[FakeService]:
    """A service on a port of its own."""
    service = FakeService()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"service": service}))
    server.daemon_threads = True
    service.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    service: FakeService
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        parts = urlsplit(self.path).path.split("/")
        if parts[-2] == "checkpoints" and parts[-1] in self.service.models:
            model = self.service.models[parts[-1]]
            self._answer(200, model, {"ETag": f'"{parts[-1]}"', "Repr-Digest": _digest_header(model)})
        elif parts[-1] == "service":
            self._json(200, {"service_public_key": self.service.public_key, "contract_version": "1.0", "version": "0"})
        elif parts[-1] == "me":
            self._json(200, _me())
        elif parts[-1] == "healthz":
            self._json(200, {"status": "ok"})
        else:
            self._refuse(ProblemCode.NOT_FOUND)

    def do_POST(self) -> None:
        self.service.authorizations.add(self.headers.get("Authorization", ""))
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = urlsplit(self.path).path.split("/")
        if parts[-2] == "steps":
            self._step(UUID(parts[-3]), Step(parts[-1]), sent)
            return
        body = json.loads(sent or b"{}")
        if parts[-1] == "claim":
            self.service.holding.append(body["holding"])
            self._claim()
        elif parts[-1] == "workers":
            self._json(
                201, {"worker": _worker(body), "api_key": "isk_made_up", "service_public_key": self.service.public_key}
            )
        elif parts[-1] == "heartbeat":
            self.service.heartbeats.append(body)
            self._json(
                200, {"held": self.service.held, "lease_s": 15.0, "reason": None if self.service.held else "cancelled"}
            )
        else:
            {"refuse": self.service.refused, "fail": self.service.failed}[parts[-1]].append(body["reason"])
            self._json(200, _task(parts[-2], "refused" if parts[-1] == "refuse" else "failed"))

    def do_PUT(self) -> None:
        parts = urlsplit(self.path).path.split("/")
        length = int(self.headers["Content-Length"])
        if parts[-1] == "update":
            body = self.rfile.read(length)
            if self.service.cut_uploads > 0:
                self.service.cut_uploads -= 1
                self.close_connection = True
                return
            self.service.updates[UUID(parts[-2])] = body
            self._json(200, self.service.receipt(UUID(parts[-2]), sha256(body).hexdigest()))
        else:
            body = json.loads(self.rfile.read(length))
            self.service.announced[parts[-1]] = body
            self._json(200, _dataset(parts[-1], body))

    def handle_expect_100(self) -> bool:
        task_id = UUID(urlsplit(self.path).path.split("/")[-2])
        digest = base64.b64decode(self.headers["Repr-Digest"].split(":")[1]).hex()
        known = self.service.updates.get(task_id)
        if known is not None and sha256(known).hexdigest() == digest:
            self._json(200, self.service.receipt(task_id, digest))
            self.close_connection = True
            return False
        if self.service.admission is not None:
            self._refuse(self.service.admission)
            self.close_connection = True
            return False
        self.service.admitted.append(digest)
        return super().handle_expect_100()

    def _step(self, task_id: UUID, step: Step, message: bytes) -> None:
        round_ = self.service.secured[task_id]
        assert self.headers["Content-Type"] == SECAGG_MEDIA_TYPE
        upload = self.service.updates.get(task_id)
        answer = round_.hear(step, message, fence=int(self.headers[FENCE_HEADER]), upload=upload)
        if answer is None:
            time.sleep(0.02)
            self._answer(202, b"", {"Retry-After": "0"})
        elif isinstance(answer, ProblemCode):
            self._refuse(answer)
        else:
            self._answer(200, answer, {"Content-Type": SECAGG_MEDIA_TYPE})

    def _claim(self) -> None:
        self.service.claims += 1
        if self.service.claim_refusal is not None:
            self._refuse(self.service.claim_refusal)
            return
        if self.service.offers:
            self._json(200, self.service.offers.popleft())
            return
        time.sleep(0.05)
        self._answer(204, b"", {"Retry-After": "0"})

    def _refuse(self, code: ProblemCode) -> None:
        body = problem(code, "because the test says so")
        self._answer(body.status, body.model_dump_json().encode(), {"Content-Type": "application/problem+json"})

    def _json(self, status: int, body: BaseModel | dict[str, Any]) -> None:
        data = body.model_dump_json(by_alias=True) if isinstance(body, BaseModel) else json.dumps(body)
        self._answer(status, data.encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _digest_header(body: bytes) -> str:
    return f"sha-256=:{base64.b64encode(sha256(body).digest()).decode()}:"


def _worker(body: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": str(UUID(int=9)), "organization_id": str(UUID(int=8)), "organization": ORGANIZATION, "name": body["name"],
        "public_key": body["public_key"], "version": body["version"], "enrolled_at": NOW.isoformat(),
        "last_seen_at": None, "revoked_at": None,
    }  # fmt: skip


def _dataset(name: str, body: dict[str, Any]) -> dict[str, Any]:
    return {
        **body, "id": str(UUID(int=7)), "organization_id": str(UUID(int=8)), "organization": ORGANIZATION, "name": name,
        "worker_id": str(UUID(int=9)), "worker": "w", "state": "announced",
        "announced_policy": body["policy"], "ledger_lineage": body["lineage"], "budget": None,
        "announced_at": NOW.isoformat(), "confirmed_at": None,
    }  # fmt: skip


def _task(task_id: str, state: str) -> dict[str, Any]:
    return {
        "id": task_id, "kind": "train", "state": state, "round_number": 1, "attempt": 1, "fence": 1,
        "organization": ORGANIZATION, "dataset": "patients", "worker": "w", "detail": None,
        "offered_at": NOW.isoformat(), "lease_expires_at": None,
    }  # fmt: skip


def _me() -> dict[str, Any]:
    principal = {
        "id": str(UUID(int=6)), "name": "w", "display_name": "w", "role": "worker", "organization_id": None,
        "created_at": NOW.isoformat(), "disabled_at": None,
    }  # fmt: skip
    return {"principal": principal, "organization": None, "key_id": "k", "scopes": [], "worker_id": str(UUID(int=9))}
