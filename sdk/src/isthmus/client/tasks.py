"""A worker's work: claim, heartbeat, model, update."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final
from uuid import UUID

from isthmus.client._admission import EXPECT_S, put_when_admitted
from isthmus.client._answers import Answer, decode, failure_of, retry_after_s
from isthmus.client._service import Service, read_answer
from isthmus.client._streaming import LARGE_BYTES, streamed
from isthmus.client._transfer import Progress, download, pieces
from isthmus.client.errors import BadResponse
from isthmus.wire.base import format_repr_digest
from isthmus.wire.rounds import (
    ClaimTask,
    FailTask,
    Heartbeat,
    HeartbeatReceipt,
    ModelReference,
    RefuseTask,
    TaskOffer,
    TaskView,
    UpdateReceipt,
)
from isthmus.wire.secured import Step
from isthmus.wire.version import DIGEST_HEADER, FENCE_HEADER, SECAGG_MEDIA_TYPE, TENSORS_MEDIA_TYPE

UPDATE_TIMEOUT_S: Final = 120.0
"""For a wait of the socket while an update is handed in: the service makes it durable before it answers."""


@dataclass(frozen=True, slots=True)
class NoWork:
    """Nothing to do just now; the service asks to come back after so long."""

    retry_after_s: float


class Tasks:
    """`client.tasks`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def claim(self, body: ClaimTask | None = None, *, wait_s: int = 30) -> TaskOffer | NoWork:
        """Wait up to `wait_s` for work. An answer lost on the way is claimed again by repeating the call."""
        answer = self._service.send(
            "POST",
            "tasks/claim",
            body or ClaimTask(),
            query={"wait": wait_s},
            repeatable=True,
            timeout_s=wait_s + self._service.timeout_s,
        )
        if answer.status == 204:
            return NoWork(retry_after_s(answer.headers, self._service.clock.now()) or 0.0)
        return decode(answer, TaskOffer, self._service.address("tasks/claim"))

    def get(self, task_id: UUID) -> TaskView:
        """One task."""
        return self._service.ask("GET", f"tasks/{task_id}", TaskView)

    def heartbeat(self, task_id: UUID, body: Heartbeat) -> HeartbeatReceipt:
        """The training process lives; the lease is renewed. Not repeated by itself: the next one is due anyway."""
        return self._service.ask("POST", f"tasks/{task_id}/heartbeat", HeartbeatReceipt, body)

    def refuse(self, task_id: UUID, body: RefuseTask) -> TaskView:
        """The worker's policy or data says no: final for this round."""
        return self._service.ask("POST", f"tasks/{task_id}/refuse", TaskView, body)

    def fail(self, task_id: UUID, body: FailTask) -> TaskView:
        """The work broke."""
        return self._service.ask("POST", f"tasks/{task_id}/fail", TaskView, body)

    def exchange(self, task_id: UUID, step: Step, message: bytes, *, fence: int, wait_s: int = 30) -> bytes | None:
        """Send my message for a step of a secured round, and wait up to `wait_s` for what its closing gives.

        Repeating the call with the same message is safe; another one for the same step is refused.

        Returns:
            The answer's bytes (see `isthmus.secagg.messages`); None: the step is still open, so call again.
        """
        route = f"tasks/{task_id}/steps/{step.value}"
        answer = self._service.send(
            "POST",
            route,
            query={"wait": wait_s},
            headers={"Content-Type": SECAGG_MEDIA_TYPE, FENCE_HEADER: str(fence)},
            content=lambda: message,
            repeatable=True,
            timeout_s=wait_s + self._service.timeout_s,
        )
        return None if answer.status == 202 else answer.body

    def download_model(self, model: ModelReference, path: Path, *, progress: Progress | None = None) -> str:
        """Write the round's model to `path` once its bytes have the digest that the offer names.

        It is not synced: whoever finds the file after a power cut looks at its digest again.

        Raises:
            BadResponse: also where the address leads away from the service: a worker asks nobody else, and its key
                goes nowhere else.
        """
        url = model.url.removeprefix(self._service.base_url)
        if not url.startswith("/") or url.startswith("//"):
            raise BadResponse(f"the model is said to be at {model.url}, which is not the service's")
        own = model.size_bytes >= LARGE_BYTES and not self._service.own_transport
        return download(
            self._service,
            url,
            path,
            digest=model.digest,
            max_bytes=model.size_bytes,
            progress=progress,
            durable=False,
            opened=partial(streamed, timeout_s=self._service.timeout_s, tls=self._service.tls) if own else None,
        )

    def submit_update(
        self,
        task_id: UUID,
        path: Path,
        *,
        digest: str,
        fence: int,
        on_admitted: Callable[[], None],
        progress: Progress | None = None,
        expect_s: float = EXPECT_S,
    ) -> UpdateReceipt:
        """Hand in the update in the file at `path`. Repeating the call with the same bytes is safe, for ever.

        Args:
            digest: SHA-256 of the file, in hexadecimal.
            on_admitted: called at most once, between admission and the first byte of the body: write the spend into
                the worker's ledger here. Not called where the service refuses at once, nor where it has these bytes
                already and answers with their receipt. After `expect_s` seconds of silence it is called too, because
                some proxies swallow `Expect`: the ledger may show more than the service's, never less.

        Returns:
            The receipt; `isthmus.client.receipts.verify_receipt` checks its signature.

        Raises:
            Refused: also when the refusal comes in the middle of the body.
            Unreachable, TimedOut: whether the update was admitted is known by `on_admitted`; whether it arrived, by
                repeating the call. Nothing is repeated in here.
        """
        route = f"tasks/{task_id}/update"
        headers = {
            "Content-Type": TENSORS_MEDIA_TYPE,
            DIGEST_HEADER: format_repr_digest(digest),
            FENCE_HEADER: str(fence),
        }
        address = self._service.address(route)
        if self._service.own_transport:
            answer = self._put_in_a_test(address, path, headers, on_admitted, progress)
        else:
            answer = put_when_admitted(
                address,
                path,
                {**self._service.headers, **headers},
                on_admitted=on_admitted,
                progress=progress,
                timeout_s=max(UPDATE_TIMEOUT_S, self._service.timeout_s),
                expect_s=expect_s,
                tls=self._service.tls,
            )
        if not 200 <= answer.status < 300:
            raise failure_of(answer, address, self._service.clock.now())
        receipt = decode(answer, UpdateReceipt, address)
        if receipt.task_id != task_id or receipt.digest != digest:
            raise BadResponse(f"{address} gave a receipt for other bytes or another task")
        return receipt

    def _put_in_a_test(
        self,
        address: str,
        path: Path,
        headers: dict[str, str],
        on_admitted: Callable[[], None],
        progress: Progress | None,
    ) -> Answer:
        """A transport that was given to the client admits an update by beginning to read its body."""

        def body() -> Iterator[bytes]:
            on_admitted()
            yield from pieces(path, progress)

        length = {"Content-Length": str(path.stat().st_size), "Expect": "100-continue"}
        with self._service.translated(address):
            request = self._service.http.build_request("PUT", address, headers={**headers, **length}, content=body())
            response = self._service.http.send(request, stream=True)
            try:
                return read_answer(response)
            finally:
                response.close()
