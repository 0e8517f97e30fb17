"""What a terminal tells of a round under secure aggregation: its step, who is missing, what it takes, how far it is."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from isthmus.commands.exits import ExitCode
from isthmus.commands.rendering.diagnosis import waits_for
from isthmus.commands.rendering.jobs import event_line
from isthmus.commands.rendering.secured import EVENT_WORDS, MOST_NAMED, WORDS
from isthmus.testing import NOW, FakeService, sample_events, sample_job, sample_round, sample_task
from isthmus.wire.events import EventKind
from isthmus.wire.rounds import RoundPhase, RoundView, TaskState
from isthmus.wire.secured import SecuredRound, Step
from tests.sdk.test_commands import Terminal

LATER = NOW + timedelta(seconds=10)
JOB_FILE = """\
name: heart
model: {{layers: [{{linear: {{in: 2, out: 2}}}}]}}
data: {{task: classification, features: [age, bp], target: disease, classes: 2}}
training: {{optimizer: {{sgd: {{lr: 0.1}}}}}}
strategy: {{fedavg: {{weights: uniform}}}}
privacy: {privacy}
secure_aggregation: {{max_colluding: 1}}
cohort: {{min_updates: 5}}
rounds: 20
"""


def secured(step: Step = Step.SHARES, phase: RoundPhase = RoundPhase.COLLECTING, **changes: Any) -> RoundView:
    fields: dict[str, Any] = {
        "step": step,
        "attempt": 2,
        "members": 10,
        "threshold": 7,
        "needed": 8,
        "arrived": 6,
        "missing": ["ucl/heart", "kth/heart"],
        "dropped": ["mgh/heart"],
        "step_closes_at": NOW + timedelta(seconds=40),
        "progress": None,
    }
    tasks = [sample_task(TaskState.CLAIMED)]
    return sample_round(phase, secured=SecuredRound(**{**fields, **changes}), tasks=tasks, attempt=2)


def line_of(kind: EventKind, data: dict[str, Any]) -> str:
    (event,) = sample_events(kind)
    return event_line(event.model_copy(update={"data": data}))


def sentence(current: RoundView) -> str:
    return waits_for(sample_job(), [], current, LATER)[0]


@pytest.mark.parametrize("step", [Step.KEYS, Step.SHARES, Step.UPDATE])
def test_while_workers_train_the_step_and_the_tasks_are_told(step: Step) -> None:
    found = waits_for(sample_job(), [], secured(step), LATER)
    number = list(Step).index(step) + 1
    assert found[0] == (
        f"Round 1 (train), attempt 2, is at step {step} ({number} of 5, {WORDS[step]}): 6 have arrived; it waits for "
        "ucl/heart, kth/heart; the step closes in 30 s."
    )
    assert "charite/heart is at work" in found[1]


def test_after_the_updates_it_is_told_how_many_messages_are_enough() -> None:
    for step, phase in ((Step.SURVIVORS, RoundPhase.SURVIVORS), (Step.UNMASK, RoundPhase.UNMASKING)):
        found = waits_for(sample_job(), [], secured(step, phase), NOW + timedelta(minutes=1))
        assert len(found) == 1
        assert "6 of the 7 that are enough have arrived" in found[0]
        assert "the step's time has passed" in found[0]
    assert "it waits for" not in sentence(secured(missing=[], step_closes_at=None))
    assert "closes" not in sentence(secured(missing=[], step_closes_at=None))


def test_the_progress_of_the_unmasking_is_told() -> None:
    aggregating = RoundPhase.AGGREGATING
    assert "the masks are about to be taken off" in sentence(secured(Step.UNMASK, aggregating))
    assert "takes the masks off its sum: 42 % are done." in sentence(secured(Step.UNMASK, aggregating, progress=0.42))


def test_a_round_that_has_ended_is_told_as_any_other() -> None:
    failed = secured(phase=RoundPhase.FAILED)
    assert sentence(failed).startswith("Round 1 (train) is failed")


def test_of_many_that_are_missing_some_are_named_and_the_others_counted() -> None:
    many = [f"org-{number}/heart" for number in range(MOST_NAMED + 4)]
    found = sentence(secured(missing=many))
    assert f"org-{MOST_NAMED - 1}/heart and 4 more" in found
    assert f"org-{MOST_NAMED}/heart" not in found


def test_job_show_lays_out_step_threshold_missing_and_dropped(tmp_path: Path) -> None:
    service = FakeService()
    job = sample_job(current_round=1)
    service.answer("GET", f"/v1/jobs/{job.id}", job)
    service.answer("GET", f"/v1/jobs/{job.id}/participations", [])
    service.answer("GET", f"/v1/jobs/{job.id}/rounds/1", secured())
    ran = Terminal(service, tmp_path)("job", "show", str(job.id))
    assert ran.code == ExitCode.OK
    lines = [" ".join(line.split()) for line in ran.out.splitlines()]
    for told in (
        "step shares (2 of 5, shares of the secrets)",
        "arrived 6, and 2 missing",
        "missing ucl/heart, kth/heart",
        "dropped mgh/heart",
        "threshold 7 of the 10 that were asked have to stay to the end, and the sum needs 8",
        "attempt 2",
        "step closes 2026-01-31 12:00:40Z",
    ):
        assert told in lines

    service = FakeService()
    service.answer("GET", f"/v1/jobs/{job.id}", job)
    service.answer("GET", f"/v1/jobs/{job.id}/participations", [])
    service.answer(
        "GET",
        f"/v1/jobs/{job.id}/rounds/1",
        secured(Step.UNMASK, RoundPhase.AGGREGATING, progress=0.5, missing=[], dropped=[]),
    )
    lines = [
        " ".join(line.split()) for line in Terminal(service, tmp_path)("job", "show", str(job.id)).out.splitlines()
    ]
    assert "unmasked 50 %" in lines
    assert not any(line.startswith(("missing", "dropped", "step closes", "arrived")) for line in lines)


def test_events_tell_the_same_story_in_the_same_words() -> None:
    for kind in EVENT_WORDS:
        line = line_of(kind, {"round": 3, "missing": ["ucl/heart", "kth/heart"], "dropped": [], "deep": {}})
        assert f"{kind}: {EVENT_WORDS[kind]}; round=3 missing=ucl/heart, kth/heart" in line
        assert "dropped" not in line
        assert "deep" not in line
    assert line_of(EventKind.UNMASKED, {}).endswith("shares that take the masks off are in")
    for step, kind in ((Step.KEYS, EventKind.KEYS_CLOSED), (Step.SURVIVORS, EventKind.SURVIVORS_SIGNED)):
        assert WORDS[step] in EVENT_WORDS[kind]
    assert "names" not in line_of(EventKind.ROUND_FROZEN, {"names": ["a", "b"]})


@pytest.mark.parametrize(
    ("privacy", "told"),
    [
        (
            "{unit: organization, where: distributed, epsilon: 8, clip_norm: 1.5}",
            "only the sum of 5 or more updates is opened, each bounded to 1.5; the claim needs 4 honest organizations",
        ),
        ("{unit: none, clip_norm: 10}", "only the sum of 5 or more updates is opened, each bounded to 10"),
    ],
)
def test_a_plan_says_what_secure_aggregation_opens(tmp_path: Path, privacy: str, told: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(JOB_FILE.format(privacy=privacy))
    ran = Terminal(FakeService(), tmp_path)("privacy", "plan", str(path), "--rows", "300")
    assert ran.code == ExitCode.OK
    assert told in " ".join(ran.out.split())
