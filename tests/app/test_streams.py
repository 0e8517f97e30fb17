"""What is streamed: a job's events as they happen, and checkpoints whole or in part."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from isthmus.client import Client
from isthmus.wire.base import format_repr_digest
from isthmus.wire.events import EventKind, EventView, verify_chain
from isthmus.wire.jobs import JobState, JobView
from isthmus.wire.problems import ProblemCode
from isthmus.wire.version import DIGEST_HEADER, EVENTS_MEDIA_TYPE, TENSORS_MEDIA_TYPE
from tests.federation import Federation, filled, job_spec
from tests.running import missing_id, refused
from tests.standing import _standing, assert_problem, standing

__all__ = ["_standing", "standing"]

STREAM = {"accept": EVENTS_MEDIA_TYPE}


def messages(response: httpx.Response) -> Iterator[dict[str, str]]:
    """Server-sent events, field by field."""
    message: dict[str, str] = {}
    for line in response.iter_lines():
        if line:
            name, _, value = line.partition(": ")
            message[name] = value
        elif message:
            yield message
            message = {}


def complete(federation: Federation, job: JobView) -> JobView:
    """The job, after one round."""
    for site in federation.sites:
        site.hand_in(site.claim(), filled(1.0))
    return federation.finish(job)


def events_of(federation: Federation, job: JobView) -> list[EventView]:
    """All that happened, as pages tell it."""
    return list(federation.researcher.jobs.events(job.id, follow=False))


# --- Events -----------------------------------------------------------------------------------------------------------


def test_the_stream_brings_every_event_as_it_happens_and_ends_with_the_job(standing: Federation) -> None:
    job = standing.draft(job_spec())
    heard: list[EventView] = []
    listener = threading.Thread(target=lambda: heard.extend(standing.researcher.jobs.events(job.id)))
    listener.start()

    standing.researcher.jobs.start(job.id)
    standing.until(lambda: EventKind.ROUND_OPENED in [event.kind for event in heard])  # before the job has ended
    complete(standing, job)
    listener.join(10)

    assert not listener.is_alive()
    assert [event.kind for event in heard][-2:] == [EventKind.ROUND_COMPLETED, EventKind.JOB_COMPLETED]
    assert verify_chain(heard) == events_of(standing, job)[-1].hash


def test_the_stream_of_a_job_that_has_ended_tells_all_and_closes(standing: Federation) -> None:
    job = standing.start()
    complete(standing, job)

    with standing.platform.http(standing.researcher).stream(
        "GET", f"/v1/jobs/{job.id}/events", headers=STREAM
    ) as response:
        assert response.headers["content-type"].startswith(EVENTS_MEDIA_TYPE)
        assert response.headers["cache-control"] == "no-store"
        found = list(messages(response))

    expected = events_of(standing, job)
    assert [message["id"] for message in found] == [str(event.sequence) for event in expected]
    assert [message["event"] for message in found] == [str(event.kind) for event in expected]
    assert [EventView.model_validate_json(message["data"]) for message in found] == expected


@pytest.mark.parametrize(
    ("query", "headers", "first"),
    [
        ("", {"Last-Event-ID": "3"}, 4),
        ("?after=5", {}, 6),
        ("?after=5", {"Last-Event-ID": "3"}, 4),
        ("", {"Last-Event-ID": "0"}, 1),
        ("?after=1000000", {}, None),
        ("", {"Last-Event-ID": str(2**31 - 1)}, None),
    ],
    ids=["last-event-id", "after", "both", "from-the-first", "after-the-last", "the-largest"],
)
def test_a_stream_goes_on_where_it_was_cut(
    standing: Federation, query: str, headers: dict[str, str], first: int | None
) -> None:
    job = standing.start()
    complete(standing, job)
    last = events_of(standing, job)[-1].sequence

    with standing.platform.http(standing.researcher).stream(
        "GET", f"/v1/jobs/{job.id}/events{query}", headers={**STREAM, **headers}
    ) as response:
        assert response.status_code == 200
        found = [int(message["id"]) for message in messages(response)]

    assert found == ([] if first is None else list(range(first, last + 1)))


def test_a_stream_cut_in_the_middle_is_taken_up_by_the_client_without_loss(standing: Federation) -> None:
    job = standing.start()
    stream = standing.researcher.jobs.events(job.id)
    begun = [next(stream), next(stream)]
    del stream  # the connection ends here
    complete(standing, job)

    rest = list(standing.researcher.jobs.events(job.id, after=begun[-1].sequence))

    assert verify_chain([*begun, *rest]) == events_of(standing, job)[-1].hash


@pytest.mark.parametrize("value", ["-1", "first", "1.5", str(2**70)])
def test_a_last_event_id_that_is_no_number_of_an_event_is_refused(standing: Federation, value: str) -> None:
    job = standing.draft(job_spec())
    http = standing.platform.http(standing.researcher)

    answer = http.get(f"/v1/jobs/{job.id}/events", headers={**STREAM, "Last-Event-ID": value})

    problem = assert_problem(answer, ProblemCode.INVALID_REQUEST)
    assert [error.field for error in problem.errors] == ["header.last-event-id"]


def test_without_asking_for_a_stream_there_are_pages(standing: Federation) -> None:
    job = standing.start()
    complete(standing, job)
    http, path = standing.platform.http(standing.researcher), f"/v1/jobs/{job.id}/events"

    pages, cursor = [], None
    while True:
        page = http.get(path, params={"limit": 4, **({} if cursor is None else {"cursor": cursor})}).json()
        pages.append(page["items"])
        cursor = page["next_cursor"]
        if cursor is None:
            break

    assert [len(page) for page in pages[:-1]] == [4] * (len(pages) - 1)
    assert len(pages) > 2
    events = [EventView.model_validate_json(json.dumps(item)) for page in pages for item in page]
    assert events == events_of(standing, job)
    assert [item["sequence"] for item in http.get(path, params={"after": 2, "limit": 2}).json()["items"]] == [3, 4]
    assert_problem(http.get(path, params={"cursor": "never given out"}), ProblemCode.CURSOR_INVALID)


def test_a_stream_that_has_nothing_to_tell_says_that_it_is_still_there(
    standing: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.jobs.router.KEEP_ALIVE_S", 0.1)
    job = standing.draft(job_spec())

    with standing.platform.http(standing.researcher).stream(
        "GET", f"/v1/jobs/{job.id}/events?after=100", headers=STREAM
    ) as response:
        comments = [line for line, _ in zip(response.iter_lines(), range(4), strict=False) if line]

    assert comments == [": still here"] * 2


def test_who_waits_or_streams_holds_no_connection_to_the_database(
    make_federation: Callable[..., Federation],
) -> None:
    federation = make_federation(database_connections=2)
    drafts = [federation.draft(job_spec()) for _ in range(5)]
    heard: list[EventView] = []

    def listen(job: JobView) -> None:
        heard.extend(federation.platform.client(federation.platform.keys[federation.researcher]).jobs.events(job.id))

    waiting = [threading.Thread(target=listen, args=[job]) for job in drafts]
    waiting += [threading.Thread(target=site.try_claim, args=[8]) for site in federation.sites]
    for thread in waiting:
        thread.start()
    time.sleep(1)  # all of them have looked, and wait

    def transactions() -> set[tuple[Any, ...]]:
        return set(
            federation.platform.execute(
                "SELECT pid, xact_start, state, query FROM pg_stat_activity WHERE datname = current_database()"
                " AND pid <> pg_backend_pid() AND xact_start IS NOT NULL"
            )
        )

    held = transactions()
    for _ in range(5):
        assert federation.job(drafts[0]).state is JobState.DRAFT
        time.sleep(0.1)
        held &= transactions()
    assert not held, "nobody is in the same transaction all the time"
    assert all(thread.is_alive() for thread in waiting)
    for job in drafts:
        federation.researcher.jobs.cancel(job.id)
    for thread in waiting:
        thread.join(40)
    assert not any(thread.is_alive() for thread in waiting)
    assert [event.kind for event in heard].count(EventKind.JOB_CANCELLED) == len(drafts)


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def download(federation: Federation, job: JobView, client: Client, **headers: str) -> httpx.Response:
    """The newest checkpoint of a job, by its digest."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    digest = federation.job(job).model_digest
    return federation.platform.http(client).get(f"/v1/checkpoints/{digest}", headers=named)


