"""An agent that takes its steps until something is so."""

import time
from collections.abc import Callable

from isthmus_worker.journal import Journal
from isthmus_worker.loop import Agent, Outcome
from tests.worker.fake_service import FakeService

LONG_S = 40.0


def identity_of(agent: Agent) -> bytes:
    """The worker's public key."""
    return agent.state.identity().public_key().public_bytes_raw()


def until(
    agent: Agent, found: Callable[[], bool], instead: Callable[[], object] | None = None, wait_s: int = 1
) -> list[Outcome]:
    """Have the agent step (or call `instead`) until something is so; what its steps came to."""
    ends, outcomes = time.monotonic() + LONG_S, list[Outcome]()
    while not found():
        assert time.monotonic() < ends, outcomes[:3] + outcomes[-3:]
        if instead is None:
            outcomes.append(agent.step(wait_s))
        else:
            instead()
            time.sleep(0.01)
    return outcomes


def finish(agent: Agent, service: FakeService) -> list[Outcome]:
    """Have the agent step until it has served all that is offered and no secured round is open."""
    outcomes = list[Outcome]()

    def done() -> bool:
        waits = service.offers or agent._secured.are_open or agent._claims.are_open
        return bool(outcomes) and not waits and outcomes[-1] is Outcome.IDLE

    until(agent, done, lambda: outcomes.append(agent.step(1)))
    return outcomes


def reborn(agent: Agent) -> Agent:
    """The agent of the next start, on the same state directory: what was in the memory of the last one is gone."""
    agent.close()
    agent.journal.close()
    journal = Journal.open(agent.state)
    journal.verify()
    journal.recover()
    again = Agent(
        agent.settings, agent.state, agent.credentials, agent.client, journal, agent.trainer, sleep=agent.sleep
    )
    again._served, again._accounts = agent._served, agent._accounts
    again.settle()
    return again
