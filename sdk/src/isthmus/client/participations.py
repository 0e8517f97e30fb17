"""Datasets' parts in jobs, and the grants on them."""

from collections.abc import Iterator
from uuid import UUID

from isthmus.client._service import Service
from isthmus.wire.base import Page
from isthmus.wire.jobs import (
    ApproveParticipation,
    ParticipationState,
    ParticipationView,
    RejectParticipation,
    WithdrawParticipation,
)


class Participations:
    """`client.participations`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def list(
        self, *, job_id: UUID | None = None, state: ParticipationState | None = None
    ) -> Iterator[ParticipationView]:
        """Every participation that this key may see; pages are read as they are needed."""
        return self._service.pages("participations", Page[ParticipationView], _of(job_id, state))

    def page(
        self,
        *,
        job_id: UUID | None = None,
        state: ParticipationState | None = None,
        limit: int | None = None,
        cursor: str | None = None,
    ) -> Page[ParticipationView]:
        """One page of the list."""
        query = {**_of(job_id, state), "limit": limit, "cursor": cursor}
        return self._service.ask("GET", "participations", Page[ParticipationView], query=query)

    def get(self, participation_id: UUID) -> ParticipationView:
        """One participation."""
        return self._service.ask("GET", f"participations/{participation_id}", ParticipationView)

    def approve(self, participation_id: UUID, body: ApproveParticipation | None = None) -> ParticipationView:
        """Grant the use of the dataset. What the grant leaves out is taken from the job."""
        return self._service.ask(
            "POST", f"participations/{participation_id}/approve", ParticipationView, body or ApproveParticipation()
        )

    def reject(self, participation_id: UUID, body: RejectParticipation) -> ParticipationView:
        """Refuse the use of the dataset."""
        return self._service.ask("POST", f"participations/{participation_id}/reject", ParticipationView, body)

    def withdraw(self, participation_id: UUID, body: WithdrawParticipation) -> ParticipationView:
        """Take a grant back, in the middle of the job if need be."""
        return self._service.ask("POST", f"participations/{participation_id}/withdraw", ParticipationView, body)


def _of(job_id: UUID | None, state: ParticipationState | None) -> dict[str, str | None]:
    return {"job_id": str(job_id) if job_id is not None else None, "state": state}
