"""What goes wrong in a secured round and is no reason to leave it for good, and what has to fit to the last moment."""

import signal
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import numpy as np
import pytest

from isthmus.codec.arrays import read
from isthmus.interruption import Interrupted, Interruption
from isthmus.secagg.messages import SEALED_BYTES
from isthmus.wire.datasets import Budget
from isthmus.wire.problems import ProblemCode
from isthmus.wire.secured import Step
from isthmus_worker.journal import key_of
from isthmus_worker.ledger import Account
from isthmus_worker.loop import Agent, Outcome
from isthmus_worker.secured import serving, session
from isthmus_worker.secured.records import SessionState, session_key
from isthmus_worker.trainer import Trainer, WorkFailed
from tests.worker.factories import DATASET, DISTRIBUTED, LINEAGE, make_offer, make_secured_spec, make_spec
from tests.worker.fake_service import FakeService
from tests.worker.secured_round import SecuredRound
from tests.worker.stepping import LONG_S, finish, identity_of, reborn, until

OTHER_JOB = {"job_id": UUID(int=50), "participation_id": UUID(int=51)}
QUIET: dict[str, Any] = {"heartbeat_s": 1000.0}
"""No heartbeat in the whole test."""


def assert_the_sum_is_right(agent: Agent, secured: SecuredRound) -> None:
    release = agent.journal.find(key_of(secured.offer()))
    assert release is not None
    assert release.vector is not None
    assert np.array_equal(secured.mine().view(np.uint32), read(release.vector)["vector"])


def short_of_patience(agent: Agent, max_silence_s: float) -> None:
    """From now on, what gives no sign of life for so long is given up."""
    resources = agent.settings.resources.model_copy(update={"max_silence_s": max_silence_s})
    agent.settings = agent.settings.model_copy(update={"resources": resources})


def fail_once(monkeypatch: pytest.MonkeyPatch, trainer: Trainer, name: str) -> list[bool]:
    """Have the next call of a trainer's method fail."""
    method, calls = getattr(trainer, name), list[bool]()

    def once(*given: Any) -> Any:
        calls.append(True)
        if len(calls) == 1:
            raise WorkFailed("No space is left on the device.")
        return method(*given)

    monkeypatch.setattr(trainer, name, once)
    return calls


# --- What has to fit until the last moment ----------------------------------------------------------------------------


def _budget_is_spent(agent: Agent) -> None:
    agent._accounts = {DATASET: Account(LINEAGE, Budget(epsilon=0.01, delta=1e-5))}


def _policy_has_changed(agent: Agent) -> None:
    policy = agent.settings.policy.model_copy(update={"min_cohort": 50})
    agent.settings = agent.settings.model_copy(update={"policy": policy})


@pytest.mark.parametrize(("change", "word"), [(_budget_is_spent, "budget"), (_policy_has_changed, "min_cohort: ")])
def test_a_parked_update_that_does_not_fit_any_more_is_refused_and_never_masked(
    agent: Agent, service: FakeService, change: Callable[[Agent], None], word: str
) -> None:
    secured = SecuredRound(identity_of(agent), make_secured_spec(**DISTRIBUTED), held={Step.SHARES})
    offer = service.offer_secured(secured)
    assert agent.step() is Outcome.PARKED
    change(agent)
    secured.held.clear()

    assert Outcome.REFUSED in finish(agent, service)

    assert word in service.refused[0]
    assert service.admitted == []
    assert service.updates == {}
    assert agent.journal.sessions.find(session_key(offer)) is None
    assert list(agent.state.masked.iterdir()) == []


