"""The client of an Isthmus service: one method per endpoint, synchronous, over httpx.

    with Client("https://isthmus.example.org", "isk_...") as client:
        for job in client.jobs.list():
            print(job.name, job.state)

Methods take and give the models of `isthmus.wire`. Lists are read page by page as they are needed (`list`), or one page
at a time (`page`). What goes wrong is an `IsthmusError`; see `isthmus.client.errors`. Nothing here imports NumPy.
"""

import isthmus.client._lean_httpx  # noqa: F401  # isort: skip  -- before anything imports httpx

from isthmus.client._client import Client
from isthmus.client._retry import NO_RETRIES, Clock, Retries
from isthmus.client._transfer import Progress
from isthmus.client.errors import BadResponse, IsthmusError, Refused, TimedOut, Unreachable
from isthmus.client.tasks import NoWork

__all__ = [
    "NO_RETRIES", "BadResponse", "Client", "Clock", "IsthmusError", "NoWork", "Progress", "Refused", "Retries",
    "TimedOut", "Unreachable",
]  # fmt: skip
