"""Whoever holds API keys."""

from collections.abc import Iterator
from uuid import UUID, uuid4

from isthmus.client._service import Service
from isthmus.wire.base import Page
from isthmus.wire.organizations import CreatePrincipal, PrincipalView


class Principals:
    """`client.principals`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def create(self, body: CreatePrincipal, *, idempotency_key: str | None = None) -> PrincipalView:
        """A new admin, researcher or steward, without a key yet."""
        return self._service.ask(
            "POST", "principals", PrincipalView, body, idempotency_key=idempotency_key or uuid4().hex
        )

    def list(self) -> Iterator[PrincipalView]:
        """Every principal; pages are read as they are needed."""
        return self._service.pages("principals", Page[PrincipalView])

    def page(self, *, limit: int | None = None, cursor: str | None = None) -> Page[PrincipalView]:
        """One page of the list."""
        return self._service.ask("GET", "principals", Page[PrincipalView], query={"limit": limit, "cursor": cursor})

    def get(self, principal_id: UUID) -> PrincipalView:
        """One principal."""
        return self._service.ask("GET", f"principals/{principal_id}", PrincipalView)

    def disable(self, principal_id: UUID) -> PrincipalView:
        """Shut a principal out, with all keys."""
        return self._service.ask("POST", f"principals/{principal_id}/disable", PrincipalView)
