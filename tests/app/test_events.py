"""The hash chains: who sees which, that they verify, and that tampering shows."""

import base64
from typing import Any

import pytest

from isthmus.wire.datasets import UsePolicy
from isthmus.wire.events import EventKind, verify_chain
from isthmus.wire.problems import ProblemCode
from tests.running import Platform, missing_id, refused


def busy(platform: Platform) -> str:
    """An organization to which something of every kind happened; its stream."""
    organization = platform.organization()
    steward, worker = platform.steward(organization), platform.worker(organization)
    dataset = platform.dataset(worker, confirmed_by=steward)
    steward.datasets.set_policy(dataset.id, UsePolicy(max_clip_norm=1e16, max_delta=1e-7))
    steward.datasets.retire(dataset.id)
    steward.workers.revoke(dataset.worker_id)
    return f"organization:{organization.id}"


def test_what_happens_to_an_organization_is_one_chain_that_verifies(platform: Platform) -> None:
    events = list(platform.admin.events.list(busy(platform)))

    assert [event.kind for event in events] == [
        EventKind.ENROLLMENT_TOKEN_ISSUED,
        EventKind.WORKER_ENROLLED,
        EventKind.DATASET_ANNOUNCED,
        EventKind.DATASET_BUDGET_SET,
        EventKind.DATASET_CONFIRMED,
        EventKind.DATASET_POLICY_SET,
        EventKind.DATASET_BUDGET_SET,  # the policy takes it away
        EventKind.DATASET_RETIRED,
        EventKind.WORKER_REVOKED,
    ]
    assert verify_chain(events) == events[-1].hash
    with pytest.raises(ValueError, match="event 3 is missing"):
        verify_chain(events[:2] + events[3:])


def test_what_happens_to_the_platform_is_one_chain_that_verifies(platform: Platform) -> None:
    client = platform.researcher()
    issued = client.keys.rotate(client.me().key_id)
    client.keys.revoke(issued.id)
    platform.admin.principals.disable(client.me().principal.id)
    platform.organization()

    events = list(platform.admin.events.list("platform"))

    verify_chain(events)
    assert {event.kind for event in events} == {
        EventKind.ORGANIZATION_CREATED,
        EventKind.PRINCIPAL_CREATED,
        EventKind.PRINCIPAL_DISABLED,
        EventKind.KEY_ISSUED,
        EventKind.KEY_ROTATED,
        EventKind.KEY_REVOKED,
    }
    assert events[0].actor == "service"
    assert events[-1].actor == "admin"


@pytest.mark.parametrize(
    "change",
    [
        "actor = 'nobody'",
        'data = (data::jsonb || \'{"name": "other"}\')::json',
        "at = at + interval '1 microsecond'",
        "kind = 'key-issued'",
        "previous_hash = hash",
        "hash = md5(hash) || md5(hash)",
    ],
)
def test_tampering_past_the_trigger_shows(platform: Platform, change: str) -> None:
    stream = busy(platform)
    platform.execute("ALTER TABLE events DISABLE TRIGGER USER")
    platform.execute(f"UPDATE events SET {change} WHERE stream = %s AND sequence = 2", [stream])

    with pytest.raises(ValueError, match="event"):
        verify_chain(platform.admin.events.list(stream))


def test_events_are_read_on_from_a_number_and_in_pages(platform: Platform) -> None:
    stream = busy(platform)
    events = list(platform.admin.events.list(stream))

    first = platform.admin.events.page(stream, limit=3)
    second = platform.admin.events.page(stream, limit=10, cursor=first.next_cursor)
    assert [*first.items, *second.items] == events
    assert second.next_cursor is None
    answer = platform.http(platform.admin).get("/v1/events", params={"stream": stream, "after": 5}).json()
    assert [item["sequence"] for item in answer["items"]] == [6, 7, 8, 9]


def test_stewards_read_the_chain_of_their_own_organization_only(platform: Platform) -> None:
    own, foreign = platform.organization(), platform.organization()
    platform.worker(foreign)
    steward = platform.steward(own)
    steward.organizations.issue_enrollment_token(own.id)

    assert len(list(steward.events.list(f"organization:{own.id}"))) == 1
    for stream in (f"organization:{foreign.id}", f"organization:{missing_id()}", "platform", f"job:{missing_id()}"):
        with refused(ProblemCode.NOT_FOUND):
            steward.events.page(stream)


def test_nobody_else_reads_chains_here(platform: Platform) -> None:
    organization = platform.organization()

    for client in (platform.researcher(), platform.worker(organization)):
        for stream in ("platform", f"organization:{organization.id}"):
            with refused(ProblemCode.FORBIDDEN):
                client.events.page(stream)


@pytest.mark.parametrize("stream", ["", "Platform", "organization:", "organization:*", "platform\x00", "job:1 OR 1=1"])
def test_a_stream_that_is_none_is_refused(platform: Platform, stream: str) -> None:
    with refused(ProblemCode.INVALID_REQUEST):
        platform.admin.events.page(stream)


def test_no_event_holds_a_secret(platform: Platform) -> None:
    busy(platform)
    texts: list[tuple[Any, ...]] = platform.execute("SELECT e::text FROM events e")

    assert texts
    assert not [text for (text,) in texts if "isk_" in text or "iet_" in text]


@pytest.mark.parametrize("number", ["-1", "2147483648", "9" * 30, "1.5", "\x00"])
def test_a_cursor_beyond_every_number_is_refused(platform: Platform, number: str) -> None:
    cursor = base64.urlsafe_b64encode(number.encode()).decode().rstrip("=")

    with refused(ProblemCode.CURSOR_INVALID):
        platform.admin.events.page("platform", cursor=cursor)
    if number == "\x00":
        with refused(ProblemCode.CURSOR_INVALID):
            platform.admin.keys.page(cursor=cursor)
