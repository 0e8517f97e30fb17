"""Bad updates: each is a clear refusal, and the job goes on as if it had not come."""

import copy
import hashlib
import io
import json
import pickle
import threading
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
import structlog.testing

from isthmus.codec import arrays
from isthmus.wire.base import format_repr_digest
from isthmus.wire.jobs import JobState, JobView
from isthmus.wire.problems import ProblemCode
from isthmus.wire.rounds import STATISTICS_PREFIX, TaskOffer, TaskState
from tests.federation import LOCAL, UNIFORM, Arrays, Federation, Site, filled, job_spec, measured
from tests.running import missing_id, refused
from tests.standing import (
    Wire,
    _standing,
    assert_problem,
    entries_of,
    leftovers,
    put_update,
    standing,
    update_headers,
)

__all__ = ["_standing", "standing"]

GOOD = arrays.encode(filled(1.0))
BIAS = filled(1.0)["0.bias"]
WEIGHT = filled(1.0)["0.weight"]
EXACT = {"evaluation": {"holdout": 0, "release": "exact"}}


def raw(header: Any, data: bytes = b"") -> bytes:
    """A body with any header, over data of any length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def placed(bias: list[int], weight: list[int], data: bytes = bytes(24)) -> bytes:
    """A body of the right tensors at any places."""
    return raw(
        {
            "0.bias": {"dtype": "F32", "shape": [2], "data_offsets": bias},
            "0.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": weight},
        },
        data,
    )


def with_value(name: str, index: int, value: float) -> Arrays:
    """A good update but for one element."""
    tensors = filled(1.0)
    tensors[name].reshape(-1)[index] = value
    return tensors


def zipped() -> bytes:
    """What numpy.savez writes."""
    file = io.BytesIO()
    np.savez(file, weight=WEIGHT, bias=BIAS)
    return file.getvalue()


class Trap:
    """Runs code in whoever unpickles it."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return exec, ("raise SystemExit('a body was unpickled')",)


MISMATCH, BROKEN = ProblemCode.TENSORS_MISMATCH, ProblemCode.NOT_SAFETENSORS
NON_FINITE, LENGTH = ProblemCode.NON_FINITE, ProblemCode.LENGTH_MISMATCH

HOPELESS = {
    "missing-tensor": (arrays.encode({"0.weight": WEIGHT}), MISMATCH, "'0.bias'"),
    "extra-tensor": (arrays.encode({**filled(1.0), "records": BIAS}), MISMATCH, "'records'"),
    "renamed-tensor": (arrays.encode({"0.weight": WEIGHT, "0.biaz": BIAS}), MISMATCH, "'0.bias'"),
    "other-shape": (arrays.encode({**filled(1.0), "0.weight": WEIGHT.reshape(4)}), MISMATCH, "shape [4], not [2, 2]"),
    "wider-dtype": (arrays.encode({**filled(1.0), "0.bias": BIAS.astype(np.float64)}), MISMATCH, "F64, not F32"),
    "whole-numbers": (arrays.encode({**filled(1.0), "0.bias": BIAS.astype(np.int32)}), MISMATCH, "I32, not F32"),
    "nan-first": (arrays.encode(with_value("0.bias", 0, np.nan)), NON_FINITE, "'0.bias'"),
    "nan-last": (arrays.encode(with_value("0.weight", -1, np.nan)), NON_FINITE, "'0.weight'"),
    "inf-first": (arrays.encode(with_value("0.bias", 0, np.inf)), NON_FINITE, "'0.bias'"),
    "minus-inf-last": (arrays.encode(with_value("0.weight", -1, -np.inf)), NON_FINITE, "'0.weight'"),
    "header-of-2-gigabytes": (((2 << 30).to_bytes(8, "little") + GOOD[8:]), BROKEN, "2147483648 bytes"),
    "header-of-nothing": (bytes(8) + GOOD[8:], BROKEN, "0 bytes long"),
    "header-not-json": (raw(b"{not json}" + b" " * 40), BROKEN, "not JSON"),
    "header-not-an-object": (raw(b"[1, 2]" + b" " * 40), BROKEN, "'{'"),
    "header-with-a-key-twice": (raw(b'{"a": {}, "a": {}}' + b" " * 40), BROKEN, "twice"),
    "header-nested-deeply": (raw(b'{"a":' * 40_000), BROKEN, "nests too deeply"),
    "overlapping-offsets": (placed([0, 8], [4, 20]), BROKEN, "overlaps"),
    "hole-between-tensors": (placed([0, 8], [12, 28], bytes(28)), BROKEN, "hole"),
    "offsets-beyond-the-shape": (placed([0, 12], [12, 28], bytes(28)), BROKEN, "its shape needs 8"),
    "negative-offsets": (placed([-8, 0], [0, 16]), BROKEN, "whole numbers"),
    "data-cut-off": (GOOD[:-4], LENGTH, "bytes"),
    "bytes-behind-the-data": (GOOD + bytes(4), LENGTH, "bytes"),
    "pickle": (pickle.dumps(Trap()) + bytes(64), BROKEN, "header"),
    "zip": (zipped(), BROKEN, "header"),
    "zeros": (bytes(len(GOOD)), BROKEN, "0 bytes long"),
}  # fmt: skip


