"""The API as it is described: valid, complete, as it was agreed on, and readable without the internet.

When the description has changed on purpose, write it anew and look at the difference:

    ISTHMUS_REFRESH=1 python -m pytest tests/contract/test_openapi.py
"""

import importlib
import json
import os
import pkgutil
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import psycopg
import pytest
import structlog.testing
from openapi_spec_validator import validate
from psycopg import sql

import isthmus.wire
from app.main import create_app
from app.settings import Settings
from isthmus.wire.base import Request
from isthmus.wire.problems import PROBLEMS, Problem, ProblemCode, problem
from isthmus.wire.version import PROBLEM_MEDIA_TYPE
from tests.running import Platform, missing_id
from tests.standing import assert_problem

ROOT = Path(__file__).parent.parent.parent
GOLDEN = Path(__file__).parent / "openapi.json"
PUBLIC = {"GET /healthz", "GET /readyz", "GET /v1/service"}


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The OpenAPI document, as it is served."""
    app = create_app(Settings(database_url="postgresql://nowhere/none", data_dir=tmp_path_factory.mktemp("data")))
    plain: dict[str, Any] = json.loads(json.dumps(app.openapi()))
    return plain


def operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """`GET /v1/jobs` and what is said of it."""
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield f"{method.upper()} {path}", operation


def wire_models() -> dict[str, type[Request]]:
    """Every body that clients send, by its name in the document."""
    found: dict[str, type[Request]] = {}
    for module in pkgutil.iter_modules(isthmus.wire.__path__):
        for value in vars(importlib.import_module(f"isthmus.wire.{module.name}")).values():
            if isinstance(value, type) and issubclass(value, Request):
                found[value.__name__] = value
    return found


def sent(document: dict[str, Any]) -> Iterator[tuple[str, str, list[Any]]]:
    """Operation, body and examples, of every JSON body that clients send."""
    for name, operation in operations(document):
        content = operation.get("requestBody", {}).get("content", {}).get("application/json")
        if content is not None:
            body = content["schema"]["$ref"].rpartition("/")[2]
            examples = [example["value"] for example in content.get("examples", {}).values()]
            yield name, body, examples or document["components"]["schemas"][body].get("examples", [])


# --- The document -----------------------------------------------------------------------------------------------------


def test_the_document_is_valid_openapi(document: dict[str, Any]) -> None:
    validate(document)


def test_the_document_is_served_as_it_is_made(platform: Platform, document: dict[str, Any]) -> None:
    assert platform.http().get("/openapi.json").json() == document


def test_every_operation_is_described_and_told_apart(document: dict[str, Any]) -> None:
    ids, tags = [], {tag["name"] for tag in document["tags"]}
    for name, operation in operations(document):
        assert operation["summary"], name
        assert operation["description"].endswith("."), name
        assert len(operation["tags"]) == 1, f"{name} stands in the page more than once: {operation['tags']}"
        assert operation["tags"][0] in tags, f"{name}: the tag {operation['tags'][0]!r} is not described"
        ids.append(operation["operationId"])
    assert len(ids) == len(set(ids))
    assert tags == {operation["tags"][0] for _, operation in operations(document)}


def test_every_refusal_is_documented_as_it_is_sent(document: dict[str, Any]) -> None:
    for name, operation in operations(document):
        refusals = {status: response for status, response in operation["responses"].items() if int(status) >= 400}
        if name not in PUBLIC:
            assert {"401", "403", "422"} <= refusals.keys(), name
        for status, response in refusals.items():
            content = response["content"]
            assert list(content) == [PROBLEM_MEDIA_TYPE], f"{name} {status}"
            assert content[PROBLEM_MEDIA_TYPE]["schema"] == {"$ref": "#/components/schemas/Problem"}
            for code, example in content[PROBLEM_MEDIA_TYPE]["examples"].items():
                shown = Problem.model_validate(example["value"])
                assert (shown.code, str(shown.status)) == (code, status), name
                assert shown.title == PROBLEMS[ProblemCode(code)].title, name


def test_what_takes_a_path_of_ids_says_that_it_may_not_be_there(document: dict[str, Any]) -> None:
    for name, operation in operations(document):
        if "{" in name and name != "PUT /v1/datasets/{name}":  # which makes what it names
            assert "404" in operation["responses"], name


def test_every_body_that_is_sent_has_examples_and_they_are_good(document: dict[str, Any]) -> None:
    models = wire_models()
    for name, body, examples in sent(document):
        assert examples, f"{name}: {body} has no example"
        for example in examples:
            models[body].model_validate_json(json.dumps(example))


def test_what_is_agreed_on_has_not_changed_by_accident(document: dict[str, Any]) -> None:
    agreed = json.loads(json.dumps(document))
    for _, operation in operations(agreed):
        for status, response in operation["responses"].items():
            if int(status) >= 400:  # what each refusal looks like follows from the catalogue
                response["content"][PROBLEM_MEDIA_TYPE].pop("examples")
    text = json.dumps(agreed, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    if os.environ.get("ISTHMUS_REFRESH"):
        GOLDEN.write_text(text)
    before, after = flattened(json.loads(GOLDEN.read_text())), flattened(agreed)
    changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    listed = "\n".join(f"  {path}: {before.get(path)!r} -> {after.get(path)!r}" for path in changed[:20])
    assert not changed, (
        f"The API is not the one in {GOLDEN.name}, in {len(changed)} places:\n{listed}\n"
        "If that is meant: ISTHMUS_REFRESH=1 python -m pytest tests/contract/test_openapi.py"
    )


def flattened(value: Any, path: str = "") -> dict[str, Any]:
    """Every leaf of a document by its path."""
    if isinstance(value, dict) and value:
        return {key: leaf for name, item in value.items() for key, leaf in flattened(item, f"{path}/{name}").items()}
    if isinstance(value, list) and value:
        return {key: leaf for at, item in enumerate(value) for key, leaf in flattened(item, f"{path}/{at}").items()}
    return {path: value}


# --- The page ---------------------------------------------------------------------------------------------------------


class Loaded(HTMLParser):
    """What a page loads, and the scripts and styles that stand in it."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.inline: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "action", "data", "srcset") and value:
                self.addresses.append(value)

    def handle_data(self, data: str) -> None:
        self.inline.append(data)


