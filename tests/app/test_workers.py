"""Workers: a token is good for one of them, and a revoked one is out."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from isthmus.client import Refused
from isthmus.wire.organizations import ROLE_SCOPES, Role
from isthmus.wire.problems import ProblemCode
from tests.running import Platform, introduction, missing_id, refused


def test_an_enrolled_worker_has_a_key_for_tasks_and_the_services_public_key(platform: Platform) -> None:
    organization = platform.organization("cleveland")
    token = platform.admin.organizations.issue_enrollment_token(organization.id).token

    enrolled = platform.client().workers.enroll(introduction(token, "agent-1"))

    me = platform.client(enrolled.api_key).me()
    assert me.worker_id == enrolled.worker.id
    assert set(me.scopes) == ROLE_SCOPES[Role.WORKER]
    assert me.principal.name == "worker:cleveland/agent-1"
    assert enrolled.worker.organization == "cleveland"
    assert enrolled.service_public_key == platform.client().service().service_public_key


def test_a_token_is_used_once(platform: Platform) -> None:
    token = platform.admin.organizations.issue_enrollment_token(platform.organization().id).token
    platform.client().workers.enroll(introduction(token))

    with refused(ProblemCode.ENROLLMENT_REFUSED):
        platform.client().workers.enroll(introduction(token))


def test_of_many_that_present_one_token_at_once_one_is_enrolled(platform: Platform) -> None:
    token = platform.admin.organizations.issue_enrollment_token(platform.organization().id).token
    client = platform.client()

    def enroll(number: int) -> ProblemCode | str | None:
        try:
            client.workers.enroll(introduction(token, f"agent-{number}"))
        except Refused as refusal:
            return refusal.code
        return None

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(enroll, range(8)))

    assert sorted(map(str, answers)) == ["None"] + ["enrollment-refused"] * 7
    assert platform.execute("SELECT count(*) FROM workers") == [(1,)]
    assert platform.execute("SELECT count(*) FROM principals WHERE role = 'worker'") == [(1,)]


def test_used_expired_and_unknown_tokens_answer_alike(platform: Platform) -> None:
    organization = platform.organization()
    used, expired = (platform.admin.organizations.issue_enrollment_token(organization.id) for _ in range(2))
    platform.client().workers.enroll(introduction(used.token))
    platform.execute("UPDATE enrollment_tokens SET expires_at = clock_timestamp() WHERE id = %s", [expired.id])

    answers = set()
    for token in (used.token, expired.token, "iet_" + "0" * 49, "x", platform.keys[platform.admin], "\u0661" * 53):
        with refused(ProblemCode.ENROLLMENT_REFUSED) as refusal:
            platform.client().workers.enroll(introduction(token))
        answers.add((refusal[0].status, refusal[0].detail))

    assert len(answers) == 1


def test_a_refused_enrolment_leaves_the_token_good(platform: Platform) -> None:
    organization = platform.organization()
    platform.worker(organization, "agent-1")
    token = platform.admin.organizations.issue_enrollment_token(organization.id).token

    with refused(ProblemCode.NAME_TAKEN):
        platform.client().workers.enroll(introduction(token, "agent-1"))

    platform.client().workers.enroll(introduction(token, "agent-2"))


def test_a_public_key_is_enrolled_once(platform: Platform) -> None:
    tokens = [platform.admin.organizations.issue_enrollment_token(platform.organization().id).token for _ in range(2)]
    first = introduction(tokens[0])
    platform.client().workers.enroll(first)

    with refused(ProblemCode.STATE_CONFLICT):
        platform.client().workers.enroll(first.model_copy(update={"token": tokens[1], "name": "other"}))


def test_dots_in_names_do_not_make_two_workers_one(platform: Platform) -> None:
    names = {
        platform.worker(platform.organization(organization), worker).me().principal.name
        for organization, worker in (("a.b", "c"), ("a", "b.c"), ("a-b", "c"))
    }

    assert names == {"worker:a.b/c", "worker:a/b.c", "worker:a-b/c"}


def test_workers_are_seen_by_their_stewards_and_by_admins(platform: Platform) -> None:
    own, foreign = platform.organization(), platform.organization()
    steward = platform.steward(own)
    mine, theirs = platform.worker(own).me().worker_id, platform.worker(foreign).me().worker_id
    assert mine is not None
    assert theirs is not None

    assert [worker.id for worker in steward.workers.list()] == [mine]
    assert steward.workers.get(mine).organization == own.name
    assert [worker.id for worker in platform.admin.workers.list()] == [mine, theirs]
    for worker_id in (theirs, missing_id()):
        with refused(ProblemCode.NOT_FOUND):
            steward.workers.get(worker_id)
        with refused(ProblemCode.NOT_FOUND):
            steward.workers.revoke(worker_id)
    with refused(ProblemCode.FORBIDDEN):
        platform.researcher().workers.page()


def test_a_revoked_worker_is_out_with_every_key(platform: Platform) -> None:
    organization = platform.organization()
    steward, worker = platform.steward(organization), platform.worker(organization, "agent-1")
    me = worker.me()
    assert me.worker_id is not None
    rotated = platform.client(worker.keys.rotate(me.key_id).key)

    revoked = steward.workers.revoke(me.worker_id)
    assert revoked.revoked_at is not None
    assert steward.workers.revoke(me.worker_id) == revoked

    for client in (worker, rotated):
        with refused(ProblemCode.KEY_REVOKED):
            client.me()
    assert platform.admin.principals.get(me.principal.id).disabled_at is not None
    assert platform.execute(
        "SELECT count(*) FROM api_keys WHERE revoked_at IS NULL AND principal_id = %s", [me.principal.id]
    ) == [(0,)]
    with refused(ProblemCode.NAME_TAKEN):
        platform.worker(organization, "agent-1")


@pytest.mark.parametrize(
    "change",
    [
        {"name": "UPPER"},
        {"name": "a/b"},
        {"name": "\x00"},
        {"public_key": "00"},
        {"public_key": "g" * 64},
        {"version": "\x00"},
        {"token": ""},
        {"token": "x" * 201},
        {"role": "admin"},
    ],
    ids=str,
)
def test_an_introduction_that_does_not_fit_is_refused(platform: Platform, change: dict[str, str]) -> None:
    token = platform.admin.organizations.issue_enrollment_token(platform.organization().id).token
    body = {**introduction(token).model_dump(mode="json"), **change}

    answer = platform.http().post("/v1/workers", json=body)

    assert answer.status_code == 422
    assert answer.json()["code"] == "invalid-request"
    platform.client().workers.enroll(introduction(token))
