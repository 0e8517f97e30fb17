"""The agent against a service of moods, with a real training process."""

import signal
import time
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest

from isthmus.client import Refused
from isthmus.codec.arrays import decode
from isthmus.interruption import Interrupted, Interruption
from isthmus.wire.problems import ProblemCode, problem
from isthmus_worker.heart import Heart
from isthmus_worker.loop import Agent, KeyRefused, NothingToServe, Outcome
from isthmus_worker.refusals import UNTOLD
from isthmus_worker.release import LONGEST_PAUSE_S
from isthmus_worker.trainer import Trainer
from tests.page_faults import glibc, page_faults
from tests.worker.factories import make_local_spec, make_offer, make_record_spec, make_spec
from tests.worker.fake_service import FakeService


def test_a_job_is_worked_through_from_statistics_to_evaluation_by_one_warm_child(
    agent: Agent, service: FakeService
) -> None:
    uploads, pids = {}, set()
    for number in (0, 1, 2, 4):
        offer = make_offer(number=number)
        service.offer(offer)
        assert agent.step() is Outcome.SUBMITTED
        pids.add(agent.trainer.pid)
        uploads[number] = decode(service.updates[offer.task_id], offer.upload_manifest)

    assert len(pids) == 1
    assert uploads[0]["statistics/rows"] == 33  # of 40, the hold-out is 20 % of each label, rounded down
    assert set(uploads[4]) == {
        "metrics/holdout/examples",
        "metrics/holdout/loss",
        "metrics/holdout/accuracy",
        "metrics/holdout/auc",
    }
    assert uploads[1]["metrics/train/examples"] + uploads[1]["metrics/holdout/examples"] == 40
    assert not np.array_equal(uploads[1]["0.weight"], uploads[2]["0.weight"])
    assert agent.journal.counts()["acknowledged"] == 4
    assert not list(agent.state.releases.iterdir())
    assert len(agent.journal.results()) == 3


def test_a_job_against_the_local_policy_is_refused_with_every_clause(agent: Agent, service: FakeService) -> None:
    agent.settings = agent.settings.model_copy(
        update={"policy": agent.settings.policy.model_copy(update={"principals": (), "min_cohort": 5})}
    )
    service.offer(make_offer())

    assert agent.step() is Outcome.REFUSED

    assert "principals:" in service.refused[0]
    assert "min_cohort:" in service.refused[0]
    assert sum(agent.journal.counts().values()) == 0  # nothing was computed
    assert service.updates == {}


def test_data_that_does_not_fit_is_refused_by_column_and_without_values(
    agent: Agent, service: FakeService, tmp_path: Path
) -> None:
    file = tmp_path / "patients.csv"
    file.write_text(file.read_text().replace("F,", "unicorn,", 1))
    service.offer(make_offer())

    assert agent.step() is Outcome.REFUSED

    assert "'sex'" in service.refused[0]
    assert "unicorn" not in service.refused[0]


def test_a_worker_that_requires_secure_aggregation_refuses_what_the_service_lets_pass(
    agent: Agent, service: FakeService
) -> None:
    policy = agent.settings.policy.model_copy(update={"require_secure_aggregation": True})
    agent.settings = agent.settings.model_copy(update={"policy": policy})
    service.offer(make_offer())

    assert agent.step() is Outcome.REFUSED

    assert "require_secure_aggregation: the job has no secure aggregation" in service.refused[0]
    assert service.updates == {}


def test_the_number_of_records_is_not_told_where_exact_statistics_may_not_leave(
    agent: Agent, service: FakeService, tmp_path: Path
) -> None:
    policy = agent.settings.policy.model_copy(update={"allow_exact_statistics": False})
    agent.settings = agent.settings.model_copy(update={"policy": policy})
    file = tmp_path / "patients.csv"
    file.write_text(file.read_text().replace("F,", "unicorn,", 3))
    plain = make_spec(
        data={"task": "classification", "target": "ill", "classes": 2,
              "features": ["age", {"name": "sex", "categories": ["F", "M"]}]},
        model={"layers": [{"linear": {"in": 3, "out": 2}}]},
    )  # fmt: skip
    service.offer(make_offer(plain))

    assert agent.step() is Outcome.REFUSED

    assert "'sex' holds a category" in service.refused[0]
    assert not any(digit in service.refused[0] for digit in "0123456789")


