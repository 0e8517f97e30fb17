"""Why does it not go on? Each way a job can wait is a sentence that says what to do."""

from datetime import timedelta

import pytest

from isthmus.commands.rendering.diagnosis import waits_for
from isthmus.commands.rendering.text import number, printable, span
from isthmus.testing import NOW, sample_job, sample_participation, sample_round, sample_task
from isthmus.wire.jobs import JobReason, JobState, ParticipationState
from isthmus.wire.rounds import RoundPhase, TaskState

LATER = NOW + timedelta(seconds=40)
HELD = sample_task(TaskState.CLAIMED, lease_expires_at=LATER + timedelta(seconds=9))


def test_a_draft_waits_for_its_model_then_for_its_start() -> None:
    assert "no initial model" in waits_for(sample_job(JobState.DRAFT, model_digest=None), [], None, NOW)[0]
    assert "Start it" in waits_for(sample_job(JobState.DRAFT), [], None, NOW)[0]


def test_a_started_job_waits_for_the_stewards_by_name() -> None:
    participations = [
        sample_participation(),
        sample_participation(ParticipationState.PENDING, "ucl"),
        sample_participation(ParticipationState.REJECTED, "kth", detail="not our purpose"),
    ]
    assert waits_for(sample_job(JobState.AWAITING_APPROVAL), participations, None, NOW) == [
        "1 of 2 approvals that it needs are given.",
        "ucl/heart waits for a steward of ucl.",
        "kth/heart was rejected: not our purpose",
    ]


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        (sample_task(TaskState.OFFERED), "offered its task 40 s ago and has not claimed it: is its worker running?"),
        (sample_task(TaskState.OFFERED, fence=3), "(offered 3 times)"),
        (sample_task(TaskState.CLAIMED), "at work by agent-1; its lease has passed."),
        (HELD, "its lease ends in 9 s unless renewed."),
        (sample_task(TaskState.UPLOADING), "was admitted and is sending its update"),
        (sample_task(TaskState.REFUSED, detail="max_clip_norm"), "refused this round: max_clip_norm"),
        (sample_task(TaskState.FAILED, detail="out of memory"), "failed: out of memory"),
        (sample_task(TaskState.EXPIRED), "was not heard of in time."),
        (sample_task(TaskState.CANCELLED), "is cancelled."),
    ],
)  # fmt: skip
def test_a_round_waits_for_its_tasks(task: object, sentence: str) -> None:
    found = waits_for(sample_job(), [], sample_round(tasks=[task], accepted=1), LATER)
    assert found[0] == "Round 1 (train) has 1 of 3 updates (at least 2), until 9 min from now."
    assert sentence in found[1]


def test_a_round_waits_for_nobody_who_has_submitted() -> None:
    assert len(waits_for(sample_job(), [], sample_round(tasks=[sample_task(TaskState.SUBMITTED)]), NOW)) == 1


def test_a_passed_deadline_and_a_second_attempt_are_told() -> None:
    found = waits_for(sample_job(), [], sample_round(attempt=2), NOW + timedelta(hours=1))
    assert found[0].endswith("and its deadline has passed, attempt 2.")


def test_what_the_service_does_by_itself_is_told_too() -> None:
    assert "being computed" in waits_for(sample_job(), [], sample_round(RoundPhase.AGGREGATING), NOW)[0]
    assert "about to be opened" in waits_for(sample_job(), [], None, NOW)[0]
    assert waits_for(sample_job(), [], sample_round(RoundPhase.FAILED, detail="too few"), NOW) == [
        "Round 1 (train) is failed: too few"
    ]


def test_a_pause_says_why_and_how_it_ends() -> None:
    asked = sample_job(JobState.PAUSED, reason=JobReason.BY_REQUEST)
    assert "isthmus job resume" in waits_for(asked, [], None, NOW)[1]
    few = sample_job(JobState.PAUSED, reason=JobReason.TOO_FEW_PARTICIPATIONS, detail="Only one is left.")
    found = waits_for(few, [sample_participation(ParticipationState.WITHDRAWN, detail="consent")], None, NOW)
    assert found == [
        "The job is paused: Only one is left.",
        "0 of 2 approvals that it needs are given.",
        "charite/heart was withdrawn: consent",
    ]


def test_a_job_that_ended_waits_for_nothing() -> None:
    assert waits_for(sample_job(JobState.COMPLETED, detail="All rounds are done."), [], None, NOW) == []
    assert waits_for(sample_job(JobState.FAILED, detail="Round 1 failed."), [], None, NOW) == ["Round 1 failed."]


def test_text_of_others_moves_no_cursor() -> None:
    assert printable("a\x1b[2J\r\x9bb\nc[bold]") == "a\\x1b[2J\\x0d\\x9bb\nc[bold]"


def test_figures_are_short() -> None:
    assert [number(value) for value in (0.5, 0.0, 1 / 3, 12345.678, 1e-7, 3e9)] == [
        "0.5", "0", "0.3333", "12345.678", "1e-07", "3e+09",
    ]  # fmt: skip
    assert [span(seconds) for seconds in (-5, 3, 119, 121, 7300, 200_000)] == [
        "0 s", "3 s", "119 s", "2 min", "2 h", "2 d",
    ]  # fmt: skip