def claim_all(federation: Federation) -> list[TaskOffer]:
    """Every site's task."""
    return [site.claim() for site in federation.sites]


def assert_goes_on(
    federation: Federation, job: JobView, offers: list[TaskOffer], *, without: int | None = None
) -> None:
    """The other sites hand in, and the job completes with their mean and nothing else; nothing else is kept."""
    values = []
    for number, (site, offer) in enumerate(zip(federation.sites, offers, strict=True)):
        if number != without:
            values.append(float(number + 1))
            site.hand_in(offer, {**filled(values[-1]), **measured(offer)})
    done = federation.finish(job)
    assert done.state is JobState.COMPLETED, done.detail
    expected = np.float32(sum(values) / len(values))
    assert all((tensor == expected).all() for tensor in federation.model(job).values())
    assert federation.researcher.jobs.round(job.id, 1).accepted == len(values)
    federation.until(lambda: not leftovers(federation))


# --- Bytes that can never be taken: the task is over, what was declared stays charged, the others go on ---------------


@pytest.mark.parametrize(("body", "code", "words"), HOPELESS.values(), ids=HOPELESS)
def test_a_body_that_is_not_the_update_is_refused_and_the_others_complete_the_round(
    standing: Federation, body: bytes, code: ProblemCode, words: str
) -> None:
    job = standing.start()
    offers = claim_all(standing)
    site = standing.sites[1]

    problem = assert_problem(put_update(standing, site, offers[1], body), code)

    assert words in problem.detail
    task = site.worker.tasks.get(offers[1].task_id)
    assert (task.state, task.detail) == (TaskState.FAILED, problem.detail)
    assert entries_of(standing, site, offers[1]) == [hashlib.sha256(body).hexdigest()]
    assert_problem(put_update(standing, site, offers[1], body), ProblemCode.TASK_NOT_OPEN)
    assert_goes_on(standing, job, offers, without=1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["metrics/train/loss", "metrics/train/examples"])
def test_a_metric_that_is_no_number_is_refused(standing: Federation, name: str, value: float) -> None:
    job = standing.start(job_spec(**EXACT))
    offers = claim_all(standing)
    tensors = {**filled(1.0), **measured(offers[0]), name: np.array(value)}

    problem = assert_problem(
        put_update(standing, standing.sites[0], offers[0], arrays.encode(tensors)), ProblemCode.NON_FINITE
    )

    assert f"'{name}'" in problem.detail
    assert_goes_on(standing, job, offers, without=0)


@pytest.mark.parametrize(
    ("privacy", "too_long", "within"),
    [
        ({"unit": "none", "clip_norm": 1.0}, 0.41, 0.4),
        # Noise of half the sensitivity; another update in its place moves it by twice the clip.
        ({**LOCAL, "noise_multiplier": 0.5}, 5.6, 5.4),
    ],
    ids=["without-noise", "with-noise"],
)
def test_an_update_longer_than_clipping_and_noise_allow_is_refused(
    standing: Federation, privacy: dict[str, Any], too_long: float, within: float
) -> None:
    job = standing.start(job_spec(privacy=privacy, strategy=UNIFORM))
    offers = claim_all(standing)
    site = standing.sites[2]

    problem = assert_problem(
        put_update(standing, site, offers[2], arrays.encode(filled(too_long))), ProblemCode.NORM_TOO_LARGE
    )

    assert f"L2 norm {float(np.float32(too_long)) * 6**0.5:.6g};" in problem.detail
    assert "with clip_norm 1" in problem.detail
    for other, offer in zip(standing.sites[:2], offers[:2], strict=True):
        other.hand_in(offer, filled(within))
    assert standing.finish(job).state is JobState.COMPLETED
    assert (standing.model(job)["0.bias"] == np.float32(within)).all()
    assert not leftovers(standing)


