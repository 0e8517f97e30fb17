"""A service that lies to a worker in a secured round: the worker leaves, says why, and reveals nothing."""

import dataclasses
from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest

from isthmus.secagg import client, server
from isthmus.secagg.messages import SEALED_BYTES
from isthmus.secagg.roster import Member, Roster
from isthmus.wire.manifest import AggregationRule, DType, Manifest, TensorSpec
from isthmus.wire.secured import MASKED, SecuredOffer, Step
from isthmus_worker.loop import Agent, Outcome
from isthmus_worker.offers import contradictions
from isthmus_worker.secured.records import session_key
from tests.worker.factories import (
    DATASET,
    DISTRIBUTED,
    LINEAGE,
    ORGANIZATION,
    ROWS,
    STATISTICS,
    make_offer,
    make_secured_spec,
    make_spec,
)
from tests.worker.fake_service import FakeService
from tests.worker.secured_round import KEYS, SecuredRound
from tests.worker.stepping import finish, identity_of, until

Lie = Callable[[SecuredRound, bytes], bytes]
FAR_APART = STATISTICS.model_copy(update={"variance": [1e30] * len(STATISTICS.variance)})


def assert_left_before_anything_left(agent: Agent, service: FakeService, secured: SecuredRound, sentence: str) -> None:
    """The task is refused with this reason, nothing was handed in, and the secrets are gone."""
    assert len(service.refused) == 1, (service.refused, service.failed)
    assert sentence in service.refused[0]
    assert service.updates == {}
    assert service.admitted == []
    assert secured.messages(Step.UNMASK) == secured.messages(Step.SURVIVORS) == []
    assert agent.journal.ledgers.entries(LINEAGE) == []
    assert agent.journal.sessions.find(session_key(secured.offer())) is None


def assert_left_after_the_upload(
    agent: Agent, service: FakeService, secured: SecuredRound, caplog: pytest.LogCaptureFixture, sentence: str
) -> None:
    """The reason is logged, no share was revealed, and the secrets are gone."""
    assert len(service.updates) == 1
    assert sentence in " ".join(str(getattr(record, "reason", "")) for record in caplog.records)
    assert secured.messages(Step.UNMASK) == []
    assert secured.total is None
    assert agent.journal.sessions.find(session_key(secured.offer())) is None


# --- Keys -------------------------------------------------------------------------------------------------------------


def _with_roster(secured: SecuredRound, roster: Roster) -> bytes:
    return server.keys_answer(roster, secured.advertisements)


def _without(secured: SecuredRound, gone: int) -> bytes:
    left = {place: message for place, message in secured.advertisements.items() if place != gone}
    return server.keys_answer(secured.roster, left)


def _changed_roster(secured: SecuredRound, message: bytes) -> bytes:
    secured.truth(Step.KEYS, message)
    members = list(secured.roster.members)
    members[-1] = Member("mallory", DATASET, KEYS["mallory"].public_key().public_bytes_raw(), 1)
    return _with_roster(secured, Roster(members))


def _invented_member(secured: SecuredRound, message: bytes) -> bytes:
    secured.truth(Step.KEYS, message)
    place = len(secured.roster)
    invented = client.advertise(secured.context, place, client.Secrets.draw(), KEYS["mallory"].sign)
    return server.keys_answer(secured.roster, {**secured.advertisements, place: invented})


def _invented_keys(secured: SecuredRound, message: bytes) -> bytes:
    """The service's own keys under the name of a member, to read its shares."""
    secured.truth(Step.KEYS, message)
    place = next(iter(secured.others))
    invented = client.advertise(secured.context, place, client.Secrets.draw(), KEYS["mallory"].sign)
    return server.keys_answer(secured.roster, {**secured.advertisements, place: invented})


def _other_model(secured: SecuredRound, message: bytes) -> bytes:
    """The others were shown another model."""
    shown = secured.base.model.model_copy(update={"digest": "ab" * 32})
    return _told_otherwise(secured, message, model=shown)


def _other_averaged_tensors(secured: SecuredRound, message: bytes) -> bytes:
    """The others were told to leave a tensor alone: zeros from all of them where this worker's update is."""
    tensors = secured.base.model_manifest.averaged()
    assert len(tensors) > 1
    kept = next(iter(tensors))
    tensors[kept] = tensors[kept].model_copy(update={"rule": AggregationRule.KEEP})
    return _told_otherwise(secured, message, model_manifest=Manifest(tensors=tensors))


