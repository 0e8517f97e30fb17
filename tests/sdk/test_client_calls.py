"""What the client sends, how it pages, what it repeats, and what its errors say."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.utils import format_datetime

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from isthmus.client import BadResponse, Client, Clock, NoWork, Refused, Retries, TimedOut, Unreachable
from isthmus.client._answers import retry_after_s
from isthmus.client._retry import backoff_s
from isthmus.client.receipts import ReceiptInvalid, verify_receipt
from isthmus.testing import (
    BASE_URL,
    NOW,
    FakeService,
    sample_id,
    sample_job,
    sample_me,
    sample_offer,
    sample_organization,
    sample_spec,
)
from isthmus.wire.base import Page
from isthmus.wire.organizations import CreateApiKey, CreateOrganization, OrganizationView
from isthmus.wire.problems import ProblemCode
from isthmus.wire.rounds import ClaimTask, Heartbeat, TaskOffer, UpdateReceipt, receipt_bytes

Handler = Callable[[httpx.Request], httpx.Response]


class Slept(list[float]):
    """A clock that stands still while it notes what was slept, and then jumps."""

    def clock(self) -> Clock:
        return Clock(monotonic=lambda: sum(self), now=lambda: NOW, sleep=self.append, chance=lambda: 1.0)


def client(handler: Handler, slept: Slept, retries: Retries | None = None) -> Client:
    return Client(BASE_URL, "isk_a_b", transport=httpx.MockTransport(handler), clock=slept.clock(), retries=retries)


def in_turn(*outcomes: httpx.Response | Exception) -> tuple[list[httpx.Request], Handler]:
    """Every request that came, and a handler that gives the outcomes in turn."""
    seen: list[httpx.Request] = []
    left = list(outcomes)

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        outcome = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return seen, handle


def json(body: str, status: int = 200, **headers: str) -> httpx.Response:
    return httpx.Response(status, content=body.encode(), headers={"Content-Type": "application/json", **headers})


ME = sample_me().model_dump_json()
JOB = sample_job().model_dump_json()


def test_the_agents_process_imports_no_heavy_package() -> None:
    check = (
        "import sys; import isthmus.client, isthmus.client.receipts, isthmus.wire.rounds; "
        "heavy = {'numpy', 'torch', 'rich', 'typer', 'click', 'pygments', 'yaml', 'pandas'} & set(sys.modules); "
        "assert not heavy, heavy; import httpx; assert 'httpx._main' not in sys.modules; "
        "isthmus.client.Client('http://127.0.0.1:1').close(); assert not {'numpy', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", check], check=True, timeout=60)


def test_a_body_of_the_contract_goes_out_and_one_comes_back() -> None:
    service = FakeService()
    service.answer("POST", "/v1/jobs", sample_job(), status=201)
    with service.client() as at:
        job = at.jobs.create(sample_spec())

    assert job == sample_job()
    sent = service.requests[0]
    assert sent.json() == {"spec": sample_spec().model_dump(mode="json")}
    assert sent.headers["authorization"] == "Bearer isk_test_key"
    assert sent.headers["user-agent"].startswith("isthmus/")
    assert len(sent.headers["idempotency-key"]) == 32


def test_a_creation_keeps_its_idempotency_key_over_retries_and_has_a_new_one_for_the_next_call() -> None:
    slept = Slept()
    seen, handle = in_turn(httpx.ReadError("cut"), json("<html>", 502), json(JOB), json(JOB))
    with client(handle, slept) as at:
        at.jobs.create(sample_spec())
        at.jobs.create(sample_spec())

    keys = [request.headers["idempotency-key"] for request in seen]
    assert len(seen) == 4
    assert keys[0] == keys[1] == keys[2] != keys[3]


def test_a_list_reads_a_page_when_its_first_item_is_asked_for() -> None:
    pages = {
        None: Page[OrganizationView](items=[sample_organization("a"), sample_organization("b")], next_cursor="2"),
        "2": Page[OrganizationView](items=[sample_organization("c")], next_cursor=None),
    }
    seen, _ = in_turn(httpx.Response(200))

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return json(pages[request.url.params.get("cursor")].model_dump_json())

    with client(handle, Slept()) as at:
        listed = at.organizations.list()
        assert seen == []
        assert [next(listed).name, next(listed).name] == ["a", "b"]
        assert len(seen) == 1
        assert [view.name for view in listed] == ["c"]
        assert at.organizations.page(limit=2).next_cursor == "2"
    assert seen[-1].url.params["limit"] == "2"


def test_a_list_that_gives_the_same_page_for_ever_is_ended() -> None:
    page = Page[OrganizationView](items=[sample_organization()], next_cursor="x").model_dump_json()
    with client(lambda _: json(page), Slept()) as at, pytest.raises(BadResponse, match="same page"):
        list(at.organizations.list())


def test_a_refusal_carries_its_code_and_its_fields() -> None:
    service = FakeService()
    service.refuse("GET", "/v1/jobs/*", ProblemCode.FORBIDDEN, "Not yours.")
    with service.client() as at, pytest.raises(Refused, match="Not yours") as refused:
        at.jobs.get(sample_id(5))
    assert refused.value.code is ProblemCode.FORBIDDEN
    assert refused.value.status == 403


def test_a_code_of_a_newer_service_is_a_string() -> None:
    body = '{"type": "x", "code": "moon-too-full", "status": 409, "title": "No", "detail": "Wait.", "errors": []}'
    with client(lambda _: json(body, 409), Slept()) as at, pytest.raises(Refused) as refused:
        at.me()
    assert refused.value.code == "moon-too-full"


@pytest.mark.parametrize(
    ("response", "what"),
    [
        (json("<html>", 404), "without a problem document"),
        (json("{}"), "answered no Me"),
        (json("not json"), "answered no Me"),
        (httpx.Response(302, headers={"Location": "https://login.example"}), "redirects to https://login.example"),
    ],
)
def test_what_does_not_speak_the_contract_is_a_bad_response(response: httpx.Response, what: str) -> None:
    with client(lambda _: response, Slept()) as at, pytest.raises(BadResponse, match=what):
        at.me()


def test_an_endless_answer_is_not_read_to_its_end() -> None:
    def body() -> Iterator[bytes]:
        while True:
            yield b" " * 2**20

    with (
        client(lambda _: httpx.Response(200, content=body()), Slept()) as at,
        pytest.raises(BadResponse, match="more than 32 MiB"),
    ):
        at.me()


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (httpx.ConnectError("refused"), Unreachable),
        (httpx.ConnectTimeout("slow"), Unreachable),
        (httpx.ReadError("cut"), Unreachable),
        (httpx.RemoteProtocolError("garbage"), Unreachable),
        (httpx.ReadTimeout("slow"), TimedOut),
        (json("<html>", 503), Unreachable),
    ],
)
def test_what_repeatedly_fails_is_told_as_one_error(
    failure: httpx.Response | Exception, error: type[Exception]
) -> None:
    seen, handle = in_turn(failure)
    slept = Slept()
    with client(handle, slept) as at, pytest.raises(error, match=BASE_URL):
        at.me()
    assert len(seen) == 5
    assert slept == [0.25, 0.5, 1.0, 2.0]


@pytest.mark.parametrize(
    ("failure", "times"),
    [
        (httpx.ConnectError("refused"), 5),
        (json("{}", 429), 5),
        (httpx.ReadError("cut"), 1),
        (httpx.ReadTimeout("slow"), 1),
        (json("<html>", 503), 1),
    ],
)
def test_a_call_that_may_act_twice_is_repeated_only_where_it_has_not_begun(
    failure: httpx.Response | Exception, times: int
) -> None:
    seen, handle = in_turn(failure)
    with client(handle, Slept()) as at, pytest.raises((Unreachable, TimedOut, BadResponse)):
        at.jobs.start(sample_id(5))
    assert len(seen) == times


def test_the_service_says_how_long_to_wait() -> None:
    slept = Slept()
    later = {"Date": format_datetime(NOW, usegmt=True), "Retry-After": "Sat, 31 Jan 2026 12:00:07 GMT"}
    seen, handle = in_turn(json("{}", 429, **{"Retry-After": "3"}), json("{}", 503, **later), json(ME))
    with client(handle, slept) as at:
        at.me()
    assert slept == [3.0, 7.0]
    assert len(seen) == 3


def test_nobody_waits_longer_than_the_cap() -> None:
    slept = Slept()
    seen, handle = in_turn(json("{}", 503, **{"Retry-After": "120"}))
    with client(handle, slept) as at, pytest.raises(Unreachable):
        at.me()
    assert slept == []
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"retry-after": "12"}, 12.0),
        ({"retry-after": "Sat, 31 Jan 2026 12:01:00 GMT"}, 60.0),
        ({"retry-after": "Sat, 31 Jan 2026 11:00:00 GMT"}, 0.0),
        ({"retry-after": "Sat, 31 Jan 2026 12:01:00 GMT", "date": "Sat, 31 Jan 2026 12:00:50 GMT"}, 10.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-5"}, None),
        ({"retry-after": "²"}, None),
        ({}, None),
    ],
)
def test_retry_after_is_seconds_or_a_date(headers: dict[str, str], expected: float | None) -> None:
    assert retry_after_s(headers, datetime(2026, 1, 31, 12, tzinfo=UTC)) == expected


def test_the_wait_grows_to_its_bound_and_keeps_at_least_half() -> None:
    retries = Retries(first_wait_s=1, longest_wait_s=5)
    assert [backoff_s(retries, attempt, 1.0) for attempt in (1, 2, 3, 4, 10_000)] == [1, 2, 4, 5, 5]
    assert [backoff_s(retries, attempt, 0.0) for attempt in (1, 4)] == [0.5, 2.5]


def test_a_claim_gives_work_or_the_time_to_come_back() -> None:
    service = FakeService()
    service.answer("POST", "/v1/tasks/claim", None, headers={"Retry-After": "4"})
    service.answer("POST", "/v1/tasks/claim", sample_offer())
    with service.client() as at:
        assert at.tasks.claim(ClaimTask(datasets=("heart",)), wait_s=5) == NoWork(4.0)
        offer = at.tasks.claim()
    assert isinstance(offer, TaskOffer)
    assert offer == sample_offer()
    assert service.requests[0].query == {"wait": "5"}
    assert service.requests[0].json() == {"datasets": ["heart"], "holding": None}


def test_a_claim_is_repeated_after_a_cut_and_a_heartbeat_is_not() -> None:
    seen, handle = in_turn(httpx.ReadError("cut"), json(sample_offer().model_dump_json()))
    with client(handle, Slept()) as at:
        assert isinstance(at.tasks.claim(), TaskOffer)
    assert len(seen) == 2
    seen, handle = in_turn(httpx.ReadError("cut"))
    with client(handle, Slept()) as at, pytest.raises(Unreachable):
        at.tasks.heartbeat(sample_id(7), Heartbeat(fence=1))
    assert len(seen) == 1


def test_names_in_addresses_stay_one_segment() -> None:
    seen, handle = in_turn(httpx.Response(404))
    with client(handle, Slept()) as at:
        with pytest.raises(BadResponse):
            at.keys.revoke("a/../b?c")
        with pytest.raises(ValueError, match="no id"):
            at.keys.revoke("..")
    assert [request.url.raw_path for request in seen] == [b"/v1/api-keys/a%2F..%2Fb%3Fc/revoke"]


@pytest.mark.parametrize("address", ["isthmus.example", "ftp://x", "https://", "https://u:p@x", "https://x/?y=1"])
def test_what_is_no_address_is_refused_at_once(address: str) -> None:
    with pytest.raises(ValueError, match="address"):
        Client(address)


def test_the_version_in_an_address_is_not_doubled() -> None:
    with Client("https://isthmus.example/base/v1/") as at:
        assert at.base_url == "https://isthmus.example/base"


def test_every_creation_takes_a_given_idempotency_key() -> None:
    service = FakeService()
    service.answer("POST", "/v1/organizations", sample_organization())
    service.refuse("POST", "/v1/api-keys", ProblemCode.SECRET_SHOWN_ONCE)
    with service.client() as at:
        at.organizations.create(CreateOrganization(name="a", display_name="A"), idempotency_key="mine")
        with pytest.raises(Refused):
            at.keys.create(CreateApiKey(), idempotency_key="mine")
    assert [sent.headers["idempotency-key"] for sent in service.requests] == ["mine", "mine"]


def test_a_receipt_is_believed_only_with_the_pinned_keys_signature() -> None:
    key = Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()
    signature = key.sign(receipt_bytes(sample_id(7), "ab" * 32, NOW)).hex()
    receipt = UpdateReceipt(task_id=sample_id(7), digest="ab" * 32, received_at=NOW, signature=signature)
    verify_receipt(UpdateReceipt.model_validate_json(receipt.model_dump_json()), public)

    for forged in (
        receipt.model_copy(update={"digest": "ac" * 32}),
        receipt.model_copy(update={"signature": "00" * 64}),
        receipt.model_copy(update={"signature": "no hex"}),
    ):
        with pytest.raises(ReceiptInvalid):
            verify_receipt(forged, public)
