"""Messages of secured rounds that come twice, late, early, from somebody else, or are none; and masked uploads."""

import hashlib
import itertools
from collections.abc import Callable, Iterator

import httpx
import numpy as np
import pytest

from isthmus.codec import arrays
from isthmus.secagg.messages import ADVERTISEMENT_BYTES, REVEALED_BYTES, SEALED_BYTES, SIGNATURE_BYTES
from isthmus.wire.jobs import JobState
from isthmus.wire.problems import ProblemCode
from isthmus.wire.rounds import RoundPhase
from isthmus.wire.secured import MASKED, Step
from isthmus.wire.version import FENCE_HEADER, SECAGG_MEDIA_TYPE
from tests.federation import Federation, filled, job_spec
from tests.running import missing_id, refused
from tests.secured import STEPS, Masking, assert_published, enter, go, pass_step, secured_spec, take
from tests.standing import Wire, assert_problem, put_update, update_headers

MakeFederation = Callable[..., Federation]
WITH_A_MESSAGE = tuple(step for step in STEPS if step is not Step.UPDATE)


@pytest.fixture
def four(make_federation: MakeFederation) -> Federation:
    """Four sites, of which three are the threshold."""
    return make_federation(sites=4)


def post(
    federation: Federation, member: Masking, step: str, body: bytes, *, media_type: str = SECAGG_MEDIA_TYPE
) -> httpx.Response:
    """Send any bytes as a message."""
    headers = {"content-type": media_type, FENCE_HEADER: str(member.offer.fence)}
    http = federation.platform.http(member.site.worker)
    return http.post(f"/v1/tasks/{member.offer.task_id}/steps/{step}", content=body, headers=headers)


def until_step(members: list[Masking], step: Step) -> None:
    """All have gone through the steps before."""
    for one in STEPS[: STEPS.index(step)]:
        take(members, one)


@pytest.mark.parametrize("step", STEPS)
def test_the_same_message_gets_the_same_answer_however_late(four: Federation, step: Step) -> None:
    job = four.start(secured_spec())
    members = enter(four.sites)
    until_step(members, step)
    take(members, step)
    answers = [dict(member.answers) for member in members]

    for later in STEPS[STEPS.index(step) + 1 :]:
        for member, before in zip(members, answers, strict=True):
            assert member.exchange(step, member.sent[step]) == before[step]
        take(members, later)

    assert four.finish(job).state is JobState.COMPLETED


def test_who_signs_late_gets_what_the_others_got_and_may_help(four: Federation) -> None:
    job = four.start(secured_spec())
    members = enter(four.sites)
    go(members, through=Step.UPDATE)
    take(members[:3], Step.SURVIVORS)
    assert four.researcher.jobs.round(job.id, 1).phase is RoundPhase.UNMASKING

    assert members[3].exchange(Step.SURVIVORS) == members[0].answers[Step.SURVIVORS]
    take(members[1:], Step.UNMASK)

    assert four.finish(job).state is JobState.COMPLETED
    assert_published(four, job, members)


def test_an_answer_that_is_not_needed_any_more_is_taken_all_the_same(four: Federation) -> None:
    job = four.start(secured_spec())
    members = enter(four.sites)
    go(members, through=Step.SURVIVORS)
    last = members[3].message(Step.UNMASK)
    take(members[:3], Step.UNMASK)
    four.finish(job)

    assert members[3].exchange(Step.UNMASK, last) == b""
    with refused(ProblemCode.STEP_CLOSED):
        members[3].exchange(Step.SURVIVORS, members[3].sent[Step.SURVIVORS])


@pytest.mark.parametrize("step", WITH_A_MESSAGE)
def test_another_message_is_refused_and_the_first_one_stays(four: Federation, step: Step) -> None:
    job = four.start(secured_spec())
    members = enter(four.sites)
    until_step(members, step)
    first = members[0].message(step)
    members[0].exchange(step, first)
    # Whoever draws new secrets, or signs another set, has another message of the right form.
    other = bytearray(first)
    other[-1] ^= 1

    with refused(ProblemCode.STEP_CONFLICT):
        members[0].exchange(step, bytes(other))

    assert members[0].exchange(step, first) == (b"" if step is Step.UNMASK else None)
    for later in STEPS[STEPS.index(step) :]:
        take(members, later)
    assert four.finish(job).state is JobState.COMPLETED
    assert_published(four, job, members)


