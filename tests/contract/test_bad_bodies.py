"""Bodies that are no bodies: each is a problem document, and nothing is changed by any of them."""

import json

import pytest

from isthmus.wire.problems import PROBLEMS, ProblemCode
from isthmus.wire.version import PROBLEM_MEDIA_TYPE
from tests.running import Platform

DEEP = 100_000
BODIES = {
    "nothing": b"",
    "no json": b"{",
    "no object": b"[]",
    "null": b"null",
    "a number": b"1e999",
    "NaN": b'{"name": NaN, "display_name": "x"}',
    "not UTF-8": b'{"name": "\xff", "display_name": "x"}',
    "a surrogate": b'{"name": "x", "display_name": "\\ud800"}',
    "NUL in a name": b'{"name": "a\\u0000b", "display_name": "x"}',
    "NUL in a text": b'{"name": "x", "display_name": "a\\u0000b"}',
    "NUL in a field": b'{"name": "x", "display_name": "x", "a\\u0000": 1}',
    "an unknown field": b'{"name": "x", "display_name": "x", "id": "x"}',
    "an object for a text": b'{"name": {"$ne": ""}, "display_name": "x"}',
    "deep lists": b"[" * DEEP + b"]" * DEEP,
    "deep objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "deep in a field": b'{"name": "x", "display_name": ' + b"[" * 900 + b"]" * 900 + b"}",
    "a long name": json.dumps({"name": "x" * 100_000, "display_name": "x"}).encode(),
    "many fields": json.dumps({f"field-{number}": number for number in range(10_000)}).encode(),
    "a huge integer": b'{"name": ' + b"9" * 100_000 + b', "display_name": "x"}',
}


@pytest.mark.parametrize("path", ["/v1/organizations", "/v1/principals", "/v1/api-keys", "/v1/workers"])
def test_a_body_that_is_none_is_a_problem_document(platform: Platform, path: str) -> None:
    http = platform.http(platform.admin)
    tables = ("organizations", "principals", "api_keys", "workers", "events", "idempotency_keys")
    count = "SELECT " + ", ".join(f"(SELECT count(*) FROM {table})" for table in tables)
    platform.admin.me()
    before = platform.execute(count)

    for name, body in BODIES.items():
        headers = {"Content-Type": "application/json", "Idempotency-Key": name}
        answer = http.post(path, content=body, headers=headers)
        assert 400 <= answer.status_code < 500, (name, answer.status_code, answer.text[:300])
        assert answer.headers["content-type"] == PROBLEM_MEDIA_TYPE, name
        document = answer.json()
        assert PROBLEMS[ProblemCode(document["code"])].status == document["status"] == answer.status_code, (
            name,
            document,
        )
        assert len(answer.content) < 1 << 20, name

    assert platform.execute(count) == before


def test_a_body_without_its_media_type_is_refused(platform: Platform) -> None:
    body = b'{"name": "x", "display_name": "x"}'

    for media_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        answer = platform.http(platform.admin).post(
            "/v1/organizations", content=body, headers={"Content-Type": media_type}
        )
        assert answer.status_code in (415, 422), media_type
        assert answer.headers["content-type"] == PROBLEM_MEDIA_TYPE
    assert list(platform.admin.organizations.list()) == []


@pytest.mark.parametrize("key", ["", "x" * 256])
def test_an_idempotency_key_has_bounds(platform: Platform, key: str) -> None:
    answer = platform.http(platform.admin).post(
        "/v1/organizations", json={"name": "x", "display_name": "x"}, headers={"Idempotency-Key": key}
    )

    assert answer.status_code == 422
    assert answer.json()["code"] == "invalid-request"


@pytest.mark.parametrize("value", ["heart", "1", "0" * 32 + "g", "%00", "..%2f..", "' OR 1=1"])
def test_a_name_is_not_an_id(platform: Platform, value: str) -> None:
    http = platform.http(platform.admin)

    for path in ("organizations", "principals", "workers", "datasets"):
        answer = http.get(f"/v1/{path}/{value}")
        assert answer.status_code in (404, 422), (path, value)
        assert answer.headers["content-type"] == PROBLEM_MEDIA_TYPE
