"""An update is admitted on its headers, and the worker knows the moment."""

import hashlib
import socket
import ssl
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path
from uuid import UUID

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from isthmus.client import BadResponse, Client, Refused, TimedOut, Unreachable
from isthmus.testing import NOW, FakeService, sample_id
from isthmus.wire.base import parse_repr_digest
from isthmus.wire.problems import ProblemCode, problem
from isthmus.wire.rounds import UpdateReceipt
from tests.sdk.loopback import Message, read_exactly, read_head, response, script, serve

TASK = sample_id(7)
BODY = bytes(range(251)) * 20_400  # 5 MB: more than the sockets' buffers take, and no piece is like another
DIGEST = hashlib.sha256(BODY).hexdigest()
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def update(tmp_path: Path) -> Path:
    path = tmp_path / "update.safetensors"
    path.write_bytes(BODY)
    return path


class Story(list[str]):
    """What happened, in order."""

    def admitted(self) -> None:
        self.append("admitted")


def receipt(digest: str = DIGEST, task_id: UUID = TASK) -> bytes:
    made = UpdateReceipt(task_id=task_id, digest=digest, received_at=NOW, signature="00" * 64)
    return made.model_dump_json().encode()


def refusal(code: ProblemCode) -> bytes:
    document = problem(code, "No.")
    return response(document.status, document.model_dump_json().encode(), "application/problem+json")


def submit(
    address: str, update: Path, story: Story, *, expect_s: float = 10.0, timeout_s: float = 30.0
) -> UpdateReceipt:
    with Client(address, "isk_a_b", timeout_s=timeout_s) as client:
        return client.tasks.submit_update(
            TASK, update, digest=DIGEST, fence=4, on_admitted=story.admitted, expect_s=expect_s
        )


def play(address_of: Callable[[socket.socket], None]) -> Iterator[str]:
    with script(address_of) as port:
        yield f"http://127.0.0.1:{port}"


async def drain(receive: Callable[[], object]) -> bytes:
    body = b""
    while True:
        message: Message = await receive()  # type: ignore[misc]
        body += message.get("body", b"")
        if not message.get("more_body"):
            return body


async def answer(send: Callable[[Message], object], status: int, body: bytes, media_type: str) -> None:
    headers = [(b"content-type", media_type.encode()), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})  # type: ignore[misc]
    await send({"type": "http.response.body", "body": body})  # type: ignore[misc]


@pytest.mark.parametrize("http", ["h11", "httptools"])
def test_uvicorn_admits_when_the_app_begins_to_read(update: Path, http: str) -> None:
    story = Story()
    seen = {}

    async def app(scope: Message, receive: Callable[[], object], send: Callable[[Message], object]) -> None:
        seen.update({name.decode(): value.decode() for name, value in scope["headers"]})
        story.append("checked")
        body = await drain(receive)
        story.append("read")
        assert hashlib.sha256(body).hexdigest() == DIGEST
        await answer(send, 200, receipt(), "application/json")

    with serve(app, http=http) as address:  # type: ignore[arg-type]
        got = submit(address, update, story)

    assert got.digest == DIGEST
    assert story == ["checked", "admitted", "read"]
    assert seen["isthmus-fence"] == "4"
    assert seen["authorization"] == "Bearer isk_a_b"
    assert seen["content-length"] == str(len(BODY))
    assert parse_repr_digest(seen["repr-digest"]) == DIGEST


@pytest.mark.parametrize("http", ["h11", "httptools"])
def test_a_refusal_by_uvicorn_comes_before_admission(update: Path, http: str) -> None:
    story = Story()

    async def app(_scope: Message, _receive: Callable[[], object], send: Callable[[Message], object]) -> None:
        document = problem(ProblemCode.LEASE_LOST, "No.")
        await answer(send, document.status, document.model_dump_json().encode(), "application/problem+json")

    with serve(app, http=http) as address, pytest.raises(Refused) as refused:  # type: ignore[arg-type]
        submit(address, update, story)

    assert refused.value.code is ProblemCode.LEASE_LOST
    assert story == []