def test_a_checkpoint_comes_under_its_digest_and_may_be_kept_for_ever(standing: Federation) -> None:
    job = standing.draft(job_spec(), filled(0.25))

    answer = download(standing, job, standing.researcher)

    assert answer.status_code == 200
    assert answer.headers["content-type"] == TENSORS_MEDIA_TYPE
    assert answer.headers["etag"] == f'"{job.model_digest}"'
    assert answer.headers[DIGEST_HEADER] == format_repr_digest(str(job.model_digest))
    assert "immutable" in answer.headers["cache-control"]
    assert "private" in answer.headers["cache-control"]
    newest = standing.platform.http(standing.researcher).get(f"/v1/jobs/{job.id}/model")
    assert (newest.content, newest.headers["etag"]) == (answer.content, answer.headers["etag"])
    assert newest.headers["cache-control"] == "private, no-cache"


@pytest.mark.parametrize("path", ["/v1/checkpoints/{digest}", "/v1/jobs/{id}/model"])
def test_who_has_the_checkpoint_is_not_sent_it_again(standing: Federation, path: str) -> None:
    job = standing.draft(job_spec(), filled(0.25))
    http = standing.platform.http(standing.researcher)
    address = path.format(digest=job.model_digest, id=job.id)

    same = http.get(address, headers={"If-None-Match": f'"{job.model_digest}"'})
    other = http.get(address, headers={"If-None-Match": f'"{"0" * 64}"'})

    assert (same.status_code, same.content) == (304, b"")
    assert same.headers["etag"] == f'"{job.model_digest}"'
    assert other.status_code == 200