@pytest.mark.parametrize(("number", "min_rows", "word"), [(1, 34, "training"), (0, 8, "held-out"), (4, 8, "held-out")])
def test_too_few_records_in_a_part_are_refused_by_local_policy(
    agent: Agent, service: FakeService, number: int, min_rows: int, word: str
) -> None:
    policy = agent.settings.policy.model_copy(update={"min_rows": min_rows})
    agent.settings = agent.settings.model_copy(update={"policy": policy})
    service.offer(make_offer(number=number))

    assert agent.step() is Outcome.REFUSED

    assert f"min_rows: fewer {word} records" in service.refused[0]
    assert service.updates == {}


def test_what_was_only_prepared_waits_for_its_offer_and_todays_policy(agent: Agent, service: FakeService) -> None:
    service.admission = ProblemCode.LEASE_LOST
    service.offer(make_offer())
    assert agent.step() is Outcome.KEPT
    service.admission = None

    agent.settle()
    assert service.admitted == []

    policy = agent.settings.policy.model_copy(update={"principals": ()})
    agent.settings = agent.settings.model_copy(update={"policy": policy})
    service.offer(make_offer(number=2))  # refused: it retires nothing
    assert agent.step() is Outcome.REFUSED
    assert agent.journal.counts()["prepared"] == 1


def test_the_same_records_are_not_offered_anew_under_another_participation(agent: Agent, service: FakeService) -> None:
    service.offer(make_offer())
    assert agent.step() is Outcome.SUBMITTED
    service.offer(make_offer().model_copy(update={"participation_id": UUID(int=99)}))

    assert agent.step() is Outcome.REFUSED

    assert "another participation" in service.refused[0]