def test_the_page_loads_nothing_from_elsewhere_and_everything_it_loads_is_there(platform: Platform) -> None:
    http = platform.http()
    page = http.get("/docs")
    loaded = Loaded()
    loaded.feed(page.text)

    assert page.headers["content-type"].startswith("text/html")
    assert len(loaded.addresses) >= 3  # script, style, icon
    for address in loaded.addresses:
        assert not urlsplit(address).netloc, address
        asset = http.get(urljoin("/docs", address))
        assert asset.status_code == 200, address
        assert asset.content
    script = "".join(loaded.inline)
    assert not re.search(r"https?://", script), script
    assert "'/openapi.json'" in script
    assert '"validatorUrl": null' in script
    styles = [http.get(address).text for address in loaded.addresses if address.endswith(".css")]
    assert styles
    for style in styles:
        assert not re.search(r"(?:url\(|@import)\s*['\"]?\s*(?:https?:)?//", style)


@pytest.mark.parametrize(
    "path", ["/docs", "/docs/assets/swagger-ui-bundle.js", "/openapi.json", "/healthz", "/v1/jobs"]
)
def test_browsers_are_told_to_run_nothing_from_elsewhere(platform: Platform, path: str) -> None:
    headers = platform.http().get(path).headers

    policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["frame-ancestors"] == "'none'"
    assert all(
        source in ("'self'", "'none'", "'unsafe-inline'", "data:")
        for sources in policy.values()
        for source in sources.split()
    )
    if not path.startswith("/docs"):
        assert set(policy) == {"default-src", "frame-ancestors"}
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"]


def test_the_page_s_script_reads_the_version_of_the_document(platform: Platform) -> None:
    """Swagger UI before version 5 shows nothing but "Unable to render this definition" for OpenAPI 3.1."""
    version = platform.http().get("/openapi.json").json()["openapi"]
    script = platform.http().get("/docs/assets/swagger-ui-bundle.js").text

    assert version.startswith("3.1")
    assert "openapi: 3.x.y" in script or "openapi: 3.1" in script


