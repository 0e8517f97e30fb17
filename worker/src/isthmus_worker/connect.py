"""A client for the service that the configuration names."""

import ssl

from isthmus.client import Client
from isthmus_worker.settings import Settings


def connect(settings: Settings, api_key: str | None, *, timeout_s: float = 30.0) -> Client:
    """The client, trusting `ca_file` instead of the usual certificates where one is given."""
    tls = ssl.create_default_context(cafile=settings.ca_file) if settings.ca_file is not None else None
    return Client(settings.service_url, api_key, timeout_s=timeout_s, tls=tls)
