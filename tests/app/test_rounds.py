"""The way of a round: offered, claimed, handed in, summed, published; and what is told of it."""

import numpy as np

from isthmus.wire.events import verify_chain
from isthmus.wire.jobs import JobState
from isthmus.wire.rounds import RoundPhase, TaskState
from tests.federation import Federation, filled, job_spec
from tests.running import announcement


def test_a_round_is_the_mean_weighted_by_declared_rows(federation: Federation) -> None:
    federation.sites[0].worker.datasets.announce("heart", announcement(200))
    job = federation.start(job_spec())

    for value, site in zip((1.0, 2.0, 4.0), federation.sites, strict=True):
        site.hand_in(site.claim(), filled(value))

    assert federation.finish(job).state is JobState.COMPLETED
    expected = np.float32((200 * 1.0 + 100 * 2.0 + 100 * 4.0) / 400)
    assert all((tensor == expected).all() for tensor in federation.model(job).values())


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
