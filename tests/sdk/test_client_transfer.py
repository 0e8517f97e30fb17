"""Models arrive whole, verified and durable, or not at all; events arrive once and in order."""

import hashlib
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import pytest

from isthmus.client import BadResponse, Client, Clock, Refused, Unreachable
from isthmus.testing import BASE_URL, NOW, FakeService, sample_events, sample_id, sample_job
from isthmus.wire.base import Page, format_repr_digest, parse_repr_digest
from isthmus.wire.events import EventKind, EventView
from isthmus.wire.jobs import JobState
from isthmus.wire.problems import ProblemCode
from isthmus.wire.rounds import ModelReference
from tests.sdk.loopback import read_head, response, script

MODEL = bytes(range(256)) * 12_000  # 3 MB
DIGEST = hashlib.sha256(MODEL).hexdigest()
JOB = sample_id(5)


class Flaky(httpx.BaseTransport):
    """Serves MODEL, cuts after so many bytes, and takes ranges up."""

    def __init__(self, *cuts: int, etag: str | None = DIGEST, ranges: bool = True) -> None:
        self.cuts = list(cuts)
        self.etag = etag
        self.ranges = ranges
        self.asked: list[tuple[str | None, str | None]] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        asked = request.headers.get("Range")
        self.asked.append((asked, request.headers.get("If-Range")))
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.ranges else 0
        cut = self.cuts.pop(0) if self.cuts else None
        headers = {"Content-Length": str(len(MODEL) - start)}
        if self.etag is not None:
            headers["ETag"] = f'"{self.etag}"'
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(MODEL) - 1}/{len(MODEL)}"

        def body() -> Iterator[bytes]:
            end = len(MODEL) if cut is None else cut
            for at in range(start, end, 100_000):
                yield MODEL[at : min(end, at + 100_000)]
            if cut is not None:
                raise httpx.ReadError("cut")

        return httpx.Response(206 if start else 200, headers=headers, content=body())


def client(transport: httpx.BaseTransport) -> Client:
    clock = Clock(sleep=lambda _: None, chance=lambda: 0.0, now=lambda: NOW)
    return Client(BASE_URL, "isk_a_b", transport=transport, clock=clock)


def test_a_checkpoint_is_written_under_its_name_when_its_bytes_are_verified(tmp_path: Path) -> None:
    told: list[tuple[int, int | None]] = []
    target = tmp_path / "model.safetensors"
    with client(Flaky()) as at:
        assert at.checkpoints.download(DIGEST, target, progress=lambda *now: told.append(now)) == DIGEST
    assert target.read_bytes() == MODEL
    assert told[-1] == (len(MODEL), len(MODEL))
    assert list(tmp_path.iterdir()) == [target]


def test_a_cut_download_goes_on_where_it_was(tmp_path: Path) -> None:
    flaky = Flaky(1_000_000, 2_000_000)
    with client(flaky) as at:
        at.jobs.download_model(JOB, tmp_path / "model")
    assert (tmp_path / "model").read_bytes() == MODEL
    assert flaky.asked == [
        (None, None),
        ("bytes=1000000-", f'"{DIGEST}"'),
        ("bytes=2000000-", f'"{DIGEST}"'),
    ]


def test_a_service_without_ranges_is_read_from_the_start_again(tmp_path: Path) -> None:
    with client(Flaky(1_000_000, ranges=False)) as at:
        at.jobs.download_model(JOB, tmp_path / "model")
    assert (tmp_path / "model").read_bytes() == MODEL


def test_cuts_that_bring_something_do_not_use_up_the_attempts(tmp_path: Path) -> None:
    with client(Flaky(*range(100_000, 2_000_000, 100_000))) as at:
        at.jobs.download_model(JOB, tmp_path / "model")
    assert (tmp_path / "model").read_bytes() == MODEL


