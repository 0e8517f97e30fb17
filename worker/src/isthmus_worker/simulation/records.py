"""From the clients' records to encoded arrays in shared memory, by the worker's own code; and what a federation's
statistics round would have found on the way."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from isthmus.federation.rounds import merge_statistics, number_after
from isthmus.wire.data import FeatureStatistics
from isthmus.wire.jobs import JobSpec
from isthmus_worker.data import Table
from isthmus_worker.features import Examples, encode_inputs, encode_targets, require_rows
from isthmus_worker.measuring import measure_columns
from isthmus_worker.parts import Marked, mark_holdout, split_examples
from isthmus_worker.private_statistics import measure_privately
from isthmus_worker.refusals import DataRefused
from isthmus_worker.simulation.clients import Client, holdout_key_of
from isthmus_worker.simulation.messages import ClientAt, ExamplesAt
from isthmus_worker.simulation.privacy import Plans
from isthmus_worker.simulation.regions import Layout, Region, array_at

_TEST_PIECE: Final = 2048
"""Records of the test set that one process measures at a time; fixed, so that sums are the same for any number."""


class RecordsRefused(Exception):
    """Somebody's records cannot serve the job. The message names whose, and why."""


@dataclass(frozen=True)
class Prepared:
    """Where everybody's encoded records lie.

    Attributes:
        clients: in the order in which they were given.
        test: the pieces of the test set; empty without one.
        statistics: what `standardize: federated` found, over the training records of all.
    """

    clients: list[ClientAt]
    test: list[ExamplesAt]
    statistics: FeatureStatistics | None


def prepare(spec: JobSpec, clients: Sequence[Client], plans: Plans, test: Table | None, region: Region) -> Prepared:
    """Encode everything into `region`.

    Args:
        spec: the job, with its seed.
        clients: in canonical order.
        plans: what the privacy section becomes at each of them.
        test: records that are held by nobody.
        region: empty; nothing of it stays mapped here.

    Raises:
        RecordsRefused: somebody's records do not fit the job.
    """
    assert spec.seed is not None, "a simulation's job has a seed"
    marked = []
    for client in clients:
        with _named(client):
            marked.append(mark_holdout(client.table, spec, holdout_key_of(client, spec.seed)))
    statistics = _statistics(spec, clients, plans, marked) if number_after(spec, None) == 0 else None

    layout = Layout()
    targets = marked[0].targets if marked else np.zeros(0, np.int64)

    def room(rows: int) -> ExamplesAt:
        inputs = layout.add(np.dtype(np.float32), (rows, spec.data.width))
        return ExamplesAt(inputs=inputs, targets=layout.add(targets.dtype, (rows, *targets.shape[1:])))

    held = [int(one.holdout.sum()) for one in marked]
    places = [
        ClientAt(training=room(len(one.targets) - out), holdout=room(out))
        for one, out in zip(marked, held, strict=True)
    ]
    rows = 0 if test is None else test.rows
    # The area under the curve is one over all records: a test set that has one is measured in one piece.
    piece = _TEST_PIECE if spec.data.outputs != 2 else max(1, rows)
    pieces = [room(min(piece, rows - start)) for start in range(0, rows, piece)]

    region.make_room(layout.size)
    memory = region.map(writable=True)

    def put(examples: Examples, place: ExamplesAt) -> None:
        array_at(memory, place.inputs)[...] = examples.inputs
        array_at(memory, place.targets)[...] = examples.targets

    for client, one, at in zip(clients, marked, places, strict=True):
        with _named(client):
            split = split_examples(one, spec, statistics)
        put(split.training, at.training)
        put(split.holdout, at.holdout)
    if test is not None:
        with _told("The test set"):
            require_rows(test)
            examples = Examples(
                inputs=encode_inputs(test, spec.data, statistics), targets=encode_targets(test, spec.data)
            )
        for number, at_piece in enumerate(pieces):
            marks = np.arange(rows) // piece == number
            put(examples.only(marks), at_piece)
    return Prepared(places, pieces, statistics)


def _statistics(spec: JobSpec, clients: Sequence[Client], plans: Plans, marked: Sequence[Marked]) -> FeatureStatistics:
    released: list[dict[str, NDArray[Any]]] = []
    for client, one in zip(clients, marked, strict=True):
        plan = plans[client.key]
        noise = None if plan is None else plan.statistics_noise_multiplier
        with _named(client):
            released.append(
                measure_columns(one.table, spec.data, ~one.holdout)
                if noise is None
                else measure_privately(one.table, spec.data, ~one.holdout, noise)
            )
    return merge_statistics(spec.data, released)


def _named(client: Client) -> AbstractContextManager[None]:
    return _told(f"{client.organization}/{client.dataset}")


@contextmanager
def _told(whose: str) -> Iterator[None]:
    try:
        yield
    except DataRefused as refusal:
        raise RecordsRefused(f"{whose}: {refusal.told(counts=True)}") from refusal
