"""API keys."""

from collections.abc import Iterator
from uuid import UUID, uuid4

from isthmus.client._service import Service, segment
from isthmus.wire.base import Page
from isthmus.wire.organizations import ApiKeyIssued, ApiKeyView, CreateApiKey, RotateApiKey


class Keys:
    """`client.keys`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def create(self, body: CreateApiKey | None = None, *, idempotency_key: str | None = None) -> ApiKeyIssued:
        """A further key; its secret is shown only here. Repeated with the same idempotency key it is refused."""
        return self._service.ask(
            "POST", "api-keys", ApiKeyIssued, body or CreateApiKey(), idempotency_key=idempotency_key or uuid4().hex
        )

    def list(self, *, principal_id: UUID | None = None) -> Iterator[ApiKeyView]:
        """Every key, or those of one principal, without their secrets; pages are read as they are needed."""
        return self._service.pages("api-keys", Page[ApiKeyView], _of(principal_id))

    def page(
        self, *, principal_id: UUID | None = None, limit: int | None = None, cursor: str | None = None
    ) -> Page[ApiKeyView]:
        """One page of the list."""
        return self._service.ask(
            "GET", "api-keys", Page[ApiKeyView], query={**_of(principal_id), "limit": limit, "cursor": cursor}
        )

    def rotate(self, key_id: str, body: RotateApiKey | None = None) -> ApiKeyIssued:
        """Issue a successor; the old key stays alive for a while. Not repeated by itself: each call is a new key."""
        return self._service.ask("POST", f"api-keys/{segment(key_id)}/rotate", ApiKeyIssued, body or RotateApiKey())

    def revoke(self, key_id: str) -> ApiKeyView:
        """End a key at once."""
        return self._service.ask("POST", f"api-keys/{segment(key_id)}/revoke", ApiKeyView)


def _of(principal_id: UUID | None) -> dict[str, str | None]:
    return {"principal_id": str(principal_id) if principal_id is not None else None}