def test_a_range_that_cannot_be_is_begun_again(tmp_path: Path) -> None:
    service = FakeService()
    flaky = Flaky(1_000_000)
    service.answer("GET", "/v1/jobs/*/model", flaky.handle_request)
    service.refuse("GET", "/v1/jobs/*/model", ProblemCode.RANGE_NOT_SATISFIABLE)
    service.answer("GET", "/v1/jobs/*/model", flaky.handle_request)
    with service.client() as at:
        at.jobs.download_model(JOB, tmp_path / "model")
    assert (tmp_path / "model").read_bytes() == MODEL
    assert flaky.asked == [(None, None), (None, None)]


def test_cuts_that_bring_nothing_do(tmp_path: Path) -> None:
    with client(Flaky(*[0] * 10)) as at, pytest.raises(Unreachable):
        at.jobs.download_model(JOB, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("digest", "etag", "what"),
    [
        ("00" * 32, DIGEST, "not 0000"),
        (None, "00" * 32, "not 0000"),
        (None, "v1", "names no digest"),
        (None, None, "no digest"),
    ],
)
def test_bytes_that_are_not_those_named_leave_no_file(
    tmp_path: Path, digest: str | None, etag: str | None, what: str
) -> None:
    target = tmp_path / "model"
    target.write_bytes(b"the old one")
    with client(Flaky(etag=etag)) as at:
        fetch = partial(at.checkpoints.download, digest) if digest else partial(at.jobs.download_model, JOB)
        with pytest.raises(BadResponse, match=what):
            fetch(target)
    assert target.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [target]