def _other_statistics(secured: SecuredRound, message: bytes) -> bytes:
    """The others were told of values so far apart that all of theirs become zero."""
    return _told_otherwise(secured, message, statistics=FAR_APART)


def _told_otherwise(secured: SecuredRound, message: bytes, **changes: Any) -> bytes:
    """The others were offered the round with other fields, and sent keys for that."""
    theirs = dataclasses.replace(secured, changes=changes).context
    keys = {
        place: client.advertise(theirs, place, other.secrets, other.key.sign) for place, other in secured.others.items()
    }
    server.check_keys(secured.context, secured.index, secured.identity, message)
    return server.keys_answer(secured.roster, {**keys, secured.index: message})


def _my_keys_changed(secured: SecuredRound, message: bytes) -> bytes:
    secured.truth(Step.KEYS, message)
    flipped = bytearray(message)
    flipped[10] ^= 1
    return server.keys_answer(secured.roster, {**secured.advertisements, secured.index: bytes(flipped)})


def _my_keys_missing(secured: SecuredRound, message: bytes) -> bytes:
    secured.truth(Step.KEYS, message)
    return _without(secured, secured.index)


def _a_key_twice(secured: SecuredRound, message: bytes) -> bytes:
    secured.truth(Step.KEYS, message)
    one, other = list(secured.others.values())[:2]
    copied = dataclasses.replace(other.secrets, channel=one.secrets.channel)
    again = client.advertise(secured.context, other.index, copied, other.key.sign)
    return server.keys_answer(secured.roster, {**secured.advertisements, other.index: again})


def _too_few_keys(secured: SecuredRound, message: bytes) -> bytes:
    secured.truth(Step.KEYS, message)
    kept = [secured.index, *list(secured.others)[:1]]
    return server.keys_answer(secured.roster, {place: secured.advertisements[place] for place in kept})


def _cut(secured: SecuredRound, message: bytes) -> bytes:
    return secured.truth(Step.KEYS, message)[:-1]


@pytest.mark.parametrize(
    ("lie", "sentence"),
    [
        (_changed_roster, "The roster is not the one that the task was offered with."),
        (_invented_member, "Keys came of a member that is not in the roster."),
        (_invented_keys, "cannot be trusted"),
        (_other_model, "cannot be trusted"),
        (_other_averaged_tensors, "cannot be trusted"),
        (_other_statistics, "cannot be trusted"),
        (_my_keys_changed, "cannot be trusted"),
        (_my_keys_missing, "leaves out this member's own"),
        (_a_key_twice, "The same public key comes twice."),
        (_too_few_keys, "Only 2 of 4 members sent keys; 3 have to."),
        (_cut, "The answer to the keys"),
        (lambda _secured, _message: b"", "The answer to the keys"),
    ],
)
def test_keys_that_are_not_the_members_own_end_the_session(
    agent: Agent, service: FakeService, lie: Lie, sentence: str
) -> None:
    secured = SecuredRound(identity_of(agent))
    secured.lies[Step.KEYS] = lambda message: lie(secured, message)
    service.offer_secured(secured)

    finish(agent, service)

    assert secured.messages(Step.SHARES) == []
    assert_left_before_anything_left(agent, service, secured, sentence)


@pytest.mark.parametrize("told", ["this worker", "the others"])
@pytest.mark.parametrize("what", ["statistics", "noise"])
def test_members_that_were_told_other_statistics_or_more_noise_have_no_keys_in_common(
    agent: Agent, service: FakeService, what: str, told: str
) -> None:
    secured = SecuredRound(identity_of(agent), make_spec(**DISTRIBUTED))
    plan = secured.base.plan
    assert plan is not None
    other = {
        "statistics": {"statistics": FAR_APART},
        "noise": {"plan": plan.model_copy(update={"noise_multiplier": 2 * plan.noise_multiplier})},
    }[what]
    theirs = dataclasses.replace(secured, changes=other if told == "the others" else {}).context

    def keys(message: bytes) -> bytes:
        sent = {
            place: client.advertise(theirs, place, member.secrets, member.key.sign)
            for place, member in secured.others.items()
        }
        return server.keys_answer(secured.roster, {**sent, secured.index: message})

    secured.lies[Step.KEYS] = keys
    service.offer_secured(secured, **(other if told == "this worker" else {}))

    finish(agent, service)

    assert secured.messages(Step.SHARES) == []
    assert_left_before_anything_left(agent, service, secured, "cannot be trusted")