STATISTICS = {
    "more-values-than-rows": {"count": [5.0, 11.0]},
    "negative-count": {"count": [-1.0, 5.0]},
    "half-a-value": {"count": [4.5, 5.0]},
    "negative-squares": {"m2": [1.0, -1.0]},
    "half-a-row": {"rows": 10.5},
}


@pytest.mark.parametrize("wrong", STATISTICS.values(), ids=STATISTICS)
def test_statistics_that_no_rows_have_are_refused(standing: Federation, wrong: dict[str, Any]) -> None:
    data = {**job_spec().data.model_dump(mode="json"), "standardize": "federated"}
    job = standing.start(job_spec(data=data))
    offers = claim_all(standing)
    good = {"count": [10.0, 8.0], "mean": [50.0, 200.0], "m2": [1.0, 2.0], "rows": 10.0}

    def body(values: dict[str, Any]) -> Arrays:
        return {f"{STATISTICS_PREFIX}{name}": np.array(value, np.float64) for name, value in values.items()}

    answer = put_update(standing, standing.sites[0], offers[0], arrays.encode(body({**good, **wrong})))

    assert_problem(answer, ProblemCode.INVALID_REQUEST)
    for site, offer in zip(standing.sites[1:], offers[1:], strict=True):
        site.hand_in(offer, body(good))
    assert_goes_on(standing, job, claim_all(standing))
    found = standing.job(job).statistics
    assert found is not None
    assert (found.sites, found.rows, found.mean) == (2, 20.0, [50.0, 200.0])


# --- Refused from the headers: nothing is spent, nothing changes, the same worker hands in ----------------------------

HEADERS: dict[str, tuple[dict[str, str | None], ProblemCode, str]] = {
    "absurd-length": ({"content_length": str(2**60)}, ProblemCode.BODY_TOO_LARGE, str(2**60)),
    "length-beyond-the-manifest": ({"content_length": str(3 << 20)}, ProblemCode.BODY_TOO_LARGE, "at most"),
    "too-short-for-the-manifest": ({"content_length": "33"}, ProblemCode.TENSORS_MISMATCH, "at least 34 bytes"),
    "empty": ({"content_length": "0"}, ProblemCode.TENSORS_MISMATCH, "at least 34 bytes"),
    "no-length": ({"content_length": None}, ProblemCode.LENGTH_REQUIRED, "Content-Length"),
    "chunked": (
        {"content_length": None, "transfer_encoding": "chunked"}, ProblemCode.LENGTH_REQUIRED, "Content-Length",
    ),
    "json": ({"content_type": "application/json"}, ProblemCode.UNSUPPORTED_MEDIA_TYPE, "application/json"),
    "multipart": (
        {"content_type": "multipart/form-data; boundary=x"}, ProblemCode.UNSUPPORTED_MEDIA_TYPE, "multipart/form-data",
    ),
    "no-media-type": ({"content_type": None}, ProblemCode.UNSUPPORTED_MEDIA_TYPE, "of no stated type"),
    "no-digest": ({"repr_digest": None}, ProblemCode.INVALID_REQUEST, "Repr-Digest"),
    "digest-in-hexadecimal": ({"repr_digest": "sha-256=" + "ab" * 32}, ProblemCode.INVALID_REQUEST, "Repr-Digest"),
    "digest-too-short": ({"repr_digest": "sha-256=:YWJj:"}, ProblemCode.INVALID_REQUEST, "Repr-Digest"),
    "other-algorithm": ({"repr_digest": "sha-512=:YWJj:"}, ProblemCode.INVALID_REQUEST, "Repr-Digest"),
    "no-fence": ({"isthmus_fence": None}, ProblemCode.INVALID_REQUEST, "Isthmus-Fence"),
    "fence-of-words": ({"isthmus_fence": "first"}, ProblemCode.INVALID_REQUEST, "Isthmus-Fence"),
    "fence-beyond-any": ({"isthmus_fence": str(2**70)}, ProblemCode.LEASE_LOST, "claim again"),
    "fence-to-come": ({"isthmus_fence": "2"}, ProblemCode.LEASE_LOST, "claim again"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "code", "words"), HEADERS.values(), ids=HEADERS)
