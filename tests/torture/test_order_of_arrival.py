"""In whatever order updates arrive, and whoever stays away, the set is summed in its own order."""

import random
from pathlib import Path

import numpy as np

from app.rounds.aggregation import write_aggregate
from isthmus.federation.strategies import strategy_of
from isthmus.wire.events import EventKind
from isthmus.wire.jobs import JobState
from isthmus.wire.manifest import Manifest
from isthmus.wire.rounds import TaskState
from tests.app.conftest import federation, make_federation
from tests.federation import Arrays, Federation, job_spec

__all__ = ["federation", "make_federation"]

ROUNDS = 100
HUGE = 3e15  # beside it a float64 keeps halves, so that a sum depends on its order


def hard_to_add(site: int, chance: np.random.Generator) -> Arrays:
    """One site's update: two sites have huge numbers that cancel out, the others small ones that count."""
    huge = {0: HUGE, 2: -HUGE}.get(site, 0.0)
    shapes = {"0.bias": (2,), "0.weight": (2, 2)}
    return {name: np.float32(huge + (not huge) * chance.normal(size=shape)) for name, shape in shapes.items()}


def test_a_hundred_orders_of_arrival_give_the_bytes_of_the_canonical_order(
    federation: Federation, tmp_path: Path
) -> None:
    federation.add(1)
    sites = federation.sites
    job = federation.start(job_spec(rounds=ROUNDS, cohort={"min_updates": len(sites), "deadline_s": 600}))
    spec, manifest = job.spec, job.manifest
    assert isinstance(manifest, Manifest)
    chance, orders = np.random.default_rng(7), random.Random("orders of arrival")
    first = federation.researcher.jobs.round(job.id, 1).model_digest
    model, otherwise = federation.folder / "data" / "blobs" / "checkpoints" / first[:2] / first, 0
    seen: set[tuple[int, ...]] = set()

    for number in range(1, ROUNDS + 1):
        order = orders.sample(range(len(sites)), len(sites))
        seen.add(tuple(order))
        updates = [hard_to_add(site, chance) for site in range(len(sites))]
        paths: dict[int, Path] = {}
        for site in order:
            offer = sites[site].claim()
            assert offer.round_number == number
            paths[site], digest = sites[site].body(offer, updates[site])
            sites[site].send(offer, paths[site], digest)

        def again(arrived: list[int], name: str, before: Path = model, paths: dict[int, Path] = paths) -> str:
            drafts = tmp_path / f"{name}", tmp_path / "state"
            inputs = [paths[site] for site in arrived]
            weights = [100.0] * len(arrived)
            return write_aggregate(manifest, strategy_of(spec.strategy), before, None, inputs, weights, drafts)[0]

        expected = again(list(range(len(sites))), f"canonical-{number}")
        otherwise += again(order, "arrived") != expected
        model = tmp_path / f"canonical-{number}"
        published = federation.until(
            lambda number=number: federation.researcher.jobs.round(job.id, number).result_digest
        )
        assert published == expected, f"round {number}: arrived in the order {order}"

    assert federation.finish(job).state is JobState.COMPLETED
    assert len(seen) > 20, "nearly every order there is"
    assert otherwise > 50, "summed in the order of arrival, most of these rounds would have given other bytes"


def test_an_over_selected_round_closes_while_the_dead_worker_still_holds_its_lease(federation: Federation) -> None:
    """The seconds are measured by `make torture`; here the order of things is proven: no lease had to end for it."""
    cohort = {"min_updates": 2, "fraction": 0.6, "over_selection": 1, "deadline_s": 600}
    job = federation.start(job_spec(cohort=cohort))
    offers = [site.claim() for site in federation.sites]
    dead, *living = zip(federation.sites, offers, strict=True)
    for site, offer in living:
        site.hand_in(offer, hard_to_add(1, np.random.default_rng(1)))

    assert federation.finish(job).state is JobState.COMPLETED
    events = list(federation.researcher.jobs.events(job.id, follow=False))
    assert not [event for event in events if event.kind is EventKind.LEASE_LOST]
    frozen = next(event for event in events if event.kind is EventKind.ROUND_FROZEN)
    assert frozen.data["because"] == "target-reached"
    site, offer = dead
    assert site.worker.tasks.get(offer.task_id).state is TaskState.CANCELLED
    assert site.heartbeat(offer).held is False