def test_a_plan_that_costs_otherwise_but_noises_alike_is_no_other_context(agent: Agent) -> None:
    secured = SecuredRound(identity_of(agent), make_spec(**DISTRIBUTED))
    plan = secured.base.plan
    assert plan is not None
    dearer = plan.model_copy(update={"epsilon": plan.epsilon + 1})
    assert dataclasses.replace(secured, changes={"plan": dearer}).context == secured.context


def test_keys_of_an_earlier_attempt_are_not_taken_for_this_one(agent: Agent, service: FakeService) -> None:
    first = SecuredRound(identity_of(agent), held={Step.SHARES})
    service.offer_secured(first)
    assert agent.step() is Outcome.PARKED
    again = first.next_attempt()

    def replayed(message: bytes) -> bytes:
        return server.keys_answer(again.roster, {**first.advertisements, again.index: message})

    again.lies[Step.KEYS] = replayed
    service.offer_secured(again)
    finish(agent, service)

    assert_left_before_anything_left(agent, service, again, "cannot be trusted")


def test_fewer_members_than_the_job_sums_end_the_session_though_the_threshold_holds(
    agent: Agent, service: FakeService
) -> None:
    secured = SecuredRound(identity_of(agent), make_secured_spec(cohort={"min_updates": 6}), members=6)

    def one_less(message: bytes) -> bytes:
        secured.truth(Step.KEYS, message)
        return _without(secured, next(iter(secured.others)))

    secured.lies[Step.KEYS] = one_less
    service.offer_secured(secured)
    finish(agent, service)

    assert_left_before_anything_left(agent, service, secured, "Only 5 members sent keys; the job needs 6 in a sum.")


# --- The roster -------------------------------------------------------------------------------------------------------


def _mine(secured: SecuredRound, **changes: Any) -> Roster:
    members = list(secured.roster.members)
    members[secured.index] = dataclasses.replace(members[secured.index], **changes)
    return Roster(members)


def _use(secured: SecuredRound, roster: Roster) -> None:
    """From now on this is the roster of the attempt, for everybody."""
    secured.roster = roster
    secured.context = secured.context_for(roster)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"identity": KEYS["mallory"].public_key().public_bytes_raw()}, "another key for this worker than its own"),
        ({"organization": "genoa"}, f"belongs to genoa/{DATASET}"),
        ({"dataset": "others"}, f"belongs to {ORGANIZATION}/others"),
        ({"weight": 2}, "The job counts all members the same, and the roster does not."),
    ],
)
def test_a_roster_without_this_worker_at_its_place_ends_the_session(
    agent: Agent, service: FakeService, changes: dict[str, Any], sentence: str
) -> None:
    secured = SecuredRound(identity_of(agent))
    _use(secured, _mine(secured, **changes))
    secured.lies[Step.KEYS] = lambda message: server.keys_answer(secured.roster, {secured.index: message})
    service.offer_secured(secured)

    finish(agent, service)

    assert_left_before_anything_left(agent, service, secured, sentence)


def test_another_index_than_ones_own_ends_the_session(agent: Agent, service: FakeService) -> None:
    secured = SecuredRound(identity_of(agent))
    place = next(iter(secured.others))
    secured.lies[Step.KEYS] = lambda message: server.keys_answer(secured.roster, {place: message})
    offer = secured.offer()
    assert offer.secured is not None
    service.offer_secured(secured, secured=offer.secured.model_copy(update={"index": place}))

    finish(agent, service)

    assert_left_before_anything_left(agent, service, secured, "This worker's place in the roster belongs to")


@pytest.mark.parametrize("weight", [ROWS + 1, 1])
def test_a_weight_that_this_worker_never_announced_ends_the_session(
    agent: Agent, service: FakeService, weight: int
) -> None:
    spec = make_secured_spec(strategy={"fedavg": {"weights": "declared"}})
    secured = SecuredRound(identity_of(agent), spec, weights={ORGANIZATION: weight})
    service.offer_secured(secured)

    finish(agent, service)

    assert_left_before_anything_left(agent, service, secured, f"counts {DATASET} with {weight} records")