def test_assets_are_those_of_the_page_and_nothing_beside_them(platform: Platform) -> None:
    http = platform.http()

    for path in (
        "/docs/assets/",
        "/docs/assets/../../pyproject.toml",
        "/docs/assets/%2e%2e/index.j2",
        "/docs/assets/x",
    ):
        assert_problem(http.get(path), ProblemCode.NOT_FOUND)


# --- The catalogue ----------------------------------------------------------------------------------------------------

PROVEN = {
    ProblemCode.UNAUTHENTICATED: "app/test_principals_and_keys.py",
    ProblemCode.KEY_EXPIRED: "app/test_principals_and_keys.py",
    ProblemCode.KEY_REVOKED: "app/test_principals_and_keys.py",
    ProblemCode.FORBIDDEN: "app/test_bad_jobs.py",
    ProblemCode.NOT_FOUND: "app/test_bad_updates.py",
    ProblemCode.METHOD_NOT_ALLOWED: "contract/test_openapi.py",
    ProblemCode.ENROLLMENT_REFUSED: "app/test_workers.py",
    ProblemCode.INVALID_REQUEST: "app/test_bad_updates.py",
    ProblemCode.POLICY_SIGNATURE_INVALID: "app/test_policy.py",
    ProblemCode.BODY_TOO_LARGE: "app/test_bad_updates.py",
    ProblemCode.LENGTH_REQUIRED: "app/test_bad_updates.py",
    ProblemCode.UNSUPPORTED_MEDIA_TYPE: "app/test_bad_updates.py",
    ProblemCode.RANGE_NOT_SATISFIABLE: "app/test_streams.py",
    ProblemCode.CURSOR_INVALID: "app/test_streams.py",
    ProblemCode.IDEMPOTENCY_CONFLICT: "app/test_organizations.py",
    ProblemCode.SECRET_SHOWN_ONCE: "app/test_organizations.py",
    ProblemCode.NAME_TAKEN: "app/test_organizations.py",
    ProblemCode.STATE_CONFLICT: "app/test_bad_jobs.py",
    ProblemCode.JOB_NOT_DRAFT: "app/test_bad_jobs.py",
    ProblemCode.JOB_NOT_RUNNING: "app/test_bad_updates.py",
    ProblemCode.MODEL_MISSING: "app/test_bad_jobs.py",
    ProblemCode.NO_MATCHING_DATASET: "app/test_bad_jobs.py",
    ProblemCode.GRANT_REFUSED_BY_POLICY: "app/test_grants.py",
    ProblemCode.PRIVACY_IMPOSSIBLE: "app/test_policy_clauses.py",
    ProblemCode.BUDGET_EXHAUSTED: "app/test_policy_clauses.py",
    ProblemCode.LEDGER_TAMPERED: "app/test_ledger.py",
    ProblemCode.POLICY_LOOSENED: "app/test_policy.py",
    ProblemCode.DATASET_SERVED_ELSEWHERE: "app/test_datasets.py",
    ProblemCode.LEASE_LOST: "app/test_bad_updates.py",
    ProblemCode.TASK_NOT_OPEN: "app/test_bad_updates.py",
    ProblemCode.TASK_NOT_CLAIMED: "app/test_bad_updates.py",
    ProblemCode.ROUND_NOT_COLLECTING: "app/test_bad_updates.py",
    ProblemCode.GRANT_WITHDRAWN: "app/test_grants.py",
    ProblemCode.DATASET_NOT_CONFIRMED: "app/test_grants.py",
    ProblemCode.UPDATE_CONFLICT: "app/test_bad_updates.py",
    ProblemCode.STEP_CLOSED: "app/test_secured_messages.py",
    ProblemCode.STEP_CONFLICT: "app/test_secured_messages.py",
    ProblemCode.MESSAGE_INVALID: "app/test_secured_messages.py",
    ProblemCode.DIGEST_MISMATCH: "app/test_bad_updates.py",
    ProblemCode.LENGTH_MISMATCH: "app/test_bad_updates.py",
    ProblemCode.NOT_SAFETENSORS: "app/test_bad_updates.py",
    ProblemCode.TENSORS_MISMATCH: "app/test_bad_updates.py",
    ProblemCode.NON_FINITE: "app/test_bad_updates.py",
    ProblemCode.NORM_TOO_LARGE: "app/test_bad_updates.py",
    ProblemCode.NOT_READY: "contract/test_openapi.py",
    ProblemCode.INTERNAL: "contract/test_openapi.py",
}
RESERVED = {
    ProblemCode.TOO_MANY_REQUESTS: "for gateways that limit rates; the service itself paces by Retry-After",
}


