"""A worker that is killed in the middle of a secured round goes on with the same bytes, or not at all."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from isthmus.codec.arrays import read
from isthmus.secagg import server
from isthmus.wire.problems import ProblemCode
from isthmus.wire.secured import Step
from isthmus_worker.journal import key_of
from isthmus_worker.loop import Agent, Outcome
from isthmus_worker.secured.records import SessionState, session_key
from isthmus_worker.trainer import Trainer
from tests.worker.factories import DISTRIBUTED, LINEAGE, make_secured_spec
from tests.worker.fake_service import FakeService
from tests.worker.secured_round import SecuredRound
from tests.worker.stepping import LONG_S, finish, identity_of, reborn, until


@contextmanager
def next_start(agent: Agent) -> Iterator[Agent]:
    again = reborn(agent)
    try:
        yield again
    finally:
        again.close()
        again.journal.close()


def assert_the_sum_is_right(agent: Agent, secured: SecuredRound) -> None:
    release = agent.journal.find(key_of(secured.offer()))
    assert release is not None
    assert release.vector is not None
    assert np.array_equal(secured.mine().view(np.uint32), read(release.vector)["vector"])
    assert agent.journal.sessions.find(session_key(secured.offer())) is None


@pytest.mark.parametrize(
    ("step", "state"),
    [
        (Step.KEYS, SessionState.KEYS),
        (Step.SHARES, SessionState.SHARES),
        (Step.UPDATE, SessionState.SUBMITTED),
        (Step.SURVIVORS, SessionState.SIGNED),
        (Step.UNMASK, SessionState.REVEALED),
    ],
)
def test_killed_while_it_waits_for_a_step_it_sends_the_same_messages_again(
    agent: Agent, service: FakeService, step: Step, state: SessionState
) -> None:
    secured = SecuredRound(identity_of(agent), make_secured_spec(**DISTRIBUTED))
    secured.refusals[step] = ProblemCode.NOT_READY
    offer = service.offer_secured(secured)
    until(agent, lambda: bool(secured.messages(step)))
    assert agent.journal.sessions.get(session_key(offer)).state is state

    with next_start(agent) as again:
        secured.refusals.clear()
        if state in (SessionState.KEYS, SessionState.SHARES):
            secured.fence += 1  # it said that it holds nothing
            service.offer_secured(secured)
        finish(again, service)

        assert_the_sum_is_right(again, secured)
        for each in Step:
            assert len(set(secured.messages(each))) == 1, each
        assert len(set(service.admitted)) == 1
        assert len(again.journal.ledgers.entries(LINEAGE)) == 1
        again.journal.verify()


@pytest.mark.parametrize("admitted", [False, True])
@pytest.mark.parametrize("file_is_left", [False, True])
def test_killed_while_it_hands_in_it_sends_the_same_masked_update(
    agent: Agent, service: FakeService, monkeypatch: pytest.MonkeyPatch, admitted: bool, file_is_left: bool
) -> None:
    secured = SecuredRound(identity_of(agent))
    offer = service.offer_secured(secured)
    asked = list[str]()

    class Killed(BaseException):
        pass

    def cut(*_: object, digest: str, on_admitted: object, **__: object) -> None:
        asked.append(digest)
        if admitted:
            assert callable(on_admitted)
            on_admitted()
        raise Killed

    monkeypatch.setattr(agent.client.tasks, "submit_update", cut)
    with pytest.raises(Killed):
        until(agent, lambda: False)
    monkeypatch.undo()
    if not file_is_left:
        (masked,) = agent.state.masked.iterdir()
        masked.unlink()
    service.admission = ProblemCode.LEASE_LOST  # it was offered again before we asked

    with next_start(agent) as again:
        assert again.journal.sessions.get(session_key(offer)).state is SessionState.MASKED
        service.admission = None
        secured.fence += 1
        service.offer_secured(secured)
        finish(again, service)

        assert asked == service.admitted
        assert_the_sum_is_right(again, secured)


def test_a_receipt_that_was_lost_is_fetched_at_the_next_start_and_the_session_goes_on_without_an_offer(
    agent: Agent, service: FakeService
) -> None:
    service.forged = True
    secured = SecuredRound(identity_of(agent))
    service.offer_secured(secured)
    assert Outcome.KEPT in finish(agent, service)
    service.forged = False

    with next_start(agent) as again:
        finish(again, service)

        assert_the_sum_is_right(again, secured)
        assert len(service.admitted) == 1


def test_killed_in_training_it_trains_again_under_the_same_keys(
    agent: Agent, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    secured = SecuredRound(identity_of(agent))
    service.offer_secured(secured)

    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        until(agent, lambda: bool(secured.messages(Step.SHARES)), agent._secured.tick)
        raise Killed

    monkeypatch.setattr(agent.trainer, "work", killed)
    with pytest.raises(Killed):
        agent.step()
    monkeypatch.undo()

    with next_start(agent) as again:
        secured.fence += 1
        service.offer_secured(secured)
        finish(again, service)

        assert_the_sum_is_right(again, secured)
        assert len(set(secured.messages(Step.KEYS))) == 1


def test_an_attempt_that_moved_on_meanwhile_has_new_secrets_and_the_same_vector(
    agent: Agent, service: FakeService
) -> None:
    first = SecuredRound(identity_of(agent), held={Step.SHARES})
    offer = service.offer_secured(first)
    assert agent.step() is Outcome.PARKED
    release = agent.journal.find(key_of(offer))
    assert release is not None
    secrets = agent.journal.sessions.get(session_key(offer)).secrets

    with next_start(agent) as again:
        second = first.next_attempt()
        service.offer_secured(second)
        finish(again, service)

        assert_the_sum_is_right(again, second)
        found = again.journal.find(key_of(offer))
        assert found is not None
        assert found.digest == release.digest
        assert first.messages(Step.KEYS) != second.messages(Step.KEYS)
        assert not any(secrets[:32] in path.read_bytes() for path in again.state.root.glob("journal.sqlite*"))


def test_a_second_set_of_survivors_after_a_restart_is_never_signed(agent: Agent, service: FakeService) -> None:
    """It is not even asked for: what was signed is in the journal."""
    secured = SecuredRound(identity_of(agent), members=6)
    secured.refusals[Step.SURVIVORS] = ProblemCode.NOT_READY
    service.offer_secured(secured)
    until(agent, lambda: bool(secured.messages(Step.SURVIVORS)))

    with next_start(agent) as again:
        secured.refusals.clear()
        asked = len(secured.messages(Step.UPDATE))
        fewer = secured.survivors[:-1]
        secured.lies[Step.UPDATE] = lambda _message: server.survivors_answer(fewer)
        secured.lies[Step.SURVIVORS] = lambda _message: server.confirmations_answer(secured.confirmations(fewer))
        finish(again, service)

        assert len(secured.messages(Step.UPDATE)) == asked
        assert len(set(secured.messages(Step.SURVIVORS))) == 1
        assert secured.messages(Step.UNMASK) == []


def test_a_session_goes_on_while_the_worker_reads_its_datasets_at_the_start(agent: Agent, service: FakeService) -> None:
    secured = SecuredRound(identity_of(agent))
    secured.refusals[Step.UPDATE] = ProblemCode.NOT_READY
    service.offer_secured(secured)
    until(agent, lambda: bool(secured.messages(Step.UPDATE)))
    secured.refusals.clear()

    with next_start(agent) as again:
        again.trainer = Trainer(again.settings.resources, again.state.scratch)
        describe = again.trainer.describe

        def slow(*given: Any) -> Any:
            ends = time.monotonic() + LONG_S
            while secured.total is None and time.monotonic() < ends:
                found = describe(*given)
            return found

        again.trainer.describe = slow  # type: ignore[method-assign]
        again.announce()

        assert secured.total is not None