@pytest.mark.parametrize("step", [Step.KEYS, Step.SHARES])
def test_a_message_that_comes_after_its_step_has_closed_is_refused(four: Federation, step: Step) -> None:
    job = four.start(secured_spec())
    members = enter(four.sites)
    until_step(members, step)
    late = members[3].message(step)
    for member in members[:3]:
        member.exchange(step)
    pass_step(four)
    four.until(lambda: members[0].exchange(step, wait_s=5))

    for one in (step, STEPS[STEPS.index(step) + 1]):
        with refused(ProblemCode.STEP_CLOSED) as refusals:
            members[3].exchange(one, late if one is step else b"")
        assert step.value in refusals[0].detail

    (member,) = (task for task in four.researcher.jobs.round(job.id, 1).tasks if task.id == members[3].offer.task_id)
    assert member.detail is not None
    assert step.value in member.detail


@pytest.mark.parametrize(("step", "early"), list(itertools.pairwise(STEPS)))
def test_a_message_before_its_step_is_open_is_refused(four: Federation, step: Step, early: Step) -> None:
    four.start(secured_spec())
    members = enter(four.sites)
    until_step(members, step)

    with refused(ProblemCode.MESSAGE_INVALID) as refusals:
        members[0].exchange(early, b"")

    assert f"the round is at {step.value}" in refusals[0].detail


SIZES = {
    Step.KEYS: ADVERTISEMENT_BYTES,
    Step.SHARES: 3 * SEALED_BYTES,
    Step.UPDATE: 0,
    Step.SURVIVORS: SIGNATURE_BYTES,
    Step.UNMASK: 4 * REVEALED_BYTES,
}


def malformed(member: Masking, step: Step) -> Iterator[bytes]:
    """Messages that a step does not take: cut, and of the right length but senseless."""
    right = member.message(step)
    assert len(right) == SIZES[step]
    if step is Step.UPDATE:
        yield from ()
        return
    yield b""
    yield right[:-1]
    if step is Step.SHARES:
        return  # what is in it only its recipients can tell
    yield bytes(len(right))
    changed = bytearray(right)
    changed[3] ^= 1
    yield bytes(changed)


@pytest.mark.parametrize("step", STEPS)
def test_a_message_that_is_none_is_refused_and_changes_nothing(four: Federation, step: Step) -> None:
    job = four.start(secured_spec())
    members = enter(four.sites)
    until_step(members, step)

    for body in malformed(members[0], step):
        assert_problem(post(four, members[0], step.value, body), ProblemCode.MESSAGE_INVALID)

    for later in STEPS[STEPS.index(step) :]:
        take(members, later)
    assert four.finish(job).state is JobState.COMPLETED
    assert_published(four, job, members)


def test_keys_that_another_member_has_are_refused(four: Federation) -> None:
    """With one member's keys in another's name, everybody would leave the attempt."""
    four.start(secured_spec())
    members = enter(four.sites)
    members[0].exchange(Step.KEYS)
    members[1].secrets = members[0].secrets

    with refused(ProblemCode.MESSAGE_INVALID) as refusals:
        members[1].exchange(Step.KEYS)

    assert "twice" in refusals[0].detail


def test_keys_under_another_identity_are_refused(four: Federation) -> None:
    four.start(secured_spec())
    members = enter(four.sites)
    members[1].sign = members[0].sign  # type: ignore[method-assign] -- a thief with a key of its own

    with refused(ProblemCode.MESSAGE_INVALID) as refusals:
        members[1].exchange(Step.KEYS)

    assert "identity" in refusals[0].detail


@pytest.mark.parametrize("step", STEPS)
def test_a_body_longer_than_any_message_of_its_step_is_not_read(four: Federation, step: Step) -> None:
    four.start(secured_spec())
    (member,) = enter(four.sites[:1])
    largest = {Step.SHARES: 511 * SEALED_BYTES, Step.UNMASK: 512 * REVEALED_BYTES}.get(step, SIZES[step])

    assert_problem(post(four, member, step.value, bytes(largest + 1)), ProblemCode.BODY_TOO_LARGE)


def test_a_body_of_another_kind_or_a_step_that_is_none_is_refused(four: Federation) -> None:
    four.start(secured_spec())
    (member,) = enter(four.sites[:1])

    assert_problem(post(four, member, "keys", b"", media_type="text/plain"), ProblemCode.UNSUPPORTED_MEDIA_TYPE)
    assert_problem(post(four, member, "secrets", b""), ProblemCode.INVALID_REQUEST)


def test_a_task_of_another_worker_or_of_nobody_looks_the_same(four: Federation) -> None:
    four.start(secured_spec())
    members = enter(four.sites)

    for task_id in (members[1].offer.task_id, missing_id()):
        with refused(ProblemCode.NOT_FOUND):
            members[0].site.worker.tasks.exchange(task_id, Step.KEYS, members[1].message(Step.KEYS), fence=1, wait_s=0)


