"""What the learning benchmarks share: images cut into clients, one pool for many simulations, accuracy by round."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.images.labelled import Labelled, Parts, without_images_of
from isthmus.wire.jobs import JobSpec
from isthmus_worker.data import Table
from isthmus_worker.npz import fingerprints_of
from isthmus_worker.simulation.clients import cut
from isthmus_worker.simulation.engine import Round, SimulationFailed, simulate
from isthmus_worker.simulation.partitions import Partition
from isthmus_worker.simulation.pool import Pool

CLIENTS = 10
FEWEST_ROWS = 20
"""Of a client. A Dirichlet cut that gives somebody fewer is drawn again."""


@dataclass(frozen=True)
class Federation:
    """Images to train on, cut anew for every seed, and images that nobody trains on."""

    train: Table
    test: Table
    pool: Pool

    def run(
        self,
        spec: JobSpec,
        partition: str,
        seed: int,
        *,
        test_every: int = 1,
        on_accuracy: Callable[[int, float], bool | None] = lambda _number, _accuracy: None,
    ) -> list[float]:
        """The accuracy on the test images after every round that was measured.

        Args:
            spec: the job; its own seed is replaced by one that follows from `seed`.
            partition: as in `isthmus simulate --partition`.
            seed: of the cut, the initial model, the cohorts and the batches.
            test_every: measure after every so many rounds.
            on_accuracy: hears the round and its accuracy; where it returns True, the run ends.

        Returns:
            What was measured until the run ended; if training diverged, until then.
        """
        job_seed = hashlib.sha256(f"isthmus benchmarks {seed}".encode()).hexdigest()
        spec = spec.model_copy(update={"seed": job_seed})
        clients = cut(self.train, spec, Partition.parse(partition), CLIENTS, seed=seed, min_rows=FEWEST_ROWS)
        found: list[float] = []

        def told(done: Round) -> bool | None:
            if done.test is None:
                return None
            found.append(done.test["accuracy"])
            return on_accuracy(done.number, found[-1])

        try:
            simulate(spec, clients, test=self.test, test_every=test_every, on_round=told, pool=self.pool)
        except SimulationFailed as failed:
            if "diverged" not in str(failed):
                raise
        return found


@contextmanager
def federation(parts: Parts, processes: int) -> Iterator[Federation]:
    """The images as tables, and processes for as long as the block runs."""
    with Pool(processes) as pool:
        yield Federation(as_table(parts.train), as_table(without_images_of(parts.test, parts.train)), pool)


def as_table(images: Labelled) -> Table:
    """The columns `image` and `label`, as a worker would have loaded them from an archive."""
    columns: dict[str, NDArray[Any]] = {"image": images.images, "label": images.labels}
    return Table(columns=columns, fingerprints=fingerprints_of(columns))


def job(layers: Sequence[Any], shape: Sequence[int], *, training: Mapping[str, Any], rounds: int) -> JobSpec:
    """A job over images of bytes in which half of the clients take part in a round, and all rows are trained on."""
    return JobSpec.model_validate(
        {
            "name": "benchmark",
            "model": {"layers": list(layers)},
            "data": {
                "task": "classification",
                "features": [{"name": "image", "shape": list(shape), "divide_by": 255}],
                "target": "label",
                "classes": 10,
            },
            "training": training,
            "cohort": {"fraction": 0.5, "min_updates": CLIENTS // 2},
            "privacy": "none",
            "rounds": rounds,
            "evaluation": {"holdout": 0, "every": 0},
        }
    )


def rounds_to(accuracies: Sequence[float], target: float) -> float | None:
    """After how many rounds the best model so far has this accuracy; None if none has.

    Between two rounds the curve is a straight line, as in the paper's tables. What the first round reaches counts as
    one round.

    Source:
        McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data", section 3.
        https://arxiv.org/abs/1602.05629
    """
    best = np.maximum.accumulate(np.asarray(accuracies, dtype=np.float64))
    reached = np.flatnonzero(best >= target)
    if not len(reached):
        return None
    after = int(reached[0])
    if after == 0:
        return 1.0
    low, high = best[after - 1], best[after]
    return after + float((target - low) / (high - low))
