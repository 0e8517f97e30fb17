"""Processes that the tests of simulation share."""

from collections.abc import Iterator

import pytest

from tests.worker.simulation.cases import POOLS


@pytest.fixture(scope="session", autouse=True)
def _pools_end() -> Iterator[None]:
    yield
    while POOLS:
        POOLS.popitem()[1].close()