def test_what_the_headers_give_away_is_refused_before_a_100_and_before_anything_is_spent(
    standing: Federation, changes: dict[str, str | None], code: ProblemCode, words: str
) -> None:
    job = standing.start()
    offers = claim_all(standing)
    site = standing.sites[0]
    headers = update_headers(offers[0], arrays.encode(filled(1.0)), **changes)

    with Wire(standing, site.worker) as wire:
        wire.put(offers[0], {**headers, "expect": "100-continue"})
        assert "100" not in wire.first_line()
        problem = assert_problem(wire.answer(), code)

    assert words.lower() in problem.detail.lower()
    assert entries_of(standing, site, offers[0]) == []
    assert site.worker.tasks.get(offers[0].task_id).state is TaskState.CLAIMED
    assert_goes_on(standing, job, offers)


def test_a_body_is_asked_for_only_after_its_release_was_recorded(standing: Federation) -> None:
    job = standing.start()
    offers = claim_all(standing)
    body = arrays.encode(filled(1.0))

    with Wire(standing, standing.sites[0].worker) as wire:
        wire.put(offers[0], {**update_headers(offers[0], body), "expect": "100-continue"})
        assert wire.first_line() == "HTTP/1.1 100 Continue"
        assert entries_of(standing, standing.sites[0], offers[0]) == [hashlib.sha256(body).hexdigest()]
        assert standing.sites[0].worker.tasks.get(offers[0].task_id).state is TaskState.UPLOADING
        wire.send(body)
        assert wire.answer().status_code == 200

    assert_goes_on(standing, job, offers)


def test_a_task_that_nobody_claimed_takes_nothing(standing: Federation) -> None:
    job = standing.start()
    site = standing.sites[0]
    task = next(task for task in standing.researcher.jobs.round(job.id, 1).tasks if task.dataset == "heart")
    others = standing.sites[1].claim()
    offered = others.model_copy(update={"task_id": task.id})

    answer = put_update(standing, site, offered, GOOD)

    assert_problem(answer, ProblemCode.TASK_NOT_CLAIMED)
    offers = [site.claim(), others, standing.sites[2].claim()]
    assert entries_of(standing, site, offers[0]) == []
    assert_goes_on(standing, job, offers)


def test_another_workers_task_answers_like_a_missing_one(standing: Federation) -> None:
    job = standing.start()
    offers = claim_all(standing)
    missing = missing_id()

    theirs = put_update(standing, standing.sites[0], offers[1], GOOD)
    nobodys = put_update(standing, standing.sites[0], offers[1], GOOD, task_id=missing)

    assert_problem(theirs, ProblemCode.NOT_FOUND)
    assert_problem(nobodys, ProblemCode.NOT_FOUND)
    assert theirs.text.replace(str(offers[1].task_id), "it") == nobodys.text.replace(str(missing), "it")
    assert entries_of(standing, standing.sites[1], offers[1]) == []
    assert_goes_on(standing, job, offers)


def test_a_closed_round_takes_nothing_and_the_next_one_does(standing: Federation) -> None:
    job = standing.start(job_spec(rounds=2, cohort={"min_updates": 2, "target_updates": 2}))
    late = standing.sites[2].claim()
    for site in standing.sites[:2]:
        site.hand_in(site.claim(), filled(1.0))
    standing.until(lambda: standing.job(job).current_round == 2)

    answer = put_update(standing, standing.sites[2], late, GOOD)

    assert "completed" in assert_problem(answer, ProblemCode.ROUND_NOT_COLLECTING).detail
    assert entries_of(standing, standing.sites[2], late) == []
    for site in standing.sites[1:]:
        site.hand_in(site.claim(), filled(2.0))
    assert standing.finish(job).state is JobState.COMPLETED
    assert (standing.model(job)["0.bias"] == 3.0).all()