@pytest.mark.parametrize(
    ("asked", "begin", "end"),
    [("bytes=0-7", 0, 8), ("bytes=8-", 8, None), ("bytes=10-1000000", 10, None), ("bytes=0-", 0, None)],
)
def test_a_cut_download_goes_on_by_range(standing: Federation, asked: str, begin: int, end: int | None) -> None:
    job = standing.draft(job_spec(), filled(0.25))
    whole = download(standing, job, standing.researcher).content
    wanted = whole[begin:end]

    answer = download(standing, job, standing.researcher, range=asked, if_range=f'"{job.model_digest}"')

    assert (answer.status_code, answer.content) == (206, wanted)
    assert answer.headers["content-range"] == f"bytes {begin}-{begin + len(wanted) - 1}/{len(whole)}"


@pytest.mark.parametrize("asked", ["bytes=5-2", "records=0-7", "bytes=", "bytes=x-y", "bytes=-0", "nonsense"])
def test_a_range_that_makes_no_sense_is_not_there(standing: Federation, asked: str) -> None:
    job = standing.draft(job_spec(), filled(0.25))
    whole = download(standing, job, standing.researcher)

    answer = download(standing, job, standing.researcher, range=asked)

    assert (answer.status_code, answer.content) == (200, whole.content)


def test_a_range_of_another_version_is_not_served(standing: Federation) -> None:
    job = standing.draft(job_spec(), filled(0.25))

    answer = download(standing, job, standing.researcher, range="bytes=8-", if_range=f'"{"0" * 64}"')

    assert answer.status_code == 200


def test_a_range_behind_the_end_is_refused(standing: Federation) -> None:
    job = standing.draft(job_spec(), filled(0.25))

    problem = assert_problem(
        download(standing, job, standing.researcher, range="bytes=1000000-"), ProblemCode.RANGE_NOT_SATISFIABLE
    )

    assert "begins at 1000000" in problem.detail


def test_a_worker_reads_the_checkpoints_that_its_own_tasks_start_from_and_no_others(standing: Federation) -> None:
    stranger = standing.platform.worker(standing.platform.organization())
    job = standing.start(job_spec(rounds=2), filled(0.125))
    for client in (site.worker for site in standing.sites):
        assert download(standing, job, client).status_code == 200
    assert_problem(download(standing, job, stranger), ProblemCode.NOT_FOUND)

    for site in standing.sites:
        site.hand_in(site.claim(), filled(1.0))
    offers = [site.claim() for site in standing.sites]
    assert {offer.model.digest for offer in offers} == {standing.job(job).model_digest}
    assert download(standing, job, standing.sites[0].worker).status_code == 200
    for site, offer in zip(standing.sites, offers, strict=True):
        site.hand_in(offer, filled(1.0))
    standing.finish(job)

    theirs = download(standing, job, standing.sites[0].worker)  # the final model: no task starts from it
    assert_problem(theirs, ProblemCode.NOT_FOUND)
    digest = str(standing.job(job).model_digest)
    missing = standing.platform.http(standing.sites[0].worker).get(f"/v1/checkpoints/{'0' * 64}")
    assert theirs.text.replace(digest, "it") == missing.text.replace("0" * 64, "it")
    assert download(standing, job, standing.sites[0].steward).status_code == 200
    assert download(standing, job, standing.platform.admin).status_code == 200


def test_a_checkpoint_of_another_researcher_is_not_there(standing: Federation) -> None:
    job = standing.draft(job_spec(), filled(0.375))
    other = standing.platform.researcher()

    assert_problem(download(standing, job, other), ProblemCode.NOT_FOUND)
    with refused(ProblemCode.NOT_FOUND):
        other.jobs.get(missing_id())


def test_what_is_no_digest_is_refused(standing: Federation) -> None:
    http = standing.platform.http(standing.researcher)

    for text in ("0" * 63, "A" * 64, "..%2F..%2Fsigning-key.pem"):
        answer = http.get(f"/v1/checkpoints/{text}")
        assert answer.status_code in (404, 422)
        assert answer.headers["content-type"] == "application/problem+json"
