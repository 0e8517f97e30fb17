"""How long an agent waits for work."""

from typing import Any

import pytest

from app.settings import Settings
from isthmus.client import NoWork
from isthmus_worker.loop import Agent

POLLS = 60


class _Enough(Exception):
    pass


def test_an_agent_waits_no_longer_than_the_service_lets_it_and_not_always_as_long(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[int] = []

    def claim(_body: Any, *, wait_s: int) -> NoWork:
        waits.append(wait_s)
        if len(waits) == POLLS:
            raise _Enough
        return NoWork(0.0)

    monkeypatch.setattr(agent.client.tasks, "claim", claim)
    agent.sleep = lambda _seconds: None

    with pytest.raises(_Enough):
        agent.run()

    longest = Settings.model_fields["longest_wait"].default.total_seconds()
    assert 30 <= min(waits) < max(waits) <= longest
