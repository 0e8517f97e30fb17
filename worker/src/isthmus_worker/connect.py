"""A client for the service that the configuration names."""

import ssl
from typing import Final

from isthmus.client import Client, Retries
from isthmus_worker.settings import Settings

WHILE_IT_RESTARTS: Final = Retries(attempts=15, first_wait_s=0.1, longest_wait_s=0.5, total_s=5.0)
"""A killed service is back within seconds: for so long it is asked often; then the agent's own waits double."""


def connect(settings: Settings, api_key: str | None, *, timeout_s: float = 30.0) -> Client:
    """The client, trusting `ca_file` instead of the usual certificates where one is given."""
    tls = ssl.create_default_context(cafile=settings.ca_file) if settings.ca_file is not None else None
    return Client(settings.service_url, api_key, timeout_s=timeout_s, tls=tls, retries=WHILE_IT_RESTARTS)
