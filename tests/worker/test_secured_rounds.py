"""A real worker in secured rounds: from the keys to the shares, beside other work and in further attempts."""

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest

from isthmus.codec.arrays import decode, read
from isthmus.codec.errors import CodecError
from isthmus.federation.secured import quantise
from isthmus.wire.problems import ProblemCode
from isthmus.wire.rounds import TaskOffer
from isthmus.wire.secured import MASKED, Step
from isthmus_worker.journal import Journal, Release, ReleaseState, key_of
from isthmus_worker.loop import Agent, Outcome
from isthmus_worker.release import VectorNeverLeaves, hand_in
from isthmus_worker.secured import serving
from isthmus_worker.secured.records import SessionMoved, SessionState, session_key
from tests.worker.factories import DISTRIBUTED, LINEAGE, make_offer, make_secured_spec, make_spec
from tests.worker.fake_service import FakeService
from tests.worker.secured_round import SecuredRound
from tests.worker.stepping import finish, identity_of, until

DECLARED = {"strategy": {"fedavg": {"weights": "declared"}}}
OTHER_JOB = {"job_id": UUID(int=50), "participation_id": UUID(int=51)}


def vector_of(agent: Agent, offer: TaskOffer) -> Release:
    release = agent.journal.find(key_of(offer))
    assert release is not None
    assert release.vector is not None
    return release


def test_the_unmasked_sum_holds_exactly_the_vector_that_the_worker_kept(agent: Agent, service: FakeService) -> None:
    secured = SecuredRound(identity_of(agent))
    offer = service.offer_secured(secured)

    outcomes = finish(agent, service)

    assert outcomes.count(Outcome.SUBMITTED) == outcomes.count(Outcome.SUMMED) == 1
    vector = vector_of(agent, offer).vector
    assert vector is not None
    kept = read(vector)["vector"]
    assert np.array_equal(secured.mine().view(np.uint32), kept)
    assert np.abs(secured.mine()).max() > 1000  # it did learn
    masked = decode(service.updates[offer.task_id])[MASKED]
    assert not np.any(masked == kept)  # one in 2^32 each


@pytest.mark.parametrize("privacy", ["none", "record", "distributed"])
@pytest.mark.parametrize("members", [3, 6])
def test_every_mode_of_protection_ends_in_the_right_sum(
    agent: Agent, service: FakeService, privacy: str, members: int
) -> None:
    changes: dict[str, Any] = {
        "none": {},
        "record": {
            "privacy": {"unit": "record", "clip_norm": 1.0, "epsilon": 3.0},
            "secure_aggregation": {"clip_norm": 10.0},
            "evaluation": {"holdout": 0.2, "every": 1, "release": "noised"},
        },
        "distributed": DISTRIBUTED,
    }[privacy]
    secured = SecuredRound(identity_of(agent), make_secured_spec(**changes), members=members)
    offer = service.offer_secured(secured)

    assert Outcome.SUMMED in finish(agent, service), (service.refused, service.failed)

    vector = vector_of(agent, offer).vector
    assert vector is not None
    assert np.array_equal(secured.mine().view(np.uint32), read(vector)["vector"])
    sent = decode(service.updates[offer.task_id], offer.upload_manifest)
    assert ("metrics/holdout/accuracy" in sent) is (privacy == "record")


def test_with_declared_weights_the_numbers_are_made_for_the_largest_of_the_roster(
    agent: Agent, service: FakeService
) -> None:
    """And made again for a roster with another largest, from the same update that was kept once."""
    spec = make_secured_spec(**DECLARED)
    first = SecuredRound(identity_of(agent), spec)
    first.refusals[Step.SURVIVORS] = ProblemCode.LEASE_LOST  # before a share is revealed
    offer = service.offer_secured(first)
    finish(agent, service)
    kept = vector_of(agent, offer)
    assert kept.vector is not None
    update = {
        name.removeprefix("update/"): array for name, array in read(kept.vector).items() if name.startswith("update/")
    }

    heavier = first.next_attempt(weights={"basel": 80})
    service.offer_secured(heavier)
    finish(agent, service)

    assert vector_of(agent, offer).digest == kept.digest
    half = quantise(update, spec, offer.plan, 0.5).view(np.int32)
    assert np.array_equal(heavier.mine(), half)
    whole = quantise(update, spec, offer.plan, 1.0).view(np.int32)
    assert np.abs(2 * half - whole).max() <= 1
    assert np.abs(whole).max() > 1000


def test_with_members_that_left_the_sum_is_that_of_the_others(agent: Agent, service: FakeService) -> None:
    secured = SecuredRound(identity_of(agent), members=6, leaving=frozenset({"basel"}))
    offer = service.offer_secured(secured)

    assert Outcome.SUMMED in finish(agent, service)

    vector = vector_of(agent, offer).vector
    assert vector is not None
    assert np.array_equal(secured.mine().view(np.uint32), read(vector)["vector"])