@pytest.mark.parametrize("http", ["h11", "httptools"])
def test_a_refusal_by_uvicorn_in_mid_body_is_a_refusal(update: Path, http: str) -> None:
    story = Story()

    async def app(_scope: Message, receive: Callable[[], object], send: Callable[[Message], object]) -> None:
        await receive()  # type: ignore[misc]
        document = problem(ProblemCode.NON_FINITE, "No.")
        await answer(send, document.status, document.model_dump_json().encode(), "application/problem+json")

    with serve(app, http=http) as address, pytest.raises(Refused) as refused:  # type: ignore[arg-type]
        submit(address, update, story)

    assert refused.value.code is ProblemCode.NON_FINITE
    assert story == ["admitted"]


def test_a_receipt_at_once_means_that_nothing_is_sent(update: Path) -> None:
    story = Story()
    after: list[bytes] = []

    def known(connection: socket.socket) -> None:
        head = read_head(connection)
        assert b"Expect: 100-continue" in head
        connection.sendall(response(200, receipt()))
        after.append(connection.recv(1))

    for address in play(known):
        assert submit(address, update, story).digest == DIGEST
    assert story == []
    assert after == [b""]


def test_the_body_waits_for_admission(update: Path) -> None:
    story = Story()

    def slow(connection: socket.socket) -> None:
        read_head(connection)
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(None)
        connection.sendall(b"HTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\n" + CONTINUE)
        story.append("read" if read_exactly(connection, len(BODY)) == BODY else "garbled")
        connection.sendall(response(200, receipt()))

    for address in play(slow):
        submit(address, update, story)
    assert story == ["admitted", "read"]


def test_a_refusal_right_behind_the_admission_was_still_an_admission(update: Path) -> None:
    story = Story()

    def both(connection: socket.socket) -> None:
        read_head(connection)
        connection.sendall(CONTINUE + refusal(ProblemCode.ROUND_NOT_COLLECTING))

    for address in play(both):
        with pytest.raises(Refused):
            submit(address, update, story)
    assert story == ["admitted"]


def test_a_refusal_in_mid_body_is_read_even_when_the_connection_is_reset(update: Path) -> None:
    story = Story()

    def resets(connection: socket.socket) -> None:
        read_head(connection)
        connection.sendall(CONTINUE)
        read_exactly(connection, 1000)
        connection.sendall(refusal(ProblemCode.NORM_TOO_LARGE))
        time.sleep(0.05)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    for address in play(resets):
        with pytest.raises(Refused) as refused:
            submit(address, update, story)
        assert refused.value.code is ProblemCode.NORM_TOO_LARGE
    assert story == ["admitted"]


def test_silence_counts_as_admission(update: Path) -> None:
    story = Story()

    def swallows_expect(connection: socket.socket) -> None:
        read_head(connection)
        read_exactly(connection, len(BODY))
        connection.sendall(response(200, receipt()))

    for address in play(swallows_expect):
        submit(address, update, story, expect_s=0.1)
    assert story == ["admitted"]