def test_a_job_that_is_over_takes_nothing(standing: Federation) -> None:
    job = standing.start()
    offers = claim_all(standing)
    standing.researcher.jobs.cancel(job.id)

    answer = put_update(standing, standing.sites[0], offers[0], GOOD)

    assert "cancelled" in assert_problem(answer, ProblemCode.JOB_NOT_RUNNING).detail
    assert entries_of(standing, standing.sites[0], offers[0]) == []
    assert not leftovers(standing)


# --- Bytes lost or changed on the way: the same bytes are taken when they come whole ----------------------------------


def test_bytes_that_changed_on_the_way_are_refused_and_taken_when_they_come_whole(standing: Federation) -> None:
    job = standing.start()
    offers = claim_all(standing)
    declared = format_repr_digest(hashlib.sha256(arrays.encode(filled(1.0))).hexdigest())

    answer = put_update(standing, standing.sites[0], offers[0], arrays.encode(filled(7.0)), repr_digest=declared)

    assert "send them again" in assert_problem(answer, ProblemCode.DIGEST_MISMATCH).detail
    assert not leftovers(standing)
    assert_problem(put_update(standing, standing.sites[0], offers[0], arrays.encode(filled(7.0))), CONFLICT)
    assert_goes_on(standing, job, offers)
    assert len(entries_of(standing, standing.sites[0], offers[0])) == 1


CONFLICT = ProblemCode.UPDATE_CONFLICT
LARGE = {
    "model": {"layers": [{"linear": {"in": 2, "out": 150_000}}, {"linear": {"in": 150_000, "out": 2}}]},
}  # 3 MB: several pieces of the spool


def large(value: float) -> Arrays:
    """An update, or a model, of `LARGE`."""
    manifest = job_spec(**LARGE).model.plan((2,)).manifest
    return {name: np.full(spec.shape, value, np.float32) for name, spec in manifest.tensors.items()}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.99], ids=["none-of-it", "a-tenth", "nearly-all"])
def test_an_upload_cut_off_leaves_nothing_and_its_bytes_are_taken_later(standing: Federation, share: float) -> None:
    job = standing.start(job_spec(**LARGE), large(0.0))
    offers = claim_all(standing)
    site, body = standing.sites[0], arrays.encode(large(1.0))

    with structlog.testing.capture_logs() as logs:
        with Wire(standing, site.worker) as wire:
            wire.put(offers[0], {**update_headers(offers[0], body), "expect": "100-continue"})
            assert "100" in wire.first_line()
            wire.send(body[: int(len(body) * share)])
        standing.until(lambda: not leftovers(standing))
        assert site.worker.tasks.get(offers[0].task_id).state is TaskState.UPLOADING
        for other, offer in zip(standing.sites, offers, strict=True):
            other.hand_in(offer, large(1.0))
        assert standing.finish(job).state is JobState.COMPLETED

    assert not [line for line in logs if line["log_level"] in ("error", "critical")]
    assert len(entries_of(standing, site, offers[0])) == 1
    assert not leftovers(standing)