@pytest.mark.parametrize("error", [ValueError("patient 4711"), OverflowError("patient 4711")])
def test_what_no_check_foresaw_fails_the_task_and_not_the_agent(
    agent: Agent, service: FakeService, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(agent.journal, "pin", broken)
    service.offer(make_offer())

    assert agent.step() is Outcome.FAILED

    assert service.failed == [f"An unexpected {type(error).__name__} ended the task."]


def test_a_signal_that_a_library_made_an_error_of_ends_the_agent_and_fails_no_task(
    agent: Agent, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    interruption = Interruption()

    def broken(*_: object) -> None:
        try:
            interruption._interrupt(signal.SIGTERM, None)
        except Interrupted as interrupted:
            raise ValueError(f"Error serializing to JSON: Interrupted: {interrupted}") from None

    monkeypatch.setattr(agent.journal, "pin", broken)
    agent.check = interruption.check
    service.offer(make_offer())

    with pytest.raises(Interrupted, match="SIGTERM"):
        agent.step()
    with pytest.raises(Interrupted, match="SIGTERM"):
        agent.run()

    assert service.failed == []


@glibc
def test_what_a_batch_needed_is_used_again_by_the_next(agent: Agent, service: FakeService) -> None:
    wide = {"layers": [{"linear": {"in": 5, "out": 100_000}}, "relu", {"linear": {"in": 100_000, "out": 2}}]}
    training = {"optimizer": {"sgd": {"lr": 1e-4}}, "batch_size": "all", "epochs": 100}
    spec = make_spec(model=wide, training=training)
    service.offer(make_offer(spec))
    assert agent.step() is Outcome.SUBMITTED
    assert agent.trainer.pid is not None
    before = page_faults(agent.trainer.pid)
    service.offer(make_offer(spec, number=2))

    assert agent.step() is Outcome.SUBMITTED

    pages_a_batch = 33 * 100_000 * 4 // 4096  # of one of some ten tensors
    assert page_faults(agent.trainer.pid) - before < 10 * pages_a_batch


def test_a_heart_that_beats_for_nothing_stops_for_good(agent: Agent, service: FakeService) -> None:
    with Heart(agent.client, make_offer(heartbeat_s=0.1), max_silence_s=0.15) as heart:
        until = time.monotonic() + 30
        while heart.lost is None and time.monotonic() < until:
            time.sleep(0.01)
        beats = len(service.heartbeats)
        heart.alive(0.5)
        time.sleep(0.3)

    assert heart.lost is not None
    assert "no sign of life" in heart.lost
    assert len(service.heartbeats) == beats


def test_whatever_the_service_asks_for_the_agent_looks_again(agent: Agent) -> None:
    waits: list[float] = []
    agent.sleep = waits.append
    busy = Refused(problem(ProblemCode.NOT_READY, "because"), retry_after_s=1e9)
    answers = iter([busy, None])

    def call() -> None:
        if (answer := next(answers)) is not None:
            raise answer

    agent._patiently(call)

    assert waits == [LONGEST_PAUSE_S]


def test_an_upload_that_is_cut_is_repeated_with_the_same_bytes(agent: Agent, service: FakeService) -> None:
    spec = make_local_spec()
    service.cut_uploads = 2
    offer = make_offer(spec)
    service.offer(offer)

    assert agent.step() is Outcome.SUBMITTED

    assert len(service.admitted) == 3
    assert len(set(service.admitted)) == 1


def test_a_lease_lost_before_admission_keeps_the_bytes_for_the_next_offer_of_the_round(
    agent: Agent, service: FakeService
) -> None:
    spec = make_local_spec()
    service.admission = ProblemCode.LEASE_LOST
    service.offer(make_offer(spec))
    assert agent.step() is Outcome.KEPT
    prepared = agent.journal._releases("state = 'prepared'")[0].digest

    service.admission = None
    again = make_offer(spec, fence=2, attempt=2)
    service.offer(again)
    assert agent.step() is Outcome.SUBMITTED

    assert service.admitted == [prepared]


def test_a_round_that_is_over_discards_what_was_never_admitted_and_another_noising_is_free(
    agent: Agent, service: FakeService
) -> None:
    spec = make_local_spec()
    service.admission = ProblemCode.ROUND_NOT_COLLECTING
    service.offer(make_offer(spec))
    assert agent.step() is Outcome.REFUSED
    assert agent.journal.counts()["discarded"] == 1
    assert not list(agent.state.releases.iterdir())

    service.admission = None
    service.offer(make_offer(spec))
    assert agent.step() is Outcome.SUBMITTED


def test_the_same_round_for_another_model_is_refused_once_something_was_released(
    agent: Agent, service: FakeService
) -> None:
    service.offer(make_offer())
    assert agent.step() is Outcome.SUBMITTED
    other = make_offer()
    service.offer(other.model_copy(update={"model": other.model.model_copy(update={"digest": "ab" * 32})}))

    assert agent.step() is Outcome.REFUSED

    assert "released before" in service.refused[0]


def test_a_receipt_signed_by_another_key_acknowledges_nothing(agent: Agent, service: FakeService) -> None:
    service.forged = True
    service.offer(make_offer())

    assert agent.step() is Outcome.KEPT

    assert agent.journal.counts()["released"] == 1
    assert list(agent.state.releases.iterdir())


def test_a_receipt_that_was_lost_is_fetched_at_the_next_start(agent: Agent, service: FakeService) -> None:
    service.forged = True
    service.offer(make_offer())
    agent.step()
    service.forged = False

    agent.settle()

    assert agent.journal.counts()["acknowledged"] == 1
    assert len(service.admitted) == 1  # the bytes did not travel twice


def test_a_task_that_nobody_wants_any_more_is_stopped(agent: Agent, service: FakeService) -> None:
    slow = {"optimizer": {"sgd": {"lr": 0.001}}, "batch_size": 1, "epochs": 10_000}
    service.held = False
    service.offer(make_offer(make_spec(training=slow)))

    assert agent.step() is Outcome.CANCELLED

    assert 0 <= service.heartbeats[-1]["progress"] < 1
    assert service.updates == {}
    assert agent.journal.counts()["prepared"] == 0


def test_a_model_with_another_digest_is_not_trained_on(agent: Agent, service: FakeService) -> None:
    offer = make_offer()
    service.offer(offer)
    service.models[offer.model.digest] = bytes(len(service.models[offer.model.digest]))

    assert agent.step() is Outcome.FAILED

    assert "cannot be fetched" in service.failed[0]


def test_a_service_that_is_too_busy_for_the_model_is_waited_for(
    agent: Agent, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits, busy = list[float](), [problem(ProblemCode.NOT_READY, "not now"), problem(ProblemCode.TOO_MANY_REQUESTS, "")]
    agent.sleep = waits.append
    download = agent.client.tasks.download_model

    def refused_at_first(*given: Any, **more: Any) -> object:
        if busy:
            raise Refused(busy.pop(), retry_after_s=8.0)  # longer than the client waits by itself
        return download(*given, **more)

    monkeypatch.setattr(agent.client.tasks, "download_model", refused_at_first)
    service.offer(make_offer())

    assert agent.step() is Outcome.SUBMITTED

    assert waits[:2] == [8.0, 8.0]


def test_a_revoked_key_ends_the_agent(agent: Agent, service: FakeService) -> None:
    service.claim_refusal = ProblemCode.KEY_REVOKED

    with pytest.raises(KeyRefused, match="enrolment token"):
        agent.step()


def test_datasets_are_announced_by_schema_and_one_that_cannot_be_read_is_left_out(
    agent: Agent, service: FakeService, tmp_path: Path
) -> None:
    agent.trainer = Trainer(agent.settings.resources, agent.state.scratch)
    agent.announce()
    assert agent.trainer.pid is None
    assert service.announced["patients"]["rows"] == 40
    assert service.announced["patients"]["data_schema"]["columns"][1] == {
        "name": "pressure",
        "kind": "number",
        "missing": True,
        "shape": None,
    }

    (tmp_path / "patients.csv").unlink()
    with pytest.raises(NothingToServe):
        agent.announce()


def test_exact_metrics_stay_here_unless_the_job_releases_them(agent: Agent, service: FakeService) -> None:
    spec = make_local_spec()
    offer = make_offer(spec, number=4)
    service.offer(offer)

    assert agent.step() is Outcome.SUBMITTED

    assert decode(service.updates[offer.task_id]) == {}
    assert agent.journal.results("heart")[0]["metrics"]["holdout/examples"] == 7


def test_of_work_that_breaks_under_privacy_of_records_one_sentence_is_told(
    agent: Agent, service: FakeService, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither what broke it nor how many records are concerned, nor whether it was refused or failed."""
    path = tmp_path / "patients.csv"
    path.write_text(path.read_text() + "only one value\n")
    service.offer(make_offer(make_record_spec()))
    assert agent.step() is Outcome.FAILED
    assert service.failed == [UNTOLD]
    assert "more or fewer values" in str([vars(record) for record in caplog.records])

    service.offer(make_offer(make_spec(), job_id=UUID(int=7), participation_id=UUID(int=8)))  # unit none
    assert agent.step() is Outcome.REFUSED
    assert "(records: 1)" in service.refused[0]
    service.offer(make_offer(make_local_spec(), job_id=UUID(int=9), participation_id=UUID(int=10)))
    assert agent.step() is Outcome.REFUSED
    assert "records" in service.refused[1]
    assert "records: " not in service.refused[1]


def test_a_missing_column_is_told_under_privacy_of_records_too(
    agent: Agent, service: FakeService, tmp_path: Path
) -> None:
    path = tmp_path / "patients.csv"
    path.write_text(path.read_text().replace("pressure", "tension", 1))
    service.offer(make_offer(make_record_spec()))
    assert agent.step() is Outcome.REFUSED
    assert service.refused == ["The dataset has no column 'pressure'."]