def test_under_another_fence_nothing_is_taken_or_told(four: Federation) -> None:
    four.start(secured_spec())
    members = enter(four.sites)
    take(members, Step.KEYS)
    client, offer = members[0].site.worker, members[0].offer

    for step in (Step.KEYS, Step.SHARES):
        with refused(ProblemCode.LEASE_LOST):
            client.tasks.exchange(offer.task_id, step, members[0].message(step), fence=offer.fence + 1, wait_s=0)


def test_a_task_that_is_not_claimed_or_was_given_up_sends_nothing(four: Federation) -> None:
    job = four.start(secured_spec())
    task = four.researcher.jobs.round(job.id, 1).tasks[0]
    with refused(ProblemCode.TASK_NOT_CLAIMED):
        four.sites[0].worker.tasks.exchange(task.id, Step.KEYS, b"", fence=1, wait_s=0)
    (member,) = enter(four.sites[:1])

    member.site.refuse(member.offer)

    with refused(ProblemCode.TASK_NOT_OPEN):
        member.exchange(Step.KEYS)


def test_a_round_without_secure_aggregation_has_no_steps(four: Federation) -> None:
    four.start(job_spec())
    offer = four.sites[0].claim()

    assert offer.secured is None
    with refused(ProblemCode.INVALID_REQUEST) as refusals:
        four.sites[0].worker.tasks.exchange(offer.task_id, Step.KEYS, b"", fence=offer.fence, wait_s=0)
    assert "no steps" in refusals[0].detail


# --- Masked uploads ---------------------------------------------------------------------------------------------------


def test_a_masked_update_before_the_shares_have_closed_is_refused_and_costs_nothing(four: Federation) -> None:
    four.start(secured_spec())
    members = enter(four.sites)
    take(members, Step.KEYS)

    with refused(ProblemCode.MESSAGE_INVALID):
        members[0].site.hand_in(members[0].offer, {MASKED: np.zeros(6, np.uint32)})

    assert four.platform.execute("SELECT count(*) FROM ledger_entries WHERE kind = 'spend'") == [(0,)]


def test_a_masked_update_of_who_was_left_behind_is_refused(four: Federation) -> None:
    four.start(secured_spec())
    members = enter(four.sites)
    take(members, Step.KEYS)
    for member in members[:3]:
        member.exchange(Step.SHARES)
    pass_step(four)
    four.until(lambda: members[0].exchange(Step.SHARES, wait_s=5))

    with refused(ProblemCode.TASK_NOT_OPEN) as refusals:
        members[3].site.hand_in(members[3].offer, {MASKED: np.zeros(6, np.uint32)})

    assert "shares" in refusals[0].detail
    # And by the attempt alone, whatever its task says:
    four.platform.execute("UPDATE tasks SET state = 'claimed' WHERE id = %s", [members[3].offer.task_id])
    with refused(ProblemCode.STEP_CLOSED):
        members[3].site.hand_in(members[3].offer, {MASKED: np.zeros(6, np.uint32)})


def test_another_vector_under_the_same_keys_is_refused(four: Federation) -> None:
    """The difference of the two would be the difference of the vectors, without any mask."""
    four.start(secured_spec())
    members = enter(four.sites)
    go(members, through=Step.SHARES)
    body = arrays.encode(members[0].masked())
    again = members[0].masked()
    again[MASKED] = again[MASKED] + np.uint32(1)
    with Wire(four, members[0].site.worker) as wire:  # admitted, and then cut off
        wire.put(members[0].offer, {**update_headers(members[0].offer, body), "expect": "100-continue"})
        assert "100" in wire.first_line()

    for _ in range(2):
        with refused(ProblemCode.UPDATE_CONFLICT):
            members[0].site.hand_in(members[0].offer, again)
        members[0].upload()

    assert members[0].upload().digest == hashlib.sha256(arrays.encode(members[0].masked())).hexdigest()


@pytest.mark.parametrize(
    "tensors",
    [
        filled(1.0),
        {MASKED: np.zeros(5, np.uint32)},
        {MASKED: np.zeros(6, np.int32)},
        {MASKED: np.zeros(6, np.uint32), "metrics/train/loss": np.array(0.5)},
    ],
    ids=["a plain update", "too short", "signed", "with its own numbers"],
)
def test_what_is_no_masked_update_is_refused(four: Federation, tensors: dict[str, np.ndarray]) -> None:
    four.start(secured_spec())
    members = enter(four.sites)
    go(members, through=Step.SHARES)

    refusal = put_update(four, members[0].site, members[0].offer, arrays.encode(tensors))

    assert refusal.status_code in (413, 422)
    assert refusal.json()["code"] in (ProblemCode.TENSORS_MISMATCH, ProblemCode.BODY_TOO_LARGE)
