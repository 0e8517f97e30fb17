"""Agents at organizations."""

from collections.abc import Iterator
from uuid import UUID

from isthmus.client._service import Service
from isthmus.wire.base import Page
from isthmus.wire.workers import EnrollWorker, WorkerEnrolled, WorkerView


class Workers:
    """`client.workers`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def enroll(self, body: EnrollWorker) -> WorkerEnrolled:
        """Introduce a worker. No key is needed: the one-time token is the credential, and it is spent by this call."""
        return self._service.ask("POST", "workers", WorkerEnrolled, body)

    def list(self) -> Iterator[WorkerView]:
        """Every worker that this key may see; pages are read as they are needed."""
        return self._service.pages("workers", Page[WorkerView])

    def page(self, *, limit: int | None = None, cursor: str | None = None) -> Page[WorkerView]:
        """One page of the list."""
        return self._service.ask("GET", "workers", Page[WorkerView], query={"limit": limit, "cursor": cursor})

    def get(self, worker_id: UUID) -> WorkerView:
        """One worker."""
        return self._service.ask("GET", f"workers/{worker_id}", WorkerView)

    def revoke(self, worker_id: UUID) -> WorkerView:
        """Shut a worker out."""
        return self._service.ask("POST", f"workers/{worker_id}/revoke", WorkerView)