def test_an_organization_with_another_key_than_before_ends_the_session(agent: Agent, service: FakeService) -> None:
    service.offer_secured(SecuredRound(identity_of(agent)))
    finish(agent, service)
    assert {peer.organization for peer in agent.journal.peers.all()} == {"basel", "chur", "jena"}
    service.updates.clear()
    service.admitted.clear()

    second = SecuredRound(identity_of(agent), number=2)
    members = list(second.roster.members)
    stolen = next(place for place, member in enumerate(members) if member.organization == "jena")
    members[stolen] = dataclasses.replace(members[stolen], identity=KEYS["mallory"].public_key().public_bytes_raw())
    second.others[stolen].key = KEYS["mallory"]
    _use(second, Roster(members))
    service.offer_secured(second)
    finish(agent, service)

    assert second.messages(Step.SHARES) == []
    assert len(agent.journal.peers.all("jena")) == 1
    entries = len(agent.journal.ledgers.entries(LINEAGE))
    assert "jena is pinned to another identity at this worker" in service.refused[0]
    assert service.updates == {}
    assert entries == 1  # of the first round

    agent.journal.peers.trust("jena", KEYS["mallory"].public_key().public_bytes_raw().hex())
    third = second.next_attempt()
    third.others[stolen].key = KEYS["mallory"]
    _use(third, second.roster)
    service.offer_secured(third)
    assert Outcome.SUMMED in finish(agent, service)


def test_with_pinned_peers_only_whoever_was_not_trusted_before_ends_the_session(
    agent: Agent, service: FakeService
) -> None:
    policy = agent.settings.policy.model_copy(update={"pinned_peers_only": True})
    agent.settings = agent.settings.model_copy(update={"policy": policy})
    secured = SecuredRound(identity_of(agent))
    for name in ("basel", "chur"):
        agent.journal.peers.trust(name, KEYS[name].public_key().public_bytes_raw().hex())
    service.offer_secured(secured)

    finish(agent, service)

    assert_left_before_anything_left(agent, service, secured, "pinned_peers_only: the key")
    assert "of jena was not trusted" in service.refused[0]
    assert "basel" not in service.refused[0]
    agent.journal.peers.trust("jena", KEYS["jena"].public_key().public_bytes_raw().hex())
    again = secured.next_attempt()
    service.offer_secured(again)
    assert Outcome.SUMMED in finish(agent, service)


# --- Shares -----------------------------------------------------------------------------------------------------------


def _swapped(secured: SecuredRound, message: bytes) -> bytes:
    answer = secured.truth(Step.SHARES, message)
    body = len(answer) - SEALED_BYTES * len(secured.others)
    first, second, rest = (
        answer[body : body + SEALED_BYTES],
        answer[body + SEALED_BYTES : body + 2 * SEALED_BYTES],
        answer[body + 2 * SEALED_BYTES :],
    )
    return answer[:body] + second + first + rest


def _flipped(secured: SecuredRound, message: bytes) -> bytes:
    answer = bytearray(secured.truth(Step.SHARES, message))
    answer[-1] ^= 1
    return bytes(answer)


def _shares_of(secured: SecuredRound, message: bytes, places: tuple[int, ...]) -> bytes:
    answer = secured.truth(Step.SHARES, message)
    body = len(answer) - SEALED_BYTES * len(secured.others)
    parts = {
        place: answer[body + at * SEALED_BYTES : body + (at + 1) * SEALED_BYTES]
        for at, place in enumerate(secured.others)
    }
    return server.shares_answer(secured.index, places, {place: parts.get(place, bytes(82)) for place in places})


@pytest.mark.parametrize(
    ("lie", "sentence"),
    [
        (lambda secured, message: _shares_of(secured, message, (0, secured.index)), "Only 2 members sent shares"),
        (lambda secured, message: _shares_of(secured, message, tuple(secured.others)), "leaves out this member's own"),
        (
            lambda secured, message: _shares_of(secured, message, (0, 1, 2, 3, 4)),
            "Shares came of a member that has sent no keys.",
        ),
    ],
)
def test_shares_that_are_not_the_members_own_end_the_session(
    agent: Agent, service: FakeService, lie: Lie, sentence: str
) -> None:
    secured = SecuredRound(identity_of(agent))
    secured.lies[Step.SHARES] = lambda message: lie(secured, message)
    service.offer_secured(secured)

    finish(agent, service)

    assert_left_before_anything_left(agent, service, secured, sentence)