def test_an_upload_that_stalls_is_given_up(standing: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    job = standing.start()
    offers = claim_all(standing)
    body = arrays.encode(filled(1.0))

    with Wire(standing, standing.sites[0].worker) as wire, monkeypatch.context() as patched:
        patched.setattr("app.blobs.STALL_S", 0.2)
        wire.put(offers[0], update_headers(offers[0], body))
        wire.send(body[:20])
        problem = assert_problem(wire.answer(), ProblemCode.LENGTH_MISMATCH)

    assert "stalled" in problem.detail
    assert_goes_on(standing, job, offers)


def test_bytes_behind_the_declared_length_harm_nothing(standing: Federation) -> None:
    job = standing.start()
    offers = claim_all(standing)
    body = arrays.encode(filled(1.0))

    with Wire(standing, standing.sites[0].worker) as wire:
        wire.put(offers[0], update_headers(offers[0], body))
        wire.send(body + b"\x00" * 100)
        wire.answer()  # that of the update, or that what followed it is no request

    assert_goes_on(standing, job, offers)


# --- Repetition and races ---------------------------------------------------------------------------------------------


def test_the_same_bytes_again_give_the_same_receipt_even_after_the_job(standing: Federation) -> None:
    job = standing.start()
    offers = claim_all(standing)
    body = arrays.encode(filled(1.0))

    first = put_update(standing, standing.sites[0], offers[0], body)
    again = put_update(standing, standing.sites[0], offers[0], body)
    assert_goes_on(standing, job, offers)
    late = put_update(standing, standing.sites[0], offers[0], body, isthmus_fence="7")

    assert first.status_code == again.status_code == late.status_code == 200
    assert first.content == again.content == late.content
    assert len(entries_of(standing, standing.sites[0], offers[0])) == 1


def test_a_receipt_given_again_asks_for_no_body(standing: Federation) -> None:
    job = standing.start()
    offers = claim_all(standing)
    body = arrays.encode(filled(1.0))
    first = put_update(standing, standing.sites[0], offers[0], body)

    with Wire(standing, standing.sites[0].worker) as wire:
        wire.put(offers[0], {**update_headers(offers[0], body), "expect": "100-continue"})
        assert wire.first_line() == "HTTP/1.1 200 OK"
        assert wire.answer().content == first.content

    assert_goes_on(standing, job, offers)


@pytest.mark.parametrize("when", ["while-collecting", "after-the-job"])
def test_other_bytes_for_an_accepted_update_are_refused(standing: Federation, when: str) -> None:
    job = standing.start()
    offers = claim_all(standing)
    if when == "after-the-job":
        assert_goes_on(standing, job, offers)
    else:
        standing.sites[0].hand_in(offers[0], filled(1.0))

    answer = put_update(standing, standing.sites[0], offers[0], arrays.encode(filled(9.0)))

    assert "second release" in assert_problem(answer, CONFLICT).detail
    if when == "while-collecting":
        assert_goes_on(standing, job, offers)
    assert entries_of(standing, standing.sites[0], offers[0]) == [hashlib.sha256(GOOD).hexdigest()]


def at_once(*calls: Callable[[], httpx.Response]) -> list[httpx.Response]:
    """The answers of calls that begin together."""
    answers: list[httpx.Response | None] = [None] * len(calls)
    start = threading.Barrier(len(calls))

    def run(number: int, call: Callable[[], httpx.Response]) -> None:
        start.wait()
        answers[number] = call()

    threads = [threading.Thread(target=run, args=item) for item in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [answer for answer in answers if answer is not None]
    assert len(found) == len(calls), "a call raised"
    return found


def test_equal_uploads_at_once_are_counted_once_and_get_one_receipt(standing: Federation) -> None:
    job = standing.start(job_spec(**LARGE), large(0.0))
    offers = claim_all(standing)
    site, body = standing.sites[0], arrays.encode(large(1.0))

    answers = at_once(*[lambda: put_update(standing, site, offers[0], body)] * 4)

    assert [answer.status_code for answer in answers] == [200] * 4
    assert len({answer.content for answer in answers}) == 1
    assert standing.researcher.jobs.round(job.id, 1).accepted == 1
    assert len(entries_of(standing, site, offers[0])) == 1
    assert not leftovers(standing)
    for other, offer in zip(standing.sites, offers, strict=True):
        other.hand_in(offer, large(1.0))
    assert standing.finish(job).state is JobState.COMPLETED


def test_of_different_uploads_at_once_the_one_that_was_charged_is_taken(standing: Federation) -> None:
    job = standing.start(job_spec(**LARGE), large(0.0))
    offers = claim_all(standing)
    site = standing.sites[0]
    bodies = [arrays.encode(large(float(value))) for value in range(1, 5)]

    answers = at_once(*[lambda body=body: put_update(standing, site, offers[0], body) for body in bodies])

    taken = [number for number, answer in enumerate(answers) if answer.status_code == 200]
    assert len(taken) == 1
    for number, answer in enumerate(answers):
        if number not in taken:
            assert_problem(answer, CONFLICT)
    assert entries_of(standing, site, offers[0]) == [hashlib.sha256(bodies[taken[0]]).hexdigest()]
    assert not leftovers(standing)
    for other, offer in zip(standing.sites[1:], offers[1:], strict=True):
        other.hand_in(offer, large(0.0))
    assert standing.finish(job).state is JobState.COMPLETED
    assert (standing.model(job)["1.bias"] == np.float32((taken[0] + 1) / 3)).all()


# --- Leases -----------------------------------------------------------------------------------------------------------


def take_lease(federation: Federation, site: Site, offer: TaskOffer) -> None:
    """Let the lease pass, and wait until the sweep has taken it."""
    federation.platform.execute(
        "UPDATE tasks SET lease_expires_at = clock_timestamp() - interval '1 second' WHERE id = %s", [offer.task_id]
    )
    federation.until(lambda: site.worker.tasks.get(offer.task_id).fence == offer.fence + 1)


def test_after_the_sweep_took_the_lease_the_same_bytes_are_taken_under_the_next_fence(standing: Federation) -> None:
    job = standing.start()
    offers = claim_all(standing)
    site = standing.sites[0]
    take_lease(standing, site, offers[0])

    answer = put_update(standing, site, offers[0], GOOD)

    assert "claim again" in assert_problem(answer, ProblemCode.LEASE_LOST).detail
    assert not site.heartbeat(offers[0]).held
    assert entries_of(standing, site, offers[0]) == []
    offers[0] = site.claim()
    assert offers[0].fence == 2
    assert_goes_on(standing, job, offers)


def test_a_lease_taken_in_mid_upload_ends_it_and_the_same_bytes_cost_nothing_again(standing: Federation) -> None:
    job = standing.start()
    offers = claim_all(standing)
    site = standing.sites[0]

    with Wire(standing, site.worker) as wire:
        wire.put(offers[0], {**update_headers(offers[0], GOOD), "expect": "100-continue"})
        assert "100" in wire.first_line()
        wire.send(GOOD[:50])
        take_lease(standing, site, offers[0])
        wire.send(GOOD[50:])
        assert_problem(wire.answer(), ProblemCode.LEASE_LOST)

    assert not leftovers(standing)
    offers[0] = site.claim()
    with refused(CONFLICT):
        site.hand_in(offers[0], filled(9.0))
    assert_goes_on(standing, job, offers)
    assert entries_of(standing, site, offers[0]) == [hashlib.sha256(GOOD).hexdigest()]


def test_a_lease_that_has_passed_but_was_not_taken_is_still_good(make_federation: Callable[..., Federation]) -> None:
    federation = make_federation(coordinate=False)
    job = federation.start()
    offers = claim_all(federation)
    federation.platform.execute("UPDATE tasks SET lease_expires_at = clock_timestamp() - interval '1 hour'")

    for site, offer in zip(federation.sites, offers, strict=True):
        assert site.hand_in(offer, filled(1.0)).task_id == offer.task_id

    assert federation.researcher.jobs.round(job.id, 1).accepted == 3


# --- Keys -------------------------------------------------------------------------------------------------------------

KEYS = {
    "revoked": ("revoked_at = clock_timestamp()", ProblemCode.KEY_REVOKED, "was revoked"),
    "expired": ("expires_at = clock_timestamp()", ProblemCode.KEY_EXPIRED, "has expired"),
    "without-its-scope": ("scopes = ARRAY['jobs:read']", ProblemCode.FORBIDDEN, "scope `tasks`; yours has jobs:read"),
}


@pytest.mark.parametrize("late", ["the-others-complete", "a-fresh-key-completes"])
@pytest.mark.parametrize(("spoiled", "code", "words"), KEYS.values(), ids=KEYS)
def test_a_key_that_is_good_no_more_hands_nothing_in(
    standing: Federation, spoiled: str, code: ProblemCode, words: str, late: str
) -> None:
    """The key that claimed is spoiled, and hands in; the worker has rotated it, so that its successor is good."""
    job = standing.start()
    offers = claim_all(standing)
    site = copy.copy(standing.sites[1])
    key_id = site.worker.me().key_id
    standing.sites[1].worker = standing.platform.client(site.worker.keys.rotate(key_id).key)
    standing.platform.execute(f"UPDATE api_keys SET {spoiled} WHERE id = %s", [key_id])

    problem = assert_problem(put_update(standing, site, offers[1], GOOD), code)

    assert words in problem.detail
    assert entries_of(standing, site, offers[1]) == []
    assert not leftovers(standing)
    assert standing.sites[1].worker.tasks.get(offers[1].task_id).state is TaskState.CLAIMED
    if late == "a-fresh-key-completes":
        assert_goes_on(standing, job, offers)
        assert len(entries_of(standing, site, offers[1])) == 1
    else:
        standing.sites[1].fail(offers[1])
        assert_goes_on(standing, job, offers, without=1)
        assert entries_of(standing, site, offers[1]) == []