# --- Its own end ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made_an_error_of_it", [False, True])
def test_a_worker_that_is_told_to_end_while_it_writes_its_spend_reveals_nothing_and_refuses_nothing(
    agent: Agent, service: FakeService, monkeypatch: pytest.MonkeyPatch, made_an_error_of_it: bool
) -> None:
    secured = SecuredRound(identity_of(agent), make_secured_spec(**DISTRIBUTED))
    offer = service.offer_secured(secured)
    interruption = Interruption()
    agent.check = interruption.check

    def interrupted(*_: object) -> None:
        try:
            interruption._interrupt(signal.SIGTERM, None)
        except Interrupted:
            if made_an_error_of_it:
                raise ValueError("Error serializing to JSON: Interrupted: SIGTERM") from None
            raise

    monkeypatch.setattr(serving, "charge_before_revealing", interrupted)
    with pytest.raises(Interrupted):
        finish(agent, service)

    (opened,) = agent._secured._open.values()
    opened.join(LONG_S)
    assert not opened.is_alive()
    assert secured.messages(Step.SURVIVORS)
    assert secured.messages(Step.UNMASK) == []
    assert service.refused == service.failed == []
    assert agent.journal.sessions.find(session_key(offer)) is not None, "the next start goes on with it"


# --- Peers ------------------------------------------------------------------------------------------------------------


def _flipped(secured: SecuredRound, message: bytes) -> bytes:
    """The last of the others has encrypted something else."""
    answer = bytearray(secured.truth(Step.SHARES, message))
    answer[-1] ^= 1
    return bytes(answer)


def _swapped(secured: SecuredRound, message: bytes) -> bytes:
    answer = secured.truth(Step.SHARES, message)
    last, but_one = len(answer) - SEALED_BYTES, len(answer) - 2 * SEALED_BYTES
    return answer[:but_one] + answer[last:] + answer[but_one:last]


@pytest.mark.parametrize(("lie", "culprit"), [(_flipped, "ulm"), (_swapped, "lyon")])
def test_shares_that_a_peer_may_have_spoilt_fail_the_task_and_the_next_attempt_goes_well(
    agent: Agent, service: FakeService, lie: Callable[[SecuredRound, bytes], bytes], culprit: str
) -> None:
    first = SecuredRound(identity_of(agent), members=6)
    first.lies[Step.SHARES] = lambda message: lie(first, message)
    service.offer_secured(first)

    assert Outcome.FAILED in finish(agent, service)

    assert service.failed == [f"The shares from {culprit} are not what it encrypted for this member."]
    assert service.refused == []
    assert service.admitted == []
    second = first.next_attempt()
    service.offer_secured(second)
    assert Outcome.SUMMED in finish(agent, service)
    assert_the_sum_is_right(agent, second)


def test_an_attempt_that_is_offered_again_after_spoilt_shares_goes_on_with_its_keys(
    agent: Agent, service: FakeService
) -> None:
    """What was told of the failure may have been lost."""
    secured = SecuredRound(identity_of(agent))
    secured.lies[Step.SHARES] = lambda message: _flipped(secured, message)
    service.offer_secured(secured)
    finish(agent, service)
    secured.lies.clear()
    secured.fence = 2

    service.offer_secured(secured)
    assert Outcome.SUMMED in finish(agent, service)

    assert service.refused == []
    assert len(set(secured.messages(Step.KEYS))) == 1