# --- Survivors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        (lambda mine, everybody: [place for place in everybody if place != mine], "own update is not in the sum"),
        (lambda mine, _: sorted({mine, 0}), "Only 2 updates are in the sum; 3 have to be."),
        (lambda _, everybody: [*everybody, len(everybody)], "that has not shared its secrets"),
        (lambda _, everybody: list(reversed(everybody)), "The answer to the update"),
        (lambda _, everybody: [everybody[0], *everybody], "The answer to the update"),
    ],
)
def test_a_set_of_survivors_that_hides_too_little_is_not_signed(
    agent: Agent,
    service: FakeService,
    caplog: pytest.LogCaptureFixture,
    told: Callable[[int, list[int]], list[int]],
    sentence: str,
) -> None:
    secured = SecuredRound(identity_of(agent))
    answer = server.survivors_answer(told(secured.index, list(secured.survivors)))
    secured.lies[Step.UPDATE] = lambda _message: answer
    service.offer_secured(secured)

    finish(agent, service)

    assert secured.messages(Step.SURVIVORS) == []
    assert_left_after_the_upload(agent, service, secured, caplog, sentence)


def _others_signed_another_set(secured: SecuredRound, message: bytes) -> bytes:
    """Two sets of survivors: the others were told that one more has left."""
    fewer = secured.survivors[:-1]
    return server.confirmations_answer({**secured.confirmations(fewer), secured.index: message})


def _too_few_signed(secured: SecuredRound, message: bytes) -> bytes:
    one = dict(list(secured.confirmations(secured.survivors).items())[:1])
    return server.confirmations_answer({**one, secured.index: message})


def _forged(secured: SecuredRound, message: bytes) -> bytes:
    signatures = dict.fromkeys(secured.others, message)
    return server.confirmations_answer({**signatures, secured.index: message})


def _replayed(secured: SecuredRound, message: bytes) -> bytes:
    """The others' signatures of the same set in another attempt."""
    truth, secured.context = secured.context, secured.next_attempt().context
    signatures = secured.confirmations(secured.survivors)
    secured.context = truth
    return server.confirmations_answer({**signatures, secured.index: message})


@pytest.mark.parametrize(
    ("lie", "sentence"),
    [
        (_others_signed_another_set, "did not sign this set of survivors in this attempt"),
        (_replayed, "did not sign this set of survivors in this attempt"),
        (_forged, "did not sign this set of survivors in this attempt"),
        (_too_few_signed, "Only 2 members signed the survivors; 4 have to."),
    ],
)
def test_without_enough_signatures_of_the_same_set_no_share_is_revealed(
    agent: Agent, service: FakeService, caplog: pytest.LogCaptureFixture, lie: Lie, sentence: str
) -> None:
    secured = SecuredRound(identity_of(agent), members=5)
    secured.lies[Step.SURVIVORS] = lambda message: lie(secured, message)
    service.offer_secured(secured)

    finish(agent, service)

    assert_left_after_the_upload(agent, service, secured, caplog, sentence)


def test_once_shares_are_revealed_a_later_attempt_is_signed_for_the_same_survivors_only(
    agent: Agent, service: FakeService, caplog: pytest.LogCaptureFixture
) -> None:
    """The difference of two sums would be the update of whoever is in one of them."""
    first = SecuredRound(identity_of(agent), members=5)
    service.offer_secured(first)
    assert Outcome.SUMMED in finish(agent, service)

    other = first.next_attempt(leaving=frozenset({"jena"}))
    service.offer_secured(other)
    finish(agent, service)
    assert other.messages(Step.SURVIVORS) == []
    assert_left_after_the_upload(agent, service, other, caplog, "for another set of survivors")

    same = other.next_attempt(leaving=frozenset())
    service.offer_secured(same)
    assert Outcome.SUMMED in finish(agent, service)


# --- Attempts ---------------------------------------------------------------------------------------------------------


