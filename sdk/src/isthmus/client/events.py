"""The chains of events of organizations and of the platform. Those of a job are at `client.jobs.events`."""

from collections.abc import Iterator

from isthmus.client._service import Service
from isthmus.wire.base import Page
from isthmus.wire.events import EventView


class Events:
    """`client.events`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def list(self, stream: str) -> Iterator[EventView]:
        """Every event of a stream (`platform`, `organization:<id>`); pages are read as they are needed."""
        return self._service.pages("events", Page[EventView], {"stream": stream})

    def page(self, stream: str, *, limit: int | None = None, cursor: str | None = None) -> Page[EventView]:
        """One page of a stream."""
        query = {"stream": stream, "limit": limit, "cursor": cursor}
        return self._service.ask("GET", "events", Page[EventView], query=query)