# --- Children ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["work", "mask"])
def test_a_child_that_fails_once_ends_neither_the_round_nor_the_attempt(
    agent: Agent, service: FakeService, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    calls = fail_once(monkeypatch, agent.trainer, name)
    secured = SecuredRound(identity_of(agent))
    service.offer_secured(secured)
    assert Outcome.FAILED in finish(agent, service)
    assert service.failed == ["No space is left on the device."]
    secured.fence = 2

    service.offer_secured(secured)
    assert Outcome.SUMMED in finish(agent, service)

    assert len(calls) == 2
    assert service.refused == []
    assert len(set(secured.messages(Step.KEYS))) == 1
    assert_the_sum_is_right(agent, secured)


def test_masking_that_fails_at_a_start_leaves_the_attempt_to_its_next_offer(
    agent: Agent, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    secured = SecuredRound(identity_of(agent))
    service.admission = ProblemCode.LEASE_LOST
    offer = service.offer_secured(secured)
    finish(agent, service)
    service.admission = None
    (masked,) = agent.state.masked.iterdir()
    masked.unlink()
    fail_once(monkeypatch, agent.trainer, "mask")

    again = reborn(agent)
    assert again.journal.sessions.get(session_key(offer)).state is SessionState.MASKED
    secured.fence = 2
    service.offer_secured(secured)
    outcomes = finish(again, service)
    again.close()

    assert Outcome.SUMMED in outcomes, service.refused


# --- Sessions that were lost ------------------------------------------------------------------------------------------


def test_a_session_that_is_lost_after_its_upload_is_taken_up_again_without_a_restart(
    agent: Agent, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "AGAIN_S", 0.1)
    secured = SecuredRound(identity_of(agent), refusals={Step.UPDATE: ProblemCode.FORBIDDEN})
    service.offer_secured(secured)
    until(agent, lambda: len(secured.messages(Step.UPDATE)) > 2)  # more than once, while the refusal lasts
    secured.refusals.clear()

    until(agent, lambda: secured.total is not None)

    finish(agent, service)
    assert_the_sum_is_right(agent, secured)
    assert not agent._secured.are_looked_after
    assert len(service.admitted) == 1


def test_the_pauses_of_a_session_that_is_lost_again_and_again_grow(
    agent: Agent, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "AGAIN_S", 0.1)
    secured = SecuredRound(identity_of(agent), refusals={Step.UPDATE: ProblemCode.FORBIDDEN})
    key = session_key(service.offer_secured(secured))
    pauses = list[float]()

    def lost_thrice() -> bool:
        pauses.extend({agent._secured._pause_s[key]} - set(pauses) if key in agent._secured._pause_s else ())
        return len(pauses) == 3

    until(agent, lost_thrice, lambda: agent.step(1))

    assert pauses == pytest.approx([0.1, 0.2, 0.4])


def test_a_session_that_is_lost_long_after_its_rounds_end_is_left_to_the_next_start(
    agent: Agent, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "AGAIN_S", 0.1)
    secured = SecuredRound(identity_of(agent), refusals={Step.UPDATE: ProblemCode.FORBIDDEN})
    offer = service.offer_secured(secured, closes_at=datetime.now(UTC) - timedelta(hours=2))

    finish(agent, service)

    assert agent.journal.sessions.get(session_key(offer)).state is SessionState.SUBMITTED
    assert not agent._secured.are_looked_after


# --- Signs of life ----------------------------------------------------------------------------------------------------


def test_no_poll_of_a_parked_task_is_longer_than_half_the_silence_that_loses_it(
    agent: Agent, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_of_patience(agent, 9.0)
    exchange, waits = agent.client.tasks.exchange, dict[Step, int]()

    def noted(task_id: UUID, step: Step, message: bytes, *, fence: int, wait_s: int) -> bytes | None:
        waits[step] = wait_s
        return exchange(task_id, step, message, fence=fence, wait_s=wait_s)

    monkeypatch.setattr(agent.client.tasks, "exchange", noted)
    service.offer_secured(SecuredRound(identity_of(agent)))

    finish(agent, service)

    assert waits[Step.KEYS] == waits[Step.SHARES] == 4
    assert waits[Step.SURVIVORS] >= session.SHORTEST_WAIT_S  # nothing is held any more


def test_a_pause_between_two_polls_loses_no_parked_task(
    agent: Agent, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "backoff_s", lambda _attempt: 3.0)
    secured = SecuredRound(identity_of(agent), held={Step.SHARES})
    service.offer_secured(secured, heartbeat_s=0.1)
    short_of_patience(agent, 1.5)
    assert agent.step() is Outcome.PARKED
    secured.refusals[Step.SHARES] = ProblemCode.NOT_READY
    asked = len(secured.messages(Step.SHARES))
    until(agent, lambda: len(secured.messages(Step.SHARES)) >= asked + 2)
    secured.refusals.clear()
    secured.held.clear()

    assert Outcome.SUMMED in finish(agent, service)


def _claimed_while_masking(
    agent: Agent, service: FakeService, monkeypatch: pytest.MonkeyPatch, wait_s: float
) -> SecuredRound:
    """Have another job's task claimed while the main thread masks for `wait_s` more; the task's round."""
    first = SecuredRound(identity_of(agent), held={Step.SHARES})
    second = SecuredRound(identity_of(agent), changes=OTHER_JOB)
    service.offer_secured(first, **QUIET)
    assert agent.step() is Outcome.PARKED
    mask, claim, asked = agent.trainer.mask, agent.client.tasks.claim, threading.Event()

    def long_poll(body: Any, *, wait_s: int) -> Any:
        asked.set()
        until(agent, lambda: bool(service.offers), lambda: None)
        return claim(body, wait_s=wait_s)

    def slow(order: Any, on_alive: Any, cancelled: Callable[[], bool]) -> Any:
        if not service.updates:
            service.offer_secured(second, heartbeat_s=0.1)
            until(agent, lambda: not service.offers, cancelled)
            ends = time.monotonic() + wait_s
            until(agent, lambda: time.monotonic() > ends, cancelled)
        return mask(order, on_alive, cancelled)

    monkeypatch.setattr(agent.trainer, "mask", slow)
    monkeypatch.setattr(agent.client.tasks, "claim", long_poll)
    until(agent, asked.is_set)
    first.held.clear()
    until(agent, lambda: len(service.updates) == 1)
    monkeypatch.setattr(agent.client.tasks, "claim", claim)
    return second


def test_a_task_that_is_claimed_while_the_main_thread_is_busy_has_heartbeats_at_once(
    agent: Agent, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_of_patience(agent, 1.0)

    second = _claimed_while_masking(agent, service, monkeypatch, wait_s=2.0)

    assert len(service.heartbeats) > 12  # longer than its patience without any word from the main thread
    assert second.heard == []
    finish(agent, service)
    assert_the_sum_is_right(agent, second)


def test_a_task_that_is_lost_before_the_main_thread_comes_to_it_is_not_begun(
    agent: Agent, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.held = False

    second = _claimed_while_masking(agent, service, monkeypatch, wait_s=1.0)

    assert len(service.heartbeats) == 1
    finish(agent, service)
    assert second.heard == []


# --- Beside another task ----------------------------------------------------------------------------------------------


def test_an_update_that_is_ready_is_masked_and_handed_in_while_another_task_is_computed(
    agent: Agent, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That other task is neither taken for stuck nor lost, though nobody hears its child for longer than allowed."""
    first = SecuredRound(identity_of(agent), held={Step.SHARES})
    service.offer_secured(first, **QUIET)
    assert agent.step() is Outcome.PARKED
    short_of_patience(agent, 3.0)
    monkeypatch.setattr(agent.trainer, "_resources", agent.settings.resources)
    mask, hear, two_children = agent.masker.mask, agent.trainer._hear, list[bool]()

    def slow(order: Any, on_alive: Any, cancelled: Callable[[], bool]) -> Any:
        ends = time.monotonic() + 4.0
        until(agent, lambda: time.monotonic() > ends, cancelled)
        beats = len(service.heartbeats)
        until(agent, lambda: len(service.heartbeats) > beats, cancelled)
        done = mask(order, on_alive, cancelled)
        two_children.append(agent.masker.pid not in (None, agent.trainer.pid))
        return done

    def hear_later() -> Any:
        """The child works, and what it says comes when the other task has been handed in."""
        first.held.clear()
        return hear() if first.task_id in service.updates else []

    monkeypatch.setattr(agent.masker, "mask", slow)
    monkeypatch.setattr(agent.trainer, "_hear", hear_later)
    service.offer(make_offer(make_spec(), **OTHER_JOB, heartbeat_s=0.1))

    outcomes = until(agent, lambda: len(service.updates) == 2)

    assert Outcome.SUBMITTED in outcomes
    assert service.failed == []
    assert two_children == [True]
    assert agent.masker.pid is None
    finish(agent, service)
    assert_the_sum_is_right(agent, first)


def test_a_session_that_breaks_while_its_own_vector_is_computed_is_closed_once(
    agent: Agent, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    secured = SecuredRound(identity_of(agent), lies={Step.KEYS: lambda _message: b""})
    service.offer_secured(secured)
    work = agent.trainer.work

    def slow(order: Any, on_alive: Any, cancelled: Callable[[], bool]) -> Any:
        ends = time.monotonic() + LONG_S
        while not all(one.ended for one in agent._secured._open.values()):
            assert time.monotonic() < ends
            time.sleep(0.01)
        return work(order, on_alive, cancelled)

    monkeypatch.setattr(agent.trainer, "work", slow)

    finish(agent, service)

    assert len(service.refused) == 1
