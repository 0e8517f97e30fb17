"""The client: one method per endpoint, grouped by noun."""

import ssl
from types import TracebackType
from typing import Final, Self

import httpx

from isthmus.client._retry import Clock, Retries
from isthmus.client._service import Service
from isthmus.client.checkpoints import Checkpoints
from isthmus.client.datasets import Datasets
from isthmus.client.events import Events
from isthmus.client.jobs import Jobs
from isthmus.client.keys import Keys
from isthmus.client.organizations import Organizations
from isthmus.client.participations import Participations
from isthmus.client.principals import Principals
from isthmus.client.tasks import Tasks
from isthmus.client.workers import Workers
from isthmus.wire.organizations import Me
from isthmus.wire.workers import ServiceIdentity


class Client:
    """A service at an address, spoken to with one key. Safe to share between threads; close it when done.

    Args:
        base_url: where the service is, as `https://isthmus.example.org`.
        api_key: `isk_...`; None: only what needs no key (`service`, `workers.enroll`).
        timeout_s: bound on connecting and on every wait for the service, long polls apart.
        retries: how often and how long a call is repeated; see `Retries`.
        transport: what requests go through instead of the network, in tests.
        tls: trust other certificates than the usual ones.
        clock: the time, in tests.

    Raises:
        ValueError: `base_url` is no address of a service.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        timeout_s: float = 30.0,
        retries: Retries | None = None,
        transport: httpx.BaseTransport | None = None,
        tls: ssl.SSLContext | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._service: Final = Service(
            base_url,
            api_key,
            timeout_s=timeout_s,
            retries=retries or Retries(),
            clock=clock or Clock(),
            transport=transport,
            tls=tls,
        )
        self.organizations: Final = Organizations(self._service)
        self.principals: Final = Principals(self._service)
        self.keys: Final = Keys(self._service)
        self.workers: Final = Workers(self._service)
        self.datasets: Final = Datasets(self._service)
        self.participations: Final = Participations(self._service)
        self.jobs: Final = Jobs(self._service)
        self.tasks: Final = Tasks(self._service)
        self.checkpoints: Final = Checkpoints(self._service)
        self.events: Final = Events(self._service)

    @property
    def base_url(self) -> str:
        """Where the service is."""
        return self._service.base_url

    def me(self) -> Me:
        """Who the service takes the caller for."""
        return self._service.ask("GET", "me", Me)

    def service(self) -> ServiceIdentity:
        """Who signs receipts here, and which contract is spoken. Needs no key."""
        return self._service.ask("GET", "service", ServiceIdentity)

    def close(self) -> None:
        """Give the connections back."""
        self._service.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
