"""A job's events as they happen: server-sent events, taken up again where they were cut."""

import logging
from collections.abc import Iterator
from typing import Final
from uuid import UUID

import httpx
from httpx_sse import EventSource, SSEError
from pydantic import ValidationError

from isthmus.client._retry import backoff_s
from isthmus.client._service import Service, raise_translated
from isthmus.client.errors import BadResponse, IsthmusError, Refused, Unreachable
from isthmus.wire.base import Page
from isthmus.wire.events import EventKind, EventView
from isthmus.wire.jobs import JobState, JobView
from isthmus.wire.version import EVENTS_MEDIA_TYPE

SILENCE_S: Final = 45.0
"""The service sends a comment every 15 s. After three of them are missing the connection is taken for dead."""

FINAL_EVENTS: Final = frozenset({EventKind.JOB_COMPLETED, EventKind.JOB_FAILED, EventKind.JOB_CANCELLED})
KNOWN_EVENTS: Final = frozenset(kind.value for kind in EventKind)
FINAL_STATES: Final = frozenset({JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED})

_log: Final = logging.getLogger("isthmus.client")


def past_events(service: Service, job_id: UUID, after: int) -> Iterator[EventView]:
    """The events after number `after` that there are now."""
    for event in service.pages(f"jobs/{job_id}/events", Page[EventView], {"after": after or None}):
        if event.sequence > after:
            yield event


def follow_events(service: Service, job_id: UUID, after: int) -> Iterator[EventView]:
    """The events after number `after`, each once and in order, until the job's final one.

    A cut connection is taken up again with `Last-Event-ID`. Attempts that bring nothing are counted; when as many as
    the client's retries allow have failed one after the other, the last error is raised.
    """
    failures = quiet = 0
    while True:
        before = after
        failure: httpx.TransportError | IsthmusError | None = None
        try:
            for event in _connected(service, job_id, after):
                if event.sequence > after:
                    after = event.sequence
                    yield event
                    if event.kind in FINAL_EVENTS:
                        return
        except (httpx.TransportError, Unreachable, Refused) as error:
            if isinstance(error, Refused) and error.status not in (429, 503):
                raise
            failure = error
        if after > before:
            failures = quiet = 0
        elif failure is None and service.ask("GET", f"jobs/{job_id}", JobView).state in FINAL_STATES:
            yield from past_events(service, job_id, after)  # what came between the end of the stream and the question
            return
        if failure is not None:
            failures += 1
            if failures >= service.retries.attempts:
                if isinstance(failure, httpx.HTTPError):
                    raise_translated(failure, service.address(f"jobs/{job_id}/events"))
                raise failure
        quiet += 1
        asked_s = failure.retry_after_s if isinstance(failure, Refused) else None
        service.clock.sleep(max(asked_s or 0.0, backoff_s(service.retries, quiet, service.clock.chance())))


def _connected(service: Service, job_id: UUID, after: int) -> Iterator[EventView]:
    headers = {"Accept": EVENTS_MEDIA_TYPE, "Cache-Control": "no-store"}
    if after:
        headers["Last-Event-ID"] = str(after)
    path = f"jobs/{job_id}/events"
    with service.stream(path, headers=headers, read_timeout_s=SILENCE_S) as response:
        try:
            for sent in EventSource(response).iter_sse():
                if not sent.data:
                    continue
                if sent.event not in KNOWN_EVENTS:
                    _log.warning("%s: an event of a kind unknown here is skipped: %s", path, sent.event)
                    continue
                yield EventView.model_validate_json(sent.data)
        except SSEError as error:
            raise BadResponse(f"{service.address(path)}: {error}") from None
        except ValidationError as error:
            raise BadResponse(f"{service.address(path)} sent no event: {error.errors()[0]['msg']}") from None
