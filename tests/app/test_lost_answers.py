"""A claim whose answer was lost, or whose worker was killed: the task comes back with the next claim."""

from collections.abc import Callable

from isthmus.client import NoWork
from isthmus.wire.problems import ProblemCode
from isthmus.wire.rounds import ClaimTask, TaskOffer
from tests.federation import Federation, filled
from tests.running import refused


def test_a_worker_that_holds_nothing_gets_its_task_again_under_the_next_fence(
    make_federation: Callable[..., Federation],
) -> None:
    federation = make_federation(coordinate=False)
    federation.start()
    site = federation.sites[0]
    lost = site.claim()

    again = site.worker.tasks.claim(ClaimTask(holding=()), wait_s=0)

    assert isinstance(again, TaskOffer)
    assert (again.task_id, again.fence) == (lost.task_id, lost.fence + 1)
    with refused(ProblemCode.LEASE_LOST):  # whoever still works under the old fence is told
        site.hand_in(lost, filled(1.0))
    site.hand_in(again, filled(1.0))


def test_a_task_that_the_worker_holds_is_left_to_it(make_federation: Callable[..., Federation]) -> None:
    federation = make_federation(coordinate=False)
    federation.start()
    site = federation.sites[0]
    held = site.claim()

    named = site.worker.tasks.claim(ClaimTask(holding=(held.task_id,)), wait_s=0)
    silent = site.worker.tasks.claim(ClaimTask(), wait_s=0)

    assert isinstance(named, NoWork)
    assert isinstance(silent, NoWork), "a worker that does not say what it holds waits for its lease"
    site.hand_in(held, filled(1.0))


def test_what_was_handed_in_does_not_come_back(make_federation: Callable[..., Federation]) -> None:
    federation = make_federation(coordinate=False)
    federation.start()
    site = federation.sites[0]
    site.hand_in(site.claim(), filled(1.0))

    assert isinstance(site.worker.tasks.claim(ClaimTask(holding=()), wait_s=0), NoWork)


def test_nobody_gets_the_task_of_another_worker(make_federation: Callable[..., Federation]) -> None:
    federation = make_federation(coordinate=False)
    federation.start()
    federation.sites[0].claim()
    mine = federation.sites[1].claim()

    again = federation.sites[1].worker.tasks.claim(ClaimTask(holding=()), wait_s=0)

    assert isinstance(again, TaskOffer)
    assert again.task_id == mine.task_id
