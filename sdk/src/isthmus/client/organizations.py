"""Data holders, and the tokens with which their workers enrol."""

from collections.abc import Iterator
from uuid import UUID, uuid4

from isthmus.client._service import Service
from isthmus.wire.base import Page
from isthmus.wire.organizations import (
    CreateEnrollmentToken,
    CreateOrganization,
    EnrollmentTokenIssued,
    OrganizationView,
)


class Organizations:
    """`client.organizations`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def create(self, body: CreateOrganization, *, idempotency_key: str | None = None) -> OrganizationView:
        """Admit a data holder to the platform."""
        return self._service.ask(
            "POST", "organizations", OrganizationView, body, idempotency_key=idempotency_key or uuid4().hex
        )

    def list(self) -> Iterator[OrganizationView]:
        """Every organization; pages are read as they are needed."""
        return self._service.pages("organizations", Page[OrganizationView])

    def page(self, *, limit: int | None = None, cursor: str | None = None) -> Page[OrganizationView]:
        """One page of the list."""
        return self._service.ask(
            "GET", "organizations", Page[OrganizationView], query={"limit": limit, "cursor": cursor}
        )

    def get(self, organization_id: UUID) -> OrganizationView:
        """One organization."""
        return self._service.ask("GET", f"organizations/{organization_id}", OrganizationView)

    def issue_enrollment_token(
        self,
        organization_id: UUID,
        body: CreateEnrollmentToken | None = None,
        *,
        idempotency_key: str | None = None,
    ) -> EnrollmentTokenIssued:
        """A token with which one worker may enrol, once. It is shown only here."""
        return self._service.ask(
            "POST",
            f"organizations/{organization_id}/enrollment-tokens",
            EnrollmentTokenIssued,
            body or CreateEnrollmentToken(),
            idempotency_key=idempotency_key or uuid4().hex,
        )
