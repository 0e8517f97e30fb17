"""Training jobs: their life, their models, their rounds and what was measured."""

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Final
from uuid import UUID, uuid4

from isthmus.client._answers import decode
from isthmus.client._events import follow_events, past_events
from isthmus.client._service import Service
from isthmus.client._transfer import Progress, digest_of_file, download, pieces
from isthmus.wire.base import Page, format_repr_digest
from isthmus.wire.events import EventView
from isthmus.wire.jobs import CancelJob, CreateJob, JobSpec, JobState, JobView, ParticipationView
from isthmus.wire.privacy import PrivacyReport
from isthmus.wire.rounds import CheckpointView, RoundMetrics, RoundView
from isthmus.wire.version import DIGEST_HEADER, TENSORS_MEDIA_TYPE

UPLOAD_TIMEOUT_S: Final = 300.0
"""The service checks a whole model before it answers."""


class Jobs:
    """`client.jobs`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def create(self, spec: JobSpec, *, idempotency_key: str | None = None) -> JobView:
        """A new job as a draft. Upload its initial model, then start it; `isthmus.submission` does all three."""
        return self._service.ask(
            "POST", "jobs", JobView, CreateJob(spec=spec), idempotency_key=idempotency_key or uuid4().hex
        )

    def list(self, *, state: JobState | None = None) -> Iterator[JobView]:
        """Every job that this key may see; pages are read as they are needed."""
        return self._service.pages("jobs", Page[JobView], {"state": state})

    def page(
        self, *, state: JobState | None = None, limit: int | None = None, cursor: str | None = None
    ) -> Page[JobView]:
        """One page of the list."""
        query = {"state": state, "limit": limit, "cursor": cursor}
        return self._service.ask("GET", "jobs", Page[JobView], query=query)

    def get(self, job_id: UUID) -> JobView:
        """One job and where it stands."""
        return self._service.ask("GET", f"jobs/{job_id}", JobView)

    def start(self, job_id: UUID) -> JobView:
        """Ask the stewards for their datasets; the job runs once enough have approved."""
        return self._service.ask("POST", f"jobs/{job_id}/start", JobView)

    def pause(self, job_id: UUID) -> JobView:
        """Open no further round. What is claimed may finish."""
        return self._service.ask("POST", f"jobs/{job_id}/pause", JobView)

    def resume(self, job_id: UUID) -> JobView:
        """Go on after a pause."""
        return self._service.ask("POST", f"jobs/{job_id}/resume", JobView)

    def cancel(self, job_id: UUID, body: CancelJob | None = None) -> JobView:
        """End a job for good."""
        return self._service.ask("POST", f"jobs/{job_id}/cancel", JobView, body or CancelJob())

    def participations(self, job_id: UUID) -> Iterator[ParticipationView]:
        """Which datasets were asked, and what became of it; pages are read as they are needed."""
        return self._service.pages(f"jobs/{job_id}/participations", Page[ParticipationView])

    def rounds(self, job_id: UUID) -> Iterator[RoundView]:
        """Every round with its tasks and updates; pages are read as they are needed."""
        return self._service.pages(f"jobs/{job_id}/rounds", Page[RoundView])

    def round(self, job_id: UUID, number: int) -> RoundView:
        """One round with its tasks and updates."""
        return self._service.ask("GET", f"jobs/{job_id}/rounds/{number}", RoundView)

    def metrics(self, job_id: UUID) -> Iterator[RoundMetrics]:
        """What each round measured; pages are read as they are needed."""
        return self._service.pages(f"jobs/{job_id}/metrics", Page[RoundMetrics])

    def privacy(self, job_id: UUID) -> PrivacyReport:
        """What the job promises about the records behind it, what was spent of it, and what it does not protect."""
        return self._service.ask("GET", f"jobs/{job_id}/privacy", PrivacyReport)

    def privacy_page(self, job_id: UUID) -> str:
        """The same as a page in HTML, to read and to print."""
        path = f"jobs/{job_id}/privacy"
        return self._service.send("GET", path, headers={"Accept": "text/html"}).body.decode()

    def checkpoints(self, job_id: UUID) -> Iterator[CheckpointView]:
        """The model after each round, by digest; pages are read as they are needed."""
        return self._service.pages(f"jobs/{job_id}/checkpoints", Page[CheckpointView])

    def events(self, job_id: UUID, *, after: int = 0, follow: bool = True) -> Iterator[EventView]:
        """The job's story after event number `after`, each event once and in order.

        With `follow` it waits for what comes, takes up a cut connection where it was, and ends with the job; without,
        it gives what there is.
        """
        if follow:
            return follow_events(self._service, job_id, after)
        return past_events(self._service, job_id, after)

    def upload_model(self, job_id: UUID, model: Path | bytes, *, progress: Progress | None = None) -> JobView:
        """Give a draft its initial model, as safetensors. Repeating the call is safe."""
        if isinstance(model, bytes):
            digest, size = sha256(model).hexdigest(), len(model)
        else:
            digest, size = digest_of_file(model), model.stat().st_size
        path = f"jobs/{job_id}/model"
        answer = self._service.send(
            "PUT",
            path,
            headers={
                "Content-Type": TENSORS_MEDIA_TYPE,
                "Content-Length": str(size),
                DIGEST_HEADER: format_repr_digest(digest),
            },
            content=lambda: pieces(model, progress),
            timeout_s=max(UPLOAD_TIMEOUT_S, self._service.timeout_s),
        )
        return decode(answer, JobView, self._service.address(path))

    def download_model(self, job_id: UUID, path: Path, *, progress: Progress | None = None) -> str:
        """Write the newest checkpoint to `path`, verified and durable; its digest. A cut is resumed."""
        return download(self._service, f"jobs/{job_id}/model", path, progress=progress)