def test_every_code_has_its_status_and_title_and_is_proven_or_reserved() -> None:
    assert set(PROBLEMS) == set(ProblemCode) == PROVEN.keys() | RESERVED.keys()
    assert not PROVEN.keys() & RESERVED.keys()


@pytest.mark.parametrize(("code", "file"), PROVEN.items())
def test_where_a_code_is_said_to_be_proven_it_is_named(code: ProblemCode, file: str) -> None:
    assert re.search(rf"\bProblemCode\.{code.name}\b", (ROOT / "tests" / file).read_text())


@pytest.mark.parametrize("code", RESERVED)
def test_a_reserved_code_is_raised_by_nothing(code: ProblemCode) -> None:
    raised = re.compile(rf"code = ProblemCode\.{code.name}\b|problem\(ProblemCode\.{code.name}\b")
    assert not [path for path in (ROOT / "app").rglob("*.py") if raised.search(path.read_text())]


@pytest.mark.parametrize("code", ProblemCode)
def test_a_code_is_fit_for_addresses_and_logs(code: ProblemCode) -> None:
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", code.value)
    document = problem(code, "Why.")
    assert document.type == f"urn:isthmus:problem:{code.value}"
    assert 400 <= document.status < 600


# --- Refusals that no feature has for itself --------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path"), [("DELETE", "/v1/jobs"), ("PATCH", "/healthz"), ("HEAD", "/v1/me")])
def test_a_method_that_is_not_taken(platform: Platform, method: str, path: str) -> None:
    answer = platform.http(platform.admin).request(method, path)

    assert answer.status_code == 405
    assert answer.headers["allow"]
    if method != "HEAD":
        assert_problem(answer, ProblemCode.METHOD_NOT_ALLOWED)


@pytest.mark.parametrize("path", ["/", "/v1", "/v2/jobs", "/v1/%00", "/v1/jobs/not-an-id/nothing"])
def test_an_address_that_is_none(platform: Platform, path: str) -> None:
    assert_problem(platform.http(platform.admin).get(path), ProblemCode.NOT_FOUND)


def test_a_bug_is_a_problem_document_that_gives_nothing_away(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret-of-the-inside")

    monkeypatch.setattr("app.jobs.queries.visible_to", broken)

    with structlog.testing.capture_logs() as logs:
        answer = platform.http(platform.admin).get(f"/v1/jobs/{missing_id()}")

    assert_problem(answer, ProblemCode.INTERNAL)
    assert "secret-of-the-inside" not in answer.text
    assert [line["event"] for line in logs if line["log_level"] == "error"] == ["unexpected failure"]
    assert platform.admin.me().principal.role == "admin"


def test_without_its_database_the_service_says_that_it_is_not_ready_and_recovers(
    platform: Platform, postgres_url: str
) -> None:
    http, name = platform.http(platform.admin), urlsplit(platform.database_url).path.removeprefix("/")

    def allow(connections: bool) -> None:
        statement = sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}")
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            connection.execute(statement.format(sql.Identifier(name), sql.Literal(connections)))
            if not connections:
                connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])

    assert http.get("/readyz").json() == {"status": "ready"}
    allow(False)
    try:
        for path in ("/readyz", "/v1/me", "/readyz"):
            answer = http.get(path)
            assert_problem(answer, ProblemCode.NOT_READY)
            assert int(answer.headers["retry-after"]) >= 1
        assert http.get("/healthz").json() == {"status": "ok"}
    finally:
        allow(True)
    for _ in range(100):
        if http.get("/readyz").status_code == 200:
            break
        http.get("/healthz")
    assert platform.admin.me().principal.role == "admin"
