"""The way of a round: offered, claimed, handed in, summed, published; and what is told of it."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from app.blobs import checkpoint_key
from app.rounds.aggregation import write_aggregate
from isthmus.client.tasks import NoWork
from isthmus.federation.strategies import strategy_of
from isthmus.wire.events import EventKind, verify_chain
from isthmus.wire.jobs import JobState
from isthmus.wire.rounds import ClaimTask, RoundPhase, TaskState
from tests.federation import OPEN, Arrays, Federation, filled, job_spec


def test_a_round_is_the_mean_weighted_by_declared_rows(federation: Federation) -> None:
    federation.sites[0].announce(rows=200)
    job = federation.start(job_spec())

    for value, site in zip((1.0, 2.0, 4.0), federation.sites, strict=True):
        site.hand_in(site.claim(), filled(value))

    assert federation.finish(job).state is JobState.COMPLETED
    expected = np.float32((200 * 1.0 + 100 * 2.0 + 100 * 4.0) / 400)
    assert all((tensor == expected).all() for tensor in federation.model(job).values())


@pytest.mark.parametrize("kind", ["fedavg", "fedavgm"])
def test_with_uniform_weights_declared_rows_do_not_count(federation: Federation, kind: str) -> None:
    federation.sites[0].announce(rows=2000)
    job = federation.start(job_spec(strategy={kind: {"weights": "uniform"}}))

    for value, site in zip((1.0, 2.0, 6.0), federation.sites, strict=True):
        site.hand_in(site.claim(), filled(value))

    assert federation.finish(job).state is JobState.COMPLETED
    assert all((tensor == 3.0).all() for tensor in federation.model(job).values())
    only = federation.researcher.jobs.round(job.id, 1)
    assert [update.weight for update in only.updates] == [1.0, 1.0, 1.0]


def test_rounds_follow_each_other_and_the_record_tells_all(federation: Federation) -> None:
    job = federation.start(job_spec(rounds=3))

    for number in (1, 2, 3):
        for site in federation.sites:
            offer = site.claim()
            assert offer.round_number == number
            site.hand_in(offer, filled(1.0))
    done = federation.finish(job)

    assert (done.state, done.rounds_completed) == (JobState.COMPLETED, 3)
    assert (federation.model(job)["0.bias"] == 3.0).all()
    rounds = list(federation.researcher.jobs.rounds(job.id))
    assert [item.number for item in rounds] == [1, 2, 3]
    assert {item.phase for item in rounds} == {RoundPhase.COMPLETED}
    assert [[update.position for update in item.updates] for item in rounds] == [[0, 1, 2]] * 3
    assert {task.state for item in rounds for task in item.tasks} == {TaskState.SUBMITTED}
    assert [item.round_number for item in federation.researcher.jobs.checkpoints(job.id)] == [0, 1, 2, 3]
    events = list(federation.researcher.jobs.events(job.id, follow=False))
    assert verify_chain(events) == events[-1].hash


def test_a_worker_is_offered_only_the_datasets_that_it_asks_for(federation: Federation) -> None:
    site = federation.sites[0]
    lungs = site.announce("lungs", rows=100)
    site.steward.datasets.confirm(lungs.id)
    site.steward.datasets.set_policy(lungs.id, OPEN)
    federation.start()

    heart = site.worker.tasks.claim(ClaimTask(datasets=("heart",)), wait_s=0)
    again = site.worker.tasks.claim(ClaimTask(datasets=("heart",)), wait_s=0)
    none = site.worker.tasks.claim(ClaimTask(datasets=()), wait_s=0)
    other = site.worker.tasks.claim(ClaimTask(datasets=("lungs", "liver")), wait_s=0)

    assert not isinstance(heart, NoWork)
    assert not isinstance(other, NoWork)
    assert (heart.dataset, other.dataset) == ("heart", "lungs")
    assert isinstance(again, NoWork), "the other dataset's task was on offer, and not asked for"
    assert isinstance(none, NoWork)


def test_where_nothing_is_on_offer_the_answer_says_when_to_come_again(federation: Federation) -> None:
    worker = federation.sites[0].worker

    answer = federation.platform.http(worker).post("/v1/tasks/claim", json={})

    assert (answer.status_code, answer.content) == (204, b"")
    assert int(answer.headers["retry-after"]) >= 1
    said = worker.tasks.claim(ClaimTask(), wait_s=0)
    assert isinstance(said, NoWork)
    assert said.retry_after_s == float(answer.headers["retry-after"])


def uneven(number: int, place: int) -> Arrays:
    """Updates whose weighted sum depends on its order: the first two cancel out, the third is lost beside either."""
    if place < 2:
        return filled((2.0**100, -(2.0**99))[place])
    chance = np.random.default_rng(number)
    return {name: chance.standard_normal(tensor.shape, np.float32) for name, tensor in filled(0.0).items()}


@pytest.mark.parametrize("strategy", ["fedavgm", {"fedadam": {"lr": 0.05}}], ids=["fedavgm", "fedadam"])
def test_every_round_can_be_computed_again_from_its_record(
    make_federation: Callable[..., Federation], tmp_path: Path, strategy: object
) -> None:
    federation = make_federation(sites=0)
    federation.add(3, rows=lambda number: 100 * (number + 1))
    job = federation.start(job_spec(rounds=2, strategy=strategy))
    for number in (1, 2):
        for place in (2, 0, 1):  # not in the order in which they are summed
            site = federation.sites[place]
            site.hand_in(site.claim(), uneven(number, place))
    done = federation.finish(job)
    assert done.state is JobState.COMPLETED, done.detail

    events = list(federation.researcher.jobs.events(job.id, follow=False))
    verify_chain(events)
    frozen = [event.data for event in events if event.kind is EventKind.ROUND_FROZEN]
    completed = [event.data for event in events if event.kind is EventKind.ROUND_COMPLETED]
    updates = {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in federation.blobs("updates")}
    checkpoints = tmp_path / "data" / "blobs"
    assert done.manifest is not None
    state = None
    for entered, published in zip(frozen, completed, strict=True):
        assert [item["weight"] for item in entered["updates"]] == [100.0, 200.0, 300.0]
        digest, state_digest = write_aggregate(
            done.manifest,
            strategy_of(done.spec.strategy),
            checkpoints / checkpoint_key(published["model_digest"]),
            state,
            [updates[item["digest"]] for item in entered["updates"]],
            [item["weight"] for item in entered["updates"]],
            (tmp_path / "model-again", tmp_path / "state-again"),
        )
        assert digest == published["result_digest"]
        assert state_digest is not None
        assert state_digest == published["state_digest"]
        state = checkpoints / checkpoint_key(state_digest)

    assert len(completed) == 2
    assert completed[0]["result_digest"] == completed[1]["model_digest"]
    assert completed[1]["result_digest"] == done.model_digest