def test_an_attempt_that_is_over_is_not_begun_again_so_that_nobody_asks_for_the_other_kind_of_share(
    agent: Agent, service: FakeService
) -> None:
    secured = SecuredRound(identity_of(agent))
    service.offer_secured(secured)
    assert Outcome.SUMMED in finish(agent, service)
    secured.fence = 2
    service.offer_secured(secured)

    finish(agent, service)

    assert service.refused == ["Attempt 1 of round 1 is over for this worker, and its keys are deleted."]
    assert len(secured.messages(Step.UNMASK)) == 1


@pytest.mark.parametrize(
    ("again", "sentence"),
    [
        (lambda round_: round_.next_attempt(attempt=1), "Attempt 1 of round 2 is over for this worker: it has taken"),
        (lambda round_: round_.next_attempt(number=1), "Round 1 is over for this worker: it has taken part in round 2"),
        (lambda round_: round_.next_attempt(round_id=UUID(int=77)), "Round 2 has another id than"),
        (lambda round_: round_.next_attempt(attempt=2, members=5), "has another roster than when this worker joined"),
    ],
)
def test_an_attempt_that_was_seen_before_or_has_changed_is_refused(
    agent: Agent, service: FakeService, again: Callable[[SecuredRound], SecuredRound], sentence: str
) -> None:
    second = SecuredRound(identity_of(agent), number=2, attempt=2, held={Step.SHARES})
    service.offer_secured(second)
    assert agent.step() is Outcome.PARKED

    replayed = again(second)
    service.offer_secured(replayed)
    until(agent, lambda: bool(service.refused))

    assert sentence in service.refused[0]
    assert replayed.heard == []


def test_another_model_for_the_same_round_is_refused(agent: Agent, service: FakeService) -> None:
    first = SecuredRound(identity_of(agent), held={Step.SHARES})
    offer = service.offer_secured(first)
    assert agent.step() is Outcome.PARKED
    again = first.next_attempt()
    service.offer_secured(again, model=offer.model.model_copy(update={"digest": "ab" * 32}))

    until(agent, lambda: bool(service.refused))

    assert "released before, for another model" in service.refused[0]


# --- Offers -----------------------------------------------------------------------------------------------------------


def _contradictions(**changes: Any) -> list[str]:
    secured = SecuredRound(bytes(32))
    return contradictions(secured.offer(**changes), organization=ORGANIZATION, datasets=[DATASET])


def _place(**changes: Any) -> SecuredOffer:
    found = SecuredRound(bytes(32)).offer().secured
    assert found is not None
    return found.model_copy(update=changes)


def test_an_honest_offer_of_a_secured_round_contradicts_itself_in_nothing() -> None:
    assert _contradictions() == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"secured": None}, "The job is under secure aggregation, and the task is not."),
        ({"secured": _place(members=3, index=3)}, "This worker's place 3 is not among the 3 of the round."),
        ({"attempt": 0}, "0 is no number of an attempt: a round of this job has 512 at most."),
        ({"attempt": 513}, "513 is no number of an attempt: a round of this job has 512 at most."),
    ],
)
def test_an_offer_that_is_not_secured_as_the_job_says_is_refused(changes: dict[str, Any], sentence: str) -> None:
    assert sentence in " ".join(_contradictions(**changes))


def test_a_round_with_fewer_members_than_the_job_sums_is_refused() -> None:
    secured = SecuredRound(bytes(32), make_secured_spec(cohort={"min_updates": 5}))

    found = contradictions(secured.offer(), organization=ORGANIZATION, datasets=[DATASET])

    assert found == ["The round has 4 members; the job sums no fewer than 5 updates."]


def test_an_open_upload_for_a_secured_job_is_refused() -> None:
    offer = SecuredRound(bytes(32)).offer()
    tensors = {**offer.upload_manifest.tensors, "0.weight": TensorSpec(dtype=DType.F32, shape=(2, 3))}
    del tensors[MASKED]
    changed = offer.upload_manifest.model_copy(update={"tensors": tensors})

    assert "The upload's manifest is not what" in " ".join(_contradictions(upload_manifest=changed))


def test_a_task_of_a_plain_job_is_not_secured_on_the_way() -> None:
    offer = make_offer(make_spec(), secured=_place())

    found = contradictions(offer, organization=ORGANIZATION, datasets=[DATASET])

    assert found == ["The task is under secure aggregation, which the job does not ask for here."]