@pytest.mark.parametrize("said", [b"", CONTINUE, CONTINUE + b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"])
def test_a_cut_is_no_receipt(update: Path, said: bytes) -> None:
    story = Story()

    def cuts(connection: socket.socket) -> None:
        read_head(connection)
        connection.sendall(said)

    for address in play(cuts):
        with pytest.raises(Unreachable):
            submit(address, update, story)
    assert story == (["admitted"] if said else [])


def test_a_service_that_takes_nothing_more_times_out(update: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.client.tasks.UPDATE_TIMEOUT_S", 0.2)

    def stalls(connection: socket.socket) -> None:
        read_head(connection)
        connection.sendall(CONTINUE)
        time.sleep(1)

    for address in play(stalls):
        with pytest.raises(TimedOut):
            submit(address, update, Story(), timeout_s=0.2)


def test_nothing_listens(update: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(Unreachable, match=str(port)):
        submit(f"http://127.0.0.1:{port}", update, Story())


@pytest.mark.parametrize("said", [b"SSH-2.0-OpenSSH_9.6\r\n\r\n", response(200, receipt(digest="00" * 32))])
def test_what_is_no_receipt_for_these_bytes_is_no_receipt(update: Path, said: bytes) -> None:
    def odd(connection: socket.socket) -> None:
        read_head(connection)
        connection.sendall(said)

    for address in play(odd):
        with pytest.raises(BadResponse):
            submit(address, update, Story())


def test_a_gateway_without_a_service_is_unreachable(update: Path) -> None:
    def gateway(connection: socket.socket) -> None:
        read_head(connection)
        connection.sendall(response(502, b"<html>", "text/html"))

    for address in play(gateway):
        with pytest.raises(Unreachable, match="502"):
            submit(address, update, Story())


def test_what_on_admitted_raises_ends_the_call_before_a_byte_is_sent(update: Path) -> None:
    after: list[bytes] = []

    def admits(connection: socket.socket) -> None:
        read_head(connection)
        connection.sendall(CONTINUE)
        after.append(connection.recv(1))

    def disk_full() -> None:
        raise OSError("no space left")

    for address in play(admits):
        with Client(address) as client, pytest.raises(OSError, match="no space left"):
            client.tasks.submit_update(TASK, update, digest=DIGEST, fence=1, on_admitted=disk_full)
    assert after == [b""]


def test_plain_http_goes_through_a_proxy_with_the_whole_address(update: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heads: list[bytes] = []

    def proxy(connection: socket.socket) -> None:
        heads.append(read_head(connection))
        connection.sendall(response(200, receipt()))

    for address in play(proxy):
        monkeypatch.setenv("http_proxy", address.replace("http://", "http://me:secret@"))
        submit("http://isthmus.invalid:81", update, Story())
    assert heads[0].startswith(b"PUT http://isthmus.invalid:81/v1/tasks/")
    assert b"Proxy-Authorization: Basic bWU6c2VjcmV0\r\n" in heads[0]


@pytest.fixture(scope="module")
def tls() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's and a client's side, for 127.0.0.1."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(NOW - timedelta(days=3650))
        .not_valid_after(NOW + timedelta(days=3650))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    return _contexts(certificate.public_bytes(serialization.Encoding.PEM), key)


def _contexts(pem: bytes, key: ec.EllipticCurvePrivateKey) -> tuple[ssl.SSLContext, ssl.SSLContext]:

    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.NamedTemporaryFile() as file:
        file.write(pem + private)
        file.flush()
        server.load_cert_chain(file.name)
    return server, ssl.create_default_context(cadata=pem.decode())


def test_https_is_verified_and_admits(update: Path, tls: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    story = Story()

    def admits(connection: socket.socket) -> None:
        read_head(connection)
        connection.sendall(CONTINUE)
        story.append("read" if read_exactly(connection, len(BODY)) == BODY else "garbled")
        connection.sendall(response(200, receipt()))

    with script(admits, tls[0]) as port:
        address = f"https://127.0.0.1:{port}"
        with pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED"):
            submit(address, update, story)
        with Client(address, tls=tls[1]) as client:
            client.tasks.submit_update(TASK, update, digest=DIGEST, fence=1, on_admitted=story.admitted)
    assert story == ["admitted", "read"]


def test_https_goes_through_a_tunnel(
    update: Path, tls: tuple[ssl.SSLContext, ssl.SSLContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    connects: list[bytes] = []

    def proxy(connection: socket.socket) -> None:
        connects.append(read_head(connection))
        connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        with tls[0].wrap_socket(connection, server_side=True) as inner:
            read_head(inner)
            inner.sendall(response(200, receipt()))

    for address in play(proxy):
        monkeypatch.setenv("https_proxy", address)
        with Client("https://127.0.0.1:9443", tls=tls[1]) as client:
            client.tasks.submit_update(TASK, update, digest=DIGEST, fence=1, on_admitted=lambda: None)
    assert connects[0].startswith(b"CONNECT 127.0.0.1:9443 HTTP/1.1\r\n")


def test_a_proxy_that_says_no_is_named(update: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def proxy(connection: socket.socket) -> None:
        read_head(connection)
        connection.sendall(response(407, b""))

    for address in play(proxy):
        monkeypatch.setenv("https_proxy", address)
        with pytest.raises(Unreachable, match="407 to CONNECT"):
            submit("https://isthmus.invalid", update, Story())


def test_the_fake_admits_by_reading(update: Path) -> None:
    service = FakeService()
    service.refuse("PUT", "/v1/tasks/*/update", ProblemCode.LEASE_LOST)
    service.answer("PUT", "/v1/tasks/*/update", UpdateReceipt.model_validate_json(receipt()))
    story = Story()
    with service.client() as client:
        with pytest.raises(Refused):
            client.tasks.submit_update(TASK, update, digest=DIGEST, fence=1, on_admitted=story.admitted)
        assert story == []
        client.tasks.submit_update(TASK, update, digest=DIGEST, fence=1, on_admitted=story.admitted)
    assert story == ["admitted"]
    assert service.requests[1].body == BODY