def test_keys_and_shares_travel_while_the_worker_trains(
    agent: Agent, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    secured = SecuredRound(identity_of(agent), held={Step.KEYS})
    key = session_key(service.offer_secured(secured))
    work, states = agent.trainer.work, list[SessionState]()

    def slow(order: Any, on_alive: Any, cancelled: Any) -> Any:
        states.append(agent.journal.sessions.get(key).state)
        secured.held.clear()
        until(agent, lambda: agent.journal.sessions.get(key).state is SessionState.SHARED, cancelled)
        states.append(SessionState.SHARED)
        return work(order, on_alive, cancelled)

    monkeypatch.setattr(agent.trainer, "work", slow)

    assert agent.step() is Outcome.SUBMITTED  # it was never parked

    assert states == [SessionState.KEYS, SessionState.SHARED]
    finish(agent, service)
    assert secured.total is not None


def test_a_secured_task_that_waits_leaves_room_for_others_and_says_that_it_is_held(
    agent: Agent, service: FakeService
) -> None:
    secured = SecuredRound(identity_of(agent), held={Step.SHARES})
    waiting = service.offer_secured(secured, heartbeat_s=0.1)
    assert agent.step() is Outcome.PARKED
    service.offer(make_offer(make_spec(), **OTHER_JOB))
    before = len(service.heartbeats)

    outcomes = until(agent, lambda: len(service.updates) == 1)

    assert outcomes[-1] is Outcome.SUBMITTED
    assert waiting.task_id not in service.updates
    assert service.holding[-1] == [str(waiting.task_id)]
    until(agent, lambda: len(service.heartbeats) > before + 3)
    secured.held.clear()
    assert Outcome.SUMMED in finish(agent, service)


def test_two_jobs_that_wait_for_each_others_workers_do_not_block_each_other(agent: Agent, service: FakeService) -> None:
    """The first goes on only when this worker has joined the second."""
    first = SecuredRound(identity_of(agent), held={Step.KEYS})
    second = SecuredRound(identity_of(agent), changes=OTHER_JOB)
    service.offer_secured(first)
    service.offer_secured(second)

    until(agent, lambda: bool(second.messages(Step.UNMASK)))
    assert first.total is None
    first.held.clear()
    finish(agent, service)

    assert first.total is not None
    assert second.total is not None


def test_no_more_tasks_wait_at_a_time_than_there_is_room_for(
    agent: Agent, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "MOST_PARKED", 1)
    first = SecuredRound(identity_of(agent), held={Step.KEYS})
    second = SecuredRound(identity_of(agent), changes=OTHER_JOB)
    service.offer_secured(first)
    assert agent.step() is Outcome.PARKED
    service.offer_secured(second)

    assert agent.step(1) is Outcome.IDLE
    assert service.claims == 1

    first.held.clear()
    finish(agent, service)
    assert second.total is not None


def test_a_session_that_has_handed_in_is_not_held_any_more_and_is_not_in_the_way(
    agent: Agent, service: FakeService
) -> None:
    secured = SecuredRound(identity_of(agent), held={Step.UPDATE})
    service.offer_secured(secured, heartbeat_s=0.1)
    until(agent, lambda: bool(secured.messages(Step.UPDATE)))
    beats = len(service.heartbeats)
    service.offer(make_offer(make_spec(), **OTHER_JOB, heartbeat_s=1000.0))

    until(agent, lambda: len(service.updates) == 2)

    time.sleep(0.5)  # five heartbeats of a task that is held
    assert len(service.heartbeats) <= beats + 1
    assert service.holding[-1] == []
    secured.held.clear()
    assert Outcome.SUMMED in finish(agent, service)


# --- What is kept, and what it costs ---------------------------------------------------------------------------------


def test_the_vector_is_noised_once_and_masked_anew_in_every_attempt(
    agent: Agent, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = SecuredRound(identity_of(agent), make_secured_spec(**DISTRIBUTED))
    offer = service.offer_secured(first)
    first.refusals[Step.UPDATE] = ProblemCode.LEASE_LOST
    finish(agent, service)
    sent, digest = service.updates[offer.task_id], vector_of(agent, offer).digest
    monkeypatch.setattr(agent.trainer, "work", _never)

    second = first.next_attempt()
    service.offer_secured(second)
    assert Outcome.SUMMED in finish(agent, service)

    assert vector_of(agent, offer).digest == digest
    again = service.updates[offer.task_id]
    assert not np.any(decode(sent)[MASKED] == decode(again)[MASKED])
    assert first.messages(Step.KEYS) != second.messages(Step.KEYS)
    assert first.total is None


def _never(*_: object) -> Any:
    raise AssertionError("nothing is computed twice")


def test_the_spend_is_recorded_once_whatever_the_attempt(agent: Agent, service: FakeService) -> None:
    spec = make_secured_spec(
        privacy={"unit": "record", "clip_norm": 1.0, "epsilon": 3.0}, secure_aggregation={"clip_norm": 10.0}
    )
    first = SecuredRound(identity_of(agent), spec)
    offer = service.offer_secured(first)
    first.refusals[Step.SURVIVORS] = ProblemCode.LEASE_LOST
    finish(agent, service)
    assert len(agent.journal.ledgers.entries(LINEAGE)) == 1
    assert vector_of(agent, offer).state is ReleaseState.ACKNOWLEDGED

    service.offer_secured(first.next_attempt())
    assert Outcome.SUMMED in finish(agent, service)

    assert len(agent.journal.ledgers.entries(LINEAGE)) == 1
    agent.journal.verify()


def test_spread_noise_is_charged_before_shares_are_revealed_and_not_before(agent: Agent, service: FakeService) -> None:
    secured = SecuredRound(identity_of(agent), make_secured_spec(**DISTRIBUTED), held={Step.SURVIVORS})
    offer = service.offer_secured(secured)
    until(agent, lambda: bool(secured.messages(Step.SURVIVORS)))
    assert not agent.journal.ledgers.entries(LINEAGE)
    assert vector_of(agent, offer).state is ReleaseState.PREPARED
    spent = agent.journal.spent(LINEAGE)
    assert spent.epsilon(1e-5) > 0  # others may reveal theirs: it counts at once
    charged: list[int] = []

    def unmasked(message: bytes) -> bytes:
        charged.append(_entries(agent))
        return secured.truth(Step.UNMASK, message)

    secured.lies[Step.UNMASK] = unmasked

    secured.held.clear()
    finish(agent, service)

    assert charged == [1]
    assert agent.journal.spent(LINEAGE).nano == spent.nano
    assert vector_of(agent, offer).state is ReleaseState.ACKNOWLEDGED
    agent.journal.verify()


def _entries(agent: Agent) -> int:
    """As it is on the disk: asked for by the service's thread."""
    looking = Journal.look_into(agent.state)
    try:
        return len(looking.ledgers.entries(LINEAGE))
    finally:
        looking.close()


def test_a_vector_is_never_handed_in_as_it_is(agent: Agent, service: FakeService) -> None:
    """Not by name, not at a start, and not by an offer of the same round that asks for it openly."""
    secured = SecuredRound(identity_of(agent), held={Step.SHARES})
    offer = service.offer_secured(secured)
    assert agent.step() is Outcome.PARKED
    release = vector_of(agent, offer)
    agent.journal.note_asking(release, unanswered=True)  # as if something of it were on its way
    release = vector_of(agent, offer)
    assert release.path is None

    with pytest.raises(VectorNeverLeaves):
        hand_in(agent.client, agent.journal, release, service_public_key="")
    assert agent.journal.unsettled() == []
    agent.journal.mark_released(release)
    assert agent.journal.unsettled() == []
    agent.settle()
    service.offer(offer.model_copy(update={"secured": None}))
    until(agent, lambda: bool(service.refused))

    assert "under secure aggregation, and the task is not" in service.refused[0]
    assert service.admitted == []
    assert service.updates == {}


def test_the_file_of_a_vector_would_not_pass_for_an_upload(agent: Agent, service: FakeService) -> None:
    secured = SecuredRound(identity_of(agent), held={Step.SHARES})
    offer = service.offer_secured(secured)
    agent.step()

    vector = vector_of(agent, offer).vector
    assert vector is not None
    assert vector.stat().st_mode & 0o077 == 0
    with pytest.raises(CodecError):
        decode(vector.read_bytes(), offer.upload_manifest)


def test_the_vector_is_kept_until_a_later_round_is_offered(agent: Agent, service: FakeService) -> None:
    first = SecuredRound(identity_of(agent))
    offer = service.offer_secured(first)
    finish(agent, service)
    vector = vector_of(agent, offer).vector
    assert vector is not None
    agent.journal.recover()
    assert vector.exists()

    service.offer_secured(SecuredRound(identity_of(agent), number=2))
    finish(agent, service)

    assert not vector.exists()
    assert list(agent.state.masked.iterdir()) == []


def test_the_secrets_of_an_attempt_are_gone_from_the_disk_when_it_is_over(agent: Agent, service: FakeService) -> None:
    secured = SecuredRound(identity_of(agent), refusals={Step.UNMASK: ProblemCode.NOT_READY})
    offer = service.offer_secured(secured)
    until(agent, lambda: bool(secured.messages(Step.UNMASK)))
    secrets = agent.journal.sessions.get(session_key(offer)).secrets
    parts = [secrets[at : at + 32] for at in range(0, 128, 32)]
    assert all(_is_on_disk(agent.state.root, part) for part in parts)

    secured.refusals.clear()
    finish(agent, service)

    assert secured.total is not None
    assert agent.journal.sessions.find(session_key(offer)) is None
    assert not any(_is_on_disk(agent.state.root, part) for part in parts)


def _is_on_disk(root: Path, part: bytes) -> bool:
    return any(part in path.read_bytes() for path in root.glob("journal.sqlite*"))


@pytest.mark.parametrize("code", [ProblemCode.STEP_CLOSED, ProblemCode.ROUND_NOT_COLLECTING])
@pytest.mark.parametrize("step", [Step.KEYS, Step.SHARES, Step.UPDATE, Step.SURVIVORS, Step.UNMASK])
def test_a_worker_that_is_left_behind_deletes_its_secrets_and_goes_on_with_other_work(
    agent: Agent, service: FakeService, step: Step, code: ProblemCode
) -> None:
    secured = SecuredRound(identity_of(agent), refusals={step: code})
    offer = service.offer_secured(secured)

    outcomes = finish(agent, service)

    assert Outcome.CANCELLED in outcomes
    assert agent.journal.sessions.find(session_key(offer)) is None
    assert agent.journal.sessions.is_known(session_key(offer))
    service.offer(make_offer(make_spec(), **OTHER_JOB))
    until(agent, lambda: agent.journal.counts()["acknowledged"] > (offer.task_id in service.updates))


def test_a_lost_lease_keeps_the_keys_for_the_next_offer_of_the_attempt(agent: Agent, service: FakeService) -> None:
    secured = SecuredRound(identity_of(agent), refusals={Step.SHARES: ProblemCode.LEASE_LOST})
    service.offer_secured(secured)
    finish(agent, service)
    secured.refusals.clear()
    secured.fence = 2

    service.offer_secured(secured)
    assert Outcome.SUMMED in finish(agent, service)

    for step in (Step.KEYS, Step.SHARES):
        assert len(set(secured.messages(step))) == 1


def test_the_secrets_of_an_attempt_that_nobody_offers_again_are_deleted_after_its_end(
    agent: Agent, service: FakeService
) -> None:
    refusals = {Step.SHARES: ProblemCode.LEASE_LOST}
    for hours in (0.9, 1.1):
        secured = SecuredRound(identity_of(agent), number=1 if hours < 1 else 2, refusals=refusals)
        offer = service.offer_secured(secured, closes_at=datetime.now(UTC) - timedelta(hours=hours))
        finish(agent, service)
        assert agent.step(1) is Outcome.IDLE

        assert (agent.journal.sessions.find(session_key(offer)) is None) is (hours > 1)


def test_one_key_set_masks_one_update(agent: Agent, service: FakeService) -> None:
    secured = SecuredRound(identity_of(agent), held={Step.UPDATE})
    offer = service.offer_secured(secured)
    until(agent, lambda: bool(secured.messages(Step.UPDATE)))

    with pytest.raises(SessionMoved):
        agent.journal.sessions.keep_masked(session_key(offer), "ab" * 32)
    assert agent.journal.sessions.get(session_key(offer)).state is SessionState.SUBMITTED


def test_an_update_that_was_masked_before_and_comes_out_otherwise_is_not_sent(
    agent: Agent, service: FakeService
) -> None:
    secured = SecuredRound(identity_of(agent))
    service.admission = ProblemCode.LEASE_LOST
    offer = service.offer_secured(secured)
    finish(agent, service)
    vector = vector_of(agent, offer).vector
    assert vector is not None
    damaged = bytearray(vector.read_bytes())
    damaged[-1] ^= 1
    vector.write_bytes(damaged)
    (masked,) = agent.state.masked.iterdir()
    masked.unlink()
    service.admission, secured.fence = None, 2

    service.offer_secured(secured)
    finish(agent, service)

    assert "another one than before" in service.refused[0]
    assert service.admitted == []


def test_work_that_is_refused_or_fails_ends_its_session(agent: Agent, service: FakeService, tmp_path: Path) -> None:
    file = tmp_path / "patients.csv"
    file.write_text(file.read_text().replace("F,", "unicorn,", 1))
    secured = SecuredRound(identity_of(agent))
    offer = service.offer_secured(secured)

    assert agent.step() is Outcome.REFUSED

    assert "'sex'" in service.refused[0]
    assert agent.journal.sessions.find(session_key(offer)) is None
    assert not agent._secured.are_open