def test_more_bytes_than_the_offer_said_are_not_kept(tmp_path: Path) -> None:
    reference = ModelReference(url=f"/v1/checkpoints/{DIGEST}", digest=DIGEST, size_bytes=len(MODEL) - 1)
    with client(Flaky()) as at, pytest.raises(BadResponse, match="more than"):
        at.tasks.download_model(reference, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("prefix", ["", BASE_URL])
def test_a_tasks_model_is_fetched_from_the_service(tmp_path: Path, prefix: str) -> None:
    reference = ModelReference(url=f"{prefix}/v1/checkpoints/{DIGEST}", digest=DIGEST, size_bytes=len(MODEL))
    with client(Flaky()) as at:
        assert at.tasks.download_model(reference, tmp_path / "model") == DIGEST


@pytest.mark.parametrize(
    "url", ["https://evil.test/x", "//evil.test/x", "http://169.254.169.254/", f"{BASE_URL}.evil/x", "x"]
)
def test_a_model_elsewhere_is_not_fetched(tmp_path: Path, url: str) -> None:
    flaky = Flaky()
    reference = ModelReference(url=url, digest=DIGEST, size_bytes=len(MODEL))
    with client(flaky) as at, pytest.raises(BadResponse, match="not the service's"):
        at.tasks.download_model(reference, tmp_path / "model")
    assert flaky.asked == []


@pytest.mark.parametrize("as_file", [True, False])
def test_a_model_is_uploaded_with_its_digest_and_again_after_a_cut(tmp_path: Path, as_file: bool) -> None:
    seen: list[httpx.Request] = []
    path = tmp_path / "model"
    path.write_bytes(MODEL)

    def handle(request: httpx.Request) -> httpx.Response:
        assert request.read() == MODEL
        seen.append(request)
        if len(seen) == 1:
            raise httpx.WriteError("cut")
        return httpx.Response(200, content=sample_job().model_dump_json().encode())

    with client(httpx.MockTransport(handle)) as at:
        at.jobs.upload_model(JOB, path if as_file else MODEL)
    assert len(seen) == 2
    assert seen[1].headers["content-length"] == str(len(MODEL))
    assert "transfer-encoding" not in seen[1].headers
    assert parse_repr_digest(seen[1].headers["repr-digest"]) == DIGEST


STORY = list(
    sample_events(EventKind.JOB_STARTED, EventKind.JOB_RUNNING, EventKind.ROUND_OPENED, EventKind.JOB_COMPLETED)
)


def sse(*events: EventView) -> bytes:
    told = [f"id: {event.sequence}\nevent: {event.kind}\ndata: {event.model_dump_json()}\n\n" for event in events]
    return (": here\n\n" + "".join(told)).encode()


class Streams(httpx.BaseTransport):
    """Answers the event stream with one body after the other; an exception cuts after it."""

    def __init__(self, *bodies: bytes | Exception | httpx.Response, job: JobState = JobState.RUNNING) -> None:
        self.bodies = list(bodies)
        self.job = job
        self.last_ids: list[str | None] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if not request.url.path.endswith("/events"):
            return httpx.Response(200, content=sample_job(self.job).model_dump_json().encode())
        if request.headers["Accept"] != "text/event-stream":
            return httpx.Response(
                200, content=Page[EventView](items=STORY, next_cursor=None).model_dump_json().encode()
            )
        self.last_ids.append(request.headers.get("Last-Event-ID"))
        body = self.bodies.pop(0) if len(self.bodies) > 1 else self.bodies[0]
        if isinstance(body, httpx.Response):
            return body
        if isinstance(body, Exception):
            raise body
        cut = isinstance(self.bodies[0], Exception)

        def stream() -> Iterator[bytes]:
            yield body
            if cut:
                raise self.bodies.pop(0)  # type: ignore[misc]

        return httpx.Response(200, headers={"Content-Type": "text/event-stream"}, content=stream())


def test_events_come_once_and_in_order_over_cuts() -> None:
    streams = Streams(sse(*STORY[:2]), httpx.ReadError("cut"), httpx.ConnectError("down"), sse(*STORY[1:]))
    with client(streams) as at:
        assert list(at.jobs.events(JOB)) == STORY
    assert streams.last_ids == [None, "2", "2"]


def test_following_begins_after_the_number_given_and_ends_with_the_job() -> None:
    streams = Streams(sse(*STORY[2:]))
    with client(streams) as at:
        assert [event.sequence for event in at.jobs.events(JOB, after=2)] == [3, 4]
    assert streams.last_ids == ["2"]


def test_a_stream_that_ends_in_good_order_is_taken_up_again_while_the_job_runs() -> None:
    streams = Streams(sse(), sse(*STORY[:1]), sse(*STORY[1:]))
    with client(streams) as at:
        assert list(at.jobs.events(JOB)) == STORY


def test_a_job_that_ended_before_is_not_waited_for() -> None:
    with client(Streams(sse(), job=JobState.COMPLETED)) as at:
        assert list(at.jobs.events(JOB, after=4)) == []
        assert list(at.jobs.events(JOB, after=3)) == STORY[3:]


def test_what_is_there_can_be_had_without_following() -> None:
    with client(Streams(sse())) as at:
        assert list(at.jobs.events(JOB, after=1, follow=False)) == STORY[1:]


def test_a_stream_that_stays_away_is_given_up() -> None:
    with client(Streams(httpx.ConnectError("down"))) as at, pytest.raises(Unreachable):
        list(at.jobs.events(JOB))


def test_a_refused_stream_is_refused() -> None:
    service = FakeService()
    service.refuse("GET", "/v1/jobs/*/events", ProblemCode.NOT_FOUND)
    with service.client() as at, pytest.raises(Refused):
        list(at.jobs.events(JOB))
    assert len(service.requests) == 1


def test_an_event_of_a_newer_service_is_skipped() -> None:
    newer = (
        sse(*STORY)
        .replace(b"event: job-running", b"event: job-levitated")
        .replace(b'"job-running"', b'"job-levitated"')
    )
    with client(Streams(newer)) as at:
        assert [event.sequence for event in at.jobs.events(JOB)] == [1, 3, 4]


@pytest.mark.parametrize(
    ("media_type", "body"), [("text/html", b"<html>"), ("text/event-stream", b"event: job-started\ndata: {}\n\n")]
)
def test_what_is_no_stream_of_events_is_a_bad_response(media_type: str, body: bytes) -> None:
    response = httpx.Response(200, headers={"Content-Type": media_type}, content=body)
    with client(Streams(response)) as at, pytest.raises(BadResponse):
        list(at.jobs.events(JOB))


def test_the_digest_may_come_by_repr_digest(tmp_path: Path) -> None:
    service = FakeService()
    service.answer("GET", "/v1/jobs/*/model", MODEL, headers={"Repr-Digest": format_repr_digest(DIGEST)})
    with service.client() as at:
        assert at.jobs.download_model(JOB, tmp_path / "model") == DIGEST


LARGE = bytes(range(251)) * 20_000  # 5 MB: more than _streaming.LARGE_BYTES


@pytest.mark.parametrize("announced", [True, False])
def test_a_large_model_is_fetched_over_a_connection_of_its_own(tmp_path: Path, announced: bool) -> None:
    heads: list[bytes] = []

    def play(connection: socket.socket) -> None:
        heads.append(read_head(connection))
        length = f"Content-Length: {len(LARGE)}\r\n" if announced else "Connection: close\r\n"
        connection.sendall(f"HTTP/1.1 200 OK\r\n{length}\r\n".encode() + LARGE)

    with script(play) as port:
        fetch_large(port, tmp_path / "m")

    assert (tmp_path / "m").read_bytes() == LARGE
    assert b"Authorization: Bearer isk_a_b\r\n" in heads[0]


def test_a_large_model_that_is_cut_or_held_back_goes_on_where_it_was(tmp_path: Path) -> None:
    heads: list[bytes] = []
    cut = 1_234_567

    def play(connection: socket.socket) -> None:
        heads.append(read_head(connection))
        etag = f'ETag: "{hashlib.sha256(LARGE).hexdigest()}"\r\n'
        if len(heads) == 1:
            connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {len(LARGE)}\r\n{etag}\r\n".encode() + LARGE[:cut])
        elif len(heads) == 2:
            connection.sendall(response(503, b"later"))
        else:
            there = (
                f"Content-Range: bytes {cut}-{len(LARGE) - 1}/{len(LARGE)}\r\nContent-Length: {len(LARGE) - cut}\r\n"
            )
            connection.sendall(f"HTTP/1.1 206 Partial\r\n{there}{etag}\r\n".encode() + LARGE[cut:])

    with script(play) as port:
        fetch_large(port, tmp_path / "m")

    assert (tmp_path / "m").read_bytes() == LARGE
    assert [f"Range: bytes={cut}-\r\n".encode() in head for head in heads] == [False, True, True]


def test_a_large_model_that_is_refused_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    def play(connection: socket.socket) -> None:
        read_head(connection)
        connection.sendall(response(404, b"{}"))

    with script(play) as port, pytest.raises(BadResponse, match="404"):
        fetch_large(port, tmp_path / "m")

    assert list(tmp_path.iterdir()) == []


def test_what_gives_a_large_model_without_speaking_http_is_a_bad_response(tmp_path: Path) -> None:
    def play(connection: socket.socket) -> None:
        read_head(connection)
        connection.sendall(b"220 mail.example.org\r\n\r\n")

    with script(play) as port, pytest.raises(BadResponse, match="does not speak HTTP"):
        fetch_large(port, tmp_path / "m")


def fetch_large(port: int, target: Path) -> None:
    """LARGE from a service on this port, as a worker asks for it."""
    address, digest = f"http://127.0.0.1:{port}", hashlib.sha256(LARGE).hexdigest()
    clock = Clock(sleep=lambda _: None, chance=lambda: 0.0, now=lambda: NOW)
    with Client(address, "isk_a_b", clock=clock) as worker:
        model = ModelReference(digest=digest, size_bytes=len(LARGE), url=f"{address}/v1/checkpoints/{digest}")
        worker.tasks.download_model(model, target)
